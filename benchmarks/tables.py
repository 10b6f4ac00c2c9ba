"""Make the READMEs' tables, and the histogram of the accuracies, from the files in results/.

Usage, in the folder of mnist.py:
    python -m benchmarks.tables
"""

import argparse
import io
import json
import re
import shlex
import statistics

import mnist
from benchmarks import ROOT, original, seeds, steps
from tools import report

RESULTS = ROOT / "benchmarks" / "results"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
HISTOGRAM = ROOT / "assets" / "accuracy.png"
RUNS = {"default.json": "python mnist.py", "epochs20.json": "python mnist.py --epochs 20"}
TIMES = ("speed.json", "avx2.json")
ARXIV = "https://arxiv.org/abs"
PARTS = {  # the change in a file of results/ablation/, and the part of the recipe that it takes away
    "no-decay": ("no weight decay", f"[weight decay]({ARXIV}/1711.05101)"),
    "uniform": (
        "all images alike in every epoch",
        f"hard images more often: [selective backpropagation]({ARXIV}/1910.00762)",
    ),
    "no-augmentation": ("no augmentation", "augmentation: rotation, shifts, scales, shear, bending, other strokes"),
    "affine": ("neither bending nor other strokes", "of which bending, and fainter or thicker strokes"),
    "sgd": ("SGD instead of Muon", "[Muon](https://kellerjordan.github.io/posts/muon/) instead of SGD"),
    "no-junk": ("no junk", f"junk, 8 images of 128 that show no digit: [outlier exposure]({ARXIV}/1812.04606)"),
    "relu-on-logits": ("a ReLU on the logits, as in the original", "no ReLU on the logits, where the original has one"),
}


def load(name):
    """Return (benchmark, summary) of a file in results/."""
    benchmark = seeds.load_results(RESULTS / name)
    return benchmark, seeds.summarize(benchmark)


def table(*rows):
    """Return rows of cells as a Markdown table, the first as its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""])


def link(name):
    return f"[{name.rpartition('/')[2]}](results/{name})"


def spread(summary):
    return f"{summary['accuracy_mean']:.3f} % ± {summary['accuracy_std']:.3f}"


def accuracy():
    """Return the table of the runs' accuracies."""
    head = ("run", "n", "accuracy, mean ± std", "mean - 4 std", "min", "at or below 99.40 %")
    rows = [(*head, "loss", "calibration error", "results")]
    for name, run in RUNS.items():
        _, summary = load(name)
        margin = summary["accuracy_mean"] - 4 * summary["accuracy_std"]
        low, error = len(summary["seeds_at_or_below_99.40"]), summary["calibration_error"]
        figures = (f"{margin:.2f} %", f"{summary['accuracy_min']:.2f} %", str(low))
        figures += (f"{summary['loss']:.4f}", f"{error:.2f} %")
        rows.append((f"`{run}`", str(summary["n"]), spread(summary), *figures, link(name)))
    return table(*rows)


def machine_of(settings):
    """Return the processor, the precision and the instructions that a benchmark was run with."""
    capability = f", {settings['capability']}" if settings["precision"] == "float32" else ""
    return f"{settings['cpu'].replace(' (', ', ').rstrip(')')}: {settings['precision']}{capability}"


def seconds_of(benchmark):
    seconds = [run["process_seconds"] for run in benchmark["runs"]]
    return f"{statistics.median(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f})"


def times():
    """Return the table of the times, with the original recipe's."""
    head = ("two threads of", "n", "time, median (range)", f"original, {original.EPOCHS} epochs", "ratio (range)")
    rows = [(*head, "accuracy, mean ± std", "results")]
    for name in TIMES:
        benchmark, summary = load(name)
        low, high = summary["times_faster_range"]
        ratio = f"{summary['times_faster']:.1f} ({low:.1f} to {high:.1f})"
        figures = (seconds_of(benchmark), f"{summary['baseline_seconds']:.0f} s", ratio, spread(summary))
        rows.append((machine_of(benchmark["settings"]), str(summary["n"]), *figures, link(name)))
    return table(*rows)


def seconds():
    """Return the times alone."""
    rows = [("whole process, two threads of", "n", "median (range)")]
    for name in TIMES:
        benchmark, summary = load(name)
        rows.append((machine_of(benchmark["settings"]), str(summary["n"]), seconds_of(benchmark)))
    return table(*rows)


def change_of(name):
    """Return the change of accuracy in points, with its standard error, that the file of a part tells."""
    change = seeds.compare(*(load(f"ablation/{run}.json")[0] for run in ("as-is", name)))
    return change["difference"], change["error"]


def ablation():
    """Return the table of what each part of the recipe is worth."""
    rows = [("change", "options", "n", "accuracy, mean ± std", "min", "difference", "results")]
    for name, (change, _) in {"as-is": ("none", ""), **PARTS}.items():
        benchmark, summary = load(f"ablation/{name}.json")
        changes = [f"{key}={value}" for key, value in benchmark["settings"]["changes"].items()]
        options = " ".join(f"--set {shlex.quote(change)}" for change in changes)
        difference = "{:+.3f} ± {:.3f}".format(*change_of(name)).replace("-", "\u2212") if name in PARTS else ""
        figures = (str(summary["n"]), spread(summary), f"{summary['accuracy_min']:.2f} %", difference)
        rows.append((change, f"`{options}`" if options else "", *figures, link(f"ablation/{name}.json")))
    return table(*rows)


def worth():
    """Return the table of the parts alone, with the points of accuracy that each is worth."""
    rows = [("part", "points ± standard error")]
    for name, (_, part) in PARTS.items():
        difference, error = change_of(name)
        rows.append((part, f"{-difference:.3f} ± {error:.3f}".replace("-", "\u2212")))
    return table(*rows)


def tricks():
    """Return the table of what each trick for speed is worth."""
    measured = json.loads((RESULTS / "steps.json").read_text())["tricks"]
    return table(steps.HEAD, *(steps.cells(trick, pairs) for trick, pairs in measured.items()))


def pictures():
    """Return the table of the kinds of simulated pictures."""
    rows = [("simulated picture", "right", "not sure", "wrong, but sure", "right in ten lines")]
    for kind, figures in json.loads((RESULTS / "pictures.json").read_text())["kinds"].items():
        _, *shares = figures.values()
        rows.append((kind, *("" if share is None else f"{share:.1f} %" for share in shares)))
    return table(*rows)


def filled(text):
    """Return the text of a README with its tables, between <!-- their name --> and <!-- end -->, made anew."""
    makers = {maker.__name__: maker for maker in (accuracy, times, seconds, tricks, ablation, worth, pictures)}
    between = r"(<!-- (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(between, lambda part: part[1] + makers[part[2]]() + part[3], text, flags=re.DOTALL)


def draw_histogram():
    """Return a figure of how often each accuracy came in the forty runs, and the line that none may touch."""
    accuracies = [run["accuracy"] for run in load("default.json")[0]["runs"]]
    figure, ax = report.plt.subplots(figsize=(9, 2.2), layout="constrained", dpi=100)
    values = sorted(set(accuracies))
    ax.bar(values, [accuracies.count(value) for value in values], width=0.008, color=report.BLUE)
    ax.axvline(seeds.TARGET, color=report.ORANGE, linestyle="--")
    ax.text(seeds.TARGET + 0.002, ax.get_ylim()[1], "99.4 %", color=report.ORANGE, va="top")
    ax.set(xlabel="test accuracy in %, after the last epoch", ylabel=f"of {len(accuracies)} seeds")
    ax.set_xlim(seeds.TARGET - 0.02, max(values) + 0.02)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv=()):
    """Write the tables into the READMEs, and the histogram to assets/."""
    description = "Make the READMEs' tables, and the histogram, from the files in results/."
    argparse.ArgumentParser(prog="python -m benchmarks.tables", description=description).parse_args(argv)
    for path in READMES:
        mnist.write(path, filled(path.read_text(encoding="utf-8")).encode())
    draw_histogram().savefig(buffer := io.BytesIO())
    mnist.write(HISTOGRAM, buffer.getvalue())


if __name__ == "__main__":
    mnist.run(main)
