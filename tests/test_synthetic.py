"""Synthetic weights: does the detector find what it was told to, and does rounding spare it?"""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import CONFIGS, arrays, needs_bf16

from detectors import inputs, synthetic
from detectors.build import build, fields_of
from detectors.config import build_detector
from detectors.synthetic import synthesize
from detectors.zoo_configurations import zoo_configuration
from measure import verify
from models import MODELS

RETINANET = MODELS["testRetinaNet"]
MASK_RCNN = MODELS["testMaskRCNNFPN"]
CASCADE = MODELS["testCascadeRCNN"]
C4 = MODELS["testMaskRCNNC4"]
SIZES = ("min", "opt", "max")


@functools.lru_cache(maxsize=None)
def tuning_inputs(height, width):
    return inputs.tuning_inputs(inputs.read_image(None, (height, width)), 1, seed=0)


def weights(model, detections, size=(160, 224), seed=0):
    images = tuning_inputs(*size)
    return synthesize(
        zoo_configuration(model.config), [images[name][0] for name in SIZES], detections, seed
    )


@functools.lru_cache(maxsize=1)
def export(model, detections, size=(160, 224)):
    return build(model, weights(model, detections, size), "synthetic", tuning_inputs(*size))


def find(model, detections, which, size=(160, 224)):
    ready = export(model, detections, size)
    with torch.no_grad():
        return verify.split(arrays(ready.eager(*ready.tuning_inputs[which])), fields_of(model))[0]


@pytest.mark.parametrize("detections", [0, 5, 30, 100])
@pytest.mark.parametrize("model", [RETINANET, MASK_RCNN], ids=lambda model: model.name)
def test_finds_as_many_as_it_was_told_to(model, detections):
    for which in SIZES:
        found = find(model, detections, which)
        if which == "opt" or detections <= 30:
            assert len(found.scores) == detections
        else:
            assert len(found.scores) >= 0.9 * detections


@pytest.mark.parametrize("model", [RETINANET, MASK_RCNN], ids=lambda model: model.name)
def test_scores_are_spread_apart_even_in_bfloat16(model):
    scores = np.sort(find(model, 100, "opt").scores)
    assert scores[0] > 0.25
    assert scores[-1] < 0.96
    assert scores[-1] - scores[0] > 0.6
    rounded = torch.from_numpy(scores).bfloat16().unique()
    assert len(rounded) >= 0.95 * len(scores)


@pytest.mark.parametrize("model", [RETINANET, MASK_RCNN], ids=lambda model: model.name)
def test_objects_differ_in_size_and_place(model):
    found = find(model, 100, "opt")
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    areas = np.sqrt(sides.prod(axis=1))
    assert areas.max() > 3 * areas.min()
    centers = found.boxes[:, :2] + sides / 2
    assert (np.ptp(centers, axis=0) > 0.5 * np.array([224, 160])).all()
    assert len(np.unique(found.classes)) > 50


@pytest.mark.parametrize(
    ("model", "which"),
    [
        # Without instructions for it, bfloat16 takes a minute or more at these.
        pytest.param(
            model,
            which,
            marks=[needs_bf16] * (which == "max" or model is MASK_RCNN),
            id=f"{model.name}-{which}",
        )
        for model in (RETINANET, MASK_RCNN)
        for which in SIZES
    ],
)
def test_a_healthy_engine_at_bfloat16_agrees(model, which):
    ready = export(model, 100)
    images = ready.tuning_inputs[which]
    with torch.no_grad():
        reference = ready.eager(*images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = ready.eager(*images)
    agreement = verify.verify(arrays(reference), arrays(rounded), fields_of(model), "bf16")
    assert agreement.verdict == "match", agreement.reason
    assert agreement.matched >= 0.97 * agreement.expected
    # It is not the same computation: the check above could fail.
    assert agreement.score_drift > 0


def test_rounding_makes_the_errors_that_bfloat16_makes():
    detector = build_detector(zoo_configuration(MASK_RCNN.config), False).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batch = torch.empty(1, 3, 64, 96).uniform_(-2, 2, generator=generator)
    with torch.no_grad():
        synthetic._initialize(detector, generator)
        with synthetic._scaling(detector):
            detector.backbone(batch)
        exact = detector.backbone(batch)
        with synthetic._rounding(detector):
            rounded = detector.backbone(batch)
        with torch.autocast("cpu", torch.bfloat16):
            computed = detector.backbone(batch)
        again = detector.backbone(batch)
    for level in range(len(exact)):
        assert torch.equal(exact[level], again[level])  # It is over when it is over.
        errors = rounded[level] - exact[level]
        theirs = computed[level].float() - exact[level]
        assert 0.8 < errors.norm() / theirs.norm() < 1.25
        assert (errors - theirs).norm() < 0.75 * theirs.norm()


@pytest.mark.parametrize("model", [MASK_RCNN], ids=lambda model: model.name)
def test_masks_are_neither_empty_nor_full(model):
    filled = (find(model, 30, "opt").masks > 0.5).mean(axis=(1, 2, 3))
    assert ((filled > 0.2) & (filled < 0.98)).all()


@pytest.mark.parametrize(
    ("model", "size"),
    # C4 runs a stage of the ResNet on every proposal, of which there are more in a larger image.
    [
        pytest.param(CASCADE, (96, 128), id=CASCADE.name),
        pytest.param(C4, (64, 96), id=C4.name, marks=pytest.mark.slow),
    ],
)
def test_other_architectures_find_objects(model, size):
    found = find(model, 10, "opt", size)
    assert len(found.scores) == 10
    assert len(np.unique(found.scores)) == 10
    assert 0.25 < found.scores.min() < found.scores.max() < 0.96


@pytest.mark.parametrize("model", [RETINANET, MASK_RCNN], ids=lambda model: model.name)
def test_weights_are_those_of_the_seed(model):
    first = weights(model, 5, (96, 128), seed=3)
    again = weights(model, 5, (96, 128), seed=3)
    other = weights(model, 5, (96, 128), seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["backbone.bottom_up.stem.conv1.weight"], other["backbone.bottom_up.stem.conv1.weight"]
    )


@pytest.mark.parametrize("model", [RETINANET, MASK_RCNN], ids=lambda model: model.name)
def test_further_images_have_their_objects_too(model):
    """Three more: in RetinaNet the last of them share anchors with earlier ones."""
    image = torch.from_numpy(inputs.read_image(None, (160, 224)))
    others = [image.flip(2), image.transpose(1, 2).contiguous(), image.flip(1)]
    views = [tuning_inputs(160, 224)[name][0] for name in SIZES]
    state = synthesize(zoo_configuration(model.config), [*views, *others], 30, seed=0)
    detector = build_detector(zoo_configuration(model.config), True)
    detector.load_state_dict(state)
    with torch.no_grad():
        counts = [len(detector([view])[0].scores) for view in (*views, *others)]
    assert min(counts) >= 27
    assert max(counts) == 30


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_have_the_names_of_the_architecture(config):
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    state = synthesize(zoo_configuration(config), [image, image, image], 3, seed=0)
    build_detector(zoo_configuration(config), False).load_state_dict(state, strict=True)
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("model", [RETINANET, MASK_RCNN], ids=lambda model: model.name)
@pytest.mark.parametrize("level", [0.0, 120.0, 255.0])
def test_an_image_of_one_colour_has_nothing_to_find_but_does_no_harm(model, level):
    images = [torch.full((3, side, side), level) for side in (64, 96, 192)]
    state = synthesize(zoo_configuration(model.config), images, 20, seed=0)
    assert all(torch.isfinite(value).all() for value in state.values())
    detector = build_detector(zoo_configuration(model.config), True)
    detector.load_state_dict(state)
    with torch.no_grad():
        found = detector([images[1]])[0]
    # Anchors of one colour tie, and rounding decides which become proposals: a few may be others
    # than those that the weights were fitted on.
    assert len(found.scores) <= (20 if model is RETINANET else 24)
    assert math.isfinite(float(found.scores.sum()))


def test_the_smallest_image_works():
    images = tuning_inputs(32, 32)
    state = synthesize(
        zoo_configuration(MASK_RCNN.config), [images[name][0] for name in SIZES], 100, seed=0
    )
    detector = build_detector(zoo_configuration(MASK_RCNN.config), False)
    detector.load_state_dict(state)
    with torch.no_grad():
        assert 0 < len(detector([images["opt"][0]])[0].scores) <= 100
