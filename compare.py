#!/usr/bin/env python3
"""Compares two result files of run_blade.py: what became faster or slower, and what broke.

A run of one file is paired with that of the same test model, backend (and environment, if that has
a name) and precision in the other.
Between two invocations a machine's speed drifts, by tens of percent, and not for all alike: on a
shared one, whoever moves most memory suffers most from its neighbours. So a run is judged twice: by
its times, as if the machine were the same, and by its speedups over the baseline, whose calls were
made in the same rounds, as if both had suffered alike. The truth lies between as long as the
baseline suffers most, and a verdict is one that both give: faster or slower, if the ratio exceeds
the threshold and its interval excludes 1; same, if its interval lies within the threshold; else
inconclusive, as also where the baseline itself has changed by a quarter. Where one of the two is
known to hold, --by goes by that alone. The more runs there are, the more would be taken for slower
or faster by chance: so intervals are so wide that all of them hold together with 95% confidence
(Bonferroni).

Exit codes: 0; with --fail-on 3, a run is slower; 4, one finds something else than it did; 5, one
does not run any more, was interrupted, or was asked for and is not there (the largest counts); 2,
wrong usage, unreadable file, nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Collection, Dict, List, Optional, Sequence, Tuple

import numpy as np

import benchmark
from errors import InputError, Parser
from models import BLANK, DRAWN
from results import facts
from results.file import load, result_file
from results.record import Group, Results, Run
from results.tables import Table, left, markdown, percent, right, short_name

# What --fail-on knows, with its exit code.
FAILURES = {"slower": 3, "wrong": 4, "broken": 5}
# Of the bootstrap, and those that are to lie beyond either end of an interval.
RESAMPLES, LEAST_BEYOND = 4000, 20
BY = ("both", "time", "speedup")
# Where the baseline itself has changed by more than this factor, it is another machine in all but
# name: on one that took twice as long, an engine was seen to suffer more than the baseline.
MOST_DRIFT = 1.25
# Where one of these differs, times are those of another machine; what is found may be compared.
MACHINE = ("cpu.model", "cpu.flags", "cpu.usable_cores", "gpu", "--device", "--threads")
# Where one of these differs, nothing can be compared: it is another task.
TASK = (
    *("configuration", "--source", "--image", "--image-size", "--weights", "--detections"),
    "--seed",
)

# Case, name of a run and precision of its group.
Key = Tuple[str, str, str]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(description="Compare two result files of run_blade.py.")
    add = parse.add_argument
    add("before", metavar="before.json", type=result_file, help="or the folder that has it")
    add("after", metavar="after.json", type=result_file, help="or the folder that has it")
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
        key: how the two were found.
        before, after: the run in each of them.
        groups: that they belong to.
        obstacle: why their times cannot be compared; None where they can.
        same_task: whether what they find can be compared.
    """

    key: Key
    before: Run
    after: Run
    groups: Tuple[Group, Group]
    obstacle: Optional[str]
    same_task: bool


@dataclass(frozen=True)
class Ratio:
    """How much faster a run is now: above 1, it is faster.

    Attributes:
        low, high: of its interval, see `compare`; None with too few rounds.
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
        new_sizes: the same of its calls of new sizes; None where these are others, or none. No
            verdict stands on it.
        speedup: ratio of its speedups over the baseline; None also for the baseline, and where
            that was not measured.
        verdict: `faster`, `slower`, `same`, `inconclusive`, or `-` where times were not compared.
        changes: of status and detections.
        failures: of `FAILURES`, what it is a case of.
    """

    pair: Pair
    time: Optional[Ratio]
    speedup: Optional[Ratio]
    verdict: str
    changes: List[str]
    failures: Tuple[str, ...]
    new_sizes: Optional[Ratio] = None


def runs_of(results: Results) -> Dict[Key, Tuple[Group, Run]]:
    """The runs of a result file, each with its group."""
    return {
        (facts.case_name(facts.case(group)), run.name, group.precision): (group, run)
        for group in results.groups
        for run in group.runs
    }


def pairs(before: Results, after: Results) -> List[Pair]:
    """The runs that both files have, with what stands against comparing them.

    Raises:
        errors.InputError: there is none.
    """
    old, new = runs_of(before), runs_of(after)
    both = [key for key in old if key in new]
    if not both:
        raise InputError("the two files have no run in common: nothing to compare")
    differing = facts.differing(before, after)
    machine, task = (_first_of(names, differing) for names in (MACHINE, TASK))
    others = facts.other_files(before.settings, after.settings)
    # What is timed on another data set may be the same: the images tell.
    task = task or next((x for x in others if not x.startswith("--dataset")), None)
    made = []
    for key in both:
        (old_group, old_run), (new_group, new_run) = old[key], new[key]
        other_task = task or _other_task(old_group, new_group, machine is not None)
        made.append(
            Pair(
                key=key,
                before=old_run,
                after=new_run,
                groups=(old_group, new_group),
                obstacle=other_task or machine or _other_run(old_run, new_run),
                same_task=other_task is None,
            )
        )
    return made


def left_out(before: Results, after: Results) -> Dict[Key, str]:
    """Runs of before whose backend cannot be had after, though their group was measured: why."""
    old, new = runs_of(before), runs_of(after)
    groups = {(case, precision) for case, _, precision in new}
    gone = {
        key: run
        for key, (_, run) in old.items()
        if key not in new and (key[0], key[2]) in groups and _has_run(run)
    }
    return {
        key: f"{label} left out: {reason}"
        for label, reason in after.left_out.items()
        for key, run in gone.items()
        if _is_of(run, label)
    }


def vanished(before: Results, after: Results) -> Dict[Key, str]:
    """Runs of before that after was asked for, and does not have: why they are missing."""
    reasons = left_out(before, after)
    new = runs_of(after)
    for key, (group, run) in runs_of(before).items():
        if key not in new and _has_run(run) and _was_asked(after, group, run):
            cut_short = "" if after.complete else ", as that was interrupted"
            reasons.setdefault(key, f"after was asked for it, and does not have it{cut_short}")
    return reasons


def _was_asked(results: Results, group: Group, run: Run) -> bool:
    settings = results.settings
    return (
        group.image is None  # The group of all images has the same runs.
        and group.model in settings.model
        and group.objects in settings.detections
        and group.precision in settings.precision
        and run.name in settings.backend
    )


def _is_of(run: Run, label: str) -> bool:
    """Whether a run is of the backend of this label, in the suite's own environment.

    What executes a backend may follow in the label of its runs: `ONNXRuntime-TensorRT`.
    """
    return run.environment is None and (run.label == label or run.label.startswith(f"{label}-"))


def _has_run(run: Run) -> bool:
    return run.status in ("ok", "mismatch")


def _first_of(names: Sequence[str], differing: Collection[str]) -> Optional[str]:
    return next((f"{name} differs" for name in names if name in differing), None)


def _other_task(before: Group, after: Group, other_machine: bool) -> Optional[str]:
    """What makes the groups of two runs another task."""
    old, new = _task(before), _task(after)
    weights = (before.weights, after.weights)
    # They are the same but for rounding, or made for sizes that were drawn, too.
    is_alike = other_machine or _drawn(before) != _drawn(after)
    if is_alike and all(known and known.source == "synthetic" for known in weights):
        del old["weights digest"]
    for name, value in old.items():
        # A model that could not be prepared has no sizes.
        if value and new[name] and value != new[name]:
            return f"{name} differs"
    return None


def _drawn(group: Group) -> List[str]:
    """Names of its inputs at drawn sizes: there are none in earlier files, or without --sizes."""
    return [name for name in group.image_sizes if name in DRAWN]


def _task(group: Group) -> Dict[str, object]:
    return {
        "export": group.export,
        "images per call": group.images_per_call,
        # These are not timed, and other files may have none.
        "image sizes": {
            x: size for x, size in group.image_sizes.items() if x not in (BLANK, *DRAWN)
        },
        "image digest": group.image_digest,
        "weights digest": group.weights and group.weights.digest,
    }


def _other_run(before: Run, after: Run) -> Optional[str]:
    if not before.samples_s or not after.samples_s:
        return "it was not measured " + ("before" if not before.samples_s else "after")
    for old, new in (
        (before.effective_precision, after.effective_precision),
        (before.label, after.label),
    ):
        if old != new:
            return f"it ran as {old} before, and as {new} after"
    return None


def compare_all(of: Sequence[Pair], threshold: float, by: str) -> List[Comparison]:
    """Judges pairs, such that with 95% confidence all of their intervals hold."""
    judged = sum(1 for pair in of if pair.obstacle is None)
    return [compare(pair, threshold, by, judged) for pair in of]


def compare(pair: Pair, threshold: float, by: str, judged: int = 1) -> Comparison:
    """Judges a pair.

    Args:
        threshold: differences below this share do not matter.
        by: one of `BY`.
        judged: pairs that are judged together.
    """
    changes, failures = _changes(pair) if pair.same_task else ([], ())
    if pair.obstacle is not None:
        return Comparison(pair, None, None, "-", changes, failures)
    time, speedup = _ratios(pair, judged)
    verdict = _verdict(pair, time, speedup, threshold, by)
    if verdict == "slower":
        failures = ("slower", *failures)
    return Comparison(pair, time, speedup, verdict, changes, failures, _new_sizes(pair, judged))


def _new_sizes(pair: Pair, judged: int) -> Optional[Ratio]:
    """How much faster calls of new sizes are now, if they are of the same."""
    before, after = (
        (group.new_sizes[: len(run.new_size_s)], run.new_size_s)
        for group, run in zip(pair.groups, (pair.before, pair.after))
    )
    if before[0] != after[0] or not before[1]:
        return None
    # They are all of one generation.
    return _ratio([np.array([seconds]) for _, seconds in (before, after)], [(), ()], judged)


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
    samples = [group.baseline.samples_s for group in pair.groups]
    if not all(samples):
        return 1.0
    before, after = (float(np.median(x)) for x in samples)
    return max(before / after, after / before)


def _changes(pair: Pair) -> Tuple[List[str], Tuple[str, ...]]:
    """What changed but for the time, and which of `FAILURES` that is."""
    old, new = pair.before, pair.after
    changes: List[str] = []
    failures: Tuple[str, ...] = ()
    if old.status != new.status:
        changes.append(f"{old.status} before, {new.status} after")
        if old.status == "ok" and new.status == "mismatch":
            failures = ("wrong",)
        elif _has_run(old) and not _has_run(new):
            failures = ("broken",)
    if not _has_run(new):
        return changes, failures
    stopped = [group.stopped for group in pair.groups]
    if stopped[1] == "interrupted" != stopped[0]:
        changes.append("interrupted")
        failures = failures or ("broken",)
    before, after = _matched(old), _matched(new)
    changes += [
        f"detections at {size}: {before[size]} before, {after.get(size, 'not checked')} after"
        for size in before
        if before[size] != after.get(size) and (size in after or size not in DRAWN)
    ]
    changes += _changes_of_ap(pair)
    verdicts = [run.accuracy and run.accuracy.verdict for run in (old, new)]
    if verdicts == ["keeps", "loses"]:
        changes.append("lost AP")
        failures = failures or ("wrong",)
    return changes, failures


def _changes_of_ap(pair: Pair) -> List[str]:
    """What average precision was on the same images, where that is another now."""
    before, after = (run.accuracy for run in (pair.before, pair.after))
    one, other = (group.evaluated for group in pair.groups)
    if before is None or after is None or one != other:
        return []
    texts = [
        (facts.TASKS[task], percent(known.ap), percent(after.tasks[task].ap))
        for task, known in before.tasks.items()
        if task in after.tasks
    ]
    return [f"{task} AP: {old} before, {new} after" for task, old, new in texts if old != new]


def _matched(run: Run) -> Dict[str, str]:
    """What agrees of what at each size: detections that match, labels of a map."""
    found = run.detections or {}
    return {size: known.counts for size, known in found.items()}


def _ratios(pair: Pair, judged: int) -> Tuple[Ratio, Optional[Ratio]]:
    """How much faster a run is now, by its times and by its speedups over the baseline."""
    own = [np.array([run.samples_s]) for run in (pair.before, pair.after)]
    with_baseline = []
    for group, (samples,) in zip(pair.groups, own):
        baseline = group.baseline.samples_s
        shared = min(len(baseline), len(samples))
        with_baseline.append(np.array([samples[:shared], baseline[:shared]]))
    generations = [group.generations for group in pair.groups]
    if pair.after.baseline or not all(side.size for side in with_baseline):
        return _ratio(own, generations, judged), None
    return _ratio(own, generations, judged), _ratio(with_baseline, generations, judged)


def _ratio(
    sides: Sequence[np.ndarray], generations: Sequence[Tuple[int, ...]], judged: int
) -> Ratio:
    """The ratio of slowness before and after, with its interval.

    Of generations that is Welch's t on the logarithms of each one's slowness. Where one of the two
    has but one, whole rounds are resampled, which says nothing of what differs between processes.

    Args:
        sides: before and after, seconds of a run, or of it and of the baseline, by round.
        generations: rounds of each, before and after.
        judged: ratios whose intervals are to hold together.
    """
    parts = [
        [_slowness(np.median(part, axis=0)) for part in benchmark.by_generation(side.T, made)]
        for side, made in zip(sides, generations)
    ]
    if min(map(len, parts)) >= benchmark.LEAST_GENERATIONS:
        return _welch(*(np.log(part) for part in parts), judged=judged)
    before, after = (_slowness(np.median(side, axis=1)) for side in sides)
    ratio = float(before / after)
    if min(side.shape[1] for side in sides) < benchmark.LEAST_ROUNDS:
        return Ratio(ratio, None, None)
    generator, tail = np.random.default_rng(0), 0.025 / judged
    resamples = max(RESAMPLES, int(LEAST_BEYOND / tail))
    before, after = (
        _slowness(benchmark.bootstrap_medians(side, resamples, generator)) for side in sides
    )
    low, high = np.quantile(before / after, (tail, 1 - tail))
    return Ratio(ratio, float(low), float(high))


def _welch(before: np.ndarray, after: np.ndarray, judged: int) -> Ratio:
    """The ratio of two means of logarithms, with its interval by Welch's t.

    B. L. Welch, The generalization of Student's problem when several different population variances
    are involved, Biometrika 34, 1947.
    """
    difference = float(before.mean() - after.mean())
    variances = [float(side.var(ddof=1)) / side.size for side in (before, after)]
    error = sum(variances) ** 0.5
    if error == 0.0:
        return Ratio(*[float(np.exp(difference))] * 3)
    each = [own**2 / (side.size - 1) for own, side in zip(variances, (before, after))]
    level = 1 - (1 - benchmark.LEVEL) / judged
    width = benchmark.t_quantile((1 + level) / 2, sum(variances) ** 2 / sum(each)) * error
    bounds = (float(np.exp(difference + side * width)) for side in (0, -1, 1))
    return Ratio(*bounds)


def _slowness(medians: np.ndarray) -> np.ndarray:
    """Medians of a run, over those of the baseline where they are given, too."""
    return medians[0] / medians[1] if len(medians) == 2 else medians[0]


(BY_SPEEDUP,) = right("by speedup")
COLUMNS = (
    *left("Model", "Backend", "precision"),
    *right("before(ms)", "after(ms)", "by time"),
    BY_SPEEDUP,
    *left("Verdict", "Detections and status"),
)
NEW_SIZES = (
    "at new sizes: how much faster calls of sizes that were never seen before are now; no verdict "
    "stands on it"
)


def report(
    before: Results, after: Results, compared: Sequence[Comparison], threshold: float, by: str
) -> str:
    """The comparison in Markdown: what differs first, then the runs, then what else there is."""
    differences = facts.differences(before, after)
    differences += facts.other_files(before.settings, after.settings)
    differences += _other_versions(compared, facts.differing(before, after))
    differences = differences or ["nothing that is recorded"]
    for name, results in (("before", before), ("after", after)):
        if not results.complete:
            differences.append(f"{name} is not complete: it was interrupted")
    columns, rows = COLUMNS, list(map(_cells, compared))
    if any(comparison.new_sizes for comparison in compared):
        place = COLUMNS.index(BY_SPEEDUP) + 1
        columns = (*COLUMNS[:place], *right("at new sizes"), *COLUMNS[place:])
        rows = [
            (*row[:place], _ratio_cell(comparison.new_sizes), *row[place:])
            for row, comparison in zip(rows, compared)
        ]
    table = Table(
        title="Comparison",
        columns=columns,
        rows=tuple(rows),
        notes=(
            *(note for comparison in compared for note in _notes(comparison, by)),
            *_legend(compared, threshold, by),
            *(NEW_SIZES,) * (columns != COLUMNS),
            *_missing_and_new(before, after),
        ),
    )
    lines = ["What differs:", "", *(f"- {line}" for line in differences)]
    return "\n".join([*lines, "", markdown(table)])


def _other_versions(compared: Sequence[Comparison], known: Collection[str]) -> List[str]:
    """What differs between the environments of the same run, where that is not the suite's own.

    Args:
        known: names of what differs between the two environments of the suite.
    """
    lines = []
    for pair in (comparison.pair for comparison in compared):
        old, new = ({"python": run.python, **run.versions} for run in (pair.before, pair.after))
        for name, version in old.items():
            is_other = version and new.get(name) and version != new[name]
            if is_other and (pair.after.environment or name not in known):
                lines.append(f"{pair.key[1]}: {name} {version} before, {new[name]} now")
    return list(dict.fromkeys(lines))


def _cells(comparison: Comparison) -> Tuple[str, ...]:
    pair = comparison.pair
    model, _, precision = pair.key
    statistics = [run.statistics for run in (pair.before, pair.after)]
    return (
        short_name(model),
        pair.after.label,
        precision,
        *("-" if known is None else f"{known.median_ms:.1f}" for known in statistics),
        _ratio_cell(comparison.time),
        _ratio_cell(comparison.speedup),
        comparison.verdict,
        "; ".join(comparison.changes) or ("unchanged" if pair.same_task else "-"),
    )


def _notes(comparison: Comparison, by: str) -> List[str]:
    """Why a run was not compared, or not judged, or is not what it should be."""
    pair, notes = comparison.pair, []
    name = " ".join(_cells(comparison)[:3])
    if pair.obstacle:
        what = "times not compared" if pair.same_task else "not compared"
        notes.append(f"{name}: {what}, as {pair.obstacle}")
    elif by == "both" and pair.after.baseline and _drift(pair) > MOST_DRIFT:
        notes.append(
            f"{name}: the baseline itself changed by a factor of {_drift(pair):.2f}, so that "
            "nothing is said of what ran beside it; --by decides what to go by"
        )
    if comparison.changes and pair.after.reason:
        notes.append(f"{name}: {pair.after.reason}")
    return notes


def _legend(compared: Sequence[Comparison], threshold: float, by: str) -> Tuple[str, ...]:
    whose = "what both say" if by == "both" else f"by {by}"
    made = [len(x.generations) for comparison in compared for x in comparison.pair.groups]
    single = (
        "where a file has fewer than three generations, the intervals leave out how much "
        "processes differ",
    )
    return (
        *single[: min(made) < benchmark.LEAST_GENERATIONS],
        "by time, by speedup: how much faster it is now, and how much its speedup over the "
        "baseline in the same rounds has grown; above 1 is better; with 95% confidence all of the "
        "intervals hold",
        f"Verdict, {whose}: slower or faster by more than {100 * threshold:g}%, with an interval "
        "that excludes 1",
    )


def _missing_and_new(before: Results, after: Results) -> List[str]:
    """The runs that only one file has."""
    reasons = vanished(before, after)
    notes = []
    for title, own, other in (("missing", before, after), ("new", after, before)):
        others = runs_of(other)
        for key in runs_of(own):
            if key not in others:
                reason = f" ({reasons[key]})" if key in reasons else ""
                notes.append(f"{title}: {' '.join(key)}{reason}")
    return notes


def _ratio_cell(ratio: Optional[Ratio]) -> str:
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.ratio:.3f}"
    return f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def exit_code(compared: Sequence[Comparison], fail_on: Sequence[str], vanished: bool) -> int:
    """The largest code of what happened and was asked for; else 0.

    Args:
        vanished: whether there are runs that are not there any more.
    """
    happened = {failure for comparison in compared for failure in comparison.failures}
    happened |= {"broken"} if vanished else set()
    return max((FAILURES[name] for name in happened if name in fail_on), default=0)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command line; returns the exit code."""
    parse = parser()
    options = parse.parse_args(arguments)
    try:
        before, after = (load(path) for path in (options.before, options.after))
        compared = compare_all(pairs(before, after), options.threshold, options.by)
        if all(comparison.pair.obstacle and not comparison.changes for comparison in compared):
            raise InputError(f"nothing can be compared: {compared[0].pair.obstacle}")
    except InputError as error:
        print(f"{parse.prog}: error: {error}", file=sys.stderr)
        return 2
    print(report(before, after, compared, options.threshold, options.by))
    return exit_code(compared, options.fail_on, bool(vanished(before, after)))


if __name__ == "__main__":
    sys.exit(main())
