"""From strokes to rulings, the straight lines of lined paper, forms and tables: form dropout (Yu and Jain, 1996).

Runs of pixels, one below the other, are linked to those beside them that are as long: a block adjacency graph. Straight
blocks that continue each other are a ruling. What is said of rulings across holds for those down when transposed.
"""

import typing

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

EIGHT = np.ones((3, 3))  # the neighbours of a pixel: the diagonal ones too
TILT = 0.2  # of a ruling, at most, from the picture's axes
BLOCK = 6  # pixels: what is shorter is no block
REACH = 2.5  # pixels: rulings that come so near meet


class Runs(typing.NamedTuple):
    """The N runs of pixels one below the other in strokes (H, W)."""

    number: np.ndarray  # (H, W): in which run each pixel is, from 1 to N; 0 if in none
    x: np.ndarray  # (N + 1,) each; the first is of no run
    top: np.ndarray
    bottom: np.ndarray  # of the last pixel


class Ruling(typing.NamedTuple):
    """A straight line across a picture, perhaps a little bent."""

    x: np.ndarray  # (M,): of points on its middle, from left to right
    y: np.ndarray
    thickness: float  # in pixels

    def at(self, x):
        """Return y at x, or at the end that is nearer."""
        return np.interp(x, self.x, self.y)


def find_runs(strokes):
    """Return the Runs of strokes (H, W)."""
    columns = strokes.T
    starts, ends = columns.copy(), columns.copy()
    starts[:, 1:] &= ~columns[:, :-1]
    ends[:, :-1] &= ~columns[:, 1:]
    number = starts.cumsum().reshape(columns.shape) * columns
    (x, top), (_, bottom) = np.nonzero(starts), np.nonzero(ends)
    return Runs(number.T, *(np.append(0, values) for values in (x, top, bottom)))


def find_blocks(strokes):
    """Return the straight blocks of strokes (H, W), as Rulings."""
    number, x, top, bottom = find_runs(strokes)
    y, length = (top + bottom) / 2, bottom - top + 1
    pairs = np.stack([number[:, :-1], number[:, 1:]]).reshape(2, -1)
    pairs = pairs[:, pairs.all(axis=0)]
    one, other = length[pairs]
    pairs = pairs[:, abs(one - other) <= 1 + np.minimum(one, other) / 4]
    graph = coo_array((np.ones(len(pairs.T)), pairs), shape=(len(x), len(x)))
    count, block = connected_components(graph, directed=False)

    def of_blocks(function, values):
        return function(values, block, range(count))

    first, last = of_blocks(ndimage.minimum, x), of_blocks(ndimage.maximum, x)
    thickness, width = of_blocks(ndimage.median, length), last - first + 1
    x_mean, y_mean = of_blocks(ndimage.mean, x), of_blocks(ndimage.mean, y)
    dx, dy = x - x_mean[block], y - y_mean[block]
    slope = of_blocks(ndimage.mean, dx * dy) / of_blocks(ndimage.mean, dx * dx).clip(1e-9)  # by least squares
    off = np.sqrt(of_blocks(ndimage.mean, (dy - slope[block] * dx) ** 2))
    straight = (off < 0.7 + 0.01 * width) & (abs(slope) < TILT) & (np.bincount(block) < 1.2 * width)
    ends = np.stack([first, last], axis=1)
    heights = y_mean[:, None] + slope[:, None] * (ends - x_mean[:, None])
    long = (width >= np.maximum(BLOCK, 2 * thickness)) & (thickness <= max(strokes.shape) / 8)
    return [Ruling(ends[i], heights[i], thickness[i]) for i in np.flatnonzero(straight & long)]


def join(rulings):
    """Return the Rulings that these are pieces of."""
    if not rulings:
        return []
    x0, x1, y0, y1 = np.array([[*ruling.x[[0, -1]], *ruling.y[[0, -1]]] for ruling in rulings]).T
    thickness = np.array([ruling.thickness for ruling in rulings])
    start, stop = np.minimum.outer(x1, x1), np.maximum.outer(x0, x0)  # of the gap between two
    gap, shorter = stop - start, np.minimum.outer(x1 - x0, x1 - x0)
    y = y0[:, None] + ((y1 - y0) / (x1 - x0))[:, None] * ((start + stop) / 2 - x0[:, None])  # in its middle
    near = (gap > -REACH) & (gap < 6 * REACH + shorter / 2)
    level = abs(y - y.T) < 1.5 + np.minimum.outer(thickness, thickness) / 2
    count, number = connected_components(near & level, directed=False)
    joined = []
    for group in (np.flatnonzero(number == k) for k in range(count)):
        x, y = (np.concatenate([getattr(rulings[i], axis) for i in group]) for axis in "xy")
        order = x.argsort(kind="stable")
        joined.append(Ruling(x[order], y[order], np.median(thickness[group])))
    return joined if count == len(rulings) else join(joined)


def extend(ruling, strokes):
    """Return the Ruling, its ends moved on as far as the strokes (H, W) go."""
    slope = (ruling.y[-1] - ruling.y[0]) / (ruling.x[-1] - ruling.x[0])
    x, y = ruling.x.copy(), ruling.y.copy()
    for end, ahead in ((0, np.arange(round(x[0]), -1, -1)), (-1, np.arange(round(x[-1]), strokes.shape[1]))):
        rows = (y[end] + slope * (ahead - x[end])).round().astype(int)
        inside = (rows >= 0) & (rows < len(strokes))
        ink = np.append(inside & strokes[rows.clip(0, len(strokes) - 1), ahead], False)
        x[end] = ahead[max(0, ink.argmin() - 1)]
        y[end] += slope * (x[end] - ahead[0])
    return Ruling(x, y, ruling.thickness)


def is_part(ruling, other):
    """Return whether a Ruling lies on another that is no shorter, as a stroke that was extended along it does."""
    start, stop = ruling.x[[0, -1]]
    apart = abs(ruling.at((start + stop) / 2) - other.at((start + stop) / 2))
    return other.x[0] <= start and stop <= other.x[-1] and apart < REACH + ruling.thickness / 2


def find_rulings(strokes):
    """Return the Rulings across strokes (H, W)."""
    found = []
    rulings = [extend(ruling, strokes) for ruling in join(find_blocks(strokes))]
    for ruling in sorted(rulings, key=lambda ruling: (-np.ptp(ruling.x), ruling.thickness)):
        if not any(is_part(ruling, other) for other in found):
            found.append(ruling)
    return found


def count_above(rulings, x, y):
    """Return how many of the Rulings are above each of the points (N,)."""
    return sum((ruling.at(x) < y for ruling in rulings), start=np.zeros(len(x), dtype=int))
