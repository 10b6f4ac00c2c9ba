"""Read handwritten digits from pictures: photographs, scans and drawings.

Usage:
    python predict.py digit.png photo.jpg       # a line for each: the digits from left to right, and how probable
    python predict.py --single *.heic           # one digit on each, even if it is in pieces
    python predict.py --json *.png              # for programs: a line of JSON for each, with boxes and probabilities
    python predict.py --show photo.jpg          # also write seen.png: each picture beside what the network saw
    python predict.py - < digit.png             # a picture from standard input
"""

import argparse
import glob
import io
import json
import math
import mimetypes
import struct
import sys
import typing
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I and PYTHONSAFEPATH leave it out

import mnist
import weights

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from scipy import ndimage

register_heif_opener()

SIDE = 128  # pixels, of a square: a larger picture is first reduced to its area
SMALL = 56  # pixels: a picture with shorter sides is first enlarged
MIN_SIDE = 8  # pixels: a picture with shorter sides is refused
MIN_CONTRAST = 8  # levels of grey, of 255, that a picture must span
FAINT, DARK = 0.22, 0.4  # a stroke is what is above FAINT of the level of ink and connected with what is above DARK
LIKELY = 0.8  # what the likelier polarity is worth, in probability, times how likely it is
ON_SHEET = 0.5  # what it is worth that the ink is on a sheet
FAR = 0.5  # a polarity less likely than minus this is not tried
SURE = 0.9  # below this probability an answer is marked as not sure
EIGHT = np.ones((3, 3))  # neighbours of a pixel: the diagonal ones too
MAX_BYTES = 2**28  # of standard input, which may never end
SHEET = Path("seen.png")  # what --show writes

# --- Any picture as ink on a background ----------------------------------------------------------------------------


def stretch(values):
    """Return an array in which 0 stays 0 and the largest number becomes 255."""
    return values * (255 / (values.max() or 1))


def to_grey(image):
    """Return a PIL image of any mode in grey (mode L or F, 0 to 255), upright, with at most the area of SIDE x SIDE."""
    image = ImageOps.exif_transpose(image)
    scale = SIDE / math.sqrt(image.width * image.height)
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
    if image.mode not in ("L", "F"):
        image = image.convert("RGB").convert("L")
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
    longer = max(part.stop - part.start for part in bounding_box(grey))
    return longer in (19, 20) and all(abs(mean - 14) < 0.6 for mean in ndimage.center_of_mass(grey))


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


def find_sheet(light):
    """Find a light sheet with little ink on something dark, given which pixels (H, W) of a picture are light.

    Returns which pixels are on it, or None if there is none of more than half the picture's width and height.
    """
    labels, _ = ndimage.label(light)
    light = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    box = bounding_box(light)
    large = all(2 * (part.stop - part.start) > side for part, side in zip(box, light.shape, strict=True))
    if not large or light[box].mean() < 0.8 or light.mean() > 0.8 or border(light).mean() > 0.3:
        return None
    sheet = ndimage.minimum_filter(ndimage.binary_fill_holes(light), 5)  # less its edge
    return sheet if sheet.any() else None


def find_ink(grey):
    """Find light ink on a darker background in a picture (H, W).

    Returns how much ink each pixel holds, from 0 to 1, and which pixels belong to a stroke, both (H, W); None if
    nothing stands out.
    """
    if np.ptp(grey) < MIN_CONTRAST:
        return None
    # The background is what an opening leaves with a window too large for any stroke to fill.
    side = max(grey.shape)
    smooth = ndimage.uniform_filter(grey, max(1, side // 40))
    grey = grey - ndimage.grey_opening(smooth, size=(side // 2, side // 2))
    ink = grey - np.median(grey[grey <= otsu(grey)])
    smooth = ndimage.uniform_filter(ink, 3)
    level = np.median(smooth[smooth >= smooth.max() / 2])
    noise = 1.5 * np.median(np.abs(ink - smooth))  # the standard deviation, if it is normal
    if level < max(MIN_CONTRAST, 4 * noise):
        return None
    floor = max(0.1 * level, 2 * noise)
    return ((ink - floor) / (level - floor)).clip(0, 1), smooth > FAINT * level


def opened(strokes, size):
    """Return the pixels (H, W) of strokes in which a window of this size finds room, with nothing beyond the edges."""
    return ndimage.grey_opening(strokes, size=size, mode="constant")


def remove_surroundings(strokes):
    """Remove what runs along the edge and straight thin lines across most of a picture; crossing strokes stay.

    Returns the strokes (H, W) that remain, and the number of lines.
    """
    lines = 0
    for _ in range(2):  # the lines across, then those down
        along = opened(strokes, (1, int(0.7 * strokes.shape[1])))
        labels, _ = ndimage.label(along, EIGHT)
        for label, place in enumerate(ndimage.find_objects(labels), 1):
            thickness = place[0].stop - place[0].start
            if thickness <= max(strokes.shape) / 8:
                lines += 1
                crossing = opened(strokes, (thickness + 3, 1))
                strokes = strokes & (crossing | (labels != label))
        strokes = strokes.T
    labels, count = ndimage.label(strokes, EIGHT)
    edge = border(labels)
    # No stroke runs along most of an edge of the picture, but a shadow or the edge of a table does.
    at_edge = np.bincount(edge, minlength=count + 1) > 0.15 * len(edge)
    return strokes & ~at_edge[labels], lines


# --- Ink as digits -------------------------------------------------------------------------------------------------


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


def separate(ink, strokes, single):
    """Return (place, pixels) for each digit in find_ink()'s result, from left to right: two slices, uint8 (28, 28)."""
    labels, count = ndimage.label(strokes, EIGHT)
    kept = np.isin(np.arange(1, count + 1), labels[ndimage.uniform_filter(ink, 3) > DARK])
    # Parts one above the other are one digit, such as a 5 and its bar, even if they reach a little farther.
    spans = [across for _, across in ndimage.find_objects(labels)]
    columns = np.full(ink.shape[1], single)
    for span, keep in zip(spans, kept, strict=True):
        inset = round(0.15 * (span.stop - span.start))
        columns[span.start + inset : span.stop - inset] |= keep
    groups, _ = ndimage.label(columns)
    number = [groups[(span.start + span.stop) // 2] * keep for span, keep in zip(spans, kept, strict=True)]
    labels = np.array([0, *number])[labels]
    places = ndimage.find_objects(labels)
    # A digit is nearly as high as the others, and not as light as a dot.
    mass = ndimage.sum_labels(ink, labels, range(1, len(places) + 1))
    heights = np.array([rows.stop - rows.start for rows, _ in places])
    whole = (heights >= 0.45 * heights.max(initial=0)) & (mass >= 0.08 * mass.max(initial=0))
    return [
        (places[i], to_form(ink * ndimage.maximum_filter(labels == i + 1, 3))) for i in np.flatnonzero(whole).tolist()
    ]


def views(grey):
    """Yield (head start in probability, picture with light ink) for each way to find the ink in one (H, W)."""
    flat = flatten(grey, np.ones_like(grey, dtype=bool))
    if np.ptp(flat) < MIN_CONTRAST:
        return
    # The background is likely the larger of two classes of pixels, and the one along the border and in the corners.
    light = flat > otsu(flat)
    corners = light[[0, 0, -1, -1], [0, -1, 0, -1]]
    light_background = (light.mean() + border(light).mean() + corners.mean()) / 1.5 - 1  # from -1, surely not, to 1
    light_sheet, dark_sheet = find_sheet(light), find_sheet(~light)
    for polarity, likely, on, itself in (
        (-1, light_background, light_sheet, dark_sheet),
        (1, -light_background, dark_sheet, light_sheet),
    ):
        if likely > -FAR:
            yield (LIKELY * max(0, likely) if itself is None else 0), polarity * flat
        if on is not None:
            yield ON_SHEET, polarity * flatten(grey, on)


def readings(grey, single):
    """Return the ways to read a picture (H, W): for each, its head start in probability and separate()'s digits."""
    ways = []
    for head, view in views(grey):
        if (found := find_ink(view)) is None:
            continue
        ink, strokes = found
        rest, lines = remove_surroundings(strokes)
        ways.append((head, separate(ink, strokes, single)))
        if (rest != strokes).any():
            digits = separate(np.where(strokes & ~rest, 0, ink), rest, single)
            height, width = ink.shape
            inside = all(y.start and x.start and y.stop < height and x.stop < width for (y, x), _ in digits)
            # One or two lines may be a digit's, unless with them all is gone that touched the edge.
            surroundings = lines > 2 or (border(strokes).any() and inside)
            ways.append((head + (0.3 if surroundings else -0.1), digits))
    return [(head, digits) for head, digits in ways if digits]


class Digit(typing.NamedTuple):
    box: list  # left, top, right and bottom in pixels of the upright picture
    pixels: torch.Tensor  # as the network saw it: uint8 (28, 28)
    probabilities: torch.Tensor  # float32 (10,)


def read(model, image, single=False):
    """Return the digits on a PIL image from left to right, as a list of Digit; one alone if `single`.

    Ink and background can be told apart in several ways. All go through the network, and the one whose mean probability
    and head start add up to most counts. An image in MNIST's form goes there with nothing but its range changed, if
    that is not 0 to 255. Raises UserError if there is no ink.
    """
    if max(image.size) < MIN_SIDE:
        raise mnist.UserError(f"it has only {image.width} x {image.height} pixels")
    grey = to_grey(image)
    if is_mnist(pixels := np.array(grey)):
        pixels = np.round(pixels if pixels.max() >= 254 else stretch(pixels))  # MNIST's own reach 254 or 255
        ways = [(0, [(bounding_box(pixels), torch.from_numpy(pixels).byte())])]
    else:
        times = math.ceil(SMALL / max(grey.size))
        grey = grey.resize((times * grey.width, times * grey.height), Image.Resampling.BICUBIC)
        ways = readings(np.asarray(grey, dtype=np.float32), single)
    if not ways:
        raise mnist.UserError("there is nothing to be seen on it")
    logits = mnist.classify(model, torch.stack([pixels for _, digits in ways for _, pixels in digits]))
    tables = logits.softmax(dim=1).split([len(digits) for _, digits in ways])
    scores = [head + table.amax(dim=1).mean().item() for (head, _), table in zip(ways, tables, strict=True)]
    best = max(range(len(ways)), key=scores.__getitem__)
    size = image.size[::-1] if image.getexif().get(ExifTags.Base.Orientation, 1) > 4 else image.size
    scale = np.tile(np.divide(size, grey.size), 2)
    return [
        Digit((scale * (x.start, y.start, x.stop, y.stop)).round().astype(int).tolist(), pixels, probabilities)
        for ((y, x), pixels), probabilities in zip(ways[best][1], tables[best], strict=True)
    ]


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
            image.draft("L", (SIDE, SIDE))  # saves decoding a JPEG at full size
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


def write_sheet(rows, path):
    """Write a PNG file with a row for each (picture, digits as the network saw them (28, 28 n), caption)."""
    side, gap = 224, 16
    sheet = Image.new("RGB", (2 * side + 3 * gap, gap + len(rows) * (side + 3 * gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (picture, digits, caption) in enumerate(rows):
        top = gap + row * (side + 3 * gap)
        sheet.paste(ImageOps.pad(picture, (side, side), color="lightgrey"), (gap, top))
        seen = ImageOps.pad(Image.fromarray(digits.numpy()), (side, side), Image.Resampling.NEAREST, "lightgrey")
        sheet.paste(seen, (2 * gap + side, top))
        while draw.textlength(caption, font) > 2 * side + gap:
            caption = "…" + caption[2:]
        draw.text((gap, top + side + 4), caption, "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    mnist.write(buffer.getvalue(), path)


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
    add("--show", action="store_true", help=f"write {SHEET}: each picture beside what the network saw")
    args = parser.parse_args(argv)
    args.pictures = [name for pattern in args.pictures for name in expand(pattern)]
    if args.show and SHEET.resolve() in [Path(name).resolve() for name in args.pictures]:
        parser.error(f"argument --show: it would overwrite the picture {SHEET}: rename that first")
    return args


def as_result(name, digits, scale):
    """Return what --json prints of a picture's digits, whose boxes are to be enlarged by `scale`."""
    each = [
        {
            "digit": digit.probabilities.argmax().item(),
            "probability": digit.probabilities.max().item(),
            "box": [round(side * scale) for side in digit.box],
            "probabilities": digit.probabilities.tolist(),
        }
        for digit in digits
    ]
    result = {"picture": name, "number": "".join(str(digit["digit"]) for digit in each), "digits": each}
    result["sure"] = all(digit["probability"] >= SURE for digit in each)
    if len(each) == 1:
        result |= {"digit": each[0]["digit"], "probabilities": each[0]["probabilities"]}
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
            digits = read(model, image, args.single)
        except mnist.UserError as error:
            print(f"predict.py: error: {name}: {error}", file=sys.stderr)
            continue
        result = as_result(name, digits, scale)
        results.append(result)
        print(json.dumps(result) if args.json else as_text(result))
        if args.show:
            seen = torch.cat([digit.pixels for digit in digits], dim=1)
            rows.append((to_grey(image).convert("L"), seen, as_text(result)))
    if rows:
        write_sheet(rows, SHEET)
    if len(results) < len(args.pictures):
        sys.exit(1)
    return results


if __name__ == "__main__":
    mnist.run(main)
