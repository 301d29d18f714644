"""How alike are two boxes, masks, poses or maps of labels: NumPy arrays in, shares out."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

# How far off annotators of COCO are, as a share of the object's scale: nose, eyes, ears, shoulders,
# elbows, wrists, hips, knees, ankles (https://cocodataset.org/#keypoints-eval, and `kpt_oks_sigmas`
# of pycocotools).
COCO_SIGMAS = np.array(
    [
        *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
        *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
    ]
)
# Pairs of rotated boxes that are clipped at once: some 20 MB of them.
PAIRS_AT_ONCE = 20_000


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of N and M boxes, N x M.

    A pixel has an extent: boxes are widened by half of one to each side, lest a sliver at the
    border of the image, clipped to no width at all, overlaps with nothing, not even with itself.

    Args:
        first, second: N x 4 and M x 4 (XYXY), or N x 5 and M x 5, see `corners`.
    """
    if first.shape[1] == 5:
        widen = np.array([0, 0, 1, 1, 0])
        return rotated_iou(first + widen, second + widen)
    widen = np.array([-0.5, -0.5, 0.5, 0.5])
    return box_iou(first + widen, second + widen)


def areas(boxes: np.ndarray) -> np.ndarray:
    """Areas of N x 4 or N x 5 boxes."""
    if boxes.shape[1] == 5:
        return boxes[:, 2] * boxes[:, 3]
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def sides(boxes: np.ndarray) -> np.ndarray:
    """Widths and heights of N x 4 or N x 5 boxes, N x 2."""
    return boxes[:, 2:4] if boxes.shape[1] == 5 else boxes[:, 2:] - boxes[:, :2]


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of N x 4 and M x 4 boxes, N x M."""
    nearest = np.maximum(first[:, None, :2], second[:, :2])
    lengths = np.minimum(first[:, None, 2:], second[:, 2:]) - nearest
    return _over_union(lengths.clip(min=0).prod(axis=2), areas(first), areas(second))


def _over_union(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    union = first[:, None] + second - overlap
    # Of boxes that are turned inside out, the union may be nothing.
    return np.divide(overlap, union, out=np.zeros_like(union), where=union != 0)


# Rotated boxes ---------------------------------------------------------------------------------


def corners(boxes: np.ndarray) -> np.ndarray:
    """The four corners of rotated boxes in their order, N x 4 x 2.

    Args:
        boxes: N x 5: x and y of the center, width, height, and the angle in degrees by which they
            are turned counter-clockwise.
    """
    angles = np.radians(boxes[:, 4])
    cos, sin = np.cos(angles), np.sin(angles)
    # y points down in an image.
    along = np.stack([cos, -sin], axis=1) * boxes[:, 2:3] / 2
    down = np.stack([sin, cos], axis=1) * boxes[:, 3:4] / 2
    around = [-along - down, along - down, along + down, down - along]
    return boxes[:, None, :2] + np.stack(around, axis=1)


def rotated_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of N x 5 and M x 5 rotated boxes, N x M; see `corners`. Without extent, it is 0."""
    first, second = (
        np.concatenate([x[:, :2], x[:, 2:4].clip(min=0), x[:, 4:]], axis=1) for x in (first, second)
    )
    overlap = np.zeros((len(first), len(second)))
    radii = [np.hypot(x[:, 2], x[:, 3]) / 2 for x in (first, second)]
    apart = np.hypot(*(first[:, None, :2] - second[:, :2]).transpose(2, 0, 1))
    rows, columns = np.nonzero(apart < radii[0][:, None] + radii[1])
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        row, column = (x[start : start + PAIRS_AT_ONCE] for x in (rows, columns))
        center = first[row, None, :2]
        both = corners(first[row]) - center, corners(second[column]) - center
        overlap[row, column] = _common_areas(*both)
    return _over_union(overlap, areas(first), areas(second))


def _common_areas(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas that P pairs of rectangles, P x 4 x 2, have in common.

    What two convex shapes have in common is convex. Its corners are those of one that lie in the
    other, and the places where two sides cross.
    """
    crossings, cross = _crossings(first, second)
    points = np.concatenate([first, second, crossings], axis=1)
    counts = np.concatenate([_lie_in(first, second), _lie_in(second, first), cross], axis=1)
    # What does not count stands where another point does, and adds no area.
    some = np.take_along_axis(points, counts.argmax(axis=1)[:, None, None], axis=1)
    points = np.where(counts[:, :, None], points, some)
    x, y = (points - points.mean(axis=1, keepdims=True)).transpose(2, 0, 1)
    order = np.arctan2(y, x).argsort(axis=1)
    x, y = (np.take_along_axis(z, order, axis=1) for z in (x, y))
    doubled = (x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1)
    return np.where(counts.any(axis=1), np.abs(doubled) / 2, 0.0)


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def _lie_in(points: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """P x 4, bool: whether points, P x 4 x 2, lie in rectangles, P x 4 x 2, or on their border."""
    along = np.roll(shapes, -1, axis=1) - shapes
    turned = _cross(along[:, None], points[:, :, None] - shapes[:, None])
    least = -1e-9 * (along**2).sum(axis=2).max(axis=1)
    return (turned >= least[:, None, None]).all(axis=2)


def _crossings(first: np.ndarray, second: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Where the sides of one rectangle cross those of another: P x 16 x 2, and whether they do."""
    along, across = (np.roll(x, -1, axis=1) - x for x in (first, second))
    turned = _cross(along[:, :, None], across[:, None])
    between = second[:, None] - first[:, :, None]
    parallel = np.abs(turned) < 1e-12
    divisor = np.where(parallel, 1.0, turned)
    shares = (
        _cross(between, across[:, None]) / divisor,
        _cross(between, along[:, :, None]) / divisor,
    )
    cross = ~parallel
    for share in shares:
        cross &= (share >= 0) & (share <= 1)
    points = first[:, :, None] + shares[0][..., None] * along[:, :, None]
    return points.reshape(len(first), 16, 2), cross.reshape(len(first), 16)


# Masks, keypoints, maps ------------------------------------------------------------------------


def mask_iou(
    first: np.ndarray, second: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """IoU of each pair of masks, binarised at 0.5; two that are empty are equal."""
    shares = []
    for row, column in zip(rows, columns):
        one, other = first[row] > 0.5, second[column] > 0.5
        union = np.count_nonzero(one | other)
        shares.append(np.count_nonzero(one & other) / union if union else 1.0)
    return np.array(shares)


def sigmas(count: int) -> np.ndarray:
    """How far off each of so many keypoints may be: COCO's for its 17, else the mean of those."""
    if count == len(COCO_SIGMAS):
        return COCO_SIGMAS
    return np.full(count, COCO_SIGMAS.mean())


def oks(
    first: np.ndarray,
    second: np.ndarray,
    scales: np.ndarray,
    own_sigmas: Optional[Sequence[float]] = None,
) -> np.ndarray:
    """Object keypoint similarity of M pairs of poses, M.

    COCO's formula: the mean of exp(-d**2 / (2 * area * (2 * sigma)**2)) over the keypoints.

    Args:
        first, second: M x K x 2, in pixels.
        scales: M areas of the objects, in square pixels; below one, it is one.
        own_sigmas: K, how far off each keypoint may be; None: see `sigmas`.
    """
    squares = ((first - second) ** 2).sum(axis=2)
    each = sigmas(first.shape[1]) if own_sigmas is None else np.asarray(own_sigmas)
    spread = 2 * scales.clip(min=1)[:, None] * (2 * each) ** 2
    return np.exp(-squares / spread).mean(axis=1)


def near_borders(labels: np.ndarray, distance: int) -> np.ndarray:
    """H x W, bool: whether another label lies so close, in pixels along either axis.

    Args:
        labels: H x W.
    """
    window = 2 * distance + 1
    return maximum_filter(labels, window) != minimum_filter(labels, window)
