"""From rulings to frames and tables: what belongs to them is no digit's."""

from reader.rulings import EIGHT, REACH, find_runs

import numpy as np
from scipy import ndimage

SHORTEST = 12  # pixels: what is shorter is not of a frame
ALIKE = 0.1  # of a ruling's length: one that reaches as far, but for this, is as long
FADED = 5  # pixels by which a ruling may go on, too pale to be found
TOOTH = 0.75  # of the highest stroke's height: a comb's teeth are lower


def are_alike(ruling, rulings):
    """Return which of the rulings (N,) start and end where one does, to within a tenth of its length."""
    ends = np.array([other.x[[0, -1]] for other in rulings]).reshape(-1, 2)
    return (abs(ends - ruling.x[[0, -1]]) < REACH + ALIKE * np.ptp(ruling.x)).all(axis=1)


def is_on(ruling, x, y):
    """Return whether the point (x, y) is on a Ruling across, or hardly beside it."""
    near = REACH + ruling.thickness / 2
    return abs(ruling.at(x) - y) < near and ruling.x[0] - near < x < ruling.x[-1] + near


def held_ends(ruling, own, others, shape):
    """Return whether a Ruling across starts, and whether it ends, at an edge of the picture (H, W) or at another, down.

    If it runs from edge to edge, it must cross one of them. What is thicker than what it ends at is a digit's stroke,
    if no other of its `own` direction is as long: then it may be two sides of cells.
    """
    height, width = shape

    def crosses(other):
        x = other.at(np.median(ruling.y))
        return ruling.x[0] < x < ruling.x[-1] and is_on(other, ruling.at(x), x)

    ends = (ruling.x[0], ruling.y[0]), (ruling.x[-1], ruling.y[-1])
    at_edge = [min(x, width - 1 - x, y, height - 1 - y) < REACH + ruling.thickness / 2 for x, y in ends]
    if all(at_edge):
        return [any(map(crosses, others))] * 2
    sides = 2 if are_alike(ruling, own).sum() > 1 else 1
    others = [other for other in others if ruling.thickness < sides * other.thickness + 1]
    return [edge or any(is_on(other, y, x) for other in others) for edge, (x, y) in zip(at_edge, ends, strict=True)]


def find_held(across, down, shape):
    """Return which Rulings across and down others hold at both ends, or at one end if one held at both is as long."""
    held = across, down
    while True:
        still = [ruling for ruling in held[0] if all(held_ends(ruling, *held, shape))]
        still = still, [ruling for ruling in held[1] if all(held_ends(ruling, held[1], still, shape[::-1]))]
        if list(map(len, still)) == list(map(len, held)):
            break
        held = still

    def as_long(rulings, own, others, shape):
        return [one for one in rulings if are_alike(one, own).any() and any(held_ends(one, rulings, others, shape))]

    return as_long(across, *held, shape), as_long(down, *held[::-1], shape[::-1])


def erase_across(strokes, rulings):
    """Remove the Rulings from strokes (H, W); what crosses or touches them stays."""
    number, at, top, bottom = find_runs(strokes)
    is_gone = np.zeros(len(at), dtype=bool)
    for ruling in rulings:
        x = np.arange(max(0, round(ruling.x[0]) - FADED), min(strokes.shape[1], round(ruling.x[-1]) + FADED + 1))
        rows = ruling.at(x).round().astype(int) + np.array([[-1], [0], [1]])
        on, half = number[rows.clip(0, len(strokes) - 1), x], ruling.thickness / 2
        above, below = ruling.at(at[on]) - half - top[on], bottom[on] - ruling.at(at[on]) - half
        little = 1 + half / 2  # by which the ruling itself may be thicker
        is_gone[on[(above <= little) & (below <= little)]] = True
    return strokes & ~is_gone[number]


def erase(strokes, across, down):
    """Remove the Rulings across and down from strokes (H, W); strokes that cross them stay."""
    if not (across or down):
        return strokes
    rest = erase_across(erase_across(strokes, across).T, down).T
    near = ndimage.maximum_filter(strokes & ~rest, 7)  # what is nowhere farther away is left of the rulings
    return ndimage.binary_propagation(rest & ~near, EIGHT, rest)


def find_combs(across, down, highest):
    """Return the Rulings of combs: lines across on which three teeth or more stand, alike and low, and these teeth."""
    lines, teeth = [], []
    for line in across:
        low = [one for one in down if np.ptp(one.x) < TOOTH * highest and is_on(line, one.y[-1], one.x[-1])]
        alike = [one for one in low if are_alike(one, low).sum() > 2]
        if alike:
            lines, teeth = [*lines, line], teeth + alike
    return lines, teeth


def find_frames(across, down, strokes):
    """Return which of the Rulings across and down strokes (H, W) are of frames and tables.

    Those down are longer than the highest stroke that is left without them, or reach the picture's edge: else the 8 of
    a display would be a frame.
    """
    long = [[ruling for ruling in rulings if np.ptp(ruling.x) > SHORTEST] for rulings in (across, down)]
    across, down = find_held(*long, strokes.shape)
    rest, _ = ndimage.label(erase(strokes, across, down), EIGHT)
    highest = max((y.stop - y.start for y, _ in ndimage.find_objects(rest)), default=0)
    tall = [
        ruling
        for ruling in down
        if np.ptp(ruling.x) > highest or ruling.x[0] < REACH or ruling.x[-1] > len(strokes) - 1 - REACH
    ]
    held, combs = find_held(across, tall, strokes.shape), find_combs(*long, highest)
    return [own + comb for own, comb in zip(held, combs, strict=True)]
