"""What was found on pictures, as a picture."""

import io
import itertools

import mnist
from reader.picture import to_grey

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE, GAP = 224, 16  # pixels
MOST = 200  # rows: browsers show no image that is much higher


def printable(text):
    """Return `text` in one line, with escapes instead of what would move the cursor or change colours."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_row(image, lines, caption):
    """Return a row for write(): a PIL image with a box around each digit, what the network saw, the caption."""
    image = ImageOps.exif_transpose(image)
    size = [max(1, round(SIDE * side / max(image.size))) for side in image.size]
    picture = to_grey(image).convert("RGB").resize(size)
    for digit in itertools.chain(*lines):
        left, top, right, bottom = (SIDE / max(image.size) * edge for edge in digit.box)
        ImageDraw.Draw(picture).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline="red")
    seen = np.zeros((28 * max(1, len(lines)), 28 * max(map(len, lines), default=1)), dtype=np.uint8)
    for y, line in enumerate(lines):
        for x, digit in enumerate(line):
            seen[28 * y : 28 * y + 28, 28 * x : 28 * x + 28] = digit.pixels
    seen = ImageOps.contain(Image.fromarray(seen), (SIDE, SIDE), Image.Resampling.NEAREST)
    row = Image.new("RGB", (2 * SIDE + 3 * GAP, SIDE + 3 * GAP), "white")
    for left, part in ((GAP, picture), (2 * GAP + SIDE, seen)):
        row.paste(ImageOps.pad(part, (SIDE, SIDE), color="lightgrey"), (left, GAP))
    draw, font, caption = ImageDraw.Draw(row), ImageFont.load_default(16), printable(caption)
    while draw.textlength(caption, font) > 2 * SIDE + GAP:
        caption = caption[:-2] + "…"
    draw.text((GAP, SIDE + GAP + 4), caption, "black", font)
    return row


def write(rows, path):
    """Write a PNG file of to_row()'s rows."""
    sheet = Image.new("RGB", (rows[0].width, len(rows) * rows[0].height))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * row.height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    mnist.write(path, buffer.getvalue())
