"""From records to tables, and from tables to Markdown.

What there is to say is a `Table`; `markdown` makes text of it, and report.html a part of a page.

    model_table(results: Results, groups: Sequence[Group], peaks: bool = False) -> Table
    cases_table(groups: Sequence[Group]) -> Table
    coverage_table(groups: Sequence[Group]) -> Table
    stages_table(groups: Sequence[Group]) -> Table
    costs_table(groups: Sequence[Group]) -> Table
    accuracy_table(groups: Sequence[Group]) -> Table
    parts_table(groups: Sequence[Group]) -> Table
    class_tables(groups: Sequence[Group]) -> List[Table]
    published_table(groups: Sequence[Group]) -> Table
    markdown(table: Table) -> str

A table without rows knows the sentence that stands for it, and `markdown` gives that:
`no stages were timed`. Who wants to leave such a table out looks at `table.rows`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, get_args

import tabulate

from benchmark import BreakEven, Speedup, Statistics, StopRule, samples_to_bound
from models import BLANK, DRAWN, GENERATIONS, MODELS, TUNING, TURNED, runner
from results import published
from results.facts import (
    LEAST_AP,
    TASKS,
    WHOSE_ANNOTATIONS,
    bisection_note,
    calibration_note,
    case,
    case_name,
    ceiling,
    control_note,
    left_out_note,
    missing_notes,
    share,
    weights_note,
    worst,
)
from results.record import (
    APVerdict,
    AveragePrecision,
    Coverage,
    Difference,
    Group,
    Preparation,
    Results,
    Run,
    Stages,
    Stopped,
    Task,
)

# What a match stands for where nothing was trained; two lines of the README say more.
SYNTHETIC_NOTE = (
    "synthetic weights survive rounding: a match vouches for the engine, not for what the "
    "precision costs a trained model"
)

TF32_NOTE = (
    "tf32: fp32 whose factors the GPU rounds to 10 bits of mantissa in products and convolutions, "
    "as engines do by default: --no-tf32 forbids it to all of them"
)

# What tables call what average precision is of, and its verdicts.
AP_VERDICTS: Dict[APVerdict, str] = {
    "keeps": "keeps AP",
    "loses": "LOSES AP",
    "too few": "too few images",
}

# Of more classes, a table has those that lose most.
MOST_CLASSES = 20

# What tables call the stages.
STAGES = {
    "backbone": "backbone + FPN",
    "proposals": "proposals",
    "head": "head",
    "roi_heads": "ROI heads",
    "nms": "NMS",
    "postprocessing": "postprocessing",
    "rest": "rest",
}


# Tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether its cells are aligned to the right."""

    heading: str
    right: bool = False


@dataclass(frozen=True)
class Table:
    """Cells, and what a reader has to know of them.

    Every text is one line, and none has the `|` that ends a cell of Markdown: that and runs of
    whitespace become a space.

    Attributes:
        title: what the table is of.
        rows: each has a cell for every column.
        notes: sentences to put below.
        nothing: the sentence that stands for a table without rows.
        compact: Markdown without padding, with the notes as paragraphs instead of a list.
    """

    title: str
    columns: Tuple[Column, ...]
    rows: Tuple[Tuple[str, ...], ...]
    notes: Tuple[str, ...] = ()
    nothing: str = ""
    compact: bool = False

    def __post_init__(self) -> None:
        rows = tuple(tuple(_one_line(cell, r"[|\s]+") for cell in row) for row in self.rows)
        if any(len(row) != len(self.columns) for row in rows):
            raise ValueError(f"{self.title}: a row has more or fewer cells than there are columns")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "notes", tuple(_one_line(note) for note in self.notes))


def _one_line(text: str, ends: str = r"\s+") -> str:
    return re.sub(ends, " ", text).strip()


def left(*headings: str) -> Tuple[Column, ...]:
    """Columns that are aligned to the left."""
    return tuple(Column(heading) for heading in headings)


def right(*headings: str) -> Tuple[Column, ...]:
    """Columns that are aligned to the right."""
    return tuple(Column(heading, right=True) for heading in headings)


def markdown(table: Table) -> str:
    """The table in Markdown, padded so that the text itself reads well, with its notes below.

    A table without rows is the sentence that stands for it, where it has one.
    """
    if not table.rows and table.nothing:
        return table.nothing
    aligns = ["right" if column.right else "left" for column in table.columns]
    text = tabulate.tabulate(
        # The headings are a row, as tabulate makes a column wider than its heading by two.
        [
            [column.heading for column in table.columns],
            tabulate.SEPARATING_LINE,
            *table.rows,
        ],
        tablefmt=_compact(table) if table.compact else _PADDED,
        disable_numparse=True,
        stralign=None,
        colalign=None if table.compact else aligns,
    )
    notes = table.notes if table.compact else [f"- {note}" for note in table.notes]
    return "\n".join([text, "", *notes]) if notes else text


def _format(rule: Callable[[List[int], List[str]], str]) -> tabulate.TableFormat:
    """Lines of Markdown, with a rule below the headings."""
    bars = tabulate.DataRow("|", "|", "|")
    return tabulate.TableFormat(
        lineabove=None,
        linebelowheader=rule,
        linebetweenrows=None,
        linebelow=None,
        headerrow=bars,
        datarow=bars,
        padding=1,
        with_header_hide=None,
    )


def _padded_rule(widths: List[int], aligns: List[str]) -> str:
    # Each width has the two spaces of the padding.
    rules = [
        "-" * (width - 3) + (":" if align == "right" else "-")
        for width, align in zip(widths, aligns)
    ]
    return f"| {' | '.join(rules)} |"


_PADDED = _format(_padded_rule)


def _compact(table: Table) -> tabulate.TableFormat:
    rules = ["--:" if column.right else ":--" for column in table.columns]
    return _format(lambda widths, aligns: f"| {' | '.join(rules)} |")


# Texts of cells --------------------------------------------------------------------------------


def short_name(model: str) -> str:
    """The name of a model as tables print it: that of a test model without its leading `test`."""
    return model[len("test") :] if model.split(" ")[0] in MODELS else model


def group_name(group: Group) -> str:
    """What a group measures, for tables in which several of a test model may stand."""
    return short_name(case_name(case(group)))


def describe_speedup(speedup: Speedup) -> str:
    """A speedup as tables print it: `1.58x ±0.03`, `1.01x ±0.02 same`.

    The larger side of the interval is shown, rounded up, so that it is never narrower in print
    than it is. A verdict of `faster` is left out: the number says it.
    """
    if speedup.low is None or speedup.high is None:
        half_width = "±?"
    else:
        larger = max(speedup.ratio - speedup.low, speedup.high - speedup.ratio)
        # Without the inner rounding a 0.03 that is stored as 0.030000000000000027 becomes 0.04.
        half_width = f"±{max(1, math.ceil(round(100 * larger, 6))) / 100:.2f}"
    verdict = "" if speedup.verdict == "faster" else f" {speedup.verdict}"
    return f"{speedup.ratio:.2f}x {half_width}{verdict}"


def describe_break_even(result: BreakEven) -> str:
    """As the table of costs prints it: `120 (98 to 160)`, `900 (310 to never)`, `never`."""

    def number(images: Optional[float]) -> str:
        return "never" if images is None else str(math.ceil(images))

    if result.low is None and result.high is None:
        return number(result.images)
    return f"{number(result.images)} ({number(result.low)} to {number(result.high)})"


def describe_stop(
    rounds: int,
    stopped: Stopped,
    half_width: float = StopRule.half_width,
    budget_s: Optional[float] = None,
    generations: Sequence[int] = (),
) -> str:
    """How many rounds were made, and what ended them.

    Args:
        stopped, half_width, budget_s, generations: as a `Group` has them.
    """
    width = f"±{100 * half_width:g}%"
    why = {
        "interval": f"until every speedup was known to {width}",
        "generations": f"as many as asked for, before every speedup was known to {width}",
        "width": "until more generations did not narrow the intervals any more",
        "max rounds": f"the most allowed, before every speedup was known to {width}",
        "fixed": "as asked for",
        "time budget": f"until the time budget of {budget_s or 0:g} s",
        "all failed": "until every run had failed",
        "interrupted": "until it was interrupted",
    }
    made = f"{rounds} round{'' if rounds == 1 else 's'}"
    if len(generations) > 1:
        made += f" in {len(generations)} generations"
        if stopped == "time budget" and len(generations) < GENERATIONS:
            made += f", as {GENERATIONS} do not fit"
    return f"{made}, {why[stopped]}"


def _digits(value: float, significant: int = 4) -> str:
    """A positive number in plain notation with that many significant digits, or all before '.'."""
    if value == 0:
        return "0"
    decimals = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, decimals)}f}"


def _precision(run: Run) -> str:
    """What it ran in and, where that is something else, what was asked for."""
    asked, ran = run.requested_precision, run.effective_precision
    return asked if ran in (asked, None) else f"{ran} (not {asked})"


def _detections(run: Run) -> str:
    """The worst of the sizes, as the table says it."""
    if run.detections is not None:
        return worst(run.detections).text
    if run.status != "ok":
        return run.status
    # On a GPU it is checked, too.
    is_reference = run.baseline and run.requested_precision == "fp32" and run.provider != "cuda"
    return "-" if is_reference else "not checked"


# The table of a test model ---------------------------------------------------------------------

# A call of a new size that is longer than the median by this factor: something was compiled.
MOST_OVER_MEDIAN = 5.0


@dataclass(frozen=True)
class _Bound:
    """A column of a percentile's bound: its heading, field of `Statistics`, share of calls."""

    heading: str
    field: str
    share: str


_BOUNDS = (
    _Bound("p90(ms)", "p90_bound_ms", "90%"),
    _Bound("p95(ms)", "p95_bound_ms", "95%"),
    _Bound("p99(ms)", "p99_bound_ms", "99%"),
)
# Marks a 99th percentile that the calls are too few to bound.
_UNBOUNDED = "*"


def model_table(results: Results, groups: Sequence[Group], peaks: bool = False) -> Table:
    """The results of one test model. What is wrong with a run is a note, referred to from its row.

    Args:
        groups: all of one test model, at least one.
        peaks: whether to say which share of the machine's peak a run reaches, where it is known.
    """
    reached = results.peaks if peaks else {}
    lines = [(group, run) for group in groups for run in group.runs]
    shares = [_peak_share(group, run, reached) for group, run in lines]
    bounds = _known_bounds(groups)
    columns = _model_columns(groups[0], bounds)
    rows, statuses = [], []
    for group, run in lines:
        cells = _run_cells(group, run, bounds)
        if run.reason:
            mark = f"[{len(statuses) + 1}]"
            cells[-1] += f" {mark}"
            statuses.append(f"{mark} {run.label} {_precision(run)}: {run.reason}")
        rows.append(cells)
    if any(run.new_size_s for _, run in lines):
        place = columns.index(Column("Median(ms)", right=True)) + 1
        columns = (*columns[:place], *right("new size(ms)"), *columns[place:])
        for (_, run), cells in zip(lines, rows):
            cells.insert(place, _new_size_cell(run))
    tasks = judged_tasks(groups)
    columns += tuple(
        x for task in tasks for x in (*right(_of(task, "AP")), *left(_of(task, "dAP")))
    )
    for (_, run), cells in zip(lines, rows):
        cells += [cell for task in tasks for cell in _accuracy_cells(run, task)]
    if any(share is not None for share in shares):
        columns += right("% of peak")
        for cells, share in zip(rows, shares):
            cells.append("-" if share is None else f"{100 * share:.1f}%")
    return Table(
        title=f"Results of {group_name(groups[0])}",
        columns=columns,
        rows=tuple(map(tuple, rows)),
        notes=(*statuses, *_model_notes(results, groups, reached)),
    )


def _known_bounds(groups: Sequence[Group]) -> List[_Bound]:
    """The bounds that some run has."""
    known = [run.statistics for group in groups for run in group.runs if run.statistics]
    return [bound for bound in _BOUNDS if any(getattr(x, bound.field) is not None for x in known)]


def _model_columns(group: Group, bounds: Sequence[_Bound]) -> Tuple[Column, ...]:
    """The columns of TorchBlade's published results, with the bounds, then ours."""
    return (
        *left(f"Model({group.export})", "Backend", "precision"),
        *right("Median(FPS)", "Mean(FPS)", "Median(ms)", "Mean(ms)", "99th_p"),
        *right(*(bound.heading for bound in bounds), "std_dev"),
        *left("Speedup", "Detections"),
    )


def _run_cells(group: Group, run: Run, bounds: Sequence[_Bound]) -> List[str]:
    speedup = "-" if run.speedup is None else describe_speedup(run.speedup)
    return [
        short_name(group.model),
        run.label,
        _precision(run),
        *_statistics_cells(run.statistics, bounds),
        "1.00x" if run.baseline and run.statistics else speedup,
        _detections(run),
    ]


def _statistics_cells(statistics: Optional[Statistics], bounds: Sequence[_Bound]) -> List[str]:
    if statistics is None:
        return ["-"] * (6 + len(bounds))
    known = [getattr(statistics, bound.field) for bound in bounds]
    return [
        _digits(statistics.median_fps),
        _digits(statistics.mean_fps),
        _digits(statistics.median_ms),
        _digits(statistics.mean_ms),
        _percentile_cell(statistics),
        *("-" if bound is None else _digits(bound) for bound in known),
        _digits(statistics.std_dev_ms, significant=3),
    ]


def _percentile_cell(statistics: Statistics) -> str:
    if statistics.p99_ms is None:
        return "-"
    mark = _UNBOUNDED if statistics.samples < samples_to_bound(0.99) else ""
    return f"{_digits(statistics.p99_ms)}{mark}"


def _new_size_cell(run: Run) -> str:
    return _digits(1000 * median(run.new_size_s)) if run.new_size_s else "-"


def _new_size_notes(groups: Sequence[Group]) -> Iterator[str]:
    """Which calls `new size(ms)` is of, whether one was much longer, and why there are none."""
    told: Dict[str, List[str]] = {}
    for group in groups:
        if any(run.new_size_s for run in group.runs):
            told.setdefault(_which_sizes(group), []).append(group.precision)
    for text, precisions in told.items():
        only = f" at {_enumerated(precisions)}" if len(told) > 1 else ""
        yield f"new size(ms){only}: {text}"
    for group in groups:
        for run in group.runs:
            ms = [1000 * seconds for seconds in run.new_size_s]
            if ms and max(ms) > MOST_OVER_MEDIAN * median(ms):
                yield (
                    f"{run.label} {_precision(run)}: a call of a new size took {_digits(max(ms))} "
                    f"ms, {max(ms) / median(ms):.0f} times the median, as where an engine is "
                    "compiled again"
                )
    reasons: Dict[str, List[str]] = {}
    for group in groups:
        if group.no_new_sizes:
            reasons.setdefault(group.no_new_sizes, []).append(group.precision)
    for reason, precisions in reasons.items():
        yield f"no calls of new sizes at {_enumerated(precisions)}: {reason}"


def _which_sizes(group: Group) -> str:
    """How many calls of new sizes there were, from the flattest to the tallest."""
    sizes = sorted(group.new_sizes)
    ends = " to ".join(
        f"{height}x{width}" for height, width in dict.fromkeys(sizes[:: len(sizes) - 1 or 1])
    )
    each = "each of a size that was never seen before" if len(sizes) > 1 else "of a new size"
    return f"the median of {_counted(len(sizes), 'call')}, {each}, {ends}"


def judged_tasks(groups: Sequence[Group]) -> List[Task]:
    """What the runs were judged by on a data set, in the order of COCO's names."""
    known = {task for group in groups for run in group.runs for task in judged(run)}
    return [task for task in get_args(Task) if task in known]


def judged(run: Run) -> Dict[Task, AveragePrecision]:
    """What a run has on a data set; nothing where it was not evaluated."""
    return {} if run.accuracy is None else run.accuracy.tasks


def _of(task: Task, heading: str) -> str:
    """A heading; that of boxes needs no word."""
    return heading if task == "bbox" else f"{TASKS[task]} {heading}"


def _accuracy_cells(run: Run, task: Task) -> Tuple[str, str]:
    """What stands below `AP` and `dAP`."""
    known = judged(run).get(task)
    if known is None:
        return "-", "-"
    return percent(known.ap), "-" if known.difference is None else describe_difference(
        known.difference
    )


def percent(value: Optional[float]) -> str:
    """An average precision as tables print it."""
    return "-" if value is None else f"{value:.2f}"


def describe_difference(difference: Difference) -> str:
    """What AP differs by: `-0.12 ±0.31 keeps AP`, `-24.71 ±5.02 LOSES AP`, `... too few images`.

    The larger side of the interval is shown, rounded up.
    """
    larger = max(difference.value - difference.low, difference.high - difference.value, 0.0)
    half_width = math.ceil(round(100 * larger, 6)) / 100
    return f"{difference.value:+.2f} ±{half_width:.2f} {AP_VERDICTS[difference.verdict]}"


def _accuracy_notes(results: Results, groups: Sequence[Group]) -> Iterator[str]:
    """On what the AP stands, and what would tell where there are too few images."""
    evaluated = next((group.evaluated for group in groups if group.evaluated), None)
    if evaluated is None:
        return
    settings = results.settings
    if judged_tasks(groups):
        yield (
            f"AP: COCO's, in percent, on {_counted(evaluated.images, 'image')} of "
            f"{settings.dataset} with {_counted(evaluated.objects, 'object')}; dAP: from "
            f"{runner(groups[0].export)} fp32, with the larger half of its 95% interval; AP is "
            "kept where the interval of its ratio to fp32's lies above "
            f"{settings.min_ap_ratio:g}, and lost where it lies below"
        )
    if evaluated.left_out:
        left_out = left_out_note(evaluated.left_out)
        yield f"images of {settings.dataset} that were left out: {left_out}"
    for task, reason in evaluated.not_judged.items():
        yield f"no AP of {TASKS[task]}s: {reason}"
    for task in judged_tasks(groups):
        known = [judged(run).get(task) for group in groups for run in group.runs]
        reference = next((x.ap for x in known if x and x.difference is None), None)
        if reference is not None and reference < LEAST_AP:
            yield (
                f"{_of(task, 'AP')} of {runner(groups[0].export)} fp32 is {percent(reference)}: "
                f"{WHOSE_ANNOTATIONS}"
            )
    for group in groups:
        missing = [x.label for x in group.runs if x.status == "ok" and x.accuracy is None]
        if group.evaluated and missing and group.stopped == "interrupted":
            yield f"{group.precision}: interrupted before the AP of {', '.join(missing)} was known"
        for run in group.runs:
            if run.accuracy and run.accuracy.reason and run.accuracy.reason not in str(run.reason):
                yield f"{run.label} {_precision(run)}: no AP: {run.accuracy.reason}"
            if run.accuracy and run.accuracy.not_drawn:
                yield (
                    f"{run.label} {_precision(run)}: images in which it differs are missing: "
                    f"{run.accuracy.not_drawn}"
                )
            for task, known in judged(run).items():
                if known.difference and known.difference.verdict == "too few":
                    needed = known.difference.images_needed
                    about = f"about {needed}" if needed else "far more than anyone has"
                    yield (
                        f"{run.label} {_precision(run)}: {_of(task, 'AP')} would take {about} "
                        "images to tell, if it is what it is here"
                    )


def _bisection_notes(groups: Sequence[Group]) -> Iterator[str]:
    """In which part each run that went wrong does."""
    for group in groups:
        for run in group.runs:
            if run.bisection is not None:
                reference = f"{runner(group.export)} fp32"
                yield bisection_note(f"{run.label} {_precision(run)}", run.bisection, reference)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def parts_table(groups: Sequence[Group]) -> Table:
    """How far each part of the runs that went wrong is from Torch fp32."""
    rows = []
    for group in groups:
        for run in group.runs:
            for part in run.bisection.parts if run.bisection else ():
                own = "-" if part.difference is None else share(part.difference)
                whole = "-" if part.accumulated is None else share(part.accumulated)
                is_first = run.bisection is not None and part is run.bisection.first
                verdict = "FIRST" if is_first else "beyond" if part.is_beyond else ""
                cells = (part.name, own, share(part.bound), verdict, whole)
                rows.append((group_name(group), run.label, _precision(run), *cells))
    return Table(
        title="Parts",
        columns=(
            *left("Model", "Backend", "precision", "part"),
            *right("off by", "tolerated"),
            *left("verdict"),
            *right("with all before it"),
        ),
        rows=tuple(rows),
        nothing="there is no run whose parts were watched",
    )


def accuracy_table(groups: Sequence[Group]) -> Table:
    """All of COCO's figures, in percent: a line for each run and task."""
    rows = []
    for group in groups:
        for run in group.runs:
            for task, known in judged(run).items():
                figures = (known.ap, known.ap50, known.ap75)
                by_size = (known.small, known.medium, known.large)
                rows.append(
                    (
                        group_name(group),
                        run.label,
                        _precision(run),
                        TASKS[task],
                        *map(percent, (*figures, *by_size)),
                        str(run.accuracy.detections if run.accuracy else 0),
                        *_accuracy_cells(run, task)[1:],
                    )
                )
    return Table(
        title="Average precision",
        columns=(
            *left("Model", "Backend", "precision", "of"),
            *right("AP", "AP50", "AP75", "small", "medium", "large", "detections"),
            *left("dAP"),
        ),
        rows=tuple(rows),
        nothing="nothing was evaluated",
    )


def class_tables(groups: Sequence[Group]) -> List[Table]:
    """AP of each class, a table for each model and task: of the reference, and how runs differ.

    Of many classes there are those that lose most.
    """
    made = []
    for name in dict.fromkeys(map(group_name, groups)):
        own = [group for group in groups if group_name(group) == name]
        for task in judged_tasks(own):
            table = _class_table(name, own, task)
            if table is not None:
                made.append(table)
    return made


def _class_table(name: str, groups: Sequence[Group], task: Task) -> Optional[Table]:
    by_run: Dict[str, AveragePrecision] = {}
    reference: Dict[str, Optional[float]] = {}
    for group in groups:
        for run in group.runs:
            known = judged(run).get(task)
            if known is not None and known.difference is None:
                reference = reference or known.classes
            elif known is not None:
                by_run[f"{run.label} {_precision(run)}"] = known
    for known in by_run.values():
        # Torch fp32 need not have a row.
        reference = reference or _classes_of_reference(known)
    if len(reference) < 2:
        return None
    lines = []
    for kind, ap in reference.items():
        differences = [_class_difference(run, kind, ap) for run in by_run.values()]
        lines.append(
            (min((x for x in differences if x is not None), default=0.0), kind, ap, differences)
        )
    shown = sorted(lines, key=lambda line: line[0])[:MOST_CLASSES]
    kept = lines if len(lines) <= MOST_CLASSES else shown
    more = len(lines) - len(kept)
    return Table(
        title=f"{name}: {TASKS[task]} AP by class",
        columns=(*left("class"), *right("Torch fp32", *by_run)),
        rows=tuple(
            (kind, percent(ap), *("-" if x is None else f"{x:+.2f}" for x in differences))
            for _, kind, ap, differences in kept
        ),
        notes=(f"the {MOST_CLASSES} classes that lose most, of {len(lines)}",) if more else (),
    )


def _class_difference(
    known: AveragePrecision, kind: str, reference: Optional[float]
) -> Optional[float]:
    """What the AP of a class differs by; files of earlier versions do not have it themselves."""
    if known.difference is not None and known.difference.classes:
        return known.difference.classes.get(kind)
    own = known.classes.get(kind)
    return None if own is None or reference is None else own - reference


def _classes_of_reference(known: AveragePrecision) -> Dict[str, Optional[float]]:
    """Class -> AP of Torch fp32, by what a run differs from it; empty where that is not known."""
    differs = {} if known.difference is None else known.difference.classes
    values = ((kind, ap, differs.get(kind)) for kind, ap in known.classes.items() if differs)
    return {kind: None if ap is None or value is None else ap - value for kind, ap, value in values}


def _peak_share(group: Group, run: Run, peaks: Dict[str, float]) -> Optional[float]:
    """Of the operations per second that the machine reaches, 0 to 1; None where not known."""
    peak = peaks.get(run.effective_precision or "")
    if not (peak and group.flops and run.statistics):
        return None
    return 1000 * group.flops / run.statistics.median_ms / peak


def _model_notes(
    results: Results, groups: Sequence[Group], peaks: Dict[str, float]
) -> Iterator[str]:
    """What a reader of a test model's table has to know, the statuses of its rows apart."""
    yield from _percentile_notes(groups)
    yield from _check_note(groups[0])
    yield from _new_size_notes(groups)
    names = dict.fromkeys(name for group in groups for name in group.not_compared)
    if names:
        yield f"not compared, as it is not known what they are: {', '.join(names)}"
    yield from _accuracy_notes(results, groups)
    yield from _bisection_notes(groups)
    yield from _rounds_notes(results, groups)
    baseline = f"{runner(groups[0].export)} fp32, same rounds"
    yield from _ratio_notes(groups, baseline, lambda run: run.speedup_over_fp32)
    yield from _ratio_notes(
        groups, "Torch of its own environment", lambda run: run.speedup_over_own_torch
    )
    yield from _peak_note(groups[0], peaks)
    yield from _recompilation_notes(groups)
    if any(run.effective_precision == "tf32" for group in groups for run in group.runs):
        yield TF32_NOTE
    yield from _environment_notes(results, groups)
    if not groups[0].image:  # Torch was timed against itself on all images together.
        yield from aa_note(results)
    yield from missing_notes(results)
    yield from dict.fromkeys(_weights_note(group) for group in groups if group.weights)
    yield from (calibration_note(group.calibrated) for group in groups if group.calibrated)
    for run in (run for group in groups for run in group.runs):
        if run.control is not None:
            yield f"{run.label} int8: {control_note(run.control)}"
        elif run.requested_precision == "int8" and run.accuracy and run.accuracy.verdict == "loses":
            yield (
                f"{run.label} int8: --calibration-annotations, of images that are not evaluated, "
                "finds the layers that cost AP and leaves them in fp32"
            )
    if any(group.weights and group.weights.source == "synthetic" for group in groups):
        yield SYNTHETIC_NOTE


def _weights_note(group: Group) -> str:
    """Where the weights come from, and what no checkpoint says: what they were trained with."""
    if group.weights.source != "file" or group.model not in MODELS:
        return weights_note(group.weights)
    return (
        f"{weights_note(group.weights)}, with the anchors, means and thresholds of "
        f"{MODELS[group.model].config}: for others give the --config-file"
    )


def _percentile_notes(groups: Sequence[Group]) -> Iterator[str]:
    cells = [
        _percentile_cell(run.statistics) for group in groups for run in group.runs if run.statistics
    ]
    if any(cell.endswith(_UNBOUNDED) for cell in cells):
        yield (
            f"{_UNBOUNDED}: of fewer than {samples_to_bound(0.99)} calls, too few to bound the "
            "99th percentile with 95% confidence"
        )
    bounds = _known_bounds(groups)
    if bounds:
        shares = [bound.share for bound in bounds]
        yield (
            f"{', '.join(bound.heading for bound in bounds)}: it is 95% sure that at least "
            f"{_enumerated(shares)} of calls are shorter"
        )


def _check_note(group: Group) -> Iterator[str]:
    sizes = {name: f"{size[0][0]}x{size[0][1]}" for name, size in group.image_sizes.items()}
    if not set(TUNING) <= set(sizes):
        yield from (f"timed at {size}" for size in sizes.values())
        return
    small, timed, large = (sizes.pop(name) for name in TUNING)
    others = [small, *filter(None, (sizes.pop(name, None) for name in (TURNED, *DRAWN))), large]
    blank = "; where it finds nothing, on a plain picture, too" if sizes.pop(BLANK, None) else ""
    reference = f"{runner(group.export)} fp32"
    if sizes:
        several = ", ".join([timed, *sizes.values()])
        yield (
            f"timed on {1 + len(sizes)} images in turn ({several}), the mean of a round is what "
            f"counts; Detections: against {reference} on each, and at {_enumerated(others)}, the "
            f"worst of all{blank}"
        )
    else:
        at = list(dict.fromkeys((small, timed, *others[1:])))
        worst = {
            1: "",
            2: ", the worse",
            3: ", the worst of the three",
            4: ", the worst of the four",
            5: ", the worst of the five",
            6: ", the worst of the six",
        }
        yield (
            f"timed at {timed}; Detections: against {reference} at {_enumerated(at)}"
            f"{worst[len(at)]}{blank}"
        )


def _enumerated(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _rounds_notes(results: Results, groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        if group.rounds and group.image:
            yield f"{group.precision}: {group.rounds} rounds, those of all images together"
        elif group.rounds:
            half_width = StopRule.half_width if group.half_width is None else group.half_width
            budget_s = group.budget_s or results.settings.time_budget
            known = (group.stopped, half_width, budget_s, group.generations)
            made = describe_stop(group.rounds, *known)
            yield f"{group.precision}: {made}"


def _ratio_notes(
    groups: Sequence[Group], over: str, ratio: Callable[[Run], Optional[Speedup]]
) -> Iterator[str]:
    """Speedups over something else than the baseline, where there are any."""
    for group in groups:
        known = [(run.label, ratio(run)) for run in group.runs]
        texts = [f"{label} {describe_speedup(speedup)}" for label, speedup in known if speedup]
        if texts:
            yield f"{group.precision} over {over}: {', '.join(texts)}"


def _peak_note(group: Group, peaks: Dict[str, float]) -> Iterator[str]:
    if peaks:
        reached = ", ".join(f"{precision} {peak / 1e9:.0f}" for precision, peak in peaks.items())
        known = f"a call is {group.flops / 1e9:.1f} GFLOPs" if group.flops else ""
        yield (
            f"% of peak: of what PyTorch's matrix products reach here, in GFLOP/s {reached}; "
            f"{known or 'the FLOPs of a call are not known'}"
        )


def _recompilation_notes(groups: Sequence[Group]) -> Iterator[str]:
    """Runs that compiled once more while they were timed: their longest calls are no inference."""
    for group in groups:
        for run in group.runs:
            count = run.coverage.recompilations_while_timed
            if count:
                yield (
                    f"{run.label} {_precision(run)}: compiled {count} more times within the "
                    "timed rounds"
                )


def _environment_notes(results: Results, groups: Sequence[Group]) -> Iterator[str]:
    """What stands behind the runs of a backend that was measured in another environment."""
    runs = [run for group in groups for run in group.runs]
    named = results.settings.environment
    elsewhere = {run.backend for run in runs if run.environment or run.name in named}
    lines = []
    for run in runs:
        python = [f"Python {run.python}"] if run.python else []
        facts = [*python, *(f"{name} {version}" for name, version in run.versions.items())]
        if run.backend in elsewhere and facts:
            lines.append(f"{run.label}: {', '.join(facts)}")
    yield from dict.fromkeys(lines)


def aa_note(results: Results) -> Iterator[str]:
    """What difference the machine can resolve, if that was measured."""
    aa = results.aa
    if aa is None or None in (aa.resolution, aa.speedup.low, aa.speedup.high):
        return
    kinds = {group.model: group.export for group in results.groups}
    baseline = runner(kinds.get(aa.model, ""))
    yield (
        f"A/A, {baseline} against itself in two processes ({aa.model} {aa.precision}): "
        f"{aa.speedup.ratio:.3f}x, {aa.speedup.low:.3f} to {aa.speedup.high:.3f}; differences "
        f"below {100 * aa.resolution:.1f}% cannot be told from noise here"
    )


# The other tables ------------------------------------------------------------------------------

# Columns of the table of coverage: heading, field of a run's `Coverage`. The others are in `more`.
_COVERAGE = {
    "operators": "operators",
    "in engines": "operators_in_engine",
    "FLOPs in engines": "share_of_flops",
    "segments": "segments",
    "graph breaks": "graph_breaks",
    "warm (MiB)": "resident_warm_mb",
    "at the end (MiB)": "resident_end_mb",
}
# Columns of the table of costs that hold seconds: heading, field of a run's `Preparation`.
_PHASES = {"export (s)": "export", "convert (s)": "convert", "compile (s)": "compile"}


def cases_table(groups: Sequence[Group]) -> Table:
    """Time against what is in the picture: a line for each run, number of objects and image.

    Args:
        groups: at least one.
    """
    cases = [case(group) for group in groups]
    names = ("objects", "image")
    several = [name for place, name in enumerate(names, 1) if len({x[place] for x in cases}) > 1]
    lines = [(group, run) for group in groups for run in group.runs]
    order = list(dict.fromkeys(map(_run_key, lines)))
    # Images stay in their order; all of them together come last.
    lines.sort(
        key=lambda line: (order.index(_run_key(line)), line[0].objects, line[0].image is None)
    )
    return Table(
        title="What is in the picture",
        columns=(
            *left("Model", "Backend", "precision"),
            *(Column(name, right=name == "objects") for name in several),
            *right("found", "Median(ms)"),
            *left("Speedup", "Detections"),
        ),
        rows=tuple(_case_cells(group, run, several) for group, run in lines),
        notes=(
            "found: in the image itself; Detections: the worst of all sizes at which it was "
            "compared",
        ),
    )


def _run_key(line: Tuple[Group, Run]) -> Tuple[str, str, str]:
    group, run = line
    return group.model, run.name, group.precision


def _case_cells(group: Group, run: Run, several: Sequence[str]) -> Tuple[str, ...]:
    what = {"objects": str(group.objects), "image": group.image or "together"}
    return (
        short_name(group.model),
        run.label,
        _precision(run),
        *(what[name] for name in several),
        "-" if group.found is None else str(group.found),
        f"{run.statistics.median_ms:.1f}" if run.statistics else "-",
        describe_speedup(run.speedup) if run.speedup else "-",
        _detections(run),
    )


def coverage_table(groups: Sequence[Group]) -> Table:
    """How much of the model each run's engines took, and its memory; what is not told is `-`.

    Torch takes all of it, and is there for its memory.
    """
    return Table(
        title="Coverage",
        columns=(
            *left("Model", "Backend", "precision", "provider"),
            *right(*_COVERAGE),
            *left("more"),
        ),
        rows=tuple(
            (group_name(group), run.label, _precision(run), run.provider or "-", *cells)
            for group in groups
            for run in group.runs
            for cells in [_coverage_cells(run.coverage)]
            if cells and (not run.baseline or run.coverage.resident_end_mb)
        ),
        notes=(
            "warm, at the end: memory of the process after the warm-up, and after all timed calls",
        ),
        nothing="no coverage is known",
    )


def _coverage_cells(coverage: Coverage) -> List[str]:
    """What is known of a run's coverage; empty where nothing is."""
    known = {field.name: getattr(coverage, field.name) for field in fields(coverage)}
    known = {name: value for name, value in known.items() if value is not None}
    more = [
        f"{name.replace('_', ' ')}: {_listed(value)}"
        for name, value in known.items()
        if name not in _COVERAGE.values()
    ]
    if "share_of_flops" in known:
        known["share_of_flops"] = f"{100 * known['share_of_flops']:.0f}%"
    for name in ("resident_warm_mb", "resident_end_mb"):
        if name in known:
            known[name] = f"{known[name]:.0f}"
    cells = [str(known.get(name, "-")) for name in _COVERAGE.values()]
    return [*cells, "; ".join(more)] if known else []


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {kind}" for kind, count in value.items())
    return str(list(value) if isinstance(value, tuple) else value)


def costs_table(groups: Sequence[Group]) -> Table:
    """What each run took besides its calls, and when that has paid for itself.

    Total has the phases and what lies between and after them, such as a first call in which the
    engine picks its kernels, but not building the model. The longest first call is that of the
    sizes that are not timed.
    """
    return Table(
        title="Costs",
        columns=(
            *left("Model", "Backend", "precision"),
            *right(*_PHASES, "total (s)", "artifact (MiB)", "peak memory (MiB)"),
            *left("break-even (images)", "longest first call"),
        ),
        rows=tuple(
            (group_name(group), run.label, _precision(run), *_cost_cells(run, run.prepare))
            for group in groups
            for run in group.runs
            if run.prepare
        ),
        notes=tuple(_copies_notes(groups)),
        nothing="no run was prepared",
    )


def _copies_notes(groups: Sequence[Group]) -> Iterator[str]:
    """What of a call goes into copies between the host and a GPU."""
    for group in groups:
        texts = [
            f"{run.label} {_digits(1000 * run.copies.upload_s, 2)} and "
            f"{_digits(1000 * run.copies.download_s, 2)}"
            for run in group.runs
            if run.copies
        ]
        if texts and not group.image:
            yield (
                f"{group_name(group)} {group.precision}, ms of a call in which images go to the "
                f"GPU, and detections come back: {', '.join(texts)}"
            )


def _cost_cells(run: Run, prepare: Preparation) -> List[str]:
    phases = [getattr(prepare, name) for name in _PHASES.values()]
    seconds = ["-" if phase is None else f"{phase:.1f}" for phase in phases]
    if run.cached:
        seconds[-1] += " cached"
    sizes = (run.artifact_mb, run.peak_device_memory_mb or run.peak_memory_mb)
    return [
        *seconds,
        f"{prepare.own:.1f}",
        *("-" if size is None else f"{size:.0f}" for size in sizes),
        "-" if run.break_even is None else describe_break_even(run.break_even),
        _first_call(run),
    ]


def _first_call(run: Run) -> str:
    """The longest first call at a size that is not timed: `612.3 ms at max, then 410.2`."""
    if not run.first_call_s:
        return "-"
    name, first = max(run.first_call_s.items(), key=lambda each: each[1])
    text = f"{_digits(1000 * first)} ms at {name}"
    later = run.size_seconds.get(name, ())
    # One that is long for its size alone is not repeated.
    if not later or later == (first,):
        return text
    return f"{text}, then {_digits(1000 * median(later))}"


def stages_table(groups: Sequence[Group]) -> Table:
    """Where the time of the eager modules goes, and what an engine for the backbone could gain."""
    known = [(group, group.stages) for group in groups if group.stages]
    names = [name for name in STAGES if any(getattr(stages, name) for _, stages in known)]
    return Table(
        title="Where the time goes",
        columns=(
            *left("Model", "precision"),
            *right(*(f"{STAGES[name]} (ms)" for name in names), "total (ms)", "ceiling"),
        ),
        rows=tuple(
            (group_name(group), group.precision, *_stage_cells(stages, names))
            for group, stages in known
        ),
        notes=(
            "ceiling: the speedup of an engine that takes backbone + FPN only, and no time for "
            "them",
        ),
        nothing="no stages were timed",
    )


def _stage_cells(stages: Stages, names: Sequence[str]) -> List[str]:
    seconds = [getattr(stages, name) for name in names]
    return [
        *(f"{1000 * taken:.1f}" if taken else "-" for taken in seconds),
        f"{1000 * sum(seconds):.1f}",
        f"{ceiling(stages):.2f}x",
    ]


def published_table(groups: Sequence[Group]) -> Table:
    """Our speedups beside TorchBlade's published ones."""
    return Table(
        title="Beside TorchBlade's published speedups",
        columns=(
            *left("Model", "Export", "precision", "Backend"),
            *right("Speedup", "TorchBlade, published"),
        ),
        rows=tuple(
            _published_cells(group, run)
            for group in groups
            if not group.image
            for run in group.runs
            if not run.baseline
        ),
        notes=(
            "Each speedup is over Torch on the same machine. TorchBlade's was measured with "
            "TensorRT on a CUDA GPU that its page does not name: compare ratios, not milliseconds.",
        ),
        compact=True,
    )


def _published_cells(group: Group, run: Run) -> Tuple[str, ...]:
    precision = run.effective_precision or run.requested_precision
    theirs = published.beside(group.model, precision)
    other = "" if theirs is None or theirs.precision == precision else f" ({theirs.precision})"
    return (
        group_name(group),
        group.export,
        precision,
        run.label,
        "-" if run.speedup is None else describe_speedup(run.speedup),
        "-" if theirs is None else f"{theirs.ratio:.2f}x{other}",
    )
