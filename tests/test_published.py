"""TorchBlade's published figures: complete, consistent in themselves, and set beside ours."""

from __future__ import annotations

import pytest

from results import published


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


@pytest.mark.parametrize(
    ("model", "precision", "beside"),
    [
        ("testRetinaNet", "fp32", (1.48, "fp32")),
        ("testRetinaNet", "tf32", (1.48, "fp32")),
        ("testMaskRCNNC4", "bf16", (2.72, "fp16")),
        ("testRetinaNet_scripted", "fp16", (2.01, "fp16")),
        ("testRetinaNet_scripted", "fp32", None),
        ("testCascadeRCNN", "int8", None),
        ("testOther", "fp32", None),
        ("testRetinaNet", "", None),
    ],
)
def test_what_stands_beside_ours(model, precision, beside):
    found = published.beside(model, precision)
    assert (found and (round(found.ratio, 2), found.precision)) == beside


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
