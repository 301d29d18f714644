"""Average precision on a data set, and what it differs by, with an interval.

COCO's evaluator, pycocotools, decides which detection finds which object. That does not depend on
which images are drawn, so it is done once. A resample of the images then is a weight for each of
them: how often it was drawn. The accumulation under such weights is our own, as the evaluator has
none; where all weights are 1, it gives what the evaluator gives.

T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014; the measure is described at
https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from results.record import APVerdict, AveragePrecision, Difference

# Of the interval: resamples, how many are made at once, and the share that it covers.
RESAMPLES = 1000
BATCH = 50
CONFIDENCE = 0.95
# Where precision is read off: every hundredth of recall.
RECALLS = np.linspace(0.0, 1.0, 101)
# Intersection over union from which a detection finds an object.
IOUS = np.linspace(0.5, 0.95, 10)
# Fewer images tell nothing, however little they differ.
LEAST_IMAGES = 10
# Above this many times the images that there are, their number is no answer.
MOST_TIMES = 1000


@dataclass(frozen=True)
class Matches:
    """Which detections of one class find an object, in one range of areas.

    Detections are in the order of their scores. Those that are ignored count neither way: they
    found an object that is not in question, such as a crowd, or are of another size themselves.

    Attributes:
        images: N, index of the image of each detection.
        found: T x N bool, at each IoU.
        ignored: T x N bool, at each IoU.
        objects: index of the image of each object that is to be found.
    """

    images: np.ndarray
    found: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What was found in a data set by one run, of one task, matched with what there is.

    Attributes:
        images: how many there are.
        areas: names of the ranges of areas, `all` the first.
        classes: for each class, the matches in each of these.
        detections: how many there were.
    """

    images: int
    areas: tuple[str, ...]
    classes: tuple[tuple[Matches, ...], ...]
    detections: int


def evaluate(
    truth: Path,
    found: Sequence[dict[str, Any]],
    task: str,
    oks_sigmas: Sequence[float] | None = None,
) -> Evaluation:
    """Matches detections with objects, as COCO does.

    Args:
        truth: annotations in COCO's format; ids of annotations are not 0, which pycocotools takes
            for none.
        found: detections in COCO's format of results.
        task: `bbox`, `segm` or `keypoints`.
        oks_sigmas: of each keypoint, how far annotators differ as a share of the object's size;
            None: COCO's, of its 17.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # It prints what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(truth))
        if task == "segm":
            # Else the area of a detection would be that of its box.
            found = [{name: x for name, x in each.items() if name != "bbox"} for each in found]
        if found:
            results = objects.loadRes(list(found))
        else:  # It wants one at least.
            results = COCO()
            results.dataset = {**objects.dataset, "annotations": []}
            results.createIndex()
        judge = COCOeval(objects, results, task)
        if task == "keypoints" and oks_sigmas is not None:
            judge.params.kpt_oks_sigmas = np.asarray(oks_sigmas)
        judge.params.maxDets = judge.params.maxDets[-1:]
        judge.evaluate()
    params = judge.params
    known, areas = len(params.imgIds), len(params.areaRng)
    place = {image: index for index, image in enumerate(params.imgIds)}
    parts = [
        _matches(judge.evalImgs[at * known : (at + 1) * known], place)
        for at in range(len(params.catIds) * areas)
    ]
    return Evaluation(
        images=known,
        areas=tuple(params.areaRngLbl),
        classes=tuple(tuple(parts[at : at + areas]) for at in range(0, len(parts), areas)),
        detections=len(found),
    )


def _matches(by_image: Sequence[dict[str, Any] | None], place: dict[int, int]) -> Matches:
    """The matches of a class in a range of areas, of the evaluator's records of its images."""
    records = [record for record in by_image if record is not None]
    if not records:
        nothing = np.zeros((len(IOUS), 0), dtype=bool)
        return Matches(np.zeros(0, int), nothing, nothing, np.zeros(0, int))
    scores = np.concatenate([record["dtScores"] for record in records])
    order = np.argsort(-scores, kind="mergesort")  # As it sorts, which decides among equals.
    images = np.repeat(
        [place[record["image_id"]] for record in records],
        [len(record["dtScores"]) for record in records],
    )
    ignored = np.concatenate([record["dtIgnore"] for record in records], axis=1) > 0
    found = np.concatenate([record["dtMatches"] for record in records], axis=1) > 0
    objects = np.repeat(
        [place[record["image_id"]] for record in records],
        [int((record["gtIgnore"] == 0).sum()) for record in records],
    )
    ignored = ignored[:, order]
    return Matches(images[order], found[:, order] & ~ignored, ignored, objects)


def precisions(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Average precision of one class at each IoU, under weights of the images.

    Args:
        weights: B x images, how often each of them counts.

    Returns:
        B x T, 0 to 1; NaN where no object is to be found.
    """
    wanted = weights[:, matches.objects].sum(axis=1)
    out = np.zeros((len(weights), len(IOUS)))
    each = weights[:, matches.images]
    counted = {}
    for at in range(len(IOUS)):
        ignored = matches.ignored[at]
        key = ignored.tobytes()
        if key not in counted:
            counted[key] = np.cumsum(np.where(ignored, 0.0, each), axis=1)
        hits = np.flatnonzero(matches.found[at])
        if not len(hits):
            continue
        right = np.cumsum(each[:, hits], axis=1)
        # As the evaluator does it: what was not drawn yet has a precision of 0.
        precision = right / (counted[key][:, hits] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = right / wanted[:, None]
        # How many of the recalls are reached with each of the hits.
        reached = np.searchsorted(RECALLS, recall, side="right")
        out[:, at] = (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    out[wanted == 0] = np.nan
    return out


def _mean(values: np.ndarray, axis: Any = None) -> Any:
    """The mean of what is no NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis=axis), known.sum(axis=axis)
    with np.errstate(invalid="ignore"):
        return total / np.where(count, count, np.nan)


def average_precision(evaluation: Evaluation, names: Sequence[str]) -> AveragePrecision:
    """The figures that COCO reports, in percent.

    Args:
        names: of the classes, in the order of the ids of their categories.
    """
    once = np.ones((1, evaluation.images))
    # Classes x ranges of areas x IoUs.
    table = np.array([[precisions(x, once)[0] for x in areas] for areas in evaluation.classes])

    def percent(values: np.ndarray) -> float | None:
        mean = float(_mean(values))
        return None if np.isnan(mean) else 100 * mean

    by_area = {
        name: percent(table[:, place]) for place, name in enumerate(evaluation.areas) if place
    }
    return AveragePrecision(
        ap=percent(table[:, 0]),
        ap50=percent(table[:, 0, 0]),
        ap75=percent(table[:, 0, 5]),
        small=by_area.get("small"),
        medium=by_area.get("medium"),
        large=by_area.get("large"),
        classes={name: percent(row[0]) for name, row in zip(names, table, strict=True)},
    )


def resampled(evaluation: Evaluation, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """AP in percent of resamples of the images, drawn with replacement.

    The same seed draws the same images, of any run.

    Returns:
        one value for each; NaN where no object is in the images that were drawn.
    """
    generator = np.random.default_rng(seed)
    images = evaluation.images
    values = []
    for start in range(0, resamples, BATCH):
        count = min(BATCH, resamples - start)
        weights = generator.multinomial(images, np.full(images, 1 / images), size=count)
        values.append(weighted(evaluation, weights.astype(float)))
    return np.concatenate(values)


def weighted(evaluation: Evaluation, weights: np.ndarray) -> np.ndarray:
    """AP in percent under weights of the images.

    Args:
        weights: B x images, how often each of them counts.

    Returns:
        B; NaN where no object is in the images that count.
    """
    parts = np.stack([precisions(x[0], weights).mean(axis=1) for x in evaluation.classes])
    values: np.ndarray = 100 * _mean(parts, axis=0)
    return values


def with_difference(
    own: AveragePrecision,
    reference: AveragePrecision,
    resamples: tuple[np.ndarray, np.ndarray],
    images: int,
    least_ratio: float,
) -> AveragePrecision:
    """The same with what its AP differs by from a reference's, and whether it is kept.

    Args:
        reference: where its AP is 0 or None, there is nothing to keep.
        resamples: of both on the same images, as `resampled` gives them.
        images: in the data set.
        least_ratio: the share of the reference's AP that is to be kept.
    """
    mine, theirs = resamples
    usable = theirs > 0
    if own.ap is None or not reference.ap or not usable.any():
        return own
    mine, theirs = mine[usable], theirs[usable]
    tails = _tails(images)
    low, high = np.percentile(mine - theirs, tails).tolist()
    ratio = own.ap / reference.ap
    ratio_low, ratio_high = np.percentile(mine / theirs, tails).tolist()
    needed = None
    verdict: APVerdict = "too few"
    if images < LEAST_IMAGES:  # Resamples of a few images are much the same.
        needed = LEAST_IMAGES
    elif ratio_low >= least_ratio:
        verdict = "keeps"
    elif ratio_high < least_ratio:
        verdict = "loses"
    else:
        needed = _images_needed(ratio, (ratio_low, ratio_high), images, least_ratio)
    value = own.ap - reference.ap
    known = Difference(value, low, high, ratio, ratio_low, ratio_high, verdict, needed)
    return replace(own, difference=replace(known, classes=_by_class(own, reference)))


def _by_class(own: AveragePrecision, reference: AveragePrecision) -> dict[str, float | None]:
    """Class -> what its AP differs by; None where there is no object of it to be found."""
    both = ((name, ap, reference.classes.get(name)) for name, ap in own.classes.items())
    return {name: None if None in (one, other) else one - other for name, one, other in both}


def _tails(images: int) -> list[float]:
    """The percentiles of resamples between which an interval lies.

    A bootstrap of a few images is too narrow, so they are spread as Student's t is. T. Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015, section 5.3 (expanded percentiles).
    Simulated for dAP, what is 95% covers 92% with 20 images, 93% with 30, and 95% with 60.
    """
    if images < 2:
        return [0.0, 100.0]
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, images - 1) * (images / (images - 1)) ** 0.5
    share = float(100 * stats.norm.cdf(-bound))
    return [share, 100 - share]


def _images_needed(
    ratio: float, interval: tuple[float, float], images: int, least_ratio: float
) -> int | None:
    """How many images would tell, if their AP is what it is here; None: far too many.

    The width of an interval goes with one over the square root of their number.
    """
    distance = abs(ratio - least_ratio)
    width = ratio - interval[0] if ratio > least_ratio else interval[1] - ratio
    if distance == 0 or (width / distance) ** 2 > MOST_TIMES:
        return None
    return int(np.ceil(images * max(1.0, width / distance) ** 2))
