"""Overlaps of rotated boxes, likeness of poses, borders of labels: against what can be computed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from measure import geometry


def rotated(*boxes):
    return np.array(boxes, dtype=float).reshape(-1, 5)


def random_rotated(seed, count, spread=300.0):
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [
            generator.uniform(0, spread, (count, 2)),
            generator.uniform(1, 120, (count, 2)),
            generator.uniform(-180, 180, (count, 1)),
        ],
        axis=1,
    )


def area_of_octagon(side):
    """What a square and the same, turned by 45 degrees, have in common."""
    return 2 * (2**0.5 - 1) * side**2


# Two boxes, and what they have in common.
KNOWN = {
    "the same": ([10, 20, 8, 4, 33], [10, 20, 8, 4, 33], 32),
    "half a turn": ([10, 20, 8, 4, 33], [10, 20, 8, 4, -147], 32),
    "sides swapped and a quarter": ([10, 20, 8, 4, 33], [10, 20, 4, 8, -57], 32),
    "a cross": ([0, 0, 8, 2, 0], [0, 0, 8, 2, 90], 4),
    "a skewed cross": ([0, 0, 100, 2, 0], [0, 0, 100, 2, 30], 2 * 2 / np.sin(np.pi / 6)),
    "an octagon": ([5, 5, 6, 6, 0], [5, 5, 6, 6, 45], area_of_octagon(6)),
    "one in the other": ([0, 0, 10, 10, 20], [1, 0, 2, 2, 65], 4),
    "a corner": ([0, 0, 4, 4, 0], [3, 3, 4, 4, 0], 1),
    "a side in common": ([0, 0, 4, 4, 0], [4, 0, 4, 4, 0], 0),
    "moved along itself": ([0, 0, 8, 2, 45], [2**0.5, -(2**0.5), 8, 2, 45], 12),
    # Counter-clockwise: with y pointing down, its right end is above.
    "moved across itself": ([0, 0, 8, 2, 45], [2**0.5, 2**0.5, 8, 2, 45], 0),
    "apart": ([0, 0, 4, 4, 10], [50, 0, 4, 4, 80], 0),
    "no extent": ([0, 0, 0, 4, 10], [0, 0, 4, 4, 10], 0),
    "turned inside out": ([0, 0, -4, 4, 10], [0, 0, 4, 4, 10], 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_overlap_is_the_known_one(name):
    first, second, common = KNOWN[name]
    union = max(0, first[2]) * first[3] + second[2] * second[3] - common
    for one, other in ((first, second), (second, first)):
        found = geometry.rotated_iou(rotated(one), rotated(other))
        assert found.shape == (1, 1)
        assert found[0, 0] == pytest.approx(common / union, abs=1e-9)


def test_boxes_that_are_not_turned_overlap_as_others_do():
    generator = np.random.default_rng(0)
    low, sides = generator.uniform(0, 200, (2, 60, 2))
    boxes = np.concatenate([low, low + sides], axis=1)
    turned = np.concatenate([low + sides / 2, sides, np.zeros((60, 1))], axis=1)
    found, wanted = (geometry.overlaps(x[:30], x[30:]) for x in (turned, boxes))
    assert (wanted > 0).sum() > 100
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_overlaps_do_not_depend_on_how_all_is_turned():
    boxes = random_rotated(1, 40)
    angle = np.radians(37)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    others = boxes.copy()
    others[:, :2] = boxes[:, :2] @ turn.T
    others[:, 4] += 37
    wanted = geometry.rotated_iou(boxes, boxes)
    assert (wanted > 0.05).sum() > 100
    np.testing.assert_allclose(geometry.rotated_iou(others, others), wanted, atol=1e-9)
    np.testing.assert_allclose(np.diag(wanted), 1, atol=1e-9)


def test_overlaps_are_those_of_many_points():
    """Of points spread over both, the share that lies in both."""
    one, other = rotated([50, 50, 60, 20, 25]), rotated([58, 47, 30, 44, -70])
    places = np.stack(np.meshgrid(*[np.linspace(0, 100, 2001)] * 2), axis=-1).reshape(-1, 2)
    inside = []
    for cx, cy, width, height, angle in (one[0], other[0]):
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        x, y = places[:, 0] - cx, places[:, 1] - cy
        inside.append(
            (abs(x * cos - y * sin) <= width / 2) & (abs(x * sin + y * cos) <= height / 2)
        )
    wanted = (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()
    assert 0.2 < wanted < 0.8
    assert geometry.rotated_iou(one, other)[0, 0] == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_are_detectron2s(seed):
    structures = pytest.importorskip("detectron2.structures")
    import torch

    first, second = random_rotated(seed, 80), random_rotated(seed + 10, 90)
    second[:20] = first[:20] + np.random.default_rng(seed).normal(size=(20, 5))
    both = [structures.RotatedBoxes(torch.from_numpy(x).float()) for x in (first, second)]
    wanted = structures.pairwise_iou_rotated(*both).numpy()
    assert (wanted > 0.1).sum() > 50
    np.testing.assert_allclose(geometry.rotated_iou(first, second), wanted, atol=2e-4)


def test_a_hundred_by_a_hundred_take_no_second():
    boxes = random_rotated(0, 100, spread=50)
    start = time.process_time()
    overlap = geometry.rotated_iou(boxes, boxes)
    assert time.process_time() - start < 1
    assert (overlap > 0).mean() > 0.5


def test_more_pairs_than_are_clipped_at_once(monkeypatch):
    boxes = random_rotated(0, 30, spread=100)
    wanted = geometry.rotated_iou(boxes, boxes)
    monkeypatch.setattr(geometry, "PAIRS_AT_ONCE", 7)
    np.testing.assert_array_equal(geometry.rotated_iou(boxes, boxes), wanted)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_overlaps_of_no_rotated_boxes(counts):
    boxes = random_rotated(0, 3)
    assert geometry.overlaps(boxes[: counts[0]], boxes[: counts[1]]).shape == counts


# Poses -----------------------------------------------------------------------------------------


def test_the_sigmas_are_those_of_coco():
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    np.testing.assert_allclose(
        geometry.COCO_SIGMAS, evaluation.Params("keypoints").kpt_oks_sigmas, atol=1e-12
    )


def test_likeness_of_poses_is_cocos_formula():
    pose = np.random.default_rng(0).uniform(0, 100, (1, 17, 2))
    other = pose.copy()
    other[0, 0, 0] += 3  # The nose.
    other[0, 11, 1] -= 8  # A hip.
    area = np.array([4000.0])
    nose = np.exp(-(3**2) / (2 * 4000 * (2 * 0.026) ** 2))
    hip = np.exp(-(8**2) / (2 * 4000 * (2 * 0.107) ** 2))
    assert geometry.oks(pose, other, area)[0] == pytest.approx((15 + nose + hip) / 17)
    assert geometry.oks(pose, pose, area).tolist() == [1.0]


def test_other_keypoints_have_the_mean_of_cocos():
    assert geometry.sigmas(3).tolist() == pytest.approx([geometry.COCO_SIGMAS.mean()] * 3)
    assert geometry.oks(np.zeros((0, 3, 2)), np.zeros((0, 3, 2)), np.zeros(0)).shape == (0,)


def test_a_box_of_no_area_has_a_likeness():
    assert np.isfinite(geometry.oks(np.zeros((1, 3, 2)), np.ones((1, 3, 2)), np.zeros(1))).all()


# Maps ------------------------------------------------------------------------------------------


def test_near_the_borders_of_labels():
    labels = np.zeros((20, 30), dtype=int)
    labels[:, 12:] = 3
    near = geometry.near_borders(labels, 4)
    assert near.all(axis=0).tolist() == [8 <= x < 16 for x in range(30)]
    assert near.any(axis=0).tolist() == near.all(axis=0).tolist()
    assert not geometry.near_borders(np.ones((5, 5), dtype=int), 8).any()
