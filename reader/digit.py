"""From the ink of a candidate to MNIST's form, and what the network makes of it."""

import typing

import mnist
from reader.picture import bounding_box

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

SOLID = 11  # pixels: the strokes of a digit are narrower, unlike a hole punched in the paper, or a finger
NO_DIGIT = 5.75  # a logit must stand this far above the mean of the ten, or it is likelier no digit


class Digit(typing.NamedTuple):
    box: list  # left, top, right and bottom in pixels of the upright picture
    pixels: np.ndarray  # as the network saw it: uint8 (28, 28)
    probabilities: np.ndarray  # float32 (10,): what they lack to 1 is the probability that it is no digit


def to_form(ink):
    """Bring the ink (H, W) of one digit to MNIST's form: uint8 (28, 28), white on black.

    The digit fits a box of 20 x 20 pixels, and its centre of mass is at pixel (14, 14), as in MNIST.
    """
    ink = ink[bounding_box(ink)]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))
    y, x = ndimage.center_of_mass(ink)
    top, left = min(max(0, round(14 - y)), 28 - height), min(max(0, round(14 - x)), 28 - width)
    digit = np.zeros((28, 28), dtype=np.uint8)
    digit[top : top + height, left : left + width] = (ink * (255 / ink.max())).round()
    return digit


def classify(model, digits):
    """Return the probabilities (N, 10) of each digit for images (28, 28) in MNIST's form; the rest is that of none."""
    images = np.stack(digits)
    logits = mnist.classify(model, torch.from_numpy(images))
    none = logits.mean(dim=1, keepdim=True) + NO_DIGIT
    probabilities = torch.cat([logits, none], dim=1).softmax(dim=1)[:, :10].numpy()
    is_solid = ndimage.minimum_filter(images > 127, (1, SOLID, SOLID)).any(axis=(1, 2))
    return np.where(is_solid[:, None], 1e-9, probabilities)  # not 0: its logarithm is taken


def is_likely(probabilities):
    """Return whether the likeliest digit, by its probabilities (10,), is likelier than none."""
    return probabilities.max() > 1 - probabilities.sum()
