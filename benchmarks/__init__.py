"""What the benchmarks share: numbers in options, and what a result says of its origin."""

import argparse
import contextlib
import platform
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import mnist

import torch

ROOT = Path(mnist.__file__).resolve().parent


def positive(text):
    """Return a whole number above 0: an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def command_of(name, argv):
    """Return the command that runs a benchmark with `argv`, without the place of its output."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    return shlex.join(["python", "-m", f"benchmarks.{name}", *parser.parse_known_args(argv)[1]])


def commit():
    """Return the commit checked out, with "-dirty" if a file has changed, but for results/; None outside a checkout."""

    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD").strip() + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name():
    """Return the processor's name with its family and model where Linux tells them: an AMD EPYC may be one of many."""
    with contextlib.suppress(OSError, KeyError):  # an ARM processor has neither
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
        return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    return platform.processor() or platform.machine()


def machine(device=None):
    """Return what a result says of the machine, with its GPU if `device` is one, and of the versions."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device and device.type == "cuda" else {}
    return {
        "cpu": cpu_name(),
        **gpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision")},
    }
