"""From a line of segments to digits: the best path through a lattice (LeCun et al., 1998, sections V and VI).

Its nodes are the boundaries between segments. An arc leads over one or more segments, which are a candidate for a
digit, or one that is left out. All costs are negative log-probabilities.
"""

import math
import typing

from reader.digit import Digit, classify, to_form
from reader.segments import digit_height

import numpy as np
from scipy import ndimage

CUT = 0.75  # what each cut through a stroke costs
LEFT_OUT = 8  # what ink costs that is in no digit, if it is as large as a digit
JOINED = 4  # what two segments side by side cost in one digit, if they are as high as a digit
PIECES = 5  # of a digit, at most: a chain of dots, as along a notebook's spiral, has more
AT_EDGE = 0.5  # what a digit costs that touches an edge of the picture
LOW, WIDE = 3, 2  # what a digit costs that is low for its line, or wide for its height
WIDEST, MOST = 1.6, 8  # a digit's width in heights of the line, and in segments
STEM, STEM_OFF = 1.2, 0.3  # how many heights of the line a segment keeps if it is higher; what losing the rest costs


class Arc(typing.NamedTuple):
    start: int  # the node where it begins
    stop: int
    score: float
    digits: list  # the Digit that it reads, or none
    is_whole: bool  # whether nothing was cut, joined or left out


def candidates(line, ink, height):
    """Yield (start, stop, box, digit (28, 28), True) for each run of segments that may be one, given the line's height.

    A segment with a long stem follows once more without it, with False.
    """
    count = len(line.boxes)
    for start in range(count):
        for stop in range(start + 1, min(count, start + MOST) + 1):
            left, top = line.boxes[start:stop, :2].min(axis=0).tolist()
            right, bottom = line.boxes[start:stop, 2:].max(axis=0).tolist()
            if stop - start > 1 and right - left > WIDEST * max(height, bottom - top):
                continue
            place = slice(max(0, top - 1), bottom + 1), slice(max(0, left - 1), right + 1)
            own = (line.labels[place] > start) & (line.labels[place] <= stop)
            digit = ink[place] * ndimage.maximum_filter(own, 3)
            if digit.any():
                yield start, stop, (left, top, right, bottom), to_form(digit), True
            head = digit[: round(STEM * height)]
            if stop - start == 1 and bottom - top > STEM * height and head.any():
                yield start, stop, (left, top, right, bottom), to_form(head), False


def build_arcs(model, ink, line):
    """Return the arcs of a line of text, given the ink (H, W)."""
    widths, heights = (line.boxes[:, 2:] - line.boxes[:, :2]).T
    height = digit_height(heights)
    beside = 2 * (line.boxes[:-1, 2] - line.boxes[1:, 0]) <= np.minimum(widths[:-1], widths[1:])
    joined = JOINED * (beside & ~line.is_cut[1:]) * np.minimum(heights[:-1], heights[1:]) / heights.max()
    cut = CUT * line.is_cut
    sizes = (np.maximum(widths, heights) / height).clip(max=1)
    arcs = [Arc(i, i + 1, -LEFT_OUT * size - cut[i], [], False) for i, size in enumerate(sizes)]
    found = list(candidates(line, ink, height))
    table = classify(model, [digit for *_, digit, _ in found]) if found else []
    for (start, stop, box, digit, is_whole), probabilities in zip(found, table, strict=True):
        left, top, right, bottom = box
        at_edge = left == 0 or top == 0 or right == ink.shape[1] or bottom == ink.shape[0]
        low, wide = 0.6 - (bottom - top) / height, (right - left) / (bottom - top) - 1
        join = joined[start : stop - 1].sum()
        cost = (
            AT_EDGE * at_edge + LOW * max(0, low) + WIDE * max(0, wide) + STEM_OFF * (not is_whole) + join + cut[start]
        )
        is_whole = is_whole and (join == 0 or at_edge) and not line.is_cut[start]  # a crop may part a digit
        is_whole = is_whole and (~line.is_cut[start + 1 : stop]).sum() < PIECES
        score = math.log(probabilities.max()) - cost
        arcs.append(Arc(start, stop, score, [Digit(box, digit, probabilities)], is_whole))
    return arcs


def best_path(arcs):
    """Return the best path over `arcs` from the first node to the last: its score, its digits, and if all is whole."""
    best = {0: (0, [], True)}
    for arc in sorted(arcs, key=lambda arc: arc.stop):
        score, digits, is_whole = best[arc.start]
        if arc.stop not in best or score + arc.score > best[arc.stop][0]:
            best[arc.stop] = score + arc.score, digits + arc.digits, is_whole and arc.is_whole
    return best[max(best)]
