"""The check of the detections, tried on engines that are broken on purpose."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from measure import geometry, verify
from measure.verify import Detections
from results import facts
from results.record import Agreement

HEIGHT, WIDTH = 480, 640
FIELDS = ("pred_boxes", "pred_classes", "pred_masks", "scores", "image_size")
PRECISIONS = tuple(verify.TOLERANCES)
SEEDS = range(5)


def iou(first, second):
    return geometry.overlaps(first[None], second[None])[0, 0]


@functools.lru_cache(maxsize=None)
def random_detections(seed, count=100, masks=True):
    """What a detector lists: no two boxes of a class on one object, scores above the threshold."""
    generator = np.random.default_rng(seed)
    boxes, classes = [], []
    while len(boxes) < count:
        width, height = np.exp(generator.uniform(np.log(10), np.log(400), size=2))
        x, y = generator.uniform(0, WIDTH - width), generator.uniform(0, HEIGHT - min(height, 470))
        box = np.array([x, y, x + width, min(y + height, HEIGHT)])
        label = generator.integers(80)
        if all(label != other or iou(box, that) < 0.5 for that, other in zip(boxes, classes)):
            boxes.append(box)
            classes.append(label)
    return Detections(
        boxes=np.array(boxes).reshape(count, 4),
        scores=np.sort(generator.uniform(0.06, 0.999, size=count))[::-1],
        classes=np.array(classes, dtype=np.int64),
        image_size=(HEIGHT, WIDTH),
        masks=random_masks(generator, count) if masks else None,
    )


def random_masks(generator, count):
    """Smooth blobs of probabilities, count x 1 x 28 x 28."""
    axis = np.linspace(-1, 1, 28)
    radius = np.hypot(*np.meshgrid(axis, axis))
    radii = generator.uniform(0.4, 0.9, size=(count, 1, 1, 1))
    return 1 / (1 + np.exp(8 * (radius - radii)))


def take(detections, index):
    masks = None if detections.masks is None else detections.masks[index]
    return replace(
        detections,
        boxes=detections.boxes[index],
        scores=detections.scores[index],
        classes=detections.classes[index],
        masks=masks,
    )


def in_order(detections):
    """As a detector lists them: the best first."""
    return take(detections, np.argsort(-detections.scores, kind="stable"))


def flat(*images):
    """The flat tuple that a model returns, as arrays."""
    return tuple(
        np.ascontiguousarray(value)
        for image in images
        for value in (
            image.boxes.astype(np.float32),
            image.classes,
            image.masks.astype(np.float32),
            image.scores.astype(np.float32),
            np.array(image.image_size),
        )
    )


def moved(detections, offset):
    return replace(detections, boxes=detections.boxes + np.array(offset))


def blind(detections):
    return take(detections, slice(0, 0))


def shifted(detections):
    return moved(detections, [8, 0, 8, 0])


def shifted_back(detections):
    return moved(detections, [0, -8, 0, -8])


def widened(detections):
    return moved(detections, [-8, 0, 8, 0])


def one_class_off(detections):
    return replace(detections, classes=(detections.classes + 1) % 80)


def without_suppression(detections):
    """Three jittered duplicates of every box, with scores a little lower."""
    generator = np.random.default_rng(0)
    everything = take(detections, np.repeat(np.arange(len(detections.scores)), 4))
    copies = np.arange(len(everything.scores)) % 4
    jitter = generator.normal(0, 2, size=everything.boxes.shape) * (copies > 0)[:, None]
    duplicated = replace(
        everything,
        boxes=everything.boxes + jitter,
        scores=everything.scores * (1 - 0.01 * copies),
    )
    return in_order(duplicated)


def without_suppression_top_100(detections):
    """The same, cut to the limit: duplicates have pushed out all that had lower scores."""
    return take(without_suppression(detections), slice(0, 100))


def of_another_image_size(detections):
    """The boxes of the padded image, 672 x 512, left unscaled."""
    return replace(detections, boxes=detections.boxes * np.array([1.05, 1.0667, 1.05, 1.0667]))


def masks_inverted(detections):
    return replace(detections, masks=1 - detections.masks)


def scores_halved(detections):
    return replace(detections, scores=detections.scores / 2)


def every_fifth_lost(detections):
    return take(detections, np.arange(len(detections.scores)) % 5 > 0)


def only_the_best(detections):
    return take(detections, slice(0, 3))


def coordinates_swapped(detections):
    return replace(detections, boxes=detections.boxes[:, [1, 0, 3, 2]])


BROKEN = (
    blind,
    shifted,
    shifted_back,
    widened,
    one_class_off,
    without_suppression,
    without_suppression_top_100,
    of_another_image_size,
    masks_inverted,
    scores_halved,
    every_fifth_lost,
    only_the_best,
    coordinates_swapped,
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [5, 30, 100])
@pytest.mark.parametrize("breakage", BROKEN, ids=lambda function: function.__name__)
def test_broken_engine_is_a_mismatch(breakage, count, precision):
    for seed in SEEDS:
        reference = random_detections(seed, count)
        agreement = verify.compare([reference], [breakage(reference)], precision)
        assert agreement.is_wrong, agreement
        assert agreement.text.startswith(("MISMATCH", "ERROR"))
        assert agreement.reason


def rounded(detections, seed, relative, score_noise):
    """Box coordinates off by a share of the box's sides, logits by a share of themselves."""
    generator = np.random.default_rng([seed, 1])
    sides = np.tile(detections.boxes[:, 2:] - detections.boxes[:, :2], 2)
    logits = np.log(detections.scores / (1 - detections.scores))
    logits = logits * (1 + score_noise * generator.normal(size=logits.shape))
    return replace(
        detections,
        boxes=detections.boxes + relative * sides * generator.normal(size=sides.shape),
        scores=1 / (1 + np.exp(-logits)),
        masks=np.clip(detections.masks + relative * generator.normal(size=(28, 28)), 0, 1),
    )


HEALTHY = {
    "fp32": (1e-5, 1e-5),
    "tf32": (2e-4, 1e-3),
    "fp16": (1e-3, 5e-3),
    "bf16": (4e-3, 2e-2),
    "int8": (2e-2, 5e-2),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 2, 5, 30, 100])
def test_rounding_is_a_match(count, precision):
    for seed in range(20):
        reference = random_detections(seed, count)
        candidate = in_order(rounded(reference, seed, *HEALTHY[precision]))
        candidate = take(candidate, candidate.scores >= verify.SCORE_THRESHOLD)
        agreement = verify.compare([reference], [candidate], precision)
        assert agreement.verdict == ("match" if count >= 5 else "too few"), agreement
        assert agreement.matched + agreement.exempt >= 0.97 * count
        assert agreement.box_drift > 0
        assert agreement.score_drift > 0


def test_bfloat16_coordinates_are_a_match():
    """An engine that hands out boxes in bf16, whose steps are 4 pixels wide from 512 on."""
    for seed in SEEDS:
        reference = random_detections(seed)
        large = take(reference, (reference.boxes[:, 2:] - reference.boxes[:, :2]).min(1) > 40)
        boxes = torch.as_tensor(large.boxes).bfloat16()
        candidate = replace(large, boxes=boxes.double().numpy())
        agreement = verify.compare([large], [candidate], "bf16")
        assert agreement.verdict == "match", agreement
        assert agreement.box_drift <= 2


def test_equal_sets_match_exactly():
    reference = random_detections(0)
    agreement = verify.compare([reference], [reference], "fp32")
    assert agreement == Agreement(
        "match", "", 100, 100, 0, 0, 0, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0, 0.0)
    )
    assert agreement.text == "100/100 match"


def test_counts_drifts_and_reason_of_a_mismatch():
    reference = random_detections(3, 50)
    boxes, scores = reference.boxes.copy(), reference.scores.copy()
    boxes[0, 0] += 0.01
    scores[1] -= 0.2
    candidate = in_order(take(replace(reference, boxes=boxes, scores=scores), slice(0, 45)))
    agreement = verify.compare([reference], [candidate], "fp32", score_threshold=0.01)
    assert agreement.verdict == "mismatch"
    assert (agreement.expected, agreement.matched) == (50, 44)
    assert (agreement.lost, agreement.spurious, agreement.exempt) == (6, 1, 0)
    assert agreement.box_drift == pytest.approx(0.01)
    assert agreement.score_drift == pytest.approx(0.2)
    assert agreement.mask_drift == 0
    assert agreement.text == "MISMATCH 44/50"
    assert agreement.reason == (
        "of 50 detections 6 are lost, and 1 are spurious (found, but 1 with another score)"
    )


def test_shift_is_told_with_its_direction():
    reference = random_detections(1)
    reference = take(reference, (reference.boxes[:, 2:] - reference.boxes[:, :2]).min(1) > 80)
    agreement = verify.compare([reference], [moved(reference, [3, 0, 3, 0])], "bf16")
    assert agreement.matched == agreement.expected > 10
    assert agreement.reason == "boxes are off by (+3.0, +0.0, +3.0, +0.0) pixels in the median"
    assert agreement.bias == pytest.approx((3, 0, 3, 0))


def test_low_scores_halved_are_a_mismatch():
    """Every score differs by less than the tolerance for a pair, but all in one direction."""
    reference = random_detections(2)
    reference = replace(reference, scores=np.linspace(0.18, 0.12, 100))
    agreement = verify.compare([reference], [scores_halved(reference)], "bf16")
    assert agreement.matched == 100
    assert agreement.verdict == "mismatch"
    assert agreement.reason.startswith("scores are off by -0.075 in the median; scores are off by")


def test_nothing_found_where_nothing_is():
    nothing = random_detections(0, 0)
    agreement = verify.compare([nothing], [nothing], "fp32")
    assert (agreement.verdict, agreement.text) == ("too few", "0/0 too few to tell")
    assert agreement.box_drift is None
    assert agreement.bias is None


def test_something_found_where_nothing_is():
    agreement = verify.compare([random_detections(0, 0)], [random_detections(0, 5)], "int8")
    assert (agreement.verdict, agreement.text) == ("mismatch", "MISMATCH 0/0 +5")


# Near the cut


def with_scores(detections, scores):
    return replace(detections, scores=np.array(scores, dtype=float))


@pytest.mark.parametrize("absent_side", ["reference", "candidate"])
def test_detection_at_the_threshold_may_be_absent(absent_side):
    both = with_scores(random_detections(0, 6), [0.9, 0.8, 0.7, 0.6, 0.5, 0.0504])
    fewer = take(both, slice(0, 5))
    sides = [fewer, both] if absent_side == "reference" else [both, fewer]
    agreement = verify.compare([sides[0]], [sides[1]], "fp32")
    assert agreement.verdict == "match"
    assert (agreement.lost, agreement.spurious, agreement.exempt) == (0, 0, 1)
    assert agreement.reason == "left out of account, being so close to the score cut: 1"


@pytest.mark.parametrize("absent_side", ["reference", "candidate"])
def test_detection_above_the_threshold_may_not(absent_side):
    both = with_scores(random_detections(0, 5), [0.9, 0.8, 0.7, 0.6, 0.06])
    fewer = take(both, slice(0, 4))
    sides = [fewer, both] if absent_side == "reference" else [both, fewer]
    agreement = verify.compare([sides[0]], [sides[1]], "fp32")
    assert agreement.verdict == "mismatch"
    assert agreement.exempt == 0


def test_last_of_the_top_100_may_be_another_one():
    several = with_scores(random_detections(0, 101), np.linspace(0.9, 0.4, 101))
    scores = several.scores.copy()
    scores[100] = scores[99] - 0.0004
    several = replace(several, scores=scores)
    reference, candidate = take(several, np.arange(100)), take(several, np.r_[0:99, 100])
    agreement = verify.compare([reference], [candidate], "fp32")
    assert agreement.verdict == "match"
    assert (agreement.matched, agreement.exempt) == (99, 2)
    # With room for more, the one that is missing has no excuse, nor has the one too many.
    agreement = verify.compare([reference], [candidate], "fp32", limit=200)
    assert (agreement.lost, agreement.spurious) == (1, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_blind_engine_is_not_excused_by_low_scores(count, precision):
    reference = with_scores(random_detections(0, count), np.full(count, 0.0501))
    agreement = verify.compare([reference], [blind(reference)], precision)
    assert agreement.verdict == "mismatch"
    assert agreement.lost == count


@pytest.mark.parametrize("precision", PRECISIONS)
def test_flood_of_low_scores_is_not_excused(precision):
    reference = with_scores(random_detections(0, 5), [0.9, 0.8, 0.7, 0.6, 0.5])
    noise = with_scores(random_detections(1, 60), np.full(60, 0.0501))
    joined = replace(
        reference,
        boxes=np.concatenate([reference.boxes, noise.boxes]),
        scores=np.concatenate([reference.scores, noise.scores]),
        classes=np.concatenate([reference.classes, noise.classes]),
        masks=np.concatenate([reference.masks, noise.masks]),
    )
    agreement = verify.compare([reference], [joined], precision)
    assert agreement.verdict == "mismatch"
    assert agreement.text == f"MISMATCH 5/5 +{agreement.spurious}"
    assert agreement.spurious >= 55


# What no list of detections is


def invented(detections, scores):
    """The same, with boxes of other places and these scores after them."""
    others = with_scores(take(random_detections(99, 100), slice(0, len(scores))), scores)
    fields = ("boxes", "scores", "classes", "masks")
    joined = {x: np.concatenate([getattr(detections, x), getattr(others, x)]) for x in fields}
    return replace(detections, **joined)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("count", "score"), [(20, 0.001), (20, 0.0), (10, -5.0), (3, 0.049)])
def test_what_is_invented_below_the_threshold_is_not_excused(precision, count, score):
    """No healthy detector lists anything there."""
    reference = with_scores(random_detections(0, 60), np.linspace(0.9, 0.3, 60))
    agreement = verify.compare([reference], [invented(reference, [score] * count)], precision)
    assert agreement.is_wrong, agreement


@pytest.mark.parametrize("precision", PRECISIONS)
def test_duplicates_below_the_last_of_the_list_are_not_excused(precision):
    """Twenty more of the best boxes, close to the score at which the list of 100 ends."""
    reference = with_scores(random_detections(0, 100), np.linspace(0.95, 0.3, 100))
    twice = take(reference, np.r_[0:80, 0:20])
    candidate = with_scores(twice, [*reference.scores[:80], *np.full(20, 0.2999)])
    assert verify.compare([reference], [candidate], precision).is_wrong
    longer = take(reference, np.r_[0:100, 0:20])
    candidate = with_scores(longer, [*reference.scores, *np.full(20, 0.29)])
    agreement = verify.compare([reference], [candidate], precision)
    assert agreement.reason == "120 detections where 100 are the most"
    # Of a list that has room, duplicates as close to the threshold as rounding goes.
    half = take(reference, slice(0, 50))
    candidate = with_scores(take(half, np.r_[0:50, 0:8]), [*half.scores, *np.full(8, 0.0501)])
    assert verify.compare([half], [candidate], precision).is_wrong


@pytest.mark.parametrize("score", [-0.001, 0.0497, 1.001, 7.0])
def test_a_score_out_of_range_is_an_error(score):
    reference = random_detections(0, 30)
    scores = reference.scores.copy()
    scores[0 if score > 1 else -1] = score
    agreement = verify.compare([reference], [replace(reference, scores=scores)], "int8")
    assert agreement.verdict == "error"
    assert agreement.reason == f"a score of {score:.3g}, where 0.05 to 1 are listed"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_order_than_that_of_the_scores_is_an_error(precision):
    reference = with_scores(random_detections(0, 30), np.linspace(0.9, 0.3, 30))
    order = verify.TOLERANCES[precision].order
    for gap, verdict in ((0.9 * order, "match"), (1.1 * order, "error")):
        scores = np.r_[0.9, 0.9 - gap, np.linspace(0.6, 0.3, 28)]
        apart = replace(reference, scores=scores)
        swapped = take(apart, np.r_[1, 0, 2:30])
        assert verify.compare([apart], [swapped], precision).verdict == verdict
    backwards = take(reference, np.arange(30)[::-1])
    agreement = verify.compare([reference], [backwards], precision)
    assert agreement.reason == (
        "the detections are not in the order of their scores: 0.3 stands before 0.9"
    )


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_next_to_nothing_is_no_match(count):
    reference = random_detections(0, count)
    agreement = verify.compare([reference], [reference], "bf16")
    words = "match" if count >= 5 else "too few to tell"
    assert agreement.text == f"{count}/{count} {words}"
    assert not agreement.is_wrong
    # What differs is told however little it is.
    if count:
        assert verify.compare([reference], [one_class_off(reference)], "bf16").is_wrong


def test_the_images_of_a_call_are_counted_together():
    images = [random_detections(seed, 3) for seed in (0, 1)]
    assert verify.compare(images, images, "fp32").text == "6/6 match"


# Pairing


def test_equal_scores_in_another_order():
    reference = with_scores(random_detections(4, 10), np.full(10, 0.5))
    agreement = verify.compare([reference], [take(reference, np.arange(10)[::-1])], "fp32")
    assert agreement.text == "10/10 match"


def one_box_of_iou(overlap):
    """One object, found with a box that has that IoU with the right one (half a pixel is added)."""
    right = take(random_detections(0, 1, False), [0])
    width = 100 * overlap
    boxes = np.array([[[10.0, 10.0, 109.0, 109.0]], [[10.0, 10.0, 9.0 + width, 109.0]]])
    return tuple(replace(right, boxes=box, scores=np.array([0.9])) for box in boxes)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_box_agrees_from_the_bound_of_its_precision_on(precision):
    bound = verify.TOLERANCES[precision].iou
    for overlap, agrees in ((bound + 0.01, 1), (bound - 0.01, 0)):
        right, found = one_box_of_iou(overlap)
        assert verify.compare([right], [found], precision).matched == agrees


@pytest.mark.parametrize(("overlap", "same_object"), [(0.51, True), (0.49, False)])
def test_a_box_that_overlaps_by_half_is_of_the_same_object(overlap, same_object):
    """Only then its drift is worth telling."""
    right, found = one_box_of_iou(overlap)
    agreement = verify.compare([right], [found], "fp32")
    assert agreement.matched == 0
    assert (agreement.box_drift is not None) == same_object


def test_what_is_lost_is_named_by_its_place_in_the_reference():
    reference = random_detections(3, 10)
    found = take(reference, [9, 1, 2, 3, 5, 6, 7, 8])
    (image,) = verify.find(flat(reference), flat(found), FIELDS, "fp32")
    assert image.lost.tolist() == [0, 4]
    assert image.agrees.all()
    shifted_ones = replace(found, boxes=found.boxes + np.array([400.0, 0.0, 400.0, 0.0]))
    (image,) = verify.find(flat(reference), flat(shifted_ones), FIELDS, "fp32")
    assert not image.agrees.any()
    assert image.lost.tolist() == list(range(10))


def test_of_two_boxes_on_one_object_the_one_with_the_score_is_taken():
    reference = with_scores(random_detections(0, 1), [0.9])
    twice = take(reference, [0, 0])
    boxes = twice.boxes + np.array([[0.01, 0, 0, 0], [0, 0, 0, 0]])
    agreement = verify.compare(
        [reference], [replace(twice, boxes=boxes, scores=np.array([0.9, 0.3]))], "fp32"
    )
    assert (agreement.matched, agreement.spurious) == (1, 1)


def test_box_of_no_width_matches_itself():
    reference = random_detections(0, 5, masks=False)
    boxes = reference.boxes.copy()
    boxes[1] = [640, 100, 640, 180]
    reference = replace(reference, boxes=boxes)
    moved_a_little = replace(reference, boxes=boxes + 1e-3)
    assert verify.compare([reference], [moved_a_little], "fp32").text == "5/5 match"


def random_boxes(generator, count):
    """Ordinary boxes, and some of no width, of no height, or turned inside out."""
    corners = generator.uniform(-20, 300, size=(count, 2))
    sides = generator.uniform(0, 200, size=(count, 2))
    sides[generator.random((count, 2)) < 0.2] = 0
    sides[generator.random((count, 2)) < 0.1] *= -1
    return np.concatenate([corners, corners + sides], axis=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_overlaps_are_torchvisions(seed):
    """Of boxes that are half a pixel wider to each side."""
    generator = np.random.default_rng(seed)
    first = random_boxes(generator, 40)
    # Some are the same, or moved a little.
    second = np.concatenate([first[:10], first[10:20] + 3, random_boxes(generator, 20)])
    wide = [torch.from_numpy(x + [-0.5, -0.5, 0.5, 0.5]) for x in (first, second)]
    wanted = box_iou(*wide).numpy()
    assert np.isfinite(wanted).all()
    assert (wanted > 0).sum() > 50
    np.testing.assert_allclose(geometry.overlaps(first, second), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_overlaps_of_no_boxes(counts):
    boxes = random_boxes(np.random.default_rng(0), 3)
    assert geometry.overlaps(boxes[: counts[0]], boxes[: counts[1]]).shape == counts


def test_boxes_turned_inside_out_overlap_with_nothing():
    """With the half pixel to each side, nothing is left of them."""
    inside_out = replace(
        random_detections(0, 2, masks=False),
        boxes=np.array([[10.0, 10, 9, 20], [40, 40, 39, 60]]),
    )
    agreement = verify.compare([inside_out], [inside_out], "fp32")
    assert (agreement.verdict, agreement.matched) == ("mismatch", 0)


def test_it_imports_no_pytorch():
    code = "import sys, measure.verify; sys.exit('torch' in sys.modules)"
    root = Path(verify.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_pasted_masks_are_compared_in_the_image():
    reference = random_detections(0, 5)
    masks = np.zeros((5, HEIGHT, WIDTH), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, reference.boxes.astype(int)):
        mask[y1:y2, x1:x2] = True
    reference = replace(reference, masks=masks)
    assert verify.compare([reference], [reference], "fp32").text == "5/5 match"
    elsewhere = replace(reference, masks=np.roll(masks, 200, axis=2))
    agreement = verify.compare([reference], [elsewhere], "bf16")
    assert agreement.verdict == "mismatch"
    assert "with another mask" in agreement.reason
    assert agreement.mask_drift > 0.25


# Several images, several sizes


def test_images_are_added_up():
    first, second = random_detections(0, 100), random_detections(1, 30)
    agreement = verify.compare([first, second], [first, second], "fp32")
    assert agreement.text == "130/130 match"


def test_one_blind_image_among_many_detections_is_a_mismatch():
    first, second = random_detections(0, 100), random_detections(1, 1)
    agreement = verify.compare([first, second], [first, blind(second)], "int8")
    assert agreement.text == "MISMATCH 100/101"
    assert agreement.reason == "image 2: of 1 detections 1 are lost, and 0 are spurious"


def test_images_in_another_order_are_a_mismatch():
    images = [random_detections(0), random_detections(1)]
    assert verify.compare(images, images[::-1], "int8").verdict == "mismatch"


def test_worst_size_is_named():
    reference = random_detections(0)
    match = verify.compare([reference], [reference], "bf16")
    few = verify.compare([reference], [only_the_best(reference)], "bf16")
    none = verify.compare([reference], [blind(reference)], "bf16")
    assert facts.worst({"min": match, "opt": match, "max": match}) == match
    agreement = facts.worst({"min": none, "opt": match, "max": few})
    assert agreement.text == "MISMATCH 0/100"
    assert agreement.reason.startswith("at min: of 100 detections 100 are lost")
    few = replace(match, verdict="too few", matched=1, expected=1)
    assert facts.worst({"min": few, "opt": match, "max": few}) == match
    assert facts.worst({"min": few, "opt": few}).text == "1/1 too few to tell"
    assert facts.worst({"min": few, "opt": match, "max": none}).verdict == "mismatch"
    error = Agreement("error", "the output is malformed")
    agreement = facts.worst({"opt": none, "max": error})
    assert (agreement.text, agreement.reason) == ("ERROR", "at max: the output is malformed")
    # Of several that agree as well, that which was timed.
    fewer = replace(match, expected=80, matched=80)
    assert facts.worst({"min": fewer, "opt": match, "max": fewer}) == match
    # One size has no need of a name.
    for judged in ({"opt": error}, {"opt": error, "blank": match}):
        assert facts.worst(judged).reason == "the output is malformed"
    agreement = facts.worst({"opt": match, "blank": error})
    assert agreement.reason == "on a plain picture: the output is malformed"


# Flat tuples


def test_split_takes_the_images_apart():
    images = [random_detections(0, 7), random_detections(1, 0)]
    found = verify.split(flat(*images), FIELDS)
    assert len(found) == 2
    assert found[0].image_size == (HEIGHT, WIDTH)
    np.testing.assert_allclose(found[0].boxes, images[0].boxes, rtol=1e-6)
    np.testing.assert_allclose(found[0].scores, images[0].scores, rtol=1e-6)
    np.testing.assert_array_equal(found[0].classes, images[0].classes)
    assert found[0].masks.shape == (7, 1, 28, 28)
    assert found[1].boxes.shape == (0, 4)


def test_split_takes_arrays_and_other_types():
    image = random_detections(0, 7, masks=False)
    outputs = (
        torch.as_tensor(image.boxes).bfloat16().float().numpy(),
        image.classes.astype(np.float32),
        image.scores.astype(np.float16),
        np.array([HEIGHT, WIDTH]),
    )
    fields = ("pred_boxes", "pred_classes", "scores", "image_size")
    (found,) = verify.split(outputs, fields)
    np.testing.assert_array_equal(found.classes, image.classes)
    np.testing.assert_allclose(found.scores, image.scores, atol=1e-3)
    assert found.masks is None


def changed(position, value):
    outputs = list(flat(random_detections(0, 7)))
    outputs[position] = value(outputs[position])
    return tuple(outputs)


def with_one(value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[3] = value
        return array

    return change


MALFORMED = {
    "nan box": (changed(0, with_one(float("nan"))), "pred_boxes holds NaN or infinity"),
    "infinite box": (changed(0, with_one(float("inf"))), "pred_boxes holds NaN or infinity"),
    "nan score": (changed(3, with_one(float("nan"))), "scores holds NaN or infinity"),
    "nan mask": (changed(2, with_one(float("nan"))), "pred_masks holds NaN or infinity"),
    "boxes flat": (changed(0, np.ravel), "pred_boxes is 28 where 7 x 4 was expected"),
    "boxes of six": (
        changed(0, lambda boxes: np.concatenate([boxes, boxes[:, :2]], 1)),
        "pred_boxes is 7 x 6 where 7 x 4 was expected",
    ),
    "a score short": (
        changed(3, lambda scores: scores[:-1]),
        "pred_boxes is 7 x 4 where 6 x 4 was expected",
    ),
    "a class short": (
        changed(1, lambda classes: classes[:-1]),
        "pred_classes is 6 where 7 was expected",
    ),
    "a mask short": (
        changed(2, lambda masks: masks[:-1]),
        "pred_masks is 6 x 1 x 28 x 28 where 7 masks was expected",
    ),
    "no scores": (
        changed(3, lambda scores: np.array(scores.sum())),
        "scores is a single number where one dimension was",
    ),
    "one-hot classes": (
        changed(1, lambda classes: np.eye(80, dtype=np.int64)[classes]),
        "pred_classes is 7 x 80 where 7 was expected",
    ),
    "half a class": (changed(1, lambda classes: classes + 0.5), "pred_classes holds fractions"),
    "size of one": (changed(4, lambda size: size[:1]), "image_size is 1 where 2 was expected"),
    "none": (changed(0, lambda boxes: None), "a NoneType where a tensor should be"),
    "ragged": (changed(0, lambda boxes: [[1, 2], [3]]), "a list where a tensor should be"),
    "a tensor too few": (changed(0, np.copy)[:4], "4 tensors, where an image has 5"),
    "nothing": ((), "0 tensors, where an image has 5"),
    "a dict": ({"scores": np.ones(3)}, "a dict instead of a tuple of tensors"),
    "an array": (np.ones(5), "a ndarray instead of a tuple of tensors"),
    "texts": (changed(1, lambda classes: classes.astype(str)), "a ndarray where a tensor should"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_output_is_an_error(name):
    outputs, why = MALFORMED[name]
    reference = flat(random_detections(0, 7))
    agreement = verify.verify(reference, outputs, FIELDS, "fp32")
    assert (agreement.verdict, agreement.text) == ("error", "ERROR")
    assert agreement.reason.startswith(f"the output is malformed: {why}")
    agreement = verify.verify(outputs, reference, FIELDS, "fp32")
    assert agreement.reason.startswith(f"the reference is malformed: {why}")


def test_malformed_second_image_is_an_error():
    images = flat(random_detections(0, 7), random_detections(1, 7))
    broken = images[:8] + (np.full(7, np.nan),) + images[9:]
    assert verify.verify(images, broken, FIELDS, "bf16").verdict == "error"


def test_an_image_short_is_an_error():
    images = flat(random_detections(0, 7), random_detections(1, 7))
    agreement = verify.verify(images, images[:5], FIELDS, "bf16")
    assert agreement.verdict == "error"
    assert agreement.reason == "the detections of 1 images instead of 2"


def test_masks_of_another_size_are_an_error():
    images = flat(random_detections(0, 7))
    small = images[:2] + (images[2][:, :, ::2, ::2],) + images[3:]
    agreement = verify.verify(images, small, FIELDS, "bf16")
    assert agreement.verdict == "error"
    assert agreement.reason == "masks are 1 x 14 x 14 instead of 1 x 28 x 28"


def test_another_image_size_is_a_mismatch():
    """An engine that carries the size it was traced at."""
    reference = random_detections(0, 7)
    stuck = replace(reference, image_size=(800, 1333))
    agreement = verify.verify(flat(reference), flat(stuck), FIELDS, "bf16")
    assert agreement.text == "MISMATCH 0/7"
    assert agreement.reason == "the detections are for an image of 800x1333 instead of 480x640"


def test_tuple_that_agrees():
    reference = flat(random_detections(0, 100), random_detections(1, 100))
    agreement = verify.verify(reference, reference, FIELDS, "fp32")
    assert agreement.text == "200/200 match"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_detections_that_are_there_twice_with_one_score(precision):
    """As an engine lists them that gathers an index twice; within the share that may be lost."""
    reference = with_scores(random_detections(0, 85), np.linspace(0.95, 0.3, 85))
    twice = take(reference, np.sort(np.r_[0:85, 0:85:9]))
    agreement = verify.compare([reference], [twice], precision)
    assert agreement.verdict == "mismatch"
    assert "10 detections are there twice" in agreement.reason
