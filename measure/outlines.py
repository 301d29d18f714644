"""Outlines of masks, for drawing them: NumPy arrays in, closed lines out."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import numpy as np

# Cells of the longer side of a mask: more, nobody would see.
MOST_CELLS = 240
# Cells that a corner may lie off the line that leaves it out.
TOLERANCE = 0.75

Point = Tuple[int, int]


def outlines(mask: np.ndarray, box: Sequence[float]) -> List[List[float]]:
    """The lines around a mask: one for each part of it, and one for each hole.

    Args:
        mask: H x W bool.
        box: x1, y1, x2, y2 of where the mask lies in the image, in pixels.

    Returns:
        x and y of the corners of each line, one after the other, in tenths of a pixel; the last
        corner joins the first.
    """
    step = -(-max(mask.shape) // MOST_CELLS)
    if step > 1:
        mask = _coarse(mask, step)
    height, width = mask.shape
    scale = np.array([(box[2] - box[0]) / width, (box[3] - box[1]) / height])
    lines = [_simplified(np.array(line, dtype=float)) for line in _around(mask)]
    return [(line * scale + box[:2]).round(1).reshape(-1).tolist() for line in lines]


def _coarse(mask: np.ndarray, step: int) -> np.ndarray:
    """Whether half of each step x step pixels, or more, are of the mask.

    What the last cells have beyond the border counts as the border does.
    """
    height, width = (-side % step for side in mask.shape)
    whole = np.pad(mask, ((0, height), (0, width)), mode="edge").astype(float)
    cells = whole.reshape(whole.shape[0] // step, step, whole.shape[1] // step, step)
    return cells.mean(axis=(1, 3)) >= 0.5


def _around(mask: np.ndarray) -> List[List[Point]]:
    """The corners of the lines along the sides of pixels, with the mask to the right."""
    inside = np.pad(mask, 1)
    down, across = np.diff(inside.astype(int), axis=0), np.diff(inside.astype(int), axis=1)
    follows: Dict[Point, List[Point]] = {}
    sides = (
        *((y, x - 1, y, x) for y, x in np.argwhere(down > 0).tolist()),  # Its top: to the right.
        *((y, x, y, x - 1) for y, x in np.argwhere(down < 0).tolist()),
        *((y, x, y - 1, x) for y, x in np.argwhere(across > 0).tolist()),  # Its left: upwards.
        *((y - 1, x, y, x) for y, x in np.argwhere(across < 0).tolist()),
    )
    for y, x, to_y, to_x in sides:
        follows.setdefault((x, y), []).append((to_x, to_y))
    lines = []
    while follows:
        start = next(iter(follows))
        line, before, here = [], start, start
        while here in follows:
            after = _next(follows, before, here)
            line.append(here)
            before, here = here, after
        lines.append(line)
    return lines


def _next(follows: Dict[Point, List[Point]], before: Point, here: Point) -> Point:
    """Where the line goes on; where two pixels touch at a corner, it stays with its own."""
    ways = follows[here]
    right = (here[0] - (here[1] - before[1]), here[1] + (here[0] - before[0]))
    after = right if len(ways) > 1 and right in ways else ways[0]
    ways.remove(after)
    if not ways:
        del follows[here]
    return after


def _simplified(line: np.ndarray) -> np.ndarray:
    """A closed line, N x 2, without the corners that lie next to the line through the others.

    D. Douglas and T. Peucker, Algorithms for the reduction of the number of points required to
    represent a digitized line or its caricature, 1973.
    """
    # It is cut at two corners that stay: the first, and the one that lies farthest from it.
    far = int(((line - line[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([line, line[:1]])
    kept = np.zeros(len(closed), dtype=bool)
    kept[[0, far]] = True
    parts = [(0, far), (far, len(line))]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        along = closed[last] - closed[first]
        off = closed[first + 1 : last] - closed[first]
        apart = np.abs(off[:, 0] * along[1] - off[:, 1] * along[0]) / np.hypot(*along)
        most = first + 1 + int(apart.argmax())
        if apart.max() > TOLERANCE:
            kept[most] = True
            parts += [(first, most), (most, last)]
    # One that has no area any more stays as it is.
    return line[kept[:-1]] if kept[:-1].sum() > 2 else line
