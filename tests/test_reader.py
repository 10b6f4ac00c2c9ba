"""reader/: pictures brought to MNIST's form, and the digits that it finds on them."""

import io
from pathlib import Path

import mnist
import reader
from benchmarks import pictures
from reader import frames, ink, marks, picture, rulings
from tests.drawing import draw, four, mnist_test_set, noisy, png, pretrained, seven
from tools import predict, weights

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy import ndimage
from sklearn.datasets import load_digits


def read(image, single=False):
    """Return (number, digits) of an image or of the pixels of one."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    lines, sure = reader.read(pretrained(), image, single)
    return predict.as_result("", lines, sure, 1)["number"], [digit for line in lines for digit in line]


def prepared(image):
    """Return the one digit on a picture as the network saw it."""
    (digit,) = read(image)[1]
    return digit.pixels


def difference(one, other):
    """Return the mean difference of two prepared images, 0 to 1."""
    return np.abs(one.astype(float) - other).mean() / 255


# --- MNIST's form --------------------------------------------------------------------------------------------------


def test_digit_fits_and_is_centred():
    digit = prepared(seven())
    rows, columns = picture.bounding_box(digit)
    assert rows.stop - rows.start == 20
    assert columns.stop - columns.start == pytest.approx(20 * 25 / 40, abs=1)
    assert ndimage.center_of_mass(digit) == pytest.approx((14, 14), abs=0.6)
    assert digit[0, 0] == 0
    assert digit.max() == 255
    assert 0 < ((digit > 0) & (digit < 255)).sum() < 200  # anti-aliased


def test_mnists_form_is_unchanged():
    digit = prepared(seven())
    assert np.array_equal(prepared(digit), digit)
    assert np.array_equal(prepared(np.stack([digit] * 3, axis=-1)), digit)
    assert np.array_equal(prepared(digit.astype(np.uint16) * 257), digit)


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
    again = prepared(spoil(digit))
    assert not np.array_equal(again, spoil(digit))
    assert difference(again, digit) < limit


def test_mnist_is_unchanged():
    (training, _), (testing, _) = mnist.load_mnist(mnist.DATA_DIR)
    assert all(picture.is_mnist(image) for images in (training, testing) for image in images.numpy())
    assert all(np.array_equal(prepared(image.numpy()), image) for image in testing[:100])


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
    images, labels = mnist_test_set()
    files = [stored(Image.fromarray(change(image.numpy())), file_format) for image in images[:5]]
    assert [read(file)[0] for file in files] == labels[:5].numpy().astype(str).tolist()


@pytest.mark.parametrize("least", [-3e38, 0, -1e-45])
def test_floats_of_any_span_are_read(least):
    digit = np.where(seven() < 128, np.float32(least), np.float32(-least if least else 1e-45))
    assert read(digit)[0] == "7"


def test_range_of_a_small_form_is_stretched():
    digit = prepared(seven())
    assert difference(prepared(digit // 16), digit) < 0.02


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_black(value):
    digit = prepared(seven())
    pixels = digit / np.float32(255)
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


def cut_off(pixels):
    pixels = pixels.copy()
    pixels[97:] = 60  # the paper ends here
    return pixels


def speckled(pixels):
    pixels = pixels.copy()
    pixels[90:92, 90:92] = pixels[5:7, 90:92] = pixels[85:87, 4:6] = 0
    return pixels


@pytest.mark.parametrize("spoil", [lit, shadowed, cut_off, speckled, noisy, lambda pixels: 255 - pixels])
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


def half(image):
    """The same, half transparent where it is opaque."""
    image.putalpha(image.getchannel("A").point(lambda value: value // 2))
    return image


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
        lambda image: stored(half(transparent(image, colour=255))),
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


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("across", [[], [10, 37, 64, 91]])
def test_stem_from_one_ruled_line_to_the_next_is_no_side_of_a_cell(across, width):
    lines = [(0, 30, 99, 30), (0, 80, 99, 80), *((x, 0, x, 99) for x in across)]
    assert read(draw(four(), *lines, width=width))[0] == "4"


def test_bar_along_a_ruled_line_stays():
    assert read(draw(seven(), (0, 25, 99, 25), (0, 69, 99, 69), width=2))[0] == "7"


def test_stroke_on_a_ruling_is_no_other_ruling():
    strokes = np.zeros((100, 128), dtype=bool)
    strokes[43:46] = True
    strokes[35:47, 60:118] = True
    (ruling,) = rulings.find_rulings(strokes)
    assert ruling.thickness == 3


def test_points_of_a_joined_ruling_are_in_order():
    pieces = [rulings.Ruling(np.array(x), np.full(2, y), 3) for x, y in (([0, 50], 9), ([51, 200], 8), ([51, 180], 10))]
    (ruling,) = rulings.join(pieces)
    assert (np.diff(ruling.x) >= 0).all()
    assert np.ptp(ruling.x) == 200


def test_bars_of_a_cropped_four_are_no_frame():
    lines = (30, 20, 22, 50), (22, 50, 60, 50), (50, 20, 50, 80)
    pixels = draw(np.full((100, 100), 230, dtype=np.uint8), *lines, width=6)
    assert read(pixels[picture.bounding_box(pixels < 128)])[0] == "4"


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
    assert ink.find_sheet(light) is None


@pytest.mark.filterwarnings("error")
def test_blank_sheet_holds_no_ink():
    sheet = np.full((90, 90), 200, dtype=np.float32)
    assert ink.find_ink(-ink.subtract_plane(sheet, sheet > 0), 45) is None


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


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
@pytest.mark.parametrize("turn", [lambda image: image, on_its_side])
def test_boxes_are_in_pixels_of_the_upright_picture(turn, name, folder):
    pixels = np.kron(np.concatenate([four(), seven()], axis=1), np.ones((12, 12), dtype=np.uint8))
    image = turn(Image.fromarray(pixels))
    image.save(name, exif=image.getexif())
    (result,) = predict.main(["--model", str(weights.PRETRAINED), "--json", name])
    assert result["number"] == "47"
    assert result["digits"][1]["box"] == pytest.approx([12 * side for side in (130, 20, 155, 60)], abs=30)


# --- Numbers, lines and what is no digit ---------------------------------------------------------------------------


def write(number, gap=16, margin=30):
    """Return a number in test digits, the second of each, in dark ink on light paper: an array (112 + 2 margin, W)."""
    images, labels = mnist_test_set()
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
    lines, sure = reader.read(pretrained(), Image.fromarray(write(number, gap=-12)))
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


def test_digit_of_halves_side_by_side_is_doubted():
    pixels = write("0")
    middle = pixels.shape[1] // 2
    pixels[:, middle - 3 : middle + 3] = 230
    lines, sure = reader.read(pretrained(), Image.fromarray(pixels))
    assert predict.as_result("", lines, sure, 1)["number"] == "0"
    assert not sure


def test_long_stem_is_not_a_1():
    pixels = np.pad(write("1395"), ((0, 130), (0, 0)), constant_values=230)
    lines, sure = reader.read(pretrained(), Image.fromarray(draw(pixels, (177, 134, 177, 267), width=7)))
    assert predict.as_result("", lines, sure, 1)["number"] == "1395"
    assert not sure


# --- Frames, tables and lines --------------------------------------------------------------------------------------


def page(height, width):
    return np.full((height, width), 230, dtype=np.uint8)


def put(pixels, number, left, top):
    """Write a number in test digits on a page, where it is darker."""
    ink = write(number, margin=0)
    place = pixels[top : top + ink.shape[0], left : left + ink.shape[1]]
    np.minimum(place, ink, out=place)
    return pixels


def table(rows, cell=150, margin=40, width=4):
    """Draw a table of cells; a row of text fills it from the left, a blank leaves a cell empty."""
    columns = max(map(len, rows))
    pixels = page(len(rows) * cell + 2 * margin, columns * cell + 2 * margin)
    for y, row in enumerate(rows):
        for x, digit in enumerate(row.replace(" ", "")):
            at = [i for i, text in enumerate(row) if text != " "][x]
            put(pixels, digit, margin + at * cell + 45, margin + y * cell + 20)
    bottom, right = margin + len(rows) * cell, margin + columns * cell
    across = [(margin, y, right, y) for y in range(margin, bottom + 1, cell)]
    down = [(x, margin, x, bottom) for x in range(margin, right + 1, cell)]
    return draw(pixels, *across, *down, width=width)


@pytest.mark.parametrize("width", [2, 5, 9])
@pytest.mark.parametrize("box", [(8, 150, 191, 340), (30, 20, 170, 380), (4, 4, 195, 395), (40, 230, 180, 370)])
@pytest.mark.parametrize("digit", ["1", "7"])
def test_digit_in_a_box_of_any_shape_is_read_as_without_it(digit, box, width):
    left, top, right, bottom = box
    pixels = put(page(400, 200), digit, 85, (top + bottom) // 2 - 56)
    across, down = [(left, y, right, y) for y in (top, bottom)], [(x, top, x, bottom) for x in (left, right)]
    assert read(draw(pixels, *across, *down, width=width))[0] == digit


@pytest.mark.parametrize("margin", [0, 5, 40, 150])
def test_boxes_of_a_form_are_read(margin):
    lines, sure = reader.read(pretrained(), Image.fromarray(table(["13 17"], margin=margin)))
    assert predict.as_result("", lines, sure, 1)["number"] == "1317"
    assert sure


def test_table_may_lie_askew():
    image = Image.fromarray(table(["47", "74"]))
    assert read(image.rotate(8, Image.Resampling.BICUBIC, expand=True, fillcolor=230))[0] == "47 74"


def test_rows_of_a_table_are_lines():
    result = predict.as_result("", *reader.read(pretrained(), Image.fromarray(table(["41", "7 ", "39"]))), 1)
    assert result["number"] == "41 7 39"
    assert [digit["line"] for digit in result["digits"]] == [0, 0, 1, 2, 2]


def test_digits_of_a_row_are_one_line_at_any_height():
    pixels = put(put(table(["  "], cell=200), "4", 90, 36), "7", 290, 120)
    assert read(pixels)[0] == "47"


def test_empty_table_is_not_sure():
    assert not reader.read(pretrained(), Image.fromarray(table(["   ", "   "])))[1]


def test_divider_that_ends_early_is_of_the_frame():
    pixels = table(["253", "471"])
    pixels[320:338, 185:195] = 230  # the first ends above the bottom
    assert read(pixels)[0] == "253 471"


def test_digit_that_reaches_into_the_next_row_is_cut():
    pixels = table(["042", "068"])
    assert read(draw(pixels, (270, 150, 270, 220), width=10))[0] == "042 068"


def test_digits_that_rest_on_a_line_are_sure():
    image = Image.new("L", (160, 100), 230)
    for left in (20, 85):
        ImageDraw.Draw(image).ellipse((left, 15, left + 50, 75), outline=30, width=5)
    ImageDraw.Draw(image).line((0, 74, 159, 71), fill=30)
    lines, sure = reader.read(pretrained(), image)
    assert [digit.probabilities.argmax() for digit in lines[0]] == [0, 0]
    assert sure


def test_eight_of_a_display_is_no_frame():
    two = [(30, 30, 80, 30), (30, 80, 80, 80), (30, 130, 80, 130), (80, 30, 80, 80), (30, 80, 30, 130)]
    eight = [(120, 30, 170, 30), (120, 80, 170, 80), (120, 130, 170, 130), (120, 30, 120, 130), (170, 30, 170, 130)]
    assert read(draw(page(160, 200), *two, *eight, width=9))[0] == "28"


@pytest.mark.parametrize(("above", "below", "gap"), [("27", "74", 4), *[("945", "317", gap) for gap in (12, 20, 30)]])
def test_close_lines_are_not_merged(above, below, gap):
    pixels = page(300, 460)
    for top, number in ((40, above), (40 + 82 + gap, below)):  # of 112 pixels, 82 hold the digits
        put(pixels, number, 40, top)
    assert read(pixels)[0] == f"{above} {below}"


def sliver(pixels):
    """Leave what a crop shows of the next cell."""
    return draw(pixels, (2, 30, 2, len(pixels)), width=6)


def cut_line(pixels):
    return draw(pixels, (14, 0, 14, 120), width=5)


@pytest.mark.parametrize("rest", [sliver, cut_line])
def test_what_lies_along_the_edge_is_no_digit(rest):
    lines, sure = reader.read(pretrained(), Image.fromarray(rest(write("25", margin=40))))
    assert predict.as_result("", lines, sure, 1)["number"] == "25"
    assert sure


def test_digit_that_hangs_on_a_line_along_the_edge_stays():
    pixels = put(put(page(180, 300), "2", 60, 0), "5", 170, 30)
    assert len(read(draw(pixels, (40, 2, 150, 2), (100, 2, 100, 30), width=5))[0]) == 2


def test_zero_that_fills_its_picture_is_not_read_as_a_1():
    image = Image.new("L", (112, 112))
    ImageDraw.Draw(image).ellipse((14, 0, 98, 111), fill=255)
    ImageDraw.Draw(image).polygon([(52, 84), (46, 74), (58, 28), (66, 34)], fill=0)
    assert read(image.filter(ImageFilter.GaussianBlur(4)))[0] == "0"


def test_one_at_the_edge_of_a_tight_crop_is_a_digit():
    pixels = draw(np.pad(write("25", margin=0), ((0, 0), (40, 0)), constant_values=230), (4, 16, 4, 96), width=9)
    assert read(pixels[18:95])[0] == "125"


@pytest.mark.parametrize(("ink", "paper"), [((60, 60, 230), (20, 90, 30)), ((230, 60, 60), (90, 130, 40))])
def test_ink_may_differ_in_hue_alone(ink, paper, tmp_path):
    share = (230 - write("25"))[..., None] / 184
    pixels = (share * ink + (1 - share) * paper).astype(np.uint8)
    assert read(pixels)[0] == "25"
    Image.fromarray(pixels).save(tmp_path / "25.jpg", quality=90)
    assert read(picture.load(str(tmp_path / "25.jpg"))[0])[0] == "25"


def test_shadow_over_half_of_a_number_changes_nothing():
    pixels = np.pad(write("25"), 40, constant_values=230)
    shadow = np.zeros(pixels.shape)
    shadow[60:200, 30:140] = 0.5
    assert read((pixels * (1 - ndimage.gaussian_filter(shadow, 4))).astype(np.uint8))[0] == "25"


def circled(pixels, end=360):
    """Draw a circle around the digits, from 0 to `end` degrees."""
    image = Image.fromarray(np.pad(pixels, 40, constant_values=230))
    ImageDraw.Draw(image).arc((10, 10, image.width - 11, image.height - 11), 0, end, fill=30, width=8)
    return np.asarray(image)


def nearly_circled(pixels):
    return circled(pixels, end=357)


def underlined(pixels):
    pixels = np.pad(pixels, ((0, 40), (0, 0)), constant_values=230)
    return draw(pixels, (24, 154, pixels.shape[1] - 24, 150), width=8)


def twice_underlined(pixels):
    return draw(underlined(pixels), (24, 174, pixels.shape[1] - 24, 170), width=8)


def on_a_comb(pixels):
    """Draw a line below the digits, and short ones on it, between them."""
    pixels = np.pad(pixels, ((0, 30), (0, 0)), constant_values=230)
    pixels = draw(pixels, (10, 160, pixels.shape[1] - 11, 160), width=4)
    for x in np.linspace(10, pixels.shape[1] - 11, 3):
        pixels = draw(pixels, (x, 160, x, 110), width=4)
    return pixels


def below_icons(pixels):
    """Draw dots far above, as a drawing program's colours."""
    pixels = np.pad(pixels, ((100, 0), (0, 0)), constant_values=230)
    for x in range(20, 120, 30):
        pixels[14:28, x : x + 14] = 30
    return pixels


@pytest.mark.parametrize("number", ["2", "25", "71"])
@pytest.mark.parametrize("add", [circled, nearly_circled, underlined, twice_underlined, on_a_comb, below_icons])
def test_what_is_around_digits_is_not_read(add, number):
    lines, sure = reader.read(pretrained(), Image.fromarray(add(write(number, gap=24))))
    assert predict.as_result("", lines, sure, 1)["number"] == number
    assert sure


def test_digit_that_touches_a_ring_stays():
    ImageDraw.Draw(image := Image.new("1", (120, 100))).ellipse((5, 5, 114, 94), outline=1, width=3)
    for line in ((40, 30, 40, 88), (75, 30, 75, 70)):
        ImageDraw.Draw(image).line(line, fill=1, width=3)
    assert ndimage.label(np.array(image))[1] == 2
    rest = marks.erase_rings(np.array(image))
    assert rest[30:70, [40, 75]].all()
    assert not rest[:25].any()


def test_comb_has_three_low_teeth():
    def across(start, stop, at):
        return rulings.Ruling(np.array([start, stop]), np.array([at, at]), 2)

    line, teeth = across(0, 100, at=90), [across(60, 90, at=x) for x in (10, 50, 90)]
    assert frames.find_combs([line], teeth, highest=60) == ([line], teeth)
    assert frames.find_combs([line], teeth[1:], highest=60) == ([], [])
    assert frames.find_combs([line], teeth, highest=30) == ([], [])  # three 1s


def test_bar_between_digits_is_no_underline():
    strokes = np.zeros((100, 40), dtype=bool)
    strokes[10:40, 10:14] = strokes[50:53, 2:38] = True
    under = strokes.copy()
    strokes[60:90, 20:24] = True
    assert np.array_equal(marks.erase_bars(strokes), strokes)
    assert np.array_equal(np.flatnonzero(marks.erase_bars(under).any(axis=1)), np.arange(10, 40))


def test_table_is_no_ring():
    strokes = np.zeros((60, 100), dtype=bool)
    ImageDraw.Draw(image := Image.fromarray(strokes)).rectangle((5, 5, 94, 54), outline=1, width=2)
    ImageDraw.Draw(image).rectangle((20, 15, 30, 45), fill=1)
    strokes = np.array(image)
    assert np.array_equal(marks.erase_rings(strokes), strokes & (ndimage.label(strokes)[0] == 2))
    strokes[:, 50] |= strokes[:, 5]  # two cells
    assert np.array_equal(marks.erase_rings(strokes), strokes)


def test_digit_in_a_fainter_pen_leaves_doubt():
    pixels = write("25")
    pixels[:, 130:] = 230 - (230 - pixels[:, 130:]) // 3
    lines, sure = reader.read(pretrained(), Image.fromarray(pixels))
    assert predict.as_result("", lines, sure, 1)["number"] == "2"
    assert not sure


def test_holes_of_a_spiral_are_not_a_1():
    image = Image.fromarray(np.pad(write("478"), ((0, 0), (60, 0)), constant_values=230))
    for y in range(8, image.height, 24):
        ImageDraw.Draw(image).ellipse((14, y - 6, 26, y + 6), fill=60)
    assert not reader.read(pretrained(), image)[1]


def test_punched_hole_is_no_digit():
    image = Image.fromarray(np.pad(write("25"), ((0, 0), (120, 0)), constant_values=230))
    ImageDraw.Draw(image).ellipse((40, 56, 100, 116), fill=60)
    lines, sure = reader.read(pretrained(), image)
    assert predict.as_result("", lines, sure, 1)["number"] == "25"
    assert not sure  # it may be a digit that was blotted out


def minus(pixels):
    return draw(pixels, (8, 86, 40, 86), width=8)


def point(pixels):
    pixels = pixels.copy()
    pixels[118:130, 158:170] = 30
    return pixels


@pytest.mark.parametrize("mark", [minus, point])
def test_mark_beside_digits_is_not_sure(mark):
    pixels = np.pad(write("25", gap=40), ((0, 0), (30, 0)), constant_values=230)
    assert reader.read(pretrained(), Image.fromarray(pixels))[1]
    lines, sure = reader.read(pretrained(), Image.fromarray(mark(pixels)))
    assert predict.as_result("", lines, sure, 1)["number"] == "25"
    assert not sure


@pytest.mark.parametrize("line", [(250, 130, 230, 160), (265, 0, 225, 170)], ids=["comma", "slash"])
def test_sign_like_a_1_is_not_sure(line):
    pixels = np.hstack([write("25"), write("48")])
    assert reader.read(pretrained(), Image.fromarray(pixels))[1]
    assert not reader.read(pretrained(), Image.fromarray(draw(pixels, line, width=9)))[1]


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
    assert not reader.read(pretrained(), image)[1]


def test_few_letters_and_shapes_are_sure():
    rng = np.random.default_rng(0)
    images = [pictures.drawn(pictures.on_grid(strokes), rng) for strokes in pictures.LETTERS + pictures.SHAPES]
    assert len(images) == 24
    assert sum(reader.read(pretrained(), image)[1] for image in images) <= 6
