"""The data: files and their faults, downloads, batches, augmentation."""

import contextlib
import functools
import gzip
import http.server
import os
import re
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import mnist

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets import MNIST

ARCHIVES = [f"{name}.gz" for name in mnist.FILES]
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
def offline(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # the port "discard": nothing listens


def test_archives_alone_are_enough(assert_loads, offline):
    assert_loads()


def test_raw_files_alone_are_enough(raw, assert_loads, offline):
    for name in mnist.FILES:
        (raw / name).write_bytes(unpacked(raw, name))
        (raw / f"{name}.gz").unlink()
    assert_loads()


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_layout_is_found_and_left_alone(folder, separator, suffix, raw, tmp_path, assert_loads, offline):
    other = tmp_path / "other"
    (other / folder).mkdir(parents=True)
    for name in mnist.FILES:
        content = (raw / f"{name}.gz").read_bytes() if suffix else unpacked(raw, name)
        (other / folder / f"{name.replace('-idx', f'{separator}idx')}{suffix}").write_bytes(content)
    paths = sorted(other.rglob("*"))
    for named in filter(Path.is_dir, [other, *paths]):
        assert_loads(named)
    assert sorted(other.rglob("*")) == paths


@pytest.mark.parametrize("named", ["MNIST", "MNIST/raw"])
def test_download_completes_the_folder_that_is_named(named, archives, tmp_path, raw, assert_loads, monkeypatch):
    (raw / ARCHIVES[0]).write_bytes(archives[ARCHIVES[0]])
    with mirror(good(archives)) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        assert_loads(tmp_path / "data" / named)
    assert sorted(path.name for path in raw.iterdir()) == sorted(ARCHIVES)


@posix
def test_read_only_folder_works(start, raw, read_only, unprivileged):
    name = next(iter(mnist.FILES))
    (raw / name).write_bytes(unpacked(raw, name))  # one file raw, the others as .gz alone
    read_only(*raw.iterdir(), raw, raw.parent, raw.parent.parent)
    process = start("--dry-run", preexec_fn=unprivileged)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""


FAULTY_RAW_FILES = {
    "cut short": lambda content: content[:-1000],
    "empty": lambda content: b"",
    "another magic number": lambda content: b"\0\0\x08\x02" + content[4:],
    "wrong count": lambda content: content[:4] + struct.pack(">I", 501) + content[8:],
    "too many dimensions": lambda content: b"\0\0\x08\xff" + content[4:],
}


def test_label_above_9_is_found(raw, assert_loads, offline, capsys):
    name = "train-labels-idx1-ubyte"
    (raw / name).write_bytes(unpacked(raw, name)[:-1] + b"\x0a")
    assert_loads()  # from the archive
    assert f"{raw / name} holds other data than MNIST's: looking for another copy" in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTY_RAW_FILES)
def test_faulty_raw_file(fault, raw, small_mnist, assert_loads, offline, capsys):
    name = "train-labels-idx1-ubyte"
    (raw / name).write_bytes(FAULTY_RAW_FILES[fault](unpacked(raw, name)))
    assert_loads()  # from the archive
    assert f"{raw / name} is damaged: looking for another copy" in capsys.readouterr().err

    (raw / f"{name}.gz").unlink()
    with pytest.raises(mnist.UserError, match=f"no intact {name}.gz"):
        mnist.load_mnist(small_mnist)


@pytest.fixture(params=["", ".gz"])
def fashion(request, raw, archives):
    """A whole file of other data that has the name of one of MNIST's, in its place."""
    path = raw / f"train-labels-idx1-ubyte{request.param}"
    labels = bytearray(gzip.decompress(archives["train-labels-idx1-ubyte.gz"]))
    labels[8:] = labels[:7:-1]
    path.write_bytes(gzip.compress(labels) if request.param else labels)
    return path


def test_other_data_are_named_and_left_alone(fashion, raw, archives, small_mnist, monkeypatch):
    before = fashion.read_bytes()
    with mirror(good(archives)) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        with pytest.raises(mnist.UserError, match=r"other data than MNIST's, perhaps Fashion.*--data-dir") as error:
            mnist.load_mnist(small_mnist)
    assert str(error.value).startswith(str(fashion))
    assert fashion.read_bytes() == before
    assert [path for path in raw.iterdir() if "train-labels" in path.name] == [fashion]


def test_mnist_beside_other_data_is_used(fashion, tmp_path, archives, assert_loads, monkeypatch, capsys):
    for name, archive in archives.items():
        (tmp_path / "data" / name).write_bytes(archive)
    assert_loads()
    assert f"{fashion} holds other data than MNIST's: looking for another copy" in capsys.readouterr().err


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere(data, raw, assert_loads, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [])
    name = data.draw(st.sampled_from(sorted(mnist.FILES)))
    path = raw / data.draw(st.sampled_from([name, f"{name}.gz"]))
    archive = (raw / f"{name}.gz").read_bytes()
    content = archive if path.suffix else unpacked(raw, name)
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = data.draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + content[at + 1 :],
                content[:at] + b"\x07" + content[at:],
                content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :],
            ]
        )
    )
    try:
        (raw / f"{name}.gz").unlink()
        path.write_bytes(damaged)
        assert_loads()  # the damage is harmless, as in an archive's header,
    except mnist.UserError as error:  # or it is found
        if f"no intact {name}.gz" not in str(error) and not str(error).startswith(f"{path} holds other data"):
            raise
    finally:
        path.unlink()
        (raw / f"{name}.gz").write_bytes(archive)


# --- Downloads -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mirror(answer, context=None):
    """Serve HTTP, or HTTPS with an SSLContext, on the loopback: answer(handler, file name) replies to each GET.

    Yields the mirror's URL.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self, self.path.rpartition("/")[2])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that does not trust it hangs up
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def send(handler, body, length=None, pause=0):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length or len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    time.sleep(pause)
    handler.wfile.write(body[len(body) // 2 :])


def good(archives):
    return lambda handler, name: send(handler, archives[name])


def send_half(archives, handler, name):
    send(handler, archives[name][: len(archives[name]) // 2], len(archives[name]))


def send_another(archives, handler, name):
    send(handler, archives[ARCHIVES[ARCHIVES.index(name) - 1]])


FAULTY_MIRRORS = {
    "403": lambda archives, handler, name: handler.send_error(403),
    "404": lambda archives, handler, name: handler.send_error(404),
    "503": lambda archives, handler, name: handler.send_error(503),
    "stops half-way": send_half,
    "other bytes": lambda archives, handler, name: send(handler, b"<html>Please log in</html>"),
    "another archive": send_another,
}


def faulty(fault, archives):
    return functools.partial(FAULTY_MIRRORS[fault], archives)


@pytest.fixture
def archives(raw):
    """The archives of the small data set by name, no longer in its folder."""
    contents = {path.name: path.read_bytes() for path in raw.iterdir()}
    for name in contents:
        (raw / name).unlink()
    return contents


def test_no_files_and_no_network(tmp_path, offline):
    with pytest.raises(mnist.UserError) as error:
        mnist.load_mnist(tmp_path / "nowhere")
    wanted, tried, remedy = str(error.value).splitlines()
    assert wanted.startswith(f"no intact {ARCHIVES[0]} in {tmp_path / 'nowhere' / 'MNIST' / 'raw'} or ")
    assert f"http://127.0.0.1:9/{ARCHIVES[0]} cannot be read (<urlopen error" in tried
    assert "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz" in remedy
    assert "--data-dir or MNIST_DATA" in remedy
    assert len(remedy) < 120


@pytest.mark.parametrize("fault", FAULTY_MIRRORS)
def test_next_mirror_is_tried(fault, archives, raw, assert_loads, monkeypatch):
    with mirror(faulty(fault, archives)) as first, mirror(good(archives)) as second:
        monkeypatch.setattr(MNIST, "mirrors", [first, second])
        assert_loads()
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == archives


@pytest.mark.parametrize("fault", FAULTY_MIRRORS)
def test_no_good_mirror(fault, archives, raw, small_mnist, monkeypatch):
    with mirror(faulty(fault, archives)) as only:
        monkeypatch.setattr(MNIST, "mirrors", [only])
        with pytest.raises(mnist.UserError, match=re.escape(only)) as error:
            mnist.load_mnist(small_mnist)
    assert len(str(error.value).splitlines()) == 3
    assert list(raw.iterdir()) == []


@posix
def test_unknown_certificate_has_a_remedy(archives, small_mnist, tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to sign a certificate with")
    pem = tmp_path / "server.pem"
    options = ["-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=127.0.0.1", "-keyout", pem, "-out", pem]
    subprocess.run(["openssl", "req", *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with mirror(good(archives), context) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        with pytest.raises(mnist.UserError, match=r"CERTIFICATE_VERIFY_FAILED.*set SSL_CERT_FILE"):
            mnist.load_mnist(small_mnist)


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
    _, tried, _ = done.stderr.splitlines()
    misfit = f"torchvision does not work with torch {torch.__version__} (operator torchvision::nms does not exist)"
    assert f"{misfit}: pip install --upgrade torch torchvision" in tried


def test_silent_mirror_is_given_up(archives, assert_loads, monkeypatch):
    silent = mirror(lambda handler, name: send(handler, archives[name], pause=5))
    monkeypatch.setattr(mnist, "TIMEOUT", 0.5)
    with silent as first, mirror(good(archives)) as second:
        monkeypatch.setattr(MNIST, "mirrors", [first, second])
        before = time.monotonic()
        assert_loads()
        assert time.monotonic() - before < 5


@posix
def test_folder_that_takes_no_download(start, archives, raw, read_only, unprivileged):
    read_only(raw)
    with mirror(good(archives)) as url:
        process = start("--dry-run", mirrors=[url], preexec_fn=unprivileged)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == f"mnist.py: error: {raw / ARCHIVES[0]}: Permission denied\n"


@posix
def test_killed_download_is_repaired(start, archives, assert_loads, monkeypatch):
    begun = threading.Event()

    def stall(handler, name):
        begun.set()
        send(handler, archives[name], pause=60)

    with mirror(stall) as url:
        process = start("--dry-run", mirrors=[url])
        assert begun.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with mirror(good(archives)) as url:
        monkeypatch.setattr(MNIST, "mirrors", [url])
        assert_loads()


def test_two_downloads_at_once(start, archives, raw):
    both = threading.Barrier(2)

    def answer(handler, name):
        if name == ARCHIVES[0]:
            both.wait(60)
        send(handler, archives[name])

    with mirror(answer) as url:
        processes = [start("--dry-run", mirrors=[url]) for _ in range(2)]
        for process in processes:
            _, err = process.communicate()
            assert process.returncode == 0, err
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == archives


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


def test_chance_is_in_proportion_to_loss():
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
    forms = mnist.to_form(torch.cat(expected).float())
    assert len(junk) == 7
    for one, form in zip(junk, forms, strict=False):
        assert (one - form).abs().mean() < 1
    assert all((one - mnist.to_form(seven.float())).abs().mean() > 20 for one in junk)


def test_digits_that_stay_digits_are_no_junk(monkeypatch):
    monkeypatch.setattr(mnist, "JUNK_SIZE", 10)
    images = torch.zeros(20, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 8:20] = 255
    counts = [len(mnist.make_junk(images, torch.full([20], label))) for label in range(10)]
    # An 8 is neither turned nor mirrored, nor is a 0; a 1 and a 5 are not mirrored.
    assert counts == [40, 60, 70, 70, 70, 60, 70, 70, 40, 70]


# --- Images --------------------------------------------------------------------------------------------------------


def test_normalise():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 28, 28)
    data = mnist.normalise(images)
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


def test_augmentation_goes_either_way(monkeypatch):
    for name in ("ROTATION", "SCALE", "SHEAR", "BEND", "THICKNESS_SHARE"):
        monkeypatch.setattr(mnist, name, 0)
    images = torch.zeros(500, 29, 29)
    images[:, 14, 14] = 1
    rows = (mnist.augment(images).sum(dim=2) * torch.arange(29)).sum(dim=1)
    assert rows.min() < 13
    assert rows.max() > 15


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


def test_strokes_become_thinner_and_thicker(digits, monkeypatch):
    monkeypatch.setattr(mnist, "THICKNESS_SHARE", 0.5)
    images = digits(40)[0].unsqueeze(1).float()
    before = images.clone()
    torch.manual_seed(0)
    varied = mnist.vary_thickness(images)
    assert torch.equal(images, before)  # not changed in place
    ink = varied.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    thinner, thicker = ink < 0.8, ink > 1.3
    assert thinner.sum() == thicker.sum() == 10
    assert (varied[thinner] <= images[thinner]).all()
    assert (varied[thicker] >= images[thicker]).all()
    assert torch.equal(varied[~thinner & ~thicker], images[~thinner & ~thicker])
    again = mnist.vary_thickness(images)  # other images
    assert not torch.equal(varied, again)


def test_strokes_change_by_half_a_pixel(monkeypatch):
    monkeypatch.setattr(mnist, "THICKNESS_SHARE", 1)
    line = torch.zeros(2, 1, 9, 9)
    line[:, :, :, 3:6] = 200
    rows = mnist.vary_thickness(line)[:, 0, 4].tolist()
    assert sorted(rows) == [[0, 0, 0, 100, 200, 100, 0, 0, 0], [0, 0, 100, 200, 200, 200, 100, 0, 0]]


def test_augmentation_varies_thickness(digits, monkeypatch):
    for name in ("ROTATION", "SHIFT", "SCALE", "SHEAR", "BEND"):
        monkeypatch.setattr(mnist, name, 0)
    images = digits(40)[0]
    augmented = mnist.augment(images)
    changed = (augmented - images).abs().amax(dim=(1, 2)) > 25
    assert changed.sum() == 2 * round(40 * mnist.THICKNESS_SHARE / 2)
