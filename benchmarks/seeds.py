"""Train with many seeds, each in a process of its own, and report accuracy, time and memory.

Usage, in the folder of mnist.py:
    python -m benchmarks.seeds --seeds 40 --out results.json      # the default recipe; run it again to continue
    python -m benchmarks.seeds --seeds 5 --baseline 1             # beside the original recipe, one epoch of it
    python -m benchmarks.seeds --seeds 5 --validate --set BEND=0
    python -m benchmarks.seeds --seeds 40 --shard 3/8 --out shard3.json
    python -m benchmarks.seeds --seeds 40 --join shard*.json      # one table; fails if a seed ends at or below 99.40 %
    python -m benchmarks.seeds --compare before.json after.json   # is there a difference?
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import mnist
import report
import weights
from benchmarks import original

import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(mnist.__file__).resolve().parent
TARGET = 99.4  # %: a seed that ends at or below it has failed

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
    """Run Python with `arguments` in the folder of mnist.py; return its seconds and its peak_memory().

    Raises UserError with its last error, a message or a traceback, if it fails.
    """
    memory = None
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
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
            *_, error = re.split(r"(?m)^(?=Traceback |\S+: error: )", errors.read().decode(errors="replace").strip())
            raise mnist.UserError(f"a run failed with exit status {process.returncode}: {error or 'no message'}")
    return seconds, memory


def call(function, *args):
    """Return function(*args); where there is CUDA, from a process of its own, so that this one holds no context."""
    if not torch.cuda.is_available():
        return function(*args)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def find_device(name):
    """Return (device, whether it has native bfloat16, the name of the GPU or None) for what --device says."""
    device = mnist.pick_device(name)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return device, mnist.has_bfloat16(device), gpu


def matmul_speed(device, precision):
    """Return the floating-point operations per second of multiplying two 2048 x 2048 matrices, the best of ten."""
    a, b = torch.randn(2, 2048, 2048, dtype=getattr(torch, precision), device=device)
    repeats = 1 if device.type == "cpu" else 100  # a product takes a GPU no longer than its launch and the reading
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            product = a @ b
        product[0, 0].item()  # a GPU is done when the value is here
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 * repeats / min(seconds)


def training_flops():
    """Return the floating-point operations of training on one image: those forward, and twice as many backward."""
    model = mnist.Net().eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28))
    return 3 * counter.get_total_flops()


# --- Many runs -----------------------------------------------------------------------------------------------------


def calibration_error(path, args):
    """Return the calibration error in % of the network in the file `path`, as report.py gives it."""
    model, _ = weights.load(path)
    train_set, test_set = mnist.load_mnist(args.data_dir)
    images, labels = [part[-mnist.VALIDATION_SIZE :] for part in train_set] if args.validate else test_set
    return 100 * report.reliability(mnist.classify(model, images).softmax(dim=1), labels)[-1]


def train_once(seed, args):
    """Run mnist.py with one seed; return the figures of the run, as a dictionary for JSON."""
    program = ["mnist.py"]
    if args.set:
        overrides = "; ".join(f"mnist.{name} = {value}" for name, value in args.set.items())
        program = ["-c", f"import mnist, torch; from benchmarks import original; {overrides}; mnist.run(mnist.main)"]
    speed = call(matmul_speed, args.device, args.precision)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mnist.pt")
        options = ["--seed", seed, "--epochs", args.epochs, "--device", args.device, "--precision", args.precision]
        options += ["--data-dir", args.data_dir, "--save-model", path]
        options += ["--validate"] * args.validate + ["--dry-run"] * args.dry_run
        seconds, memory = run_process([*program, *options])
        results = torch.load(path, weights_only=True)
        error = None if "Net" in args.set else calibration_error(path, args)
    return {
        "seed": seed,
        "accuracy": results["test_accuracy"],
        "loss": results["test_loss"],
        "calibration_error": error,
        "loop_seconds": sum(epoch["seconds"] for epoch in results["history"]),
        "training_seconds": results["seconds"],
        "process_seconds": seconds,
        "peak_memory_mb": memory,
        "matmul_flops": speed,
    }


def train_baseline_once(seed, args):
    """Run the original recipe with one seed; return its figures, with its seconds extrapolated to all its epochs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "history.json")
        options = ["--epochs", args.baseline, "--seed", seed, "--data-dir", args.data_dir, "--out", path]
        seconds, memory = run_process(["-m", "benchmarks.original", *options, *["--dry-run"] * args.dry_run])
        history = json.loads(path.read_text())
    epochs = [epoch["seconds"] for epoch in history]
    return {
        "seed": seed,
        "accuracy": history[-1]["accuracy"],
        "epoch_seconds": epochs,
        "process_seconds": seconds,
        "extrapolated_seconds": seconds - sum(epochs) + original.EPOCHS * statistics.mean(epochs),
        "peak_memory_mb": memory,
    }


def cpu_name():
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def run_settings(args):
    """Return everything except the seed that decides the result of a run; runs in one file have it in common."""
    versions = {package: version(package) for package in ("torch", "torchvision")}
    gpu = {"gpu": args.gpu} if args.gpu else {}
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
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
        "mnist.py": hashlib.sha256((ROOT / "mnist.py").read_bytes()).hexdigest()[:12],
    }


def load_results(path):
    """Return the benchmark that `path` holds. Raises OSError if it cannot be read, UserError if it holds none."""
    try:
        benchmark = json.loads(path.read_text(encoding="utf-8"))
        benchmark["settings"], benchmark["runs"][0]["seed"]
    except (ValueError, LookupError, TypeError) as error:
        raise mnist.UserError(f"{path} holds no results of benchmarks/seeds.py") from error
    return benchmark


def save_results(benchmark, path):
    """Bring the summary up to date and write all to `path`, if that is not None."""
    benchmark["summary"] = summarize(benchmark)
    if path:
        mnist.write((json.dumps(benchmark, indent=1) + "\n").encode(), path)


def summarize(benchmark):
    """Return the statistics of a benchmark's runs as a dictionary; times and memory are medians."""
    runs, settings = benchmark["runs"], benchmark["settings"]
    accuracies = [run["accuracy"] for run in runs]
    low = [run["seed"] for run in runs if run["accuracy"] <= TARGET]
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
    for figure in ("loss", "calibration_error"):
        values = [run[figure] for run in runs if run.get(figure) is not None]  # earlier versions did not measure them
        summary[figure] = statistics.mean(values) if values else None
    if not settings["dry_run"]:
        images = settings["epochs"] * (mnist.TRAIN_SIZE - mnist.VALIDATION_SIZE * settings["validate"])
        arithmetic = images * training_flops()
        shares = [arithmetic / run["loop_seconds"] / run["matmul_flops"] for run in runs]
        summary["share_of_matmul_speed"] = statistics.median(shares)
    pairs = [(run["baseline"], run) for run in runs if "baseline" in run]
    if pairs:
        summary["baseline_seconds"] = statistics.median(baseline["extrapolated_seconds"] for baseline, _ in pairs)
        summary["baseline_accuracy_mean"] = statistics.mean(baseline["accuracy"] for baseline, _ in pairs)
        ratios = [baseline["extrapolated_seconds"] / run["process_seconds"] for baseline, run in pairs]
        summary["times_faster"] = statistics.median(ratios)
    return summary


def print_summary(benchmark):
    """Print the summary of a benchmark as Markdown."""
    settings, summary = benchmark["settings"], benchmark["summary"]
    overrides = "".join(f", {name} = {value}" for name, value in settings["changes"].items())
    where = settings.get("gpu", settings["cpu"])
    kind = "validation" if settings["validate"] else "test"
    std = "" if summary["accuracy_std"] is None else f" ± {summary['accuracy_std']:.3f}"
    memory = "" if summary["peak_memory_mb"] is None else f"{summary['peak_memory_mb']:.0f}"
    print(
        f"--epochs {settings['epochs']}{overrides}, on {where} (threads: {settings['threads']}; "
        f"{settings['precision']}; torch {settings['torch']}); times and memory are medians:\n\n"
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
            f"| original, {epochs} of {original.EPOCHS} epochs | {sum('baseline' in run for run in benchmark['runs'])} "
            f"| {summary['baseline_accuracy_mean']:.3f} % | | | | {summary['baseline_seconds']:.0f} | |\n\n"
            f"{summary['times_faster']:.1f} times faster than {original.EPOCHS} epochs of the original on the CPU, the "
            f"whole process, median of the pairs{' (extrapolated)' if epochs != original.EPOCHS else ''}."
        )
    print()
    if summary["calibration_error"] is not None:
        print(f"The mean {kind} loss is {summary['loss']:.4f}; calibration error {summary['calibration_error']:.2f} %.")
    if benchmark["import_memory_mb"] and summary["peak_memory_mb"]:
        above = summary["peak_memory_mb"] - benchmark["import_memory_mb"]
        print(f"The peak memory is {above:.0f} MB above that of `import torch, torchvision`.")
    if "share_of_matmul_speed" in summary:
        print(f"The training loop ran at {100 * summary['share_of_matmul_speed']:.0f} % of the speed of a matmul.")


# --- Two benchmarks ------------------------------------------------------------------------------------------------


def compare(before, after):
    """Return how much higher the mean accuracy of the second of two benchmarks is, and how sure that is.

    A dictionary: "difference" in points, its standard "error", the "low" and "high" of its 95 % interval, whether it
    is "paired", and "seeds": how many in each would tell this difference four times in five, if the standard deviation
    is that seen (None if there is no difference). If both have the same seeds, it is Student's t-test of the pairs,
    else Welch's. Raises UserError if they cannot be compared.
    """
    if before["settings"]["validate"] != after["settings"]["validate"]:
        raise mnist.UserError("one file holds validation accuracies, the other test accuracies: make both alike")
    old, new = ({run["seed"]: run["accuracy"] for run in benchmark["runs"]} for benchmark in (before, after))
    if min(len(old), len(new)) < 2:
        raise mnist.UserError("a comparison takes at least two runs in each file: see --seeds")
    difference = round(statistics.mean(new.values()) - statistics.mean(old.values()), 9)  # 0, not 1e-14
    if paired := old.keys() == new.keys():
        variance = statistics.variance(new[seed] - old[seed] for seed in old)
        error, freedom = math.sqrt(variance / len(old)), len(old) - 1
    else:
        variances = [statistics.variance(runs.values()) for runs in (old, new)]
        variance, error = sum(variances), math.sqrt(variances[0] / len(old) + variances[1] / len(new))
        freedom = stats.ttest_ind(list(old.values()), list(new.values()), equal_var=False).df
    margin = stats.t.ppf(0.975, freedom) * error
    power = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    return {
        "difference": difference,
        "error": error,
        "low": difference - margin,
        "high": difference + margin,
        "paired": paired,
        "seeds": math.ceil(variance * (power / difference) ** 2) if difference else None,
    }


def print_comparison(paths):
    """Print what two files hold, in which settings they differ, and how their accuracies compare."""
    before, after = map(load_results, paths)
    result = compare(before, after)
    for path, benchmark in zip(paths, (before, after), strict=True):
        summary = summarize(benchmark)
        mean, std, low = (summary[f"accuracy_{name}"] for name in ("mean", "std", "min"))
        print(f"{path}: {mean:.3f} % ± {std:.3f}, min {low:.2f} %, n = {summary['n']}")
    for name in before["settings"] | after["settings"]:
        values = [benchmark["settings"].get(name) for benchmark in (before, after)]
        if values[0] != values[1]:
            print(f"They differ in {name}: {values[0]}, {values[1]}")
    how = "in pairs of one seed" if result["paired"] else "seeds not the same"
    print(
        f"Difference: {result['difference']:+.3f} ± {result['error']:.3f} points (standard error; {how}); "
        f"95 % interval {result['low']:+.3f} to {result['high']:+.3f}"
    )
    if result["low"] > 0 or result["high"] < 0:
        print(f"{paths[1]} is {'better' if result['difference'] > 0 else 'worse'}.")
    elif result["seeds"]:
        print(f"No difference that these runs can tell. It would take {result['seeds']:,} seeds each to tell this one.")
    else:
        print("No difference.")


# --- Command line --------------------------------------------------------------------------------------------------


def parse_args(argv):
    count = mnist.in_range(int, 1, 1_000_000)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds", description="Train with many seeds, and report accuracy, time and memory."
    )
    add = parser.add_argument
    add("--seeds", type=count, default=5, help="train with seeds 0 to N - 1 (default: %(default)s)", metavar="N")
    add("--shard", type=shard_of, default=(1, 1), help="of the seeds, only the I-th of N parts", metavar="I/N")
    add("--epochs", type=count, default=mnist.EPOCHS, metavar="N", help="default: %(default)s")
    add("--validate", action="store_true", help="train on the first 50,000 training images, test on the other 10,000")
    add(
        "--set", type=override, action="append", default=[], metavar="NAME=VALUE", help="override something in mnist.py"
    )
    add(
        "--baseline",
        type=count,
        nargs="?",
        const=original.EPOCHS,
        default=0,
        metavar="EPOCHS",
        help=f"after each run, also run the original recipe; fewer than its {original.EPOCHS} epochs are extrapolated",
    )
    device = functools.partial(call, find_device)
    add("--device", type=device, default="auto", metavar="{auto,cpu,cuda,mps}", help="default: %(default)s")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where native")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data")
    add("--dry-run", action="store_true", help="try everything on a batch or a few")
    add("--out", type=mnist.writable, metavar="PATH", help="write here after every run; continue what it holds")
    add(
        "--join",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing: join shards, and fail if one ended at or below 99.40 %%",
    )
    add("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="run nothing: compare the accuracies")
    args = parser.parse_args(argv)
    args.set = dict(args.set)
    args.data_dir = args.data_dir.resolve()
    args.device, has_bfloat16, args.gpu = args.device
    if args.precision == "auto":
        args.precision = "bfloat16" if has_bfloat16 else "float32"
    return args


def shard_of(text):
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/8")
    return int(found[1]), int(found[2])


def override(text):
    name, _, value = text.partition("=")
    if not hasattr(mnist, name):
        raise argparse.ArgumentTypeError(f"{text!r} names nothing in mnist.py, as BEND=0 does")
    try:
        compile(value, "--set", "eval")
    except SyntaxError:
        raise argparse.ArgumentTypeError(f"{text!r} gives {name} a value that Python cannot read") from None
    return name, value


def join(args):
    """Return one benchmark of those in `args.join`.

    Raises UserError if a seed is missing or there twice, or if their settings differ in more than the machine.
    """
    parts = [load_results(path) for path in args.join]
    runs = sorted((run for part in parts for run in part["runs"]), key=lambda run: run["seed"])
    seeds = [run["seed"] for run in runs]
    if seeds != list(range(args.seeds)):
        raise mnist.UserError(f"the files hold seeds {seeds}, not each of 0 to {args.seeds - 1} once: see --seeds")
    settings = {}
    for name in parts[0]["settings"]:
        values = [part["settings"].get(name) for part in parts]
        if all(value == values[0] for value in values):
            settings[name] = values[0]
        elif name in ("cpu", "capability", "threads", "precision"):  # hosted runners are not all of one kind
            settings[name] = " or ".join(sorted({str(value) for value in values}))
        else:
            raise mnist.UserError(f"the files differ in {name}: {', '.join(str(value) for value in values)}")
    return {**parts[0], "settings": settings, "parts": [part["command"] for part in parts], "runs": runs}


def open_benchmark(args):
    """Return the benchmark that `args.out` holds, or a new one without runs.

    Raises UserError if the runs there were made with other settings.
    """
    settings = run_settings(args)
    if args.out and args.out.exists():
        benchmark = load_results(args.out)
        for name, value in settings.items():
            if (old := benchmark["settings"].get(name)) != value:
                raise mnist.UserError(
                    f"{args.out} holds runs with {name} = {old}, not {value}: name another file with --out"
                )
        return benchmark
    # The median of three: it depends on which pages of the libraries the system has in memory.
    repeats = 1 if args.dry_run else 3
    memories = [memory for _ in range(repeats) if (memory := run_process(["-c", "import torch, torchvision"])[1])]
    import_memory = statistics.median(memories) if memories else None
    return {"command": "", "settings": settings, "import_memory_mb": import_memory, "runs": []}


def main(argv=()):
    """Run the benchmark that `argv` asks for, print its table and return it; with --compare, print a comparison."""
    args = parse_args(argv)
    if args.compare:
        return print_comparison(args.compare)
    command = shlex.join(["python", "-m", "benchmarks.seeds", *argv])
    if args.join:
        benchmark = {**join(args), "command": command}
        save_results(benchmark, args.out)
    else:
        benchmark = open_benchmark(args)
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
                    save_results(benchmark, args.out)
                mean = statistics.mean(run["accuracy"] for run in benchmark["runs"])
                bar.set_postfix_str(f"mean {mean:.3f}%")
    print_summary(benchmark)
    if args.join and (low := benchmark["summary"]["seeds_at_or_below_99.40"]):
        raise mnist.UserError(f"{len(low)} of {args.seeds} seeds ended at or below {TARGET:.2f} %: {low}")
    return benchmark


if __name__ == "__main__":
    mnist.run(main)
