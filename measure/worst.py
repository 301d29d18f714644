"""Images of a data set in which a run finds something else than the reference, to be drawn.

Boxes, masks and keypoints are compared pair by pair. It runs in a worker, as the masks are
compared by pycocotools.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from measure import geometry, protocol
from measure.coco_results import kept_images
from measure.drawing import outlined
from measure.verify import SAME_OBJECT_IOU, pair, pose_likeness
from results.record import Drawn, DrawnRun

# What is drawn for a run, at most, and what is worth it: a detection of low score more or less.
MOST_IMAGES = 12
LEAST_LOSS = 0.1

# Detections of an image in COCO's format of results.
Found = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """What a run finds in an image, beside what the reference finds.

    Attributes:
        loss: sum of the scores of what is lost, invented, or of another class, and of those of the
            rest as far as their boxes, masks or keypoints, whichever are least alike, are not; and
            of the differences of scores.
        agrees: for each detection of the run, whether it shows an object of the reference.
        lost: indices of the reference's detections that have no partner of their class.
        classes: pairs of other classes.
        score: mean difference of the scores of pairs, without sign; None: there are no pairs.
        iou: mean of pairs.
        mask_iou: mean IoU of their masks; None: there are none.
        oks: mean OKS of their keypoints; None: there are none.
    """

    loss: float
    agrees: np.ndarray
    lost: tuple[int, ...]
    classes: int
    score: float | None
    iou: float | None = None
    mask_iou: float | None = None
    oks: float | None = None


@dataclass(frozen=True)
class Compared:
    """An image, by its id, with what both sides find in it."""

    id: int
    reference: Found
    own: Found
    difference: Difference


def compare(reference: Found, own: Found, oks_sigmas: Sequence[float] = ()) -> Difference:
    """Pairs the detections of two runs in an image by their boxes, those of a class first.

    Args:
        oks_sigmas: see `geometry.oks`; where they are not as many as the keypoints: COCO's.
    """
    boxes = [_boxes(side) for side in (reference, own)]
    scores = [np.array([x["score"] for x in side]) for side in (reference, own)]
    classes = [np.array([x["category_id"] for x in side], dtype=int) for side in (reference, own)]
    overlap = geometry.overlaps(*boxes)
    is_same = classes[0][:, None] == classes[1]
    # Another class is for what has no partner of its own.
    can_be = np.where(overlap >= SAME_OBJECT_IOU, overlap, 0)
    rows, columns = pair(can_be, is_same & (can_be > 0))
    same = is_same[rows, columns]
    drift = np.abs(scores[0][rows] - scores[1][columns])
    found = np.zeros(len(reference), dtype=bool)
    found[rows[same]] = True
    agrees = np.zeros(len(own), dtype=bool)
    agrees[columns[same]] = True
    pairs = [(reference[row], own[column]) for row, column in zip(rows, columns)]
    alike = {"iou": overlap[rows, columns]}
    if _all_have("segmentation", reference, own):
        alike["mask_iou"] = _mask_iou(pairs)
    if _all_have("keypoints", reference, own):
        alike["oks"] = _oks(pairs, boxes[0][rows], oks_sigmas)
    apart = scores[0][rows] * (1 - np.min(list(alike.values()), axis=0)) + drift
    loss = scores[0][~found].sum() + scores[1][~agrees].sum() + apart[same].sum()
    return Difference(
        loss=float(loss),
        agrees=agrees,
        lost=tuple(np.flatnonzero(~found).tolist()),
        classes=int((~same).sum()),
        score=float(drift.mean()) if len(drift) else None,
        **{name: float(values.mean()) for name, values in alike.items() if len(values)},
    )


def _all_have(name: str, *sides: Found) -> bool:
    return all(name in each for side in sides for each in side)


def _mask_iou(pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """IoU of the masks of pairs; two that are empty are equal."""
    from pycocotools import mask as coco_masks

    shares = []
    for one, other in pairs:
        masks = [one["segmentation"]], [other["segmentation"]]
        empty = not any(coco_masks.area(masks[0] + masks[1]))
        shares.append(1.0 if empty else float(coco_masks.iou(*masks, [0])[0, 0]))
    return np.array(shares)


def _oks(
    pairs: Sequence[tuple[Any, Any]], boxes: np.ndarray, sigmas: Sequence[float]
) -> np.ndarray:
    """OKS of the keypoints of pairs.

    Args:
        boxes: of the reference, XYXY.
    """
    if not pairs:
        return np.zeros(0)
    poses = [np.array([_points(each[side]) for each in pairs]) for side in (0, 1)]
    own = sigmas if len(sigmas) == poses[0].shape[1] else None
    return pose_likeness(*poses, boxes, own)


def _points(found: dict[str, Any]) -> np.ndarray:
    """K x 2, in pixels, as COCO has them."""
    return np.array(found["keypoints"], dtype=float).reshape(-1, 3)[:, :2]


def worst(
    images: Iterable[tuple[int, Found, Found]], oks_sigmas: Sequence[float] = ()
) -> list[Compared]:
    """The images with the largest loss, the worst first.

    Args:
        images: id, what the reference has found, what the run has found; one at a time is looked
            at, and no more are kept than are returned.
        oks_sigmas: see `compare`.
    """
    compared = (
        Compared(image_id, reference, own, compare(reference, own, oks_sigmas))
        for image_id, reference, own in images
    )
    told = (each for each in compared if each.difference.loss >= LEAST_LOSS)
    return heapq.nlargest(MOST_IMAGES, told, key=lambda each: each.difference.loss)


def in_both(reference: Path, own: Path) -> Iterator[tuple[int, Found, Found]]:
    """What two runs have found in the images that both have seen, whatever the order."""
    waiting: tuple[dict[int, Found], dict[int, Found]] = ({}, {})
    for lines in zip_longest(kept_images(reference), kept_images(own)):
        for side, line in enumerate(lines):
            if line is None:
                continue
            image_id, found = line
            waiting[side][image_id] = found
            if image_id in waiting[1 - side]:
                yield image_id, waiting[0].pop(image_id), waiting[1].pop(image_id)


def find_worst(request: protocol.FindWorst) -> tuple[protocol.ComparedImage, ...]:
    """The images in which a run differs most from the reference, with what is drawn of them."""
    classes = {number: place for place, number in enumerate(request.category_ids)}
    both = in_both(Path(request.reference), Path(request.own))
    return tuple(_answer(each, classes) for each in worst(both, request.oks_sigmas))


def _answer(image: Compared, classes: dict[int, int]) -> protocol.ComparedImage:
    difference = image.difference
    return protocol.ComparedImage(
        id=image.id,
        loss=difference.loss,
        lost=len(difference.lost),
        spurious=int((~difference.agrees).sum()),
        classes=difference.classes,
        score_difference=difference.score,
        iou=difference.iou,
        mask_iou=difference.mask_iou,
        oks=difference.oks,
        reference=drawn(image.reference, classes),
        own=drawn_run(image.own, classes, difference),
    )


def drawn(found: Found, classes: dict[int, int]) -> Drawn:
    """Detections for drawing them.

    Args:
        classes: id of a category -> class.
    """
    return Drawn(
        boxes=tuple(map(tuple, _boxes(found).round(1).tolist())),
        scores=tuple(round(x["score"], 4) for x in found),
        classes=tuple(classes[x["category_id"]] for x in found),
        # COCO's indices of pixels, where drawings have the corner of one at 0.
        keypoints=tuple(
            tuple(map(tuple, (_points(x) + 0.5).round(1).tolist()))
            for x in found
            if "keypoints" in x
        ),
        masks=outlined(_decoded(x["segmentation"]) for x in found if "segmentation" in x),
    )


def _decoded(mask: dict[str, Any]) -> tuple[np.ndarray, tuple[float, ...]]:
    """A mask of run lengths, and the box of the image."""
    from pycocotools import mask as coco_masks

    height, width = mask["size"]
    return coco_masks.decode(mask).astype(bool), (0.0, 0.0, width, height)


def drawn_run(found: Found, classes: dict[int, int], difference: Difference) -> DrawnRun:
    """The same of a run, with what agrees."""
    shown = drawn(found, classes)
    return DrawnRun(**vars(shown), agrees=tuple(difference.agrees.tolist()), lost=difference.lost)


def _boxes(found: Found) -> np.ndarray:
    """N x 4, XYXY in pixels."""
    boxes = np.array([x["bbox"] for x in found], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
