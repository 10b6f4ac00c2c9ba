"""Read the handwritten digits in a picture. Each file is one step:

picture.py; ink.py, which uses rulings.py, frames.py and marks.py; segments.py; digit.py; lattice.py. sheet.py shows
what was found.
"""

import math
import typing

import mnist
from reader import ink, lattice, picture, segments
from reader.digit import Digit, classify, is_likely, to_form
from reader.rulings import EIGHT

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

MIN_SIDE = 8  # pixels: a picture with shorter sides is refused
SMALL = 100  # pixels: a picture with a shorter side is first enlarged, if its longer side allows it
SLASH, COMMA = 0.08, 0.6  # of the digits' height: a slash overshoots both ends by more, a comma is not as high


class Reading(typing.NamedTuple):
    score: float = -math.inf
    lines: list = ()  # of text, from top to bottom, each a list of Digit
    is_whole: bool = False  # whether nothing is cut, joined, left out or overlooked, or like a sign


def overlooks(model, density, faint, lines):
    """Return whether one of the faint strokes (H, W) may be a digit: like one, and about as high as those in lines."""
    highest = max(bottom - top for line in lines for (_, top, _, bottom), *_ in line)
    labels, _ = ndimage.label(faint, EIGHT)
    strokes = [
        density[place] * (labels[place] == number)
        for number, place in enumerate(ndimage.find_objects(labels), start=1)
        if 0.5 < (place[0].stop - place[0].start) / highest < 1.6
    ]
    digits = [to_form(stroke) for stroke in strokes if stroke.any()]
    return bool(digits) and any(map(is_likely, classify(model, digits)))


def has_sign(lines):
    """Return whether one of the digits in lines may be no digit, but a sign that looks like a 1.

    A slash or a bracket reaches both above and below the others, a comma is lower than any 1.
    """
    height = np.median([bottom - top for line in lines for (_, top, _, bottom), *_ in line])
    for line in lines:
        _, top, _, bottom = np.transpose([digit.box for digit in line])
        is_high = np.minimum(np.median(top) - top, bottom - np.median(bottom)) > SLASH * height
        is_one = [digit.probabilities.argmax() == 1 for digit in line]
        if (is_one & (is_high | (bottom - top < COMMA * height))).any():
            return True
    return False


def read_grey(model, grey, single):
    """Return the Reading of the best hypothesis about a picture (H, W)."""
    best = Reading()

    def can_win(cost):
        return best.score < -cost

    for cost, density, strokes, faint, frame in ink.hypotheses(grey, can_win):
        paths = [
            lattice.best_path(lattice.build_arcs(model, density, line))
            for line in segments.segment(strokes, frame, single)
        ]
        if lines := [digits for _, digits, _ in paths if digits]:
            score = sum(score for score, _, _ in paths) - cost
            if score > best.score:
                is_whole = all(is_whole for *_, is_whole in paths)
                is_whole = is_whole and not (has_sign(lines) or overlooks(model, density, faint, lines))
                best = Reading(score, lines, is_whole)
    return best


def enlarge(box, scale):
    """Return the whole pixels that hold a box (left, top, right, bottom), `scale` (4,) times as large."""
    left, top, right, bottom = (scale * box).round(6)
    return [math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)]


def read(model, image, single=False):
    """Read the digits on a PIL image, or one alone if `single`.

    Returns the lines from top to bottom, each a list of Digit from left to right, and whether the answer is sure. Ink
    and background can be told apart in several ways, and strokes be divided into digits in several. All go through the
    network, and what it finds likeliest counts. An image in MNIST's form goes to it with nothing but its range
    changed, if that is not 0 to 255. Raises UserError if the image is too small, or there is no digit on it.
    """
    if max(image.size) < MIN_SIDE:
        raise mnist.UserError(f"it has only {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    grey = picture.to_grey(image)
    if picture.is_mnist(pixels := np.array(grey)):
        pixels = np.round(pixels if pixels.max() >= 254 else picture.stretch(pixels))  # MNIST's own reach 254 or 255
        pixels = pixels.astype(np.uint8)
        (box,) = segments.boxes_of((pixels > 0).astype(int))
        lines, is_whole = [[Digit(box, pixels, classify(model, [pixels])[0])]], True
    else:
        times = max(1, min(math.ceil(SMALL / min(grey.size)), picture.LONG // max(grey.size)))
        grey = grey.resize((times * grey.width, times * grey.height), Image.Resampling.BICUBIC)
        _, lines, is_whole = read_grey(model, np.asarray(grey, dtype=np.float32), single)
    if not lines:
        raise mnist.UserError("there is no digit to be seen on it: crop a page to its digits")
    scale = np.tile(np.divide(image.size, grey.size), 2)
    lines = [[digit._replace(box=enlarge(digit.box, scale)) for digit in line] for line in lines]
    return lines, is_whole and all(is_likely(digit.probabilities) for line in lines for digit in line)
