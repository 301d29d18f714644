"""Where the time goes: exclusive times, real detectors, and how fast the machine multiplies."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, astuple

import pytest
import torch
import torchvision
from conftest import needs_bf16, small_export
from seeded_weights import seeded_image, seeded_weights

from detectors.build import build
from detectors.config import build_detector
from detectors.export import Export
from detectors.zoo_configurations import zoo_configuration
from measure.profile import Stopwatch, _watched, measure_peak, time_stages
from models import MODELS
from results.record import Stages


def test_time_belongs_to_the_innermost_stage():
    now = 0.0
    watch = Stopwatch(lambda: now)
    for moment, stage in ((1, "roi_heads"), (3, "nms"), (6, None), (10, None), (15, None)):
        now = moment
        if stage is not None:
            watch.enter(stage)
        elif moment < 15:
            watch.leave()
    seconds = watch.total()
    assert seconds == Stages(rest=1 + 5, roi_heads=2 + 4, nms=3)
    assert sum(astuple(seconds)) == 15


def seeded_export(name: str) -> Export:
    """A test model with weights that are quickly made, and a small image."""
    model = MODELS[name]
    state = seeded_weights(
        build_detector(zoo_configuration(model.config), model.postprocess).state_dict()
    )
    inputs = dict.fromkeys(("min", "opt", "max"), (seeded_image(1, 64, 96),))
    return build(model, state, "seeded weights", inputs)


OTHERS = ("nms", "postprocessing", "rest")


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("testRetinaNet", {"backbone", "head", *OTHERS}),
        ("testMaskRCNNFPN", {"backbone", "proposals", "roi_heads", *OTHERS}),
        ("testMaskRCNNC4", {"backbone", "proposals", "roi_heads", *OTHERS}),
    ],
)
def test_the_stages_of_a_detector(name, present):
    # C4's synthetic weights take a minute to make.
    export = seeded_export(name) if "C4" in name else small_export(name)
    suppress = torchvision.ops.batched_nms
    start = time.perf_counter()
    calls = time_stages(export.eager, export.eager, export.inputs, lambda: None, calls=2)
    elapsed = time.perf_counter() - start
    assert len(calls) == 2
    assert elapsed / 2 < sum(sum(astuple(call)) for call in calls) <= elapsed
    for call in calls:
        assert {stage for stage, seconds in asdict(call).items() if seconds > 0} == present
        assert call.backbone > call.nms
    # Nothing is left behind.
    assert torchvision.ops.batched_nms is torchvision.ops.boxes.batched_nms is suppress
    assert not any(module._forward_hooks for module in export.eager.modules())


@pytest.mark.parametrize(
    ("name", "module", "function", "stage"),
    [
        ("testMaskRCNNFPN", "detectors.rcnn", "paste_masks", "postprocessing"),
        ("testMaskRCNNFPN", "detectors.rcnn", "batch_images", "rest"),
        ("testMaskRCNNFPN", "detectors.roi_heads", "detections_of_images", "roi_heads"),
        ("testRetinaNet", "detectors.boxes", "apply_deltas", "postprocessing"),
        ("testRetinaNet", "detectors.boxes", "nonempty", "postprocessing"),
        ("testRetinaNet", "detectors.retinanet", "batch_images", "rest"),
    ],
)
def test_where_a_function_counts(name, module, function, stage, monkeypatch):
    """What seems to take longer takes it from the stage that it is of."""
    export = small_export(name)
    # As in testMaskRCNNFPN_pproc, which has the same weights; RetinaNet has it anyway.
    monkeypatch.setattr(export.eager.detector, "postprocess", True)
    module = importlib.import_module(module)
    original = getattr(module, function)

    def slow(*args):
        late[0] += 1000.0
        return original(*args)

    late = [0.0]
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(module, function, slow)
    (seconds,) = time_stages(export.eager, export.eager, export.inputs, lambda: None, calls=1)
    assert {name for name, spent in asdict(seconds).items() if spent > 900} == {stage}
    assert sum(astuple(seconds)) > late[0] > 0


def test_a_detector_of_detectron2():
    """As its adapters call it: parts of the same names, inside of one more module."""

    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.proposal_generator, self.roi_heads = map(Part, (2, 3, 4))

        def forward(self, image):
            work(1)
            self.roi_heads(self.proposal_generator(self.backbone(image)))
            work(5)

    class Part(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            work(self.seconds)
            return x

    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Detector()

        def forward(self, image):
            self.model(image)
            work(6)

    def work(seconds):
        now[0] += seconds

    now = [0.0]
    eager = Adapter()
    with _watched(eager, Stopwatch(lambda: now[0])) as watch:
        eager(torch.zeros(1))
        seconds = watch.total()
    assert seconds == Stages(backbone=2, proposals=3, roi_heads=4, rest=1, postprocessing=5 + 6)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_the_peak_is_not_below_a_product_of_ours(precision):
    peak = measure_peak(precision, "cpu", seconds=0.2)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert 1e8 < peak < 1e14
    # Of both, as either may have the slower kernels.
    matrix = torch.ones(512, 512, dtype=dtype)
    image, weight = matrix.view(1, 512, 16, 32), matrix.view(512, 512, 1, 1)
    for product in (lambda: matrix @ matrix, lambda: torch.conv2d(image, weight)):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        assert peak > 0.3 * 2 * 512**3 / min(times)
