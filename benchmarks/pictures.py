"""Measure tools/predict.py on simulated pictures, made from MNIST's test digits, on data sets or on your own pictures.

Usage, in the folder of mnist.py:
    python -m benchmarks.pictures                   # a Markdown table: the accuracy on each kind of picture
    python -m benchmarks.pictures --images 10000 --out pictures.json
    python -m benchmarks.pictures FOLDER            # on the pictures in FOLDER
    python -m benchmarks.pictures --dataset USPS    # on another data set's test digits; torchvision downloads it

mistakes.png shows the mistakes beside what the network saw.

FOLDER holds labels.tsv, a table with the columns picture and label and perhaps kind, separated by tabs; or a folder of
pictures for each label: 0, 1, ..., 9. In the table, a picture without a digit has an empty label; it is read right if
no answer is sure.
"""

import argparse
import csv
import io
import itertools
import json
import math
from pathlib import Path

import mnist
import reader
from benchmarks import command_of, commit, machine, positive
from reader import sheet
from reader.picture import load
from tools import predict, weights

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn.datasets import load_digits

DATA_SETS = {  # how torchvision.datasets loads their test digits
    "EMNIST": {"train": False, "split": "digits"},
    "QMNIST": {"train": False},
    "SVHN": {"split": "test"},
    "USPS": {"train": False},
}
SHEET = Path("mistakes.png")
MOST = 100  # mistakes on it

# --- Kinds of pictures: each function turns an image of mode L into another ---------------------------------------


def ink(digit, _rng=None, scale=8):
    """Write a digit of MNIST in dark ink on light paper, `scale` times as large."""
    large = digit.resize((digit.width * scale, digit.height * scale), Image.Resampling.BICUBIC)
    return large.point(lambda value: 235 - value * 0.8)


def scaled(digit, rng):
    return ink(digit, scale=int(rng.integers(2, 41)))


def page(digit, rng):
    """Put the digit anywhere on a page 1.5 to 5 times as wide and as high."""
    small = ink(digit, scale=4)
    width, height = (round(side * rng.uniform(1.5, 5)) for side in small.size)
    paper = Image.new("L", (width, height), 235)
    paper.paste(small, (int(rng.integers(width - small.width)), int(rng.integers(height - small.height))))
    return paper


def shaded(image, rng):
    """Light the paper from one side, so that the other gets a third of the light."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    slope = (x * math.cos(angle) + y * math.sin(angle)) / (abs(math.cos(angle)) + abs(math.sin(angle)))
    return Image.fromarray((np.asarray(image) * (2 + slope) / 3).astype(np.uint8))


def noisy(image, rng):
    grain = rng.normal(0, 25, (image.height, image.width))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def blurred(image, _rng=None):
    return image.filter(ImageFilter.GaussianBlur(image.width / 28))  # one pixel of MNIST, if the digit fills the image


def jpeg(image, _rng=None, quality=10, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return Image.open(file)


def rotated(image, _rng=None):
    """Store the image on its side, with the EXIF tag that says so, as a phone does."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated clockwise by 90 degrees
    return jpeg(image.transpose(Image.Transpose.ROTATE_90), quality=90, exif=exif)


def thin(image, _rng=None):
    return image.filter(ImageFilter.MaxFilter(9))  # the paper grows by 4 pixels, half a pixel of MNIST


def thick(image, _rng=None):
    return image.filter(ImageFilter.MinFilter(17))  # the ink grows by 8 pixels, one pixel of MNIST


def framed(image, rng):
    """Draw a box around the digit."""
    inset, width = int(rng.integers(4, 16)), int(rng.integers(3, 8))
    box = (inset, inset, image.width - 1 - inset, image.height - 1 - inset)
    ImageDraw.Draw(image).rectangle(box, outline=31, width=width)
    return image


def ruled(image, rng, squared=False):
    """Draw the lines of ruled paper, as dark as the ink."""
    draw, width = ImageDraw.Draw(image), int(rng.integers(2, 6))
    gap = int(rng.integers(60, 101))
    for y in range(int(rng.integers(gap)), image.height, gap):
        draw.line((0, y, image.width, y), fill=31, width=width)
    for x in range(int(rng.integers(gap)), image.width if squared else 0, gap):
        draw.line((x, 0, x, image.height), fill=31, width=width)
    return image


def squared(image, rng):
    return ruled(image, rng, squared=True)


def cropped(image, _rng=None):
    return image.crop(ImageOps.invert(image).point(lambda value: 255 * (value > 90)).getbbox())


def transparent(digit, _rng=None):
    """Write the digit in white on a transparent background, as a canvas exports it."""
    large = digit.resize((224, 224), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", large.size, (255, 255, 255, 0))
    white.putalpha(large)
    return white


def on_a_table(paper, rng):
    """Photograph all of a sheet that lies a little askew on a dark wooden table."""
    sheet = paper.convert("LA").rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, expand=True)
    width, height = (round(side * rng.uniform(1.1, 1.5)) for side in sheet.size)
    grain = 80 + 10 * np.sin(np.linspace(0, rng.uniform(30, 120), height)) + rng.normal(0, 5, height)
    table = Image.fromarray(np.tile(grain.astype(np.uint8)[:, None], (1, width)))
    place = (int(rng.integers(width - sheet.width)), int(rng.integers(height - sheet.height)))
    table.paste(sheet, place, sheet.getchannel("A"))
    return table


KINDS = {
    "MNIST's own image": [],
    "dark on light, 28 x 28": [lambda digit, rng: ink(digit, scale=1)],
    "scaled 2 to 40 times": [scaled],
    "off-centre on a larger page": [page],
    "paper lit from one side": [ink, shaded],
    "noise": [ink, noisy],
    "blur": [ink, blurred],
    "JPEG at quality 10": [ink, jpeg],
    "rotated by 90°, as EXIF says": [ink, rotated],
    "thin strokes": [ink, thin],
    "thick strokes": [ink, thick],
    "off-centre, lit from one side, noise, JPEG, rotated": [page, shaded, noisy, jpeg, rotated],
    "cropped to the ink": [ink, cropped],
    "in a drawn box": [ink, framed],
    "on ruled paper": [ink, ruled],
    "on squared paper": [ink, squared],
    "white on a transparent background": [transparent],
    "a sheet on a table, photographed": [page, on_a_table, shaded, jpeg, rotated],
    "two digits side by side": [ink],
}

# --- Numbers, forms and lines: each function takes an endless iterator of (digit, label), and draws a picture ------


def height_of(digit, height):
    """Crop an MNIST digit to its ink; MNIST's box of 20 x 20 pixels becomes `height` pixels high."""
    digit = digit.crop(digit.getbbox())
    return digit.resize([max(2, round(side * height / 20)) for side in digit.size], Image.Resampling.BICUBIC)


def write(paper, digit, x, y):
    paper.paste(47, (round(x), round(y)), digit)


def askew(paper, rng):
    return paper.rotate(rng.uniform(-3, 3), Image.Resampling.BICUBIC, fillcolor=235)


def write_in(paper, digit, box, rng):
    """Write a digit anywhere in a box (left, top, width, height)."""
    left, top, width, height = box
    x = left + rng.uniform(0.1, 0.9) * (width - digit.width)
    write(paper, digit, x, top + rng.uniform(0.1, 0.9) * (height - digit.height))


def one_box(digits, rng):
    """Draw a digit in a box of any shape, anywhere in a picture of any shape."""
    digit, label = next(digits)
    width, height = rng.uniform(120, 320, 2)
    paper = Image.new("L", (round(width * rng.uniform(1.05, 2.5)), round(height * rng.uniform(1.05, 2.5))), 235)
    left, top = rng.uniform(0, paper.width - width), rng.uniform(0, paper.height - height)
    outline = {"outline": int(rng.integers(20, 150)), "width": int(rng.integers(2, 11))}
    ImageDraw.Draw(paper).rectangle((left, top, left + width, top + height), **outline)
    digit = height_of(digit, rng.uniform(0.4, 0.75) * min(width, height))
    write_in(paper, digit, (left + 10, top + 10, width - 20, height - 20), rng)
    return askew(paper, rng), label


def row_of_boxes(digits, rng):
    """Draw three to eight boxes of a form, of which a tenth are empty, with margins of 5 to 100 % of a box."""
    count, width = int(rng.integers(3, 9)), rng.uniform(80, 140)
    height, margin = width * rng.uniform(0.9, 1.5), width * rng.uniform(0.05, 1)
    paper = Image.new("L", (round(count * width + 2 * margin), round(height + 2 * margin)), 235)
    draw, number = ImageDraw.Draw(paper), ""
    outline = {"outline": int(rng.integers(20, 150)), "width": int(rng.integers(2, 8))}
    for i in range(count):
        left = margin + i * width
        draw.rectangle((left, margin, left + width, margin + height), **outline)
        if i == 0 or rng.random() < 0.9:
            digit, label = next(digits)
            digit = height_of(digit, rng.uniform(0.45, 0.75) * min(width, height))
            write_in(paper, digit, (left + 7, margin + 7, width - 14, height - 14), rng)
            number += label
    return askew(paper, rng), number


def line_of(digits, rng, gap):
    """Write a number of two to five digits, 80 pixels high and `gap` apart, as MNIST does: white on black."""
    line, number, x = Image.new("L", (600, 100)), "", 0
    for digit, label in itertools.islice(digits, int(rng.integers(2, 6))):
        digit = height_of(digit, 80 * rng.uniform(0.9, 1.1))
        line.paste(255, (int(x), (100 - digit.height) // 2), digit)
        x += digit.width + gap
        number += label
    return line.crop(line.getbbox()), number


def touching(digits, rng):
    """Write a number whose digits touch or overlap."""
    line, number = line_of(digits, rng, gap=rng.uniform(-11, 0))
    paper = Image.new("L", (line.width + 60, line.height + 60), 235)
    write(paper, line, 30, 30)
    return paper, number


def close_lines(digits, rng):
    """Write two or three lines, 4 to 40 % of a digit's height apart."""
    lines, labels = zip(*[line_of(digits, rng, gap=rng.uniform(8, 32)) for _ in range(rng.integers(2, 4))], strict=True)
    gap = 80 * rng.uniform(0.04, 0.4)
    width, height = max(line.width for line in lines), sum(line.height + gap for line in lines)
    paper, y = Image.new("L", (width + 60, round(height) + 60), 235), 30
    for line in lines:
        write(paper, line, 30 + rng.uniform(0, 0.3) * (width - line.width), y)
        y += line.height + gap
    return paper, " ".join(labels)


SCENES = {
    "in a box of any shape, anywhere": one_box,
    "a form's row of boxes": row_of_boxes,
    "close lines": close_lines,
    "digits that touch": touching,
}

# What is no digit: the strokes of each, as the columns and rows of points on a grid of 5 x 5.
LETTERS = [
    "04 20 44, 12 32",  # A
    "40 00 04 44, 02 32",  # E
    "40 00 04, 02 32",  # F
    "00 04, 40 44, 02 42",  # H
    "00 04, 40 02 44",  # K
    "04 00 22 40 44",  # M
    "04 00 44 40",  # N
    "04 00 30 41 32 02, 22 44",  # R
    "00 40, 20 24",  # T
    "00 14 22 34 40",  # W
    "00 44, 04 40",  # X
    "00 22 40, 22 24",  # Y
]
SHAPES = [
    "04 20 44 04",  # triangle
    "04 02 20 42 44 04",  # house
    "34 20 14 41 01 34",  # star
    "02 42, 31 42 33",  # arrow
    "02 14 40",  # tick
    "20 24, 02 42",  # plus
    "01 41, 03 43",  # equals
    "10 14, 30 34, 01 41, 03 43",  # hash
    "00 40 04 44 00",  # hourglass
    "03 11 23 31 43",  # zigzag
    "00 40 44 04 00, 00 44, 04 40",  # envelope
    "00 40 44 04 00, 02 42, 20 24",  # window
]


def drawn(strokes, rng):
    """Draw strokes by hand, each a list of points (column, row): dark on light, 224 x 224 pixels."""
    paper = Image.new("L", (224, 224), 235)
    width = int(rng.integers(8, 25))
    for points in strokes:
        points = np.array(points) + rng.normal(0, 6, (len(points), 2))
        ImageDraw.Draw(paper).line(points.ravel().tolist(), fill=47, width=width, joint="curve")
    return paper


def on_grid(strokes):
    """Return the strokes of LETTERS or SHAPES in pixels."""
    return [[(40 * int(x) + 32, 40 * int(y) + 32) for x, y in stroke.split()] for stroke in strokes.split(", ")]


def flagged_one(rng):
    """Draw a 1 whose flag is 0.3 to 0.6 of its height."""
    slant, length, slope = rng.uniform((-10, 48, 0.6), (50, 96, 1.3))
    across = length / math.hypot(1, slope)
    top = 112 + slant
    return drawn([[(top - across, 32 + slope * across), (top, 32), (112 - slant, 192)]], rng)


def seven(rng):
    """Draw a 7 whose bar is 0.45 to 0.7 of its height."""
    slant, length, slope = rng.uniform((10, 72, -0.15), (50, 112, 0.15))
    top = 122 + slant
    return drawn([[(top - length, 32 + slope * length), (top, 32), (122 - slant, 192)]], rng)


# --- Measurement ---------------------------------------------------------------------------------------------------


def made_up(count):
    """Yield kinds of pictures, made from `count` test digits: a name, the pictures, and their labels as strings."""
    _, (images, labels) = mnist.load_mnist(mnist.DATA_DIR)
    rng = np.random.default_rng(0)
    sample = rng.permutation(len(images))[:count]
    images, labels = images[sample].numpy(), labels[sample].numpy().astype(str)
    for kind, transforms in KINDS.items():
        digits, answers = images, labels
        if kind.startswith("two"):
            digits = np.concatenate([images, np.roll(images, 1, axis=0)], axis=2)
            answers = np.char.add(labels, np.roll(labels, 1))
        pictures = [Image.fromarray(digit) for digit in digits]
        for transform in transforms:
            pictures = [transform(picture, rng) for picture in pictures]
        yield kind, pictures, answers.tolist()
    uci = load_digits()
    small = [Image.fromarray((digit * (255 / 16)).astype(np.uint8)) for digit in uci.images[:count]]
    large = [picture.resize((64, 64), Image.Resampling.BICUBIC) for picture in small]
    answers = uci.target[:count].astype(str).tolist()
    yield "UCI's digits, 8 x 8", small, answers
    yield "UCI's digits, enlarged to 64 x 64", large, answers
    for kind, table in (("no digit: letters", LETTERS), ("no digit: shapes", SHAPES)):
        yield kind, [drawn(on_grid(table[i % len(table)]), rng) for i in range(count)], [""] * count
    digits = ((Image.fromarray(images[i]), labels[i]) for i in itertools.cycle(range(len(images))))
    for kind, scene in SCENES.items():
        yield kind, *zip(*[scene(digits, rng) for _ in range(count)], strict=True)
    yield "1s with a flag, drawn", [flagged_one(rng) for _ in range(count)], ["1"] * count
    yield "7s, drawn", [seven(rng) for _ in range(count)], ["7"] * count


def labelled(folder):
    """Yield the kinds of pictures in a folder as made_up() does, with the paths of the pictures.

    Raises UserError if there are none.
    """
    table, kinds = folder / "labels.tsv", {}
    if table.exists():
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if not row.get("picture") or row.get("label") is None:
                    raise mnist.UserError(
                        f"{table}: a row has no picture or no label: the first line names the columns"
                    )
                kinds.setdefault(row.get("kind") or "all", []).append((folder / row["picture"], row["label"]))
    else:
        pictures = sorted(path for path in folder.glob("[0-9]/[!.]*") if path.is_file())
        kinds["all"] = [(path, path.parent.name) for path in pictures]
    if not any(kinds.values()):
        raise mnist.UserError(f"{folder}: it holds no row in labels.tsv, and no picture in folders named 0 to 9")
    for kind, pairs in kinds.items():
        yield kind, *zip(*pairs, strict=True)


def load_dataset(name):
    """Yield the test digits of one of DATA_SETS as made_up() does.

    Raises UserError if they are not in the data folder and cannot be downloaded.
    """
    try:
        digits = getattr(torchvision.datasets, name)(mnist.DATA_DIR, download=True, **DATA_SETS[name])
    except (OSError, RuntimeError) as error:
        raise mnist.UserError(f"{name} is not in {mnist.DATA_DIR} and cannot be downloaded: {error}") from error
    pictures, labels = zip(*digits, strict=True)
    if name == "EMNIST":  # it has rows for columns
        pictures = [picture.transpose(Image.Transpose.TRANSPOSE) for picture in pictures]
    yield name, pictures, [str(int(label)) for label in labels]


def by_hand(image):
    """Bring a picture to MNIST's form, uint8 (28, 28), in ten careful lines: those of tools/README.md."""
    grey = ImageOps.autocontrast(ImageOps.exif_transpose(image).convert("L"))
    pixels = np.asarray(grey)
    if np.median([*pixels[0], *pixels[-1], *pixels[:, 0], *pixels[:, -1]]) > 127:  # the border is light
        grey = ImageOps.invert(grey)
    digit = grey.crop(grey.point(lambda value: 255 * (value > 127)).getbbox())
    digit = digit.resize([max(1, round(20 * side / max(digit.size))) for side in digit.size])
    ink = np.asarray(digit) + 1e-9
    y, x = (np.average(places, weights=ink) for places in np.indices(ink.shape))  # the centre of mass
    form = Image.new("L", (28, 28))
    form.paste(digit, (round(14 - x), round(14 - y)))
    return np.asarray(form)


def measure(model, pictures, labels, mistakes):
    """Read PIL images, or files of pictures, and compare the answers with the labels.

    Returns shares of the pictures in %; the one that is right if prepared by_hand() is None where a label is not one
    digit. Adds sheet.to_row() of each mistake to the list `mistakes`, or None if it holds MOST.
    """
    right, sure, ten_lines = [], [], []
    one_digit_each = all(len(label) == 1 for label in labels)
    for picture, label in zip(pictures, labels, strict=True):
        image, lines, result = Image.new("L", (28, 28)), [], None
        try:
            image = load(picture)[0] if isinstance(picture, Path) else picture
            lines, certain = reader.read(model, image)
            result = predict.as_result("", lines, certain, 1)
            caption = predict.as_text(result)
        except mnist.UserError as error:
            caption = f": {error}"
        sure.append(result is not None and result["sure"])
        answer = result and result["number"].replace(" ", "")
        right.append(answer == label.replace(" ", "") if label else not sure[-1])
        if one_digit_each:
            form = torch.tensor(by_hand(image)).unsqueeze(0)
            ten_lines.append(str(mnist.classify(model, form).argmax().item()) == label)
        if not right[-1]:
            name = picture.name if isinstance(picture, Path) else "it"
            caption = f"{name} is {label or 'no digit'}{caption}"
            mistakes.append(sheet.to_row(image, lines, caption) if len(mistakes) < MOST else None)
    right, sure = np.array(right), np.array(sure)
    columns = {"right": right, "not sure": ~sure, "wrong, but sure": sure & ~right, "ten lines": ten_lines}
    shares = {name: 100 * np.mean(values).item() if len(values) else None for name, values in columns.items()}
    return {"n": len(labels)} | shares


def main(argv=()):
    """Print the table. Returns, by the name of each kind, what it shows in %."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description="Measure predict.py on pictures of many kinds."
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("folder", nargs="?", type=Path, help="of labelled pictures (default: pictures made from MNIST)")
    one.add_argument("--dataset", choices=DATA_SETS, help="of torchvision.datasets: its test digits")
    parser.add_argument("--images", type=positive, default=1000, help="test digits to use (default: %(default)s)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    if args.out:
        mnist.write(args.out)  # raises OSError now if the figures could not be written later
    origin = {"command": command_of("pictures", argv), "commit": commit(), **machine()}
    model, _ = weights.load(path := weights.find(args.model))
    print(f"With {path}, in %:\n")
    print("| picture | n | right | not sure | wrong, but sure | ten lines |\n| --- |" + " --- |" * 5)
    results, mistakes = {}, []

    def report(kind):
        n, *shares = results[kind].values()
        print(f"| {kind} | {n} | {' | '.join('' if share is None else f'{share:.1f}' for share in shares)} |")

    if args.folder:
        source = labelled(args.folder)
    else:
        source = load_dataset(args.dataset) if args.dataset else made_up(args.images)
    for kind, pictures, labels in source:
        results[kind] = measure(model, pictures, labels, mistakes)
        report(kind)
    if args.folder and len(results) > 1:
        counts = [shares["n"] for shares in results.values()]
        columns = {name: [shares[name] for shares in results.values()] for name in results[kind]}
        results["total"] = {
            name: None if None in column else np.average(column, weights=counts).item()
            for name, column in columns.items()
        } | {"n": sum(counts)}
        report("total")
    if mistakes:
        sheet.write(mistakes[:MOST], SHEET)
        print(f"\n{min(len(mistakes), MOST)} of {len(mistakes)} mistakes are shown in {SHEET}.")
    if args.out:
        mnist.write(args.out, (json.dumps({**origin, "kinds": results}, indent=1) + "\n").encode())
    return results


if __name__ == "__main__":
    mnist.run(main)
