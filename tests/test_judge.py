"""What all test models find, and what engines that are broken by a stated amount would find.

Each fault is as small as its name says, measured in the bounds of the precision that it is judged
at; healthy engines are judged with the same bounds.
"""

from __future__ import annotations

import functools
import gc
import math
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import pytest
import torch
from conftest import apart, arrays, small_export
from test_verify import in_order, take

from backends import base
from detectors.build import fields_of
from detectors.export import Export
from errors import Unsupported
from measure import geometry, verify
from measure.verify import TOLERANCES, Detections, Tolerance
from models import MODELS
from results import facts
from results.environment import cpu_flags, has_native_bf16
from results.record import Agreement

PRECISIONS = tuple(TOLERANCES)
# C4 runs its last stage on each of 1000 regions, however small the image.
SLOW = ("testMaskRCNNC4", "testMaskRCNNFPN_b2")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
WITH_MASKS = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in MODELS
    if "pred_masks" in fields_of(MODELS[name])
]
Images = List[Detections]
Fault = Callable[[Images, Tolerance], Images]


@functools.lru_cache(maxsize=None)
def reference(name: str) -> Dict[str, Images]:
    """What eager fp32 finds in the images of a call, by size."""
    export = small_export(name)
    with torch.no_grad():
        return {
            size: verify.split(arrays(export.eager(*images)), export.fields)
            for size, images in export.tuning_inputs.items()
        }


@pytest.fixture(scope="module", autouse=True)
def freed() -> Iterator[None]:
    yield
    reference.cache_clear()
    gc.collect()


# Faults ----------------------------------------------------------------------------------------


def joined(image: Detections, more: Detections) -> Detections:
    """Both, as a detector lists them: the best first, at most 100."""
    names = ("boxes", "scores", "classes", *(() if image.masks is None else ("masks",)))
    both = {name: np.concatenate([getattr(x, name) for x in (image, more)]) for name in names}
    return take(in_order(replace(image, **both)), slice(0, verify.LIMIT))


def each(change: Callable[[Detections, Tolerance], Detections]) -> Fault:
    """A fault that strikes every image of a call alike."""

    @functools.wraps(change)
    def fault(images: Images, tolerance: Tolerance) -> Images:
        return [change(image, tolerance) for image in images]

    return fault


@each
def blind(image: Detections, tolerance: Tolerance) -> Detections:
    """A tenth is left."""
    return take(image, slice(0, len(image.scores) // 10))


@each
def shifted_by_twice_the_bound(image: Detections, tolerance: Tolerance) -> Detections:
    sides = np.tile((image.boxes[:, 2:] - image.boxes[:, :2]).mean(axis=0), 2)
    bound = np.maximum(tolerance.shift_px, tolerance.shift_share * sides)
    return replace(image, boxes=image.boxes + 2 * bound)


@each
def a_fifth_one_class_off(image: Detections, tolerance: Tolerance) -> Detections:
    is_wrong = np.arange(len(image.classes)) % 5 == 0
    return replace(image, classes=np.where(is_wrong, (image.classes + 1) % 80, image.classes))


@each
def without_suppression(image: Detections, tolerance: Tolerance) -> Detections:
    """Every second detection comes twice, a pixel aside, with nine tenths of its score."""
    twice = take(image, slice(0, None, 2))
    return joined(image, replace(twice, boxes=twice.boxes + 1, scores=0.9 * twice.scores))


@each
def duplicates_at_the_end(image: Detections, tolerance: Tolerance) -> Detections:
    """Of the best, in place of the last, with its score: twice as many as may be lost."""
    count = math.ceil(2 * (1 - tolerance.share) * len(image.scores))
    best, kept = take(image, slice(0, count)), take(image, slice(0, len(image.scores) - count))
    return joined(kept, replace(best, scores=np.full(count, image.scores[-1])))


def invented(score: float) -> Fault:
    """Fifteen boxes, or twice as many as may be spurious, that nothing corresponds to.

    They take the places of the last where the list is full.
    """

    def change(image: Detections, tolerance: Tolerance) -> Detections:
        count = max(15, math.ceil(2 * (1 - tolerance.share) * len(image.scores)))
        generator = np.random.default_rng(0)
        height, width = image.image_size
        some = take(image, generator.integers(len(image.scores), size=count))
        corners = generator.uniform(0, 0.5, size=(count, 2)) * (width, height)
        boxes = np.concatenate([corners, corners + (0.3 * width, 0.3 * height)], axis=1)
        classes = generator.integers(80, size=count)
        more = replace(some, boxes=boxes, classes=classes, scores=np.full(count, score))
        if score > image.scores[-1]:
            return joined(image, more)
        return joined(take(image, slice(0, verify.LIMIT - count)), more)

    change.__name__ = f"invented_at_{score}"
    return each(change)


@each
def scores_in_steps_of_twice_the_bound(image: Detections, tolerance: Tolerance) -> Detections:
    """Rounded to the nearest one, so that none is off by more than the bound."""
    step = 2 * tolerance.score
    return replace(image, scores=np.clip(np.round(image.scores / step) * step, 0, 1))


@each
def scores_off_by_the_shift(image: Detections, tolerance: Tolerance) -> Detections:
    """All by twice the bound of the median, in one direction."""
    return replace(image, scores=np.clip(image.scores - 2 * tolerance.score_shift, 0, 1))


@each
def neighbours_swapped(image: Detections, tolerance: Tolerance) -> Detections:
    """Two that stand so far apart that their scores differ by more than the bound, and so on."""
    scores = image.scores.copy()
    gap = max(tolerance.score, tolerance.order)
    place = 0
    while place < len(scores):
        beyond = np.flatnonzero(image.scores < image.scores[place] - 1.05 * gap)
        other = next((x for x in beyond if x > place and scores[x] == image.scores[x]), None)
        if other is not None:
            scores[[place, other]] = scores[[other, place]]
        place += max(1, len(scores) // 10)
    return in_order(replace(image, scores=scores))


@each
def boxes_that_jitter(image: Detections, tolerance: Tolerance) -> Detections:
    """Each side by as much, outwards or inwards, as makes the median overlap twice as bad."""
    generator = np.random.default_rng(0)
    signs = generator.choice([-1, 1], size=image.boxes.shape) * np.array([1, 1, -1, -1])
    sides = np.tile(image.boxes[:, 2:] - image.boxes[:, :2], 2)

    def jittered(share: float) -> np.ndarray:
        return image.boxes + share * sides * signs

    def loss(share: float) -> float:
        overlap = np.diag(geometry.overlaps(image.boxes, jittered(share)))
        return float(np.median(1 - overlap))

    shares = np.geomspace(1e-5, 0.4, 200)
    share = next(x for x in shares if loss(x) >= 2 * tolerance.median_box)
    return replace(image, boxes=jittered(share))


@each
def masks_of_the_next(image: Detections, tolerance: Tolerance) -> Detections:
    return replace(image, masks=np.roll(image.masks, 1, axis=0))


FAULTS = (
    blind,
    shifted_by_twice_the_bound,
    a_fifth_one_class_off,
    without_suppression,
    duplicates_at_the_end,
    *(invented(score) for score in (0.0, 0.001, 0.2, 0.5, 0.99)),
    scores_in_steps_of_twice_the_bound,
    scores_off_by_the_shift,
    neighbours_swapped,
    boxes_that_jitter,
)


def verdict(found: Dict[str, Images], name: str, precision: str) -> str:
    """What the row would say: the worst of the sizes."""
    judged = {
        size: verify.compare(reference(name)[size], x, precision) for size, x in found.items()
    }
    return facts.worst(judged).verdict


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_is_enough_to_judge_by(name):
    for size, images in reference(name).items():
        assert len(images) == MODELS[name].images_per_call
        # On an image of 57 x 75 pixels C4 has a feature map of 4 x 5 cells.
        least = 10 if "C4" in name and size == "min" else 50
        assert all(len(image.scores) > least for image in images), size
        for precision in PRECISIONS:
            same = verify.compare(images, images, precision)
            assert same.text == f"{same.expected}/{same.expected} match"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_engine_is_caught(name, fault, precision):
    found = {size: fault(images, TOLERANCES[precision]) for size, images in reference(name).items()}
    assert verdict(found, name, precision) in ("mismatch", "error")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_of_others_are_caught(name, precision):
    found = {
        size: masks_of_the_next(images, TOLERANCES[precision])
        for size, images in reference(name).items()
    }
    assert verdict(found, name, precision) == "mismatch"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("order", [(0, 0), (1, 0), (1, 1)])
def test_images_that_are_mixed_up_are_caught(order, precision):
    """The first image's detections twice, for example."""
    name = "testMaskRCNNFPN_b2"
    found = {size: [images[x] for x in order] for size, images in reference(name).items()}
    for size, images in found.items():
        assert verify.compare(reference(name)[size], images, precision).verdict == "mismatch"


@pytest.mark.parametrize("name", ["testRetinaNet", "testMaskRCNNFPN_b2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_channels_that_are_swapped_are_caught(name, precision):
    export = small_export(name)
    for size, images in export.tuning_inputs.items():
        with torch.no_grad():
            outputs = export.eager(*(image.flip(0) for image in images))
        found = verify.split(arrays(outputs), export.fields)
        assert verify.compare(reference(name)[size], found, precision).is_wrong


def carrying_the_aspect_ratio(export: Export, images: Sequence[Any]) -> Tuple[Any, ...]:
    """What a detector finds that scales its input to the sides of `opt`, and its boxes back."""
    (image,), (opt,) = images, export.inputs
    ratio = image.shape[-1] / opt.shape[-1]
    size = [round(side * ratio) for side in opt.shape[-2:]]
    scaled = torch.nn.functional.interpolate(image[None], size=size)[0]
    with torch.no_grad():
        boxes, *others, _ = export.eager(scaled)
    heights = torch.tensor([1, image.shape[-2] / size[0], 1, image.shape[-2] / size[0]])
    return (boxes * heights, *others, torch.tensor(image.shape[-2:]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_that_carries_the_aspect_ratio_is_caught(precision):
    """At `min`, which has that of `opt`, it is right."""
    export = small_export("testRetinaNet")
    judged = {}
    for size, images in export.tuning_inputs.items():
        found = verify.split(arrays(carrying_the_aspect_ratio(export, images)), export.fields)
        judged[size] = verify.compare(reference("testRetinaNet")[size], found, precision).verdict
    assert judged["opt"] == "match"
    assert judged["max"] == "mismatch"


# Healthy engines -------------------------------------------------------------------------------


ENGINES = [
    (name, precision)
    for name, precisions in (
        ("torch", ("bf16",)),
        ("torchscript", ("fp32", "bf16")),
        ("openvino", ("fp32", "bf16", "int8")),
        ("onnxruntime", ("fp32",)),
    )
    for precision in precisions
    if base.load(name).unavailable("cpu") is None
    and (precision != "bf16" or has_native_bf16(cpu_flags()))
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_healthy_engines_match(name, seed):
    judged = apart(judged_engines, name, seed)
    assert len(judged) >= 6
    wrong = {key: agreement.reason for key, agreement in judged.items() if agreement.is_wrong}
    assert not wrong


def judged_engines(name: str, seed: int) -> Dict[Tuple[str, str, str], Agreement]:
    """(backend, precision, size) -> what verify says of it."""
    export = small_export(name, seed=seed)
    with torch.no_grad():
        expected = {size: arrays(export.eager(*x)) for size, x in export.tuning_inputs.items()}
    judged = {}
    for backend, precision in ENGINES:
        if precision == "int8" and "C4" in name:
            continue  # NNCF takes minutes for it, and its bounds were not measured on it.
        try:
            optimized = base.load(backend).optimize(export, precision, "cpu")
        except Unsupported:
            known = ("testRetinaNet_scripted", "testMaskRCNNFPN_pproc")
            assert name == known[0] or (name, precision) == (known[1], "int8")
            continue
        for size, images in export.tuning_inputs.items():
            if (precision, size) == ("int8", "min"):
                continue  # 57 x 75 pixels are fewer than its bounds were measured on, and it shows.
            found = arrays(optimized.call(*images))
            agreement = verify.verify(expected[size], found, export.fields, precision)
            judged[backend, precision, size] = agreement
        del optimized
        gc.collect()
    return judged
