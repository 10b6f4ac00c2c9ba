"""predict.py: pictures brought to MNIST's form, and what it answers."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import mnist
from benchmarks import pictures
from tools import predict, weights

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy import ndimage
from sklearn.datasets import load_digits

ROOT = Path(mnist.__file__).parent

posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")


def seven(size=100, left=30, top=20):
    """Return a 7 in dark ink on light paper, 25 x 40 pixels, as an array (size, size)."""
    pixels = np.full((size, size), 230, dtype=np.uint8)
    pixels[top : top + 6, left : left + 25] = 30
    pixels[top : top + 40, left + 19 : left + 25] = 30
    return pixels


@functools.cache
def pretrained():
    return weights.load(weights.PRETRAINED)[0]


def read(image, single=False):
    """Return (number, digits) of an image or of the pixels of one."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    lines, sure = predict.read(pretrained(), image, single)
    return predict.as_result("", lines, sure, 1)["number"], [digit for line in lines for digit in line]


def prepared(image):
    """Return the one digit on a picture as the network saw it."""
    (digit,) = read(image)[1]
    return digit.pixels


def difference(one, other):
    """Return the mean difference of two prepared images, 0 to 1."""
    return ((one.float() - other.float()).abs().mean() / 255).item()


# --- MNIST's form --------------------------------------------------------------------------------------------------


def test_digit_fits_and_is_centred():
    digit = prepared(seven())
    rows, columns = predict.bounding_box(digit.numpy())
    assert rows.stop - rows.start == 20
    assert columns.stop - columns.start == pytest.approx(20 * 25 / 40, abs=1)
    assert ndimage.center_of_mass(digit.numpy()) == pytest.approx((14, 14), abs=0.6)
    assert digit[0, 0] == 0
    assert digit.max() == 255
    assert 0 < ((digit > 0) & (digit < 255)).sum() < 200  # anti-aliased


def test_mnists_form_is_unchanged():
    digit = prepared(seven())
    assert torch.equal(prepared(digit.numpy()), digit)
    assert torch.equal(prepared(np.stack([digit.numpy()] * 3, axis=-1)), digit)
    assert torch.equal(prepared(digit.numpy().astype(np.uint16) * 257), digit)


@pytest.mark.parametrize(
    ("spoil", "limit"),
    [
        (lambda d: 255 - d, 0.03),
        (lambda d: np.roll(d, 3, axis=1), 0.03),
        (lambda d: d // 2 + 20, 0.04),  # rounding makes it a column wider
    ],
)
def test_other_28_x_28_is_brought_to_form(spoil, limit):
    digit = prepared(seven())
    again = prepared(spoil(digit.numpy()))
    assert not torch.equal(again, torch.from_numpy(spoil(digit.numpy())))
    assert difference(again, digit) < limit


def test_mnist_is_unchanged():
    (training, _), (testing, _) = mnist.load_mnist(mnist.DATA_DIR)
    assert all(predict.is_mnist(image) for images in (training, testing) for image in images.numpy())
    assert all(torch.equal(prepared(image.numpy()), image) for image in testing[:100])


def mask(pixels):
    return pixels > 127


@pytest.mark.parametrize(
    ("change", "file_format"),
    [
        (lambda pixels: mask(pixels).astype(np.uint8), "PNG"),
        (lambda pixels: np.stack([mask(pixels).astype(np.uint8)] * 3, axis=-1), "PNG"),
        (lambda pixels: mask(pixels).astype(np.uint16), "PNG"),
        (lambda pixels: pixels // 16, "PNG"),
        (lambda pixels: pixels.astype(np.uint16), "PNG"),
        (lambda pixels: pixels.astype(np.uint16) + 30_000, "PNG"),
        (lambda pixels: pixels.astype(np.uint16) * 16, "TIFF"),
        (lambda pixels: pixels.astype(np.int32), "TIFF"),
        (lambda pixels: pixels.astype(np.int32) * 2**20, "TIFF"),
        (lambda pixels: (pixels / 255).astype(np.float32), "TIFF"),
        (lambda pixels: ((pixels / 255 - mnist.MEAN) / mnist.STD).astype(np.float32), "TIFF"),
        (lambda pixels: np.kron(1 - mask(pixels), np.ones((8, 8))).astype(np.uint8), "PNG"),  # inverted, and larger
    ],
)
def test_any_range_is_read(change, file_format):
    """The first five test digits, saved in another range or type than 0 to 255 in 8 bits."""
    _, (images, labels) = mnist.load_mnist(mnist.DATA_DIR)
    files = [stored(Image.fromarray(change(image.numpy())), file_format) for image in images[:5]]
    assert [read(file)[0] for file in files] == labels[:5].numpy().astype(str).tolist()


def test_range_of_a_small_form_is_stretched():
    digit = prepared(seven())
    assert difference(prepared((digit // 16).numpy()), digit) < 0.02


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_black(value):
    digit = prepared(seven())
    pixels = digit.numpy() / np.float32(255)
    pixels[0, 0] = value
    assert difference(prepared(pixels), digit) < 0.01


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_blank_floats_hold_no_ink(value):
    with pytest.raises(mnist.UserError, match="no digit to be seen"):
        read(np.full((28, 28), value, dtype=np.float32))


def lit(pixels):
    return (pixels * np.linspace(0.4, 1, pixels.shape[1])).astype(np.uint8)


def shadowed(pixels):
    pixels = pixels.copy()
    pixels[:, 75:] //= 3  # darker than the ink is faint
    return pixels


def on_a_table(pixels):
    pixels = pixels.copy()
    pixels[97:] = 60  # the paper ends here
    return pixels


def speckled(pixels):
    pixels = pixels.copy()
    pixels[90:92, 90:92] = pixels[5:7, 90:92] = pixels[85:87, 4:6] = 0
    return pixels


def noisy(pixels):
    noise = np.random.default_rng(0).normal(0, 12, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("spoil", [lit, shadowed, on_a_table, speckled, noisy, lambda pixels: 255 - pixels])
def test_surroundings_make_no_difference(spoil):
    assert difference(prepared(spoil(seven())), prepared(seven())) < 0.03


def test_scale_and_place_do_not_matter():
    large = np.kron(seven(), np.ones((9, 9), dtype=np.uint8))
    assert difference(prepared(large), prepared(seven())) < 0.03
    assert difference(prepared(seven(size=150, left=100, top=90)), prepared(seven())) < 0.03


def stored(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def transparent(image, colour=30):
    """Ink on a transparent background whose hidden colour is that of the ink."""
    ink = Image.new("RGBA", image.size, (colour, colour, colour, 255))
    ink.putalpha(ImageOps.invert(image))
    return ink


def on_its_side(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image.convert("1", dither=Image.Dither.NONE),
        lambda image: image.convert("RGB"),
        lambda image: stored(image.convert("P")),
        lambda image: stored(image.convert("CMYK"), "TIFF"),
        lambda image: stored(Image.fromarray(np.asarray(image).astype(np.uint16) * 257)),
        lambda image: stored(transparent(image)),
        lambda image: stored(transparent(image).convert("LA")),
        lambda image: stored(transparent(image, colour=255)),
        lambda image: stored(image.convert("RGBA")),
        lambda image: stored(image.point(lambda value: 200 + value // 5).convert("RGBA")),  # faint, but opaque
        lambda image: stored(ImageOps.expand(image.convert("RGBA"), 20)),  # a card on a transparent background
        lambda image: stored(image, "HEIF", quality=90),
        on_its_side,
    ],
)
def test_every_mode_gives_one_digit(convert):
    image = Image.fromarray(seven())
    assert difference(prepared(convert(image)), prepared(image)) < 0.03


# --- Surroundings --------------------------------------------------------------------------------------------------


def draw(pixels, *lines, width=2, ink=30):
    """Draw straight lines (x, y, x, y), as dark as the ink."""
    image = Image.fromarray(pixels)
    for line in lines:
        ImageDraw.Draw(image).line(line, fill=ink, width=width)
    return np.array(image)


def cropped(pixels, margin=0):
    return pixels[20 - margin : 60 + margin, 30 - margin : 55 + margin]


def boxed(pixels):
    return draw(pixels, (9, 9, 90, 9), (90, 9, 90, 90), (90, 90, 9, 90), (9, 90, 9, 9))


def form_cell(pixels):
    """Print lines around that go on beyond the picture, as in a table of cells."""
    return draw(pixels, (0, 4, 99, 4), (0, 93, 99, 93), (5, 0, 5, 99), (94, 0, 94, 99), width=3)


def ruled(pixels):
    return draw(pixels, *[(0, y, 99, y) for y in range(11, 100, 22)], width=3)


def squared(pixels):
    return draw(ruled(pixels), *[(x, 0, x, 99) for x in range(11, 100, 22)], width=3)


def on_a_table(pixels, size, place):
    """Photograph it, a little askew, on a dark table of this width and height."""
    table = Image.new("L", size, 70)
    sheet = Image.fromarray(pixels).convert("LA").rotate(3, Image.Resampling.BICUBIC, expand=True)
    table.paste(sheet, place, sheet.getchannel("A"))
    return np.array(table)


def beside_a_table(pixels):
    """Show a strip of the table on the left of the sheet."""
    return np.pad(pixels, ((0, 0), (20, 0)), constant_values=70)


def stained(pixels):
    """Leave a pale stain, a third as dark as the ink and larger."""
    pixels = pixels.copy()
    pixels[68:94, 60:90] = 170
    return pixels


def scratched(pixels):
    """Draw a scratch, half as high as the digit but much thinner."""
    pixels = pixels.copy()
    pixels[30:51, 80] = 60
    return pixels


def pale_in_part(pixels):
    """Press the pencil less on the lower half of the stem: a third as dark."""
    pixels = pixels.copy()
    pixels[38:60, 49:55] = 163
    return pixels


@pytest.mark.parametrize(
    "spoil",
    [
        cropped,
        lambda pixels: cropped(pixels, margin=1),
        lambda pixels: 255 - cropped(pixels),
        boxed,
        form_cell,
        ruled,
        squared,
        lambda pixels: 255 - squared(pixels),
        lambda pixels: on_a_table(pixels, (160, 150), (35, 20)),
        beside_a_table,
        stained,
        scratched,
        pale_in_part,
        lambda pixels: lit(squared(pixels)),
        lambda pixels: noisy(boxed(pixels)),
    ],
)
def test_seven_is_read_wherever_it_is(spoil):
    number, (digit,) = read(spoil(seven()))
    assert number == "7"
    assert difference(digit.pixels, prepared(seven())) < 0.12


def test_bar_of_a_four_in_a_narrow_box_is_no_line():
    box = (11, 11, 68, 11), (68, 11, 68, 88), (68, 88, 11, 88), (11, 88, 11, 11)
    assert read(draw(four(), *box, width=3)[6:94, 6:74])[0] == "4"


def test_straight_digit_is_no_line():
    pixels = np.full((60, 20), 230, dtype=np.uint8)
    pixels[:, 8:12] = 30
    assert read(pixels)[0] == "1"


def test_thick_digit_is_no_frame():
    thick = ImageOps.invert(Image.fromarray(four())).filter(ImageFilter.MaxFilter(7))
    assert read(thick.crop(thick.point(lambda value: 255 * (value > 100)).getbbox()))[0] == "4"


@pytest.mark.parametrize("times", [1, 8])
def test_tiny_digits_are_read(times):
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images[:100]]
    numbers = [read(image.resize((8 * times, 8 * times), Image.Resampling.BICUBIC))[0] for image in images]
    assert np.mean(np.array(numbers) == digits.target[:100].astype(str)) >= 0.9


def test_narrow_sheet_is_no_sheet():
    light = np.zeros((60, 6), dtype=bool)
    light[3:57, 1:5] = True
    assert predict.find_sheet(light) is None


@pytest.mark.filterwarnings("error")
def test_blank_sheet_holds_no_ink():
    sheet = np.full((90, 90), 200, dtype=np.float32)
    assert predict.find_ink(-predict.flatten(sheet, sheet > 0)) is None


@pytest.mark.filterwarnings("error")
@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["noise", "slope", "step", "specks", "alpha"]))
@example(1, 20, "step")
@example(8, 1, "step")
def test_any_picture_is_read_or_refused(width, height, kind):
    rng = np.random.default_rng(0)
    pixels = {
        "noise": rng.integers(0, 256, (height, width)),
        "slope": np.add.outer(np.arange(height), np.arange(width)) % 256,
        "step": np.tile(np.arange(width) > width / 2, (height, 1)) * 255,
        "specks": (rng.random((height, width)) > 0.02) * 255,
        "alpha": rng.integers(0, 256, (height, width)),
    }[kind]
    image = Image.fromarray(pixels.astype(np.uint8))
    if kind == "alpha":
        image = Image.merge("LA", (image, image))
    try:
        digits = read(image)[1]
    except mnist.UserError:
        return
    for digit in digits:
        left, top, right, bottom = digit.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


# --- Several digits ------------------------------------------------------------------------------------------------


def four(size=100, left=20, top=20):
    """Return an open 4 in dark ink on light paper, 40 x 60 pixels, as an array (size, size)."""
    x, y = left, top
    lines = [(x + 10, y, x, y + 35), (x, y + 35, x + 40, y + 35), (x + 30, y + 10, x + 30, y + 60)]
    return draw(np.full((size, size), 230, dtype=np.uint8), *lines, width=6)


def test_digits_are_read_from_left_to_right():
    number, digits = read(np.concatenate([four(), seven(), seven(), four()], axis=1))
    assert number == "4774"
    lefts = [digit.box[0] for digit in digits]
    assert lefts == sorted(lefts)
    assert digits[1].box == pytest.approx([130, 20, 155, 60], abs=3)
    assert difference(digits[1].pixels, prepared(seven())) < 0.05


def test_digits_in_a_box_on_squared_paper():
    pixels = np.concatenate([four(), seven()], axis=1)
    lines = [(0, y, 199, y) for y in range(8, 100, 22)] + [(x, 0, x, 99) for x in range(11, 200, 22)]
    assert read(draw(pixels, *lines))[0] == "47"


def test_slanted_neighbours_are_two_digits():
    lines = [(60, 20, 30, 80), (90, 20, 60, 80)]  # the second begins where the first has not ended
    assert read(draw(np.full((100, 110), 230, dtype=np.uint8), *lines, width=6))[0] == "11"


def test_parts_of_one_digit_stay_together():
    five = draw(np.full((100, 100), 230, dtype=np.uint8), (40, 20, 68, 20), width=5)  # the loose bar
    image = Image.fromarray(five)
    ImageDraw.Draw(image).line((36, 30, 36, 48, 50, 46), fill=30, width=5)
    ImageDraw.Draw(image).arc((30, 45, 66, 82), -90, 150, fill=30, width=5)
    number, digits = read(image)
    assert len(digits) == 1
    assert number == "5"


def test_specks_and_dots_are_no_digits():
    pixels = seven()
    pixels[85:91, 80:86] = pixels[10:14, 8:12] = 30  # a dot behind a signature, and a stain
    assert read(boxed(pixels))[0] == "7"


def test_single_keeps_to_one_digit():
    (digit,) = read(np.concatenate([four(), seven()], axis=1), single=True)[1]
    assert digit.box == pytest.approx([20, 20, 155, 80], abs=3)


@pytest.mark.parametrize("turn", [lambda image: image, on_its_side])
def test_boxes_are_in_pixels_of_the_upright_picture(turn, folder):
    pixels = np.kron(np.concatenate([four(), seven()], axis=1), np.ones((12, 12), dtype=np.uint8))
    image = turn(Image.fromarray(pixels))
    image.save("a.jpg", exif=image.getexif())
    (result,) = predict.main(["--model", str(weights.PRETRAINED), "--json", "a.jpg"])
    assert result["number"] == "47"
    assert result["digits"][1]["box"] == pytest.approx([12 * side for side in (130, 20, 155, 60)], abs=30)


# --- Numbers, lines and what is no digit ---------------------------------------------------------------------------


def write(number, gap=16, margin=30):
    """Return a number in test digits, the second of each, in dark ink on light paper: an array (112 + 2 margin, W)."""
    _, (images, labels) = mnist.load_mnist(mnist.DATA_DIR)
    ink, left = np.zeros((112 + 2 * margin, 112 * len(number) + 2 * margin), dtype=np.uint8), margin
    for digit in map(int, number):
        image = Image.fromarray(images[labels == digit][1].numpy()).resize((112, 112), Image.Resampling.BICUBIC)
        pixels = np.asarray(image.crop((image.getbbox()[0], 0, image.getbbox()[2], 112)))
        place = ink[margin : margin + 112, left : left + pixels.shape[1]]
        np.maximum(place, pixels, out=place)
        left += pixels.shape[1] + gap
    return 230 - (ink[:, : left - gap + margin] * 0.8).astype(np.uint8)


def tilted_rule(pixels):
    """Rule a line a little askew, through the feet of the digits."""
    height, width = pixels.shape
    return draw(pixels, (0, height - 42, width, height - 30), width=3)


def low(pixels):
    """Crop a strip so low that an upright stroke is as high as the picture."""
    return pixels[46:126]


def coarse(pixels):
    """Scan it so coarsely that a digit is eight pixels high."""
    image = Image.fromarray(pixels)
    return np.array(image.resize((16 * image.width // image.height, 16), Image.Resampling.LANCZOS))


def vignetted(pixels):
    """Let the light fall on the middle, and leave the corners a third of it."""
    height, width = pixels.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (pixels * (1 - (x**2 + y**2) / 3)).astype(np.uint8)


def cut_out_of_a_form(pixels):
    """Leave the border of a cell along the left edge of the picture."""
    return draw(pixels, (0, 0, 3, len(pixels)), width=6)


def with_a_short_stroke(pixels):
    """Draw an upright stroke on the left, less than a third as high as the digit."""
    return draw(pixels, (8, 64, 10, 86), width=8)


def strip_on_a_table(pixels):
    """Put it in the corner of a table, lit from one side."""
    height, width = pixels.shape
    return lit(on_a_table(pixels, (round(1.7 * width), round(1.7 * height)), (5, 5)))


@pytest.mark.parametrize(
    ("number", "change"),
    [
        ("18242", lambda pixels: pixels),
        ("1234567890", lambda pixels: pixels),
        ("2907", tilted_rule),
        ("4213", low),
        ("358", lit),
        ("358", vignetted),
        ("358", strip_on_a_table),
        ("358", lambda pixels: strip_on_a_table(tilted_rule(pixels))),
        ("8", cut_out_of_a_form),
        ("3", with_a_short_stroke),
        ("0123456789", coarse),
        ("18242", lambda pixels: np.pad(pixels, 200, constant_values=230)),
    ],
)
def test_number_is_read(number, change):
    assert read(change(write(number)))[0] == number


@pytest.mark.parametrize("number", ["35", "27", "2806", "50", "43", "6984"])
def test_touching_digits_are_cut(number):
    lines, sure = predict.read(pretrained(), Image.fromarray(write(number, gap=-12)))
    assert predict.as_result("", lines, sure, 1)["number"] == number
    assert not sure


def test_lines_are_read_from_top_to_bottom(folder):
    pages = [write("945", margin=15), write("531", margin=15), write("07", margin=15)]
    width = max(page.shape[1] for page in pages)
    rows = [np.pad(page, ((0, 0), (0, width - page.shape[1])), constant_values=230) for page in pages]
    Path("a.png").write_bytes(png(np.concatenate(rows)))
    (result,) = predict.main(["--json", "--model", str(weights.PRETRAINED), "a.png"])
    assert result["number"] == "945 531 07"
    assert [digit["line"] for digit in result["digits"]] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert result["sure"]


def test_small_digit_stays_beside_tall_ones():
    pixels = write("707")
    small = np.asarray(Image.fromarray(write("3", margin=0)).resize((40, 50)))
    pixels = np.concatenate([pixels, np.full((len(pixels), 60), 230, dtype=np.uint8)], axis=1)
    pixels[90:140, -80:-40] = small
    assert read(pixels)[0] == "7073"


def test_long_stem_is_no_one():
    pixels = np.pad(write("1395"), ((0, 130), (0, 0)), constant_values=230)
    lines, sure = predict.read(pretrained(), Image.fromarray(draw(pixels, (177, 134, 177, 267), width=7)))
    assert predict.as_result("", lines, sure, 1)["number"] == "1395"
    assert not sure


def minus(pixels):
    return draw(pixels, (8, 86, 40, 86), width=8)


def point(pixels):
    pixels = pixels.copy()
    pixels[118:130, 158:170] = 30
    return pixels


@pytest.mark.parametrize("mark", [minus, point])
def test_mark_beside_digits_is_not_sure(mark):
    pixels = np.pad(write("25", gap=40), ((0, 0), (30, 0)), constant_values=230)
    assert predict.read(pretrained(), Image.fromarray(pixels))[1]
    lines, sure = predict.read(pretrained(), Image.fromarray(mark(pixels)))
    assert predict.as_result("", lines, sure, 1)["number"] == "25"
    assert not sure


@pytest.mark.parametrize(
    "strokes",
    [
        ["10 10 10 90", "90 10 90 90", "10 50 90 50"],  # H
        ["50 10 50 90", "10 50 90 50"],  # plus
        ["10 30 90 30", "10 70 90 70", "20 90 40 10", "60 90 80 10"],  # hash
        ["10 50 50 10 90 50 10 50 10 90 90 90 90 50"],  # house
    ],
)
def test_what_is_no_digit_is_not_sure(strokes):
    lines = [tuple(map(int, stroke.split())) for stroke in strokes]
    image = Image.new("L", (100, 100), 230)
    for line in lines:
        ImageDraw.Draw(image).line(line, fill=30, width=7)
    assert not predict.read(pretrained(), image)[1]


def test_few_letters_and_shapes_are_sure():
    rng = np.random.default_rng(0)
    images = [pictures.drawn(strokes, rng) for strokes in pictures.LETTERS + pictures.SHAPES]
    assert len(images) == 24
    assert sum(predict.read(pretrained(), image)[1] for image in images) <= 6


# --- predict.py ----------------------------------------------------------------------------------------------------


def bomb():
    """Return the bytes of a PNG file that claims to hold 100,000 x 100,000 pixels."""
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    chunks = [(13).to_bytes(4, "big"), header, zlib.crc32(header).to_bytes(4, "big")]
    return (
        b"\x89PNG\r\n\x1a\n"
        + b"".join(chunks)
        + (0).to_bytes(4, "big")
        + b"IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )


def animation():
    file = io.BytesIO()
    Image.fromarray(seven()).save(file, "GIF", save_all=True, append_images=[Image.fromarray(255 - seven())])
    return file.getvalue()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def equals():
    return draw(np.full((80, 100), 230, dtype=np.uint8), (20, 30, 80, 30), (20, 50, 80, 50), width=5)


def heic():
    file = io.BytesIO()
    Image.fromarray(noisy(seven())).save(file, "HEIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not a picture that can be read (image/png, by its name): save it as PNG or JPEG"),
        (b"Dear diary", "not a picture that can be read (image/png, by its name): save it as PNG or JPEG"),
        (heic()[:500], "damaged"),
        (png(noisy(seven()))[:2000], "damaged"),
        (bomb(), "pixels"),
        (animation(), "2 pictures"),
        (png(np.full((50, 50), 255, dtype=np.uint8)), "no digit to be seen"),
        (png(noisy(np.full((200, 200), 128, dtype=np.uint8))), "no digit to be seen"),
        (png(equals()), "no digit to be seen"),
        (png(np.zeros((1, 1), dtype=np.uint8)), "it has only 1 x 1 pixels"),
        (png(np.array([[255, 0, 255], [0, 0, 0], [255, 0, 0]], dtype=np.uint8)), "it has only 3 x 3 pixels"),
    ],
)
def test_unreadable_picture_is_named(content, reason, folder, capsys):
    if content is not None:
        Path("bad.png").write_bytes(content)
    Path("good.png").write_bytes(png(seven()))
    with pytest.raises(SystemExit) as stop:
        predict.main(["bad.png", "good.png"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out.startswith("good.png: ")
    assert len(out.splitlines()) == 1
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("predict.py: error: bad.png: ")
    assert reason in line


def test_json_holds_every_digit(folder, capsys):
    Path("a.png").write_bytes(png(np.concatenate([four(), seven()], axis=1)))
    (result,) = predict.main(["--json", "--model", str(weights.PRETRAINED), "a.png"])
    assert json.loads(capsys.readouterr().out) == result
    assert result["number"] == "47"
    assert [digit["digit"] for digit in result["digits"]] == [4, 7]
    for digit in result["digits"]:
        assert digit["probability"] == max(digit["probabilities"]) == digit["probabilities"][digit["digit"]]
    assert "digit" not in result


@pytest.mark.parametrize(
    ("tops", "sure", "line"),
    [
        ([[0.95]], True, "a.png: 3 (95.0%), else 9 (0.6%)"),
        ([[0.6]], False, "a.png: 3 (60.0%), else 9 (4.4%), not sure"),
        ([[0.95, 0.9]], True, "a.png: 33 (95.0%, 90.0%)"),
        ([[0.95], [0.9, 0.6]], False, "a.png: 3 33 (95.0%, 90.0%, 60.0%), not sure"),
    ],
)
def test_answer_is_a_line(tops, sure, line):
    def digit(top):
        return predict.Digit([0, 0, 9, 9], None, torch.full((10,), (1 - top) / 9).index_fill(0, torch.tensor(3), top))

    result = predict.as_result("a.png", [[digit(top) for top in tops_of_line] for tops_of_line in tops], sure, 1)
    assert predict.as_text(result) == line


def test_json_holds_ten_probabilities(folder, capsys):
    Path("a.png").write_bytes(png(seven()))
    (result,) = predict.main(["--json", "a.png"])
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    assert result["picture"] == "a.png"
    assert len(result["probabilities"]) == 10
    assert 0 < sum(result["probabilities"]) <= 1  # the rest is that of no digit
    assert result["digit"] == max(range(10), key=result["probabilities"].__getitem__)
    assert err == "Using the weights in mnist.pt\n"


def test_show_writes_a_contact_sheet(folder):
    Path("a.png").write_bytes(png(seven()))
    predict.main(["--show", "a.png", "a.png"])
    with Image.open("seen.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    row = pixels.shape[0] // 2
    assert (pixels[:row, : pixels.shape[1] // 2] == 30).any()  # the ink of the original,
    assert (pixels[:row, pixels.shape[1] // 2 :] == 0).mean() > 0.3  # the black background of MNIST


def test_show_spares_a_picture_of_its_name(folder, capsys):
    Path("seen.png").write_bytes(png(seven()))
    with pytest.raises(SystemExit) as stop:
        predict.main(["--show", "./seen.png"])
    assert stop.value.code == 2
    assert "it would overwrite the picture seen.png" in capsys.readouterr().err
    assert Path("seen.png").read_bytes() == png(seven())


def test_standard_input(folder):
    command = [sys.executable, predict.__file__, "-"]
    done = subprocess.run(command, input=png(seven()), capture_output=True, check=True)
    assert done.stdout.startswith(b"-: ")


@posix
def test_full_disk_is_named(folder, full_disk):
    Path("a.png").write_bytes(png(noisy(seven())))
    Path("seen.png").write_bytes(b"an earlier sheet")
    command = [sys.executable, predict.__file__, "--show", "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=full_disk)
    assert done.returncode == 1
    assert done.stderr.endswith("predict.py: error: seen.png: File too large\n")
    assert Path("seen.png").read_bytes() == b"an earlier sheet"


@posix
def test_closed_standard_input(folder):
    command = [sys.executable, predict.__file__, "-"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: os.close(0))
    assert done.returncode == 1
    assert done.stderr.endswith("predict.py: error: -: there is no standard input: name a file\n")


@posix
def test_closed_standard_error(folder):
    Path("a.png").write_bytes(png(seven()))
    command = [sys.executable, predict.__file__, "a.png", "missing.png"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(2))
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1  # the messages do not take its place


def test_wildcard_that_the_shell_left(folder):
    for name in ("d.png", "b.png", "a.png", "e.png", "c.png", "c1.png", "c[1].png"):
        Path(name).write_bytes(png(seven()))
    assert [result["picture"][0] for result in predict.main(["?.png"])] == ["a", "b", "c", "d", "e"]
    assert [result["picture"] for result in predict.main(["c[1].png"])] == ["c[1].png"]


def test_name_that_the_output_cannot_encode(folder):
    Path("é.png").write_bytes(png(seven()))
    command = [sys.executable, predict.__file__, "é.png"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("\\xe9.png: ")


@pytest.mark.parametrize("script", ["predict.py", "export.py", "report.py"])
def test_isolated_python_finds_mnist(script, tmp_path):
    """As far as the import of torch, which takes a while."""
    path = Path(predict.__file__).with_name(script)
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(path)!r})"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f'File "{mnist.__file__}"' in done.stderr
    assert "import of torch halted" in done.stderr


@pytest.mark.parametrize(
    "module",
    ["tools.weights", "tools.predict", "tools.export", "tools.report", "benchmarks.seeds", "benchmarks.pictures"],
)
def test_mps_falls_back_wherever_one_begins(module):
    """PyTorch reads the variable when it is imported, so mnist.py must come first."""
    code = f"""
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"))
            os._exit(sys.stdout.flush() or 0)

sys.meta_path.insert(0, Finder())
import {module}
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_output_can_be_any_stream(folder):
    Path("a.png").write_bytes(png(seven()))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        predict.main(["a.png"])
    assert out.getvalue().startswith("a.png: ")


def test_missing_weights_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        predict.main(["--model", "absent.pt", "a.png"])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(["--help"])
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_no_picture_is_wrong_usage():
    with pytest.raises(SystemExit) as stop:
        predict.main([])
    assert stop.value.code == 2
