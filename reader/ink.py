"""From shades of grey to hypotheses: the ways in which ink can be told from what it is written on."""

import itertools
import math

from reader import frames, marks, rulings
from reader.rulings import EIGHT

import numpy as np
from scipy import ndimage

MIN_CONTRAST = 8  # levels of grey, of 255, that a picture must span

# --- The background ------------------------------------------------------------------------------------------------


def otsu(values):
    """Return the threshold between two classes of `values`: Otsu, A threshold selection method, 1979."""
    counts, edges = np.histogram(values, 64)
    centres = (edges[1:] + edges[:-1]) / 2
    share = counts.cumsum()[:-1] / counts.sum()
    moment = (counts * centres).cumsum() / counts.sum()
    between = (moment[-1] * share - moment[:-1]) ** 2 / (share * (1 - share)).clip(1e-9)
    return edges[1 + between.argmax()]


def subtract_plane(grey, part):
    """Subtract from a part of a picture (H, W; H, W) the least-squares plane: light that falls from one side."""
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    grey = grey - terms @ np.linalg.lstsq(terms[part], grey[part], rcond=None)[0]
    return np.where(part, grey, np.median(grey[part]))


def enclosed(light):
    """Return which pixels (H, W) have light ones on the left and on the right."""
    return np.logical_or.accumulate(light, axis=1) & np.logical_or.accumulate(light[:, ::-1], axis=1)[:, ::-1]


def extent(mask):
    """Return the height and width of what is true in a mask (H, W)."""
    return [np.ptp(places) + 1 for places in np.nonzero(mask)]


def find_sheet(light):
    """Find a light sheet with little ink on something dark, given which pixels (H, W) of a picture are light.

    Returns which pixels are on it; None if there is no sheet of more than half the picture's width and height, or it is
    all of the picture.
    """
    labels, _ = ndimage.label(light)
    largest = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    size = extent(largest)
    large = all(2 * length > side for length, side in zip(size, light.shape, strict=True))
    if not large or largest.sum() < 0.7 * math.prod(size):
        return None
    sheet = enclosed(largest) | enclosed(largest.T).T
    inside = ndimage.minimum_filter(sheet, 5)  # less its edge
    return inside if inside.any() and not sheet.all() else None


NO_TABLE = 5  # the cost of reading what is on a sheet alone if all around it is light


def views(grey):
    """Yield each way to look at a picture (H, W): at all of it, or at a sheet alone; at dark ink, or at light.

    Each is (cost, the picture with light ink (H, W), the height and width of the picture or the sheet).
    """
    flat = subtract_plane(grey, np.ones_like(grey, dtype=bool))
    if np.ptp(flat) < MIN_CONTRAST:
        return
    light, as_is = flat > otsu(flat), grey > otsu(grey)
    polarities = ((-1, light, as_is), (1, ~light, ~as_is))  # dark ink, then light ink
    for polarity, on, _ in polarities:
        border = np.concatenate([on[0], on[-1], on[1:-1, 0], on[1:-1, -1]])
        if on.mean() + border.mean() > 0.6:  # it may be the background
            yield 0, polarity * flat, grey.shape
    for polarity, on, as_is in polarities:
        sheet = find_sheet(on)
        if sheet is None:  # the plane may be tilted by a sheet that is not in the middle
            sheet = find_sheet(as_is)
        if sheet is not None:
            yield NO_TABLE * on[~sheet].mean(), polarity * subtract_plane(grey, sheet), extent(sheet)


# --- Ink and strokes -----------------------------------------------------------------------------------------------

WINDOW = 5  # times as wide as the strokes: what is wider belongs to the background
FAINT, DARK = 0.22, 0.4  # a stroke is what is above FAINT of the ink's level, connected with ink above DARK


def subtract_background(grey, window):
    """Return how far each pixel of a picture (H, W) is above the background, which is wider than the window."""
    grey = grey - ndimage.grey_opening(ndimage.uniform_filter(grey, 3), size=(window, window))
    return grey - np.median(grey[grey <= otsu(grey)])


def find_ink(grey, window):
    """Find light ink in a picture (H, W): what is wider than `window` pixels, or than WINDOW strokes, is background.

    Returns how much ink each pixel holds, from 0 to 1, and which pixels may belong to a stroke, both (H, W); None if
    nothing stands out.
    """
    if np.ptp(grey) < MIN_CONTRAST:
        return None
    for _ in range(2):  # then with a window that follows the thickness of the strokes
        ink = subtract_background(grey, window)
        smooth = ndimage.uniform_filter(ink, 3)
        level = np.median(smooth[smooth >= smooth.max() / 2])
        noise = 1.5 * np.median(np.abs(ink - smooth))  # the standard deviation, if it is normal
        if level < max(MIN_CONTRAST, 4 * noise):
            return None
        strokes = smooth > FAINT * level
        window = min(window, round(WINDOW * marks.thickness(strokes)))
    floor = max(0.1 * level, 2 * noise)
    return ((ink - floor) / (level - floor)).clip(0, 1), strokes


def hysteresis(ink, strokes):
    """Return the strokes (H, W) that have dark pixels, given the ink (H, W)."""
    return ndimage.binary_propagation((ndimage.uniform_filter(ink, 3) > DARK) & strokes, EIGHT, strokes)


# --- All together --------------------------------------------------------------------------------------------------

GUESS = 0.75  # the cost of removing ruled lines, rings, or what lies along the edges: a negative log-probability
BAR = 0.25  # the cost of removing an underline, which may be part of a digit: a 7 on a line looks like a 2
WINDOWS = (2, 0), (8, 1.5)  # what a picture is divided by for the first window, and its cost; 8 is for shadows
LINE = 0.9  # of the paper's width or height: what is longer may be a line of ruled paper


def hypotheses(grey, can_win):
    """Yield each way to find ink in a picture (H, W) whose cost can still win, which `can_win(cost)` tells.

    Each is (cost, how much ink each pixel holds, from 0 to 1 (H, W), which pixels are of a stroke (H, W), which are of
    one that is too faint (H, W), the Rulings across and down of frames).
    """
    for (divisor, penalty), (cost, view, size) in itertools.product(WINDOWS, views(grey)):
        cost += penalty
        if not can_win(cost) or (found := find_ink(view, max(view.shape) // divisor)) is None:
            continue
        ink, strokes = found
        lines = rulings.find_rulings(strokes), rulings.find_rulings(strokes.T)
        frame = frames.find_frames(*lines, strokes)
        ruled = [
            own + [ruling for ruling in others if np.ptp(ruling.x) > LINE * length]
            for own, others, length in zip(frame, lines, size[::-1], strict=True)
        ]
        if sum(map(len, frame)) < 3 or not hysteresis(ink, frames.erase(strokes, *frame)).any():
            frame = [], []  # it may be the bars of a 4, or all of a 0
        before = None
        for extra, erased in ((0, frame), (GUESS, ruled)):
            if not can_win(cost + extra) or np.array_equal(rest := frames.erase(strokes, *erased), before):
                break
            left = np.where(strokes & ~rest, 0, ink)
            whole = hysteresis(left, rest)
            clear = marks.clear_edges(marks.erase_rings(whole))
            total = cost + extra + GUESS * (clear != whole).any()
            yield total, left, clear, rest & ~whole, frame
            if can_win(total + BAR) and ((bare := marks.erase_bars(clear)) != clear).any():
                yield total + BAR, left, bare, rest & ~whole, frame
            before = rest
