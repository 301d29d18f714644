"""Where the time goes: exclusive times, real detectors, and what follows from them."""

from __future__ import annotations

import importlib
import time

import pytest
import torch
import torchvision
from conftest import needs_bf16, small_export

from roofline import measure_peak
from stages import NMS, POSTPROCESSING, REST, STAGES, Stopwatch, _watched, ceiling, time_stages


def test_time_belongs_to_the_innermost_stage():
    now = 0.0
    watch = Stopwatch(lambda: now)
    for moment, stage in ((1, "ROI heads"), (3, NMS), (6, None), (10, None), (15, None)):
        now = moment
        if stage is not None:
            watch.enter(stage)
        elif moment < 15:
            watch.leave()
    seconds = watch.total()
    assert seconds[REST] == 1 + 5
    assert seconds["ROI heads"] == 2 + 4
    assert seconds[NMS] == 3
    assert sum(seconds.values()) == 15


OTHERS = (NMS, POSTPROCESSING, REST)


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("testRetinaNet", {"backbone + FPN", "head", *OTHERS}),
        ("testMaskRCNNFPN", {"backbone + FPN", "proposals", "ROI heads", *OTHERS}),
        ("testMaskRCNNC4", {"backbone + FPN", "proposals", "ROI heads", *OTHERS}),
    ],
)
def test_the_stages_of_a_detector(name, present):
    # C4's weights take minutes to make at the size of the others.
    export = small_export(name, **({"size": (64, 96), "detections": 10} if "C4" in name else {}))
    suppress = torchvision.ops.batched_nms
    start = time.perf_counter()
    calls = time_stages(export.eager, export.eager, export.inputs, lambda: None, calls=2)
    elapsed = time.perf_counter() - start
    assert len(calls) == 2
    assert elapsed / 2 < sum(sum(call.values()) for call in calls) <= elapsed
    for call in calls:
        assert set(call) == set(STAGES)
        assert {stage for stage, seconds in call.items() if seconds > 0} == present
        assert call["backbone + FPN"] > call[NMS]
    # Nothing is left behind.
    assert torchvision.ops.batched_nms is torchvision.ops.boxes.batched_nms is suppress
    assert not any(module._forward_hooks for module in export.eager.modules())


@pytest.mark.parametrize(
    ("name", "module", "function", "stage"),
    [
        ("testMaskRCNNFPN", "detectors.rcnn", "paste_masks", POSTPROCESSING),
        ("testMaskRCNNFPN", "detectors.rcnn", "batch_images", REST),
        ("testMaskRCNNFPN", "detectors.roi_heads", "detections_of_images", "ROI heads"),
        ("testRetinaNet", "detectors.boxes", "apply_deltas", POSTPROCESSING),
        ("testRetinaNet", "detectors.boxes", "nonempty", POSTPROCESSING),
        ("testRetinaNet", "detectors.retinanet", "batch_images", REST),
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
    assert {name for name, spent in seconds.items() if spent > 900} == {stage}
    assert sum(seconds.values()) > late[0] > 0


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
    parts = {"backbone + FPN": 2, "proposals": 3, "ROI heads": 4}
    assert seconds == {**dict.fromkeys(STAGES, 0), **parts, REST: 1, POSTPROCESSING: 5 + 6}


def test_the_ceiling_is_amdahls():
    seconds = {**dict.fromkeys(STAGES, 0.0), "backbone + FPN": 3.0, NMS: 0.5, REST: 0.5}
    assert ceiling(seconds) == 4.0
    assert ceiling(seconds, ("backbone + FPN", NMS)) == 8.0


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
