"""Tests of predict.py, report.py and robustness.py, on pictures and weights made here."""

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import mnist
import predict
import report
import robustness
from test_model import digits, small_mnist  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def checkpoint():
    """Return what main() would save, of a network that has learned nothing."""
    torch.manual_seed(0)
    model = mnist.Net()
    epoch = {"train_loss": 0.9, "train_accuracy": 90.0, "test_loss": 0.5, "test_accuracy": 98.0}
    history = [{"epoch": number, **epoch} for number in (1, 2)]
    return {"state_dict": model.state_dict(), "history": history, "settings": {"validate": False}}


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """Work in a folder that holds such weights in mnist.pt."""
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "mnist.pt")
    return tmp_path


def seven(size=100, left=30, top=20):
    """Return a 7 in dark ink on light paper, its box 25 x 40 pixels, as an array (size, size)."""
    pixels = np.full((size, size), 230, dtype=np.uint8)
    pixels[top : top + 6, left : left + 25] = 30
    pixels[top : top + 40, left + 19 : left + 25] = 30
    return pixels


def prepared(pixels):
    return predict.prepare(Image.fromarray(pixels))


def difference(one, other):
    """Return the mean difference of two prepared images, 0 to 1."""
    return ((one.float() - other.float()).abs().mean() / 255).item()


# --- MNIST's form --------------------------------------------------------------------------------------------------


def test_a_digit_fits_the_box_and_is_centred_by_mass():
    digit = prepared(seven())
    rows, columns = predict.extent(digit)
    assert rows.stop - rows.start == 20
    assert columns.stop - columns.start == pytest.approx(20 * 25 / 40, abs=1)
    assert all(abs(mean - 14) <= 0.6 for mean in predict.centre(digit.float()))
    assert digit[0, 0] == 0
    assert digit.max() == 255
    assert 0 < ((digit > 0) & (digit < 255)).sum() < 200  # anti-aliased


def test_an_image_in_mnists_form_is_unchanged():
    digit = prepared(seven())
    assert torch.equal(prepared(digit.numpy()), digit)
    assert torch.equal(prepared(np.stack([digit.numpy()] * 3, axis=-1)), digit)
    assert torch.equal(prepared(digit.numpy().astype(np.uint16) * 257), digit)


@pytest.mark.parametrize("spoil", [lambda d: 255 - d, lambda d: np.roll(d, 3, axis=1), lambda d: d // 2 + 20])
def test_another_thumbnail_of_28_x_28_is_brought_to_the_form(spoil):
    digit = prepared(seven())
    again = prepared(spoil(digit.numpy()))
    assert not torch.equal(again, torch.from_numpy(spoil(digit.numpy())))
    assert difference(again, digit) < 0.03


@pytest.fixture(scope="module")
def real_test_set():
    """Return the real test set; where it cannot be had fail if CI is set, and skip elsewhere."""
    try:
        return mnist.load_mnist(mnist.default_data_dir())[1]
    except mnist.UserError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))


def test_every_test_digit_of_mnist_is_unchanged(real_test_set):
    images, _ = real_test_set
    assert all(torch.equal(prepared(image.numpy()), image) for image in images)


def lit(pixels):
    return (pixels * np.linspace(0.4, 1, pixels.shape[1])).astype(np.uint8)


def shadowed(pixels):
    pixels = pixels.copy()
    pixels[:, 75:] //= 3  # darker than the ink is faint
    return pixels


def on_a_table(pixels):
    pixels = pixels.copy()
    pixels[97:] = 60  # the paper ends here
    return pixels


def speckled(pixels):
    pixels = pixels.copy()
    pixels[90:92, 90:92] = pixels[5:7, 90:92] = pixels[85:87, 4:6] = 0
    return pixels


def noisy(pixels):
    noise = np.random.default_rng(0).normal(0, 12, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoil", [lit, shadowed, on_a_table, speckled, noisy, lambda pixels: 255 - pixels])
def test_light_shadow_table_specks_noise_and_boards_make_no_difference(spoil):
    assert difference(prepared(spoil(seven())), prepared(seven())) < 0.03


def test_scale_and_place_make_no_difference():
    large = np.kron(seven(), np.ones((9, 9), dtype=np.uint8))
    assert difference(prepared(large), prepared(seven())) < 0.02
    assert difference(prepared(seven(size=150, left=100, top=90)), prepared(seven())) < 0.02


def stored(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def transparent(image):
    """Ink on a transparent ground whose hidden colour is that of the ink."""
    ink = Image.new("RGBA", image.size, (30, 30, 30, 255))
    ink.putalpha(ImageOps.invert(image))
    return ink


def sideways(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image.convert("1", dither=Image.Dither.NONE),
        lambda image: image.convert("RGB"),
        lambda image: stored(image.convert("P")),
        lambda image: stored(image.convert("CMYK"), "TIFF"),
        lambda image: stored(Image.fromarray(np.asarray(image).astype(np.uint16) * 257)),
        lambda image: stored(transparent(image)),
        lambda image: stored(transparent(image).convert("LA")),
        sideways,
    ],
)
def test_every_mode_gives_the_same_digit(convert):
    image = Image.fromarray(seven())
    assert difference(predict.prepare(convert(image)), predict.prepare(image)) < 0.03


# --- predict.py ----------------------------------------------------------------------------------------------------


def bomb():
    """Return a PNG file's bytes that say that it holds 100,000 x 100,000 pixels."""
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    chunks = [(13).to_bytes(4, "big"), header, zlib.crc32(header).to_bytes(4, "big")]
    return (
        b"\x89PNG\r\n\x1a\n"
        + b"".join(chunks)
        + (0).to_bytes(4, "big")
        + b"IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )


def animation():
    file = io.BytesIO()
    Image.fromarray(seven()).save(file, "GIF", save_all=True, append_images=[Image.fromarray(255 - seven())])
    return file.getvalue()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "no image"),
        (b"Dear diary", "no image"),
        (png(noisy(seven()))[:2000], "damaged"),
        (bomb(), "pixels"),
        (animation(), "2 pictures"),
        (png(np.full((50, 50), 255, dtype=np.uint8)), "nothing to be seen"),
        (png(noisy(np.full((200, 200), 128, dtype=np.uint8))), "nothing to be seen"),
        (png(np.zeros((1, 1), dtype=np.uint8)), "nothing to be seen"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_answered(content, reason, folder, capsys):
    if content is not None:
        Path("bad.png").write_bytes(content)
    Path("good.png").write_bytes(png(seven()))
    with pytest.raises(SystemExit) as stop:
        predict.main(["bad.png", "good.png"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out.startswith("good.png: ")
    assert len(out.splitlines()) == 1
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("predict.py: error: bad.png: ")
    assert reason in line


def test_json_holds_the_ten_probabilities(folder, capsys):
    Path("a.png").write_bytes(png(seven()))
    (result,) = predict.main(["--json", "a.png"])
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    assert result["picture"] == "a.png"
    assert len(result["probabilities"]) == 10
    assert sum(result["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert result["digit"] == max(range(10), key=result["probabilities"].__getitem__)
    assert err == "Using the weights in mnist.pt\n"


def test_show_puts_the_picture_beside_what_the_network_saw(folder):
    Path("a.png").write_bytes(png(seven()))
    predict.main(["--show", "a.png", "a.png"])
    with Image.open("seen.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    row = pixels.shape[0] // 2
    assert (pixels[:row, : pixels.shape[1] // 2] == 30).any()  # the ink of the original,
    assert (pixels[:row, pixels.shape[1] // 2 :] == 0).mean() > 0.3  # the black ground of MNIST


def test_weights_are_ones_own_if_there_are_any_else_those_that_came_with_it(folder):
    assert predict.find_weights() == Path("mnist.pt")
    assert predict.find_weights(Path("x.pt")) == Path("x.pt")
    Path("mnist.pt").unlink()
    assert predict.find_weights() == Path(predict.__file__).with_name("pretrained.pt")


def test_the_pretrained_weights_exceed_99_4_percent(real_test_set):
    model, checkpoint = mnist.load(Path(predict.__file__).with_name("pretrained.pt"))
    images, labels = real_test_set
    correct = (predict.classify(model, images).argmax(dim=1) == labels).sum().item()
    assert correct > 9940
    assert checkpoint["settings"]["seed"] == 0
    assert checkpoint["settings"]["epochs"] == mnist.EPOCHS
    assert 100 * correct / len(labels) == pytest.approx(checkpoint["test_accuracy"], abs=0.02)


def test_a_picture_comes_through_standard_input(folder):
    command = [sys.executable, predict.__file__, "-"]
    done = subprocess.run(command, input=png(seven()), capture_output=True, check=True)
    assert done.stdout.startswith(b"-: ")


@pytest.mark.parametrize("script", [predict, report, robustness])
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["predict"], ["report", "--out", "report.gif"], ["robustness", "--images", "0"]])
def test_wrong_usage_is_status_2(arguments):
    with pytest.raises(SystemExit) as stop:
        {"predict": predict, "report": report, "robustness": robustness}[arguments[0]].main(arguments[1:])
    assert stop.value.code == 2


# --- report.py and robustness.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["report.png", "report.PDF", "report.svg"])
def test_the_report_is_written_in_the_format_of_its_name(path, small_mnist, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(report, "SHOWN", 5)
    assert report.main(["--data-dir", small_mnist, "--out", path]) == Path(path)
    start = Path(path).read_bytes()[:5]
    assert start.startswith({"png": b"\x89PNG", "PDF": b"%PDF", "svg": b"<?xml"}[path[-3:]])


@pytest.mark.parametrize(("wrong", "said"), [(0, "No mistakes"), (1, "The one mistake"), (310, "10 more are left out")])
def test_the_report_shows_the_mistakes_that_there_are(wrong, said, checkpoint, monkeypatch):
    labels = torch.arange(400) % 10
    probabilities = torch.full((400, 10), 0.05)
    predicted = torch.where(torch.arange(400) < wrong, (labels + 1) % 10, labels)
    probabilities[torch.arange(400), predicted] = torch.linspace(0.5, 0.6, 400)
    monkeypatch.setattr(predict, "classify", lambda model, images: probabilities)
    figure = report.draw_report(mnist.Net(), checkpoint, digits(400)[0], labels, "test")
    below = figure.subfigs[1]
    assert said in below.get_suptitle()
    captions = [ax.get_title() for ax in below.axes if ax.get_title()]
    assert len(captions) == min(wrong, 300)
    shares = [int(caption.split("(")[1].rstrip("%)")) for caption in captions]
    assert shares == sorted(shares, reverse=True)
    assert all(int(caption[4]) == (int(caption[0]) + 1) % 10 for caption in captions)
    report.plt.close(figure)


def test_the_augmentation_is_drawn(small_mnist, folder):  # noqa: F811
    report.main(["--augmentation", "--data-dir", small_mnist, "--out", "row.png"])
    with Image.open("row.png") as image:
        assert image.width > 900


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (predict, ["--model", "absent.pt", "a.png"]),
        (report, ["--model", "absent.pt"]),
        (robustness, ["--model", "absent.pt"]),
        (report, ["--out", "no/folder/report.png"]),
        (robustness, ["--images", "1", "--out", "no/folder/results.json"]),
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_named(script, arguments, small_mnist, folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MNIST_DATA", small_mnist)
    monkeypatch.setattr(report, "SHOWN", 5)
    with pytest.raises(mnist.UserError, match=r"absent\.pt|no/folder"):
        script.main(arguments)


def test_robustness_prints_a_row_for_each_kind_of_picture(small_mnist, folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("MNIST_DATA", small_mnist)
    results = robustness.main(["--images", "2", "--out", "results.json"])
    assert json.loads(Path("results.json").read_text()) == results
    assert list(results) == list(robustness.PICTURES)
    assert capsys.readouterr().out.count(" % |") == 2 * len(results)
