"""Read handwritten digits from pictures: photographs, scans and drawings, of one digit each.

Usage:
    python predict.py digit.png photo.jpg       # a line for each: the digit, its probability, and the runner-up
    python predict.py --json *.png              # for programs: a line of JSON for each, with the ten probabilities
    python predict.py --show photo.jpg          # also write seen.png: each picture beside what the network saw
    python predict.py - < digit.png             # a picture from standard input
"""

import argparse
import glob
import io
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I and PYTHONSAFEPATH leave it out
import mnist

SIDE = 160  # pixels; a larger picture is first reduced to this
MAX_BYTES = 2**28  # of standard input, which may never end
SHEET = Path("seen.png")  # what --show writes


# --- Any picture in MNIST's form -----------------------------------------------------------------------------------


def to_grey(image):
    """Return a PIL image of any mode in grey (mode L or F, 0 to 255), upright, neither side above SIDE."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = image.convert("F").point(lambda value: value * (1 / 257) + 0)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image.thumbnail((SIDE, SIDE))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "F"):
        image = image.convert("RGB").convert("L")
    image.thumbnail((SIDE, SIDE))
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


def polarity(grey):
    """Return 1 if a picture (H, W) shows light ink on a dark ground, and -1 if dark ink on a light one."""
    height, width = grey.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    margin = max(1, min(height, width) // 16)
    border = np.ones_like(grey, dtype=bool)
    border[margin:-margin, margin:-margin] = False
    # A smooth surface through the border is the ground, however uneven the light; what departs most from it is ink.
    coefficients = np.linalg.lstsq(terms[border], grey[border], rcond=None)[0]
    return 1 if ((grey - terms @ coefficients) ** 3).sum() > 0 else -1


def find_ink(grey):
    """Return how much ink there is in each pixel of a picture (H, W), from 0 to 1; all zeros if nothing stands out."""
    grey = grey * polarity(grey)
    side = max(grey.shape)
    # The ground is what remains after an opening with a window too large for any stroke to fill.
    ground = ndimage.grey_opening(ndimage.uniform_filter(grey, max(1, side // 40)), size=(side // 2, side // 2))
    ink = grey - ground
    ink -= np.median(ink)
    noise = 1.5 * np.median(np.abs(ink))  # the standard deviation, if it is normal
    while True:
        smooth = ndimage.uniform_filter(ink, 3, mode="constant")
        level = smooth.max()
        if level < max(8, 4 * noise):
            return np.zeros_like(ink)
        labels, count = ndimage.label(smooth > 0.4 * level, np.ones((3, 3)))
        border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
        # No stroke runs along most of an edge of the picture, but a shadow or the edge of a table does.
        at_edge = np.bincount(border, minlength=count + 1) > 0.15 * len(border)
        at_edge[0] = False
        if not 0 < at_edge.sum() < count:
            break
        ink[ndimage.maximum_filter(at_edge[labels], 5)] = 0
    mass = ndimage.sum_labels(ink.clip(0), labels, range(count + 1))
    mass[0] = 0
    kept = (mass > 0.05 * mass.max())[labels]  # the rest are specks
    kept = ndimage.maximum_filter(kept, side // 64 * 2 + 3)
    floor = max(0.1 * level, 2 * noise)
    return kept * ((ink - floor) / (level - floor)).clip(0, 1)


def prepare(image):
    """Bring a PIL image of one digit to MNIST's form: white on black, uint8 (28, 28).

    The digit fits a box of 20 x 20 pixels, and its centre of mass is the centre of the whole.
    An image that is in this form already comes through unchanged. Raises UserError if there is no ink.
    """
    grey = np.array(to_grey(image), dtype=np.float32)
    if is_mnist(grey):
        return torch.from_numpy(grey).byte()
    ink = find_ink(grey)
    if not ink.any():
        raise mnist.UserError("there is nothing to be seen on it")
    ink = ink[bounding_box(ink)]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))
    y, x = ndimage.center_of_mass(ink)
    top, left = min(max(0, round(14 - y)), 28 - height), min(max(0, round(14 - x)), 28 - width)
    digit = np.zeros((28, 28), dtype=np.uint8)
    digit[top : top + height, left : left + width] = (ink * (255 / ink.max())).round()
    return torch.from_numpy(digit)


# --- Reading and answering -----------------------------------------------------------------------------------------


def read_picture(name):
    """Return the picture in the file `name` ("-" is standard input) as a PIL image of at most 89 million pixels.

    Raises UserError if there is no such picture: no file, no image, one cut short, too large, or an animation.
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
            image.draft("L", (SIDE, SIDE))  # saves decoding a JPEG at full size
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise mnist.UserError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise mnist.UserError("not an image Pillow can read") from error
    except OSError as error:
        raise mnist.UserError(error.strerror or f"it is damaged: {error}") from error
    except (SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error) as error:
        raise mnist.UserError(f"it is damaged: {error}") from error
    return image


def contact_sheet(rows):
    """Return an image with a row for each (picture, digit as the network saw it (28, 28), caption)."""
    side, gap = 224, 16
    sheet = Image.new("RGB", (2 * side + 3 * gap, gap + len(rows) * (side + 3 * gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (picture, digit, caption) in enumerate(rows):
        top = gap + row * (side + 3 * gap)
        sheet.paste(ImageOps.pad(picture, (side, side), color="lightgrey"), (gap, top))
        digit = Image.fromarray(digit.numpy()).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(digit, (2 * gap + side, top))
        while draw.textlength(caption, font) > 2 * side + gap:
            caption = "…" + caption[2:]
        draw.text((gap, top + side + 4), caption, "black", font)
    return sheet


def expand(pattern):
    """Return the names of the files that match `pattern`, which Windows' shells leave as it is; itself if none does."""
    return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) or [pattern]


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="predict.py", description="Read handwritten digits from pictures.")
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="an image file of one digit; - is standard input")
    add("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    add("--json", action="store_true", help="print a line of JSON for each picture, with the ten probabilities")
    add("--show", action="store_true", help=f"write {SHEET}: each picture beside what the network saw")
    args = parser.parse_args(argv)
    args.pictures = [name for pattern in args.pictures for name in expand(pattern)]
    if args.show and SHEET.resolve() in [Path(name).resolve() for name in args.pictures]:
        parser.error(f"argument --show: it would overwrite the picture {SHEET}: rename that first")
    return args


def main(argv):
    """Print a line for each picture that `argv` names; the exit status is 1 if any failed.

    Returns a dictionary for each: "picture", "digit" and "probabilities".
    """
    args = parse_args(argv)
    weights = mnist.find_weights(args.model)
    model, _ = mnist.load(weights)
    print(f"Using the weights in {weights}", file=sys.stderr)

    results, rows = [], []
    for name in args.pictures:
        try:
            image = read_picture(name)
            digit = prepare(image)
        except mnist.UserError as error:
            print(f"predict.py: error: {name}: {error}", file=sys.stderr)
            continue
        probabilities = mnist.classify(model, digit[None])[0].softmax(dim=0)
        first, second = probabilities.argsort(descending=True)[:2].tolist()
        answer = f"{first} ({probabilities[first]:.1%}), else {second} ({probabilities[second]:.1%})"
        results.append({"picture": name, "digit": first, "probabilities": probabilities.tolist()})
        print(json.dumps(results[-1]) if args.json else f"{name}: {answer}")
        if args.show:
            rows.append((to_grey(image).convert("L"), digit, f"{name}: {answer}"))
    if rows:
        buffer = io.BytesIO()
        contact_sheet(rows).save(buffer, "PNG")
        mnist.write(buffer.getvalue(), SHEET)
    if len(results) < len(args.pictures):
        sys.exit(1)
    return results


if __name__ == "__main__":
    mnist.run(main)
