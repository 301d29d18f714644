"""The images in which a run differs most, and by how much."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest

from measure import protocol
from measure.drawing import MOST_CORNERS, outlined
from measure.geometry import oks
from measure.outlines import outlines
from measure.worst import (
    LEAST_LOSS,
    MOST_IMAGES,
    compare,
    drawn,
    drawn_run,
    find_worst,
    in_both,
    worst,
)

DATA = Path(__file__).resolve().parent / "data" / "shapes"


def found(*detections: Any) -> List[Dict[str, Any]]:
    """Detections of class, score and box (x, y, width, height) each."""
    return [
        {"category_id": kind, "score": score, "bbox": list(box)} for kind, score, box in detections
    ]


BOX, FAR = (10, 10, 40, 40), (100, 100, 20, 20)
# Overlaps are those of boxes that reach half a pixel further to each side: so wide is BOX then.
WIDE = 41


def with_mask(detection: Dict[str, Any], *boxes: Tuple[int, int, int, int]) -> Dict[str, Any]:
    """The same with a mask of boxes (x, y, width, height) in an image of 120 x 160."""
    from pycocotools import mask as coco_masks

    mask = np.zeros((120, 160), dtype=np.uint8, order="F")
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = 1
    encoded = coco_masks.encode(mask)
    size = [int(side) for side in encoded["size"]]
    return {**detection, "segmentation": {"size": size, "counts": encoded["counts"].decode()}}


def with_pose(detection: Dict[str, Any], *points: Tuple[float, float]) -> Dict[str, Any]:
    return {**detection, "keypoints": [x for point in points for x in (*point, 0.9)]}


# Pairing -----------------------------------------------------------------------------------------


def test_the_same_has_no_loss():
    one = found((2, 0.9, BOX), (5, 0.4, FAR))
    told = compare(one, list(reversed(one)))
    assert told.loss == 0
    assert told.agrees.all()
    assert (told.lost, told.classes, told.score, told.iou) == ((), 0, 0, 1)
    assert told.mask_iou is None
    assert told.oks is None


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
    iou = (WIDE - 2) / (WIDE + 2)
    assert told.iou == pytest.approx(iou)
    assert told.loss == pytest.approx(0.5 + 0.9 * (1 - iou))


def test_one_that_hardly_overlaps_takes_nobodys_partner():
    # Crosswise they overlap more in all: by 0.43 and 0.43, where the pair has 0.6 alone.
    reference = found((2, 0.9, (0, 0, 99, 9)), (2, 0.8, (65, 0, 99, 9)))
    own = found((2, 0.9, (25, 0, 99, 9)), (2, 0.8, (300, 0, 99, 9)))
    told = compare(reference, own)
    assert told.agrees.tolist() == [True, False]
    assert told.lost == (1,)
    own = found((2, 0.9, (25, 0, 99, 9)), (2, 0.8, (-40, 0, 99, 9)))
    assert compare(reference, own).agrees.tolist() == [True, False]


def test_nothing_on_either_side():
    told = compare([], [])
    assert (told.loss, told.lost, told.score, told.iou) == (0, (), None, None)
    assert (told.mask_iou, told.oks) == (None, None)
    assert compare(found((2, 0.9, BOX)), []).loss == pytest.approx(0.9)
    assert compare([], found((2, 0.9, BOX))).agrees.tolist() == [False]
    (masked,) = (with_mask(x, BOX) for x in found((2, 0.9, BOX)))
    assert compare([masked], []).mask_iou is None


# Masks and keypoints -----------------------------------------------------------------------------


def test_masks_of_pairs_are_compared_by_their_pixels():
    one, other = found((2, 0.8, BOX), (5, 0.4, FAR))
    reference = [with_mask(one, BOX), with_mask(other, FAR)]
    # The lower half of the first is gone, and the second is listed first.
    own = [with_mask(other, FAR), with_mask(one, (10, 10, 40, 20))]
    told = compare(reference, own)
    assert told.agrees.all()
    assert told.iou == 1
    assert told.mask_iou == pytest.approx((0.5 + 1) / 2)
    assert told.loss == pytest.approx(0.8 * 0.5)


def test_of_boxes_and_masks_what_is_least_alike_counts_once():
    (one,) = found((2, 0.8, BOX))
    (moved,) = found((2, 0.8, (12, 10, 40, 40)))
    told = compare([with_mask(one, BOX)], [with_mask(moved, BOX)])
    assert told.mask_iou == 1
    assert told.loss == pytest.approx(0.8 * (1 - (WIDE - 2) / (WIDE + 2)))


def test_two_masks_without_a_pixel_are_equal():
    (one,) = found((2, 0.8, BOX))
    assert compare([with_mask(one)], [with_mask(one)]).mask_iou == 1
    assert compare([with_mask(one, BOX)], [with_mask(one)]).mask_iou == 0


def test_poses_of_pairs_are_compared_by_oks():
    (one,) = found((2, 0.8, BOX))
    points = [(20.0, 20.0), (30.0, 25.0), (15.0, 40.0)]
    moved = [(x + 2, y + 1) for x, y in points]
    told = compare([with_pose(one, *points)], [with_pose(one, *moved)])
    poses = np.array([points]), np.array([moved])
    expected = float(oks(*poses, np.array([1600.0]))[0])
    assert 0.5 < expected < 0.95
    assert told.oks == pytest.approx(expected)
    assert told.loss == pytest.approx(0.8 * (1 - expected))
    # The configuration may have sigmas of its own.
    wide = compare([with_pose(one, *points)], [with_pose(one, *moved)], (0.5, 0.5, 0.5))
    assert wide.oks > 0.99
    # Those of another number of keypoints are none for these.
    other = compare([with_pose(one, *points)], [with_pose(one, *moved)], (0.5, 0.5))
    assert other.oks == told.oks


def test_it_is_drawn_with_classes_and_what_agrees():
    reference, own = found((2, 0.9, BOX), (9, 0.4, FAR)), found((2, 0.87654321, BOX))
    shown = drawn_run(own, {2: 0, 5: 1, 9: 2}, compare(reference, own))
    assert shown.boxes == ((10, 10, 50, 50),)
    assert (shown.scores, shown.classes) == ((0.8765,), (0,))
    assert (shown.agrees, shown.lost) == ((True,), (1,))
    assert (shown.masks, shown.keypoints) == ((), ())


def test_masks_and_poses_are_drawn_where_they_lie():
    (one,) = found((2, 0.9, BOX))
    shown = drawn([with_pose(with_mask(one, BOX), (19.5, 14.5), (30.0, 25.0))], {2: 0})
    ((line,),) = shown.masks
    corners = set(zip(line[::2], line[1::2]))
    assert corners == {(10, 10), (50, 10), (50, 50), (10, 50)}
    # Pixel 19 lies between 19 and 20.
    assert shown.keypoints == (((20.0, 15.0), (30.5, 25.5)),)


# Outlines ----------------------------------------------------------------------------------------


def filled(lines: List[List[float]], height: int, width: int) -> np.ndarray:
    """H x W, bool: the pixels whose centers lie within an odd number of lines."""
    from matplotlib.path import Path as Line

    y, x = np.mgrid[:height, :width] + 0.5
    points = np.stack([x, y], axis=-1).reshape(-1, 2)
    inside = np.zeros(len(points), dtype=bool)
    for line in lines:
        corners = np.array(line).reshape(-1, 2)
        inside ^= Line(np.concatenate([corners, corners[:1]]), closed=True).contains_points(points)
    return inside.reshape(height, width)


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_holes_and_parts_have_lines_of_their_own():
    ring = disc(100, 140, 50, 50, 40) & ~disc(100, 140, 50, 50, 20)
    mask = ring | disc(100, 140, 80, 120, 12)
    lines = outlines(mask, (0, 0, 140, 100))
    assert len(lines) == 3
    assert iou(filled(lines, 100, 140), mask) > 0.95
    # Corners that nobody would see are left out.
    assert sum(map(len, lines)) / 2 < 150


def test_a_large_mask_is_drawn_coarsely_and_in_place():
    mask = disc(700, 1000, 500, 300, 150)
    lines = outlines(mask, (0, 0, 1000, 700))
    assert iou(filled(lines, 700, 1000), mask) > 0.95
    assert sum(map(len, lines)) < 200


def test_a_mask_within_a_box_is_stretched_over_it():
    (line,) = outlines(np.ones((14, 14), dtype=bool), (100, 50, 128, 64))
    assert set(zip(line[::2], line[1::2])) == {(100, 50), (128, 50), (128, 64), (100, 64)}


def test_pixels_that_touch_at_a_corner_stay_apart():
    mask = np.zeros((4, 4), dtype=bool)
    mask[0, 0] = mask[1, 1] = True
    lines = outlines(mask, (0, 0, 4, 4))
    assert len(lines) == 2
    assert (filled(lines, 4, 4) == mask).all()
    assert outlines(np.zeros((4, 4), dtype=bool), (0, 0, 4, 4)) == []


def test_more_corners_than_a_page_can_hold_are_left_out():
    dots = np.zeros((64, 64), dtype=bool)
    for place in range(4):
        dots[place::8, 0::16] = dots[place::8, 1::16] = True
    lines = outlined((dots, (0, 0, 64, 64)) for _ in range(100))
    corners = [sum(map(len, each)) // 2 for each in lines]
    assert len(lines) == 100
    assert MOST_CORNERS <= sum(corners) < MOST_CORNERS + corners[0] * 1.2
    assert corners[0] > 0
    assert corners[-1] == 0


def test_noise_has_no_outlines():
    # As masks of weights that were never trained are.
    noise = np.random.default_rng(0).random((64, 64)) > 0.5
    ring = disc(64, 64, 30, 30, 25) & ~disc(64, 64, 30, 30, 20)
    assert [len(each) for each in outlined((x, (0, 0, 64, 64)) for x in (noise, ring))] == [0, 2]


# Images ------------------------------------------------------------------------------------------


def images_of(name: str) -> Dict[int, Any]:
    images: Dict[int, Any] = {number: [] for number in range(1000, 1060)}
    for each in json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes())):
        images[each["image_id"]].append(each)
    return images


def test_the_worst_come_first_and_healthy_images_do_not():
    sides = [images_of(name) for name in ("mask_rcnn", "mask_rcnn_int8")]
    told = worst((x, sides[0][x], sides[1][x]) for x in sides[0])
    losses = [each.difference.loss for each in told]
    assert len(told) == MOST_IMAGES
    assert losses == sorted(losses, reverse=True)
    rest = set(sides[0]) - {each.id for each in told}
    assert max(compare(sides[0][x], sides[1][x]).loss for x in rest) <= losses[-1]
    assert worst((x, found, found) for x, found in sides[0].items()) == []
    assert losses[-1] > LEAST_LOSS


def kept(path: Path, images: Dict[int, Any], order: Any) -> str:
    path.write_text("".join(json.dumps([image, images[image]]) + "\n" for image in order))
    return str(path)


def test_images_are_those_that_both_have_seen_whatever_the_order(tmp_path):
    sides = [images_of(name) for name in ("mask_rcnn", "mask_rcnn_int8")]
    kept(tmp_path / "a", sides[0], range(1000, 1050))
    kept(tmp_path / "b", sides[1], range(1059, 1009, -1))
    told = {image: (one, other) for image, one, other in in_both(tmp_path / "a", tmp_path / "b")}
    assert sorted(told) == list(range(1010, 1050))
    assert told[1023] == (sides[0][1023], sides[1][1023])


def test_the_answer_has_what_is_drawn(tmp_path):
    images = images_of("mask_rcnn")
    request = protocol.FindWorst(
        kept(tmp_path / "a", images, images),
        kept(tmp_path / "b", {**images, 1003: []}, images),
        (2, 5, 9),
        (),
    )
    (told,) = find_worst(request)
    assert told.id == 1003
    assert told.lost == len(images[1003]) == len(told.reference.boxes) > 1
    assert told.loss == pytest.approx(sum(x["score"] for x in images[1003]))
    assert told.own.boxes == ()
    assert told.own.lost == tuple(range(told.lost))
    assert len(told.reference.masks) == told.lost
    assert set(told.reference.classes) <= {0, 1, 2}
