"""Was the machine quiet: what else it did while runs were timed, as far as the system tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from measure.worker import Hosts, Worker
from results.environment import quota_periods
from results.record import Machine

CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Snapshot:
    """Counters of the machine at one moment, in seconds since it started.

    Attributes:
        total: of all cores together, idle or not.
        busy: of these, spent on anything.
        steal: spent by a hypervisor on other machines.
        own: worker -> spent by its process, as long as it lives.
        ended: spent by workers that have ended.
        throttled: how often cores were slowed down for their temperature.
        periods, stopped: of a container's CPU quota, and in how many of them it stopped processes.
    """

    total: float
    busy: float
    steal: float
    own: dict[Worker, float]
    ended: float
    throttled: int
    periods: int = 0
    stopped: int = 0


def snapshot(workers: Iterable[Worker], hosts: Hosts) -> Snapshot:
    """Reads the counters.

    Args:
        workers: of the runs that are being measured.
        hosts: that they were forked from.
    """
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", 0.0)
    # Guests' time is in user time, too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    seconds = {worker: worker.cpu_seconds() for worker in workers}
    own = {worker: spent for worker, spent in seconds.items() if spent is not None}
    ended = hosts.ended_seconds()
    busy = total - idle - steal
    return Snapshot(total, busy, steal, own, ended, _throttle_count(), *quota_periods())


def _throttle_count() -> int:
    counts = CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    try:
        return sum(int(path.read_text()) for path in counts)
    except (OSError, ValueError):
        return 0


def within(spans: Sequence[tuple[Snapshot, Snapshot]]) -> Machine:
    """What happened within some spans of time, each given by its beginning and its end."""
    total = max(1e-9, sum(after.total - before.total for before, after in spans))
    steal = sum(max(0.0, after.steal - before.steal) for before, after in spans)
    others = sum(_others_seconds(before, after) for before, after in spans)
    return Machine(
        steal_share=steal / total,
        others_share=min(1.0, others / total),
        thermal_throttles=sum(after.throttled - before.throttled for before, after in spans),
        quota_periods=sum(after.periods - before.periods for before, after in spans),
        quota_stops=sum(after.stopped - before.stopped for before, after in spans),
    )


def _others_seconds(before: Snapshot, after: Snapshot) -> float:
    """What other processes have spent meanwhile."""
    return max(0.0, after.busy - before.busy - _own_seconds(before, after))


def _own_seconds(before: Snapshot, after: Snapshot) -> float:
    """What the workers have spent meanwhile.

    The system no longer counts one that died, but has added all of its time, that of preparation
    included, to what has ended. Where it does not, nothing is known of what it spent meanwhile.
    """
    lived = [after.own[key] - seconds for key, seconds in before.own.items() if key in after.own]
    gone = [seconds for key, seconds in before.own.items() if key not in after.own]
    died = after.ended - before.ended - sum(gone) if gone else 0.0
    return sum(max(0.0, seconds) for seconds in (*lived, died))
