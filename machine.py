"""Was the machine quiet: what else it did while runs were timed, as far as the system tells."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import psutil

import results

CPUS = Path("/sys/devices/system/cpu")
# Beyond these a reader should know. A quarter of a core on two of them is an eighth.
MOST_IQR = 0.10
MOST_STEAL = 0.02
MOST_OTHERS = 0.10


@dataclass(frozen=True)
class Snapshot:
    """Counters of the machine at one moment, in seconds since it started.

    Attributes:
        total: of all cores together, idle or not.
        busy: of these, spent on anything.
        steal: spent by a hypervisor on other machines.
        own: pid -> spent by a process that is being measured; only those that live.
        ended: spent by processes that this one has started and that have ended.
        throttled: how often cores were slowed down for their temperature.
    """

    total: float
    busy: float
    steal: float
    own: Dict[int, float]
    ended: float
    throttled: int


def snapshot(pids: Iterable[int]) -> Snapshot:
    """Reads the counters.

    Args:
        pids: of the processes that are being measured, started by this one, which have no children
            that compute.
    """
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", 0.0)
    # Guests' time is in user time, too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    seconds = {pid: _cpu_seconds(pid) for pid in pids}
    own = {pid: spent for pid, spent in seconds.items() if spent is not None}
    of_ours = os.times()
    ended = of_ours.children_user + of_ours.children_system
    return Snapshot(total, total - idle - steal, steal, own, ended, _throttle_count())


def _cpu_seconds(pid: int) -> Optional[float]:
    """Of a process and of its children that have ended, which the system adds to `ended`, too."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:  # It died: that is told elsewhere.
        return None
    return times.user + times.system + times.children_user + times.children_system


def _throttle_count() -> int:
    counts = CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    return sum(int(path.read_text()) for path in counts)


def between(before: Snapshot, after: Snapshot) -> Dict[str, Any]:
    """What happened meanwhile.

    Returns:
        `steal_share` and `others_share`: of the machine's cores, taken by a hypervisor and by
        other processes, 0 to 1; `thermal_throttles`: how often cores were slowed down.
    """
    total = max(after.total - before.total, 1e-9)
    others = after.busy - before.busy - _own_seconds(before, after)
    return {
        "steal_share": max(0.0, after.steal - before.steal) / total,
        "others_share": min(1.0, max(0.0, others / total)),
        "thermal_throttles": after.throttled - before.throttled,
    }


def _own_seconds(before: Snapshot, after: Snapshot) -> float:
    """What the processes that are being measured have spent meanwhile.

    The system no longer counts one that died, but has added all of its time, that of preparation
    included, to what has ended. Where it does not, nothing is known of what it spent meanwhile.
    """
    lived = [after.own[pid] - seconds for pid, seconds in before.own.items() if pid in after.own]
    gone = [seconds for pid, seconds in before.own.items() if pid not in after.own]
    died = after.ended - before.ended - sum(gone) if gone else 0.0
    return sum(max(0.0, seconds) for seconds in (*lived, died))


def general_warnings(environment: Dict[str, Any]) -> List[str]:
    """Why a reader should be careful with all that was measured, from a file's environment."""
    governor = environment.get("cpu", {}).get("governor")
    if governor in (None, "performance"):
        return []
    return [f"the CPU's frequency may change or be held low (governor {governor})"]


def warnings(group: Dict[str, Any], least_rounds: int) -> List[str]:
    """Why a reader should be careful with a group of a result file, in words.

    Args:
        least_rounds: that were wanted in any case.
    """
    where = f"{results.case_name(results.case(group))} {group['precision']}"
    found = []
    for run in group["runs"]:
        spread = run["statistics"] and run["statistics"]["relative_iqr"]
        if spread and spread > MOST_IQR:
            share = f"{100 * spread:.0f}% of the median"
            found.append(f"{where}, {run['label']}: the middle half of its calls spans {share}")
    if group.get("image"):
        return found  # All else is said of the group of all images, whose rounds are the same.
    machine = group.get("machine") or {}
    if machine.get("steal_share", 0) > MOST_STEAL:
        share = f"{100 * machine['steal_share']:.0f}%"
        found.append(f"{where}: other virtual machines took {share} of the cores")
    if machine.get("others_share", 0) > MOST_OTHERS:
        share = f"{100 * machine['others_share']:.0f}%"
        found.append(f"{where}: other processes took {share} of the cores")
    if machine.get("thermal_throttles"):
        found.append(f"{where}: the CPU was slowed down for its temperature")
    reasons = [reason for state in group.get("gpu", ()) for reason in state.get("throttled", ())]
    if reasons:
        why = ", ".join(dict.fromkeys(reasons))
        found.append(f"{where}: the GPU was throttled ({why})")
    if group["stopped"] == "time budget" and group["rounds"] < least_rounds:
        found.append(
            f"{where}: {group['rounds']} rounds fit in the time budget, {least_rounds} were wanted"
        )
    return found
