"""What was found, made small enough to lie in a file and be drawn on the image."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from measure import geometry, verify
from measure.detections import Detections
from measure.outlines import outlines
from results.record import Drawn, DrawnRun

# Of a thousand proposals, nobody would see the picture any more.
PROPOSALS_DRAWN = 100
# Pixels of the longer side of a map of labels.
MAP_SIDE = 320
# Cells of an outline for each cell of a mask within its box, along either axis.
FINER = 4
# Corners of all masks of an image.
MOST_CORNERS = 4000
# Sides of pixels along the border of a mask, for each pixel of its height and width. What has more
# is no shape, but noise, as of weights that were never trained.
MOST_SIDES = 5


def drawn(detections: Detections, size: Sequence[int]) -> Drawn:
    """What was found, for drawing it: places in tenths of a pixel, scores to four digits.

    Args:
        size: height and width of the image that it is drawn on, which the detector's may be another
            size of.
    """
    scale = np.array(size[::-1]) / detections.image_size[::-1]
    count = PROPOSALS_DRAWN if detections.are_proposals else len(detections.scores)
    boxes, corners = detections.boxes[:count], np.zeros((0, 4, 2))
    if boxes.shape[1] == 5:
        corners = geometry.corners(boxes) * scale
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    else:
        boxes = boxes * np.tile(scale, 2)
    keypoints = detections.keypoints
    poses = np.zeros((0, 0, 2)) if keypoints is None else keypoints[:count, :, :2] * scale
    classes = np.full(count, -1) if detections.are_proposals else detections.classes
    return Drawn(
        boxes=_rows(boxes),
        scores=tuple(detections.scores[:count].round(4).tolist()),
        classes=tuple(classes[: len(boxes)].tolist()),
        corners=_rows(corners.reshape(len(corners), 8)),
        keypoints=tuple(map(_rows, poses)),
        labels=None if detections.sem_seg is None else _png(detections.sem_seg.argmax(axis=0)),
        masks=_masks(detections, boxes, size),
    )


def _masks(
    detections: Detections, boxes: np.ndarray, size: Sequence[int]
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Outlines of masks on an image.

    Args:
        boxes: N x 4, on the image.
        size: height and width of the image.
    """
    if detections.masks is None:
        return ()
    if detections.masks.ndim == 3:
        whole = (0.0, 0.0, float(size[1]), float(size[0]))
        return outlined((mask > 0.5, whole) for mask in detections.masks)
    # Probabilities of a few cells within the box: between them, they are interpolated.
    finer = (zoom(mask[0].astype(float), FINER, order=1) >= 0.5 for mask in detections.masks)
    return outlined(zip(finer, boxes.tolist()))


def outlined(
    masks: Iterable[tuple[np.ndarray, Sequence[float]]],
) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """The lines around each mask, as far as a page can hold them; noise has none.

    Args:
        masks: H x W bool each, and the box that it lies in, see `outlines`.
    """
    drawn: list[tuple[tuple[float, ...], ...]] = []
    corners = 0
    for mask, box in masks:
        lines = outlines(mask, box) if corners < MOST_CORNERS and not _is_noise(mask) else []
        corners += sum(map(len, lines)) // 2
        drawn.append(tuple(map(tuple, lines)))
    return tuple(drawn)


def _is_noise(mask: np.ndarray) -> bool:
    sides = sum(np.count_nonzero(np.diff(mask, axis=axis)) for axis in (0, 1))
    return sides > MOST_SIDES * sum(mask.shape)


def _rows(numbers: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, numbers.round(1).tolist()))


def _png(labels: np.ndarray) -> str:
    """A map of labels, H x W, as a PNG file in Base64."""
    from PIL import Image

    step = -(-max(labels.shape) // MAP_SIDE)
    image = Image.fromarray((labels[::step, ::step] % 256).astype(np.uint8), mode="P")
    # Hues a golden section apart: neighbours differ, and none comes twice.
    hues = (number * (5**0.5 - 1) / 2 % 1 for number in range(256))
    colors = (colorsys.hsv_to_rgb(hue, 0.7, 0.95) for hue in hues)
    image.putpalette([round(255 * part) for color in colors for part in color])
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def drawn_runs(
    reference: Sequence[Any],
    found: Sequence[Any],
    names: Sequence[str],
    precision: str,
    size: Sequence[int],
) -> tuple[DrawnRun, ...]:
    """What was found in each image, see `drawn`; nothing where it is malformed."""
    with suppress(ValueError):
        images = verify.find(reference, found, names, precision)
        return tuple(_drawn_run(image, size) for image in images)
    return ()


def _drawn_run(image: verify.Found, size: Sequence[int]) -> DrawnRun:
    shown = drawn(image.detections, size)
    most = PROPOSALS_DRAWN if image.detections.are_proposals else None
    return DrawnRun(
        **vars(shown),
        agrees=tuple(image.agrees[:most].tolist()),
        # Those that the reference's drawing has.
        lost=tuple(place for place in image.lost.tolist() if most is None or place < most),
    )
