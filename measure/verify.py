"""Do two sets of detections agree: is the fast engine still right?

It knows nothing of models, backends or PyTorch: it compares flat tuples of NumPy arrays, the
detections of one image after another, with those of a reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from scipy.optimize import linear_sum_assignment

from results.facts import rank
from results.record import Agreement

# What Detectron2 lists: scores above SCORE_THRESH_TEST, the best DETECTIONS_PER_IMAGE of them.
SCORE_THRESHOLD = 0.05
LIMIT = 100
# Boxes of one class that overlap this much are taken for the same object, right or wrong: its
# drift is worth reporting. The detectors' own non-maximum suppression draws the line there too.
SAME_OBJECT_IOU = 0.5
# Of a set, the share that may be excused for lying near the cut. Rounding swaps a few detections
# there; an engine that drops or invents more than this has another reason.
EXCUSED_SHARE = 0.05
EXCUSED_LEAST = 2
# A detection with a better one of its class on the same place is what non-maximum suppression, at
# an IoU of 0.5, leaves out: rounding does not excuse it from here on.
DUPLICATE_IOU = 0.6
# Share of a number by which bfloat16 rounds it at most.
BFLOAT16_STEP = 2**-8
# With fewer detections, that they all agree says next to nothing.
LEAST_TO_TELL = 5


class Malformed(ValueError):
    """An output that is not what detections look like; the message says in what way."""


@dataclass(frozen=True)
class Tolerance:
    """How far a healthy engine may be from the reference at some precision.

    Attributes:
        iou: the least overlap of a pair of boxes.
        mask_iou: the least overlap of their masks, binarised at 0.5.
        score: the largest difference of their scores.
        share: the share of detections that must have a partner. It is not 1, because at low
            precision a detection may cross a threshold inside the network (proposals kept,
            non-maximum suppression) and take its neighbours along.
        cut_margin: how close to the cut, on either side, a score must lie for rounding to decide
            whether the detection is listed. Far narrower than `score`: near the cut scores are low,
            and the sigmoid or softmax is flat there.
        order: by how much a score may exceed that of a detection before it.
        shift_px, shift_share: how far off the median of each of the four coordinates may be, in
            pixels and as a share of the mean width or height of a box, whichever is more.
        score_shift: how far off the median of the scores may be.
        median_box, median_score, median_mask: the largest median of 1 - IoU of the boxes, of the
            differences of scores, of 1 - IoU of the masks. Rounding leaves a few far off and most
            close; where boxes jitter or scores come in coarse steps, all are off.
    """

    iou: float
    mask_iou: float
    score: float
    share: float
    cut_margin: float
    order: float
    shift_px: float
    shift_share: float
    score_shift: float
    median_box: float
    median_score: float
    median_mask: float


# About twice what healthy engines were measured to need at bf16, on all seven test models and two
# trained detectors, and at int8, on those that are quantized in a minute: docs/performance.md,
# tools/measure_bounds.py. Single pairs may be worse, see `share`. fp32 is wider than what a CPU
# needs, 1e-5: on a GPU PyTorch's convolutions round to TF32, which has two bits more than bf16.
_SIXTEEN_BITS = Tolerance(
    iou=0.8,
    mask_iou=0.7,
    score=0.15,
    share=0.85,
    cut_margin=0.03,
    order=0.005,
    shift_px=0.25,
    shift_share=0.0035,
    score_shift=0.0125,
    median_box=0.026,
    median_score=0.042,
    median_mask=0.09,
)
TOLERANCES: Dict[str, Tolerance] = {
    "fp32": Tolerance(
        iou=0.97,
        mask_iou=0.95,
        score=0.01,
        share=0.99,
        cut_margin=1e-3,
        order=1e-3,
        shift_px=0.1,
        shift_share=0.001,
        score_shift=0.002,
        median_box=0.005,
        median_score=0.003,
        median_mask=0.005,
    ),
    "fp16": _SIXTEEN_BITS,
    "bf16": _SIXTEEN_BITS,
    "int8": Tolerance(
        iou=0.75,
        mask_iou=0.7,
        score=0.2,
        share=0.9,
        cut_margin=0.05,
        order=0.01,
        shift_px=1.6,
        shift_share=0.0115,
        score_shift=0.065,
        median_box=0.13,
        median_score=0.08,
        median_mask=0.08,
    ),
}


@dataclass(frozen=True)
class Detections:
    """What was found in one image, N objects.

    Attributes:
        boxes: N x 4, XYXY in pixels.
        scores: N.
        classes: N integers.
        image_size: height and width that the boxes refer to, in pixels.
        masks: N x 1 x S x S probabilities within the boxes, or N x H x W bool in the image, or
            None for a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    image_size: Tuple[int, int]
    masks: Optional[np.ndarray] = None


def split(outputs: Sequence[Any], fields: Sequence[str]) -> List[Detections]:
    """The detections of every image of a call, from its flat tuple.

    Args:
        outputs: arrays, `fields` of the first image, then those of the next.
        fields: Detectron2's names of an image's tensors: `pred_boxes`, `scores`, `pred_classes`
            and `image_size`, perhaps `pred_masks`; others are passed over.

    Raises:
        Malformed: the tuple does not hold detections.
    """
    if not isinstance(outputs, (tuple, list)):
        raise Malformed(f"a {type(outputs).__name__} instead of a tuple of tensors")
    if not outputs or len(outputs) % len(fields):
        raise Malformed(f"{len(outputs)} tensors, where an image has {len(fields)}")
    for value in outputs:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise Malformed(f"a {type(value).__name__} where a tensor should be")
    starts = range(0, len(outputs), len(fields))
    return [_detections(dict(zip(fields, outputs[at : at + len(fields)]))) for at in starts]


def _detections(arrays: Dict[str, np.ndarray]) -> Detections:
    boxes, scores, classes = arrays["pred_boxes"], arrays["scores"], arrays["pred_classes"]
    masks, image_size = arrays.get("pred_masks"), arrays["image_size"]
    count = len(scores) if scores.ndim == 1 else -1
    _require(count >= 0, "scores", scores, "one dimension")
    _require(boxes.shape == (count, 4), "pred_boxes", boxes, f"{count} x 4")
    _require(classes.shape == (count,), "pred_classes", classes, f"{count}")
    _require(image_size.shape == (2,), "image_size", image_size, "2")
    if masks is not None:
        right = masks.ndim in (3, 4) and len(masks) == count
        _require(right, "pred_masks", masks, f"{count} masks")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Malformed(f"{name} holds NaN or infinity")
    if (classes != np.floor(classes)).any():
        raise Malformed("pred_classes holds fractions")
    return Detections(
        boxes=boxes.astype(np.float64),
        scores=scores.astype(np.float64),
        classes=classes.astype(np.int64),
        image_size=(int(image_size[0]), int(image_size[1])),
        masks=masks,
    )


def _require(right: bool, name: str, array: np.ndarray, wanted: str) -> None:
    if not right:
        shape = _shape(array.shape) or "a single number"
        raise Malformed(f"{name} is {shape} where {wanted} was expected")


def _shape(lengths: Sequence[int]) -> str:
    return " x ".join(str(length) for length in lengths)


def verify(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    fields: Sequence[str],
    precision: str,
    score_threshold: Optional[float] = SCORE_THRESHOLD,
    limit: Optional[int] = LIMIT,
) -> Agreement:
    """Compares the flat tuples of two calls: see `split` and `compare`.

    Whatever the two hold, it returns a verdict; malformed outputs have the verdict `error`.
    """
    sides = []
    for name, outputs in (("reference", reference), ("output", candidate)):
        try:
            sides.append(split(outputs, fields))
        except Malformed as malformed:
            return Agreement("error", f"the {name} is malformed: {malformed}")
    return compare(sides[0], sides[1], precision, score_threshold, limit)


def compare(
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    precision: str,
    score_threshold: Optional[float] = SCORE_THRESHOLD,
    limit: Optional[int] = LIMIT,
) -> Agreement:
    """Whether the candidate finds what the reference found, image by image.

    Args:
        reference, candidate: the detections of every image of a call.
        precision: the candidate's, a key of `TOLERANCES`.
        score_threshold: the score below which the detector lists nothing; None: not known.
        limit: the most detections it lists for an image; None: not known.

    Returns:
        the totals over the images, with the verdict of the worst of them.
    """
    if len(reference) != len(candidate):
        return Agreement(
            "error", f"the detections of {len(candidate)} images instead of {len(reference)}"
        )
    tolerance = TOLERANCES[precision]
    images = []
    for expected, found in zip(reference, candidate):
        flaw = _list_flaw(found, tolerance, score_threshold, limit)
        if flaw is not None:
            images.append(Agreement("error", flaw, len(expected.scores)))
            continue
        cut = _cut(expected, score_threshold, limit)
        images.append(_compare_image(expected, found, tolerance, cut))
    total = images[0] if len(images) == 1 else _total(images)
    if total.verdict == "match" and total.expected < LEAST_TO_TELL:
        return replace(total, verdict="too few")
    return total


def _list_flaw(
    found: Detections, tolerance: Tolerance, score_threshold: Optional[float], limit: Optional[int]
) -> Optional[str]:
    """Why a list of detections is none that a detector gives, whatever it shows."""
    scores = found.scores
    if limit is not None and len(scores) > limit:
        return f"{len(scores)} detections where {limit} are the most"
    # An engine may compare before it rounds.
    least = score_threshold or 0.0
    outside = scores[(scores < least * (1 - BFLOAT16_STEP)) | (scores > 1)]
    if len(outside):
        return f"a score of {outside[0]:.3g}, where {least:g} to 1 are listed"
    lowest = np.minimum.accumulate(scores)
    rises = scores - lowest
    if (rises > tolerance.order).any():
        place = int(rises.argmax())
        return (
            f"the detections are not in the order of their scores: {lowest[place]:.3g} stands "
            f"before {scores[place]:.3g}"
        )
    return None


@dataclass(frozen=True)
class Found:
    """What was found in one image, and which of that agrees with the reference, by index.

    Attributes:
        detections: of the candidate.
        agrees: N, bool, whether the reference has a partner that agrees.
        lost: indices of the reference's detections that have none.
    """

    detections: Detections
    agrees: np.ndarray
    lost: np.ndarray


def find(
    reference: Sequence[Any], candidate: Sequence[Any], fields: Sequence[str], precision: str
) -> List[Found]:
    """What a candidate found in each image of a call, with what agrees: for drawing it.

    Raises:
        Malformed: a flat tuple does not hold detections, or those of other images.
    """
    expected, found = split(reference, fields), split(candidate, fields)
    if len(expected) != len(found):
        raise Malformed(f"the detections of {len(found)} images instead of {len(expected)}")
    images = []
    for one, other in zip(expected, found):
        pairs = _pair(one, other, TOLERANCES[precision])
        agrees = np.zeros(len(other.scores), dtype=bool)
        agrees[pairs.candidate[pairs.agree]] = True
        lost = np.setdiff1d(np.arange(len(one.scores)), pairs.reference[pairs.agree])
        images.append(Found(other, agrees, lost))
    return images


def _total(images: Sequence[Agreement]) -> Agreement:
    """The sum over images, with the verdict, reason and bias of the worst."""
    number, least = min(enumerate(images, start=1), key=lambda item: rank(item[1]))
    sums = {
        name: sum(getattr(image, name) for image in images)
        for name in ("expected", "matched", "lost", "spurious", "exempt")
    }
    drifts = {
        name: max(
            (getattr(image, name) for image in images if getattr(image, name) is not None),
            default=None,
        )
        for name in ("box_drift", "score_drift", "mask_drift")
    }
    reason = least.reason and f"image {number}: {least.reason}"
    return Agreement(least.verdict, reason, bias=least.bias, **sums, **drifts)


def _cut(reference: Detections, score_threshold: Optional[float], limit: Optional[int]) -> float:
    """The score below which the reference lists nothing.

    That is the score threshold or, where the limit was reached, the score of the last one. Where
    these are not known it is not above the lowest score that is listed, and taken for that. The
    candidate's own last score has no say: an engine that fills the list with duplicates has a
    high one, and would excuse itself for all that it pushed out.
    """
    least = score_threshold or 0.0
    is_full = score_threshold is None or limit is None or len(reference.scores) >= limit
    if not is_full or not len(reference.scores):
        return least
    return max(least, float(reference.scores.min()))


@dataclass(frozen=True)
class _Pairs:
    """M pairs of detections that show the same object: indices, differences, who agrees."""

    reference: np.ndarray
    candidate: np.ndarray
    boxes: np.ndarray  # M x 4, candidate - reference
    scores: np.ndarray  # M, candidate - reference
    box_iou: np.ndarray  # M
    mask_iou: Optional[np.ndarray]  # M
    agree: np.ndarray  # M, bool
    causes: Dict[str, int]  # in what the others differ, and how many of them


def _compare_image(
    reference: Detections, candidate: Detections, tolerance: Tolerance, cut: float
) -> Agreement:
    expected, found = len(reference.scores), len(candidate.scores)
    incomparable = _incomparable(reference, candidate)
    if incomparable is not None:
        return incomparable
    pairs = _pair(reference, candidate, tolerance)
    matched = int(pairs.agree.sum())
    margin = tolerance.cut_margin
    absent = _near_the_cut(reference, pairs.reference[pairs.agree], cut, margin, expected)
    extra = _near_the_cut(candidate, pairs.candidate[pairs.agree], cut, margin, expected)
    if matched == 0:
        absent = 0  # What a blind engine misses is never excused.
    lost, spurious = expected - matched - absent, found - matched - extra
    problems = []
    if matched < tolerance.share * max(matched + lost, matched + spurious):
        problems.append(_loss(expected, lost, spurious, pairs.causes))
    twice = int(_is_duplicate(candidate).sum()) - int(_is_duplicate(reference).sum())
    if twice > _allowed(expected):
        problems.append(f"{twice} detections are there twice")
    problems += _shifts(reference, pairs, tolerance)
    excused = f"left out of account, being so close to the score cut: {absent + extra}"
    return Agreement(
        verdict="mismatch" if problems else "match",
        reason="; ".join(problems) or (excused if absent + extra else ""),
        expected=expected,
        matched=matched,
        lost=lost,
        spurious=spurious,
        exempt=absent + extra,
        box_drift=_largest(pairs.boxes),
        score_drift=_largest(pairs.scores),
        mask_drift=None if pairs.mask_iou is None else _largest(1 - pairs.mask_iou),
        bias=tuple(np.median(pairs.boxes, axis=0).tolist()) if len(pairs.boxes) else None,
    )


def _loss(expected: int, lost: int, spurious: int, causes: Dict[str, int]) -> str:
    differing = ", ".join(f"{count} with another {name}" for name, count in causes.items())
    found = f" (found, but {differing})" if differing else ""
    return f"of {expected} detections {lost} are lost, and {spurious} are spurious{found}"


def _incomparable(reference: Detections, candidate: Detections) -> Optional[Agreement]:
    expected, found = len(reference.scores), len(candidate.scores)
    if candidate.image_size != reference.image_size:
        sizes = ["x".join(map(str, side.image_size)) for side in (candidate, reference)]
        reason = f"the detections are for an image of {sizes[0]} instead of {sizes[1]}"
        return Agreement("mismatch", reason, expected, lost=expected, spurious=found)
    shapes = [
        "absent" if side.masks is None else _shape(side.masks.shape[1:])
        for side in (candidate, reference)
    ]
    if shapes[0] != shapes[1]:
        return Agreement("error", f"masks are {shapes[0]} instead of {shapes[1]}", expected)
    return None


def _pair(reference: Detections, candidate: Detections, tolerance: Tolerance) -> _Pairs:
    """Pairs detections of the same class one to one, for the largest total overlap.

    Pairs that agree go first: between two boxes on one object it takes the one with the score.
    """
    same_class = reference.classes[:, None] == candidate.classes[None, :]
    overlap = _box_iou(reference.boxes, candidate.boxes) * same_class
    score_gap = np.abs(reference.scores[:, None] - candidate.scores[None, :])
    same_box, same_score = overlap >= tolerance.iou, score_gap <= tolerance.score
    rows, columns = linear_sum_assignment(overlap + (same_box & same_score), maximize=True)
    kept = overlap[rows, columns] >= SAME_OBJECT_IOU
    rows, columns = rows[kept], columns[kept]
    same = {"box": same_box[rows, columns], "score": same_score[rows, columns]}
    mask_iou = None
    if reference.masks is not None and candidate.masks is not None:
        mask_iou = _mask_iou(reference.masks, candidate.masks, rows, columns)
        same["mask"] = mask_iou >= tolerance.mask_iou
    return _Pairs(
        reference=rows,
        candidate=columns,
        boxes=candidate.boxes[columns] - reference.boxes[rows],
        scores=candidate.scores[columns] - reference.scores[rows],
        box_iou=overlap[rows, columns],
        mask_iou=mask_iou,
        agree=np.all(list(same.values()), axis=0),
        causes={name: int((~right).sum()) for name, right in same.items() if not right.all()},
    )


def _box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of N x 4 and M x 4 boxes, N x M.

    A pixel has an extent: boxes are widened by half of one to each side, lest a sliver at the
    border of the image, clipped to no width at all, overlaps with nothing, not even with itself.
    """
    widen = np.array([-0.5, -0.5, 0.5, 0.5])
    first, second = first + widen, second + widen
    corners = np.maximum(first[:, None, :2], second[:, :2])
    sides = np.minimum(first[:, None, 2:], second[:, 2:]) - corners
    overlap = sides.clip(min=0).prod(axis=2)
    union = _areas(first)[:, None] + _areas(second) - overlap
    # Of boxes that are turned inside out, the union may be nothing.
    return np.divide(overlap, union, out=np.zeros_like(union), where=union != 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _mask_iou(
    first: np.ndarray, second: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """IoU of each pair of masks, binarised at 0.5; two that are empty are equal."""
    overlaps = []
    for row, column in zip(rows, columns):
        one, other = first[row] > 0.5, second[column] > 0.5
        union = np.count_nonzero(one | other)
        overlaps.append(np.count_nonzero(one & other) / union if union else 1.0)
    return np.array(overlaps)


def _near_the_cut(
    side: Detections, agreeing: np.ndarray, cut: float, margin: float, expected: int
) -> int:
    """How many of a side's detections without a partner are excused."""
    is_near = np.abs(side.scores - cut) <= margin
    is_near[agreeing] = False
    return min(int((is_near & ~_is_duplicate(side)).sum()), _allowed(expected))


def _allowed(expected: int) -> int:
    """How many of so many detections may be odd without there being another reason."""
    return max(EXCUSED_LEAST, int(EXCUSED_SHARE * expected))


def _is_duplicate(side: Detections) -> np.ndarray:
    """N, bool: whether one of its class that is listed before it lies on the same place."""
    overlap = _box_iou(side.boxes, side.boxes)
    same_class = side.classes[:, None] == side.classes[None, :]
    # By score, and of equal ones by place: a list may have one and the same twice.
    order = np.lexsort((np.arange(len(side.scores)), -side.scores))
    rank_of = np.argsort(order)
    is_better = rank_of[None, :] < rank_of[:, None]
    return (same_class & is_better & (overlap >= DUPLICATE_IOU)).any(axis=1)


def _shifts(reference: Detections, pairs: _Pairs, tolerance: Tolerance) -> List[str]:
    """What is wrong with all boxes or scores together though each pair may pass.

    An IoU of 0.75 admits boxes of 100 pixels that are all 14 pixels too far right. Rounding has no
    preferred direction, so the differences of many pairs cancel; a defect of the engine (a wrong
    offset, a wrong scale of the image) does not. The median, because a few pairs may be far off.
    """
    if not len(pairs.boxes):
        return []
    boxes = reference.boxes[pairs.reference]
    sides = np.tile((boxes[:, 2:] - boxes[:, :2]).mean(axis=0), 2)
    bound_px = np.maximum(tolerance.shift_px, tolerance.shift_share * sides)
    problems = []
    if (np.abs(np.median(pairs.boxes, axis=0)) > _bound(pairs.boxes, bound_px)).any():
        shifts = ", ".join(f"{shift:+.1f}" for shift in np.median(pairs.boxes, axis=0))
        problems.append(f"boxes are off by ({shifts}) pixels in the median")
    shift = float(np.median(pairs.scores))
    if abs(shift) > _bound(pairs.scores, tolerance.score_shift):
        problems.append(f"scores are off by {shift:+.3f} in the median")
    return problems + _unrest(pairs, tolerance)


def _unrest(pairs: _Pairs, tolerance: Tolerance) -> List[str]:
    """What is wrong with most boxes, scores or masks, in whatever direction.

    The bounds were measured on 50 to 100 pairs; the median of fewer scatters more.
    """
    if not len(pairs.scores):
        return []
    scatter = max(1.0, (50 / len(pairs.scores)) ** 0.5)
    differences = [
        ("boxes", 1 - pairs.box_iou, tolerance.median_box, "{:.1%} of their area"),
        ("scores", np.abs(pairs.scores), tolerance.median_score, "{:.3f} one way or the other"),
    ]
    if pairs.mask_iou is not None:
        bound = tolerance.median_mask
        differences.append(("masks", 1 - pairs.mask_iou, bound, "{:.1%} of their area"))
    return [
        f"{name} are off by {text.format(np.median(values))} in the median"
        for name, values, bound, text in differences
        if np.median(values) > scatter * bound
    ]


def _bound(differences: np.ndarray, systematic: Union[float, np.ndarray]) -> np.ndarray:
    """The largest median difference that rounding explains: a bound and three standard errors.

    Args:
        differences: M x anything.
        systematic: how far off the median of ever so many may be. It is also the least standard
            deviation that is assumed: that of a handful of pairs may be small by chance.

    The standard error of a normal sample's median is 1.2533 sigma / sqrt(M), and sigma is 1.4826
    times its median absolute deviation.
    """
    deviation = np.median(np.abs(differences - np.median(differences, axis=0)), axis=0)
    spread = np.maximum(1.4826 * deviation, systematic)
    return systematic + 3 * 1.2533 * spread / np.sqrt(len(differences))


def _largest(differences: np.ndarray) -> Optional[float]:
    return float(np.abs(differences).max()) if differences.size else None
