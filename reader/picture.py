"""From a file to shades of grey."""

import contextlib
import io
import mimetypes
import sys
import warnings

import mnist

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from scipy import ndimage

register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # load() has its own limit, for what is to be decoded

FORMATS = ["AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]

SHORT, LONG = 128, 640  # pixels: a picture is first reduced until its sides are no longer
LIGHTNESS = 0.299, 0.587, 0.114  # the weights of red, green and blue
HUE = 3  # times as much contrast as lightness has
MAX_PIXELS = 90_000_000  # to be decoded, of which each takes up to 4 bytes
MAX_BYTES = 2**28  # of standard input, which may never end


def load(name):
    """Return the picture in the file `name`, upright, as a PIL image, and by how much it is reduced.

    The name "-" is standard input. Raises UserError if there is no such picture: no file, no image, one cut short, an
    animation, or one of more than MAX_PIXELS, which no JPEG is: a large one is decoded at a fraction of its size.
    """
    if name == "-" and not hasattr(sys.stdin, "buffer"):  # closed, or a notebook's
        raise mnist.UserError("there is no standard input: name a file")
    try:
        with (
            io.BytesIO(sys.stdin.buffer.read(MAX_BYTES)) if name == "-" else open(name, "rb") as source,
            warnings.catch_warnings(action="ignore"),  # of damage: the error below is enough
        ):
            # By its name, Pillow would map a TIFF into memory, and mix up the sides of a rotated one.
            image = Image.open(source, formats=FORMATS)
            # A phone's MPO holds the photograph first, then copies of it for other uses.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise mnist.UserError(f"it holds {image.n_frames} pictures: save one of them on its own")
            size = image.size
            image.draft(None, (LONG, LONG))  # saves decoding a JPEG at full size
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise mnist.UserError(f"it has {pixels:,} pixels, more than {MAX_PIXELS:,}: reduce it")
            image.load()
            with contextlib.suppress(Exception):  # damaged metadata: the picture itself may be whole
                ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        kind = mimetypes.guess_type(name)[0]
        known = f" ({kind}, by its name)" if kind else ""
        raise mnist.UserError(f"not a picture that can be read{known}: save it as PNG or JPEG") from error
    except OSError as error:
        raise mnist.UserError(error.strerror or f"it is damaged: {error}") from error
    except mnist.UserError:
        raise
    except Exception as error:  # of any kind: what a decoder raises is the picture's fault
        raise mnist.UserError(f"it is damaged: {error}") from error
    return image, min(np.divide(sorted(size), sorted(image.size)))  # a JPEG's sides are each rounded up


def stretch(values):
    """Return an array in which 0 stays 0 and the largest number becomes 255."""
    return values * (255 / (values.max() or 1))


def by_colour(image):
    """Return an RGB image in grey: by lightness, or by the colours if they differ in little but hue."""
    grey, pixels = image.convert("L"), np.asarray(image.reduce(1 + min(image.size) // SHORT)).reshape(-1, 3)
    _, axes = np.linalg.eigh(np.cov(pixels.T))
    axis = axes[:, -1] / abs(axes[:, -1]).sum()  # along which they differ most: their first principal component
    if np.std(pixels @ axis) < HUE * np.std(pixels @ LIGHTNESS):
        return grey
    return image.convert("L", (*axis, 255 * (axis < 0) @ abs(axis)))


def to_grey(image):
    """Return a PIL image of any mode in grey (mode L or F, 0 to 255), its sides at most SHORT and LONG."""
    scale = min(SHORT / min(image.size), LONG / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    if image.mode[0] in "IF":  # 16 or 32 bits: only the picture can tell their range
        values = np.nan_to_num(np.array(image, dtype=np.float64), copy=False, posinf=0, neginf=0)
        values -= values.min()
        image = Image.fromarray(stretch(values).astype(np.float32))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image.thumbnail(size)
        pixels = np.asarray(image, dtype=np.float32)
        opaque = pixels[pixels[..., 3] > pixels[..., 3].max() / 2, :3]
        if len(opaque) and np.ptp(opaque, axis=0).max() < 64 and pixels[..., 3].min() < 128:
            image = image.getchannel("A")  # all of one colour: the drawing is what is opaque
        else:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "F":
        image = by_colour(image.convert("RGB"))
    if image.getextrema() == (0, 1):  # a mask, whose 1 means white
        image = image.point(lambda value: 255 * value)
    image.thumbnail(size)
    return image


def bounding_box(ink):
    """Return the slices of rows and columns that hold all of the ink (H, W)."""
    return ndimage.find_objects((ink > 0).astype(int))[0]


def is_mnist(grey):
    """Return whether a picture (H, W) is in MNIST's form already; the limits are those of its 70,000 digits."""
    if grey.shape != (28, 28) or not grey.any():
        return False
    longest = max(part.stop - part.start for part in bounding_box(grey))
    return longest in (19, 20) and all(abs(mean - 14) < 0.6 for mean in ndimage.center_of_mass(grey))
