"""What mnist.py withstands: each test causes the fault for real, in the data, the process or the files it writes."""

import contextlib
import ctypes
import functools
import http.server
import io
import os
import pickle
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets import MNIST

import mnist
from test_model import digits, small_mnist  # noqa: F401 (a fixture)

fcntl, resource, termios = (
    pytest.importorskip(module, reason="the faults are caused by POSIX means")
    for module in ("fcntl", "resource", "termios")
)

ARCHIVES = [f"{name}.gz" for name in mnist.FILES]


# --- Data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(small_mnist):  # noqa: F811
    return Path(small_mnist, "MNIST", "raw")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # the port "discard": nothing listens


@contextlib.contextmanager
def mirror(answer):
    """Serve HTTP on the loopback: answer(handler, file name) replies to each GET. Yields the mirror's URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self, self.path.rpartition("/")[2])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
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


FAULTY_MIRRORS = {
    "403": lambda archives: lambda handler, name: handler.send_error(403),
    "404": lambda archives: lambda handler, name: handler.send_error(404),
    "503": lambda archives: lambda handler, name: handler.send_error(503),
    "stops in the middle": lambda archives: (
        lambda handler, name: send(handler, archives[name][: len(archives[name]) // 2], len(archives[name]))
    ),
    "other bytes": lambda archives: lambda handler, name: send(handler, b"<html>Please log in</html>"),
    "another archive": lambda archives: (
        lambda handler, name: send(handler, archives[ARCHIVES[ARCHIVES.index(name) - 1]])
    ),
}


def take_archives(raw):
    """Remove the archives from the folder; return their bytes by name."""
    archives = {path.name: path.read_bytes() for path in raw.iterdir()}
    for name in archives:
        (raw / name).unlink()
    return archives


def assert_loads(data_dir):
    for (images, labels), n in zip(mnist.load_mnist(data_dir), (500, 100), strict=True):
        expected_images, expected_labels = digits(n)
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_no_files_and_no_network_names_folder_files_and_way_out(tmp_path, offline):
    with pytest.raises(mnist.UserError) as error:
        mnist.load_mnist(tmp_path / "nowhere")
    for part in (str(tmp_path / "nowhere" / "MNIST" / "raw"), "--data-dir", "MNIST_DATA", *ARCHIVES):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", FAULTY_MIRRORS)
def test_next_mirror_is_tried(fault, raw, small_mnist, monkeypatch):  # noqa: F811
    archives = take_archives(raw)
    with mirror(FAULTY_MIRRORS[fault](archives)) as first, mirror(good(archives)) as second:
        monkeypatch.setattr(MNIST, "mirrors", [first, second])
        assert_loads(small_mnist)
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == archives


@pytest.mark.parametrize("fault", FAULTY_MIRRORS)
def test_no_good_mirror_is_one_error_and_leaves_nothing(fault, raw, small_mnist, monkeypatch):  # noqa: F811
    archives = take_archives(raw)
    with mirror(FAULTY_MIRRORS[fault](archives)) as only:
        monkeypatch.setattr(MNIST, "mirrors", [only])
        with pytest.raises(mnist.UserError, match=re.escape(only + ARCHIVES[0])) as error:
            mnist.load_mnist(small_mnist)
    assert "\n" not in str(error.value)
    assert list(raw.iterdir()) == []


def test_a_mirror_that_falls_silent_is_given_up(raw, small_mnist, monkeypatch):  # noqa: F811
    archives = take_archives(raw)
    slow = mirror(lambda handler, name: send(handler, archives[name], pause=5))
    monkeypatch.setattr(mnist, "TIMEOUT", 0.5)
    with slow as first, mirror(good(archives)) as second:
        monkeypatch.setattr(MNIST, "mirrors", [first, second])
        start = time.monotonic()
        assert_loads(small_mnist)
        assert time.monotonic() - start < 5


FAULTY_RAW_FILES = {
    "cut short": lambda content: content[:-1000],
    "empty": lambda content: b"",
    "of another magic number": lambda content: b"\0\0\x08\x02" + content[4:],
    "of the wrong count": lambda content: content[:4] + struct.pack(">I", 501) + content[8:],
    "with a label above 9": lambda content: content[:-1] + b"\x0a",
}


@pytest.mark.parametrize("fault", FAULTY_RAW_FILES)
def test_a_bad_raw_file_is_named_and_read_from_the_archive(fault, raw, small_mnist, offline, capsys):  # noqa: F811
    name = "train-labels-idx1-ubyte"
    (raw / name).write_bytes(FAULTY_RAW_FILES[fault](mnist.read_file(raw, name)))
    assert_loads(small_mnist)
    assert f"{raw / name} is damaged" in capsys.readouterr().err

    (raw / f"{name}.gz").unlink()
    with pytest.raises(mnist.UserError, match=f"{name}.gz"):
        mnist.load_mnist(small_mnist)


def test_raw_files_alone_are_enough(raw, small_mnist, offline):  # noqa: F811
    for name in mnist.FILES:
        (raw / name).write_bytes(mnist.read_file(raw, name))
        (raw / f"{name}.gz").unlink()
    assert_loads(small_mnist)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_refused_or_harmless(data, raw, small_mnist, offline):  # noqa: F811
    name = data.draw(st.sampled_from(sorted(mnist.FILES)))
    path = raw / data.draw(st.sampled_from([name, f"{name}.gz"]))
    whole = (raw / f"{name}.gz").read_bytes()
    content = whole if path.suffix else mnist.read_file(raw, name)
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
        try:
            assert_loads(small_mnist)
        except mnist.UserError as error:
            assert name in str(error)  # noqa: PT017
    finally:
        path.unlink()
        (raw / f"{name}.gz").write_bytes(whole)


# --- Processes -----------------------------------------------------------------------------------------------------

DRIVER = """
import sys
import mnist
from torchvision.datasets import MNIST
mnist.FILES, MNIST.mirrors = {files!r}, {mirrors!r}
sys.argv[0] = "mnist.py"
{more}
mnist.run(mnist.main)
"""


@pytest.fixture
def start(small_mnist, tmp_path):  # noqa: F811
    """Start mnist.py as a process on the small data, with more code to run first if need be."""
    processes = []

    def start(*args, more="", mirrors=(), **options):
        code = DRIVER.format(files=mnist.FILES, mirrors=list(mirrors), more=more)
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


def drop_root_privilege():
    """Make the permissions of files bind root, too: drop CAP_DAC_OVERRIDE from what an exec may keep."""
    if os.geteuid() == 0:
        pr_capbset_drop, cap_dac_override = 24, 1
        ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override)


@pytest.fixture
def read_only(tmp_path):
    changed = []

    def make(*paths):
        for path in paths:
            changed.append((path, path.stat().st_mode))
            path.chmod(0o555 if path.is_dir() else 0o444)

    yield make
    for path, mode in changed:
        path.chmod(mode)


def test_a_read_only_data_folder_works(start, raw, read_only):
    name = next(iter(mnist.FILES))
    (raw / name).write_bytes(mnist.read_file(raw, name))  # one file raw, the others as .gz alone
    read_only(*raw.iterdir(), raw, raw.parent, raw.parent.parent)
    process = start("--dry-run", preexec_fn=drop_root_privilege)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""


def test_a_download_killed_half_way_is_repaired_by_the_next_run(start, raw, small_mnist, monkeypatch):  # noqa: F811
    archives = take_archives(raw)
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
        assert_loads(small_mnist)


def test_two_processes_at_once_fill_an_empty_folder(start, raw):
    archives = take_archives(raw)
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


def begin_training(start, *args, **options):
    process = start("--epochs", "1000000", *args, **options)
    for line in process.stdout:
        if line.startswith("Epoch"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_in_one_line_and_keeps_earlier_weights(number, status, start, tmp_path):
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    process = begin_training(start)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == status
    assert err == f"mnist.py: stopped by {number.name}\n"
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mnist.pt"]


def test_ctrl_c_during_the_imports_shows_no_traceback():
    process = subprocess.Popen([sys.executable, mnist.__file__, "--dry-run"], stderr=subprocess.PIPE, text=True)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err


def test_a_piped_log_grows_with_the_training(start):
    process = start("--dry-run", more="mnist.fit = lambda *args: sys.stdin.read()", stdin=subprocess.PIPE)
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready  # though the training waits for its input to end
    assert process.stdout.readline() == "Total Parameters: 18242\n"


def test_a_closed_pipe_ends_quietly(start):
    process = begin_training(start)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_narrow_ascii_terminal_without_colour_is_readable(start):
    main_end, terminal = os.openpty()
    rows, columns = 24, 40
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {"NO_COLOR": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "TERM": "dumb"}
    process = start("--epochs", "2", "--batch-size", "10", stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while chunk := os.read(main_end, 4096):
            output += chunk
    os.close(main_end)
    assert process.wait() == 0
    text = output.decode("ascii")
    assert "\x1b[3" not in text
    bars = [line for line in re.split(r"[\r\n]+", text) if "%|" in line]
    assert bars
    assert all(len(bar) <= columns for bar in bars)


# --- Command line --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    option=st.sampled_from(["--epochs", "--batch-size", "--lr", "--seed", "--device", "--precision"]),
    value=st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str)),
)
def test_any_value_is_taken_or_refused_by_name(option, value):
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            args = mnist.parse_args(["--dry-run", f"{option}={value}"])
    except SystemExit as stop:
        assert stop.code == 2  # noqa: PT017
        assert f"argument {option}" in err.getvalue()
    else:
        assert args.epochs >= 1
        assert 1 <= args.batch_size <= 60_000
        assert 0 < args.lr < float("inf")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_missing_device_is_an_error_not_the_cpu(device, capsys):
    if getattr(torch, device).is_available():
        pytest.skip(f"there is {device} here")
    with pytest.raises(SystemExit) as stop:
        mnist.main(["--dry-run", "--device", device])
    assert stop.value.code == 2
    assert f"{device!r} is not available" in capsys.readouterr().err


def test_a_gpu_that_refuses_to_work_is_passed_over_with_a_warning(monkeypatch, capsys):
    zeros = torch.zeros

    def refuse(*args, device):
        if device == "mps":
            raise RuntimeError("MPS backend out of memory\nand more")
        return zeros(*args, device=device)

    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert mnist.pick_device("auto").type == "cpu"
    assert capsys.readouterr().err == "warning: 'mps' does not work here (MPS backend out of memory): it is not used\n"
    with pytest.raises(mnist.argparse.ArgumentTypeError, match=r"\(MPS backend out of memory\): use cpu, or auto"):
        mnist.pick_device("mps")


def test_bfloat16_by_emulation_is_warned_of(small_mnist, monkeypatch, capsys):  # noqa: F811
    for native in (False, True):
        monkeypatch.setattr(mnist, "has_bfloat16", lambda device, native=native: native)
        mnist.main(["--dry-run", "--precision", "bfloat16", "--data-dir", small_mnist])
        assert ("slow" in capsys.readouterr().err) != native


def refused(process, path):
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert f"cannot write {path}" in err.splitlines()[-1]


def test_a_path_that_cannot_be_saved_to_is_refused_before_training(start, tmp_path, read_only, capsys):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "mnist.pt", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(SystemExit) as stop:
            mnist.main(["--save-model", str(path)])
        assert stop.value.code == 2
        assert f"cannot write {path}" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()

    read_only(tmp_path / "folder")
    path = tmp_path / "folder" / "mnist.pt"
    refused(start("--save-model", str(path), preexec_fn=drop_root_privilege), path)

    small_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10_000, 10_000))
    path = tmp_path / "mnist.pt"
    path.write_bytes(b"an earlier run")
    refused(start("--save-model", str(path), preexec_fn=small_disk), path)
    assert path.read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "folder", "mnist.pt"]


# --- Training ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(small_mnist, tmp_path):  # noqa: F811
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    with pytest.raises(mnist.UserError, match=r"the loss is (nan|inf) at epoch 1, step \d+: lower --lr"):
        mnist.main(["--lr", "1e30", "--batch-size", "5", "--data-dir", small_mnist])
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"


# --- Save and load -------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_during_training_costs_no_results(start, tmp_path):
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    more = """
import resource
fit = mnist.fit
def fit_then_fill_the_disk(*args):
    history = fit(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return history
mnist.fit = fit_then_fill_the_disk
"""
    process = start("--epochs", "1", more=more)
    out, err = process.communicate()
    assert process.returncode == 1
    assert "Final test accuracy" in out
    assert err.startswith("mnist.py: error: cannot save the weights to mnist.pt: ")
    assert err.count("\n") == 1
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mnist.pt"]


def checkpoint(model):
    return {"state_dict": model.state_dict()}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_never_runs_code_from_the_file(tmp_path):
    path, trace = tmp_path / "mnist.pt", tmp_path / "the code ran"
    for content in (Malicious(trace), {"state_dict": mnist.Net().state_dict(), "history": Malicious(trace)}):
        torch.save(content, path)
        with pytest.raises(mnist.UserError, match=re.escape(str(path))):
            mnist.load(path)
        assert not trace.exists()
    torch.load(path, weights_only=False)  # the code is real
    assert trace.exists()


def test_a_file_that_is_no_checkpoint_of_this_network_is_refused(tmp_path):
    path = tmp_path / "mnist.pt"

    def assert_refused():
        with pytest.raises(mnist.UserError, match=re.escape(str(path))) as error:
            mnist.load(path)
        assert "\n" not in str(error.value)

    assert_refused()  # no file at all
    for content in (b"", b"text", pickle.dumps({"a": 1}, protocol=2), b"PK\x03\x04 but no archive"):
        path.write_bytes(content)
        assert_refused()

    torch.save(checkpoint(mnist.Net()), path)
    mnist.load(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:length])
        assert_refused()

    wider = mnist.Net()
    wider.fc = torch.nn.Linear(72, 11)
    broken = mnist.Net()
    broken.fc.bias.data[3] = float("nan")
    others = [checkpoint(wider), checkpoint(broken), {"state_dict": None}, {"state_dict": {"a": 1}}, {}, [1], 7]
    for content in others:
        torch.save(content, path)
        assert_refused()


# --- Reproducibility -----------------------------------------------------------------------------------------------


def test_two_processes_with_one_seed_end_in_the_same_bits_at_any_thread_count_nearly(start, tmp_path):
    runs = {"first": "2", "second": "2", "third": "1"}
    processes = [
        start("--epochs", "2", "--save-model", f"{run}.pt", env={"OMP_NUM_THREADS": threads})
        for run, threads in runs.items()
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    losses = [mnist.load(tmp_path / f"{run}.pt")[1]["history"][-1]["train_loss"] for run in runs]
    first, second = (mnist.load(tmp_path / f"{run}.pt")[0].state_dict() for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], abs=0.1)
