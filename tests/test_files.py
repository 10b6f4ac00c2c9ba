"""The files that are written and read: paths checked beforehand, whole files only, and no trust in weights."""

import os
import pickle
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mnist
from tools import weights

import pytest
import torch

posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")

# --- Writing -------------------------------------------------------------------------------------------------------


def assert_cannot_write(process, path, reason="Permission denied"):
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert out == ""  # before training
    assert err == f"mnist.py: error: {path}: {reason}\n"


@pytest.mark.parametrize("path", ["missing/mnist.pt", "folder.pt"])
def test_path_that_cannot_be_a_file(path, small_mnist, monkeypatch):
    monkeypatch.setattr(mnist, "fit", None)
    Path("folder.pt").mkdir()
    with pytest.raises(OSError, match=re.escape(path)):
        mnist.main(["--save-model", path])
    assert sorted(path.name for path in Path().iterdir()) == ["data", "folder.pt"]


@posix
def test_device_is_not_replaced_by_a_file(start, tmp_path):
    (tmp_path / "null.pt").symlink_to("/dev/null")
    assert_cannot_write(start("--save-model", "null.pt"), "null.pt", "it exists and is not a file")
    assert Path("/dev/null").is_char_device()


@posix
def test_link_that_leads_to_itself_is_refused(start, tmp_path):
    (tmp_path / "mnist.pt").symlink_to("mnist.pt")
    assert_cannot_write(start(), "mnist.pt", "it exists and is not a file")
    assert (tmp_path / "mnist.pt").is_symlink()


@posix
def test_read_only_folder_is_refused(start, tmp_path, read_only, unprivileged):
    (tmp_path / "folder").mkdir()
    read_only(tmp_path / "folder")
    path = tmp_path / "folder" / "mnist.pt"
    assert_cannot_write(start("--save-model", str(path), preexec_fn=unprivileged), path)


@posix
def test_default_path_is_checked_too(start, tmp_path, read_only, unprivileged):
    read_only(tmp_path)
    assert_cannot_write(start(preexec_fn=unprivileged), "mnist.pt")


@posix
def test_full_disk_is_found_before_training(start, tmp_path, full_disk):
    path = tmp_path / "mnist.pt"
    path.write_bytes(b"an earlier run")
    assert_cannot_write(start("--save-model", str(path), preexec_fn=full_disk), path, "File too large")
    assert path.read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mnist.pt"]


@posix
def test_disk_that_fills_during_training(start, tmp_path):
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    setup = """
import resource
fit = mnist.fit
def fit_then_fill_the_disk(*args):
    history = fit(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return history
mnist.fit = fit_then_fill_the_disk
"""
    process = start("--epochs", "1", setup=setup)
    out, err = process.communicate()
    assert process.returncode == 1
    assert "Epoch 1: " in out
    assert err == "mnist.py: error: mnist.pt: File too large\n"
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mnist.pt"]


@posix
def test_file_is_replaced_whole(tmp_path):
    """Whoever has the old file open still reads all of it, so at no time is there half of either."""
    path = tmp_path / "mnist.pt"
    path.write_bytes(b"an earlier run")
    with path.open("rb") as file:
        mnist.write(path, b"a later run")
        assert file.read() == b"an earlier run"
    assert path.read_bytes() == b"a later run"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_mode_is_kept(tmp_path):
    path = tmp_path / "mnist.pt"
    path.write_bytes(b"an earlier run")
    for mode in (0o640, 0o604):
        path.chmod(mode)
        mnist.write(path, b"a later run")
        assert path.stat().st_mode & 0o777 == mode


@posix
def test_write_protected_file_is_refused(start, tmp_path, read_only, unprivileged):
    path = tmp_path / "mnist.pt"
    path.write_bytes(b"an earlier run")
    read_only(path)
    assert_cannot_write(start(preexec_fn=unprivileged), "mnist.pt")
    assert path.read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mnist.pt"]


def test_trial_changes_nothing(tmp_path):
    old = tmp_path / "old.pt"
    old.write_bytes(b"an earlier run")
    for path in (old, tmp_path / "new.pt"):
        mnist.write(path)
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"an earlier run"


@posix
def test_link_of_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    victim = tmp_path / "victim"
    victim.write_bytes(b"of somebody else")
    (tmp_path / f"mnist.pt.{bytes(4).hex()}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        mnist.write(tmp_path / "mnist.pt")
    assert victim.read_bytes() == b"of somebody else"


def test_threads_write_at_the_same_time(tmp_path):
    path = tmp_path / "mnist.pt"
    contents = [bytes([i]) * 100_000 for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: mnist.write(path, content), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def refuse(*_args, **_options):
    raise PermissionError(1, "Operation not permitted")


def test_file_system_without_modes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", refuse)
    for content in (b"an earlier run", b"a later run"):
        mnist.write(tmp_path / "mnist.pt", content)
    assert (tmp_path / "mnist.pt").read_bytes() == b"a later run"


def test_file_that_is_held_open_for_a_moment(tmp_path, monkeypatch):
    """As an antivirus on Windows does."""
    replace, refusals = os.replace, [refuse, refuse]
    monkeypatch.setattr(os, "replace", lambda *paths: (refusals.pop() if refusals else replace)(*paths))
    mnist.write(tmp_path / "mnist.pt", b"a later run")
    assert (tmp_path / "mnist.pt").read_bytes() == b"a later run"


def test_file_that_stays_open_costs_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="Operation not permitted; the new file is ") as error:
        mnist.write(tmp_path / "mnist.pt", b"a later run")
    (left,) = tmp_path.iterdir()
    assert str(left) in str(error.value)
    assert left.read_bytes() == b"a later run"


def test_failed_clean_up_hides_no_error(tmp_path, monkeypatch):
    """As on a read-only file system."""
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FileNotFoundError):
        mnist.write(tmp_path / "missing" / "mnist.pt")


# --- Reading -------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_no_code_of_the_file(tmp_path):
    path, trace = tmp_path / "mnist.pt", tmp_path / "the code ran"
    for content in (Malicious(trace), {"state_dict": mnist.Net().state_dict(), "history": Malicious(trace)}):
        torch.save(content, path)
        with pytest.raises(mnist.UserError, match=re.escape(str(path))):
            weights.load(path)
        assert not trace.exists()
    torch.load(path, weights_only=False)  # the code is real
    assert trace.exists()


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        weights.load(tmp_path / "mnist.pt")
    assert error.value.filename == str(tmp_path / "mnist.pt")


def test_other_files_are_no_checkpoint(tmp_path):
    path = tmp_path / "mnist.pt"

    def assert_no_checkpoint():
        with pytest.raises(mnist.UserError, match=re.escape(str(path))) as error:
            weights.load(path)
        assert "\n" not in str(error.value)

    for content in (b"", b"text", pickle.dumps({"a": 1}, protocol=2), b"PK\x03\x04 but no archive"):
        path.write_bytes(content)
        assert_no_checkpoint()

    torch.save({"state_dict": mnist.Net().state_dict()}, path)
    weights.load(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:length])
        assert_no_checkpoint()

    wider, broken = mnist.Net(), mnist.Net()
    wider.fc = torch.nn.Linear(72, 11)
    broken.fc.bias.data[3] = float("nan")
    for state_dict in (wider.state_dict(), broken.state_dict(), None, {"a": 1}):
        torch.save({"state_dict": state_dict}, path)
        assert_no_checkpoint()
    for content in ({}, [1], 7):
        torch.save(content, path)
        assert_no_checkpoint()


def test_damaged_weights_are_refused(tmp_path, damage):
    torch.save({"state_dict": mnist.Net().state_dict()}, path := tmp_path / "mnist.pt")
    whole = path.read_bytes()
    right, refused = weights.load(path)[0].state_dict(), 0
    for _ in range(200):
        path.write_bytes(damage(whole))
        try:
            model, _ = weights.load(path)
        except mnist.UserError:
            refused += 1
        else:  # only what no weight depends on was changed
            assert all(torch.equal(tensor, right[name]) for name, tensor in model.state_dict().items())
    assert refused > 150


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv1.weight", lambda tensor: torch.full_like(tensor, 3e38)),  # finite, but what they give is not
        ("bn1.running_var", lambda tensor: -tensor),
        ("fc.weight", lambda tensor: tensor.long()),
        ("fc.weight", lambda tensor: tensor > 0),
        ("fc.weight", lambda tensor: tensor.to(torch.complex64)),
        ("bn1.num_batches_tracked", lambda tensor: tensor.float()),
    ],
)
@pytest.mark.filterwarnings("error")
def test_weights_of_other_numbers_are_refused(name, change, tmp_path):
    state_dict = mnist.Net().state_dict()
    torch.save(state_dict | {name: change(state_dict[name])}, tmp_path / "mnist.pt")
    with pytest.raises(mnist.UserError, match=r"damaged|not finite numbers"):
        weights.load(tmp_path / "mnist.pt")


def test_weights_of_half_precision_are_read(tmp_path):
    torch.save(mnist.Net().half().state_dict(), tmp_path / "mnist.pt")
    weights.load(tmp_path / "mnist.pt")


def test_weights_that_are_there_twice_are_refused(tmp_path):
    state_dict = mnist.Net().state_dict()
    torch.save(state_dict | {"module.conv1.weight": state_dict["conv1.weight"] + 1}, tmp_path / "mnist.pt")
    with pytest.raises(mnist.UserError, match="damaged"):
        weights.load(tmp_path / "mnist.pt")


def test_file_that_unpacks_to_more_than_weights_is_refused(tmp_path):
    torch.save({"state_dict": mnist.Net().state_dict(), "more": torch.zeros(2**22)}, tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "large.pt") as large, zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as small:
        for name in large.namelist():
            small.writestr(name, large.read(name))
    assert (tmp_path / "small.pt").stat().st_size < 200_000
    with pytest.raises(mnist.UserError, match="damaged"):
        weights.load(tmp_path / "small.pt")


@posix
def test_file_without_an_end_is_refused():
    with pytest.raises(mnist.UserError, match="/dev/zero is damaged"):
        weights.load("/dev/zero")


def test_refusal_is_all_that_is_said(tmp_path, recwarn):
    """PyTorch warns of TorchScript's archives."""
    path = tmp_path / "mnist.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    recwarn.clear()
    with pytest.raises(mnist.UserError, match="damaged"):
        weights.load(path)
    assert not recwarn.list


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bare", [False, True])
def test_weights_as_others_save_them(prefix, bare, tmp_path):
    model = mnist.Net()
    state_dict = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state_dict if bare else {"state_dict": state_dict}, tmp_path / "weights.pt")
    loaded, _ = weights.load(tmp_path / "weights.pt")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_misfit_is_named(tmp_path):
    path = tmp_path / "weights.pt"

    def message(state_dict):
        torch.save(state_dict, path)
        with pytest.raises(mnist.UserError) as error:
            weights.load(path)
        return str(error.value)

    state_dict = mnist.Net().state_dict()
    assert "size mismatch for fc.bias" in message(state_dict | {"fc.bias": torch.zeros(11)})
    assert "torch.Size([11])" in message(state_dict | {"fc.bias": torch.zeros(11)})
    assert '"fc2.bias"' in message(state_dict | {"fc2.bias": torch.zeros(10)})
    assert '"fc.bias"' in message({name: tensor for name, tensor in state_dict.items() if name != "fc.bias"})
    assert len(message({"conv1.bias": torch.zeros(16)})) < 300


def test_own_weights_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights.find() == weights.PRETRAINED
    Path("mnist.pt").touch()
    assert weights.find() == Path("mnist.pt")
    assert weights.find(Path("x.pt")) == Path("x.pt")


def test_pretrained_weights_keep_the_promise():
    model, checkpoint = weights.load(weights.PRETRAINED)
    _, correct = mnist.test(model, *mnist.load_mnist(mnist.DATA_DIR)[1])
    assert correct > 9940
    assert correct / 100 == pytest.approx(checkpoint["test_accuracy"], abs=0.02)  # rounding, on another processor
    assert checkpoint["settings"]["seed"] == 0
    assert checkpoint["settings"]["epochs"] == mnist.EPOCHS
