"""What several test files share: a small data set, and mnist.py as a process on it."""

import ctypes
import functools
import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import mnist

import numpy as np
import pytest
import torch

if "CI" in os.environ:  # on GitHub's Macs, which are virtual, MPS is not supported: actions/runner-images#14380
    torch.backends.mps.is_available = functools.cache(lambda: False)  # PyTorch looks for its __wrapped__

# The segments of a seven-segment display that each digit lights, as slices of rows and columns.
SEGMENTS = {
    "top": (slice(4, 7), slice(9, 19)),
    "upper left": (slice(4, 14), slice(9, 12)),
    "upper right": (slice(4, 14), slice(16, 19)),
    "middle": (slice(12, 15), slice(9, 19)),
    "lower left": (slice(14, 24), slice(9, 12)),
    "lower right": (slice(14, 24), slice(16, 19)),
    "bottom": (slice(21, 24), slice(9, 19)),
}
LIT = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")

DRIVER = """
import sys
import mnist
mnist.FILES, mnist.MIN_ACCURACY = {files!r}, 0
sys.argv[0] = "mnist.py"
{setup}
mnist.run(mnist.main)
"""


def make_digits(n):
    patterns = torch.zeros(10, 28, 28, dtype=torch.uint8)
    for pattern, lit in zip(patterns, LIT, strict=True):
        for (rows, columns), on in zip(SEGMENTS.values(), lit, strict=True):
            if on == "1":
                pattern[rows, columns] = 255
    labels = torch.arange(n) % 10
    return patterns[labels], labels


@pytest.fixture
def digits():
    """A function of n: uint8 images (n, 28, 28) of the digits 0 to 9 in turn, and their labels (n,)."""
    return make_digits


@pytest.fixture
def damage():
    """A function that returns bytes with some bits flipped, the end cut off or a part doubled."""
    rng = np.random.default_rng(0)

    def damage(content):
        content, kind = bytearray(content), rng.integers(3)
        start, stop = sorted(rng.integers(len(content) + 1, size=2))
        if kind == 0:
            for place in rng.integers(len(content), size=rng.integers(1, 9)):
                content[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            del content[stop:]
        else:
            content[stop:stop] = content[start:stop]
        return bytes(content)

    return damage


def write_idx(folder, name, array):
    """Write a uint8 tensor to folder/name.gz as an IDX file; return the MD5 of its content."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.numpy().tobytes()
    (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Stand 500 training and 100 test images in for MNIST, in an empty working folder; return their --data-dir."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    files = {}
    for prefix, n in (("train", 500), ("t10k", 100)):
        images, labels = make_digits(n)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels.byte())):
            files[name] = write_idx(folder, name, array)
    monkeypatch.setattr(mnist, "FILES", files)
    monkeypatch.setattr(mnist, "VALIDATION_SIZE", 100)
    monkeypatch.setattr(mnist, "MIN_ACCURACY", 0)
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "data")


@pytest.fixture
def raw(small_mnist):
    """The folder that holds the files of the small data set."""
    return Path(small_mnist, "MNIST", "raw")


@pytest.fixture
def start(small_mnist, tmp_path):
    """A function that starts mnist.py as a process on the small data, after the Python code in `setup`."""
    processes = []

    def start(*args, setup="", **options):
        code = DRIVER.format(files=mnist.FILES, setup=setup)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path} | options
        options["env"] = {
            **os.environ,
            "PYTHONPATH": str(Path(mnist.__file__).parent),
            "MNIST_DATA": small_mnist,
            **options.get("env", {}),
        }
        command = [sys.executable, "-c", code, "--device", "cpu", *args]
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def checkpoint():
    """What main() would save, of a network that has learned nothing."""
    torch.manual_seed(0)
    means = {"train_loss": 0.9, "train_accuracy": 90.0, "test_loss": 0.5, "test_accuracy": 98.0}
    history = [{"epoch": epoch, **means} for epoch in (1, 2)]
    return {"state_dict": mnist.Net().state_dict(), "history": history, "settings": {"validate": False}}


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """A working folder with nothing but such weights in mnist.pt."""
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "mnist.pt")
    return tmp_path


@pytest.fixture
def read_only(tmp_path):
    """A function that makes paths read-only until the end of the test."""
    changed = []

    def make(*paths):
        for path in paths:
            changed.append((path, path.stat().st_mode))
            path.chmod(0o555 if path.is_dir() else 0o444)

    yield make
    for path, mode in changed:
        path.chmod(mode)


@pytest.fixture
def unprivileged():
    """A preexec_fn that makes the permissions of files bind root, too, by dropping two capabilities."""

    def drop():
        if os.geteuid() == 0:
            pr_capbset_drop, cap_dac_override, cap_dac_read_search = 24, 1, 2
            ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override)
            ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_read_search)

    return drop


@pytest.fixture
def full_disk():
    """A preexec_fn under which no file grows beyond 10,000 bytes."""

    def limit():
        import resource  # absent on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    return limit


@pytest.fixture
def assert_refused(capsys):
    """A function that asserts that main([option, value]) exits with 2, and that its last line names both."""

    def check(main, option, value):
        with pytest.raises(SystemExit) as stop:
            main([option, value])
        assert stop.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert option in message
        assert value in message

    return check
