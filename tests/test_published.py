"""TorchBlade's published figures: complete, consistent in themselves, and set beside ours."""

from __future__ import annotations

import pytest

import published


def test_rows():
    rows = published.torchblade()
    assert len(rows) == 26
    assert len({(row.model, row.export, row.backend, row.precision) for row in rows}) == 26
    assert {row.backend for row in rows} == {"Torch", "TorchBlade"}
    first = rows[0]
    assert (first.model, first.export, first.precision) == ("CascadeRCNN", "traced", "fp16")
    assert first.median_ms == 50.9812


@pytest.mark.parametrize(
    "row", published.torchblade(), ids=lambda r: f"{r.model}-{r.export}-{r.backend}-{r.precision}"
)
def test_times_are_milliseconds_that_agree_with_the_frame_rates(row):
    # Both medians are of the same 200 calls, so one is the other's inverse but for the midpoint.
    fps = 1000 * row.images_per_call / row.median_ms
    assert fps == pytest.approx(row.median_fps, rel=2e-3)
    # The mean of inverses is at least the inverse of the mean (Jensen), up to printed digits.
    assert row.mean_fps >= 1000 * row.images_per_call / row.mean_ms * (1 - 1e-5)
    assert row.median_ms < row.p99_ms


def test_a_test_model_that_was_not_published():
    text = published.comparison([("testOther", "traced", "fp32", "OpenVINO", 2.0, 1.9, 2.1)])
    assert "| Other | traced | fp32 | OpenVINO | 2.00x ±0.10 | - |" in text


def test_speedups():
    speedups = published.speedups()
    assert len(speedups) == 13
    expected = {
        (*name, precision)
        for name in published.PUBLISHED_AS.values()
        for precision in ("fp32", "fp16")
    }
    assert expected - set(speedups) == {("RetinaNet", "scripted", "fp32")}
    assert set(speedups) <= expected
    assert max(speedups, key=speedups.get) == ("MaskRCNNC4", "traced", "fp16")
    assert max(speedups.values()) == pytest.approx(2.724, abs=1e-3)
    assert min(speedups.values()) > 1


def test_comparison():
    text = published.comparison(
        [
            ("testRetinaNet", "traced", "fp32", "OpenVINO", 1.2, 1.17, 1.22),
            ("testMaskRCNNC4", "traced", "bf16", "OpenVINO", 1.0, 0.99, 1.01),
            ("testRetinaNet_scripted", "scripted", "fp16", "TorchBlade", 2.5, None, None),
            ("testRetinaNet_scripted", "scripted", "fp32", "TorchScript", None, None, None),
            ("testCascadeRCNN", "traced", "int8", "TorchBlade", 2.0, 1.9, 2.1),
        ]
    )
    lines = text.splitlines()
    assert lines[2:7] == [
        "| RetinaNet | traced | fp32 | OpenVINO | 1.20x ±0.03 | 1.48x |",
        "| MaskRCNNC4 | traced | bf16 | OpenVINO | 1.00x ±0.01 same | 2.72x (fp16) |",
        "| RetinaNet_scripted | scripted | fp16 | TorchBlade | 2.50x ±? inconclusive | 2.01x |",
        "| RetinaNet_scripted | scripted | fp32 | TorchScript | - | - |",
        "| CascadeRCNN | traced | int8 | TorchBlade | 2.00x ±0.10 | - |",
    ]
    assert {line.count("|") for line in lines[:7]} == {7}
    assert "compare ratios" in lines[-1]
