"""report.py: the figures that it draws."""

import subprocess
import sys
from pathlib import Path

import mnist
from tools import report

import pytest
import torch
from PIL import Image


@pytest.mark.parametrize("path", ["report.png", "report.PDF", "report.svg"])
def test_format_follows_the_name(path, small_mnist, folder, monkeypatch):
    monkeypatch.setattr(report, "MAX_MISTAKES", 5)
    assert report.main(["--data-dir", small_mnist, "--out", path]) == Path(path)
    start = Path(path).read_bytes()[:5]
    assert start.startswith({"png": b"\x89PNG", "PDF": b"%PDF", "svg": b"<?xml"}[path[-3:]])


@pytest.mark.parametrize(
    ("wrong", "title", "zeros_as_1"),
    [(0, "No mistakes", []), (1, "The one mistake", ["1"]), (310, "10 more are left out", ["31"])],
)
def test_mistakes_are_shown(wrong, title, zeros_as_1, checkpoint, digits, monkeypatch):
    images, labels = digits(400)
    predicted = torch.where(torch.arange(400) < wrong, (labels + 1) % 10, labels)
    logits = torch.zeros(400, 10)
    logits[torch.arange(400), predicted] = torch.linspace(2, 3, 400)
    monkeypatch.setattr(mnist, "classify", lambda model, images: logits)
    figure = report.draw_report(mnist.Net(), checkpoint, images, labels, "test")
    (confusions,) = (ax for ax in figure.axes if ax.get_title(loc="left") == "Confusions")
    assert [text.get_text() for text in confusions.texts if text.get_position() == (1, 0)] == zeros_as_1
    below = figure.subfigs[1]
    assert title in below.get_suptitle()
    captions = [ax.get_title() for ax in below.axes if ax.get_title()]
    assert len(captions) == min(wrong, 300)
    shares = [int(caption.split("(")[1].rstrip("%)")) for caption in captions]
    assert shares == sorted(shares, reverse=True)
    assert all(int(caption[4]) == (int(caption[0]) + 1) % 10 for caption in captions)
    report.plt.close(figure)


def test_calibration_error_is_the_mean_gap():
    shares = torch.tensor([0.5] * 4 + [0.9] * 6)  # of the first class; 1 of 4 and 6 of 6 are right
    probabilities = torch.stack([shares, *[(1 - shares) / 9] * 9], dim=1)
    labels = torch.tensor([0, 1, 2, 3] + [0] * 6)
    confidence, accuracy, count, error = report.reliability(probabilities, labels)
    filled = count > 0
    assert count[filled].tolist() == [4, 6]
    assert torch.allclose(confidence[filled], torch.tensor([0.5, 0.9]))
    assert torch.allclose(accuracy[filled], torch.tensor([0.25, 1]))
    assert error == pytest.approx(0.4 * 0.25 + 0.6 * 0.1)


def test_every_panel_is_drawn(checkpoint, digits):
    figure = report.draw_report(mnist.Net(), checkpoint, *digits(20), "test")
    titles = [ax.get_title(loc="left").partition(" error")[0] for ax in figure.axes]
    assert {"Training", "Confusions", "Accuracy per digit", "Calibration"} < {*titles}
    report.plt.close(figure)


def test_weights_alone_have_no_curve(small_mnist, folder, checkpoint):
    torch.save(checkpoint["state_dict"], "mnist.pt")
    report.main(["--data-dir", small_mnist])
    with Image.open("report.png") as image:
        assert image.width > 1500


@pytest.mark.parametrize("wrong", [{"settings": [1]}, {"history": [{"epoch": 1}]}, {"history": 7}, {"history": ["1"]}])
def test_checkpoint_of_another_form_is_refused(wrong, no_work, folder, checkpoint):
    torch.save(checkpoint | wrong, "mnist.pt")
    with pytest.raises(mnist.UserError, match=r"the history or the settings in mnist\.pt"):
        report.main(["--out", "report.png"])
    assert not Path("report.png").exists()


def test_validation_is_not_called_a_test(checkpoint):
    assert report.tested_on(checkpoint, "mnist.pt") == "test"
    assert report.tested_on(checkpoint | {"settings": {"validate": True}}, "mnist.pt") == "validation"


def test_empty_history_has_no_curve(small_mnist, folder, checkpoint):
    torch.save(checkpoint | {"history": []}, "mnist.pt")
    assert report.main(["--data-dir", small_mnist])


def test_augmentation_is_drawn(small_mnist, folder):
    report.main(["--augmentation", "--data-dir", small_mnist, "--out", "row.png"])
    with Image.open("row.png") as image:
        assert image.width > 900
    figure = report.draw_augmentation(*mnist.load_mnist(small_mnist)[0])
    first_of_each_row = [axes for axes in figure.axes if axes.get_subplotspec().is_first_col()]
    assert [axes.get_ylabel() for axes in first_of_each_row] == ["as it is", "", "augmented", "", "no digit"]


def test_missing_weights_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        report.main(["--model", "absent.pt"])


@pytest.fixture
def no_work(monkeypatch):
    """No data are loaded before all else is checked."""
    monkeypatch.setattr(mnist, "load_mnist", None)


def test_missing_folder_is_refused(no_work, folder):
    with pytest.raises(FileNotFoundError, match=r"no.folder.report\.png"):
        report.main(["--out", str(Path("no/folder/report.png"))])


@pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")
def test_full_disk_is_refused(folder, full_disk):
    Path("report.png").write_bytes(b"an earlier report")
    command = [sys.executable, report.__file__, "--augmentation"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full_disk)
    assert done.returncode == 1
    assert done.stderr == "report.py: error: report.png: File too large\n"
    assert Path("report.png").read_bytes() == b"an earlier report"


def test_other_formats_are_refused(no_work, folder, assert_refused):
    assert_refused(report.main, "--out", "report.gif")


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    assert "--augmentation" in capsys.readouterr().out
