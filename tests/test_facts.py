"""What follows from a result file: what a reader has to be careful with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import pytest

from benchmark import Speedup, summarize
from results import environment, facts
from results.record import Cpu, Environment, GpuState, Group, Machine, Run, Stages


def run(label: str, relative_iqr: Optional[float]) -> Run:
    """A run with calls that spread so far, or without calls."""
    statistics = None
    if relative_iqr is not None:
        statistics = replace(summarize([0.1], 1), relative_iqr=relative_iqr)
    return Run(
        backend=label.lower(),
        label=label,
        baseline=label == "Torch",
        requested_precision="fp32",
        status="ok" if statistics else "failed",
        statistics=statistics,
    )


def group(**changes: Any) -> Group:
    settled = Group(
        model="testRetinaNet",
        export="traced",
        precision="fp32",
        images_per_call=1,
        image_sizes={"opt": ((96, 128),)},
        rounds=15,
        stopped="interval",
        runs=(run("OpenVINO", 0.05), run("Inductor", None)),
        machine=Machine(steal_share=0.0, others_share=0.05, thermal_throttles=0),
    )
    return replace(settled, **changes)


def test_a_quiet_machine_is_not_warned_of():
    assert facts.warnings(group(), 15) == []
    assert facts.warnings(group(machine=None), 15) == []
    assert facts.warnings(group(machine=Machine(quota_periods=580, quota_stops=2)), 15) == []
    # NVML is installed, and its second answer did not come.
    assert facts.warnings(group(gpu=(GpuState(), GpuState(name="Some GPU"))), 15) == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"runs": (run("OpenVINO", 0.134),)},
            "testRetinaNet fp32, OpenVINO: the middle half of its calls spans 13% of the median",
        ),
        (
            {"machine": Machine(steal_share=0.031)},
            "testRetinaNet fp32: other virtual machines took 3% of the cores",
        ),
        (
            {"machine": Machine(others_share=0.2)},
            "testRetinaNet fp32: other processes took 20% of the cores",
        ),
        (
            {"machine": Machine(thermal_throttles=4)},
            "testRetinaNet fp32: the CPU was slowed down for its temperature",
        ),
        (
            {"machine": Machine(quota_periods=58, quota_stops=58)},
            "testRetinaNet fp32: the container's CPU quota stopped the processes in 58 of 58 "
            "periods: give it whole cores, or use fewer --threads",
        ),
        (
            {"runs": (replace(run("OpenVINO", 0.05), settled=False),)},
            "testRetinaNet fp32, OpenVINO: its process computes on after its calls, which slows "
            "down whatever runs beside it",
        ),
        (
            {"gpu": (GpuState(throttled=("power brake", "software power cap")),) * 2},
            "testRetinaNet fp32: the GPU was throttled (power brake, software power cap)",
        ),
        (
            {"rounds": 8, "stopped": "time budget"},
            "testRetinaNet fp32: 8 rounds fit in the time budget, 15 were wanted",
        ),
    ],
)
def test_warnings(changes, warning):
    assert facts.warnings(group(**changes), 15) == [warning]


def test_the_margin_decides_on_verdicts():
    of = Speedup(1.3, 1.1, 1.5, "faster")
    runs = (run("Torch", None), replace(run("OpenVINO", None), speedup=of, speedup_over_fp32=of))
    (judged,) = facts.with_margin([group(runs=runs)], 0.2)
    assert judged.runs[0].speedup is None
    for found in (judged.runs[1].speedup, judged.runs[1].speedup_over_fp32):
        assert found == replace(of, verdict="inconclusive")
    assert facts.with_margin([judged], 0.05)[0].runs[1].speedup == of


def test_fewer_rounds_that_were_asked_for_are_no_warning():
    assert facts.warnings(group(rounds=6, stopped="fixed"), 6) == []


@pytest.mark.parametrize(
    ("governor", "warned"), [("powersave", True), ("performance", False), (None, False)]
)
def test_a_cpu_that_changes_its_frequency_is_said(governor, warned):
    found = facts.general_warnings(Environment(cpu=Cpu(governor=governor)))
    assert [f"governor {governor}" in warning for warning in found] == [True] * warned


def test_the_governor_is_read_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_CPUS", tmp_path)
    assert environment.environment({}).cpu.governor is None
    (tmp_path / "cpu0/cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0/cpufreq/scaling_governor").write_text("schedutil\n")
    assert environment.environment({}).cpu.governor == "schedutil"


def test_of_one_image_only_its_own_unrest_is_said():
    unrest = group(
        image="a.jpg",
        runs=(run("OpenVINO", 0.2),),
        rounds=3,
        stopped="time budget",
        machine=Machine(steal_share=0.5, others_share=0.5, thermal_throttles=4),
    )
    found = facts.warnings(unrest, 15)
    assert len(found) == 1
    assert found[0].startswith("testRetinaNet on a.jpg fp32, OpenVINO: the middle half")


def test_the_ceiling_is_amdahls():
    stages = Stages(backbone=3.0, nms=0.5, rest=0.5)
    assert facts.ceiling(stages) == 4.0
    assert facts.ceiling(stages, ("backbone", "nms")) == 8.0
