"""Detectors of every kind of configuration: engines find what the eager module finds."""

from __future__ import annotations

import functools

import parts
import pytest
import torch
from conftest import arrays
from seeded_weights import seeded_image

from backends import base
from detectors.build import build
from detectors.config import build_detector
from detectors.export import Export
from detectors.inputs import tuning_inputs
from measure import verify
from models import Model

# A part for each kind of detector, see `parts.PARTS`: those of the detectors of one's own that are
# used most first.
KINDS = (
    *("faster_fpn", "group_norm", "anchors", "retinanet_group_norm", "faster_c4", "mask_dc5"),
    *("resnext", "class_agnostic", "cascade_of_two", "deformable", "batch_norm_averaged"),
    *("keypoints", "proposal_network", "semantic", "panoptic"),
)
ENGINES = ("torchscript", "openvino", "onnxruntime")


@functools.lru_cache(maxsize=1)
def export_of(name: str) -> Export:
    configuration = parts.configuration_of(name)
    postprocess = parts.PARTS[name][0] == parts.RETINANET
    model = Model(name, name, postprocess=postprocess, configuration=configuration)
    like = build_detector(configuration, postprocess, initialize=False).state_dict()
    images = tuning_inputs(seeded_image(1, 96, 128), 1, 0)
    return build(model, parts.weights_of(like), "seeded weights", images)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", KINDS)
def test_an_engine_finds_what_the_eager_module_finds(name, engine):
    if base.load(engine).unavailable("cpu") is not None:
        pytest.skip(f"there is no {engine} here")
    export = export_of(name)
    optimized = base.load(engine).optimize(export, "fp32", "cpu")
    for size, images in export.tuning_inputs.items():
        with torch.no_grad():
            wanted = arrays(export.eager(*images))
        found = arrays(optimized.call(*images))
        agreement = verify.verify(
            wanted, found, export.fields, "fp32", export.score_threshold, export.limit
        )
        assert (agreement.verdict, agreement.lost, agreement.spurious) == ("match", 0, 0), size
        assert agreement.labels in (None, pytest.approx(1, abs=1e-3))
