#!/usr/bin/env python3
"""Compares two result files of run_blade.py: what became faster or slower, and what broke.

A run of one file is paired with that of the same test model, backend and precision in the other.
Between two invocations a machine's speed drifts, by tens of percent, and not for all alike: on a
shared one, whoever moves most memory suffers most from its neighbours. So a run is judged twice: by
its times, as if the machine were the same, and by its speedups over the baseline, whose calls were
made in the same rounds, as if both had suffered alike. The truth lies between as long as the
baseline suffers most, and a verdict is one that both give: faster or slower, if the ratio exceeds
the threshold and its interval excludes 1; same, if its interval lies within the threshold; else
inconclusive, as also where the baseline itself has changed by a quarter. Where one of the two is
known to hold, --by goes by that alone.

Exit codes: 0; with --fail-on 3, a run is slower; 4, one finds something else than it did; 5, one
does not run any more (the largest counts); 2, wrong usage, unreadable file, nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

import benchmark
import results
from errors import InputError, Parser

# What --fail-on knows, with its exit code.
FAILURES = {"slower": 3, "wrong": 4, "broken": 5}
RESAMPLES = 4000
BY = ("both", "time", "speedup")
# Where the baseline itself has changed by more than this factor, it is another machine in all but
# name: on one that took twice as long, an engine was seen to suffer more than the baseline.
MOST_DRIFT = 1.25
# Where one of these differs it is another machine, or another task.
DECISIVE = (
    *("cpu.model", "cpu.usable_cores", "gpu", "--device", "--source", "--threads"),
    *("--image", "--image-size", "--weights", "--detections", "--seed"),
)

Key = Tuple[str, str, str]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(description="Compare two result files of run_blade.py.")
    add = parse.add_argument
    add("before", metavar="before.json")
    add("after", metavar="after.json")
    add(
        "--threshold",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="differences below this do not matter (default: 0.05)",
    )
    add(
        "--fail-on",
        type=_failures,
        default=(),
        metavar="slower,wrong,broken",
        help="exit with 3, 4 or 5 then; the largest counts",
    )
    add(
        "--by",
        choices=BY,
        default="both",
        help="what a verdict stands on: time, for a quiet machine of its own; speedup over the "
        "baseline, where all runs slow down alike; both must agree (default)",
    )
    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share between 0 and 1, like 0.05")
    return value


def _failures(text: str) -> Tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in FAILURES:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(FAILURES)}")
    return names


@dataclass(frozen=True)
class Pair:
    """The same run in two files.

    Attributes:
        before, after: records of the run, as in the result file.
        groups: that they belong to.
        obstacle: why their times cannot be compared, in words; None where they can.
    """

    key: Key
    before: Dict[str, Any]
    after: Dict[str, Any]
    groups: Tuple[Dict[str, Any], Dict[str, Any]]
    obstacle: Optional[str]


@dataclass(frozen=True)
class Ratio:
    """How much faster a run is now: above 1, it is faster.

    Attributes:
        low, high: 95% interval; None with too few rounds.
    """

    ratio: float
    low: Optional[float]
    high: Optional[float]

    def verdict(self, threshold: float) -> str:
        """What this ratio alone says.

        `slower`: its interval lies below 1, and it by more than the threshold; `faster` likewise;
        `same`: its interval lies within the threshold; else `inconclusive`.
        """
        if self.low is None or self.high is None:
            return "inconclusive"
        if self.high < 1 and self.ratio < 1 - threshold:
            return "slower"
        if self.low > 1 and self.ratio > 1 + threshold:
            return "faster"
        is_within = self.low >= 1 - threshold and self.high <= 1 + threshold
        return "same" if is_within else "inconclusive"


@dataclass(frozen=True)
class Comparison:
    """What became of a run.

    Attributes:
        time: ratio of its median times; None where times were not compared.
        speedup: ratio of its speedups over the baseline; None also for the baseline, and where
            that was not measured.
        verdict: `faster`, `slower`, `same`, `inconclusive`, or `-` where times were not compared.
        changes: of status and detections, in words.
        failures: of `FAILURES`, those that it is a case of.
    """

    pair: Pair
    time: Optional[Ratio]
    speedup: Optional[Ratio]
    verdict: str
    changes: List[str]
    failures: Tuple[str, ...]


def runs_of(document: Dict[str, Any]) -> Dict[Key, Tuple[Dict[str, Any], Dict[str, Any]]]:
    """Test model, backend and requested precision of the group -> group and run."""
    return {
        (results.case_name(results.case(group)), run["backend"], group["precision"]): (group, run)
        for group in document["groups"]
        for run in group["runs"]
    }


def pairs(before: Dict[str, Any], after: Dict[str, Any]) -> List[Pair]:
    """The runs that both files have, with what stands against comparing them.

    Raises:
        errors.InputError: there is none.
    """
    old, new = runs_of(before), runs_of(after)
    both = [key for key in old if key in new]
    if not both:
        raise InputError("the two files have no run in common: nothing to compare")
    general = _general_obstacle(before, after)
    return [
        Pair(
            key=key,
            before=old[key][1],
            after=new[key][1],
            groups=(old[key][0], new[key][0]),
            obstacle=general or _obstacle(old[key], new[key]),
        )
        for key in both
    ]


def _general_obstacle(before: Dict[str, Any], after: Dict[str, Any]) -> Optional[str]:
    """What makes no run of two files comparable: another machine, or another task."""
    names = results.differing(before, after)
    return next((f"{name} differs" for name in DECISIVE if name in names), None)


def _obstacle(
    before: Tuple[Dict[str, Any], Dict[str, Any]], after: Tuple[Dict[str, Any], Dict[str, Any]]
) -> Optional[str]:
    (old_group, old), (new_group, new) = before, after
    for name in ("export", "images_per_call", "image_sizes", "image_digest", "weights_digest"):
        if old_group.get(name) != new_group.get(name) and None not in (
            old_group.get(name),
            new_group.get(name),
        ):
            return f"{name.replace('_', ' ')} differs"
    if not old["samples_s"] or not new["samples_s"]:
        return "it was not measured " + ("before" if not old["samples_s"] else "after")
    for name in ("effective_precision", "label"):
        if old[name] != new[name]:
            return f"it ran as {old[name]} before, and as {new[name]} after"
    return None


def compare(pair: Pair, threshold: float, by: str) -> Comparison:
    """Judges a pair.

    Args:
        threshold: differences below this share do not matter.
        by: one of `BY`.
    """
    changes, failures = _changes(pair)
    if pair.obstacle is not None:
        return Comparison(pair, None, None, "-", changes, failures)
    time, speedup = _ratios(pair)
    verdict = _verdict(pair, time, speedup, threshold, by)
    if verdict == "slower":
        failures = ("slower", *failures)
    return Comparison(pair, time, speedup, verdict, changes, failures)


def _verdict(pair: Pair, time: Ratio, speedup: Optional[Ratio], threshold: float, by: str) -> str:
    by_time = time.verdict(threshold)
    if by == "time":
        return by_time
    if speedup is None:
        # The run, or the machine? Nothing in the files can tell.
        return "same" if by_time == "same" and by == "both" else "inconclusive"
    by_speedup = speedup.verdict(threshold)
    if by == "both" and _drift(pair) > MOST_DRIFT:
        return "inconclusive"
    return by_speedup if by == "speedup" or by_speedup == by_time else "inconclusive"


def _drift(pair: Pair) -> float:
    """By what factor, at least 1, the baseline's median differs; 1 where one was not measured."""
    samples = [_baseline(group) for group in pair.groups]
    if not all(samples):
        return 1.0
    before, after = (float(np.median(x)) for x in samples)
    return max(before / after, after / before)


def _baseline(group: Dict[str, Any]) -> List[float]:
    """Seconds of the calls of a group's baseline."""
    return next(run["samples_s"] for run in group["runs"] if run["baseline"])


def _changes(pair: Pair) -> Tuple[List[str], Tuple[str, ...]]:
    """What changed but for the time, in words, and which of `FAILURES` that is."""
    old, new = pair.before, pair.after
    changes: List[str] = []
    failures: Tuple[str, ...] = ()
    if old["status"] != new["status"]:
        changes.append(f"{old['status']} before, {new['status']} after")
        if new["status"] == "mismatch":
            failures = ("wrong",)
        elif new["status"] in ("failed", "unsupported"):
            failures = ("broken",)
    counts = [_matched(run) for run in (old, new)]
    changes += [
        f"detections at {size}: {counts[0][size]} before, {counts[1][size]} after"
        for size in counts[1]
        if counts[0].get(size, counts[1][size]) != counts[1][size]
    ]
    return changes, failures


def _matched(run: Dict[str, Any]) -> Dict[str, str]:
    """Matched of expected detections at each size."""
    return {
        size: f"{found['matched']}/{found['expected']}"
        for size, found in (run["detections"] or {}).items()
    }


def _ratios(pair: Pair) -> Tuple[Ratio, Optional[Ratio]]:
    """How much faster a run is now, by its times and by its speedups over the baseline."""
    own = [np.array([run["samples_s"]]) for run in (pair.before, pair.after)]
    with_baseline = []
    for group, (samples,) in zip(pair.groups, own):
        baseline = _baseline(group)
        shared = min(len(baseline), len(samples))
        with_baseline.append(np.array([samples[:shared], baseline[:shared]]))
    if pair.after["baseline"] or not all(side.size for side in with_baseline):
        return _ratio(own), None
    return _ratio(own), _ratio(with_baseline)


def _ratio(sides: Sequence[np.ndarray]) -> Ratio:
    """The ratio of slowness before and after, with its interval from resampling whole rounds.

    Args:
        sides: before and after, seconds of a run, or of it and of the baseline, by round.
    """
    before, after = (_slowness(np.median(side, axis=1)) for side in sides)
    ratio = float(before / after)
    if min(side.shape[1] for side in sides) < benchmark.LEAST_ROUNDS:
        return Ratio(ratio, None, None)
    generator = np.random.default_rng(0)
    before, after = (
        _slowness(benchmark.bootstrap_medians(side, RESAMPLES, generator)) for side in sides
    )
    low, high = np.quantile(before / after, (0.025, 0.975))
    return Ratio(ratio, float(low), float(high))


def _slowness(medians: np.ndarray) -> np.ndarray:
    """Medians of a run, over those of the baseline where they are given, too."""
    return medians[0] / medians[1] if len(medians) == 2 else medians[0]


HEADER = ("Model", "Backend", "precision", "before(ms)", "after(ms)", "by time", "by speedup")


def report(
    before: Dict[str, Any],
    after: Dict[str, Any],
    compared: Sequence[Comparison],
    threshold: float,
    by: str,
) -> str:
    """The comparison in Markdown: what differs first, then the runs, then what else there is."""
    lines = ["What differs:", ""]
    lines += [
        f"- {line}" for line in results.differences(before, after) or ["nothing that is recorded"]
    ]
    grid, below = [[*HEADER, "Verdict", "Detections and status"]], []
    for comparison in compared:
        grid.append(_cells(comparison))
        pair, name = comparison.pair, " ".join(grid[-1][:3])
        if pair.obstacle:
            below.append(f"{name}: times not compared, as {pair.obstacle}")
        elif by == "both" and pair.after["baseline"] and _drift(pair) > MOST_DRIFT:
            below.append(
                f"{name}: the baseline itself changed by a factor of {_drift(pair):.2f}, so that "
                "nothing is said of what ran beside it; --by decides what to go by"
            )
        if comparison.changes and pair.after["reason"]:
            below.append(f"{name}: {pair.after['reason']}")
    below.append(
        "by time, by speedup: how much faster it is now, with the 95% interval, and how much its "
        "speedup over the baseline in the same rounds has grown; above 1 is better"
    )
    whose = "what both say" if by == "both" else f"by {by}"
    below.append(
        f"Verdict, {whose}: slower or faster by more than {100 * threshold:g}%, with an interval "
        "that excludes 1"
    )
    for title, own, other in (("missing", before, after), ("new", after, before)):
        names = [" ".join(key) for key in runs_of(own) if key not in runs_of(other)]
        below += [f"{title}: {name}" for name in names]
    rights = [False] * 3 + [True] * 4 + [False] * 2
    lines += ["", *benchmark.markdown(grid, rights), "", *(f"- {line}" for line in below)]
    return "\n".join(lines)


def _cells(comparison: Comparison) -> List[str]:
    pair = comparison.pair
    model, _, precision = pair.key
    times = [
        f"{run['statistics']['median_ms']:.1f}" if run["statistics"] else "-"
        for run in (pair.before, pair.after)
    ]
    return [
        benchmark.short_name(model),
        pair.after["label"],
        precision,
        *times,
        _ratio_cell(comparison.time),
        _ratio_cell(comparison.speedup),
        comparison.verdict,
        "; ".join(comparison.changes) or "unchanged",
    ]


def _ratio_cell(ratio: Optional[Ratio]) -> str:
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.ratio:.3f}"
    return f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def exit_code(compared: Sequence[Comparison], fail_on: Sequence[str]) -> int:
    """The largest code of what happened and was asked for; else 0."""
    happened = {failure for comparison in compared for failure in comparison.failures}
    return max((FAILURES[name] for name in happened if name in fail_on), default=0)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command line; returns the exit code."""
    parse = parser()
    options = parse.parse_args(arguments)
    try:
        before, after = (results.load(path) for path in (options.before, options.after))
        compared = [compare(pair, options.threshold, options.by) for pair in pairs(before, after)]
        if all(comparison.pair.obstacle and not comparison.changes for comparison in compared):
            raise InputError(f"nothing can be compared: {compared[0].pair.obstacle}")
    except InputError as error:
        print(f"{parse.prog}: error: {error}", file=sys.stderr)
        return 2
    print(report(before, after, compared, options.threshold, options.by))
    return exit_code(compared, options.fail_on)


if __name__ == "__main__":
    sys.exit(main())
