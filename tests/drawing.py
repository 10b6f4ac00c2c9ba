"""Pictures that tests draw, MNIST's test digits, and the network that reads them."""

import functools
import io

import mnist
from tools import weights

import numpy as np
from PIL import Image, ImageDraw


@functools.cache
def pretrained():
    return weights.load(weights.PRETRAINED)[0]


@functools.cache
def mnist_test_set():
    """Return MNIST's test images (10000, 28, 28) and labels (10000,)."""
    return mnist.load_mnist(mnist.DATA_DIR)[1]


def seven(size=100, left=30, top=20):
    """Return a 7 in dark ink on light paper, 25 x 40 pixels, as an array (size, size)."""
    pixels = np.full((size, size), 230, dtype=np.uint8)
    pixels[top : top + 6, left : left + 25] = 30
    pixels[top : top + 40, left + 19 : left + 25] = 30
    return pixels


def four(size=100, left=20, top=20):
    """Return an open 4 in dark ink on light paper, 40 x 60 pixels, as an array (size, size)."""
    x, y = left, top
    lines = [(x + 10, y, x, y + 35), (x, y + 35, x + 40, y + 35), (x + 30, y + 10, x + 30, y + 60)]
    return draw(np.full((size, size), 230, dtype=np.uint8), *lines, width=6)


def draw(pixels, *lines, width=2, ink=30):
    """Draw straight lines (x, y, x, y), as dark as the ink."""
    image = Image.fromarray(pixels)
    for line in lines:
        ImageDraw.Draw(image).line(line, fill=ink, width=width)
    return np.array(image)


def noisy(pixels):
    noise = np.random.default_rng(0).normal(0, 12, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
