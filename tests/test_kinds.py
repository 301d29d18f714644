"""The check of what the test models do not have: keypoints, maps, proposals, rotated boxes.

As in `test_verify`, on engines that are broken on purpose, by a stated amount.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import zoom
from test_verify import PRECISIONS, SEEDS, blind, in_order, moved, random_detections, take

from measure import geometry, verify
from measure.detections import Detections, Malformed, split
from results.record import Agreement

HEIGHT, WIDTH = 480, 640
# What healthy engines do to logits, as a share of how far they vary.
NOISE = {"fp32": 1e-5, "tf32": 2e-4, "fp16": 2e-3, "bf16": 1e-2, "int8": 4e-2}
KEYPOINT_FIELDS = (
    *("pred_boxes", "pred_classes", "pred_keypoint_heatmaps", "pred_keypoints", "scores"),
    "image_size",
)


def agreement_of(reference, candidate, precision, **rules) -> Agreement:
    return verify.compare([reference], [candidate], precision, **rules)


# Keypoints -------------------------------------------------------------------------------------


def with_keypoints(seed, count=50, kinds=17):
    """Objects with keypoints anywhere in their boxes, of some size."""
    generator = np.random.default_rng([seed, 7])
    found = random_detections(seed, 100, masks=False)
    large = geometry.sides(found.boxes).min(axis=1) > 30
    found = take(found, np.flatnonzero(large)[:count])
    places = generator.uniform(size=(len(found.scores), kinds, 2))
    places = found.boxes[:, None, :2] + places * geometry.sides(found.boxes)[:, None]
    scores = generator.uniform(0.001, 0.5, (len(found.scores), kinds, 1))
    heatmaps = generator.normal(size=(len(found.scores), kinds, 8, 8))
    return replace(
        found,
        keypoints=np.concatenate([places, scores], axis=2),
        others={"pred_keypoint_heatmaps": heatmaps},
    )


def posed(detections, keypoints):
    return replace(detections, keypoints=keypoints)


def keypoints_shifted(detections):
    return posed(detections, detections.keypoints + [3, 0, 0])


def keypoints_shifted_up(detections):
    return posed(detections, detections.keypoints - [0, 3, 0])


def sides_swapped(detections):
    """The nose stays, and each other keypoint is that of the other side."""
    count = detections.keypoints.shape[1]
    others = [place + (1 if place % 2 else -1) for place in range(1, count - (count % 2 == 0))]
    order = [0, *others, *range(len(others) + 1, count)]
    assert sorted(order) == list(range(count))
    return posed(detections, detections.keypoints[:, order])


def keypoints_reversed(detections):
    return posed(detections, detections.keypoints[:, ::-1])


def keypoints_of_others(detections):
    return posed(detections, np.roll(detections.keypoints, 1, axis=0))


def x_and_y_swapped(detections):
    return posed(detections, detections.keypoints[:, :, [1, 0, 2]])


def keypoint_scores_shuffled(detections):
    keypoints = detections.keypoints.copy()
    keypoints[:, :, 2] = (
        np.random.default_rng(0)
        .permutation(keypoints[:, :, 2].ravel())
        .reshape(keypoints.shape[:2])
    )
    return posed(detections, keypoints)


def heatmaps_upside_down(detections):
    heatmaps = detections.others["pred_keypoint_heatmaps"]
    return replace(detections, others={"pred_keypoint_heatmaps": heatmaps[:, :, ::-1]})


BROKEN_POSES = (
    *(keypoints_shifted, keypoints_shifted_up, sides_swapped, keypoints_reversed),
    *(keypoints_of_others, x_and_y_swapped, keypoint_scores_shuffled, heatmaps_upside_down),
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kinds", [3, 17])
@pytest.mark.parametrize("breakage", BROKEN_POSES, ids=lambda function: function.__name__)
def test_broken_keypoints_are_a_mismatch(breakage, kinds, precision):
    for seed in SEEDS:
        reference = with_keypoints(seed, kinds=kinds)
        agreement = agreement_of(reference, breakage(reference), precision)
        assert agreement.verdict == "mismatch", agreement
        # What it says is about that, not about boxes and scores of objects.
        said = ("keypoint", "another pose", "pred_keypoint_heatmaps")
        assert any(word in agreement.reason for word in said), agreement.reason


# Someone who stands and looks at us, as shares of the box: the nose, and what the left side has.
NOSE = (0.5, 0.08)
LEFT = (
    *((0.55, 0.06), (0.6, 0.07), (0.75, 0.2), (0.85, 0.36), (0.9, 0.5), (0.65, 0.52)),
    *((0.63, 0.75), (0.62, 0.95)),
)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_someone_who_stands_has_sides(precision):
    """Left and right are closer to each other than places anywhere in a box."""
    pose = np.array([NOSE, *(side for x, y in LEFT for side in ((x, y), (1 - x, y)))])
    reference = with_keypoints(0)
    boxes = reference.boxes.copy()
    boxes[:, 2] = boxes[:, 0] + (boxes[:, 3] - boxes[:, 1]) / 2.5
    keypoints = reference.keypoints.copy()
    sides = geometry.sides(boxes)
    keypoints[:, :, :2] = boxes[:, None, :2] + pose * sides[:, None]
    keypoints[:, :, 2] = 0.1
    reference = replace(reference, boxes=boxes, keypoints=keypoints)
    agreement = agreement_of(reference, sides_swapped(reference), precision)
    assert agreement.verdict == "mismatch"
    assert "of their OKS in the median" in agreement.reason


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kinds", [3, 17])
def test_rounded_keypoints_are_a_match(kinds, precision):
    """They jump to the next pixel, and one in thirty to another place altogether."""
    noise = NOISE[precision]
    for seed in SEEDS:
        reference = with_keypoints(seed, kinds=kinds)
        generator = np.random.default_rng([seed, 8])
        keypoints = reference.keypoints.copy()
        steps = generator.integers(-1, 2, (*keypoints.shape[:2], 2))
        keypoints[:, :, :2] += np.where(generator.random(steps.shape) < 20 * noise, steps, 0)
        jumps = generator.random(keypoints.shape[:2]) < min(noise, 1 / 30)
        keypoints[jumps, :2] += 40
        keypoints[:, :, 2] *= 1 + noise * generator.normal(size=jumps.shape)
        heatmaps = reference.others["pred_keypoint_heatmaps"]
        heatmaps = heatmaps + noise * generator.normal(size=heatmaps.shape)
        candidate = replace(
            reference, keypoints=keypoints, others={"pred_keypoint_heatmaps": heatmaps}
        )
        agreement = agreement_of(reference, candidate, precision)
        assert agreement.verdict == "match", agreement


def test_drift_of_keypoints_is_that_of_the_worst_pose():
    reference = with_keypoints(0)
    assert agreement_of(reference, reference, "fp32").keypoint_drift == 0
    keypoints = reference.keypoints.copy()
    keypoints[3, 0, 0] += 1000
    agreement = agreement_of(reference, posed(reference, keypoints), "bf16")
    assert agreement.verdict == "match"
    assert agreement.keypoint_drift == pytest.approx(1 / 17)
    assert agreement_of(random_detections(0), random_detections(0), "fp32").keypoint_drift is None


def test_one_lost_pose_is_counted():
    reference = with_keypoints(0, 50)
    keypoints = reference.keypoints.copy()
    keypoints[3, :, 0] += 1000
    agreement = agreement_of(reference, posed(reference, keypoints), "fp32")
    assert (agreement.matched, agreement.lost) == (len(keypoints) - 1, 1)
    assert "1 with another pose" in agreement.reason


def test_what_is_clipped_to_a_sliver_has_no_pose():
    reference = with_keypoints(0, 10)
    boxes = reference.boxes.copy()
    boxes[0, 3] = boxes[0, 1] + 1
    reference = replace(reference, boxes=boxes)
    keypoints = reference.keypoints.copy()
    keypoints[0, :, 0] += 30
    assert agreement_of(reference, posed(reference, keypoints), "fp32").matched == 10
    keypoints[1, :, 0] += 200
    assert agreement_of(reference, posed(reference, keypoints), "fp32").matched == 9


def test_other_numbers_of_keypoints_are_an_error():
    reference = with_keypoints(0)
    fewer = posed(reference, reference.keypoints[:, :16])
    agreement = agreement_of(reference, fewer, "bf16")
    assert (agreement.verdict, agreement.reason) == (
        "error",
        "keypoints are 16 x 3 instead of 17 x 3",
    )
    without = replace(reference, keypoints=None)
    assert (
        agreement_of(reference, without, "bf16").reason == "keypoints are absent instead of 17 x 3"
    )


def flat_keypoints(found):
    return (
        found.boxes,
        found.classes,
        found.others["pred_keypoint_heatmaps"],
        found.keypoints,
        found.scores,
        np.array(found.image_size),
    )


def test_keypoints_are_taken_from_the_tuple():
    reference = with_keypoints(0)
    (found,) = split(flat_keypoints(reference), KEYPOINT_FIELDS)
    np.testing.assert_array_equal(found.keypoints, reference.keypoints)
    assert list(found.others) == ["pred_keypoint_heatmaps"]
    assert found.not_compared == ()
    broken = list(flat_keypoints(reference))
    broken[3] = broken[3][:, :, :2]
    with pytest.raises(Malformed, match=r"^pred_keypoints is .* x K x 3 was expected"):
        split(broken, KEYPOINT_FIELDS)
    broken[3] = np.full_like(reference.keypoints, np.nan)
    agreement = verify.verify(flat_keypoints(reference), broken, KEYPOINT_FIELDS, "fp32")
    assert agreement.reason == "the output is malformed: pred_keypoints holds NaN or infinity"


# Maps of labels --------------------------------------------------------------------------------


def a_map(seed, cells=6, kinds=9):
    """Logits of smooth regions, K x H x W."""
    generator = np.random.default_rng([seed, 9])
    coarse = generator.normal(size=(kinds, cells, cells))
    return np.stack([zoom(x, (HEIGHT / cells / 2, WIDTH / cells / 2), order=1) for x in coarse])


def two_halves(seed):
    """Two regions, so that nearly all pixels are far from a border."""
    columns = np.arange(WIDTH) - WIDTH / 2 + 10 * seed + 0.3
    logits = np.stack([columns, -columns]) / 10
    return np.repeat(logits[:, None], HEIGHT, axis=1)


MAPS = (a_map, two_halves)


def of_map(logits):
    (found,) = split((logits,), ("sem_seg",))
    return found


def labels_off_by_one(logits):
    return np.roll(logits, 1, axis=0)


def map_shifted(logits):
    return np.roll(logits, 8, axis=2)


def map_upside_down(logits):
    return logits[:, ::-1]


def map_mirrored(logits):
    return logits[:, :, ::-1]


def map_of_one_label(logits):
    return np.where(np.arange(len(logits))[:, None, None] == 0, 100.0, logits)


def map_in_blocks(logits):
    """As an engine has it that does not interpolate: 8 x 8 pixels of one label."""
    return np.repeat(np.repeat(logits[:, ::16, ::16], 16, axis=1), 16, axis=2)[
        :, : logits.shape[1], : logits.shape[2]
    ]


BROKEN_MAPS = {
    a_map: (
        *(labels_off_by_one, map_shifted, map_upside_down, map_mirrored, map_of_one_label),
        map_in_blocks,
    ),
    # The halves are the same upside down.
    two_halves: (labels_off_by_one, map_shifted, map_mirrored, map_of_one_label),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("made", "breakage"), [(made, each) for made, broken in BROKEN_MAPS.items() for each in broken]
)
def test_broken_maps_are_a_mismatch(made, breakage, precision):
    for seed in range(2):
        logits = made(seed)
        agreement = agreement_of(of_map(logits), of_map(breakage(logits)), precision)
        assert agreement.verdict == "mismatch", agreement
        assert agreement.text.startswith("MISMATCH ")
        assert agreement.text.endswith("%")
        assert "of the labels agree" in agreement.reason


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("made", MAPS)
def test_rounded_maps_are_a_match(made, precision):
    for seed in range(2):
        logits = made(seed)
        noise = NOISE[precision] * np.random.default_rng(seed).normal(size=logits.shape)
        agreement = agreement_of(of_map(logits), of_map(logits + noise), precision)
        assert agreement.verdict == "match", agreement
        assert agreement.labels > 0.9
        assert agreement.text == f"{agreement.counts} match"
        assert not agreement.has_objects


def test_a_share_of_labels_is_never_rounded_up():
    logits = two_halves(0)
    assert agreement_of(of_map(logits), of_map(logits), "fp32").text == "100.00% match"
    one_off = logits.copy()
    one_off[:, 0, 0] = one_off[::-1, 0, 0]
    agreement = agreement_of(of_map(logits), of_map(one_off), "fp32")
    assert agreement.labels == 1 - 1 / (HEIGHT * WIDTH)
    assert agreement.text == "99.99% match"


def test_one_label_everywhere_tells_nothing():
    logits = map_of_one_label(a_map(0))
    agreement = agreement_of(of_map(logits), of_map(logits), "fp32")
    assert agreement.text == "100.00% too few to tell"
    one_class = two_halves(0)[:1]
    assert agreement_of(of_map(one_class), of_map(one_class), "fp32").verdict == "too few"


def test_another_label_everywhere_is_a_mismatch():
    """There is no border in it that could tell."""
    logits = map_of_one_label(a_map(0))
    agreement = agreement_of(of_map(logits), of_map(labels_off_by_one(logits)), "int8")
    assert agreement.text == "MISMATCH 0.00%"


def test_a_map_of_another_size_is_a_mismatch():
    logits = a_map(0)
    for other in (logits[:, ::2, ::2], logits[:5]):
        agreement = agreement_of(of_map(logits), of_map(other), "int8")
        assert agreement.verdict == "mismatch"
        assert agreement.reason.startswith("the map is ")
        assert agreement.text == "MISMATCH 0.00%"


def test_malformed_maps_are_errors():
    logits = a_map(0)
    flat = np.full_like(logits, np.inf)
    for broken in (logits[0], logits[:, :0], flat):
        agreement = verify.verify((logits,), (broken,), ("sem_seg",), "bf16")
        assert agreement.verdict == "error"
        assert agreement.reason.startswith("the output is malformed: sem_seg ")


# Things and stuff


def panorama(seed, logits):
    return replace(random_detections(seed, 30), sem_seg=logits)


def test_of_things_and_a_map_both_have_to_agree():
    logits = a_map(0)
    reference = panorama(0, logits)
    agreement = agreement_of(reference, reference, "fp32")
    assert agreement.text == "30/30, 100.00% match"
    agreement = agreement_of(reference, panorama(0, map_shifted(logits)), "bf16")
    assert agreement.text.startswith("MISMATCH 30/30, ")
    assert agreement.reason.count("of the labels agree") == 1
    agreement = agreement_of(reference, moved(reference, [9, 0, 9, 0]), "bf16")
    assert agreement.verdict == "mismatch"
    assert agreement.labels == 1
    both = moved(panorama(0, map_shifted(logits)), [9, 0, 9, 0])
    reason = agreement_of(reference, both, "bf16").reason
    assert "boxes are off" in reason
    assert "labels agree" in reason


def test_a_map_does_not_make_up_for_too_few_things():
    reference = take(panorama(0, a_map(0)), slice(0, 2))
    assert agreement_of(reference, reference, "fp32").text == "2/2, 100.00% too few to tell"


def test_the_worst_map_of_several_images_is_told():
    images = [of_map(a_map(0)), of_map(a_map(1))]
    one_off = images[1].sem_seg.copy()
    one_off[:, 0, 0] = np.roll(one_off[:, 0, 0], 1)
    agreement = verify.compare(images, [images[0], of_map(one_off)], "fp32")
    assert agreement.labels == 1 - 1 / one_off[0].size
    assert (agreement.verdict, agreement.has_objects) == ("match", False)
    agreement = verify.compare(images, images[::-1], "fp32")
    assert agreement.reason.startswith("image 1: ")


# Proposals -------------------------------------------------------------------------------------

PROPOSALS = ("objectness_logits", "proposal_boxes", "image_size")
NO_RULES = {"score_threshold": None, "limit": 100}


def proposals(seed, count=100, scale=3.0, offset=-6.0):
    found = random_detections(seed, count, masks=False)
    logits = offset + scale * np.random.default_rng(seed).normal(size=count)
    order = np.sort(logits)[::-1]
    (taken,) = split((order, found.boxes, np.array(found.image_size)), PROPOSALS)
    return taken


def logits_scaled(found):
    return replace(found, scores=found.scores / 2)


def logits_off(found):
    """By a third of what they vary by."""
    return replace(found, scores=found.scores + found.scores.std() / 3)


def logits_alike(found):
    return replace(found, scores=np.full_like(found.scores, found.scores.mean()))


def proposals_shifted(found):
    return moved(found, [8, 0, 8, 0])


def every_fifth_lost(found):
    return take(found, np.arange(len(found.scores)) % 5 > 0)


def worst_first(found):
    return take(found, np.arange(len(found.scores))[::-1])


def too_many(found):
    return take(found, np.r_[0, 0 : len(found.scores)])


def boxes_shuffled(found):
    return replace(found, boxes=np.random.default_rng(0).permutation(found.boxes))


BROKEN_PROPOSALS = (
    *(blind, logits_scaled, logits_off, logits_alike, proposals_shifted, every_fifth_lost),
    *(worst_first, too_many, boxes_shuffled),
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("breakage", BROKEN_PROPOSALS, ids=lambda function: function.__name__)
def test_broken_proposals_are_wrong(breakage, scale, precision):
    for seed in SEEDS:
        reference = proposals(seed, scale=scale)
        agreement = agreement_of(reference, breakage(reference), precision, **NO_RULES)
        assert agreement.is_wrong, agreement


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_rounded_proposals_are_a_match(scale, precision):
    for seed in SEEDS:
        reference = proposals(seed, scale=scale)
        noise = NOISE[precision] * np.random.default_rng(seed).normal(size=(100, 5))
        sides = np.tile(geometry.sides(reference.boxes), 2)
        candidate = in_order(
            replace(
                reference,
                scores=reference.scores + scale * noise[:, 4],
                boxes=reference.boxes + noise[:, :4] * sides / 2,
            )
        )
        agreement = agreement_of(reference, candidate, precision, **NO_RULES)
        assert agreement.verdict == "match", agreement
        assert agreement.text.endswith("/100 match")
        # In logits, whatever their range.
        assert 0 < agreement.score_drift < 5 * scale * NOISE[precision]


def test_proposals_are_taken_from_the_tuple():
    found = proposals(0)
    assert found.are_proposals
    assert found.has_objects
    assert found.scores.min() < -6
    assert set(found.classes) == {0}


def test_the_order_of_logits_is_told_in_logits():
    found = proposals(0)
    agreement = agreement_of(found, worst_first(found), "bf16", **NO_RULES)
    first, last = f"{found.scores[-1]:.3g}", f"{found.scores[0]:.3g}"
    assert agreement.reason.endswith(f"their scores: {first} stands before {last}")


def test_where_the_reference_has_no_order_there_is_none_to_keep():
    found = random_detections(0, 30)
    mixed = take(found, np.random.default_rng(0).permutation(30))
    assert agreement_of(mixed, mixed, "fp32").verdict == "match"
    assert agreement_of(found, mixed, "fp32").verdict == "error"


# Rotated boxes ---------------------------------------------------------------------------------


def rotated(seed, count=60):
    """Boxes that are twice to four times as long as wide, at any angle."""
    generator = np.random.default_rng([seed, 10])
    length = np.exp(generator.uniform(np.log(30), np.log(200), count))
    boxes = np.stack(
        [
            *generator.uniform(0, (WIDTH, HEIGHT), (count, 2)).T,
            length,
            length / generator.uniform(2, 4, count),
            generator.uniform(-180, 180, count),
        ],
        axis=1,
    )
    return Detections(
        boxes=boxes,
        scores=np.sort(generator.uniform(0.06, 0.999, count))[::-1],
        classes=generator.integers(5, size=count),
        image_size=(HEIGHT, WIDTH),
    )


def turned(found, change):
    boxes = found.boxes.copy()
    boxes[:, 4] = change(boxes[:, 4])
    return replace(found, boxes=boxes)


def angles_negated(found):
    return turned(found, np.negative)


def angles_in_radians(found):
    return turned(found, np.radians)


def a_quarter_turn(found):
    return turned(found, lambda angles: angles + 90)


def half_a_turn(found):
    """The same box, and what is in it lies upside down."""
    return turned(found, lambda angles: angles + 180)


def three_degrees(found):
    return turned(found, lambda angles: angles + 3)


def rotated_shifted(found):
    return moved(found, [5, 0, 0, 0, 0])


def width_and_height_swapped(found):
    return replace(found, boxes=found.boxes[:, [0, 1, 3, 2, 4]])


BROKEN_ANGLES = (
    *(angles_negated, angles_in_radians, a_quarter_turn, half_a_turn, three_degrees),
    *(rotated_shifted, width_and_height_swapped),
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("breakage", BROKEN_ANGLES, ids=lambda function: function.__name__)
def test_broken_rotated_boxes_are_a_mismatch(breakage, precision):
    for seed in SEEDS:
        reference = rotated(seed)
        agreement = agreement_of(reference, breakage(reference), precision)
        assert agreement.verdict == "mismatch", agreement


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_rotated_boxes_are_a_match(precision):
    for seed in SEEDS:
        reference = rotated(seed)
        noise = NOISE[precision] / 2 * np.random.default_rng(seed).normal(size=(60, 5))
        scale = np.concatenate([reference.boxes[:, [2, 3, 2, 3]], np.full((60, 1), 30.0)], axis=1)
        candidate = replace(reference, boxes=reference.boxes + noise * scale)
        agreement = agreement_of(reference, candidate, precision)
        assert agreement.verdict == "match", agreement
        assert len(agreement.bias) == 5


def test_an_angle_and_a_whole_turn_are_the_same():
    reference = rotated(0)
    agreement = agreement_of(reference, turned(reference, lambda x: x + 360), "fp32")
    assert agreement.verdict == "match"
    assert max(map(abs, agreement.bias)) < 1e-9


def test_angles_are_told_in_degrees():
    reason = agreement_of(rotated(0), three_degrees(rotated(0)), "bf16").reason
    assert "(+0.0, +0.0, +0.0, +0.0, +3.0) pixels and degrees" in reason


def test_rotated_boxes_instead_of_others_are_an_error():
    found = random_detections(0, 10, masks=False)
    other = replace(found, boxes=np.concatenate([found.boxes, np.zeros((10, 1))], axis=1))
    agreement = agreement_of(found, other, "bf16")
    assert agreement.reason == "numbers of a box are 5 instead of 4"


# Fields of which nothing is known --------------------------------------------------------------

ODD = ("pred_boxes", "pred_classes", "pred_colors", "scores", "image_size", "panoptic_seg")


def odd_tuple(colors, panoptic=None):
    found = random_detections(0, 40, masks=False)
    size = np.array(found.image_size)
    panoptic = np.ones((20, 20), dtype=np.int64) if panoptic is None else panoptic
    return (found.boxes, found.classes, colors, found.scores, size, panoptic)


def test_what_is_of_each_object_is_compared_by_numbers():
    generator = np.random.default_rng(0)
    colors = generator.uniform(100, 200, (40, 3))
    near, far = colors + generator.normal(size=colors.shape) / 50, colors[::-1]
    assert verify.verify(odd_tuple(colors), odd_tuple(near), ODD, "fp32").verdict == "match"
    agreement = verify.verify(odd_tuple(colors), odd_tuple(far), ODD, "int8")
    assert agreement.verdict == "mismatch"
    assert agreement.reason.startswith("pred_colors are off by ")
    agreement = verify.verify(odd_tuple(colors), odd_tuple(colors[:, :2]), ODD, "int8")
    assert agreement.reason == "pred_colors are 2 instead of 3"


def test_what_is_of_no_object_is_said_not_to_be_compared():
    colors = np.arange(40)
    other = np.full((7, 7), np.nan)
    agreement = verify.verify(odd_tuple(colors), odd_tuple(colors, other), ODD, "fp32")
    assert agreement.verdict == "match"
    assert verify.not_compared(odd_tuple(colors), ODD) == ("panoptic_seg",)
    assert verify.not_compared((), ODD) == ()


def test_without_boxes_and_without_a_map_there_is_nothing_to_compare():
    agreement = verify.verify((np.ones(3), np.ones(2)), (), ("depth", "normals"), "fp32")
    assert agreement.reason == (
        "the reference is malformed: neither boxes nor sem_seg, but depth, normals"
    )
