#!/usr/bin/env python3
"""Compares two result files of run_blade.py: what became faster or slower, and what broke.

A run of one file is paired with that of the same test model, backend and precision in the other.
Between two invocations a machine's speed drifts by tens of percent, so a run is judged by its
speedup over the baseline, whose calls were made in the same rounds: the ratio of the two speedups.
On a machine that is known to be quiet, --absolute compares the times themselves.

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
    add("--absolute", action="store_true", help="compare times, not speedups over the baseline")
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
class Comparison:
    """What became of a run.

    Attributes:
        ratio: how much faster it is now: above 1, it is faster.
        low, high: 95% interval of the ratio; None with too few rounds.
        verdict: `faster`, `slower`, `same`, `inconclusive`, or `-` where times were not compared.
        changes: of status and detections, in words.
        failures: of `FAILURES`, those that it is a case of.
    """

    pair: Pair
    ratio: Optional[float]
    low: Optional[float]
    high: Optional[float]
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
    old, new = results.facts(before), results.facts(after)
    return next((f"{name} differs" for name in DECISIVE if old.get(name) != new.get(name)), None)


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


def compare(pair: Pair, threshold: float, absolute: bool) -> Comparison:
    """Judges a pair.

    Args:
        threshold: differences below this share do not matter.
        absolute: whether times are compared, not speedups over the baseline.
    """
    changes, failures = _changes(pair)
    if pair.obstacle is not None:
        return Comparison(pair, None, None, None, "-", changes, failures)
    ratio, low, high = _ratio(pair, absolute)
    known = low is not None and high is not None
    verdict = benchmark.verdict(low, high, threshold) if known else "inconclusive"
    if pair.after["baseline"] and not absolute and verdict in ("faster", "slower"):
        # It, or the machine? Nothing in the files can tell.
        verdict = "inconclusive"
    if verdict == "slower":
        failures = ("slower", *failures)
    return Comparison(pair, ratio, low, high, verdict, changes, failures)


def _changes(pair: Pair) -> Tuple[List[str], Tuple[str, ...]]:
    """What changed but for the time, in words, and which of `FAILURES` that is."""
    old, new = pair.before, pair.after
    changes: List[str] = []
    failures: Tuple[str, ...] = ()
    if old["status"] != new["status"]:
        reason = f" ({new['reason']})" if new["reason"] else ""
        changes.append(f"{old['status']} before, {new['status']} after{reason}")
        if new["status"] == "mismatch":
            failures = ("wrong",)
        elif new["status"] in ("failed", "unsupported"):
            failures = ("broken",)
    counts = [_matched(run) for run in (old, new)]
    if None not in counts and counts[0] != counts[1]:
        changes.append(f"detections: {counts[0]} before, {counts[1]} after")
    return changes, failures


def _matched(run: Dict[str, Any]) -> Optional[str]:
    """Matched of expected detections at each size."""
    if not run["detections"]:
        return None
    return ", ".join(
        f"{size} {found['matched']}/{found['expected']}"
        for size, found in run["detections"].items()
    )


def _ratio(pair: Pair, absolute: bool) -> Tuple[float, Optional[float], Optional[float]]:
    """How much faster a run is now, with its interval from resampling whole rounds of each file."""
    sides = []
    for group, run in zip(pair.groups, (pair.before, pair.after)):
        samples = [run["samples_s"]]
        baseline = next(x["samples_s"] for x in group["runs"] if x["baseline"])
        if not absolute and not run["baseline"] and baseline:
            samples.append(baseline)
        shared = min(len(x) for x in samples)
        sides.append(np.array([x[:shared] for x in samples]))
    if {len(side) for side in sides} != {2}:  # In one of them the baseline failed.
        sides = [side[:1] for side in sides]
    slowness = [_slowness(np.median(side, axis=1)) for side in sides]
    ratio = float(slowness[0] / slowness[1])
    if min(side.shape[1] for side in sides) < benchmark.LEAST_ROUNDS:
        return ratio, None, None
    generator = np.random.default_rng(0)
    resampled = [
        _slowness(benchmark.bootstrap_medians(side, RESAMPLES, generator)) for side in sides
    ]
    low, high = np.quantile(resampled[0] / resampled[1], (0.025, 0.975))
    return ratio, float(low), float(high)


def _slowness(medians: np.ndarray) -> np.ndarray:
    """Medians of a run, over those of the baseline where they are given, too."""
    return medians[0] / medians[1] if len(medians) == 2 else medians[0]


HEADER = ("Model", "Backend", "precision", "before(ms)", "after(ms)", "Speed", "95% interval")


def report(
    before: Dict[str, Any], after: Dict[str, Any], compared: Sequence[Comparison], absolute: bool
) -> str:
    """The comparison in Markdown: what differs first, then the runs, then what else there is."""
    lines = ["What differs:", ""]
    lines += [
        f"- {line}" for line in results.differences(before, after) or ["nothing that is recorded"]
    ]
    grid, below = [[*HEADER, "Verdict", "Detections and status"]], []
    for comparison in compared:
        grid.append(_cells(comparison))
        if comparison.pair.obstacle:
            name = " ".join(grid[-1][:3])
            below.append(f"{name}: times not compared, as {comparison.pair.obstacle}")
    what = "times" if absolute else "speedups over the baseline in the same rounds"
    below.append(
        f"Speed: above 1, it is faster now; a ratio of {what}. The baseline's own is one of times"
    )
    for title, own, other in (("missing", before, after), ("new", after, before)):
        names = [" ".join(key) for key in runs_of(own) if key not in runs_of(other)]
        below += [f"{title}: {name}" for name in names]
    rights = [False] * 3 + [True] * 3 + [False] * 3
    lines += ["", *benchmark.markdown(grid, rights), "", *(f"- {line}" for line in below)]
    return "\n".join(lines)


def _cells(comparison: Comparison) -> List[str]:
    pair = comparison.pair
    model, _, precision = pair.key
    times = [
        f"{run['statistics']['median_ms']:.1f}" if run["statistics"] else "-"
        for run in (pair.before, pair.after)
    ]
    known = comparison.low is not None and comparison.high is not None
    return [
        benchmark.short_name(model),
        pair.after["label"],
        precision,
        *times,
        "-" if comparison.ratio is None else f"{comparison.ratio:.3f}",
        f"{comparison.low:.3f} to {comparison.high:.3f}" if known else "-",
        comparison.verdict,
        "; ".join(comparison.changes) or "unchanged",
    ]


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
        compared = [
            compare(pair, options.threshold, options.absolute) for pair in pairs(before, after)
        ]
        if all(comparison.pair.obstacle and not comparison.changes for comparison in compared):
            raise InputError(f"nothing can be compared: {compared[0].pair.obstacle}")
    except InputError as error:
        print(f"{parse.prog}: error: {error}", file=sys.stderr)
        return 2
    print(report(before, after, compared, options.absolute))
    return exit_code(compared, options.fail_on)


if __name__ == "__main__":
    sys.exit(main())
