"""Do two sets of detections agree: is the fast engine still right?

It knows nothing of models, backends or PyTorch: it compares flat tuples of NumPy arrays, what was
found in one image after another, with those of a reference. Objects are paired by their boxes, and
what else there is of them is compared pair by pair; maps of labels are compared pixel by pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from scipy.optimize import linear_sum_assignment

from measure import geometry
from measure.detections import Detections, Malformed, by, split
from measure.tolerances import TOLERANCES, Tolerance
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
# Proposals are suppressed at 0.7, and those of one feature map do not suppress those of another.
DUPLICATE_PROPOSAL_IOU = 0.95
# Share of a number by which bfloat16 rounds it at most.
BFLOAT16_STEP = 2**-8
# With fewer detections, that they all agree says next to nothing.
LEAST_TO_TELL = 5
# Pixels so close to another label tell of a map that is shifted, however large its regions are.
BORDER_PX = 8
# A box that is clipped to less, at the border of the image, has no pose that could be told.
SLIVER_PX = 2


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
        score_threshold: the score below which the detector lists nothing; None: there is none.
        limit: the most detections it lists for an image; None: there is none.

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
        expected, found = _in_units(expected, found)
        flaw = _list_flaw(expected, found, tolerance, score_threshold, limit)
        if flaw is not None:
            images.append(Agreement("error", flaw, len(expected.scores)))
            continue
        cut = _cut(expected, score_threshold, limit)
        images.append(_compare_image(expected, found, tolerance, cut))
    total = images[0] if len(images) == 1 else _total(images)
    if total.verdict == "match" and total.has_objects and total.expected < LEAST_TO_TELL:
        return replace(total, verdict="too few")
    return total


def not_compared(outputs: Sequence[Any], fields: Sequence[str]) -> Tuple[str, ...]:
    """Names of the fields of a reference of which nobody knows how to compare them."""
    try:
        images = split(outputs, fields)
    except Malformed:  # That is told elsewhere.
        return ()
    return tuple(dict.fromkeys(name for image in images for name in image.not_compared))


def _in_units(reference: Detections, candidate: Detections) -> Tuple[Detections, Detections]:
    """The same with logits divided by their range, so that they are held to what scores are.

    Theirs is taken for that of a uniform distribution which varies as much.
    """
    if not reference.are_proposals or len(reference.scores) < 2:
        return reference, candidate
    unit = float(reference.scores.std() * 12**0.5) or 1.0
    one, other = (
        replace(x, scores=x.scores / unit, score_unit=unit) for x in (reference, candidate)
    )
    return one, other


def _list_flaw(
    reference: Detections,
    found: Detections,
    tolerance: Tolerance,
    score_threshold: Optional[float],
    limit: Optional[int],
) -> Optional[str]:
    """Why a list of detections is none that a detector gives, whatever it shows."""
    scores = found.scores
    if limit is not None and len(scores) > limit:
        return f"{len(scores)} detections where {limit} are the most"
    if score_threshold is not None:
        # An engine may compare before it rounds.
        outside = scores[(scores < score_threshold * (1 - BFLOAT16_STEP)) | (scores > 1)]
        if len(outside):
            return f"a score of {outside[0]:.3g}, where {score_threshold:g} to 1 are listed"
    rises = _rises(scores)
    # Where the reference is in no order, there is none to keep.
    if (rises > tolerance.order).any() and (_rises(reference.scores) <= tolerance.order).all():
        scores, rises = scores * found.score_unit, rises * found.score_unit
        place = int(rises.argmax())
        lowest = np.minimum.accumulate(scores)
        return (
            f"the detections are not in the order of their scores: {lowest[place]:.3g} stands "
            f"before {scores[place]:.3g}"
        )
    return None


def _rises(scores: np.ndarray) -> np.ndarray:
    """By how much each score exceeds one before it."""
    return scores - np.minimum.accumulate(scores)


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
        pairs = _pair(*_in_units(one, other), TOLERANCES[precision])
        agrees = np.zeros(len(other.scores), dtype=bool)
        agrees[pairs.candidate[pairs.agree]] = True
        lost = np.setdiff1d(np.arange(len(one.scores)), pairs.reference[pairs.agree])
        images.append(Found(other, agrees, lost))
    return images


# What an `Agreement` has of the worst of several images, and which that is.
DRIFTS: Dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("box_drift", "score_drift", "mask_drift", "keypoint_drift"), max),
    "labels": min,
}


def _total(images: Sequence[Agreement]) -> Agreement:
    """The sum over images, with the verdict, reason and bias of the worst."""
    number, least = min(enumerate(images, start=1), key=lambda item: rank(item[1]))
    sums = {
        name: sum(getattr(image, name) for image in images)
        for name in ("expected", "matched", "lost", "spurious", "exempt")
    }
    drifts = {
        name: worse(
            (getattr(image, name) for image in images if getattr(image, name) is not None),
            default=None,
        )
        for name, worse in DRIFTS.items()
    }
    reason = least.reason and f"image {number}: {least.reason}"
    return Agreement(
        least.verdict,
        reason,
        bias=least.bias,
        has_objects=any(image.has_objects for image in images),
        **sums,
        **drifts,
    )


def _cut(reference: Detections, score_threshold: Optional[float], limit: Optional[int]) -> float:
    """The score below which the reference lists nothing.

    That is the score threshold or, where the limit was reached, the score of the last one. Where
    the limit is not known, it may have been. The candidate's own last score has no say: an engine
    that fills the list with duplicates has a high one, and would excuse itself for all that it
    pushed out.
    """
    lowest = -math.inf if score_threshold is None else score_threshold
    if not len(reference.scores) or (limit is not None and len(reference.scores) < limit):
        return lowest
    return max(lowest, float(reference.scores.min()))


@dataclass(frozen=True)
class _Pairs:
    """M pairs of detections that show the same object: indices, differences, who agrees."""

    reference: np.ndarray
    candidate: np.ndarray
    boxes: np.ndarray  # M x 4 or M x 5, candidate - reference
    scores: np.ndarray  # M, candidate - reference
    box_iou: np.ndarray  # M
    mask_iou: Optional[np.ndarray]  # M
    keypoints: Optional[np.ndarray]  # M x K x 2, candidate - reference, in pixels
    oks: Optional[np.ndarray]  # M
    others: Dict[str, np.ndarray]  # name -> M, medians of the differences over the spread
    agree: np.ndarray  # M, bool
    causes: Dict[str, int]  # in what the others differ, and how many of them


def _compare_image(
    reference: Detections, candidate: Detections, tolerance: Tolerance, cut: float
) -> Agreement:
    incomparable = _incomparable(reference, candidate)
    if incomparable is not None:
        return incomparable
    found = Agreement("match", has_objects=reference.has_objects)
    if reference.has_objects:
        found = _compare_objects(reference, candidate, tolerance, cut)
    if reference.sem_seg is None or candidate.sem_seg is None:
        return found
    share, problem, tells = _compare_maps(reference.sem_seg, candidate.sem_seg, tolerance)
    found = replace(found, labels=share)
    if problem is not None:
        reasons = [found.reason] * found.is_wrong + [problem]
        return replace(found, verdict="mismatch", reason="; ".join(reasons))
    return found if tells or found.has_objects else replace(found, verdict="too few")


def _compare_objects(
    reference: Detections, candidate: Detections, tolerance: Tolerance, cut: float
) -> Agreement:
    expected, found = len(reference.scores), len(candidate.scores)
    pairs = _pair(reference, candidate, tolerance)
    matched = int(pairs.agree.sum())
    margin = tolerance.cut_margin
    absent = _near_the_cut(reference, pairs.reference[pairs.agree], cut, margin, expected)
    extra = _near_the_cut(candidate, pairs.candidate[pairs.agree], cut, margin, expected)
    if matched == 0:
        absent = 0  # What a blind engine misses is never excused.
    lost, spurious = expected - matched - absent, found - matched - extra
    problems = []
    share = tolerance.proposal_share if reference.are_proposals else tolerance.share
    if matched < share * max(matched + lost, matched + spurious):
        problems.append(_loss(expected, lost, spurious, pairs.causes))
    twice = int(_is_duplicate(candidate).sum()) - int(_is_duplicate(reference).sum())
    if twice > _allowed(expected):
        problems.append(f"{twice} detections are there twice")
    problems += _shifts(reference, pairs, tolerance)
    excused = f"left out of account, being so close to the score cut: {absent + extra}"
    score_drift = _largest(pairs.scores)
    return Agreement(
        verdict="mismatch" if problems else "match",
        reason="; ".join(problems) or (excused if absent + extra else ""),
        expected=expected,
        matched=matched,
        lost=lost,
        spurious=spurious,
        exempt=absent + extra,
        box_drift=_largest(pairs.boxes[:, :4]),
        score_drift=None if score_drift is None else score_drift * reference.score_unit,
        mask_drift=None if pairs.mask_iou is None else _largest(1 - pairs.mask_iou),
        keypoint_drift=None if pairs.oks is None else _largest(1 - pairs.oks),
        bias=tuple(np.median(pairs.boxes, axis=0).tolist()) if len(pairs.boxes) else None,
    )


def _compare_maps(
    reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance
) -> Tuple[float, Optional[str], bool]:
    """How well two maps of logits, K x H x W, agree.

    Returns:
        the share of the pixels with the same label, what is wrong, and whether there is more than
        one label to tell it by.
    """
    labels = reference.argmax(axis=0)
    same = labels == candidate.argmax(axis=0)
    borders = geometry.near_borders(labels, BORDER_PX)
    share, least = float(same.mean()), tolerance.labels
    if share < least:
        return share, f"{share:.2%} of the labels agree, where {least:.0%} have to", True
    near = float(same[borders].mean()) if borders.any() else 1.0
    if near < tolerance.border_labels:
        return (
            share,
            f"within {BORDER_PX} pixels of the borders {near:.2%} of the labels agree, where "
            f"{tolerance.border_labels:.0%} have to",
            True,
        )
    return share, None, bool(borders.any())


def _loss(expected: int, lost: int, spurious: int, causes: Dict[str, int]) -> str:
    differing = ", ".join(f"{count} with another {name}" for name, count in causes.items())
    found = f" (found, but {differing})" if differing else ""
    return f"of {expected} detections {lost} are lost, and {spurious} are spurious{found}"


def _incomparable(reference: Detections, candidate: Detections) -> Optional[Agreement]:
    expected, found = len(reference.scores), len(candidate.scores)
    maps = [side.sem_seg for side in (candidate, reference) if side.sem_seg is not None]
    if len(maps) == 2 and maps[0].shape != maps[1].shape:
        reason = f"the map is {by(maps[0].shape)} instead of {by(maps[1].shape)}"
    elif candidate.image_size != reference.image_size:
        sizes = ["x".join(map(str, side.image_size)) for side in (candidate, reference)]
        reason = f"the detections are for an image of {sizes[0]} instead of {sizes[1]}"
    else:
        return _other_shapes(reference, candidate)
    wrong = {"lost": expected, "spurious": found, "has_objects": reference.has_objects}
    return Agreement("mismatch", reason, expected, labels=0.0 if maps else None, **wrong)


def _other_shapes(reference: Detections, candidate: Detections) -> Optional[Agreement]:
    """What is of one object must have the same shape on both sides."""
    shapes = [
        {
            "numbers of a box": side.boxes,
            "masks": side.masks,
            "keypoints": side.keypoints,
            **side.others,
        }
        for side in (candidate, reference)
    ]
    for name in {**shapes[1], **shapes[0]}:
        arrays = [shape.get(name) for shape in shapes]
        found, wanted = ("absent" if x is None else by(x.shape[1:]) for x in arrays)
        if found != wanted:
            reason = f"{name} are {found} instead of {wanted}"
            return Agreement("error", reason, len(reference.scores))
    return None


def pair(overlap: np.ndarray, comes_first: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Pairs what shows the same object one to one, for the largest total overlap.

    Args:
        overlap: N x M, IoU; 0 where two cannot be a pair.
        comes_first: N x M, bool: pairs that go before all others.

    Returns:
        indices of the N and of the M, of pairs that overlap by `SAME_OBJECT_IOU` at least.
    """
    rows, columns = linear_sum_assignment(overlap + comes_first, maximize=True)
    kept = overlap[rows, columns] >= SAME_OBJECT_IOU
    return rows[kept], columns[kept]


def pose_likeness(
    reference: np.ndarray,
    candidate: np.ndarray,
    boxes: np.ndarray,
    sigmas: Optional[Sequence[float]] = None,
) -> np.ndarray:
    """OKS of M pairs of poses, M; 1 where the reference's box is a sliver.

    Args:
        reference, candidate: M x K x 2, in pixels.
        boxes: M x 4 or M x 5, of the reference.
        sigmas: see `geometry.oks`.
    """
    oks = geometry.oks(reference, candidate, geometry.areas(boxes), sigmas)
    oks[geometry.sides(boxes).min(axis=1) < SLIVER_PX] = 1
    return oks


def _pair(reference: Detections, candidate: Detections, tolerance: Tolerance) -> _Pairs:
    """Pairs detections of the same class one to one, for the largest total overlap.

    Pairs that agree go first: between two boxes on one object it takes the one with the score.
    """
    same_class = reference.classes[:, None] == candidate.classes[None, :]
    overlap = geometry.overlaps(reference.boxes, candidate.boxes) * same_class
    score_gap = np.abs(reference.scores[:, None] - candidate.scores[None, :])
    same_box, same_score = overlap >= tolerance.iou, score_gap <= tolerance.score
    rows, columns = pair(overlap, same_box & same_score)
    same = {"box": same_box[rows, columns], "score": same_score[rows, columns]}
    mask_iou = keypoints = oks = None
    if reference.masks is not None and candidate.masks is not None:
        mask_iou = geometry.mask_iou(reference.masks, candidate.masks, rows, columns)
        same["mask"] = mask_iou >= tolerance.mask_iou
    if reference.keypoints is not None and candidate.keypoints is not None:
        poses = reference.keypoints[rows, :, :2], candidate.keypoints[columns, :, :2]
        keypoints = poses[1] - poses[0]
        oks = pose_likeness(*poses, reference.boxes[rows])
        same["pose"] = oks >= tolerance.oks
    boxes = candidate.boxes[columns] - reference.boxes[rows]
    if boxes.shape[1] == 5:  # Angles: half a turn more is 180 degrees, and a whole one nothing.
        boxes[:, 4] = (boxes[:, 4] + 180) % 360 - 180
    return _Pairs(
        reference=rows,
        candidate=columns,
        boxes=boxes,
        scores=candidate.scores[columns] - reference.scores[rows],
        box_iou=overlap[rows, columns],
        mask_iou=mask_iou,
        keypoints=keypoints,
        oks=oks,
        others=_others(reference, candidate, rows, columns),
        agree=np.all(list(same.values()), axis=0),
        causes={name: int((~right).sum()) for name, right in same.items() if not right.all()},
    )


def _others(
    reference: Detections, candidate: Detections, rows: np.ndarray, columns: np.ndarray
) -> Dict[str, np.ndarray]:
    """What differs in the scores of keypoints, and in fields of which nothing is known.

    Returns:
        name -> M differences, see `_relative`.
    """
    both = [dict(side.others) for side in (reference, candidate)]
    for side, values in zip((reference, candidate), both):
        if side.keypoints is not None:
            values["scores of keypoints"] = side.keypoints[:, :, 2]
    return {
        name: _relative(values, values[rows], both[1][name][columns])
        for name, values in both[0].items()
        if name in both[1]
    }


def _relative(values: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """M medians of how far the values of pairs differ, as a share of how far all of them vary.

    Args:
        values: N x anything, of the reference.
        one, other: M x anything.
    """
    if not one.size:
        return np.zeros(0)
    one, other = (x.astype(np.float64).reshape(len(x), -1) for x in (one, other))
    spread = float(values.astype(np.float64).std()) or float(np.abs(one).max()) or 1.0
    return np.median(np.abs(one - other), axis=1) / spread


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
    overlap = geometry.overlaps(side.boxes, side.boxes)
    least = DUPLICATE_PROPOSAL_IOU if side.are_proposals else DUPLICATE_IOU
    same_class = side.classes[:, None] == side.classes[None, :]
    # By score, and of equal ones by place: a list may have one and the same twice.
    order = np.lexsort((np.arange(len(side.scores)), -side.scores))
    rank_of = np.argsort(order)
    is_better = rank_of[None, :] < rank_of[:, None]
    return (same_class & is_better & (overlap >= least)).any(axis=1)


def _shifts(reference: Detections, pairs: _Pairs, tolerance: Tolerance) -> List[str]:
    """What is wrong with all boxes or scores together though each pair may pass.

    An IoU of 0.75 admits boxes of 100 pixels that are all 14 pixels too far right. Rounding has no
    preferred direction, so the differences of many pairs cancel; a defect of the engine (a wrong
    offset, a wrong scale of the image) does not. The median, because a few pairs may be far off.
    """
    if not len(pairs.boxes):
        return []
    sides = geometry.sides(reference.boxes[pairs.reference]).mean(axis=0)
    bounds = np.maximum(tolerance.shift_px, tolerance.shift_share * np.tile(sides, 2))
    if pairs.boxes.shape[1] == 5:  # A degree moves the corners of a box by a hundredth of it.
        bounds = np.append(bounds, tolerance.shift_px)
    problems = []
    if (np.abs(np.median(pairs.boxes, axis=0)) > _bound(pairs.boxes, bounds)).any():
        shifts = ", ".join(f"{shift:+.1f}" for shift in np.median(pairs.boxes, axis=0))
        problems.append(f"boxes are off by ({shifts}) {_units(pairs.boxes)} in the median")
    if pairs.keypoints is not None and pairs.keypoints.size:
        moved = pairs.keypoints.reshape(-1, 2)
        if (np.abs(np.median(moved, axis=0)) > _bound(moved, bounds[:2])).any():
            shifts = ", ".join(f"{shift:+.1f}" for shift in np.median(moved, axis=0))
            problems.append(f"keypoints are off by ({shifts}) pixels in the median")
    shift = float(np.median(pairs.scores))
    if abs(shift) > _bound(pairs.scores, tolerance.score_shift):
        problems.append(f"scores are off by {shift * reference.score_unit:+.3f} in the median")
    return problems + _unrest(reference, pairs, tolerance)


def _units(boxes: np.ndarray) -> str:
    return "pixels and degrees" if boxes.shape[1] == 5 else "pixels"


def _unrest(reference: Detections, pairs: _Pairs, tolerance: Tolerance) -> List[str]:
    """What is wrong with most of the pairs, in whatever direction.

    The bounds were measured on 50 to 100 pairs; the median of fewer scatters more.
    """
    if not len(pairs.scores):
        return []
    scatter = max(1.0, (50 / len(pairs.scores)) ** 0.5)
    unit = reference.score_unit
    scores = np.abs(pairs.scores)
    differences = [
        ("boxes", 1 - pairs.box_iou, tolerance.median_box, "{:.1%} of their area", 1.0),
        ("scores", scores, tolerance.median_score, "{:.3f} one way or the other", unit),
    ]
    if pairs.mask_iou is not None:
        bound = tolerance.median_mask
        differences.append(("masks", 1 - pairs.mask_iou, bound, "{:.1%} of their area", 1.0))
    if pairs.oks is not None:
        bound = tolerance.median_oks
        differences.append(("keypoints", 1 - pairs.oks, bound, "{:.3f} of their OKS", 1.0))
    for name, values in pairs.others.items():
        differences.append((name, values, tolerance.median_other, "{:.1%} of their spread", 1.0))
    return [
        f"{name} are off by {text.format(np.median(values) * scale)} in the median"
        for name, values, bound, text, scale in differences
        if len(values) and np.median(values) > scatter * bound
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
