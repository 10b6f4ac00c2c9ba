"""Train by many seeds, each in a process of its own, and say how accurate, how fast and how small that was.

Usage:
    python benchmark.py --seeds 40 --out results.json      # the default recipe; run it again to continue
    python benchmark.py --seeds 5 --baseline 1             # beside the original recipe, of which 1 epoch is timed
    python benchmark.py --seeds 5 --validate --set LABEL_SMOOTHING=0
    python benchmark.py --seeds 40 --shard 3/8 --out shard3.json
    python benchmark.py --seeds 40 --join shard*.json      # one table; fails if a seed ends at or below 99.40 %
"""

import argparse
import contextlib
import hashlib
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mnist

FOLDER = Path(__file__).resolve().parent
FLOOR = 99.4  # %, that no seed may end at or below
BASELINE_EPOCHS = 20


# --- The original recipe -------------------------------------------------------------------------------------------


class Original(mnist.Net):
    """The network as it was published, with a ReLU on the logits."""

    def forward(self, x):
        return super().forward(x).relu()


class Pictures(torch.utils.data.Dataset):
    """MNIST as PIL images, each brought to a tensor by `transform` when it is asked for."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images.numpy(), labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def baseline(epochs, seed, data_dir, path, size):
    """Train by the original recipe on the CPU, on `size` images; write each epoch's accuracy in % and its seconds.

    `path` then holds a list, as JSON, of a dictionary an epoch.
    """
    from torchvision import transforms

    torch.manual_seed(seed)
    to_tensor = [transforms.ToTensor(), transforms.Normalize((mnist.MEAN,), (mnist.STD,))]
    moves = [transforms.RandomRotation(10), transforms.RandomAffine(0, translate=(0.1, 0.1))]
    train_set, test_set = ([part[:size] for part in parts] for parts in mnist.load_mnist(data_dir))
    train_set = Pictures(*train_set, transforms.Compose(moves + to_tensor))
    test_set = Pictures(*test_set, transforms.Compose(to_tensor))
    train_loader = torch.utils.data.DataLoader(train_set, batch_size=128, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test_set, batch_size=128)
    model = Original()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for data, target in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(data), target).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            correct = sum((model(data).argmax(dim=1) == target).sum().item() for data, target in test_loader)
        history.append({"accuracy": 100 * correct / len(test_set), "seconds": time.perf_counter() - start})
    Path(path).write_text(json.dumps(history))


# --- One process ---------------------------------------------------------------------------------------------------


def peak_memory(pid):
    """Return the peak resident memory in MB of a running process; None if it has ended, or the system is not Linux.

    The usual getrusage() would not do: it counts what the parent held when it started the child.
    """
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def run_process(arguments):
    """Run Python with `arguments` in this file's folder; return its seconds and its peak_memory().

    Raises UserError with the last line of its stderr if it fails.
    """
    memory = None
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                memory = peak_memory(process.pid) or memory
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
        finally:
            process.kill()
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise mnist.UserError(f"a run failed with exit status {process.returncode}: {lines[-1]}")
    return seconds, memory


def matmul_speed(device, precision):
    """Return the floating-point operations per second of multiplying two 2048 x 2048 matrices, the best of ten."""
    a, b = torch.randn(2, 2048, 2048, dtype=getattr(torch, precision), device=device)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # a GPU is done when the value is here
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def training_arithmetic():
    """Return the floating-point operations of training on one image: forward, and twice that backward."""
    model = mnist.Net().eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28))
    return 3 * counter.get_total_flops()


# --- Many runs -----------------------------------------------------------------------------------------------------


def train_once(seed, args):
    """Run mnist.py by one seed; return what is to be known of the run, as a dictionary for JSON."""
    program = ["mnist.py"]
    if args.set:
        changes = "; ".join(f"mnist.{name} = {value}" for name, value in args.set.items())
        program = ["-c", f"import benchmark, mnist, torch; {changes}; mnist.run(mnist.main)"]
    speed = matmul_speed(args.device, args.precision)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "mnist.pt")
        options = ["--seed", seed, "--epochs", args.epochs, "--device", args.device, "--precision", args.precision]
        options += ["--data-dir", args.data_dir, "--save-model", weights]
        options += ["--validate"] * args.validate + ["--dry-run"] * args.dry_run
        seconds, memory = run_process([*program, *options])
        results = torch.load(weights, weights_only=True)
    return {
        "seed": seed,
        "accuracy": results["test_accuracy"],
        "loop_seconds": sum(epoch["seconds"] for epoch in results["history"]),
        "training_seconds": results["seconds"],
        "process_seconds": seconds,
        "peak_memory_mb": memory,
        "matmul_flops": speed,
    }


def train_baseline_once(seed, args):
    """Run the original recipe by one seed; return a dictionary of it, with its seconds extrapolated to 20 epochs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "history.json")
        size = 128 if args.dry_run else mnist.TRAIN_SIZE
        call = f"benchmark.baseline({args.baseline}, {seed}, {str(args.data_dir)!r}, {str(path)!r}, {size})"
        seconds, memory = run_process(["-c", f"import benchmark; {call}"])
        history = json.loads(path.read_text())
    epochs = [epoch["seconds"] for epoch in history]
    return {
        "seed": seed,
        "accuracy": history[-1]["accuracy"],
        "epoch_seconds": epochs,
        "process_seconds": seconds,
        "extrapolated_seconds": seconds - sum(epochs) + BASELINE_EPOCHS * statistics.mean(epochs),
        "peak_memory_mb": memory,
    }


def cpu_name():
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def describe(args):
    """Return everything that decides what a run of one seed gives: runs can be put in one file if it is the same."""
    versions = {package: version(package) for package in ("torch", "torchvision")}
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device.type == "cuda" else {}
    return {
        "epochs": args.epochs,
        "validate": args.validate,
        "dry_run": args.dry_run,
        "changes": args.set,
        "baseline_epochs": args.baseline,
        "device": args.device.type,
        **gpu,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
        "mnist.py": hashlib.sha256((FOLDER / "mnist.py").read_bytes()).hexdigest()[:12],
    }


def read(path):
    """Return the benchmark that `path` holds. Raises UserError if it is none."""
    try:
        benchmark = json.loads(path.read_text(encoding="utf-8"))
        benchmark["settings"], benchmark["runs"][0]["seed"]
    except OSError as error:
        raise mnist.UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise mnist.UserError(f"{path} is no result of benchmark.py") from error
    return benchmark


def summarize(benchmark):
    """Return the statistics of a benchmark's runs as a dictionary; times and memory are medians."""
    runs, settings = benchmark["runs"], benchmark["settings"]
    accuracies = [run["accuracy"] for run in runs]
    low = [run["seed"] for run in runs if run["accuracy"] <= FLOOR]
    summary = {
        "n": len(runs),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "accuracy_min": min(accuracies),
        "seeds_at_or_below_99.40": low,
    }
    for figure in ("training_seconds", "process_seconds", "peak_memory_mb"):
        values = [run[figure] for run in runs if run[figure] is not None]
        summary[figure] = statistics.median(values) if values else None
    if not settings["dry_run"]:
        images = settings["epochs"] * (mnist.TRAIN_SIZE - mnist.HELD_OUT * settings["validate"])
        arithmetic = images * training_arithmetic()
        shares = [arithmetic / run["loop_seconds"] / run["matmul_flops"] for run in runs]
        summary["share_of_matmul_speed"] = statistics.median(shares)
    pairs = [(run, run["baseline"]) for run in runs if "baseline" in run]
    if pairs:
        totals = [original["extrapolated_seconds"] for _, original in pairs]
        summary["baseline_seconds"] = statistics.median(totals)
        summary["baseline_accuracy_mean"] = statistics.mean(original["accuracy"] for _, original in pairs)
        ratios = [original["extrapolated_seconds"] / run["process_seconds"] for run, original in pairs]
        summary["times_faster"] = statistics.median(ratios)
    return summary


def print_summary(benchmark):
    """Print the summary of a benchmark as Markdown."""
    settings, summary = benchmark["settings"], benchmark["summary"]
    changes = "".join(f", {name} = {value}" for name, value in settings["changes"].items())
    where = settings.get("gpu", settings["cpu"])
    kind = "validation" if settings["validate"] else "test"
    std = "" if summary["accuracy_std"] is None else f" ± {summary['accuracy_std']:.3f}"
    memory = "" if summary["peak_memory_mb"] is None else f"{summary['peak_memory_mb']:.0f}"
    print(
        f"{settings['epochs']} epochs{changes}, on {where} ({settings['threads']} threads, {settings['precision']}), "
        f"torch {settings['torch']}; times and memory are medians:\n\n"
        f"| recipe | n | {kind} accuracy, mean ± std | min | at or below 99.40 % "
        "| training, s | process, s | peak memory, MB |\n"
        f"{'| --- ' * 8}|\n"
        f"| mnist.py | {summary['n']} | {summary['accuracy_mean']:.3f} %{std} "
        f"| {summary['accuracy_min']:.2f} % | {len(summary['seeds_at_or_below_99.40'])} "
        f"| {summary['training_seconds']:.1f} | {summary['process_seconds']:.1f} | {memory} |"
    )
    if "times_faster" in summary:
        epochs = settings["baseline_epochs"]
        print(
            f"| original, {epochs} of {BASELINE_EPOCHS} epochs | {sum('baseline' in run for run in benchmark['runs'])} "
            f"| {summary['baseline_accuracy_mean']:.3f} % | | | | {summary['baseline_seconds']:.0f} | |\n\n"
            f"{summary['times_faster']:.1f} times faster than {BASELINE_EPOCHS} epochs of the original, the whole "
            f"process, median of the pairs{' (extrapolated)' if epochs != BASELINE_EPOCHS else ''}."
        )
    print()
    if benchmark["import_memory_mb"] and summary["peak_memory_mb"]:
        above = summary["peak_memory_mb"] - benchmark["import_memory_mb"]
        print(f"The peak memory is {above:.0f} MB above that of `import torch, torchvision`.")
    if "share_of_matmul_speed" in summary:
        print(f"The training loop ran at {100 * summary['share_of_matmul_speed']:.0f} % of the speed of a matmul.")


# --- Command line --------------------------------------------------------------------------------------------------


def parse_args(argv):
    count = mnist.number(int, 1, math.inf, "a whole number above 0")
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description="Train by many seeds, and say how accurate, fast and small that was."
    )
    add = parser.add_argument
    add("--seeds", type=count, default=5, help="train by seeds 0 to N - 1 (default: %(default)s)", metavar="N")
    add("--shard", type=shard, default=(1, 1), help="of the seeds, only the I-th of N parts", metavar="I/N")
    add("--epochs", type=count, default=mnist.EPOCHS, metavar="N", help="default: %(default)s")
    add("--validate", action="store_true", help="train on 50,000 of the training images, score the other 10,000")
    add("--set", type=change, action="append", default=[], metavar="NAME=VALUE", help="change something in mnist.py")
    add(
        "--baseline",
        type=count,
        nargs="?",
        const=BASELINE_EPOCHS,
        default=0,
        metavar="EPOCHS",
        help=f"after each run, also run the original recipe; fewer than its {BASELINE_EPOCHS} epochs are extrapolated",
    )
    add("--device", type=mnist.pick_device, default="auto", metavar="{auto,cpu,cuda,mps}", help="default: %(default)s")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where native")
    add("--data-dir", type=Path, default=mnist.default_data_dir(), help="folder of MNIST/raw")
    add("--dry-run", action="store_true", help="train and test on a single batch, to see that all works")
    add("--out", type=Path, help="write here after every run; continue what is there already", metavar="PATH")
    add(
        "--join",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing: join shards, and fail if one ended at or below 99.40 %%",
    )
    args = parser.parse_args(argv)
    if args.out:
        try:
            mnist.write(b"", args.out, rehearsal=True)
        except OSError as error:
            parser.error(f"argument --out: cannot write {args.out}: {error.strerror}")
    args.set = dict(args.set)
    args.data_dir = args.data_dir.resolve()
    if args.precision == "auto":
        args.precision = "bfloat16" if mnist.has_bfloat16(args.device) else "float32"
    return args


def shard(text):
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/8")
    return int(found[1]), int(found[2])


def change(text):
    name, _, value = text.partition("=")
    if not hasattr(mnist, name):
        raise argparse.ArgumentTypeError(f"{text!r} names nothing in mnist.py, as LABEL_SMOOTHING=0 does")
    try:
        compile(value, "--set", "eval")
    except SyntaxError:
        raise argparse.ArgumentTypeError(f"{text!r} gives {name} no value that Python can read") from None
    return name, value


def join(args):
    """Return one benchmark of those in `args.join`.

    Raises UserError if a seed is missing or there twice, or if they are runs of different things.
    """
    parts = [read(path) for path in args.join]
    runs = sorted((run for part in parts for run in part["runs"]), key=lambda run: run["seed"])
    seeds = [run["seed"] for run in runs]
    if seeds != list(range(args.seeds)):
        raise mnist.UserError(f"the files hold seeds {seeds}, not each of 0 to {args.seeds - 1} once: see --seeds")
    settings = {}
    for name in parts[0]["settings"]:
        values = [part["settings"].get(name) for part in parts]
        if name in ("cpu", "threads", "precision"):  # hosted runners are not all of one kind
            settings[name] = " or ".join(sorted({str(value) for value in values}))
        elif any(value != values[0] for value in values):
            raise mnist.UserError(f"the files differ in {name}: {', '.join(str(value) for value in values)}")
        else:
            settings[name] = values[0]
    return {**parts[0], "settings": settings, "parts": [part["command"] for part in parts], "runs": runs}


def begin(args):
    """Return the benchmark that `args.out` holds, or a new one without runs.

    Raises UserError if what is there was run otherwise than `args` says.
    """
    settings = describe(args)
    if args.out and args.out.exists():
        benchmark = read(args.out)
        for name, value in settings.items():
            if (old := benchmark["settings"].get(name)) != value:
                raise mnist.UserError(
                    f"{args.out} holds runs with {name} = {old}, not {value}: name another file by --out"
                )
        return benchmark
    # The median of three, because it depends on which pages of the libraries the system has at hand.
    memories = [memory for _ in range(3) if (memory := run_process(["-c", "import torch, torchvision"])[1])]
    import_memory = statistics.median(memories) if memories else None
    return {"command": "", "settings": settings, "import_memory_mb": import_memory, "runs": []}


def finish(benchmark, out):
    """Bring the summary up to date and write all to `out`, if that is not None."""
    benchmark["summary"] = summarize(benchmark)
    if out:
        try:
            mnist.write((json.dumps(benchmark, indent=1) + "\n").encode(), out)
        except OSError as error:
            raise mnist.UserError(f"cannot write {out}: {error.strerror}") from error


def main(argv=None):
    """Run the benchmark that `argv` asks for, print its table and return it."""
    args = parse_args(argv)
    command = shlex.join(["python", "benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    if args.join:
        benchmark = {**join(args), "command": command}
        finish(benchmark, args.out)
    else:
        benchmark = begin(args)
        benchmark["command"] = command
        index, parts = args.shard
        seeds = range(index - 1, args.seeds, parts)
        done = {run["seed"] for run in benchmark["runs"]}
        with tqdm(seeds, desc="Seeds", unit="run", disable=None) as bar:
            for seed in bar:
                if seed not in done:
                    run = train_once(seed, args)
                    if args.baseline:
                        run["baseline"] = train_baseline_once(seed, args)
                    benchmark["runs"].append(run)
                    finish(benchmark, args.out)
                mean = statistics.mean(run["accuracy"] for run in benchmark["runs"])
                bar.set_postfix_str(f"mean {mean:.3f}%")
    print_summary(benchmark)
    if args.join and (low := benchmark["summary"]["seeds_at_or_below_99.40"]):
        raise mnist.UserError(f"{len(low)} of {args.seeds} seeds ended at or below {FLOOR:.2f} %: {low}")
    return benchmark


if __name__ == "__main__":
    mnist.run(main)
