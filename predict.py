"""Read handwritten digits from pictures: photographs, scans and drawings, of one digit each.

Usage:
    python predict.py digit.png photo.jpg       # a line a picture: the digit, how sure, and the runner-up
    python predict.py --json *.png              # for programs: a JSON object a line, with the ten probabilities
    python predict.py --show photo.jpg          # also write seen.png: each picture beside what the network saw
    python predict.py - < digit.png             # a picture from standard input
"""

import argparse
import io
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

import mnist

SIDE = 160  # pixels; a larger picture is reduced to this before the digit is looked for
MAX_BYTES = 2**28  # of standard input, which may never end
SEEN = "seen.png"  # a fixed name, so that --show can never overwrite a picture given to it


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


def extent(ink):
    """Return the slices of rows and columns that hold all of the ink (H, W)."""
    lines = [ink.amax(dim=other).nonzero() for other in (1, 0)]
    return tuple(slice(int(line[0]), int(line[-1]) + 1) for line in lines)


def centre(ink):
    """Return the row and the column of the ink's (H, W) centre of mass, in pixels."""
    return [
        float((ink.sum(dim=other) * torch.arange(size)).sum() / ink.sum())
        for size, other in zip(ink.shape, (1, 0), strict=True)
    ]


def is_mnist(grey):
    """Whether the picture is in MNIST's form already; the limits are those of its 70,000 digits."""
    if grey.shape != (28, 28) or not grey.any():
        return False
    longer = max(part.stop - part.start for part in extent(grey))
    return longer in (19, 20) and all(abs(mean - 14) < 0.6 for mean in centre(grey))


def slide(pool, image, window):
    """Pool the image (H, W) over a window by window square, for an odd window, without changing its shape."""
    for kernel in ((window, 1), (1, window)):
        image = pool(image[None, None], kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))[0, 0]
    return image


def dilate(image, window):
    return slide(F.max_pool2d, image, window)


def polarity(grey):
    """Return 1 for light ink on a dark ground and -1 for dark ink on a light one."""
    height, width = grey.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)
    margin = max(1, min(height, width) // 16)
    border = torch.ones_like(grey, dtype=torch.bool)
    border[margin:-margin, margin:-margin] = False
    # What continues the border smoothly is ground, however unevenly lit; what departs from it furthest is ink.
    surface = terms @ torch.linalg.lstsq(terms[border], grey[border, None], driver="gelsd").solution
    return 1 if ((grey - surface[..., 0]) ** 3).sum() > 0 else -1


def strokes(strong):
    """Number the connected parts of the mask (H, W): int64 (H, W), 0 outside them."""
    labels = torch.arange(1, strong.numel() + 1).view(strong.shape) * strong
    while True:
        # Each pixel takes the highest number around it, then the one that the pixel of that number has by now.
        grown = dilate(labels.float(), 3).long() * strong
        grown = F.pad(grown.flatten(), (1, 0))[grown]
        if torch.equal(grown, labels):
            return labels
        labels = grown


def find_ink(grey):
    """Return how much ink there is in each pixel of a picture (H, W), from 0 to 1.

    Raises UserError where there is none.
    """
    grey = grey * polarity(grey)
    # The ground is what is left of a reduced copy after opening it by a window that no stroke fills.
    step = max(1, max(grey.shape) // 40)
    ground = F.avg_pool2d(grey[None, None], step, ceil_mode=True)
    window = max(ground.shape) // 4 * 2 + 1
    ground = dilate(-dilate(-ground[0, 0], window), window)
    ink = grey - F.interpolate(ground[None, None], grey.shape, mode="bilinear")[0, 0]
    ink = ink - ink.median()
    noise = 1.5 * ink.abs().median()  # the standard deviation, if it is normal
    while True:
        smooth = slide(F.avg_pool2d, ink, 3)
        level = smooth.max()
        if level < max(8, 4 * noise):
            raise mnist.UserError("there is nothing to be seen on it")
        strong = smooth > 0.4 * level
        labels = strokes(strong)
        border = torch.cat([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
        # No stroke runs along most of an edge of the picture, but a shadow or the edge of a table does.
        edges = [part for part in border[border > 0].unique() if (border == part).sum() > 0.15 * len(border)]
        edge = torch.isin(labels, torch.tensor(edges))
        if not edges or not (strong & ~edge).any():
            break
        ink = ink * (dilate(edge.float(), 5) == 0)
    mass = torch.bincount(labels.flatten(), ink.clamp_min(0).flatten())
    mass[0] = 0
    kept = mass[labels] > 0.05 * mass.max()  # the rest are specks
    kept = dilate(kept.float(), max(grey.shape) // 64 * 2 + 3)
    floor = torch.maximum(0.1 * level, 2 * noise)
    return kept * ((ink - floor) / (level - floor)).clamp(0, 1)


def prepare(image):
    """Bring a PIL image of one digit to MNIST's form: white on black, uint8 (28, 28).

    The digit fits a box of 20 x 20 pixels, and its centre of mass is the centre of the whole.
    An image that is in this form already comes through unchanged. Raises UserError where there is no ink.
    """
    grey = torch.from_numpy(np.array(to_grey(image), dtype=np.float32))
    if is_mnist(grey):
        return grey.byte()
    ink = find_ink(grey)
    ink = ink[extent(ink)]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0]
    top, left = (min(max(0, round(14 - mean)), 28 - side) for mean, side in zip(centre(ink), size, strict=True))
    digit = torch.zeros(28, 28, dtype=torch.uint8)
    digit[top : top + size[0], left : left + size[1]] = (ink * 255 / ink.max()).round().byte()
    return digit


# --- Reading and answering -----------------------------------------------------------------------------------------


def read_picture(name):
    """Return the picture in the file `name` ("-" is standard input) as a PIL image of at most 89 million pixels.

    Raises UserError where there is no such picture: no file, no image, one cut short, too large, or an animation.
    """
    try:
        source = io.BytesIO(sys.stdin.buffer.read(MAX_BYTES)) if name == "-" else name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow murmurs about a damaged file: an error says it in one line
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source)
            # A telephone's MPO holds the photograph first, then the same for other uses.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise mnist.UserError(f"it holds {image.n_frames} pictures: save one of them on its own")
            image.draft("L", (SIDE, SIDE))  # spares decoding a JPEG at a size that is not wanted
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise mnist.UserError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise mnist.UserError("it is no image that Pillow can read") from error
    except OSError as error:
        raise mnist.UserError(error.strerror or f"it is damaged: {error}") from error
    except (SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error) as error:
        raise mnist.UserError(f"it is damaged: {error}") from error
    return image


def find_weights(path=None):
    """Return `path` if it is given, else mnist.pt of the current folder if there is one, else pretrained.pt."""
    own = Path("mnist.pt")
    return path or (own if own.exists() else Path(__file__).with_name("pretrained.pt"))


@torch.inference_mode()
def classify(model, images):
    """Return the probabilities (N, 10) that the model gives to uint8 images (N, 28, 28) in MNIST's form."""
    loader = mnist.Loader(images, torch.zeros(len(images)), mnist.TEST_BATCH)
    return torch.cat([model(data).softmax(dim=1) for data, _ in map(loader.batch, loader)])


def contact_sheet(rows):
    """Return an image with a row for each (picture, what the network saw (28, 28), caption)."""
    side, gap = 224, 16
    sheet = Image.new("RGB", (2 * side + 3 * gap, gap + len(rows) * (side + 3 * gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (picture, seen, caption) in enumerate(rows):
        top = gap + row * (side + 3 * gap)
        sheet.paste(ImageOps.pad(picture, (side, side), color="lightgrey"), (gap, top))
        seen = Image.fromarray(seen.numpy()).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(seen, (2 * gap + side, top))
        while draw.textlength(caption, font) > 2 * side + gap:
            caption = "…" + caption[2:]
        draw.text((gap, top + side + 4), caption, "black", font)
    return sheet


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="predict.py", description="Read handwritten digits from pictures.")
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="an image file of one digit; - is standard input"
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with the ten probabilities")
    parser.add_argument("--show", action="store_true", help=f"write {SEEN}: each picture beside what the network saw")
    return parser.parse_args(argv)


def main(argv=None):
    """Print a line for each picture that `argv` names (sys.argv[1:] if None); the exit status is 1 if any failed.

    Returns a dictionary for each: "picture", "digit" and "probabilities".
    """
    args = parse_args(argv)
    weights = find_weights(args.model)
    model, _ = mnist.load(weights)
    print(f"Using the weights in {weights}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name can be any bytes

    results, rows = [], []
    for name in args.pictures:
        try:
            image = read_picture(name)
            seen = prepare(image)
        except mnist.UserError as error:
            print(f"predict.py: error: {name}: {error}", file=sys.stderr)
            continue
        probabilities = classify(model, seen[None])[0]
        first, second = probabilities.argsort(descending=True)[:2].tolist()
        answer = f"{first} ({probabilities[first]:.1%}), else {second} ({probabilities[second]:.1%})"
        results.append({"picture": name, "digit": first, "probabilities": probabilities.tolist()})
        print(json.dumps(results[-1]) if args.json else f"{name}: {answer}")
        if args.show:
            rows.append((to_grey(image).convert("L"), seen, f"{name}: {answer}"))
    if rows:
        try:
            contact_sheet(rows).save(SEEN)
        except OSError as error:
            raise mnist.UserError(f"cannot write {SEEN}: {error.strerror}") from error
    if len(results) < len(args.pictures):
        sys.exit(1)
    return results


if __name__ == "__main__":
    mnist.run(main)
