"""predict.py: pictures brought to MNIST's form, and what it answers."""

import contextlib
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
from scipy import ndimage

import mnist
import predict

posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")


def seven(size=100, left=30, top=20):
    """Return a 7 in dark ink on light paper, 25 x 40 pixels, as an array (size, size)."""
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


def test_digit_fits_and_is_centred():
    digit = prepared(seven())
    rows, columns = predict.bounding_box(digit.numpy())
    assert rows.stop - rows.start == 20
    assert columns.stop - columns.start == pytest.approx(20 * 25 / 40, abs=1)
    assert ndimage.center_of_mass(digit.numpy()) == pytest.approx((14, 14), abs=0.6)
    assert digit[0, 0] == 0
    assert digit.max() == 255
    assert 0 < ((digit > 0) & (digit < 255)).sum() < 200  # anti-aliased


def test_mnists_form_is_unchanged():
    digit = prepared(seven())
    assert torch.equal(prepared(digit.numpy()), digit)
    assert torch.equal(prepared(np.stack([digit.numpy()] * 3, axis=-1)), digit)
    assert torch.equal(prepared(digit.numpy().astype(np.uint16) * 257), digit)


@pytest.mark.parametrize("spoil", [lambda d: 255 - d, lambda d: np.roll(d, 3, axis=1), lambda d: d // 2 + 20])
def test_other_28_x_28_is_brought_to_form(spoil):
    digit = prepared(seven())
    again = prepared(spoil(digit.numpy()))
    assert not torch.equal(again, torch.from_numpy(spoil(digit.numpy())))
    assert difference(again, digit) < 0.03


def test_mnist_is_unchanged():
    _, (images, _) = mnist.load_mnist(mnist.default_data_dir())
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
def test_surroundings_make_no_difference(spoil):
    assert difference(prepared(spoil(seven())), prepared(seven())) < 0.03


def test_scale_and_place_do_not_matter():
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


def on_its_side(image):
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
        on_its_side,
    ],
)
def test_every_mode_gives_one_digit(convert):
    image = Image.fromarray(seven())
    assert difference(predict.prepare(convert(image)), predict.prepare(image)) < 0.03


# --- predict.py ----------------------------------------------------------------------------------------------------


def bomb():
    """Return the bytes of a PNG file that claims to hold 100,000 x 100,000 pixels."""
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
        (b"", "not an image"),
        (b"Dear diary", "not an image"),
        (png(noisy(seven()))[:2000], "damaged"),
        (bomb(), "pixels"),
        (animation(), "2 pictures"),
        (png(np.full((50, 50), 255, dtype=np.uint8)), "nothing to be seen"),
        (png(noisy(np.full((200, 200), 128, dtype=np.uint8))), "nothing to be seen"),
        (png(np.zeros((1, 1), dtype=np.uint8)), "nothing to be seen"),
        (png(np.array([[255, 0, 255], [0, 0, 0], [255, 0, 0]], dtype=np.uint8)), "nothing to be seen"),
    ],
)
def test_unreadable_picture_is_named(content, reason, folder, capsys):
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


def test_json_holds_ten_probabilities(folder, capsys):
    Path("a.png").write_bytes(png(seven()))
    (result,) = predict.main(["--json", "a.png"])
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    assert result["picture"] == "a.png"
    assert len(result["probabilities"]) == 10
    assert sum(result["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert result["digit"] == max(range(10), key=result["probabilities"].__getitem__)
    assert err == "Using the weights in mnist.pt\n"


def test_show_writes_a_contact_sheet(folder):
    Path("a.png").write_bytes(png(seven()))
    predict.main(["--show", "a.png", "a.png"])
    with Image.open("seen.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    row = pixels.shape[0] // 2
    assert (pixels[:row, : pixels.shape[1] // 2] == 30).any()  # the ink of the original,
    assert (pixels[:row, pixels.shape[1] // 2 :] == 0).mean() > 0.3  # the black ground of MNIST


def test_show_spares_a_picture_of_its_name(folder, capsys):
    Path("seen.png").write_bytes(png(seven()))
    with pytest.raises(SystemExit) as stop:
        predict.main(["--show", "./seen.png"])
    assert stop.value.code == 2
    assert "it would overwrite the picture seen.png" in capsys.readouterr().err
    assert Path("seen.png").read_bytes() == png(seven())


def test_standard_input(folder):
    command = [sys.executable, predict.__file__, "-"]
    done = subprocess.run(command, input=png(seven()), capture_output=True, check=True)
    assert done.stdout.startswith(b"-: ")


@posix
def test_full_disk_is_named(folder, full_disk):
    Path("a.png").write_bytes(png(noisy(seven())))
    Path("seen.png").write_bytes(b"an earlier sheet")
    command = [sys.executable, predict.__file__, "--show", "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full_disk)
    assert done.returncode == 1
    assert done.stderr.endswith("predict.py: error: seen.png: File too large\n")
    assert Path("seen.png").read_bytes() == b"an earlier sheet"


@posix
def test_closed_standard_input(folder):
    command = [sys.executable, predict.__file__, "-"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: os.close(0))
    assert done.returncode == 1
    assert done.stderr.endswith("predict.py: error: -: there is no standard input: name a file\n")


@posix
def test_closed_standard_error(folder):
    Path("a.png").write_bytes(png(seven()))
    command = [sys.executable, predict.__file__, "a.png", "missing.png"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(2))
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1  # the messages do not take its place


def test_wildcard_that_the_shell_left(folder):
    for name in ("d.png", "b.png", "a.png", "e.png", "c.png", "c1.png", "c[1].png"):
        Path(name).write_bytes(png(seven()))
    assert [result["picture"][0] for result in predict.main(["?.png"])] == ["a", "b", "c", "d", "e"]
    assert [result["picture"] for result in predict.main(["c[1].png"])] == ["c[1].png"]


def test_name_that_the_output_cannot_encode(folder):
    Path("é.png").write_bytes(png(seven()))
    command = [sys.executable, predict.__file__, "é.png"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("\\xe9.png: ")


@pytest.mark.parametrize("script", ["predict.py", "report.py"])
def test_isolated_python_finds_mnist(script, tmp_path):
    path = Path(predict.__file__).with_name(script)
    subprocess.run([sys.executable, "-I", path, "--help"], cwd=tmp_path, check=True, capture_output=True)


def test_output_can_be_any_stream(folder):
    Path("a.png").write_bytes(png(seven()))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        predict.main(["a.png"])
    assert out.getvalue().startswith("a.png: ")


def test_missing_weights_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        predict.main(["--model", "absent.pt", "a.png"])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(["--help"])
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_no_picture_is_wrong_usage():
    with pytest.raises(SystemExit) as stop:
        predict.main([])
    assert stop.value.code == 2
