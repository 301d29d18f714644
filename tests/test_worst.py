"""The images in which a run differs most, and by how much."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Dict, List

import pytest

from measure.worst import LEAST_LOSS, MOST_IMAGES, compare, drawn_run, worst

DATA = Path(__file__).resolve().parent / "data" / "shapes"


def found(*detections: Any) -> List[Dict[str, Any]]:
    """Detections of class, score and box (x, y, width, height) each."""
    return [
        {"category_id": kind, "score": score, "bbox": list(box)} for kind, score, box in detections
    ]


BOX, FAR = (10, 10, 40, 40), (100, 100, 20, 20)


def test_the_same_has_no_loss():
    one = found((2, 0.9, BOX), (5, 0.4, FAR))
    told = compare(one, list(reversed(one)))
    assert told.loss == 0
    assert told.agrees.all()
    assert (told.lost, told.classes, told.score, told.iou) == ((), 0, 0, 1)


def test_what_is_lost_and_what_is_invented_weighs_its_score():
    told = compare(
        found((2, 0.9, BOX), (5, 0.4, FAR)), found((2, 0.9, BOX), (5, 0.3, (0, 0, 9, 9)))
    )
    assert told.loss == pytest.approx(0.7)
    assert told.lost == (1,)
    assert told.agrees.tolist() == [True, False]
    assert told.classes == 0


def test_another_class_is_lost_and_invented():
    told = compare(found((2, 0.9, BOX)), found((5, 0.8, BOX)))
    assert told.loss == pytest.approx(1.7)
    assert (told.lost, told.classes) == ((0,), 1)
    assert told.score == pytest.approx(0.1)


def test_one_of_its_own_class_comes_before_one_that_lies_better():
    # The first lies exactly there, and is of another class.
    own = found((5, 0.5, BOX), (2, 0.9, (12, 10, 40, 40)))
    told = compare(found((2, 0.9, BOX)), own)
    assert told.agrees.tolist() == [False, True]
    assert told.iou == pytest.approx(38 / 42)
    assert told.loss == pytest.approx(0.5 + 0.9 * 4 / 42)


def test_nothing_on_either_side():
    told = compare([], [])
    assert (told.loss, told.lost, told.score, told.iou) == (0, (), None, None)
    assert compare(found((2, 0.9, BOX)), []).loss == pytest.approx(0.9)
    assert compare([], found((2, 0.9, BOX))).agrees.tolist() == [False]


def test_it_is_drawn_with_classes_and_what_agrees():
    reference, own = found((2, 0.9, BOX), (9, 0.4, FAR)), found((2, 0.87654321, BOX))
    drawn = drawn_run(own, {2: 0, 5: 1, 9: 2}, compare(reference, own))
    assert drawn.boxes == ((10, 10, 50, 50),)
    assert (drawn.scores, drawn.classes) == ((0.8765,), (0,))
    assert (drawn.agrees, drawn.lost) == ((True,), (1,))


def test_the_worst_come_first_and_healthy_images_do_not():
    sides = []
    for name in ("mask_rcnn", "mask_rcnn_int8"):
        images: Dict[int, Any] = {number: [] for number in range(1000, 1060)}
        for each in json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes())):
            images[each["image_id"]].append(each)
        sides.append(images)
    told = worst(*sides)
    losses = [difference.loss for _, difference in told]
    assert len(told) == MOST_IMAGES
    assert losses == sorted(losses, reverse=True)
    rest = set(sides[0]) - {image for image, _ in told}
    assert max(compare(sides[0][x], sides[1][x]).loss for x in rest) <= losses[-1]
    assert worst(sides[0], sides[0]) == []
    assert losses[-1] > LEAST_LOSS
