"""Where the time goes: exclusive times, real detectors, and what follows from them."""

from __future__ import annotations

import time

import pytest
import torch
import torchvision
from conftest import small_export

from roofline import measure_peak
from stages import NMS, REST, STAGES, Stopwatch, ceiling, time_stages


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


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("testRetinaNet", {"backbone + FPN", "head", NMS, REST}),
        ("testMaskRCNNFPN", {"backbone + FPN", "proposals", "ROI heads", NMS, REST}),
        ("testMaskRCNNC4", {"backbone + FPN", "proposals", "ROI heads", NMS, REST}),
    ],
)
def test_the_stages_of_a_detector(name, present):
    export = small_export(name)
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


def test_the_ceiling_is_amdahls():
    seconds = {**dict.fromkeys(STAGES, 0.0), "backbone + FPN": 3.0, NMS: 0.5, REST: 0.5}
    assert ceiling(seconds) == 4.0
    assert ceiling(seconds, ("backbone + FPN", NMS)) == 8.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
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
