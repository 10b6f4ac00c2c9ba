"""Draw what the trained network learned: the curve, the confusions, the calibration, and every mistake.

Usage:
    python tools/report.py                               # mnist.pt, else pretrained.pt; the figure goes to report.png
    python tools/report.py --out report.pdf              # or .svg
    python tools/report.py --augmentation --out row.png  # what training shows: a row of digits, augmented, and junk
"""

import argparse
import io
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of mnist.py and of tools/

import mnist
from tools import weights

import matplotlib
import matplotlib.pyplot as plt
import torch

matplotlib.use("Agg")  # needs no display
plt.rcParams.update({"font.size": 11, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left"})
FORMATS = (".png", ".pdf", ".svg")
MAX_MISTAKES, COLUMNS = 300, 15  # with more columns the captions would touch
BINS = 15  # of the reliability diagram, as is usual
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito's palette, safe for the colour-blind


def reliability(probabilities, labels):
    """Return (confidence, accuracy, count, error) of predictions (N, 10).

    The first three are (BINS,): the means over the predictions whose confidence lies in each bin, NaN in an empty one,
    and their number. The error is the expected calibration error (Guo et al., arXiv:1706.04599), from 0 to 1.
    """
    confidence, predicted = probabilities.max(dim=1)
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    count = torch.bincount(bins, minlength=BINS)
    confidence = torch.bincount(bins, confidence, BINS) / count
    accuracy = torch.bincount(bins, (predicted == labels).float(), BINS) / count
    error = ((confidence - accuracy).abs() * count).nansum() / len(labels)
    return confidence, accuracy, count, error.item()


def draw_curve(axes, history, name):
    """Draw the losses and the accuracies of each epoch on two axes, one above the other."""
    epochs = [epoch["epoch"] for epoch in history]
    for ax, kind in zip(axes, ("loss", "accuracy"), strict=True):
        for part, colour, marker, label in (("train", BLUE, "o", "training (augmented)"), ("test", ORANGE, "s", name)):
            values = [epoch[f"{part}_{kind}"] for epoch in history]
            ax.plot(epochs, values, color=colour, marker=marker, label=f"{label}, {values[-1]:.4g} at the end")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        ax.grid(alpha=0.3)
    axes[0].set(title="Training", ylabel="loss")
    axes[0].set_ylim(bottom=0)
    axes[1].set(xlabel="epoch", ylabel="accuracy in %")
    axes[1].axhline(99.4, color=GREEN, linestyle="--", label="99.4 %")
    for ax in axes:
        ax.legend(fontsize=9)


def draw_confusion(ax, counts):
    """Draw the confusion matrix (10, 10), true digits down; only mistakes are coloured, so that they stand out."""
    mistakes = counts.float().fill_diagonal_(0)
    top = max(2, mistakes.max().item())
    colours = plt.get_cmap("cividis_r").with_extremes(under="white")
    ax.imshow(mistakes.numpy(), cmap=colours, vmin=0.5, vmax=top)
    for row, column in counts.nonzero().tolist():
        right = row == column
        colour = "white" if mistakes[row, column] > 0.5 * top else "black"
        weight = "bold" if right else "normal"
        ax.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, weight=weight, size=10)
    ax.set_xticks(torch.arange(9).numpy() + 0.5, minor=True)
    ax.set_yticks(torch.arange(9).numpy() + 0.5, minor=True)
    ax.grid(which="minor", color="lightgrey", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    ax.set(title="Confusions", xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10))


def draw_accuracy(ax, counts):
    """Draw the accuracy on each digit, from the confusion matrix (10, 10); an absent digit has none."""
    accuracy = 100 * counts.diagonal() / counts.sum(dim=1)
    axis_start = math.floor(min(99, accuracy.nan_to_num(99).min().item() - 0.1))
    ax.barh(range(10), (accuracy - axis_start).nan_to_num(0).numpy(), left=axis_start, color=BLUE)
    for digit, value in enumerate(accuracy.tolist()):
        if not math.isnan(value):
            ax.text(value, digit, f" {value:.2f}", va="center", fontsize=10)
    ax.set(title="Accuracy per digit", xlabel=f"% (the axis starts at {axis_start})", yticks=range(10))
    ax.set_xlim(axis_start, 100 + 0.25 * (100 - axis_start))
    ax.set_xticks([axis_start, (axis_start + 100) / 2, 100])
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)


def draw_reliability(ax, probabilities, labels):
    """Draw how often predictions (N, 10) of each confidence are right, with their numbers."""
    confidence, accuracy, count, error = reliability(probabilities, labels)
    ax.plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1)
    ax.plot(100 * confidence[count > 0], 100 * accuracy[count > 0], color=BLUE, marker="o")
    for x, y, n in zip(confidence.tolist(), accuracy.tolist(), count.tolist(), strict=True):
        if n:
            ax.annotate(
                f"{n:,}", (100 * x, 100 * y), (0, -6), textcoords="offset points", ha="center", va="top", size=8
            )
    ax.set(title=f"Calibration error {100 * error:.2f} %", xlabel="probability given, %", ylabel="right, %")
    ax.set_ylim(bottom=-15)  # room for the numbers
    ax.grid(alpha=0.3)


def draw_mistakes(figure, images, captions):
    """Draw images (N, 28, 28), each with its caption below."""
    axes = figure.subplots(max(1, math.ceil(len(images) / COLUMNS)), COLUMNS, squeeze=False).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, image, caption in zip(axes, images, captions, strict=False):
        ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
        ax.set_title(caption, fontsize=9, fontweight="normal", loc="center", y=-0.04, va="top", pad=0)


def draw_report(model, checkpoint, images, labels, name):
    """Return the figure: curve, confusion matrix, accuracy per digit and reliability above, the mistakes below."""
    probabilities = mnist.classify(model, images).softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    counts = torch.bincount(10 * labels + predicted, minlength=100).view(10, 10)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)]
    shown = wrong[:MAX_MISTAKES]

    height = 0.5 + 1.32 * math.ceil(len(shown) / COLUMNS)
    figure = plt.figure(figsize=(16, 6.9 + height), layout="constrained", dpi=120)
    accuracy = 100 * (1 - len(wrong) / len(labels))
    figure.suptitle(
        f"{len(labels) - len(wrong):,} of {len(labels):,} test digits right ({accuracy:.2f} %) "
        f"with {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        fontsize=18,
        fontweight="bold",
    )
    above, below = figure.subfigures(2, height_ratios=[6.4, height])
    curve, confusion, digits = above.subfigures(1, 3, width_ratios=[5, 6, 4])
    if checkpoint.get("history"):  # not if the file holds the weights alone
        draw_curve(curve.subplots(2, sharex=True), checkpoint["history"], name)
    draw_confusion(confusion.subplots(), counts)
    above_right, below_right = digits.subplots(2)
    draw_accuracy(above_right, counts)
    draw_reliability(below_right, probabilities, labels)

    title = {0: "No mistakes", 1: "The one mistake"}.get(len(wrong), f"All {len(wrong)} mistakes")
    if len(wrong) > MAX_MISTAKES:
        title = f"{MAX_MISTAKES} of {len(wrong):,} mistakes ({len(wrong) - MAX_MISTAKES:,} more are left out)"
    if len(wrong):
        title += ": true → predicted (probability), the most confident first"
    below.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    captions = [f"{labels[i]} → {predicted[i]} ({confidence[i]:.0%})" for i in shown]
    draw_mistakes(below, images[shown], captions)
    return figure


def draw_augmentation(images, labels):
    """Return a figure of the first image of each digit, of three random augmentations of each, and of junk."""
    row = torch.stack([images[labels == digit][0] for digit in labels.unique()])
    torch.manual_seed(0)
    augmented = [mnist.augment(row) for _ in range(3)]
    junk = mnist.make_junk(images, labels)
    some = junk[torch.linspace(0, len(junk) - 1, len(row)).long()]
    figure = plt.figure(figsize=(10, 5), layout="constrained", dpi=100)
    axes = figure.subplots(5, len(row), squeeze=False)
    for ax, image in zip(axes.flatten(), torch.cat([row, *augmented, some]), strict=True):
        ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("as it is")
    axes[2, 0].set_ylabel("augmented")
    axes[4, 0].set_ylabel("no digit")
    return figure


def tested_on(checkpoint, path):
    """Return the name of the images that the network in a checkpoint was tested on.

    Raises UserError if its history or its settings are not as mnist.py saves them.
    """
    figures = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    try:
        math.fsum(epoch[figure] for epoch in checkpoint.get("history", []) for figure in figures)
        return "validation" if checkpoint.get("settings", {}).get("validate") else "test"
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise mnist.UserError(f"the history or the settings in {path} are not as mnist.py saves them") from error


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="report.py", description="Draw what the trained network learned.")
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data, as for mnist.py")
    add("--out", type=Path, default="report.png", metavar="PATH", help=".png, .pdf or .svg (default: %(default)s)")
    add("--augmentation", action="store_true", help="draw a row of digits, augmented, and junk instead")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in FORMATS:
        parser.error(f"argument --out: {args.out} does not end in {' or '.join(FORMATS)}")
    return args


def main(argv=()):
    """Draw the figure that `argv` asks for and write it; return its path."""
    args = parse_args(argv)
    mnist.write(args.out)  # raises OSError now if it could not be written later
    if args.augmentation:
        figure = draw_augmentation(*mnist.load_mnist(args.data_dir)[0])
    else:
        model, checkpoint = weights.load(path := weights.find(args.model))
        print(f"Using the weights in {path}")
        name = tested_on(checkpoint, path)
        figure = draw_report(model, checkpoint, *mnist.load_mnist(args.data_dir)[1], name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=args.out.suffix[1:].lower(), bbox_inches="tight", pad_inches=0.2)
    mnist.write(args.out, buffer.getvalue())
    plt.close(figure)
    print(f"Wrote {args.out}")
    return args.out


if __name__ == "__main__":
    mnist.run(main)
