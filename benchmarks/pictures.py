"""Measure predict.py on pictures such as people have, made from MNIST's test digits.

Usage, in the folder of mnist.py:
    python -m benchmarks.pictures                   # a Markdown table: the accuracy on each kind of picture
    python -m benchmarks.pictures --images 10000 --out pictures.json
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

TEST_SIZE = 10_000

# --- Kinds of pictures: each function turns an image of mode L into another ---------------------------------------


def ink(digit, _rng=None, scale=8):
    """Write a digit of MNIST in dark ink on light paper, `scale` times as large."""
    large = digit.resize((28 * scale, 28 * scale), Image.Resampling.BICUBIC)
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
}


# --- Measurement ---------------------------------------------------------------------------------------------------


def invert_and_resize(image):
    """Return what the usual two lines make of a picture: uint8 (28, 28)."""
    return torch.from_numpy(np.array(ImageOps.invert(image.convert("L")).resize((28, 28))))


def prepare(image):
    """Return what predict.py makes of a picture; black if it finds nothing, which counts as a mistake."""
    try:
        return predict.prepare(image)
    except mnist.UserError:
        return torch.zeros(28, 28, dtype=torch.uint8)


def main(argv=()):
    """Print the table. Returns, by the name of each kind, the accuracies in %: {"predict": ..., "plain": ...}."""
    count = mnist.in_range(int, 1, TEST_SIZE + 1, f"a whole number from 1 to {TEST_SIZE}")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description="Measure predict.py on pictures of many kinds."
    )
    parser.add_argument("--images", type=count, default=1000, help="of the test set (default: %(default)s)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    parser.add_argument("--out", type=mnist.writable, metavar="PATH", help="also write the accuracies here, as JSON")
    args = parser.parse_args(argv)
    model, _ = mnist.load(weights := mnist.find_weights(args.model))
    _, (images, labels) = mnist.load_mnist(mnist.default_data_dir())
    rng = np.random.default_rng(0)
    sample = rng.permutation(len(images))[: args.images]
    print(f"Accuracy on {len(sample)} test digits, with {weights}:\n")
    print("| picture | predict.py | invert and resize |\n| --- | --- | --- |")
    results = {}
    for kind, transforms in KINDS.items():
        digits = {"predict": [], "plain": []}
        for digit in images[sample]:
            picture = Image.fromarray(digit.numpy())
            for transform in transforms:
                picture = transform(picture, rng)
            digits["predict"].append(prepare(picture))
            digits["plain"].append(invert_and_resize(picture))
        results[kind] = {}
        for method, prepared in digits.items():
            correct = mnist.classify(model, torch.stack(prepared)).argmax(dim=1) == labels[sample]
            results[kind][method] = 100 * correct.float().mean().item()
        print(f"| {kind} | {results[kind]['predict']:.1f} % | {results[kind]['plain']:.1f} % |")
    if args.out:
        mnist.write((json.dumps(results, indent=2) + "\n").encode(), args.out)
    return results


if __name__ == "__main__":
    mnist.run(main)
