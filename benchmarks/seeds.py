"""Train with many seeds, each in a process of its own, and report accuracy and time.

Usage, in the folder of mnist.py:
    python -m benchmarks.seeds --seeds 40 --jobs 2 --out results.json  # two side by side; run it again to continue
    python -m benchmarks.seeds --seeds 5 --baseline 1                  # beside the original recipe, one epoch of it
    python -m benchmarks.seeds --seeds 5 --validate --set BEND=0
    python -m benchmarks.seeds --seeds 40 --shard 3/8 --out shard3.json
    python -m benchmarks.seeds --seeds 40 --join shard*.json           # fails if a seed ends at or below 99.40 %
    python -m benchmarks.seeds --compare before.json after.json        # is there a difference?
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mnist
from benchmarks import ROOT, command_of, commit, machine, original, positive
from tools import report

import torch
from scipy import stats
from tqdm import tqdm

TARGET = 99.4  # %: a seed that ends at or below it has failed
OPTIONS = {"EPOCHS": "--epochs", "DATA_DIR": "--data-dir"}  # what an option sets, so that --set would not reach it

# --- One process ---------------------------------------------------------------------------------------------------


def run_python(arguments, threads):
    """Run Python with `arguments` in the folder of mnist.py; return its seconds and what it printed.

    Raises UserError with its last error, a message or a traceback, if it fails.
    """
    start, environment = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        *_, error = re.split(r"(?m)^(?=Traceback |\S+: error: )", done.stderr.strip())
        raise mnist.UserError(f"a run failed with exit status {done.returncode}: {error or 'no message'}")
    return time.perf_counter() - start, done.stdout


def calibration_error(path, data_dir, validate):
    """Return the calibration error in % of the network in the file `path` on the images that it was tested on."""
    model = mnist.Net()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    train_set, test_set = mnist.load_mnist(data_dir)
    images, labels = [part[-mnist.VALIDATION_SIZE :] for part in train_set] if validate else test_set
    return 100 * report.reliability(mnist.classify(model, images).softmax(dim=1), labels)[-1]


def train_once(seed, args):
    """Run mnist.py, changed as --set says, with one seed; return the figures of the run, as a dictionary for JSON."""
    changes = "".join(f"mnist.{name} = {value}; " for name, value in args.set.items())
    originals = "from benchmarks import original; " * ("original." in changes)  # it takes time to import
    program = ["-c", f"import mnist, torch; {originals}{changes}mnist.run(mnist.main)"] if args.set else ["mnist.py"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mnist.pt")
        options = ["--seed", seed, "--epochs", args.epochs, "--device", args.device, "--precision", args.precision]
        options += ["--data-dir", args.data_dir, "--save-model", path]
        options += ["--validate"] * args.validate + ["--dry-run"] * args.dry_run
        seconds, _ = run_python([*program, *options], args.threads)
        results = torch.load(path, weights_only=True)
        call = f"print(seeds.calibration_error({str(path)!r}, {str(args.data_dir)!r}, {args.validate}))"
        program = ["-c", f"import mnist, torch; from benchmarks import original, seeds; {changes}{call}"]
        _, error = run_python(program, args.threads)
    return {
        "seed": seed,
        "commit": args.commit,
        "accuracy": results["test_accuracy"],
        "loss": results["test_loss"],
        "calibration_error": float(error),
        "training_seconds": results["seconds"],
        "process_seconds": seconds,
    }


def train_baseline_once(seed, args):
    """Run the original recipe with one seed; return its figures, with its seconds extrapolated to all its epochs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "history.json")
        options = ["--epochs", args.baseline, "--seed", seed, "--data-dir", args.data_dir, "--out", path]
        options += ["--dry-run"] * args.dry_run
        seconds, _ = run_python(["-m", "benchmarks.original", *options], args.threads)
        history = json.loads(path.read_text())
    epochs = [epoch["seconds"] for epoch in history]
    return {
        "accuracy": history[-1]["accuracy"],
        "epoch_seconds": epochs,
        "process_seconds": seconds,
        "extrapolated_seconds": seconds - sum(epochs) + original.EPOCHS * statistics.mean(epochs),
    }


def train_pair(seed, args):
    """Return train_once(), with the original recipe run after it if --baseline asks for that."""
    run = train_once(seed, args)
    return run | {"baseline": train_baseline_once(seed, args)} if args.baseline else run


# --- Many runs -----------------------------------------------------------------------------------------------------


def settings_of(args):
    """Return everything except the seed that decides the result of a run; runs in one file have it in common."""
    return {
        "epochs": args.epochs,
        "validate": args.validate,
        "dry_run": args.dry_run,
        "changes": args.set,
        "baseline_epochs": args.baseline,
        "device": args.device.type,
        "precision": args.precision,
        "threads": args.threads,
        "side_by_side": args.jobs,
        **machine(args.device),
        "mnist.py": hashlib.sha256((ROOT / "mnist.py").read_bytes()).hexdigest()[:12],
    }


SETTINGS = {"epochs": int, "validate": bool, "changes": dict, "baseline_epochs": int, "precision": str, "cpu": str}
SETTINGS |= {"threads": (int, str), "torch": str}
MACHINE = ("cpu", "gpu", "capability", "threads", "side_by_side", "precision", "python")  # may differ in a join
FIGURES = ("accuracy", "loss", "calibration_error", "training_seconds", "process_seconds")
BASELINE_FIGURES = ("accuracy", "extrapolated_seconds")


def load_results(path):
    """Return the benchmark that `path` holds. Raises OSError if it cannot be read, UserError if it holds none."""
    try:
        benchmark = json.loads(path.read_text(encoding="utf-8"))
        runs, settings = benchmark["runs"], benchmark["settings"]
        figures = [run[name] for run in runs for name in FIGURES]
        figures += [run["baseline"][name] for run in runs if "baseline" in run for name in BASELINE_FIGURES]
        sound = all(type(figure) in (int, float) and math.isfinite(figure) for figure in figures)
        sound &= all(isinstance(settings[name], kind) for name, kind in SETTINGS.items())
        sound &= all(type(run["seed"]) is int for run in runs) and isinstance(benchmark["command"], str)
        sound &= 0 < len(runs) == len({run["seed"] for run in runs})
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise mnist.UserError(f"{path} is damaged, or holds no results of benchmarks.seeds: name another file")
    return benchmark


def save_results(benchmark, path):
    """Bring the summary up to date and write all to `path`, if that is not None."""
    benchmark["runs"].sort(key=lambda run: run["seed"])
    benchmark["summary"] = summarize(benchmark)
    if path:
        mnist.write(path, (json.dumps(benchmark, indent=1) + "\n").encode())


def summarize(benchmark):
    """Return the statistics of a benchmark's runs as a dictionary; times are medians."""
    runs = benchmark["runs"]
    accuracies = [run["accuracy"] for run in runs]
    summary = {
        "n": len(runs),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "accuracy_min": min(accuracies),
        "seeds_at_or_below_99.40": [run["seed"] for run in runs if run["accuracy"] <= TARGET],
        "loss": statistics.mean(run["loss"] for run in runs),
        "calibration_error": statistics.mean(run["calibration_error"] for run in runs),
        "training_seconds": statistics.median(run["training_seconds"] for run in runs),
        "process_seconds": statistics.median(run["process_seconds"] for run in runs),
    }
    if pairs := [(run["baseline"]["extrapolated_seconds"], run) for run in runs if "baseline" in run]:
        ratios = [seconds / run["process_seconds"] for seconds, run in pairs]
        summary["baseline_seconds"] = statistics.median(seconds for seconds, _ in pairs)
        summary["times_faster"] = statistics.median(ratios)
        summary["times_faster_range"] = [min(ratios), max(ratios)]
    return summary


def accuracy_of(summary):
    """Return the accuracy in a summary as "99.560 % ± 0.045, min 99.42 %, n = 40"."""
    std = "" if summary["accuracy_std"] is None else f" ± {summary['accuracy_std']:.3f}"
    return f"{summary['accuracy_mean']:.3f} %{std}, min {summary['accuracy_min']:.2f} %, n = {summary['n']}"


def print_summary(benchmark):
    """Print the summary of a benchmark."""
    settings, summary = benchmark["settings"], benchmark["summary"]
    kind = "validation" if settings["validate"] else "test"
    changes = "".join(f", {name} = {value}" for name, value in settings["changes"].items())
    where = f"{settings.get('gpu', settings['cpu'])}, {settings['precision']}, threads: {settings['threads']}"
    print(f"Epochs: {settings['epochs']}{changes}; {where}, torch {settings['torch']}")
    low = len(summary["seeds_at_or_below_99.40"])
    print(f"{kind.capitalize()} accuracy {accuracy_of(summary)}; {low} at or below {TARGET:.2f} %")
    print(f"Loss {summary['loss']:.4f}, calibration error {summary['calibration_error']:.2f} %")
    print(f"Median time: {summary['process_seconds']:.1f} s, training and testing {summary['training_seconds']:.1f} s")
    if "times_faster" in summary:
        times, (low, high) = summary["times_faster"], summary["times_faster_range"]
        print(
            f"{original.EPOCHS} epochs of the original on the CPU, from {settings['baseline_epochs']}: "
            f"{summary['baseline_seconds']:.0f} s, {times:.1f} times as long ({low:.1f} to {high:.1f})"
        )


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
    power, few = stats.norm.ppf(0.975) + stats.norm.ppf(0.8), stats.norm.ppf(0.975) ** 2 / 2  # Guenther, 1981
    return {
        "difference": difference,
        "error": error,
        "low": difference - margin,
        "high": difference + margin,
        "paired": paired,
        "seeds": math.ceil(variance * (power / difference) ** 2 + few) if difference else None,
    }


def print_comparison(paths):
    """Print what two files hold, in which settings they differ, and how their accuracies compare."""
    before, after = map(load_results, paths)
    result = compare(before, after)
    for path, benchmark in zip(paths, (before, after), strict=True):
        print(f"{path}: {accuracy_of(summarize(benchmark))}")
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
        print(f"No difference that these runs can detect: one of this size would take {result['seeds']:,} seeds each.")
    else:
        print("No difference.")


# --- Command line --------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds", description="Train with many seeds, and report accuracy and time."
    )
    add = parser.add_argument
    add("--seeds", type=positive, default=5, help="train with seeds 0 to N - 1 (default: %(default)s)", metavar="N")
    add("--shard", type=shard_of, default=(1, 1), help="of the seeds, only the I-th of N parts", metavar="I/N")
    add("--jobs", type=positive, default=1, metavar="N", help="runs side by side, which share the CPU's threads")
    add("--epochs", type=positive, default=mnist.EPOCHS, metavar="N", help="default: %(default)s")
    add("--validate", action="store_true", help="train on the first 50,000 training images, test on the other 10,000")
    add("--set", type=override, action="append", default=[], metavar="NAME=VALUE", help="set a global of mnist.py")
    add(
        "--baseline",
        type=positive,
        nargs="?",
        const=original.EPOCHS,
        default=0,
        metavar="EPOCHS",
        help=f"after each run, also run the original recipe; fewer than its {original.EPOCHS} epochs are extrapolated",
    )
    add("--device", type=mnist.pick_device, default="auto", help="as for mnist.py (default: %(default)s)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where native")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data")
    add("--dry-run", action="store_true", help="run everything on one batch or a few")
    add("--out", type=Path, metavar="PATH", help="write here after every run; continue what it holds")
    add("--join", type=Path, nargs="+", metavar="FILE", help="join results; fail if one is at or below 99.40 %%")
    add("--partial", action="store_true", help="join what is there, and record the seeds that are missing")
    add("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="run nothing: compare the accuracies")
    args = parser.parse_args(argv)
    if args.shard[0] > args.seeds:
        parser.error("argument --shard: {}/{} holds none of {} seeds".format(*args.shard, args.seeds))
    args.set = dict(args.set)
    args.data_dir = args.data_dir.expanduser().resolve()
    args.threads = max(1, torch.get_num_threads() // args.jobs)
    args.commit = commit()
    if args.precision == "auto":
        args.precision = "bfloat16" if mnist.has_bfloat16(args.device) else "float32"
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
    if name in OPTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} would not reach the runs: use {OPTIONS[name]}")
    try:
        compile(value, "--set", "eval")
    except SyntaxError:
        raise argparse.ArgumentTypeError(f"{text!r} gives {name} a value that Python cannot read") from None
    return name, value


def join(args):
    """Return one benchmark of those in `args.join`.

    Raises UserError if a seed is there twice, or is missing without --partial, or if the settings differ in more than
    the machine.
    """
    parts = [load_results(path) for path in args.join]
    runs = [run for part in parts for run in part["runs"]]
    seeds = sorted(run["seed"] for run in runs)
    missing = sorted(set(range(args.seeds)) - set(seeds))
    if len(missing) + len(seeds) != args.seeds or (missing and not args.partial):
        raise mnist.UserError(f"the files hold seeds {seeds}, not each of 0 to {args.seeds - 1} once: see --seeds")
    settings = {}
    for name in parts[0]["settings"]:
        values = [part["settings"].get(name) for part in parts]
        if all(value == values[0] for value in values):
            settings[name] = values[0]
        elif name in MACHINE:  # hosted runners are not all of one kind
            settings[name] = " or ".join(sorted({str(value) for value in values}))
        else:
            raise mnist.UserError(f"the files differ in {name}: {', '.join(str(value) for value in values)}")
    return {"settings": settings, "parts": [part["command"] for part in parts], "missing": missing, "runs": runs}


def open_benchmark(args):
    """Return the benchmark that `args.out` holds, or a new one without runs.

    Raises UserError if the runs there were made with other settings.
    """
    settings = settings_of(args)
    if not args.out or not args.out.exists():
        return {"settings": settings, "runs": []}
    benchmark = load_results(args.out)
    for name, value in settings.items():
        if (old := benchmark["settings"].get(name)) != value:
            raise mnist.UserError(
                f"{args.out} holds runs with {name} = {old}, not {value}: name another file with --out"
            )
    return benchmark


def main(argv=()):
    """Run the benchmark that `argv` asks for, print its summary and return it; with --compare, print a comparison."""
    args = parse_args(argv)
    if args.compare:
        return print_comparison(args.compare)
    if args.out:
        mnist.write(args.out)  # raises OSError now if the results could not be written later
    command = {"command": command_of("seeds", argv)}
    if args.join:
        benchmark = command | join(args)
        save_results(benchmark, args.out)
    else:
        benchmark = open_benchmark(args) | command
        benchmark.pop("missing", None)
        index, parts = args.shard
        done = {run["seed"] for run in benchmark["runs"]}
        seeds = [seed for seed in range(index - 1, args.seeds, parts) if seed not in done]
        pool, saving = ThreadPoolExecutor(args.jobs), threading.Lock()

        def run_and_save(seed):
            run = train_pair(seed, args)
            if settings_of(args)["mnist.py"] != benchmark["settings"]["mnist.py"]:
                raise mnist.UserError("mnist.py was changed while the seeds ran: start again, with another --out")
            with saving:
                benchmark["runs"].append(run)
                save_results(benchmark, args.out)

        try:
            for _ in tqdm(pool.map(run_and_save, seeds), "Seeds", len(seeds), unit="run", disable=None):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
    print_summary(benchmark)
    if args.join and (low := benchmark["summary"]["seeds_at_or_below_99.40"]):
        raise mnist.UserError(f"{len(low)} of {len(benchmark['runs'])} seeds ended at or below {TARGET:.2f} %: {low}")
    return benchmark


if __name__ == "__main__":
    mnist.run(main)
