"""Was the machine quiet: from counters, made up and real, to warnings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any, Dict

import pytest

import machine
import results
from machine import Snapshot


def snapshot(**changes: Any) -> Snapshot:
    quiet = {"total": 100.0, "busy": 0.0, "steal": 0.0, "own": {}, "ended": 0.0, "throttled": 0}
    return Snapshot(**{**quiet, **changes})


def test_what_happened_between_two_snapshots():
    before = snapshot(total=100.0, busy=50.0, steal=1.0, own={1: 4.0, 2: 6.0}, throttled=3)
    after = snapshot(total=120.0, busy=68.0, steal=2.0, own={1: 9.0, 2: 16.0}, throttled=5)
    assert machine.between(before, after) == {
        "steal_share": pytest.approx(1 / 20),
        "others_share": pytest.approx((18 - 15) / 20),
        "thermal_throttles": 2,
    }


def test_shares_are_shares():
    """Counters are read one after the other, and a process may end in between."""
    before = snapshot(total=100.0, busy=50.0, steal=1.0, own={1: 10.0})
    found = machine.between(before, snapshot(total=100.0, busy=50.1, steal=0.9, own={1: 9.9}))
    assert 0 <= found["steal_share"] <= 1
    assert 0 <= found["others_share"] <= 1


@pytest.mark.parametrize(
    ("ended", "others"),
    # It spent 40 s before and 3 s meanwhile; where the system does not tell, these 3 s are others'.
    [(43.0, 0.0), (0.0, 3 / 20)],
)
def test_a_process_that_dies_does_not_make_its_past_that_of_others(ended, others):
    before = snapshot(total=100.0, busy=50.0, own={1: 40.0, 2: 40.0})
    after = snapshot(total=120.0, busy=68.0, own={1: 55.0}, ended=ended)
    assert machine.between(before, after)["others_share"] == pytest.approx(others)


def test_a_process_that_was_killed_is_not_another():
    """A real one, which has computed before, and goes on doing so until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.5)
        before = machine.snapshot([process.pid])
        time.sleep(0.5)
        alive = machine.snapshot([process.pid])
    finally:
        process.kill()
        process.wait()
    after = machine.snapshot([process.pid])
    assert after.own == {}
    # To hundredths of a second, in which the system counts.
    spent = alive.own[process.pid] - before.own[process.pid]
    assert machine._own_seconds(before, after) >= spent - 0.05 > 0


def test_a_process_of_our_own_is_not_another():
    program = "while True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        time.sleep(0.3)
        before = [machine.snapshot(pids) for pids in ([process.pid], [])]
        time.sleep(1.5)
        after = [machine.snapshot(pids) for pids in ([process.pid], [])]
    finally:
        process.kill()
        process.wait()
    measured, ignored = (machine.between(*pair)["others_share"] for pair in zip(before, after))
    # It takes a whole core, or its part of a busy one.
    assert ignored - measured > 0.3 / (os.cpu_count() or 1)


def test_a_process_that_is_gone_has_no_time():
    assert machine.snapshot([2**22 + 1]).own == {}


def group(**changes: Any) -> Dict[str, Any]:
    run = {"label": "OpenVINO", "statistics": {"relative_iqr": 0.05}}
    return {
        "model": "testRetinaNet",
        "precision": "fp32",
        "rounds": 15,
        "stopped": "interval",
        "machine": {"steal_share": 0.0, "others_share": 0.05, "thermal_throttles": 0},
        "runs": [run, {"label": "Inductor", "statistics": None}],
        **changes,
    }


def test_a_quiet_machine_is_not_warned_of():
    assert machine.warnings(group(), 15) == []
    assert machine.warnings(group(machine=None), 15) == []
    # NVML is installed, and its second answer did not come.
    assert machine.warnings(group(gpu=[{"throttled": []}, {"name": "Some GPU"}]), 15) == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"runs": [{"label": "OpenVINO", "statistics": {"relative_iqr": 0.134}}]},
            "testRetinaNet fp32, OpenVINO: the middle half of its calls spans 13% of the median",
        ),
        (
            {"machine": {"steal_share": 0.031}},
            "testRetinaNet fp32: other virtual machines took 3% of the cores",
        ),
        (
            {"machine": {"others_share": 0.2}},
            "testRetinaNet fp32: other processes took 20% of the cores",
        ),
        (
            {"machine": {"thermal_throttles": 4}},
            "testRetinaNet fp32: the CPU was slowed down for its temperature",
        ),
        (
            {"gpu": [{"throttled": ["power brake", "software power cap"]}] * 2},
            "testRetinaNet fp32: the GPU was throttled (power brake, software power cap)",
        ),
        (
            {"rounds": 8, "stopped": "time budget"},
            "testRetinaNet fp32: 8 rounds fit in the time budget, 15 were wanted",
        ),
    ],
)
def test_warnings(changes, warning):
    assert machine.warnings(group(**changes), 15) == [warning]


def test_fewer_rounds_that_were_asked_for_are_no_warning():
    assert machine.warnings(group(rounds=6, stopped="fixed"), 6) == []


@pytest.mark.parametrize(
    ("governor", "warned"), [("powersave", True), ("performance", False), (None, False)]
)
def test_a_cpu_that_changes_its_frequency_is_said(governor, warned):
    found = machine.general_warnings({"cpu": {"governor": governor}})
    assert [f"governor {governor}" in warning for warning in found] == [True] * warned


def test_the_governor_is_read_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_CPU0", tmp_path)
    assert results.environment({})["cpu"]["governor"] is None
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "scaling_governor").write_text("schedutil\n")
    assert results.environment({})["cpu"]["governor"] == "schedutil"


def test_of_one_image_only_its_own_unrest_is_said():
    unrest = {"label": "OpenVINO", "statistics": {"relative_iqr": 0.2}}
    found = machine.warnings(
        group(image="a.jpg", runs=[unrest], rounds=3, stopped="time budget"), 15
    )
    assert len(found) == 1
    assert found[0].startswith("testRetinaNet on a.jpg fp32, OpenVINO: the middle half")
