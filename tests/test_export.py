"""export.py: the page, in a real browser, and the ONNX file, in a real runtime."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mnist
from benchmarks import pictures
from tools import export, weights

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from playwright.sync_api import Error, sync_playwright

ROOT = Path(mnist.__file__).parent
# {digit: ten drawings}: strokes of [x, y] from 0 to 100, made for these tests. Nothing was tuned on them.
STROKES = json.loads(Path(__file__).with_name("strokes.json").read_text())
SCRIBBLE = [[[10 + 37 * i * i % 80, 10 + 53 * i * i * i % 80] for i in range(60)]]
BESIDE = [[[20, 20], [20, 80]], [[80, 20], [80, 80]]]  # two strokes, no digit
STAGES = (
    "conv1 bn1 relu 16 28 28",
    "conv2 bn2 pool1 relu 32 14 14",
    "squeeze1 8 14 14",
    "conv3 bn3 relu 16 14 14",
    "conv4 bn4 pool2 relu 32 7 7",
    "squeeze2 8 7 7",
    "conv5 bn5 relu 16 5 5",
    "conv6 bn6 relu 32 3 3",
    "squeeze3 bn7 relu 8 3 3",
    "fc 10 1 1",
)

# Draws with events made in the page: real input, which other tests use, takes some 30 ms a point.
DRAW = """
async ([drawing, left, top, size]) => {
  const box = paper.getBoundingClientRect();
  for (const stroke of drawing) {
    stroke.forEach(([x, y], i) => {
      const clientX = box.left + box.width * (left + size * x / 100);
      const clientY = box.top + box.height * (top + size * y / 100);
      const send = (type) => paper.dispatchEvent(new PointerEvent(type, {pointerId: 1, buttons: 1, clientX, clientY}));
      send(i ? "pointermove" : "pointerdown");
      if (i === stroke.length - 1) send("pointerup");
    });
  }
  await new Promise(requestAnimationFrame);
}
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with draw.html and mnist.onnx of pretrained.pt."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("draw.html", "mnist.onnx"):
        export.main(["--model", str(weights.PRETRAINED), "--out", str(folder / name)])
    return folder


@pytest.fixture(scope="module")
def first_digits():
    """The first 200 test images, and the logits that PyTorch gives for them."""
    images = mnist.load_mnist(mnist.DATA_DIR)[1][0][:200]
    model, _ = weights.load(weights.PRETRAINED)
    return images, mnist.classify(model, images)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, else the Chrome that is installed."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        try:
            browser = playwright.chromium.launch(executable_path=chromium, channel=None if chromium else "chrome")
        except Error:
            if chromium or "CI" in os.environ:
                raise
            pytest.skip("neither Chromium nor Chrome is installed")
        yield browser


@pytest.fixture
def open_page(browser, exported):
    """A function that opens the page. At the end its console must be empty, and it must have requested nothing."""
    pages, events = [], []

    def open_page(path=exported / "draw.html", width=1280, height=900, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("request", lambda request: events.append(request.url))
        page.goto(path.as_uri())
        assert events == [path.as_uri()]
        events.clear()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert events == []


@pytest.fixture
def page(open_page):
    return open_page()


def draw(page, drawing, left=0.0, top=0.0, size=1.0):
    """Draw on the page, on a square from (left, top) to (left + size, top + size) of the paper."""
    page.evaluate(DRAW, [drawing, left, top, size])


def on_paper(page, x, y):
    """Return where in the window a position on the paper is, given from 0 to 100."""
    box = page.locator("#paper").bounding_box()
    return box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100


def draw_with_mouse(page, drawing):
    for start, *others in drawing:
        page.mouse.move(*on_paper(page, *start))
        page.mouse.down()
        for position in others:
            page.mouse.move(*on_paper(page, *position))
        page.mouse.up()


def settle(page):
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def answer(page):
    """Return the text that the page answers: a digit, perhaps with "not sure", or nothing."""
    settle(page)
    return page.inner_text("#answer").strip()


def alpha(page, canvas):
    """Return how opaque each pixel of a canvas is, from 0 to 255, as a JavaScript array's handle."""
    settle(page)
    return page.evaluate_handle(
        """(canvas) => {
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
            copy.drawImage(canvas, 0, 0);
            return [...copy.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 3)];
        }""",
        page.query_selector(canvas),
    )


def ink(page):
    """Return the share of the paper that is drawn on."""
    return alpha(page, "#paper").evaluate("values => values.filter((value) => value).length / values.length")


# --- The page ------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_pytorch(page, first_digits):
    images, logits = first_digits
    found = page.evaluate(
        "images => images.map((pixels) => [...forward(pixels).at(-1).data])", images.flatten(1).tolist()
    )
    assert torch.tensor(found).sub(logits).abs().max() < 1e-3
    assert torch.equal(torch.tensor(found).argmax(dim=1), logits.argmax(dim=1))


@pytest.mark.parametrize(("left", "top", "size"), [(0, 0, 1), (0.1, 0.45, 0.5), (0.75, 0.05, 0.2)])
def test_drawn_digits_are_read(left, top, size, page):
    wrong = []
    for digit, drawings in STROKES.items():
        for number, drawing in enumerate(drawings):
            draw(page, drawing, left, top, size)
            if (found := answer(page))[:1] != digit:
                wrong.append((digit, number, found))
            page.keyboard.press("Escape")
    assert wrong == []


def test_it_answers_while_you_draw(page):
    page.mouse.move(*on_paper(page, 25, 12))
    page.mouse.down()
    page.mouse.move(*on_paper(page, 25, 50), steps=5)
    assert answer(page) == "1"
    assert page.text_content("#status") == "No digit"  # a screen reader need not speak yet
    page.mouse.up()
    settle(page)
    assert page.text_content("#status") == "It reads 1"


@pytest.mark.parametrize("width", [360, 2560])
@pytest.mark.parametrize("ratio", [1, 3])
def test_windows_of_any_size(width, ratio, open_page):
    page = open_page(width=width, height=740, device_scale_factor=ratio)
    for digit in ("2", "9"):
        draw_with_mouse(page, STROKES[digit][1])
        assert answer(page) == digit
        page.click("#clear")
    assert page.evaluate("paper.width / paper.clientWidth") == pytest.approx(ratio, rel=0.01)  # it is sharp
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#paper").bounding_box()["width"] > 300


def test_a_low_window_holds_the_paper(open_page):
    page = open_page(width=667, height=375)
    paper, bars = (page.locator(name).bounding_box() for name in ("#paper", "#bars"))
    assert paper["y"] + paper["height"] < 360
    assert bars["x"] > paper["x"] + paper["width"]  # beside it


def test_the_window_may_change(page):
    draw(page, STROKES["4"][0])
    before = ink(page)
    page.set_viewport_size({"width": 360, "height": 740})
    assert ink(page) == pytest.approx(before, rel=0.05)
    assert page.evaluate("paper.width === paper.clientWidth")
    page.evaluate("document.documentElement.style.fontSize = '8px'")
    settle(page)
    assert page.evaluate("paper.width === paper.clientWidth && paper.width < 200")


@pytest.mark.parametrize("kind", ["touch", "pen"])
def test_touch_and_pen(kind, open_page):
    page = open_page(width=360, height=500, has_touch=True)  # lower than the page, which could scroll
    session = page.context.new_cdp_session(page)

    def send(event, position):
        point = dict(zip("xy", on_paper(page, *position), strict=True))
        if kind == "touch":
            type = {"down": "touchStart", "move": "touchMove", "up": "touchEnd"}[event]
            session.send("Input.dispatchTouchEvent", {"type": type, "touchPoints": [] if event == "up" else [point]})
        else:
            type = {"down": "mousePressed", "move": "mouseMoved", "up": "mouseReleased"}[event]
            button = {"button": "left", "buttons": int(event != "up"), "clickCount": 1, "pointerType": "pen"}
            session.send("Input.dispatchMouseEvent", {"type": type, **point, **button})

    for stroke in STROKES["4"][0]:
        send("down", stroke[0])
        for position in stroke[1:]:
            send("move", position)
        send("up", stroke[-1])
    assert answer(page) == "4"
    assert page.evaluate("strokes.length") == len(STROKES["4"][0])
    assert page.evaluate("scrollY") == 0
    assert page.evaluate("paper.dispatchEvent(new Event('touchmove', {cancelable: true}))") is False  # no Scribble


def test_a_second_finger_and_the_right_button_draw_nothing(page):
    page.mouse.move(*on_paper(page, 25, 25))
    page.mouse.down(button="right")
    page.mouse.move(*on_paper(page, 50, 50))
    page.mouse.up(button="right")
    assert ink(page) == 0
    page.mouse.down()
    page.evaluate("""for (const type of ["pointerdown", "pointermove", "pointerup"])
        paper.dispatchEvent(new PointerEvent(type, {pointerId: 7, buttons: 1, clientX: 0, clientY: 0}))""")
    page.mouse.move(*on_paper(page, 50, 75))
    page.mouse.up()
    assert page.evaluate("strokes.length") == 1
    assert page.evaluate("strokes[0].every(([x, y]) => x > 0.2)")


def test_a_pen_draws_though_a_palm_rests(page):
    page.evaluate("""() => {
        paper.setPointerCapture = () => {};  // it takes no pointer that is not there
        const send = (type, pointerType, clientX) => {
            const pointerId = {touch: 7, pen: 8}[pointerType];
            paper.dispatchEvent(new PointerEvent(type, {pointerId, pointerType, buttons: 1, clientX}));
        };
        send("pointerdown", "touch", 0);
        send("pointerdown", "pen", 0);
        send("pointerdown", "touch", 0);
        send("pointermove", "pen", 1000);
        send("pointercancel", "touch", 0);
        send("pointerup", "pen", 1000);
    }""")
    assert page.evaluate("strokes.map((stroke) => stroke.length)") == [2]


def test_a_stroke_ends_at_the_edge(page):
    draw_with_mouse(page, [[[50, 50], [200, 50], [200, -5]]])
    (stroke,) = page.evaluate("strokes")
    assert np.array(stroke) == pytest.approx(np.array([[0.5, 0.5], [1, 0.5], [1, 0]]), abs=0.01)


def test_a_stroke_ends_with_its_button(page):
    page.mouse.move(*on_paper(page, 25, 25))
    page.mouse.down()
    page.mouse.down(button="right")
    assert page.evaluate("paper.dispatchEvent(new Event('contextmenu', {cancelable: true}))") is False  # no menu
    page.mouse.up()
    page.mouse.move(*on_paper(page, 50, 50))
    page.mouse.up(button="right")
    page.mouse.move(*on_paper(page, 75, 75))
    assert page.evaluate("strokes.map((stroke) => stroke.length)") == [1]


def test_a_release_that_goes_unseen_ends_the_stroke(page):
    page.evaluate("""for (const [type, buttons] of [["pointerdown", 1], ["pointermove", 0], ["pointermove", 0]])
        paper.dispatchEvent(new PointerEvent(type, {pointerId: 1, buttons, clientX: 1000 * buttons}))""")
    assert page.evaluate("strokes.map((stroke) => stroke.length)") == [1]


def test_all_points_between_two_frames_are_drawn(page):
    page.evaluate("""() => {
        const at = (clientX) => ({pointerId: 1, buttons: 1, clientX: paper.getBoundingClientRect().left + clientX});
        paper.dispatchEvent(new PointerEvent("pointerdown", at(50)));
        const coalescedEvents = [100, 150, 200].map((x) => new PointerEvent("pointermove", at(x)));
        paper.dispatchEvent(new PointerEvent("pointermove", {...at(200), coalescedEvents}));
    }""")
    assert page.evaluate("strokes[0].length") == 4


def test_what_the_system_cancels_is_not_drawn(page):
    draw(page, BESIDE[:1])
    page.evaluate("""for (const type of ["pointerdown", "pointermove", "pointercancel"])
        paper.dispatchEvent(new PointerEvent(type, {pointerId: 1, buttons: 1}))""")
    assert page.evaluate("strokes.length") == 1
    draw(page, BESIDE[1:])
    assert page.evaluate("strokes.length") == 2


def test_points_that_are_close_are_left_out(page):
    draw(page, [[[20 + 0.01 * i, 50] for i in range(5000)]])
    assert 50 < page.evaluate("strokes[0].length") <= 101


def test_the_pen_has_a_width(page):
    draw(page, [[[20, 50], [80, 50]]])
    assert ink(page) == pytest.approx(0.6 / 16 + 3.14 / 32**2, rel=0.1)


def test_empty_paper(page):
    assert answer(page) == ""
    assert ink(page) == 0
    assert page.inner_text("#bars").split() == [*"0123456789", "none"]
    assert page.is_visible("#hint")


def test_a_tap_is_a_dot_and_no_digit(page):
    page.mouse.click(*on_paper(page, 12, 12))
    assert 0 < ink(page) < 0.01
    assert answer(page) == ""
    assert not page.is_visible("#hint")


def beside(one, other):
    """Return two drawings as one, each half as large."""
    return [[[x / 2, y / 2 + 25] for x, y in stroke] for stroke in one] + [
        [[x / 2 + 50, y / 2 + 25] for x, y in stroke] for stroke in other
    ]


@pytest.mark.parametrize(
    "drawing",
    [
        SCRIBBLE,
        [[[15, 10], [15, 90]], [[85, 10], [85, 90]], [[15, 50], [85, 50]]],  # H
        [[[80, 10], [20, 10], [20, 90], [80, 90]], [[20, 50], [60, 50]]],  # E
        beside(STROKES["3"][0], STROKES["5"][0]),
    ],
)
def test_a_drawing_that_is_no_digit(drawing, page):
    draw(page, drawing)
    assert re.fullmatch(r"\d\s*not sure", answer(page))
    assert page.text_content("#status").endswith(", not sure")
    assert page.inner_text("#bars .best").startswith("none")


def test_the_probabilities_add_up(page):
    draw(page, SCRIBBLE)
    settle(page)
    rows = [item.split() for item in page.locator("#bars li").all_inner_texts()]
    assert [row[0] for row in rows] == [*"0123456789", "none"]
    assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=1)
    sizes = page.locator("#bars .bar").evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.backgroundSize))")
    assert sizes == pytest.approx([float(row[1]) for row in rows], abs=0.1)


@pytest.mark.parametrize("how", ["button", "key"])
def test_clear(how, page):
    draw(page, BESIDE)
    assert ink(page) > 0.05
    page.click("#clear") if how == "button" else page.keyboard.press("Escape")
    assert ink(page) == 0
    assert answer(page) == ""
    draw(page, STROKES["3"][0])
    assert answer(page) == "3"


def test_clear_in_the_middle_of_a_stroke(page):
    page.mouse.move(*on_paper(page, 25, 25))
    page.mouse.down()
    page.mouse.move(*on_paper(page, 50, 50))
    page.keyboard.press("Escape")
    page.mouse.move(*on_paper(page, 75, 75))
    page.mouse.up()
    assert ink(page) == 0


@pytest.mark.parametrize("how", ["button", "key"])
def test_undo_takes_away_the_last_stroke(how, page):
    draw(page, BESIDE[:1])
    before = ink(page)
    draw(page, BESIDE[1:])
    assert ink(page) > 1.5 * before
    for expected in (before, 0, 0):
        page.click("#undo") if how == "button" else page.keyboard.press("Control+z")
        assert ink(page) == expected


@pytest.mark.parametrize(
    "keys",
    [{"key": "Z", "ctrlKey": True}, {"key": "z", "metaKey": True}, {"key": "я", "code": "KeyZ", "ctrlKey": True}],
)
def test_undo_with_caps_lock_on_a_mac_and_in_cyrillic(keys, page):
    draw(page, BESIDE)
    code = "keys => document.dispatchEvent(new KeyboardEvent('keydown', {cancelable: true, ...keys}))"
    assert page.evaluate(code, keys) is False  # Safari does nothing else with it
    assert page.evaluate("strokes.length") == 1


@pytest.mark.parametrize("key", ["z", "Control+Shift+z"])
def test_other_keys_undo_nothing(key, page):
    draw(page, BESIDE)
    page.keyboard.press(key)
    assert page.evaluate("strokes.length") == 2


def test_form_is_that_of_mnist(page):
    for drawing in (STROKES["1"][0], STROKES["0"][3], STROKES["7"][5]):
        draw(page, drawing, left=0.5, top=0.1, size=0.3)
        pixels = np.array(page.evaluate("[...toForm(strokes)]")).reshape(28, 28)
        rows, columns = np.nonzero(pixels)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in (20, 21)  # 21 if it begins between two pixels
        assert np.average(rows, weights=pixels[rows, columns]) == pytest.approx(14, abs=0.2)
        assert np.average(columns, weights=pixels[rows, columns]) == pytest.approx(14, abs=0.2)
        assert pixels.max() == 255
        assert np.array_equal(np.reshape(alpha(page, "#seen").json_value(), (28, 28)), pixels)
        page.keyboard.press("Escape")


def test_form_holds_all_of_a_lopsided_drawing(page):
    draw(page, [[[20, 20], [20, 80]], [[27, 20], [27, 80]], [[20, 80], [80, 80]]])
    pixels = np.array(page.evaluate("[...toForm(strokes)]")).reshape(28, 28)
    assert np.ptp(np.nonzero(pixels), axis=1).min() >= 19  # nothing is cut off


def test_test_digits(page):
    buttons = page.locator("#examples button")
    names = buttons.all_inner_texts()
    assert names[:10] == list("0123456789")
    assert len(names) == 10 + export.MISTAKES
    draw(page, STROKES["3"][0])
    paper = "getComputedStyle(paper).backgroundColor"
    assert page.evaluate(paper) == "rgba(0, 0, 0, 0)"
    for button, name in zip(buttons.all(), names, strict=True):
        button.click()
        assert answer(page)[0] == name[-1]
        assert page.evaluate(paper) == "rgb(0, 0, 0)"  # white on black, as it is
        shades = alpha(page, "#paper").evaluate("values => [...new Set(values)]")
        assert set(shades) <= set(page.evaluate("[...example]"))  # and sharp
        assert page.inner_text("#bars .best").startswith("none" if "not sure" in answer(page) else name[-1])
        assert ("→" in name) == ("mistaken for" in button.get_attribute("aria-label"))
    digits = page.evaluate(
        """exported.digits.map(({pixels}) => {
            const ten = probabilitiesOf(forward(bytes(pixels)).at(-1).data).slice(0, 10);
            return Math.max(...ten) / ten.reduce((a, b) => a + b);
        })"""
    )
    assert digits[10:] == sorted(digits[10:], reverse=True)
    assert min(digits[10:]) > 0.9  # the most confident mistakes
    page.click("#undo")
    assert answer(page) == "3"  # the drawing is back
    buttons.nth(5).click()
    draw(page, STROKES["8"][0])
    assert answer(page) == "8"  # it is a new drawing
    assert page.evaluate("strokes.length") == len(STROKES["8"][0])


def test_stages_are_the_layers_of_net(page):
    assert not page.is_visible("#inside")
    page.click("summary")
    stages = page.locator("#inside figure").all()
    assert [re.split(r"\W+", stage.inner_text()) for stage in stages] == [stage.split() for stage in STAGES]
    for stage, name in zip(stages, STAGES, strict=True):
        *_, channels, height, width = name.split()
        maps = stage.locator("canvas")
        assert maps.count() == int(channels)
        assert maps.first.evaluate("canvas => [canvas.height, canvas.width]") == [int(height), int(width)]


def test_maps_follow_the_pen(page):
    def pictures():
        settle(page)
        return page.evaluate("[...document.querySelectorAll('.maps canvas')].map((canvas) => canvas.toDataURL())")

    draw(page, STROKES["0"][0])
    blank = pictures()  # while they are folded away
    assert len(set(blank)) == len({stage.split()[-1] for stage in STAGES})
    page.click("summary")
    assert len(set(pictures()) - set(blank)) > 100
    assert re.fullmatch(r"\d+ ms", page.inner_text("#time"))
    of_zero = pictures()
    page.keyboard.press("Escape")
    draw(page, STROKES["1"][0])
    changed = [before != after for before, after in zip(of_zero, pictures(), strict=True)]
    assert sum(changed) > 150  # of 178
    map_of_squeeze1 = page.locator("#inside figure:nth-of-type(3) canvas").first
    data = map_of_squeeze1.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 14, 14).data]")
    red, _, blue, opacity = np.reshape(data, (-1, 4)).T
    assert (blue > red)[opacity > 50].any()  # positive
    assert (red > blue)[opacity > 50].any()  # negative


def test_what_is_not_drawing_needs_no_mouse(page):
    def focused():
        page.keyboard.press("Tab")
        return page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()")

    assert [focused() for _ in range(5)] == ["Undo", "Clear", "Test digit 0", "Test digit 1", "Test digit 2"]
    page.keyboard.press("Enter")
    settle(page)
    assert page.text_content("#status") == "It reads 2"  # what a screen reader says
    for _ in range(7 + export.MISTAKES):
        focused()
    assert focused() == "Look inside"
    page.keyboard.press("Enter")
    assert page.is_visible("#inside")


def test_the_same_answer_is_announced_again(page):
    page.evaluate("""
        window.spoken = [];
        const speak = () => spoken.push(find("status").textContent);
        new MutationObserver(speak).observe(find("status"), {childList: true});
    """)
    for _ in range(2):
        page.get_by_role("button", name="Test digit 3", exact=True).click()
        settle(page)
    assert page.evaluate("spoken").count("It reads 3") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme, open_page):
    page = open_page(color_scheme=scheme)
    draw(page, STROKES["4"][0])
    settle(page)

    def lightness(colour):
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    background = page.evaluate("getComputedStyle(paper.parentElement).backgroundColor")
    pen = page.evaluate("paper.getContext('2d').strokeStyle").lstrip("#")
    strength = lightness(background) - sum(bytes.fromhex(pen)) / 3
    assert strength > 180 if scheme == "light" else strength < -180


def test_the_theme_may_change(page):
    draw(page, STROKES["4"][0])
    page.emulate_media(color_scheme="dark")
    settle(page)
    assert page.evaluate("paper.getContext('2d').strokeStyle") == "#ececec"
    page.emulate_media(forced_colors="active")
    settle(page)
    assert page.evaluate("paper.getContext('2d').strokeStyle") == "#ffffff"


def test_forced_colours_leave_the_pictures(open_page):
    page = open_page(forced_colors="active")
    for element in ("#seen", "#examples canvas"):
        background = page.locator(element).first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert background == "rgb(0, 0, 0)"
    assert "gradient" in page.locator(".bar").first.evaluate("e => getComputedStyle(e).backgroundImage")


def test_without_javascript_it_says_so(browser, exported):
    page = browser.new_page(java_script_enabled=False)
    page.goto((exported / "draw.html").as_uri())
    assert page.inner_text("noscript p") == "The page needs JavaScript."
    assert not page.is_visible("main")
    page.close()


def test_the_policy_refuses_requests(browser, exported):
    page = browser.new_page()
    page.goto((exported / "draw.html").as_uri())
    assert page.evaluate("fetch('data:,x').then(() => 'allowed', () => 'refused')") == "refused"
    page.close()


def test_the_template_opens_as_it_is(open_page):
    page = open_page(export.TEMPLATE)
    assert page.is_visible("#template")
    draw_with_mouse(page, BESIDE)
    assert ink(page) > 0.05
    assert page.evaluate("toForm(strokes).some((value) => value === 255)")


def test_page_is_small_and_no_template(exported):
    content = (exported / "draw.html").read_text(encoding="utf-8")
    assert len(content.encode()) < 150_000
    tools = Path(export.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert f"It is one file of {len(content.encode()) / 1000:.0f} kB" in tools
    assert export.PLACE not in content
    assert content.startswith(export.TEMPLATE.read_text(encoding="utf-8").partition(export.PLACE)[0])


# --- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 200])
def test_probabilities_are_those_of_pytorch(batch, exported, first_digits):
    images, logits = first_digits
    session = onnxruntime.InferenceSession(exported / "mnist.onnx")
    found = [session.run(None, {"images": part.numpy()})[0] for part in images.split(batch)]
    assert np.abs(np.concatenate(found) - logits.softmax(dim=1).numpy()).max() < 1e-5


def test_onnx_is_one_file_that_says_what_it_is(exported):
    assert {path.name for path in exported.iterdir()} == {"draw.html", "mnist.onnx"}
    session = onnxruntime.InferenceSession(exported / "mnist.onnx")
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 28, 28])
    assert (probabilities.name, probabilities.shape) == ("probabilities", ["N", 10])
    metadata = session.get_modelmeta()
    assert "20 x 20" in metadata.description
    assert metadata.custom_metadata_map["licence"].startswith("MIT")
    page = (exported / "draw.html").read_text(encoding="utf-8")
    accuracy = re.search(r'"accuracy": "(99\.\d\d)"', page)[1]
    assert metadata.custom_metadata_map["accuracy"] == f"{accuracy} % of MNIST's 10,000 test digits"
    model = onnx.load(exported / "mnist.onnx")
    onnx.checker.check_model(model, full_check=True)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 10
    for node in convolutions:  # OpenCV refuses to load one without
        assert "kernel_shape" in [attribute.name for attribute in node.attribute]
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)  # for old runtimes, too


def test_readme_uses_onnx(exported, tmp_path, monkeypatch, capsys):
    readme = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*onnxruntime[^`]*)```", readme)
    (by_hand,) = re.findall(r'""".*"""\n(.*)    return', inspect.getsource(pictures.by_hand), re.DOTALL)
    for line in by_hand.splitlines():  # what benchmarks.pictures measures
        assert f"{line[4:]}\n" in code
    monkeypatch.chdir(tmp_path)
    Path("assets").mkdir()
    shutil.copy(exported / "mnist.onnx", ".")
    shutil.copy(ROOT / "assets" / "seven.png", "assets")
    exec(code, {})
    assert capsys.readouterr().out == "7\n"


# --- Command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["draw.html", "mnist.ONNX"])
def test_the_weights_are_those_named(name, folder, small_mnist):
    files = []
    torch.manual_seed(1)
    torch.save(mnist.Net().state_dict(), "other.pt")
    for options in ([], ["--model", "mnist.pt"], ["--model", "other.pt"]):
        assert export.main(["--data-dir", small_mnist, "--out", name, *options]) == Path(name)
        files.append(Path(name).read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_page_is_the_default(folder, small_mnist, capsys):
    assert export.main(["--data-dir", small_mnist]) == Path("draw.html")
    assert capsys.readouterr().out.startswith("Using the weights in mnist.pt\nWrote draw.html (")


def test_a_network_without_mistakes(folder, small_mnist, monkeypatch, digits):
    monkeypatch.setattr(mnist, "classify", lambda model, images: torch.eye(10)[digits(len(images))[1]])
    export.main(["--data-dir", small_mnist])
    text = Path("draw.html").read_text(encoding="utf-8")
    assert '"accuracy": "100.00"' in text
    assert text.count('"label"') == 10


@pytest.mark.parametrize("value", ["draw.pdf", "draw", "."])
def test_other_files_are_refused(value, folder, assert_refused):
    assert_refused(export.main, "--out", value)


def test_missing_folder_is_refused(folder, monkeypatch):
    monkeypatch.setattr(weights, "load", None)
    with pytest.raises(FileNotFoundError, match=r"no.draw\.html"):
        export.main(["--out", str(Path("no/draw.html"))])


def test_missing_weights_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        export.main(["--model", "absent.pt"])


@pytest.mark.skipif(sys.platform == "win32", reason="the fault is caused by POSIX means")
def test_full_disk_is_refused(folder, full_disk):
    Path("draw.html").write_bytes(b"an earlier page")
    done = subprocess.run([sys.executable, export.__file__], capture_output=True, text=True, preexec_fn=full_disk)
    assert done.returncode == 1
    assert done.stderr == "export.py: error: draw.html: File too large\n"
    assert Path("draw.html").read_bytes() == b"an earlier page"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["--help"])
    assert stop.value.code == 0
    assert ".html or .onnx" in capsys.readouterr().out
