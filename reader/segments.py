"""From strokes to segments, each a part of one digit, in lines of text: over-segmentation."""

import typing

from reader.rulings import EIGHT, count_above

import numpy as np
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

SPECK = 0.09  # of the highest stroke's height: what is smaller is no mark


class Line(typing.NamedTuple):
    """A line of text: its N segments from left to right."""

    labels: np.ndarray  # (H, W): 1 to N in the pixels of a segment, else 0
    boxes: np.ndarray  # (N, 4): left, top, right, bottom
    is_cut: np.ndarray  # bool (N,): whether a stroke was cut between the segment and the one before


def boxes_of(labels):
    """Return the boxes (N, 4) of the labels 1 to N in (H, W): left, top, right, bottom."""
    places = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
    return np.array(places, dtype=int).reshape(-1, 4)


def find_cuts(stroke, highest):
    """Return the columns at which to try a cut through a stroke (H, W): where no column near is lower.

    That is within the size of a speck, given the height of the highest stroke. What is narrow or low is whole.
    """
    height, width = stroke.shape
    if width <= 0.5 * height or height < 0.4 * highest:
        return []
    reach = max(2, round(SPECK * highest))
    tall = height - stroke.argmax(0) - stroke[::-1].argmax(0)
    smooth = ndimage.uniform_filter1d(tall.astype(float), 3)
    valleys, _ = ndimage.label(smooth == ndimage.minimum_filter1d(smooth, 2 * reach + 1))
    columns = [(valley.start + valley.stop) // 2 for (valley,) in ndimage.find_objects(valleys)]
    return [x for x in columns if reach < x < width - reach and tall[x] < 0.7 * height]


def group(boxes, rows, cells):
    """Return the indices of the strokes with these boxes (N, 4) on each line of text, from top to bottom."""
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    across = np.minimum.outer(right, right) - np.maximum.outer(left, left)  # by how much they overlap
    down = np.minimum.outer(bottom, bottom) - np.maximum.outer(top, top)
    lower, higher = np.minimum.outer(height, height), np.maximum.outer(height, height)
    # A stroke is on the line of the nearest one to its right at the same height, and of those that it is stacked with.
    follows = (2 * down >= lower) & np.less.outer(left + right, left + right)
    nearest = np.where(follows, across, -np.inf)
    follows &= nearest == nearest.max(axis=1, keepdims=True)
    gap = 0.1 * higher * np.where(lower < 0.6 * higher, 1, -1)  # two that are as high are digits of two lines
    stacked = (2 * across >= np.minimum.outer(width, width)) & (down >= -gap)
    same_row = np.equal.outer(rows, rows)
    beside = np.not_equal.outer(cells, cells) & (down > -0.3 * higher)
    linked = same_row & (follows | stacked | beside)
    count, line = connected_components(linked, directed=False)
    # A line much lower than the highest holds marks: they belong to the nearest digits, or to none if those are far.
    marks = ndimage.maximum(height, line, range(count))[line] < 0.35 * height.max()
    distance = np.hypot(across.clip(max=0), down.clip(max=0))
    distance[~same_row | marks] = np.inf
    near = distance.min(axis=1) < height.max() / 2
    line = np.where(marks, np.where(near, line[distance.argmin(axis=1)], -1), line)
    return sorted(
        (np.flatnonzero(line == k) for k in set(line) - {-1}), key=lambda line: np.median((top + bottom)[line])
    )


FAR, HIGH = 0.3, 1.5  # what is cut reaches over a ruling by FAR of its height, and is HIGH times as high as a digit


def digit_height(heights):
    """Return the height of a digit, given those of strokes (N,): high ones count for more."""
    ordered = np.sort(heights)
    return ordered[np.searchsorted(ordered.cumsum(), ordered.sum() / 2)]


def split_at_rulings(strokes, rulings):
    """Cut strokes (H, W) that are too high for a digit where they cross a Ruling across: each part holds one."""
    if not (rulings and strokes.any()):
        return strokes
    labels, _ = ndimage.label(strokes, EIGHT)
    left, top, right, bottom = boxes_of(labels).T
    y, x = np.ogrid[: strokes.shape[0], : strokes.shape[1]]
    is_high = bottom - top > HIGH * digit_height(bottom - top)
    for ruling in rulings:
        middle = ruling.at((left + right) / 2)
        is_far = np.minimum(middle - top, bottom - middle) > FAR * (bottom - top)
        is_cut = np.append(False, is_high & is_far & (ruling.x[0] < right) & (left < ruling.x[-1]))
        strokes = strokes & ~(is_cut[labels] & (abs(y - ruling.at(x)) <= 1))
    return strokes


def segment(strokes, frame, single):
    """Return the lines of text in strokes (H, W), from top to bottom; if `single`, all is one segment."""
    strokes = split_at_rulings(split_at_rulings(strokes, frame[0]).T, frame[1]).T
    labels, _ = ndimage.label(strokes, EIGHT)
    left, top, right, bottom = boxes_of(labels).T
    highest = max(bottom - top, default=0)
    kept = np.append(False, np.maximum(right - left, bottom - top) >= SPECK * highest)[labels]
    strokes = kept.astype(int) if single else ndimage.label(kept, EIGHT)[0]
    labels, owner = np.zeros_like(strokes), []  # the stroke of each segment
    for i, place in enumerate(ndimage.find_objects(strokes)):
        stroke = strokes[place] == i + 1
        columns = [] if single else find_cuts(stroke, highest)
        labels[place] += stroke * (len(owner) + 1 + np.searchsorted(columns, range(stroke.shape[1]), side="right"))
        owner += [i] * (len(columns) + 1)
    boxes, owner, lines = boxes_of(labels), np.array(owner), []
    whole = boxes_of(strokes)
    x, y = (whole[:, :2] + whole[:, 2:]).T / 2
    rows, cells = count_above(frame[0], x, y), count_above(frame[1], y, x)
    for line in group(whole, rows, cells) if owner.size else []:
        own = np.flatnonzero(np.isin(owner, line))
        own = own[np.argsort(boxes[own, 0] + boxes[own, 2], kind="stable")]
        number = np.zeros(len(owner) + 1, dtype=int)
        number[own + 1] = range(1, len(own) + 1)
        lines.append(Line(number[labels], boxes[own], np.append(False, np.diff(owner[own]) == 0)))
    return lines
