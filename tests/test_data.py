"""The data: files and their faults, the download, batches, augmentation."""

import contextlib
import gzip
import hashlib
import http.server
import math
import os
import re
import socket
import subprocess
import sys
import threading

import mnist

import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import MNIST

posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")

# --- Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def assert_loads(digits, small_mnist):
    """A function that asserts that the small data set is loaded as it should be, from its --data-dir or another."""

    def check(data_dir=small_mnist):
        for (images, labels), n in zip(mnist.load_mnist(data_dir), (500, 100), strict=True):
            expected_images, expected_labels = digits(n)
            assert images.dtype == torch.uint8
            assert torch.equal(images, expected_images)
            assert labels.dtype == torch.int64
            assert torch.equal(labels, expected_labels)

    return check


def unpacked(raw, name):
    return gzip.decompress((raw / f"{name}.gz").read_bytes())


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(mnist, "download", None)


@pytest.mark.parametrize("folder", ["MNIST/raw", "."])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_layout_is_found_and_left_alone(folder, separator, suffix, raw, tmp_path, assert_loads, no_download):
    other = tmp_path / "other"
    (other / folder).mkdir(parents=True)
    for name in mnist.FILES:
        content = (raw / f"{name}.gz").read_bytes() if suffix else unpacked(raw, name)
        (other / folder / f"{name.replace('-idx', f'{separator}idx')}{suffix}").write_bytes(content)
    paths = sorted(other.rglob("*"))
    assert_loads(other)
    assert sorted(other.rglob("*")) == paths


def test_tilde_is_the_home_folder(raw, tmp_path, assert_loads, no_download, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert_loads("~/data")


@posix
def test_read_only_folder_works(start, raw, read_only, unprivileged):
    read_only(*raw.iterdir(), raw, raw.parent, raw.parent.parent)
    process = start("--dry-run", preexec_fn=unprivileged)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""


FAULTS = {
    "empty": lambda content: b"",
    "a bit flipped": lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_faulty_file_is_named(fault, suffix, raw, small_mnist, no_download):
    name = "train-labels-idx1-ubyte"
    content = FAULTS[fault](unpacked(raw, name))
    (raw / f"{name}.gz").unlink()
    (raw / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(mnist.UserError, match=r"damaged, or other data such as FashionMNIST's: .* --data-dir") as error:
        mnist.load_mnist(small_mnist)
    assert str(error.value).startswith(str(raw / f"{name}{suffix}"))


@pytest.mark.parametrize(
    "spoil", [lambda archive: archive[:-40], lambda archive: b"<html>", lambda archive: archive[:20] * 2]
)
def test_faulty_archive_is_named(spoil, raw, small_mnist, no_download):
    path = raw / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(mnist.UserError, match=re.escape(str(path))):
        mnist.load_mnist(small_mnist)


# --- The download --------------------------------------------------------------------------------------------------


@pytest.fixture
def archives(raw, monkeypatch):
    """The archives of the small data set by name, which torchvision now expects, and no longer in their folder."""
    contents = {path.name: path.read_bytes() for path in raw.iterdir()}
    for name in contents:
        (raw / name).unlink()
    md5s = [(name, hashlib.md5(content).hexdigest()) for name, content in contents.items()]
    monkeypatch.setattr(MNIST, "resources", md5s)
    return contents


@pytest.fixture
def mirror(archives, monkeypatch):
    """A function that makes torchvision download from a server here: answer(handler, body) sends each archive."""
    servers = []

    def serve(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    answer(self, archives[self.path.rpartition("/")[2]])

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{servers[-1].server_port}/"])

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler, body, length=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length or len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_download_is_kept(mirror, raw, assert_loads, monkeypatch):
    mirror(send)
    assert_loads()
    assert sorted(path.name for path in raw.iterdir()) == sorted(mnist.FILES)
    assert socket.getdefaulttimeout() is None
    monkeypatch.setattr(mnist, "download", None)
    assert_loads()


def test_download_adds_what_is_missing(mirror, archives, raw, assert_loads):
    name = "t10k-labels-idx1-ubyte"
    (raw / f"{name}.gz").write_bytes(archives[f"{name}.gz"])
    mirror(send)
    assert_loads()
    assert not (raw / name).exists()
    assert (raw / f"{name}.gz").read_bytes() == archives[f"{name}.gz"]


FAULTY_MIRRORS = {
    "404": lambda handler, body: handler.send_error(404),
    "stops half-way": lambda handler, body: send(handler, body[: len(body) // 2], len(body)),
    "other bytes": lambda handler, body: send(handler, b"<html>Please log in</html>"),
    "a SOCKS proxy": lambda handler, body: handler.wfile.write(b"\5\xff"),
    "silent": lambda handler, body: threading.Event().wait(3),
}


@pytest.mark.parametrize("fault", FAULTY_MIRRORS)
def test_failed_download_is_one_line(fault, mirror, raw, small_mnist, monkeypatch):
    monkeypatch.setattr(mnist, "TIMEOUT", 0.5 if fault == "silent" else 30)
    mirror(FAULTY_MIRRORS[fault])
    with pytest.raises(mnist.UserError) as error:
        mnist.load_mnist(small_mnist)
    message = str(error.value)
    assert "\n" not in message
    assert ("timed out" in message) == (fault == "silent")
    assert ("BadStatusLine" in message) == (fault == "a SOCKS proxy")
    assert message.startswith(f"cannot download MNIST to {raw} (")
    assert message.endswith("there, or name their folder with --data-dir or MNIST_DATA")
    assert list(raw.iterdir()) == []


def test_torchvision_that_does_not_fit(tmp_path):
    """As it fails with a torch that it was not built for."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = subprocess.run(
        [sys.executable, mnist.__file__, "--dry-run", "--data-dir", tmp_path],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "(RuntimeError: operator torchvision::nms does not exist)" in done.stderr


@posix
def test_folder_that_takes_no_download(start, archives, raw, read_only, unprivileged):
    read_only(raw)
    process = start("--dry-run", preexec_fn=unprivileged)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.startswith(f"mnist.py: error: {raw}")
    assert err.endswith(": Permission denied\n")


# --- Batches -------------------------------------------------------------------------------------------------------


def batches(losses, count, size):
    """Return the indices of an epoch (count, size)."""
    return torch.stack(list(mnist.train_batches(losses, count, size)))


def see(losses, order, loss):
    """Yield the batches of `order`, giving each image its `loss` when it was seen."""
    for index in order:
        losses[index] = loss
        yield index


def test_first_epoch_shows_none_twice():
    losses = torch.full([1000], torch.inf)
    order = torch.stack(list(see(losses, mnist.train_batches(losses, 15, 64), loss=9.0)))
    assert order.shape == (15, 64)
    assert len(order.unique()) == 960
    assert not torch.equal(order.flatten(), order.flatten().sort().values)


def test_later_epochs_sample_by_loss(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(mnist, "ROUNDS", 2)
    losses = torch.where(torch.arange(1000) < 250, 5.0, 0.0)
    epochs = [batches(losses, 10, 100) for _ in range(2)]
    assert not torch.equal(*epochs)
    for order in epochs:
        rounds = order.view(2, 500)
        for sampled in rounds:  # no image twice, and all of those with a loss
            assert len(sampled.unique()) == 500
            assert (sampled < 250).sum() == 250
        first, second = (sampled[sampled >= 250].sort().values for sampled in rounds)
        assert not torch.equal(first, second)  # the others have the same small chance each


def test_chance_of_the_first_is_in_proportion_to_loss():
    torch.manual_seed(0)
    losses = torch.where(torch.arange(1000) < 500, 3.0, 1.0)
    order = torch.cat([next(mnist.train_batches(losses, 1000, 1)) for _ in range(400)])
    assert (order < 500).float().mean() == pytest.approx(0.75, abs=0.08)


def test_each_round_samples_by_the_latest_loss(monkeypatch):
    monkeypatch.setattr(mnist, "ROUNDS", 2)
    losses = torch.ones(1000)
    order = mnist.train_batches(losses, 10, 100)
    first = torch.cat([next(order) for _ in range(5)])
    losses[first] = 0
    assert not torch.isin(torch.cat(list(order)), first).any()


# --- Junk ----------------------------------------------------------------------------------------------------------


def test_junk_is_in_the_form_of_mnist(digits):
    torch.manual_seed(0)
    junk = mnist.make_junk(*digits(500))
    assert junk.dtype == torch.uint8
    assert junk.shape[1:] == (28, 28)
    at, spans = torch.arange(28.0), []
    for axis in (1, 2):
        profile = junk.float().sum(axis)
        assert ((profile @ at / profile.sum(1) - 13.5).abs() < 0.6).all()
        ink = (junk > 64).any(axis)
        spans.append(torch.where(ink, at, -1).amax(1) - torch.where(ink, at, 28).amin(1) + 1)
    spans = torch.stack(spans).amax(0)
    assert spans.min() >= 19
    assert spans.max() <= 21


def test_junk_differs_with_the_seed(digits):
    junk = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        junk.append(mnist.make_junk(*digits(50)))
    assert torch.equal(junk[0], junk[1])
    assert not torch.equal(junk[0], junk[2])


def test_digits_among_junk_are_changed(monkeypatch):
    monkeypatch.setattr(mnist, "JUNK_SIZE", 1)
    seven = torch.zeros(1, 28, 28, dtype=torch.uint8)
    seven[:, 4:7, 8:20] = seven[:, 4:24, 17:20] = 255
    junk = mnist.make_junk(seven, torch.tensor([7])).float()
    expected = [255 - seven, seven.rot90(1, (1, 2)), seven.rot90(-1, (1, 2)), seven.flip(2)]
    forms = mnist.centre_and_scale(torch.cat(expected).float())
    assert len(junk) == 7
    for one, form in zip(junk, forms, strict=False):
        assert (one - form).abs().mean() < 1
    assert all((one - mnist.centre_and_scale(seven.float())).abs().mean() > 20 for one in junk)


def test_junk_varies_in_contrast_and_thickness(digits, monkeypatch):
    monkeypatch.setattr(mnist, "JUNK_SIZE", 400)
    monkeypatch.setattr(mnist, "centre_and_scale", lambda images: images)
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.linspace(0, 1, 400).view(size))
    torch.manual_seed(0)
    textures, scribbles = mnist.make_junk(*digits(500))[-800:].split(400)
    grey = ((textures > 25) & (textures < 230)).float().mean(dim=(1, 2))
    assert grey[:40].mean() > 0.9  # of hardly any contrast
    assert grey[-40:].mean() < 0.5
    ink = scribbles.float().mean(dim=(1, 2))
    assert ink[-40:].mean() / ink[:40].mean() == pytest.approx(4, rel=0.25)  # 4 pixels thick instead of 1


def test_digits_that_stay_digits_are_no_junk(monkeypatch):
    monkeypatch.setattr(mnist, "JUNK_SIZE", 10)
    images = torch.zeros(20, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 8:20] = 255
    counts = [len(mnist.make_junk(images, torch.full([20], label))) for label in range(10)]
    # An 8 is neither turned nor mirrored, nor is a 0; a 1 and a 5 are not mirrored.
    assert counts == [40, 60, 70, 70, 70, 60, 70, 70, 40, 70]


# --- Images --------------------------------------------------------------------------------------------------------


def test_normalize():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 28, 28)
    data = mnist.normalize(images)
    assert data.shape == (2, 1, 28, 28)
    assert data.dtype == torch.float32
    assert torch.allclose(data[0], torch.tensor(-0.1307 / 0.3081))
    assert torch.allclose(data[1], torch.tensor((1 - 0.1307) / 0.3081))


def test_augmentation_differs_by_image(digits):
    images, labels = digits(2000)
    torch.manual_seed(0)
    augmented = mnist.augment(images)
    assert augmented.shape == images.shape
    assert augmented.min() >= 0
    assert augmented.max() <= 255.01
    changed = (augmented - images).abs().amax(dim=(1, 2)) > 25
    assert changed.float().mean() > 0.99
    assert not torch.allclose(augmented[0], augmented[10])  # the same digit, moved otherwise

    # The mean of a digit's augmented images still looks more like that digit than like any other.
    means = torch.stack([augmented[labels == digit].mean(dim=0).flatten() for digit in range(10)])
    similarity = F.normalize(means) @ F.normalize(images[:10].float().flatten(1)).T
    assert torch.equal(similarity.argmax(dim=1), torch.arange(10))


def test_augmentation_is_the_matrix_of_its_docstring(monkeypatch):
    monkeypatch.setattr(mnist, "BEND", 0)
    monkeypatch.setattr(mnist, "THICKNESS_SHARE", 0)
    numbers = torch.tensor([0.5, -0.75, 0.25, 0.8, -0.6, 0.9])  # from -1 to 1, of the angle and so on
    monkeypatch.setattr(torch, "rand", lambda rows, n, device: ((numbers + 1) / 2).unsqueeze(1).expand(rows, n))
    at = torch.arange(28.0) - 13.5
    places = torch.stack(torch.meshgrid(at, at, indexing="xy"))  # x and y of each pixel, measured from the middle

    angle, shift, scale_x, scale_y, shear = math.radians(5), torch.tensor([-1.5, 0.5]), 1.08, 0.94, 0.09
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = rotation @ torch.tensor([[scale_x, shear], [0, scale_y]])
    expected = (matrix @ places.flatten(1) + shift.unsqueeze(1)).view(2, 28, 28)
    # Images whose values are x and y tell where each value came from; at the edge it may come from outside.
    assert torch.allclose(mnist.augment(places)[:, 5:23, 5:23], expected[:, 5:23, 5:23], atol=1e-3)


def test_augmentation_keeps_its_limits(monkeypatch):
    """A dot 10 pixels from the centre goes as far as each distortion can take it, and no farther."""
    rows, columns = torch.meshgrid(torch.arange(29.0), torch.arange(29.0), indexing="ij")

    def farthest(row, column, **limits):
        for name in ("ROTATION", "SHIFT", "SCALE", "SHEAR", "BEND", "THICKNESS_SHARE"):
            monkeypatch.setattr(mnist, name, limits.get(name, 0))
        images = torch.zeros(5000, 29, 29)
        images[:, row, column] = 1
        weight = mnist.augment(images)
        weight = weight / weight.sum(dim=(1, 2), keepdim=True)
        down, right = ((weight * place).sum(dim=(1, 2)) for place in (rows, columns))
        return [(down - row).abs().max().item(), (right - column).abs().max().item()]

    assert farthest(14, 24) == pytest.approx([0, 0], abs=1e-3)
    assert farthest(14, 24, ROTATION=10)[0] == pytest.approx(1.74, abs=0.2)  # 10 sin 10°
    assert farthest(14, 24, SHIFT=2) == pytest.approx([2, 2], abs=0.1)
    down, right = farthest(14, 24, SCALE=0.1)
    assert down < 1e-3
    assert right == pytest.approx(1.1, abs=0.2)  # 10 / (1 - 0.1) - 10
    assert farthest(24, 14, SHEAR=0.1) == pytest.approx([0, 1], abs=0.1)
    assert farthest(14, 14, BEND=2) == pytest.approx([2, 2], abs=0.1)  # a point of the grid


def test_bending_is_smooth(monkeypatch):
    for name in ("ROTATION", "SHIFT", "SCALE", "SHEAR", "THICKNESS_SHARE"):
        monkeypatch.setattr(mnist, name, 0)
    monkeypatch.setattr(mnist, "BEND", 2)
    ramp = torch.arange(28.0).expand(500, 28, 28)  # its values tell how far they were moved
    torch.manual_seed(0)
    moved = (mnist.augment(ramp) - ramp)[:, 4:24, 4:24]
    assert moved.std() > 0.5
    assert moved.mean(dim=0).abs().max() < 0.3
    assert moved.diff(dim=1).abs().max() < 1  # from one pixel to the next, of 7 between two points
    corners = moved[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.corrcoef(corners.T).fill_diagonal_(0).abs().max() < 0.3  # far apart, they move each on its own


def test_strokes_become_fainter_and_thicker(digits, monkeypatch):
    monkeypatch.setattr(mnist, "THICKNESS_SHARE", 0.5)
    images = digits(40)[0].unsqueeze(1).float()
    before = images.clone()
    torch.manual_seed(0)
    varied = mnist.vary_strokes(images)
    assert torch.equal(images, before)  # not changed in place
    ink = varied.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    fainter, thicker = ink < 0.8, ink > 1.3
    assert fainter.sum() == thicker.sum() == 10
    assert (varied[fainter] <= images[fainter]).all()
    assert (varied[thicker] >= images[thicker]).all()
    assert torch.equal(varied[~fainter & ~thicker], images[~fainter & ~thicker])
    again = mnist.vary_strokes(images)  # other images
    assert not torch.equal(varied, again)


def test_strokes_go_half_way(monkeypatch):
    monkeypatch.setattr(mnist, "THICKNESS_SHARE", 1)
    line = torch.zeros(2, 1, 9, 9)
    line[:, :, :, 3:6] = 200
    rows = mnist.vary_strokes(line)[:, 0, 4].tolist()
    assert sorted(rows) == [[0, 0, 0, 100, 200, 100, 0, 0, 0], [0, 0, 100, 200, 200, 200, 100, 0, 0]]


def test_augmentation_varies_thickness(digits, monkeypatch):
    for name in ("ROTATION", "SHIFT", "SCALE", "SHEAR", "BEND"):
        monkeypatch.setattr(mnist, name, 0)
    images = digits(40)[0]
    augmented = mnist.augment(images)
    changed = (augmented - images).abs().amax(dim=(1, 2)) > 25
    assert changed.sum() == 2 * round(40 * mnist.THICKNESS_SHARE / 2)
