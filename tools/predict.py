"""Read handwritten digits from pictures: photographs, scans and drawings.

Usage:
    python tools/predict.py digit.png photo.jpg  # a line for each: its number, and how probable each digit is
    python tools/predict.py --single *.heic      # one digit on each, even if it is in pieces
    python tools/predict.py --json *.png         # for programs: a line of JSON for each, with boxes and probabilities
    python tools/predict.py --show photo.jpg     # also write seen.png: each digit in a box, and what the network saw
    python tools/predict.py - < digit.png        # a picture from standard input
"""

import argparse
import glob
import io
import itertools
import json
import math
import mimetypes
import struct
import sys
import typing
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of mnist.py and of tools/

import mnist
from tools import weights

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

register_heif_opener()

SHORT, LONG = 128, 640  # pixels: a picture is first reduced until its sides are no longer
SMALL = 100  # pixels: a picture with a shorter side is first enlarged, if its longer side allows it
MIN_SIDE = 8  # pixels: a picture with shorter sides is refused
MIN_CONTRAST = 8  # levels of grey, of 255, that a picture must span
SPECK = 0.09  # of the highest stroke's height: what is smaller is no mark
FAINT, DARK = 0.22, 0.4  # a stroke is what is above FAINT of the level of ink and connected with what is above DARK
WINDOW = 5  # times as wide as the strokes: what is wider belongs to the background
NO_DIGIT = 5.75  # a logit must stand this far above the mean of the ten, or there is likelier no digit
SLOPES = sorted(np.linspace(-0.2, 0.2, 21), key=abs)  # of ruled lines
LINE = 0.75  # of the paper's width or height: what covers more is no stroke
NO_TABLE = 5  # what it costs to read what is on a sheet alone if all around it is light
GUESS = 0.75  # what each cut through a stroke costs, and reading without lines, in log-probability
LEFT_OUT = 8  # what ink costs that is in no digit, if it is as large as a digit
JOINED = 4  # what two parts side by side cost in one digit, if they are as high as a digit
AT_EDGE = 0.5  # what a digit costs that touches an edge of the picture
LOW, WIDE = 3, 2  # what a digit costs that is low for its line, or wide for its height
WIDEST, MOST_PARTS = 1.6, 8  # a digit's width in heights of the line, and in parts
STEM, STEM_OFF = 1.2, 0.3  # how many heights of the line a part keeps if it is higher; what losing the rest costs
EIGHT = np.ones((3, 3))  # neighbours of a pixel: the diagonal ones too
MAX_BYTES = 2**28  # of standard input, which may never end
SHEET = Path("seen.png")  # what --show writes

# --- Any picture as ink on a background ----------------------------------------------------------------------------


def stretch(values):
    """Return an array in which 0 stays 0 and the largest number becomes 255."""
    return values * (255 / (values.max() or 1))


def to_grey(image):
    """Return a PIL image of any mode in grey (mode L or F, 0 to 255), its sides at most SHORT and LONG."""
    scale = min(SHORT / min(image.size), LONG / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    if image.mode[0] in "IF":  # 16 or 32 bits: only the picture can tell their range
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        image = Image.fromarray(stretch(values - values.min()))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image.thumbnail(size)
        pixels = np.asarray(image, dtype=np.float32)
        opaque = pixels[pixels[..., 3] > 127, :3]
        if len(opaque) and np.ptp(opaque, axis=0).max() < 64 and pixels[..., 3].min() < 128:
            image = image.getchannel("A")  # all of one colour: the drawing is what is opaque
        else:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "F":
        image = image.convert("RGB").convert("L")
    if image.getextrema() == (0, 1):  # a mask, whose 1 means white
        image = image.point(lambda value: 255 * value)
    image.thumbnail(size)
    return image


def bounding_box(ink):
    """Return the slices of rows and columns that hold all of the ink (H, W)."""
    return ndimage.find_objects((ink > 0).astype(int))[0]


def extent(ink):
    """Return the height and width of all of the ink (H, W)."""
    return [part.stop - part.start for part in bounding_box(ink)]


def is_mnist(grey):
    """Return whether a picture (H, W) is in MNIST's form already; the limits are those of its 70,000 digits."""
    if grey.shape != (28, 28) or not grey.any():
        return False
    return max(extent(grey)) in (19, 20) and all(abs(mean - 14) < 0.6 for mean in ndimage.center_of_mass(grey))


def border(pixels):
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def otsu(values):
    """Return the threshold between two classes of `values`: Otsu, A threshold selection method, 1979."""
    counts, edges = np.histogram(values, 64)
    centres = (edges[1:] + edges[:-1]) / 2
    share = counts.cumsum()[:-1] / counts.sum()
    moment = (counts * centres).cumsum() / counts.sum()
    between = (moment[-1] * share - moment[:-1]) ** 2 / (share * (1 - share)).clip(1e-9)
    return edges[1 + between.argmax()]


def flatten(grey, part):
    """Subtract from a part of a picture (H, W; H, W) the least-squares plane: light that falls from one side."""
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    grey = grey - terms @ np.linalg.lstsq(terms[part], grey[part], rcond=None)[0]
    return np.where(part, grey, np.median(grey[part]))


def between(light):
    """Return which pixels (H, W) have light ones on the left and on the right."""
    return np.logical_or.accumulate(light, axis=1) & np.logical_or.accumulate(light[:, ::-1], axis=1)[:, ::-1]


def find_sheet(light):
    """Find a light sheet with little ink on something dark, given which pixels (H, W) of a picture are light.

    Returns which pixels are on it; None if there is no sheet of more than half the picture's width and height.
    """
    labels, _ = ndimage.label(light)
    largest = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    size = extent(largest)
    large = all(2 * length > side for length, side in zip(size, light.shape, strict=True))
    if not large or largest.sum() < 0.7 * math.prod(size):
        return None
    sheet = between(largest) | between(largest.T).T
    inside = ndimage.minimum_filter(sheet, 5)  # less its edge
    return inside if inside.any() and not sheet.all() else None


def subtract_background(grey, window):
    """Return how far each pixel of a picture (H, W) is above the background, which is wider than the window."""
    grey = grey - ndimage.grey_opening(ndimage.uniform_filter(grey, 3), size=(window, window))
    return grey - np.median(grey[grey <= otsu(grey)])


def find_ink(grey):
    """Find light ink on a darker background in a picture (H, W).

    Returns how much ink each pixel holds, from 0 to 1, and which pixels belong to a stroke, both (H, W); None if
    nothing stands out.
    """
    if np.ptp(grey) < MIN_CONTRAST:
        return None
    window = max(grey.shape) // 2
    for _ in range(2):  # then with a window that follows the thickness of the strokes
        ink = subtract_background(grey, window)
        smooth = ndimage.uniform_filter(ink, 3)
        level = np.median(smooth[smooth >= smooth.max() / 2])
        noise = 1.5 * np.median(np.abs(ink - smooth))  # the standard deviation, if it is normal
        if level < max(MIN_CONTRAST, 4 * noise):
            return None
        strokes = smooth > FAINT * level
        outline = strokes & ~ndimage.binary_erosion(strokes)
        window = min(window, round(WINDOW * 2 * strokes.sum() / outline.sum()))
    floor = max(0.1 * level, 2 * noise)
    return ((ink - floor) / (level - floor)).clip(0, 1), strokes


def views(grey):
    """Yield each way to find ink in a picture (H, W): on all of it, or on a sheet.

    Each is (cost, the picture with light ink (H, W), the height and width of the picture or the sheet).
    """
    flat = flatten(grey, np.ones_like(grey, dtype=bool))
    if np.ptp(flat) < MIN_CONTRAST:
        return
    light, as_is = flat > otsu(flat), grey > otsu(grey)
    polarities = ((-1, light, as_is), (1, ~light, ~as_is))  # dark ink, then light ink
    for polarity, on, _ in polarities:
        if on.mean() + border(on).mean() > 0.6:  # it may be the background
            yield 0, polarity * flat, grey.shape
    for polarity, on, as_is in polarities:
        sheet = find_sheet(on)
        if sheet is None:  # the plane may be tilted by a sheet that is not in the middle
            sheet = find_sheet(as_is)
        if sheet is not None:
            yield NO_TABLE * on[~sheet].mean(), polarity * flatten(grey, sheet), extent(sheet)


# --- Ink as lines of parts -----------------------------------------------------------------------------------------


def drop(x, width, slope):
    """Return how many rows a line of this slope has gone down from the middle to the columns x (N,) of a picture."""
    return np.round(slope * (x - width / 2)).astype(int)


def shear(strokes, slope):
    """Shift each column of strokes (H, W) up by `slope` times its distance from the middle."""
    height, width = strokes.shape
    x, y = np.arange(width), np.arange(height)[:, None]
    y = y + drop(x, width, slope)
    return strokes[y.clip(0, height - 1), x] & (y >= 0) & (y < height)


def find_slope(strokes):
    """Return the slope of the fullest line of strokes (H, W), three pixels thick."""
    y, x = np.nonzero(strokes)

    def fullest(slope):
        rows = y - drop(x, strokes.shape[1], slope)
        return np.convolve(np.bincount(rows - rows.min(initial=0), minlength=1), [1, 1, 1]).max()

    return max(SLOPES, key=fullest)


def remove_lines(strokes, size):
    """Remove thin lines, straight or a little tilted, from strokes (H, W); strokes that cross them stay.

    They run across or down most of the paper, whose height and width are `size`.
    """
    for length in reversed(size):  # across, then down
        slope = find_slope(strokes)
        level = shear(strokes, slope)
        rows, _ = ndimage.label(ndimage.maximum_filter1d(level.sum(1) > LINE * length, 3))
        line = np.zeros_like(level)
        for (place,) in ndimage.find_objects(rows):
            thickness = place.stop - place.start
            if thickness <= max(level.shape) / 8:
                thick = ndimage.grey_opening(level, size=(thickness + 3, 1), mode="constant")
                line[place] = (level & ~thick)[place]
        strokes = (strokes & ~shear(line, -slope)).T
    return strokes


def cuts(part, highest):
    """Return the columns at which to try a cut through a part (H, W) of the strokes: where it is lowest.

    They are farther apart than specks are large, given the height of the highest part. What is narrow or low is whole.
    """
    height, width = part.shape
    if width <= 0.5 * height or height < 0.4 * highest:
        return []
    reach = max(2, round(SPECK * highest))
    tall = height - part.argmax(0) - part[::-1].argmax(0)
    smooth = ndimage.uniform_filter1d(tall.astype(float), 3)
    valleys, _ = ndimage.label(smooth == ndimage.minimum_filter1d(smooth, 2 * reach + 1))
    columns = [(valley.start + valley.stop) // 2 for (valley,) in ndimage.find_objects(valleys)]
    return [x for x in columns if reach < x < width - reach and tall[x] < 0.7 * height]


def to_box(place):
    """Return (left, top, right, bottom) of two slices, of rows and columns."""
    y, x = place
    return x.start, y.start, x.stop, y.stop


class Part(typing.NamedTuple):
    """A connected part of the strokes, or a piece of one that may be cut off."""

    label: int  # of its pixels
    whole: int  # the same for all pieces of one
    box: tuple  # left, top, right, bottom


def text_lines(boxes):
    """Return the indices of the boxes (N, 4) on each line of text, from top to bottom."""
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    across = np.minimum.outer(right, right) - np.maximum.outer(left, left)  # by how much they overlap
    down = np.minimum.outer(bottom, bottom) - np.maximum.outer(top, top)
    # A box is on the line of the nearest one to its right at the same height, and of those that it is stacked with.
    follows = (2 * down >= np.minimum.outer(height, height)) & np.less.outer(left + right, left + right)
    nearest = np.where(follows, across, -np.inf)
    follows &= nearest == nearest.max(axis=1, keepdims=True)
    stacked = (2 * across >= np.minimum.outer(width, width)) & (down >= -0.1 * np.maximum.outer(height, height))
    count, line = connected_components(follows | stacked, directed=False)
    # A line much lower than the highest holds marks, which belong to the nearest digits.
    marks = ndimage.maximum(height, line, range(count))[line] < 0.35 * height.max()
    distance = np.hypot(across.clip(max=0), down.clip(max=0))
    distance[:, marks] = np.inf
    line = np.where(marks, line[distance.argmin(axis=1)], line)
    return sorted((np.flatnonzero(line == k) for k in set(line)), key=lambda line: np.median((top + bottom)[line]))


def find_parts(strokes, ink, single):
    """Divide strokes (H, W) into parts.

    Returns their labels (H, W), and the lines of text from top to bottom: each a list of Part from left to right.
    """
    wholes, count = ndimage.label(strokes, EIGHT)
    dark = np.isin(range(count + 1), wholes[ndimage.uniform_filter(ink, 3) > DARK])
    sizes = ((y.stop - y.start, x.stop - x.start) for y, x in ndimage.find_objects(wholes))
    heights, widths = zip((0, 0), *sizes, strict=True)
    kept = (dark & (np.maximum(heights, widths) >= SPECK * max(heights)))[wholes]
    wholes = kept.astype(int) if single else ndimage.label(kept, EIGHT)[0]
    places = ndimage.find_objects(wholes)
    labels, owners = np.zeros_like(wholes), []
    for i, place in enumerate(places):
        whole = wholes[place] == i + 1
        columns = [] if single else cuts(whole, max(heights))
        labels[place] += whole * (len(owners) + 1 + np.searchsorted(columns, range(whole.shape[1]), side="right"))
        owners += [i] * (len(columns) + 1)
    boxes = map(to_box, ndimage.find_objects(labels))
    parts = [Part(label, *pair) for label, pair in enumerate(zip(owners, boxes, strict=True), 1)]
    parts.sort(key=lambda part: part.box[0] + part.box[2])
    lines = text_lines(np.array([to_box(place) for place in places])) if parts else []
    return labels, [[part for part in parts if part.whole in line] for line in lines]


# --- Parts as digits -----------------------------------------------------------------------------------------------


def to_form(ink):
    """Bring the ink (H, W) of one digit to MNIST's form: uint8 (28, 28), white on black.

    The digit fits a box of 20 x 20 pixels, and its centre of mass is the centre of the whole.
    """
    ink = ink[bounding_box(ink)]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))
    y, x = ndimage.center_of_mass(ink)
    top, left = min(max(0, round(14 - y)), 28 - height), min(max(0, round(14 - x)), 28 - width)
    digit = np.zeros((28, 28), dtype=np.uint8)
    digit[top : top + height, left : left + width] = (ink * (255 / ink.max())).round()
    return torch.from_numpy(digit)


class Digit(typing.NamedTuple):
    box: list  # left, top, right and bottom in pixels of the upright picture
    pixels: torch.Tensor  # as the network saw it: uint8 (28, 28)
    probabilities: torch.Tensor  # float32 (10,): what they lack to 1 is the probability that it is no digit


def classify(model, digits):
    """Return the probabilities (N, 10) of images (N, 28, 28), beside which each may also be no digit."""
    logits = mnist.classify(model, torch.stack(digits))
    return torch.cat([logits, logits.mean(dim=1, keepdim=True) + NO_DIGIT], dim=1).softmax(dim=1)[:, :10]


def runs_of(parts, boxes, labels, ink, height):
    """Yield (start, stop, box, digit (28, 28), True) for each run of a line's parts that may be one, given its height.

    A part with a long stem follows once more without it, with False.
    """
    for start in range(len(parts)):
        for stop in range(start + 1, min(len(parts), start + MOST_PARTS) + 1):
            left, top = boxes[start:stop, :2].min(axis=0).tolist()
            right, bottom = boxes[start:stop, 2:].max(axis=0).tolist()
            if stop - start > 1 and right - left > WIDEST * max(height, bottom - top):
                continue
            place = slice(max(0, top - 1), bottom + 1), slice(max(0, left - 1), right + 1)
            own = np.isin(labels[place], [part.label for part in parts[start:stop]])
            digit = ink[place] * ndimage.maximum_filter(own, 3)
            if digit.any():
                yield start, stop, (left, top, right, bottom), to_form(digit), True
            head = digit[: round(STEM * height)]
            if stop - start == 1 and bottom - top > STEM * height and head.any():
                yield start, stop, (left, top, right, bottom), to_form(head), False


def read_line(model, ink, labels, parts):
    """Divide a line's parts into digits in the likeliest way (LeCun et al., 1998, sections V and VI).

    Returns the log-probability of that, less its costs; a list of Digit; and whether nothing was cut or left out.
    """
    boxes = np.array([part.box for part in parts])
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
    ordered = np.sort(heights)
    height = ordered[np.searchsorted(ordered.cumsum(), ordered.sum() / 2)]  # of a digit: high parts count for more
    cut = np.array([one.whole == other.whole for one, other in itertools.pairwise(parts)], dtype=bool)
    beside = 2 * (boxes[:-1, 2] - boxes[1:, 0]) <= np.minimum(widths[:-1], widths[1:])
    joined = JOINED * (beside & ~cut) * np.minimum(heights[:-1], heights[1:]) / heights.max()
    sizes = (np.maximum(widths, heights) / height).clip(max=1)
    ways = [(i, i + 1, -LEFT_OUT * size, [], False) for i, size in enumerate(sizes)]
    runs = list(runs_of(parts, boxes, labels, ink, height))
    table = classify(model, [digit for *_, digit, _ in runs]) if runs else []
    for (start, stop, box, digit, whole), probabilities in zip(runs, table, strict=True):
        left, top, right, bottom = box
        at_edge = left == 0 or top == 0 or right == ink.shape[1] or bottom == ink.shape[0]
        low, wide = 0.6 - (bottom - top) / height, (right - left) / (bottom - top) - 1
        join = joined[start : stop - 1].sum()
        cost = AT_EDGE * at_edge + LOW * max(0, low) + WIDE * max(0, wide) + STEM_OFF * (not whole) + join
        found = [Digit(box, digit, probabilities)]
        ways.append((start, stop, probabilities.max().log().item() - cost, found, whole and (join == 0 or at_edge)))
    best = [(0, [], True)] + len(parts) * [(-math.inf, [], False)]  # for each part, the best way to its left
    for start, stop, score, found, whole in sorted(ways, key=lambda way: way[1]):
        total, before, whole_before = best[start]
        is_cut = start > 0 and cut[start - 1]
        total += score - GUESS * is_cut
        if total > best[stop][0]:
            best[stop] = total, before + found, whole_before and whole and not is_cut
    return best[-1]


def read_strokes(model, ink, strokes, single, cost):
    """Return (score less the cost, lines of Digit, whether nothing is cut or left out) of ink and strokes (H, W)."""
    labels, lines = find_parts(strokes, ink, single)
    results = [read_line(model, ink, labels, parts) for parts in lines]
    digits = [digits for _, digits, _ in results if digits]
    score = sum(score for score, _, _ in results) if digits else -math.inf
    return score - cost, digits, all(whole for _, _, whole in results)


def best_reading(model, grey, single):
    """Return read_strokes()'s result for the likeliest way to find ink in a picture (H, W)."""
    best = (-math.inf, [], False)
    for cost, view, size in views(grey):
        # What costs something scores no higher than that, however sure the network is.
        if best[0] >= -cost or (found := find_ink(view)) is None:
            continue
        ink, strokes = found
        best = max(best, read_strokes(model, ink, strokes, single, cost), key=lambda reading: reading[0])
        if best[0] < -cost - GUESS and ((rest := remove_lines(strokes, size)) != strokes).any():
            ink = np.where(strokes & ~rest, 0, ink)
            best = max(best, read_strokes(model, ink, rest, single, cost + GUESS), key=lambda reading: reading[0])
    return best


def enlarge(box, scale):
    """Return the whole pixels that hold a box (left, top, right, bottom), `scale` (4,) times as large."""
    left, top, right, bottom = (scale * box).round(6)
    return [math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)]


def read(model, image, single=False):
    """Read the digits on a PIL image, or one alone if `single`.

    Returns the lines from top to bottom, each a list of Digit from left to right, and whether the answer is sure. Ink
    and background can be told apart in several ways, and strokes be divided into digits in several. All go through the
    network, and what it finds likeliest counts. An image in MNIST's form goes there with nothing but its range
    changed, if that is not 0 to 255. Raises UserError if there is no digit.
    """
    if max(image.size) < MIN_SIDE:
        raise mnist.UserError(f"it has only {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    grey = to_grey(image)
    if is_mnist(pixels := np.array(grey)):
        pixels = np.round(pixels if pixels.max() >= 254 else stretch(pixels))  # MNIST's own reach 254 or 255
        digit = torch.from_numpy(pixels).byte()
        lines, whole = [[Digit(to_box(bounding_box(pixels)), digit, classify(model, [digit])[0])]], True
    else:
        times = max(1, min(math.ceil(SMALL / min(grey.size)), LONG // max(grey.size)))
        grey = grey.resize((times * grey.width, times * grey.height), Image.Resampling.BICUBIC)
        _, lines, whole = best_reading(model, np.asarray(grey, dtype=np.float32), single)
    if not lines:
        raise mnist.UserError("there is no digit to be seen on it")
    scale = np.tile(np.divide(image.size, grey.size), 2)
    lines = [[digit._replace(box=enlarge(digit.box, scale)) for digit in line] for line in lines]
    likely = [digit.probabilities.max() > 1 - digit.probabilities.sum() for line in lines for digit in line]
    return lines, whole and all(likely)


# --- Reading and answering -----------------------------------------------------------------------------------------


def read_picture(name):
    """Return the picture in the file `name` ("-" is standard input) as a PIL image, and by how much it is reduced.

    Raises UserError if there is no such picture: no file, no image, one cut short, an animation, or one of more than
    89 million pixels.
    """
    if name == "-" and not hasattr(sys.stdin, "buffer"):  # closed, or a notebook's
        raise mnist.UserError("there is no standard input: name a file")
    try:
        source = io.BytesIO(sys.stdin.buffer.read(MAX_BYTES)) if name == "-" else name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings of damage: the error below is enough
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source)
            # A phone's MPO holds the photograph first, then copies of it for other uses.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise mnist.UserError(f"it holds {image.n_frames} pictures: save one of them on its own")
            width = image.width
            image.draft("L", (LONG, LONG))  # saves decoding a JPEG at full size
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise mnist.UserError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        kind = mimetypes.guess_type(name)[0] or "of no known type"
        raise mnist.UserError(
            f"not a picture that can be read ({kind}, by its name): save it as PNG or JPEG"
        ) from error
    except OSError as error:
        raise mnist.UserError(error.strerror or f"it is damaged: {error}") from error
    except (SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error) as error:
        raise mnist.UserError(f"it is damaged: {error}") from error
    return image, width / image.width


def to_row(image, lines, caption):
    """Return a row for write_sheet(): a PIL image with a box around each digit, what the network saw, the caption."""
    side, gap = 224, 16
    image = ImageOps.exif_transpose(image)
    picture = ImageOps.contain(to_grey(image).convert("RGB"), (side, side))
    for digit in itertools.chain(*lines):
        box = [picture.width / image.width * edge for edge in digit.box]
        ImageDraw.Draw(picture).rectangle(box, outline="red")
    seen = torch.zeros(28 * max(1, len(lines)), 28 * max(map(len, lines), default=1), dtype=torch.uint8)
    for y, line in enumerate(lines):
        for x, digit in enumerate(line):
            seen[28 * y : 28 * y + 28, 28 * x : 28 * x + 28] = digit.pixels
    seen = ImageOps.contain(Image.fromarray(seen.numpy()), (side, side), Image.Resampling.NEAREST)
    row = Image.new("RGB", (2 * side + 3 * gap, side + 3 * gap), "white")
    for left, part in ((gap, picture), (2 * gap + side, seen)):
        row.paste(ImageOps.pad(part, (side, side), color="lightgrey"), (left, gap))
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(16)
    while draw.textlength(caption, font) > 2 * side + gap:
        caption = caption[:-2] + "…"
    draw.text((gap, side + gap + 4), caption, "black", font)
    return row


def write_sheet(rows, path):
    """Write a PNG file of to_row()'s rows."""
    sheet = Image.new("RGB", (rows[0].width, len(rows) * rows[0].height))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * row.height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    mnist.write(path, buffer.getvalue())


def expand(pattern):
    """Return the names of the files that match `pattern`, which Windows' shells leave as it is; itself if none does."""
    return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) or [pattern]


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="predict.py", description="Read handwritten digits from pictures.")
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="an image file; - is standard input")
    add("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    add("--single", action="store_true", help="read each picture as one digit, even if it is in pieces")
    add("--json", action="store_true", help="print a line of JSON for each picture, with boxes and probabilities")
    add("--show", action="store_true", help=f"write {SHEET}: each digit in a box, and what the network saw")
    args = parser.parse_args(argv)
    args.pictures = [name for pattern in args.pictures for name in expand(pattern)]
    if args.show and SHEET.resolve() in [Path(name).resolve() for name in args.pictures]:
        parser.error(f"argument --show: it would overwrite the picture {SHEET}: rename that first")
    return args


def as_result(name, lines, sure, scale):
    """Return what --json prints of a picture's lines, whose boxes are to be enlarged by `scale`."""
    digits = [
        {
            "digit": digit.probabilities.argmax().item(),
            "probability": digit.probabilities.max().item(),
            "line": number,
            "box": [round(side * scale) for side in digit.box],
            "probabilities": digit.probabilities.tolist(),
        }
        for number, line in enumerate(lines)
        for digit in line
    ]
    number = " ".join("".join(str(digit.probabilities.argmax().item()) for digit in line) for line in lines)
    result = {"picture": name, "number": number, "digits": digits, "sure": sure}
    if len(digits) == 1:
        result |= {"digit": digits[0]["digit"], "probabilities": digits[0]["probabilities"]}
    return result


def as_text(result):
    """Return a result as a line for people."""
    probabilities = [f"{digit['probability']:.1%}" for digit in result["digits"]]
    line = f"{result['picture']}: {result['number']} ({', '.join(probabilities)})"
    if "digit" in result:
        second = sorted(range(10), key=result["probabilities"].__getitem__)[-2]
        line += f", else {second} ({result['probabilities'][second]:.1%})"
    return line if result["sure"] else f"{line}, not sure"


def main(argv):
    """Print a line for each picture that `argv` names; the exit status is 1 if any failed.

    Returns a dictionary for each: what --json prints.
    """
    args = parse_args(argv)
    model, _ = weights.load(path := weights.find(args.model))
    print(f"Using the weights in {path}", file=sys.stderr)

    results, rows = [], []
    for name in args.pictures:
        try:
            image, scale = read_picture(name)
            lines, sure = read(model, image, args.single)
        except mnist.UserError as error:
            print(f"predict.py: error: {name}: {error}", file=sys.stderr)
            continue
        result = as_result(name, lines, sure, scale)
        results.append(result)
        print(json.dumps(result) if args.json else as_text(result))
        if args.show:
            rows.append(to_row(image, lines, as_text(result)))
    if rows:
        write_sheet(rows, SHEET)
    if len(results) < len(args.pictures):
        sys.exit(1)
    return results


if __name__ == "__main__":
    mnist.run(main)
