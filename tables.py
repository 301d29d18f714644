"""From the records of a result file to the tables on the screen."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, TypeVar

import published
import results
from benchmark import (
    BreakEven,
    Rounds,
    Row,
    Speedup,
    Statistics,
    StopRule,
    describe_break_even,
    describe_speedup,
    describe_stop,
    markdown,
    short_name,
    table,
)
from catalog import TUNING
from stages import STAGES, ceiling
from verify import Agreement, worst

Group = Dict[str, Any]
T = TypeVar("T")


def model_table(
    groups: Sequence[Group],
    rule: StopRule,
    notes: Sequence[str] = (),
    peaks: Optional[Dict[str, float]] = None,
) -> str:
    """The Markdown table of one test model, with what a reader has to know below it.

    Args:
        groups: all of one test model, as in the result file.
        rule: that ended the rounds.
        notes: more sentences to put below.
        peaks: operations per second that the machine reaches, by precision, for `% of peak`.
    """
    rows = [_row(group, run, peaks or {}) for group in groups for run in group["runs"]]
    facts = [*_check_note(groups[0]), *_rounds_notes(groups, rule), *_fp32_notes(groups)]
    if peaks:
        facts.append(_peak_note(groups, peaks))
    facts += _recompilation_notes(groups)
    weights = dict.fromkeys(group["weights"] for group in groups if group.get("weights"))
    return table(rows, [*facts, *notes, *weights])


def _known(kind: Type[T], record: Dict[str, Any]) -> T:
    """A dataclass from a record, which may have keys that were added later."""
    names = [field.name for field in fields(kind)]
    return kind(**{name: record[name] for name in names if name in record})


def _row(group: Group, run: Dict[str, Any], peaks: Dict[str, float]) -> Row:
    statistics, speedup = run["statistics"], run["speedup"]
    peak = peaks.get(run["effective_precision"] or "")
    known = peak and group.get("flops") and statistics
    return Row(
        model=group["model"],
        kind=group["export"],
        backend=run["label"],
        precision=_precision(run),
        statistics=statistics and _known(Statistics, statistics),
        speedup=speedup and _known(Speedup, speedup),
        baseline=run["baseline"],
        detections=_detections(run),
        status=run["reason"] or "",
        peak_share=1000 * group["flops"] / statistics["median_ms"] / peak if known else None,
    )


def _detections(run: Dict[str, Any]) -> str:
    """The worst of the sizes, in the table's words."""
    if run["detections"] is None:
        is_reference = run["baseline"] and run["requested_precision"] == "fp32"
        unchecked = "-" if is_reference else "not checked"
        return unchecked if run["status"] == "ok" else run["status"]
    agreements = {
        size: _known(Agreement, agreement) for size, agreement in run["detections"].items()
    }
    return worst(agreements).text


def _precision(run: Dict[str, Any]) -> str:
    """What it ran in and, where that is something else, what was asked for."""
    asked, ran = run["requested_precision"], run["effective_precision"]
    return asked if ran in (asked, None) else f"{ran} (not {asked})"


def _check_note(group: Group) -> List[str]:
    sizes = {name: f"{size[0][0]}x{size[0][1]}" for name, size in group["image_sizes"].items()}
    if not set(TUNING) <= set(sizes):
        return [f"timed at {size}" for size in sizes.values()]
    small, timed, large = (sizes.pop(name) for name in TUNING)
    if sizes:
        several = ", ".join([timed, *sizes.values()])
        return [
            f"timed on {1 + len(sizes)} images in turn ({several}), the mean of a round is what "
            f"counts; Detections: against Torch fp32 on each, and at {small} and {large}, the "
            "worst of all"
        ]
    return [
        f"timed at {timed}; Detections: against Torch fp32 at {small}, {timed} and {large}, "
        "the worst of the three"
    ]


def _rounds_notes(groups: Sequence[Group], rule: StopRule) -> List[str]:
    notes = []
    for group in groups:
        if group["rounds"]:
            rounds = Rounds(rounds=group["rounds"], stopped=group["stopped"])
            own = replace(
                rule,
                half_width=group.get("half_width", rule.half_width),
                budget_s=group.get("budget_s", rule.budget_s),
            )
            made = describe_stop(rounds, own)
            if group.get("image"):
                made = f"{rounds.rounds} rounds, those of all images together"
            notes.append(f"{group['precision']}: {made}")
    return notes


def _fp32_notes(groups: Sequence[Group]) -> List[str]:
    """Runs of lower precision against Torch fp32, which took part in their rounds."""
    notes = []
    for group in groups:
        known = [
            f"{run['label']} {describe_speedup(_known(Speedup, run['speedup_over_fp32']))}"
            for run in group["runs"]
            if run.get("speedup_over_fp32")
        ]
        if known:
            notes.append(f"{group['precision']} over Torch fp32, same rounds: {', '.join(known)}")
    return notes


def _name(group: Group) -> str:
    """What the group measures, for tables in which several of a test model may stand."""
    return short_name(results.case_name(results.case(group)))


# Columns of the table of coverage: heading, key in a run's coverage.
COVERAGE = (
    ("operators", "operators"),
    ("in engines", "operators_in_engine"),
    ("FLOPs in engines", "share_of_flops"),
    ("segments", "segments"),
    ("graph breaks", "graph_breaks"),
)


def coverage_table(groups: Sequence[Group]) -> str:
    """How much of the model each run's engines took; what a backend does not tell is `-`."""
    headings = ["Model", "Backend", "precision", "provider", *(name for name, _ in COVERAGE)]
    grid = [[*headings, "more"]]
    for group in groups:
        for run in group["runs"]:
            coverage = run["coverage"]
            if run["baseline"] or not coverage:
                continue
            counts = [_coverage_cell(coverage, key) for _, key in COVERAGE]
            more = [
                _count_text(key, value)
                for key, value in coverage.items()
                if key not in [known for _, known in COVERAGE]
            ]
            cells = [_name(group), run["label"], _precision(run), run["provider"] or "-", *counts]
            grid.append([*cells, "; ".join(more)])
    rights = [False] * 4 + [True] * len(COVERAGE) + [False]
    return "\n".join(markdown(grid, rights)) if len(grid) > 1 else "no coverage is known"


def _coverage_cell(coverage: Dict[str, Any], key: str) -> str:
    value = coverage.get(key)
    if value is None:
        return "-"
    return f"{100 * value:.0f}%" if key == "share_of_flops" else str(value)


def _count_text(key: str, value: Any) -> str:
    name = key.replace("_", " ")
    if isinstance(value, dict):
        return f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in value.items())
    return f"{name}: {value}"


# Columns of the table of costs that hold seconds: heading, key in a run's `prepare`.
PHASES = (("export (s)", "export"), ("convert (s)", "convert"), ("compile (s)", "compile"))


def costs_table(groups: Sequence[Group]) -> str:
    """What each run took besides its calls, and when that has paid for itself.

    Total has the phases and what lies between and after them, such as a first call in which the
    engine picks its kernels, but not building the model.
    """
    headings = ["Model", "Backend", "precision", *(name for name, _ in PHASES), "total (s)"]
    grid = [[*headings, "artifact (MiB)", "peak memory (MiB)", "break-even (images)"]]
    for group in groups:
        for run in group["runs"]:
            if run["prepare"]:
                grid.append([_name(group), run["label"], _precision(run), *_cost_cells(run)])
    rights = [False] * 3 + [True] * (len(grid[0]) - 4) + [False]
    return "\n".join(markdown(grid, rights)) if len(grid) > 1 else "no run was prepared"


def _cost_cells(run: Dict[str, Any]) -> List[str]:
    prepare = run["prepare"]
    seconds = [f"{prepare[key]:.1f}" if key in prepare else "-" for _, key in PHASES]
    if run.get("cached"):
        seconds[-1] += " cached"
    memory = [run.get("artifact_mb"), run.get("peak_device_memory_mb") or run["peak_memory_mb"]]
    paid_back = run.get("break_even")
    return [
        *seconds,
        f"{prepare['total'] - prepare['build']:.1f}",
        *("-" if size is None else f"{size:.0f}" for size in memory),
        "-" if paid_back is None else describe_break_even(_known(BreakEven, paid_back)),
    ]


def _peak_note(groups: Sequence[Group], peaks: Dict[str, float]) -> str:
    reached = ", ".join(f"{precision} {peak / 1e9:.0f}" for precision, peak in peaks.items())
    flops = groups[0].get("flops")
    own = f"a call is {flops / 1e9:.1f} GFLOPs" if flops else "the FLOPs of a call are not known"
    return f"% of peak: of what PyTorch's matrix products reach here, in GFLOP/s {reached}; {own}"


def cases_table(groups: Sequence[Group]) -> str:
    """Time against what is in the picture: a line for each run, number of objects and image."""
    cases = [results.case(group) for group in groups]
    names = ("objects", "image")
    several = [name for place, name in enumerate(names, 1) if len({x[place] for x in cases}) > 1]
    headings = ["Model", "Backend", "precision", *several, "found", "Median(ms)"]
    grid = [[*headings, "Speedup", "Detections"]]
    lines = [(*line, group, run) for line, group in zip(cases, groups) for run in group["runs"]]
    order = list(dict.fromkeys(_run_key(*line[3:]) for line in lines))
    # Images stay in their order; all of them together come last.
    lines.sort(key=lambda x: (order.index(_run_key(*x[3:])), x[1], x[2] is None))
    for model, objects, image, group, run in lines:
        statistics, speedup, found = run["statistics"], run["speedup"], group.get("found")
        case = {"objects": str(objects), "image": image or "together"}
        cells = [short_name(model), run["label"], _precision(run)]
        cells += [case[name] for name in several]
        cells += ["-" if found is None else str(found)]
        cells += [f"{statistics['median_ms']:.1f}" if statistics else "-"]
        cells += [describe_speedup(_known(Speedup, speedup)) if speedup else "-", _detections(run)]
        grid.append(cells)
    rights = [False] * 3 + [name == "objects" for name in several] + [True] * 2 + [False] * 2
    return "\n".join(markdown(grid, rights))


def _run_key(group: Group, run: Dict[str, Any]) -> Tuple[str, str, str]:
    return group["model"], run["backend"], group["precision"]


def stages_table(groups: Sequence[Group]) -> str:
    """Where the time of the eager modules goes, and what an engine for the backbone could gain."""
    known = [group for group in groups if group.get("stages")]
    if not known:
        return "no stages were timed"
    # Files from before there was postprocessing have it in the rest.
    names = [stage for stage in STAGES if any(group["stages"].get(stage) for group in known)]
    grid = [["Model", "precision", *(f"{name} (ms)" for name in names), "total (ms)", "ceiling"]]
    for group in known:
        seconds = {name: group["stages"].get(name, 0.0) for name in STAGES}
        cells = [f"{1000 * seconds[name]:.1f}" if seconds[name] else "-" for name in names]
        total = f"{1000 * sum(seconds.values()):.1f}"
        most = f"{ceiling(seconds):.2f}x"
        grid.append([_name(group), group["precision"], *cells, total, most])
    lines = markdown(grid, [False] * 2 + [True] * (len(names) + 2))
    note = "ceiling: the speedup of an engine that takes backbone + FPN only, and no time for them"
    return "\n".join([*lines, "", f"- {note}"])


def _recompilation_notes(groups: Sequence[Group]) -> List[str]:
    """Runs that compiled once more while they were timed: their longest calls are no inference."""
    return [
        f"{run['label']} {_precision(run)}: compiled {count} more times within the timed rounds"
        for group in groups
        for run in group["runs"]
        for count in [run["coverage"].get("recompilations_while_timed")]
        if count
    ]


def aa_note(aa: Optional[Dict[str, Any]]) -> List[str]:
    """What difference the machine can resolve, in a sentence, if that was measured."""
    if aa is None or None in (aa["resolution"], aa["low"], aa["high"]):
        return []
    return [
        f"A/A, Torch against itself in two processes ({aa['model']} {aa['precision']}): "
        f"{aa['ratio']:.3f}x, {aa['low']:.3f} to {aa['high']:.3f}; differences below "
        f"{100 * aa['resolution']:.1f}% cannot be told from noise here"
    ]


def published_table(groups: Sequence[Group]) -> str:
    """Our speedups beside those that TorchBlade published."""
    rows = []
    for group in groups:
        for run in group["runs"]:
            if run["baseline"] or group.get("image"):
                continue
            speedup = run["speedup"] or {"ratio": None, "low": None, "high": None}
            rows.append(
                published.Measured(
                    model=group["model"],
                    export=group["export"],
                    precision=run["effective_precision"] or run["requested_precision"],
                    backend=run["label"],
                    ratio=speedup["ratio"],
                    low=speedup["low"],
                    high=speedup["high"],
                    name=_name(group),
                )
            )
    return published.comparison(rows)
