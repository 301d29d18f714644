"""Images of a data set in which a run finds something else than the reference, to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from measure.geometry import box_iou
from measure.verify import SAME_OBJECT_IOU
from results.record import Drawn, DrawnRun, WorstImage

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
            rest as far as their boxes do not overlap; and of the differences of scores.
        agrees: for each detection of the run, whether it shows an object of the reference.
        lost: indices of the reference's detections that have no partner of their class.
        classes: pairs of other classes.
        score: mean difference of the scores of pairs, without sign; None: there are no pairs.
        iou: mean of pairs.
    """

    loss: float
    agrees: np.ndarray
    lost: tuple[int, ...]
    classes: int
    score: float | None
    iou: float | None


def compare(reference: Found, own: Found) -> Difference:
    """Pairs the detections of two runs in an image by their boxes, those of a class first."""
    boxes = [_boxes(side) for side in (reference, own)]
    scores = [np.array([x["score"] for x in side]) for side in (reference, own)]
    classes = [np.array([x["category_id"] for x in side], dtype=int) for side in (reference, own)]
    iou = box_iou(*boxes)
    is_same = classes[0][:, None] == classes[1]
    # Another class is for what has no partner of its own.
    wanted = np.where(iou >= SAME_OBJECT_IOU, iou + is_same, 0)
    rows, columns = linear_sum_assignment(-wanted)
    are_pairs = wanted[rows, columns] > 0
    rows, columns = rows[are_pairs], columns[are_pairs]
    same = is_same[rows, columns]
    drift = np.abs(scores[0][rows] - scores[1][columns])
    found = np.zeros(len(reference), dtype=bool)
    found[rows[same]] = True
    agrees = np.zeros(len(own), dtype=bool)
    agrees[columns[same]] = True
    apart = scores[0][rows] * (1 - iou[rows, columns]) + drift
    loss = scores[0][~found].sum() + scores[1][~agrees].sum() + apart[same].sum()
    return Difference(
        loss=float(loss),
        agrees=agrees,
        lost=tuple(np.flatnonzero(~found).tolist()),
        classes=int((~same).sum()),
        score=float(drift.mean()) if len(drift) else None,
        iou=float(iou[rows, columns].mean()) if len(rows) else None,
    )


def worst(reference: dict[int, Found], own: dict[int, Found]) -> list[tuple[int, Difference]]:
    """The images with the largest loss, the worst first.

    Args:
        reference, own: id of an image -> what was found in it.
    """
    differences = [(each, compare(reference[each], own[each])) for each in reference if each in own]
    differences.sort(key=lambda item: -item[1].loss)
    return [item for item in differences[:MOST_IMAGES] if item[1].loss >= LEAST_LOSS]


def record(image: str, picture: str, difference: Difference) -> WorstImage:
    """The record of an image.

    Args:
        image: name of its file in the data set.
        picture: its key in `detections.json`.
    """
    return WorstImage(
        image=image,
        picture=picture,
        loss=difference.loss,
        lost=len(difference.lost),
        spurious=int((~difference.agrees).sum()),
        classes=difference.classes,
        score_difference=difference.score,
        iou=difference.iou,
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
    )


def drawn_run(found: Found, classes: dict[int, int], difference: Difference) -> DrawnRun:
    """The same of a run, with what agrees."""
    shown = drawn(found, classes)
    return DrawnRun(**vars(shown), agrees=tuple(difference.agrees.tolist()), lost=difference.lost)


def _boxes(found: Found) -> np.ndarray:
    """N x 4, XYXY in pixels."""
    boxes = np.array([x["bbox"] for x in found], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
