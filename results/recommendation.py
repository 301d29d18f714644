"""The answer: which run to ship under the constraints that were given, and why.

The fastest one that qualifies. Of those that differ by less than the machine can resolve, it is the
simplest: the one with the fewest packages beside PyTorch, then the higher precision, then the one
that stands first in the table. Speed is that over Torch fp32 in the same rounds, so that precisions
can be compared.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median
from typing import Dict, List, Optional, Sequence, Tuple

import benchmark
from benchmark import MARGIN, BreakEven, Speedup
from models import runner
from results.facts import TASKS, Case, case, case_name
from results.record import (
    Candidate,
    Constraints,
    Exclusion,
    Group,
    Recommendation,
    Results,
    Run,
    Settings,
)
from results.tables import describe_break_even, describe_difference, percent

# The higher, the nearer to what was trained.
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
# Where no smaller difference can be told, the simplest run is not much of an answer.
NOISY = 0.1
# Calls of new sizes that are longer than others by this factor are a cost.
LONGER = 1.1
# What every run needs.
PYTORCH = ("torch", "torchvision")


def recommend(results: Results) -> Tuple[Recommendation, ...]:
    """Which run of each model to ship."""
    cases = dict.fromkeys(case(group) for group in results.groups if not group.image)
    return tuple(_of_case(results, each) for each in cases)


def constraints(settings: Settings) -> Constraints:
    """Those of a command line."""
    return Constraints(
        settings.max_latency_ms,
        settings.min_ap_ratio,
        settings.max_memory_mb,
        settings.max_prepare_s,
    )


def _of_case(results: Results, which: Case) -> Recommendation:
    groups = [group for group in results.groups if case(group) == which]
    limits = constraints(results.settings)
    resolved = results.aa.resolution if results.aa else None
    resolution = max(MARGIN, resolved or 0.0)
    runs = list(_candidates(groups, limits, results.settings.seed))
    qualified = [x for x in runs if not x.excluded]
    ship, is_tie = _best(qualified, resolution)
    rest = [x for x in qualified if x is not ship]
    runner_up = _best(rest, resolution)[0]
    others = [x for x in runs if x not in (ship, runner_up)]
    judged = any(run.accuracy and run.accuracy.tasks for x in groups for run in x.runs)
    evaluated = [group.evaluated.images for group in groups if group.evaluated and judged]
    weights = [group.weights for group in groups if group.weights]
    return Recommendation(
        model=case_name(which),
        constraints=limits,
        baseline=f"{runner(groups[0].export)} fp32",
        ship=ship,
        runner_up=runner_up,
        is_tie=is_tie,
        others=tuple(sorted(others, key=lambda x: -x.ratio)),
        resolution=resolution,
        images=evaluated[0] if evaluated else None,
        is_synthetic=any(x.source == "synthetic" for x in weights),
    )


# Candidates ------------------------------------------------------------------------------------


def _candidates(groups: Sequence[Group], limits: Constraints, seed: int) -> List[Candidate]:
    """All runs, in the order of the tables; Torch fp32 stands in several of them."""
    found: Dict[Tuple[str, str], Candidate] = {}
    torch_s = [
        run.prepare.own
        for group in groups
        for run in group.runs
        if run.baseline and run.requested_precision == "fp32" and run.prepare
    ]
    for group in groups:
        for run in group.runs:
            key = (run.name, run.requested_precision)
            if key not in found:
                found[key] = _candidate(group, run, limits, torch_s[0] if torch_s else 0.0, seed)
    timed = [group for group in groups if group.fp32_samples_s]
    reference = (groups[0].baseline.name, "fp32")
    if reference not in found and timed:
        return [_unlisted_reference(timed[0], limits), *found.values()]
    return list(found.values())


def _unlisted_reference(group: Group, limits: Constraints) -> Candidate:
    """Torch fp32, where it took part in the rounds and has no row: its memory is not known."""
    samples = group.fp32_samples_s
    known = Candidate(
        run=group.baseline.name,
        label=group.baseline.label,
        precision="fp32",
        median_ms=1000 * median(samples),
    )
    return replace(known, excluded=_beyond(known, limits))


def _over_fp32(group: Group, run: Run) -> Tuple[Optional[Speedup], Tuple[float, ...]]:
    """The speedup over Torch fp32, and that one's samples of the same rounds."""
    if group.baseline.requested_precision == "fp32":
        return run.speedup, group.baseline.samples_s
    return run.speedup_over_fp32, group.fp32_samples_s


def _candidate(group: Group, run: Run, limits: Constraints, torch_s: float, seed: int) -> Candidate:
    """What counts of a run.

    Args:
        torch_s: seconds that Torch fp32 takes to prepare.
    """
    is_torch_fp32 = run.baseline and run.requested_precision == "fp32"
    speedup, baseline = (None, ()) if is_torch_fp32 else _over_fp32(group, run)
    pays_back: Optional[BreakEven] = None
    if run.prepare and baseline and run.samples_s:
        extra_s = run.prepare.own - torch_s
        pays_back = benchmark.break_even(
            baseline, run.samples_s, extra_s, group.images_per_call, seed, group.generations
        )
    tasks = run.accuracy.tasks if run.accuracy else {}
    memory = run.peak_device_memory_mb
    known = Candidate(
        run=run.name,
        label=run.label,
        precision=run.requested_precision,
        median_ms=run.statistics.median_ms if run.statistics else None,
        new_size_ms=1000 * median(run.new_size_s) if run.new_size_s else None,
        speedup=speedup,
        ap={task: x.ap for task, x in tasks.items() if x.ap is not None},
        # Of each class they stand in the run's own record.
        ap_differences={
            task: replace(x.difference, classes={}) for task, x in tasks.items() if x.difference
        },
        memory_mb=run.peak_memory_mb if memory is None else memory,
        prepare_s=run.prepare.total if run.prepare else None,
        pays_back=pays_back,
        packages=sum(1 for name in run.versions if name not in PYTORCH),
    )
    return replace(known, excluded=_excluded(group, run, known, limits, is_torch_fp32))


def _excluded(
    group: Group, run: Run, known: Candidate, limits: Constraints, is_torch_fp32: bool
) -> Tuple[Exclusion, ...]:
    """Why a run does not qualify."""
    if run.status == "mismatch":
        return ("mismatch", *_beyond(known, limits))
    if run.status != "ok" or known.median_ms is None or group.stopped == "interrupted":
        return ("failed",)
    found: List[Exclusion] = []
    # What computes at another precision than it was asked for stands there, too.
    if group.evaluated and not is_torch_fp32:
        verdict = run.accuracy.verdict if run.accuracy else None
        if verdict != "keeps":
            found.append("ap")
    return (*found, *_beyond(known, limits))


def _beyond(known: Candidate, limits: Constraints) -> Tuple[Exclusion, ...]:
    """Which limits a run does not keep to."""
    values: Tuple[Tuple[Exclusion, Optional[float], Optional[float]], ...] = (
        ("latency", known.median_ms, limits.max_latency_ms),
        ("memory", known.memory_mb, limits.max_memory_mb),
        ("prepare", known.prepare_s, limits.max_prepare_s),
    )
    return tuple(
        name for name, value, most in values if most is not None and (value is None or value > most)
    )


# The best --------------------------------------------------------------------------------------


def _best(candidates: Sequence[Candidate], resolution: float) -> Tuple[Optional[Candidate], bool]:
    """The fastest, or the simplest of those about as fast; and whether there were any.

    Args:
        candidates: in the order of the tables.
    """
    if not candidates:
        return None, False
    fastest = max(candidates, key=lambda x: x.ratio)
    level = [x for x in candidates if x.ratio * (1 + resolution) >= fastest.ratio]
    simplest = min(level, key=lambda x: (x.packages, PRECISIONS.index(x.precision)))
    return simplest, len(level) > 1


def is_sure(one: Candidate, other: Candidate) -> bool:
    """Whether one is known to be faster than another.

    Their ratio is that of their speedups over Torch fp32. Its interval takes these for independent,
    so it is rather too wide for two runs of the same rounds. Without intervals, there were too few
    rounds for them, and nothing is sure.
    """
    if any(x.speedup is not None and x.speedup.low is None for x in (one, other)):
        return False
    width = math.hypot(_log_half_width(one), _log_half_width(other))
    return math.log(one.ratio / other.ratio) > width


def _log_half_width(candidate: Candidate) -> float:
    speedup = candidate.speedup
    if speedup is None or speedup.low is None or speedup.high is None:
        return 0.0
    return math.log(speedup.high / speedup.low) / 2


# In words --------------------------------------------------------------------------------------


def sentences(answer: Recommendation) -> Tuple[str, ...]:
    """Four lines: what to ship, what it costs, the runner-up, and what would change the answer."""
    if answer.ship is None:
        reasons = "; ".join(f"{x.name} ({_why_not(x, answer)})" for x in answer.others)
        return (
            f"Ship: nothing that was measured of {answer.model} qualifies.",
            f"Why: {reasons}." if reasons else "Why: nothing was measured.",
            _on_ap(answer),
            f"To change that: {_what_would_change(answer)}.",
        )
    return (
        f"Ship: {answer.ship.name}, {_speed(answer.ship, answer)}{_noise(answer)}.",
        f"Costs: {_costs(answer.ship)}. {_on_ap(answer)}",
        f"Next: {_next(answer)}.",
        f"To change that: {_what_would_change(answer)}.",
    )


def _noise(answer: Recommendation) -> str:
    """What to do where the machine was so noisy that the answer may be another one."""
    if not answer.is_tie or answer.resolution < NOISY:
        return ""
    return (
        f"; only differences of {100 * answer.resolution:.0f}% could be told here: measure again "
        "while the machine is quiet"
    )


def _speed(ship: Candidate, answer: Recommendation) -> str:
    call = f"{ship.median_ms:.4g} ms a call"
    if ship.speedup is None:
        if answer.runner_up is None:
            return call
        return f"{call}: nothing that qualifies is faster by more than can be told from noise"
    sure = " (in too few rounds for an interval)"
    if ship.speedup.low is not None and ship.speedup.high is not None:
        sure = f" ({ship.speedup.low:.2f} to {ship.speedup.high:.2f} with 95% confidence)"
    return f"{ship.speedup.ratio:.2f}x as fast as {answer.baseline}{sure}, {call}"


def _costs(ship: Candidate) -> str:
    parts = []
    for task, ap in ship.ap.items():
        difference = ship.ap_differences.get(task)
        told = "" if difference is None else f" ({describe_difference(difference)})"
        parts.append(f"{TASKS[task]} AP {percent(ap)}{told}")
    if ship.new_size_ms and ship.median_ms and ship.new_size_ms > LONGER * ship.median_ms:
        parts.append(f"{ship.new_size_ms:.4g} ms for an image of a new size")
    if ship.memory_mb is not None:
        parts.append(f"{ship.memory_mb:.0f} MiB of memory")
    if ship.prepare_s is not None:
        parts.append(f"{ship.prepare_s:.1f} s to prepare")
    if ship.pays_back is not None and ship.pays_back.images is not None:
        parts.append(f"paid back after {describe_break_even(ship.pays_back)} images")
    if ship.packages:
        parts.append(f"{ship.packages} package{'s' * (ship.packages > 1)} beside PyTorch")
    return ", ".join(parts)


def _on_ap(answer: Recommendation) -> str:
    """What stands behind the precision."""
    if answer.images is not None:
        return f"AP was looked at on {answer.images} images."
    weights = ", and its weights are synthetic" if answer.is_synthetic else ""
    vouched = (
        ""
        if answer.ship is None or answer.ship.precision == "fp32"
        else (f": nothing says what {answer.ship.precision} costs{weights}")
    )
    best = [
        x
        for x in (answer.runner_up, *answer.others)
        if x is not None and x.precision == "fp32" and not x.excluded
    ]
    at_fp32 = ""
    if vouched and best:
        fastest = max(best, key=lambda x: x.ratio)
        at_fp32 = f"; at fp32 it would be {fastest.name}, {fastest.ratio:.2f}x"
    return f"AP was not looked at (--dataset){vouched}{at_fp32}."


def _next(answer: Recommendation) -> str:
    other, ship = answer.runner_up, answer.ship
    if other is None or ship is None:
        return "nothing else qualifies"
    name = f"{other.name}, {other.ratio:.2f}x"
    if ship.ratio > other.ratio * (1 + answer.resolution):
        doubt = "" if is_sure(ship, other) else ", but that is not certain"
        return f"{name}: {ship.name} is {ship.ratio / other.ratio:.2f}x as fast{doubt}"
    if other.packages > ship.packages:
        return f"{name}: no faster than can be told from noise, and it needs more packages"
    if PRECISIONS.index(other.precision) > PRECISIONS.index(ship.precision):
        return f"{name}: no faster than can be told from noise, at a lower precision"
    return f"{name}: no faster than can be told from noise"


def _why_not(candidate: Candidate, answer: Recommendation) -> str:
    """Which constraints exclude a run."""
    limits = answer.constraints
    reasons: Dict[Exclusion, str] = {
        "failed": "it was not measured to the end",
        "mismatch": f"it does not find what {answer.baseline} finds",
        "ap": _why_not_ap(candidate, answer),
        "latency": f"{candidate.median_ms or 0:.4g} ms a call, --max-latency-ms "
        f"{limits.max_latency_ms or 0:g}",
        "memory": f"{candidate.memory_mb or 0:.0f} MiB, --max-memory-mb "
        f"{limits.max_memory_mb or 0:g}",
        "prepare": f"{candidate.prepare_s or 0:.1f} s to prepare, --max-prepare-s "
        f"{limits.max_prepare_s or 0:g}",
    }
    return "; ".join(reasons[each] for each in candidate.excluded)


def _why_not_ap(candidate: Candidate, answer: Recommendation) -> str:
    kept = f"--min-ap-ratio {answer.constraints.min_ap_ratio:g}"
    for verdict in ("loses", "too few"):
        for task, known in candidate.ap_differences.items():
            if known.verdict == verdict:
                return f"{TASKS[task]} AP {describe_difference(known)}, {kept}"
    return f"its AP is not known, {kept}"


def _what_would_change(answer: Recommendation) -> str:
    """The fastest run that does not qualify, and what it takes; or that nothing is faster.

    Limits can be loosened, and AP may be kept on more images. What finds something else, or fails,
    comes last.
    """
    ship = answer.ship
    faster = [
        x
        for x in answer.others
        if x.excluded
        and x.ratio > 0
        and (ship is None or x.ratio > ship.ratio * (1 + answer.resolution))
    ]
    if not faster:
        if ship is None:
            return "looser constraints, or another engine"
        return (
            "nothing that was measured is faster; "
            f"below --max-latency-ms {_down(ship.median_ms)} none would be left"
        )
    best = min(faster, key=lambda x: bool({"failed", "mismatch"} & set(x.excluded)))
    name = f"{best.name} ({best.ratio:.2f}x)"
    values: Dict[Exclusion, Tuple[str, Optional[float]]] = {
        "latency": ("--max-latency-ms", best.median_ms),
        "memory": ("--max-memory-mb", best.memory_mb),
        "prepare": ("--max-prepare-s", best.prepare_s),
    }
    conditions: Dict[Exclusion, str] = {
        "failed": "it did not fail",
        "mismatch": f"it found what {answer.baseline} finds",
        "ap": _ap_condition(best),
    }
    limits = [" ".join((values[x][0], _up(values[x][1]))) for x in best.excluded if x in values]
    others = [conditions[x] for x in best.excluded if x in conditions]
    would = f" would do with {' and '.join(limits)}" if limits else ""
    return f"{name}{would}{f', if {others[0]}' if others else ''}"


def _ap_condition(best: Candidate) -> str:
    needed = [x.images_needed for x in best.ap_differences.values() if x.verdict == "too few"]
    if any(x.verdict == "loses" for x in best.ap_differences.values()):
        return "it kept its AP"
    if needed and None not in needed:
        return f"about {max(filter(None, needed))} images told that it keeps its AP"
    return "it were known to keep its AP"


def _up(value: Optional[float]) -> str:
    """A limit that just lets a value pass: three digits, rounded up."""
    if not value:
        return "0"
    return f"{math.ceil(value / _step(value)) * _step(value):.10g}"


def _down(value: Optional[float]) -> str:
    """A limit that a value just breaks, or meets: three digits, rounded down."""
    if not value:
        return "0"
    return f"{math.floor(value / _step(value)) * _step(value):.10g}"


def _step(value: float) -> float:
    """What the third digit of a value stands for."""
    return 10.0 ** (math.floor(math.log10(value)) - 2)
