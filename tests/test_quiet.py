"""Was the machine quiet: counters, made up and real."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from benchmark import RunFailed
from measure import quiet
from measure.protocol import MeasurePeak
from measure.quiet import Snapshot
from measure.worker import Command, Worker
from results.record import Machine

# It keeps a process busy for a second.
WORK = MeasurePeak("fp32", "cpu")


def snapshot(**changes: Any) -> Snapshot:
    idle = {"total": 100.0, "busy": 0.0, "steal": 0.0, "own": {}, "ended": 0.0, "throttled": 0}
    return Snapshot(**{**idle, **changes})


def test_what_happened_between_two_snapshots():
    before = snapshot(total=100.0, busy=50.0, steal=1.0, own={1: 4.0, 2: 6.0}, throttled=3)
    before = replace(before, periods=100, stopped=7)
    after = snapshot(
        periods=158,
        stopped=9,
        total=120.0,
        busy=68.0,
        steal=2.0,
        own={1: 9.0, 2: 16.0},
        throttled=5,
    )
    assert quiet.within([(before, after)]) == Machine(
        steal_share=pytest.approx(1 / 20),
        others_share=pytest.approx((18 - 15) / 20),
        thermal_throttles=2,
        quota_periods=58,
        quota_stops=2,
    )


def test_shares_are_shares():
    """Counters are read one after the other, and a process may end in between."""
    before = snapshot(total=100.0, busy=50.0, steal=1.0, own={1: 10.0})
    found = quiet.within([(before, snapshot(total=100.0, busy=50.1, steal=0.9, own={1: 9.9}))])
    assert 0 <= found.steal_share <= 1
    assert 0 <= found.others_share <= 1


@pytest.mark.parametrize(
    ("ended", "others"),
    # It spent 40 s before and 3 s meanwhile; where the system does not tell, these 3 s are others'.
    [(43.0, 0.0), (0.0, 3 / 20)],
)
def test_a_process_that_dies_does_not_make_its_past_that_of_others(ended, others):
    before = snapshot(total=100.0, busy=50.0, own={1: 40.0, 2: 40.0})
    after = snapshot(total=120.0, busy=68.0, own={1: 55.0}, ended=ended)
    assert quiet.within([(before, after)]).others_share == pytest.approx(others)


# Real processes --------------------------------------------------------------------------------


@pytest.fixture
def worker(hosts, tmp_path):
    """A worker that has computed before."""
    with hosts.of(Command.own()).worker(tmp_path / "log", threads=1) as worker:
        worker.ask(WORK)
        yield worker


def kill(worker: Worker) -> None:
    """Kills its process, and waits until its host has noticed."""
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="was killed by SIGKILL"):
        worker.ask(WORK)


def test_a_process_that_was_killed_is_not_another(hosts, worker):
    """One that goes on computing until it is killed."""
    before = quiet.snapshot([worker], hosts)
    worker.ask(WORK)
    alive = quiet.snapshot([worker], hosts)
    kill(worker)
    after = quiet.snapshot([worker], hosts)
    assert after.own == {}
    # To hundredths of a second, in which the system counts.
    spent = alive.own[worker] - before.own[worker]
    assert quiet._own_seconds(before, after) >= spent - 0.05 > 0
    # All of its time is told now, and what lies before is not of these rounds.
    assert quiet._own_seconds(before, after) < spent + 0.5 * before.own[worker]


def test_a_process_of_our_own_is_not_another(hosts, worker):
    before = [quiet.snapshot(workers, hosts) for workers in ([worker], [])]
    worker.ask(WORK)
    after = [quiet.snapshot(workers, hosts) for workers in ([worker], [])]
    measured, ignored = (quiet.within([pair]).others_share for pair in zip(before, after))
    # It takes a whole core, or its part of a busy one.
    assert ignored - measured > 0.3 / (os.cpu_count() or 1)


def test_a_process_that_is_gone_has_no_time(hosts, worker):
    assert quiet.snapshot([worker], hosts).own.keys() == {worker}
    kill(worker)
    assert quiet.snapshot([worker], hosts).own == {}
