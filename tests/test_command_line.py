"""The command line of mnist.py: its options, its output, its exit; and that the README's commands are true."""

import argparse
import ast
import contextlib
import io
import os
import re
import select
import signal
import struct
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mnist
from tools import weights

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(mnist.__file__).parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")

# --- Options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--batch-size", "-64"),
        ("--batch-size", "60001"),
        ("--epochs", "two"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--device", "hpu"),
        ("--precision", "float8"),
        ("--save-model", "missing/mnist.py"),
        ("--save-model", "missing/train-images-idx3-ubyte"),
    ],
)
def test_bad_value_is_refused(option, value, assert_refused):
    assert_refused(mnist.main, option, value)


def test_refusal_says_what_is_expected(capsys):
    for options, expected in {
        ("--lr", "1e-400"): "argument --lr: 0.0 is not from 1e-30 to 1e+30",
        ("--batch-size", "8"): "argument --batch-size: 8 is not from 9 to 60000",
        ("--validate", "--batch-size", "50001"): "argument --batch-size: 50001 is not from 9 to 50000",
        ("--device", "tpu"): "argument --device: 'tpu' does not work (",
    }.items():
        with pytest.raises(SystemExit):
            mnist.main(options)
        assert expected in capsys.readouterr().err


@settings(max_examples=100, deadline=None)
@given(
    option=st.sampled_from(["--epochs", "--batch-size", "--lr", "--seed", "--device", "--precision"]),
    # Python before 3.13 drops a "--" that is the value of an option: github.com/python/cpython/issues/59317
    value=st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str)).filter("--".__ne__),
)
def test_any_value_is_taken_or_refused(option, value):
    err, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(err):
            args = mnist.parse_args(["--dry-run", f"{option}={value}"])
    except SystemExit as stop:
        status = stop.code
    if status:
        assert status == 2
        assert f"argument {option}" in err.getvalue()
    else:
        assert args.epochs >= 1
        assert 1 <= args.batch_size <= 60_000
        assert 0 < args.lr < float("inf")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_missing_device_is_an_error(device, capsys):
    if getattr(torch, device.partition(":")[0]).is_available():
        pytest.skip(f"there is {device} here")
    with pytest.raises(SystemExit) as stop:
        mnist.main(["--dry-run", "--device", device])
    assert stop.value.code == 2
    assert f"{device!r} does not work (" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, torch.cuda.DeferredCudaCallError])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_device_that_refuses_to_work(error, name, monkeypatch):
    def refuse(*_args, device):
        raise error(f"{device} is out of memory\nand more")

    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(argparse.ArgumentTypeError) as fault:
        mnist.pick_device(name)
    assert str(fault.value) == "'cuda' does not work (cuda is out of memory): use cpu"


def test_bfloat16_is_used_where_it_is_native(monkeypatch):
    for found, native in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert mnist.has_bfloat16(torch.device("cpu")) == native
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an old torch
    assert not mnist.has_bfloat16(torch.device("cpu"))
    for capability, native in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert mnist.has_bfloat16(torch.device("cuda")) == native


def test_emulated_bfloat16_is_warned_of(small_mnist, monkeypatch, capsys):
    for native in (False, True):
        monkeypatch.setattr(mnist, "has_bfloat16", lambda device, native=native: native)
        mnist.main(["--dry-run", "--precision", "bfloat16", "--data-dir", small_mnist])
        assert ("slow" in capsys.readouterr().err) != native


def test_data_dir_has_two_defaults():
    code = "import mnist; print(mnist.parse_args(['--dry-run']).data_dir)"
    env = {**os.environ, "MNIST_DATA": "elsewhere"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "elsewhere\n"
    assert os.environ.get("MNIST_DATA") or mnist.DATA_DIR == ROOT / "data"
    assert mnist.parse_args(["--dry-run", "--data-dir", "here"]).data_dir == Path("here")


def test_validation_is_the_last_10_000(tmp_path, monkeypatch):
    given = []
    train_set, test_set = ((torch.arange(n).view(n, 1, 1).expand(n, 28, 28), torch.arange(n)) for n in (60_000, 9))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load_mnist", lambda *_: (train_set, test_set))
    monkeypatch.setattr(
        mnist, "fit", lambda model, *args: given.extend(args) or [{"test_loss": 9, "test_accuracy": 99}]
    )
    mnist.main(["--validate"])
    for (images, labels), part in zip(given[:2], (range(50_000), range(50_000, 60_000)), strict=True):
        assert torch.equal(images[:, 0, 0], labels)
        assert labels.tolist() == list(part)
    assert given[-1] == "validation"


def test_main_returns_and_saves_results(small_mnist):
    results = mnist.main(["--epochs", "2", "--seed", "3", "--data-dir", small_mnist])
    checkpoint = torch.load("mnist.pt", weights_only=True)  # the default
    mnist.Net().load_state_dict(checkpoint.pop("state_dict"))
    assert checkpoint == results
    assert results["parameters"] == 18_242
    assert [epoch["epoch"] for epoch in results["history"]] == [1, 2]
    settings = {"epochs": 2, "batch_size": 128, "lr": 0.04, "seed": 3, "validate": False, "dry_run": False}
    assert settings.items() <= results["settings"].items()
    assert small_mnist not in str(results)  # no paths of this machine


def test_dry_run_saves_only_if_told_to(small_mnist):
    mnist.main(["--dry-run", "--data-dir", small_mnist])
    assert not Path("mnist.pt").exists()
    mnist.main(["--dry-run", "--data-dir", small_mnist, "--save-model", "dry.pt"])
    model, checkpoint = weights.load("dry.pt")
    assert not model.training
    assert checkpoint["settings"]["dry_run"]


@pytest.mark.parametrize(
    ("accuracy", "options", "warned"), [(97, [], True), (98, [], False), (12, ["--dry-run"], False)]
)
def test_run_that_did_not_learn_says_so(accuracy, options, warned, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load_mnist", lambda *_: (digits(500), digits(100)))
    monkeypatch.setattr(mnist, "fit", lambda *_: [{"test_loss": 9, "test_accuracy": accuracy}])
    mnist.main(options)
    expected = "mnist.py: warning: accuracy below 98 %, which the default options pass\n" if warned else ""
    assert capsys.readouterr().err == expected


# --- Output --------------------------------------------------------------------------------------------------------


def test_readme_shows_the_log(small_mnist, capsys):
    mnist.main(["--data-dir", small_mnist, "--device", "cpu", "--precision", "float32"])
    out, err = capsys.readouterr()
    (shown,) = re.findall(r"```\n(Total .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    log, shown = (re.sub(r"\d+(\.\d+)?", "N", text).replace("threads", "thread") for text in (out, shown))
    assert log == shown
    assert err == ""  # no fragments of a progress bar without a terminal


def test_summary_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(mnist, "write", None)  # nor is it tried whether weights can be saved
    assert mnist.main(["--summary"]) is None
    assert "Linear-20" in capsys.readouterr().out


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        mnist.main(["--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    training = ("--epochs", "--batch-size", "--lr", "--seed", "--device", "--precision", "--validate")
    for option in (*training, "--data-dir", "--save-model", "--dry-run", "--summary"):
        assert option in out
    assert err == ""


@posix
def test_piped_log_grows(start):
    wait = "mnist.fit = lambda *args: sys.stdin.read()"
    process = start("--dry-run", setup=wait, stdin=subprocess.PIPE, env={"PYTHONUNBUFFERED": ""})
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready  # though the training waits for its input to end
    assert process.stdout.readline() == "Total Parameters: 18242\n"


@posix
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams(closed, start, tmp_path):
    process = start("--epochs", "1", preexec_fn=lambda: [os.close(number) for number in closed])
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    weights.load(tmp_path / "mnist.pt")


def test_main_needs_no_streams(small_mnist, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert mnist.main(["--dry-run", "--data-dir", small_mnist])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the fault is caused by Linux's means")
def test_standard_output_on_a_full_disk(start, tmp_path):
    with open("/dev/full", "w") as full:
        process = start("--epochs", "1", stdout=full)
    assert process.wait() == 1
    assert process.stderr.read() == "mnist.py: error: standard output: No space left on device\n"
    assert not (tmp_path / "mnist.pt").exists()


def test_main_leaves_the_arguments_of_its_host_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["host.py", "--epochs", "7"])
    assert mnist.parse_args(None).epochs == mnist.EPOCHS


def test_host_that_computes_in_float64(small_mnist):
    torch.set_default_dtype(torch.float64)
    try:
        assert mnist.main(["--dry-run", "--data-dir", small_mnist])
    finally:
        torch.set_default_dtype(torch.float32)


def test_idle_shows_no_bar(small_mnist, monkeypatch):
    """It calls itself a terminal, but a carriage return begins a new line in it."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: True
    mnist.main(["--dry-run", "--data-dir", small_mnist])
    assert "%|" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: True
    monkeypatch.setitem(sys.modules, "idlelib.run", None)
    mnist.main(["--dry-run", "--data-dir", small_mnist])
    assert sys.stderr.getvalue() == ""


def test_old_python_is_named():
    ast.parse(Path(mnist.__file__).read_text(encoding="utf-8"), feature_version=(3, 9))  # it gets as far as this:
    code = "import sys; sys.version_info = (3, 9, 6); import mnist"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mnist.py needs Python 3.11 or newer: ")
    assert len(done.stderr.splitlines()) == 1


def test_main_runs_in_a_thread(small_mnist):
    with ThreadPoolExecutor() as pool, contextlib.redirect_stdout(io.StringIO()) as out:
        assert pool.submit(mnist.main, ["--dry-run", "--data-dir", small_mnist]).result()
    assert "Trained in" in out.getvalue()


@posix
def test_narrow_ascii_terminal(start):
    import fcntl
    import termios

    main_end, terminal = os.openpty()
    rows, columns = 24, 40
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {"NO_COLOR": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "TERM": "dumb"}
    process = start("--epochs", "2", "--batch-size", "24", stdout=terminal, stderr=terminal, env=env)
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


# --- Exit ----------------------------------------------------------------------------------------------------------


def train_for_long(start):
    """Start a training that would take hours; return its process after the first epoch."""
    # Whoever runs the tests in the background may have them ignore SIGINT, which the training would inherit.
    process = start("--epochs", "1000000", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.startswith("Epoch"):
            return process
    raise AssertionError(process.stderr.read())


@posix
@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [(signal.SIGINT, 130, "mnist.py: interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, "")],
)
def test_signal_ends_training(sent, status, message, start, tmp_path):
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    process = train_for_long(start)
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == status
    assert err == message
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mnist.pt"]


@posix
def test_closed_pipe_ends_quietly(start):
    process = train_for_long(start)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def fail(error):
    """Run a script whose main() raises `error`."""

    def main(_argv):
        raise error

    mnist.run(main)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (mnist.UserError("put it right"), "mnist.py: error: put it right"),
        (FileNotFoundError(2, "No such file", "a.pt"), "mnist.py: error: a.pt: No such file"),
        (torch.OutOfMemoryError("Out of memory.\nMore"), "mnist.py: error: Out of memory. Lower --batch-size."),
    ],
)
def test_error_is_one_line(error, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/mnist.py"])
    with pytest.raises(SystemExit) as stop:
        fail(error)
    assert stop.value.code == message  # which Python prints on stderr; the exit status is 1


def test_memory_of_the_computer_runs_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    with pytest.raises(SystemExit, match=r"^mnist\.py: error: .*allocate.* Lower --batch-size\.$"):
        mnist.run(lambda _: torch.empty(2**50))


def test_bare_interrupt_ends_quietly(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    with pytest.raises(SystemExit) as stop:
        fail(KeyboardInterrupt())
    assert stop.value.code == 130
    assert capsys.readouterr().err == "mnist.py: interrupted\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError(5, "no file to name")])
def test_unexpected_error_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error


# --- What the project says of itself -------------------------------------------------------------------------------


def test_script_metadata_match_requirements():
    block = re.search(r"(?m)^# /// script\n((?:^#.*\n)+?)^# ///\n", Path(mnist.__file__).read_text(encoding="utf-8"))
    metadata = tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True)))
    requirements = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert set(metadata["dependencies"]) <= set(requirements)
    assert len(metadata["dependencies"]) == 4
    assert f"Python {metadata['requires-python'].strip('>=')}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_package_comes_from_one_index():
    """With an extra index, either may serve a package of any name."""
    for path in (ROOT / "README.md", *(ROOT / ".github").rglob("*.*")):
        assert "--extra-index-url" not in path.read_text(encoding="utf-8"), path


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^(python3 -m venv .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [command.split("/")[-1] for command in commands] == ["python mnist.py", "pytest"]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "tests/README.md", "tools/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    outside = ("http", "../../actions")  # the latter are pages of GitHub
    links = [link for link in re.findall(r"(?:\]\(|src=\")([^)\"]+)", text) if not link.startswith(outside)]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)", target.read_text(encoding="utf-8"))
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link
