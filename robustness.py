"""Measure predict.py on pictures that nobody prepared for it, made from MNIST's test digits.

Usage:
    python robustness.py                                      # a Markdown table: the accuracy on each kind of picture
    python robustness.py --images 10000 --out results.json
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

import mnist
import predict

# --- What people have: each function turns an image of mode L into another ----------------------------------------


def ink(digit, _rng=None, times=8):
    """Write a digit of MNIST dark on light paper, `times` as large."""
    large = digit.resize((28 * times, 28 * times), Image.Resampling.BICUBIC)
    return large.point(lambda value: 235 - value * 0.8)


def scaled(digit, rng):
    return ink(digit, times=int(rng.integers(2, 41)))


def page(digit, rng):
    """Put the digit anywhere on a page 1.5 to 5 times as wide and as high."""
    small = ink(digit, times=4)
    width, height = (round(side * rng.uniform(1.5, 5)) for side in small.size)
    paper = Image.new("L", (width, height), 235)
    paper.paste(small, (int(rng.integers(width - small.width)), int(rng.integers(height - small.height))))
    return paper


def shaded(image, rng):
    """Light the paper from one side: the other gets a third of the light."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    slope = (x * math.cos(angle) + y * math.sin(angle)) / (abs(math.cos(angle)) + abs(math.sin(angle)))
    return Image.fromarray((np.asarray(image) * (2 + slope) / 3).astype(np.uint8))


def noisy(image, rng):
    grain = rng.normal(0, 25, (image.height, image.width))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def blurred(image, _rng=None):
    return image.filter(ImageFilter.GaussianBlur(image.width / 28))  # by one pixel of MNIST, where it fills the image


def jpeg(image, _rng=None, quality=10, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return Image.open(file)


def turned(image, _rng=None):
    """Store the image lying on its side, with the EXIF tag that says so, as a telephone does."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    return jpeg(image.transpose(Image.Transpose.ROTATE_90), quality=90, exif=exif)


def thin(image, _rng=None):
    return image.filter(ImageFilter.MaxFilter(9))  # light paper grows by 4 pixels, half of one of MNIST, on each side


def thick(image, _rng=None):
    return image.filter(ImageFilter.MinFilter(17))  # dark ink grows by 8, one of MNIST, on each side


PICTURES = {
    "MNIST's own image": [],
    "dark on light, 28 x 28": [lambda digit, rng: ink(digit, times=1)],
    "scaled 2 to 40 times": [scaled],
    "off-centre on a larger page": [page],
    "paper lit from one side": [ink, shaded],
    "noise": [ink, noisy],
    "blur": [ink, blurred],
    "JPEG at quality 10": [ink, jpeg],
    "turned by 90°, said so in EXIF": [ink, turned],
    "thin strokes": [ink, thin],
    "thick strokes": [ink, thick],
    "off-centre, lit from one side, noise, JPEG, turned": [page, shaded, noisy, jpeg, turned],
}


# --- Measurement ---------------------------------------------------------------------------------------------------


def plain(image):
    """Return what the usual two lines make of a picture: inverted and resized, uint8 (28, 28)."""
    return torch.from_numpy(np.array(ImageOps.invert(image.convert("L")).resize((28, 28))))


def prepared(image):
    """Return what predict.py makes of a picture; black where it finds nothing, which counts as a mistake."""
    try:
        return predict.prepare(image)
    except mnist.UserError:
        return torch.zeros(28, 28, dtype=torch.uint8)


def main(argv=None):
    """Print the table. Returns a dictionary for each kind: "predict" and "plain" accuracies in % by its name."""
    count = mnist.number(int, 1, mnist.HELD_OUT + 1, f"a whole number from 1 to {mnist.HELD_OUT}")
    parser = argparse.ArgumentParser(prog="robustness.py", description="Measure predict.py on pictures of all kinds.")
    parser.add_argument("--images", type=count, default=1000, help="of the test set (default: %(default)s)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="also write the accuracies here, as JSON")
    args = parser.parse_args(argv)
    model, _ = mnist.load(weights := predict.find_weights(args.model))
    _, (images, labels) = mnist.load_mnist(mnist.default_data_dir())
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(images))[: args.images]
    print(f"Accuracy on {len(chosen)} test digits, with {weights}:\n")
    print("| picture | predict.py | invert and resize |\n| --- | --- | --- |")
    results = {}
    for kind, steps in PICTURES.items():
        made = {"predict": [], "plain": []}
        for digit in images[chosen]:
            picture = Image.fromarray(digit.numpy())
            for step in steps:
                picture = step(picture, rng)
            made["predict"].append(prepared(picture))
            made["plain"].append(plain(picture))
        results[kind] = {}
        for way, digits in made.items():
            right = predict.classify(model, torch.stack(digits)).argmax(dim=1) == labels[chosen]
            results[kind][way] = 100 * right.float().mean().item()
        print(f"| {kind} | {results[kind]['predict']:.1f} % | {results[kind]['plain']:.1f} % |")
    if args.out:
        try:
            args.out.write_text(json.dumps(results, indent=2) + "\n")
        except OSError as error:
            raise mnist.UserError(f"cannot write {args.out}: {error.strerror}") from error
    return results


if __name__ == "__main__":
    mnist.run(main)
