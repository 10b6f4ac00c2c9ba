"""predict.py: what it answers."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import mnist
from reader import picture, sheet
from reader.digit import Digit
from tests.drawing import draw, four, noisy, png, seven
from tools import predict, weights

import numpy as np
import pytest
from PIL import ExifTags, Image

ROOT = Path(mnist.__file__).parent

posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")


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


def equals():
    return draw(np.full((80, 100), 230, dtype=np.uint8), (20, 30, 80, 30), (20, 50, 80, 50), width=5)


def stored_as(file_format):
    file = io.BytesIO()
    Image.fromarray(noisy(seven())).save(file, file_format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (b"Dear diary", "not a picture that can be read (image/png, by its name): save it as PNG or JPEG"),
        (stored_as("HEIF")[:500], "damaged"),
        (png(noisy(seven()))[:2000], "damaged"),
        (bomb(), "pixels"),
        (animation(), "2 pictures"),
        (png(np.full((50, 50), 255, dtype=np.uint8)), "no digit to be seen"),
        (png(noisy(np.full((200, 200), 128, dtype=np.uint8))), "no digit to be seen"),
        (png(equals()), "no digit to be seen"),
        (png(np.zeros((1, 1), dtype=np.uint8)), "it has only 1 x 1 pixels"),
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


@pytest.mark.parametrize("file_format", picture.FORMATS)
def test_damaged_pictures_do_not_stop_the_others(file_format, folder, damage, capsys):
    """Of a thousand, each is read or named, whatever its decoder raises."""
    whole = stored_as(file_format)
    names = [f"{i}.png" for i in range(1000 // len(picture.FORMATS) + 1)]
    for name in names:
        Path(name).write_bytes(damage(whole))
    Path("good").write_bytes(whole)
    with contextlib.suppress(SystemExit):
        predict.main(["--single", *[name for bad in names for name in (bad, "good")]])
    out, err = capsys.readouterr()
    assert out.count("good: ") == len(names)
    read = len(out.splitlines()) - len(names)
    assert read + err.count("predict.py: error: ") == len(names)


def test_name_that_cannot_be_a_file(folder, capsys):
    Path("good.png").write_bytes(png(seven()))
    with pytest.raises(SystemExit):
        predict.main([1000 * "a", "good.png"])
    out, err = capsys.readouterr()
    assert out.startswith("good.png: ")
    assert f"predict.py: error: {1000 * 'a'}: " in err


@posix
def test_folder_that_may_not_be_entered(folder, unprivileged):
    Path("closed").mkdir()
    Path("closed/a.png").write_bytes(png(seven()))
    Path("good.png").write_bytes(png(seven()))
    Path("closed").chmod(0)
    command = [sys.executable, predict.__file__, "closed/a.png", "good.png"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=unprivileged)
    Path("closed").chmod(0o755)
    assert done.stdout.startswith("good.png: ")
    assert done.stderr.endswith("predict.py: error: closed/a.png: Permission denied\n")


@posix
def test_name_is_printed_in_one_line(folder, capsys):
    name = "a\nb\x1b[31mé.png"
    Path(name).write_bytes(png(seven()))
    with pytest.raises(SystemExit):
        predict.main(["--show", name, f"no {name}"])
    out, err = capsys.readouterr()
    assert out.startswith("a\\nb\\x1b[31mé.png: ")
    assert "error: no a\\nb\\x1b[31mé.png: No such file" in err
    assert Path("seen.png").exists()


def test_caption_is_one_line():
    assert sheet.to_row(Image.fromarray(seven()), [], "a\nb is 7").height == sheet.SIDE + 3 * sheet.GAP


def test_narrow_picture_is_shown():
    row = sheet.to_row(Image.new("L", (1, 640), 255), [], "")
    assert row.getpixel((sheet.GAP + sheet.SIDE // 2, sheet.GAP + sheet.SIDE // 2)) == (255, 255, 255)


def test_all_sides_of_a_box_are_shown():
    one = Digit((0, 0, 100, 200), np.zeros((28, 28), dtype=np.uint8), np.zeros(10))
    row = np.array(sheet.to_row(Image.new("L", (100, 200), 255), [[one]], ""))
    red = (row == (255, 0, 0)).all(axis=2)
    assert np.flatnonzero(red.sum(axis=0) == sheet.SIDE).tolist() == [72, 183]
    assert np.flatnonzero(red.sum(axis=1) == sheet.SIDE // 2).tolist() == [sheet.GAP, sheet.GAP + sheet.SIDE - 1]


def test_damaged_metadata_harm_nothing(folder, recwarn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Software] = "a pen"
    metadata = exif.tobytes()
    letters = metadata.replace(b"\x01\x31\0\2", b"\x01\x16\0\2")  # where a number, the rows per strip, should be
    assert letters != metadata
    upright = Image.fromarray(seven())
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    upright.save("no-exif.png", exif=b"Exif\0\0garbage")
    lying.save("cut.png", exif=metadata[:-4])
    lying.save("letters.png", exif=letters)
    for name in ("no-exif.png", "cut.png", "letters.png"):
        (result,) = predict.main(["--model", str(weights.PRETRAINED), "--show", name])
        assert result["number"] == "7", name
    assert not recwarn.list


def test_jpeg_may_be_larger_than_what_is_decoded(folder, monkeypatch, capsys):
    monkeypatch.setattr(picture, "MAX_PIXELS", 1_000_000)
    image = Image.fromarray(seven()).resize((1600, 1600))
    for name in ("large.jpg", "large.png"):
        image.save(name)
    with pytest.raises(SystemExit):
        predict.main(["--model", str(weights.PRETRAINED), "large.jpg", "large.png"])
    out, err = capsys.readouterr()
    assert out.startswith("large.jpg: 7 ")
    assert "large.png: it has 2,560,000 pixels, more than 1,000,000: reduce it" in err


def test_box_is_inside_a_reduced_jpeg(folder):
    paper = np.full((1281, 1280), 230, dtype=np.uint8)  # half of it is 641 x 640
    Image.fromarray(draw(paper, (640, 400, 640, 1300), width=90)).save("1.jpg")
    (result,) = predict.main(["1.jpg"])
    (one,) = result["digits"]
    assert one["box"][3] == 1281


def test_a_phones_copies_are_passed_over(folder):
    images = Image.fromarray(seven()), Image.fromarray(four())
    images[0].save("a.jpg", "MPO", save_all=True, append_images=images[1:])
    (result,) = predict.main(["--model", str(weights.PRETRAINED), "a.jpg"])
    assert result["number"] == "7"


def test_single_keeps_to_one_digit(folder):
    Path("a.png").write_bytes(png(np.concatenate([four(), seven()], axis=1)))
    (result,) = predict.main(["--single", "--model", str(weights.PRETRAINED), "a.png"])
    assert len(result["digits"]) == 1


def test_readme_shows_the_answers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = re.findall(r"(?m)^assets/.+: .+", Path("tools/README.md").read_text(encoding="utf-8"))
    predict.main(["--model", str(weights.PRETRAINED), *[line.partition(":")[0] for line in shown]])
    percents = r" \([\d.%, ]+\)(, else . \(.+\))?"
    assert re.sub(percents, "", capsys.readouterr().out).splitlines() == [re.sub(percents, "", line) for line in shown]
    assert len(shown) == 3


def test_json_holds_every_digit(folder, capsys):
    Path("a.png").write_bytes(png(np.concatenate([four(), seven()], axis=1)))
    (result,) = predict.main(["--json", "--model", str(weights.PRETRAINED), "a.png"])
    assert json.loads(capsys.readouterr().out) == result
    assert result["number"] == "47"
    assert [digit["digit"] for digit in result["digits"]] == [4, 7]
    for digit in result["digits"]:
        assert digit["probability"] == max(digit["probabilities"]) == digit["probabilities"][digit["digit"]]
    assert "digit" not in result


@pytest.mark.parametrize(
    ("tops", "sure", "line"),
    [
        ([[0.95]], True, "a.png: 3 (95.0%), else 9 (0.6%)"),
        ([[0.6]], False, "a.png: 3 (60.0%), else 9 (4.4%), not sure"),
        ([[0.95, 0.9]], True, "a.png: 33 (95.0%, 90.0%)"),
        ([[0.95], [0.9, 0.6]], False, "a.png: 3 33 (95.0%, 90.0%, 60.0%), not sure"),
    ],
)
def test_answer_is_a_line(tops, sure, line):
    def digit(top):
        return Digit([0, 0, 9, 9], None, np.where(np.arange(10) == 3, top, (1 - top) / 9))

    result = predict.as_result("a.png", [[digit(top) for top in tops_of_line] for tops_of_line in tops], sure, 1)
    assert predict.as_text(result) == line


def test_json_holds_ten_probabilities(folder, capsys):
    Path("a.png").write_bytes(png(seven()))
    (result,) = predict.main(["--json", "a.png"])
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    assert result["picture"] == "a.png"
    assert len(result["probabilities"]) == 10
    assert 0 < sum(result["probabilities"]) <= 1  # the rest is that of no digit
    assert result["digit"] == max(range(10), key=result["probabilities"].__getitem__)
    assert err == "Using the weights in mnist.pt\n"


def test_show_writes_a_contact_sheet(folder):
    Path("a.png").write_bytes(png(seven()))
    predict.main(["--show", "a.png", "a.png"])
    with Image.open("seen.png") as image:
        pixels = np.asarray(image.convert("L"))
    row = pixels.shape[0] // 2
    assert (pixels[:row, : pixels.shape[1] // 2] == 30).any()  # the ink of the original,
    assert (pixels[:row, pixels.shape[1] // 2 :] == 0).mean() > 0.3  # the black background of MNIST


def test_sheet_that_cannot_be_written_is_refused_at_once(folder, monkeypatch):
    monkeypatch.setattr(picture, "load", None)
    Path("seen.png").mkdir()
    with pytest.raises(FileExistsError, match=r"seen\.png"):
        predict.main(["--show", "a.png"])


def test_sheet_shows_the_first_pictures(folder, monkeypatch, capsys):
    monkeypatch.setattr(sheet, "MOST", 2)
    Path("a.png").write_bytes(png(seven()))
    predict.main(["--show", "a.png", "a.png", "a.png"])
    assert "predict.py: warning: seen.png shows the first 2 pictures" in capsys.readouterr().err
    with Image.open("seen.png") as image:
        assert image.height == 2 * (sheet.SIDE + 3 * sheet.GAP)


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


def test_standard_input_is_read_once(capsys):
    with pytest.raises(SystemExit) as stop:
        predict.parse_args(["-", "-"])
    assert stop.value.code == 2
    assert "argument PICTURE: - is standard input, which can be read once" in capsys.readouterr().err


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


@pytest.mark.parametrize("script", ["predict.py", "export.py", "report.py"])
def test_isolated_python_finds_mnist(script, tmp_path):
    """As far as the import of torch, which takes a while."""
    path = Path(predict.__file__).with_name(script)
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(path)!r})"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f'File "{mnist.__file__}"' in done.stderr
    assert "import of torch halted" in done.stderr


@pytest.mark.parametrize(
    "module",
    ["tools.weights", "tools.predict", "tools.export", "tools.report", "benchmarks.seeds", "benchmarks.pictures"],
)
def test_mps_falls_back_wherever_one_begins(module):
    """PyTorch reads the variable when it is imported, so mnist.py must come first."""
    code = f"""
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
            os._exit(sys.stdout.flush() or 0)

sys.meta_path.insert(0, Finder())
import {module}
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


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
