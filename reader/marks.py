"""From strokes to those of digits: what is drawn around them or below, or lies along the edges, is not theirs."""

from reader.rulings import EIGHT
from reader.segments import boxes_of

import numpy as np
from scipy import ndimage

INSIDE = 0.25  # of a ring's height: what it is drawn around is as high, the dot in a 0 is not
GAP = 0.04  # of a ring's height: a gap up to this counts as closed
ALONG = 0.7  # of a stroke's height or width: what touches an edge of the picture as far lies along it


def thickness(strokes):
    """Return how thick strokes (H, W) are, in pixels: an area divided by half the length of its outline."""
    return 2 * strokes.sum() / (strokes & ~ndimage.binary_erosion(strokes)).sum()


def erase_rings(strokes):
    """Remove from strokes (H, W) what is drawn around others, as a circle is around an answer.

    A table has many holes, a ring hardly more than one. If a digit touches it, only the rim is removed.
    """
    labels, _ = ndimage.label(strokes, EIGHT)
    places = ndimage.find_objects(labels)
    heights, rest = np.array([0, *(y.stop - y.start for y, _ in places)]), strokes.copy()
    for number, place in enumerate(places, start=1):
        high, gap = INSIDE * heights[number], round(GAP * heights[number])
        around = np.pad(labels[place], gap + 1)
        ring = around == number
        closed = ndimage.grey_closing(ring, 2 * gap + 1)
        filled = ndimage.binary_fill_holes(closed)
        holes, _ = ndimage.label(filled & ~closed)
        sizes = np.bincount(holes[holes > 0], minlength=2)
        if sizes.max() > 0.8 * sizes.sum() and heights[around[holes == sizes.argmax()]].max() > high:
            is_deep = ndimage.distance_transform_edt(filled) > 1.5 * thickness(ring)
            parts, _ = ndimage.label(ring & is_deep, EIGHT)
            digits = [k for k, (y, _) in enumerate(ndimage.find_objects(parts), start=1) if y.stop - y.start > high]
            rest[place] &= ~(ring & ~np.isin(parts, digits))[gap + 1 : -gap - 1, gap + 1 : -gap - 1]
    return rest


def erase_bars(strokes):
    """Remove from strokes (H, W) underlines: what is flat, and has a high stroke above it but none below."""
    labels, _ = ndimage.label(strokes, EIGHT)
    left, top, right, bottom = boxes_of(labels).T
    width, height, highest = right - left, bottom - top, max(bottom - top, default=0)
    is_flat = (height < 0.35 * highest) & (width > 3 * height) & (2 * width > highest)
    beside_high = np.less.outer(left, right) & np.greater.outer(right, left) & (2 * height > highest)
    middle, little = (top + bottom) / 2, 0.1 * highest
    is_under = (beside_high & np.greater_equal.outer(middle + little, bottom)).any(axis=1)
    is_over = (beside_high & np.less_equal.outer(middle - little, top)).any(axis=1)
    return strokes & ~np.append(False, is_flat & is_under & ~is_over)[labels]


def clear_edges(strokes):
    """Remove from strokes (H, W) what lies along the picture's edges, if all else keeps clear of them.

    A stroke lies along one if most of its side is there and it is solid, or far longer, as a cut ruling is; or if it
    lies along two, as what is around a sheet does.
    """
    labels, count = ndimage.label(strokes, EIGHT)
    sides = [[part.stop - part.start for part in place] for place in ndimage.find_objects(labels)]
    height, width = np.array([[1, 1], *sides]).T
    is_solid = 3 * np.bincount(labels.ravel()) > height * width
    signs = np.zeros(count + 1)
    for turned, side, depth in ((labels, width, height), (labels.T, height, width)):
        for edge in turned[[0, -1]]:
            is_along = np.bincount(edge, minlength=count + 1) > ALONG * side
            signs += is_along * (1 + (is_solid | (3 * side < depth)))
    rest = strokes & ~(signs > 1)[labels]
    is_clear = not (rest[[0, -1]].any() or rest[:, [0, -1]].any())
    return rest if rest.any() and is_clear else strokes
