#!/usr/bin/env python3
"""Makes a result file of run_blade.py a page: one HTML file that needs no network and no script.

It has the tables, all samples, the speedups with their intervals beside TorchBlade's published
ones, and the image with what each run finds in it, where `detections.json` lies beside the
result file, as `run_blade.py --output` leaves it.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape

from errors import InputError, Parser
from models import BLANK, DRAWN, TUNING, TURNED, runner, timed
from results import published, scatter, tables
from results.facts import TASKS, case, case_name
from results.file import Found, load, load_found, result_file, write_text
from results.recommendation import recommend, sentences
from results.record import Drawn, Group, Picture, Results, Run, Task, WorstImage
from results.tables import Table, short_name

TEMPLATES = Path(tables.__file__).parent
# Matplotlib writes these into the drawing; the page has other colours by day than by night.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--points)",
    "#050505": "var(--accent)",
    "#060606": "var(--published)",
    "#070707": "var(--green)",
    "#080808": "var(--olive)",
    "#090909": "var(--rose)",
    "#0a0a0a": "var(--teal)",
}
INK, SOFT, LINE, POINTS, ACCENT, PUBLISHED, GREEN, OLIVE, ROSE, TEAL = COLOURS
# Of backends, the baseline apart. Where there are more they begin anew, as labels tell, too.
SERIES = (POINTS, GREEN, PUBLISHED, OLIVE, ROSE, TEAL)
MARKERS = {"fp32": "o", "tf32": "o", "fp16": "s", "bf16": "D", "int8": "^"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
}
# Inches. Narrow, so that letters keep a size on a phone, where a drawing is scaled to its width.
WIDTH, ROW, MARGIN = 6.4, 0.34, 0.9
# Points: the size of a label in a scatter plot, and of a marker.
LABEL, MARKER = 9.0, 6.5
# So many widths of a line are the longer side of a drawing.
PENS = 240
# Opacity of what has a score of 0.
FAINTEST = 0.25
# An axis of times is logarithmic where the longest is more than so many times the shortest.
LOGARITHMIC = 8


@dataclass(frozen=True)
class Plot:
    """A plot as SVG, with the words that stand for it."""

    title: str
    svg: Markup
    caption: str


# Tables ----------------------------------------------------------------------------------------


def reordered(table: Table) -> Table:
    """The table of a test model for its own section: without its name, what matters most first."""
    first = ("Backend", "precision", "Speedup", "Detections")
    headings = [column.heading for column in table.columns]
    first = (*first, *(name for name in headings if name.endswith("AP")))
    named = [name for name in headings[1:] if name not in first]
    order = [headings.index(name) for name in (*first, *named)]
    return replace(
        table,
        columns=tuple(table.columns[place] for place in order),
        rows=tuple(tuple(row[place] for place in order) for row in table.rows),
    )


# Plots -----------------------------------------------------------------------------------------


def _figure(rows: int) -> Tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, MARGIN + ROW * rows), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, name: str, label: str) -> Markup:
    """The drawing for the inside of a page.

    Args:
        name: of the drawing; its ids must differ from those of the others on the page.
        label: what it shows, for those who cannot see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for placeholder, colour in COLOURS.items():
        svg = svg.replace(placeholder, colour)
    # Its size is that of the page's column.
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]+")[^>]*>', r"<svg \1 LABEL>", svg)
    return Markup(svg.replace("LABEL", f'role="img" aria-label="{escape(label)}"', 1))


def _names(runs: Sequence[Tuple[Group, Run]]) -> List[str]:
    return [f"{run.label} {run.effective_precision or ''}".strip() for _, run in runs]


def _literal(text: str) -> str:
    """The text for Matplotlib, which takes what is between dollars for mathematics."""
    return text.replace("$", r"\$")


def _rows(axes: Any, names: Sequence[str]) -> None:
    """One line of the plot for each name, the first on top."""
    axes.set_yticks(range(len(names)), labels=[_literal(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def samples_plot(groups: Sequence[Group], name: str) -> Optional[Plot]:
    """Every timed call of every run of a test model; None where there is none."""
    runs = [(group, run) for group in groups for run in group.runs if run.samples_s]
    if not runs:
        return None
    figure, axes = _figure(len(runs))
    jitter = np.random.default_rng(0)
    medians = []
    for row, (_, run) in enumerate(runs):
        milliseconds = 1000 * np.array(run.samples_s)
        heights = row + jitter.uniform(-0.25, 0.25, len(milliseconds))
        axes.plot(milliseconds, heights, ".", color=POINTS, alpha=0.6, markeredgewidth=0)
        medians.append(float(np.median(milliseconds)))
        axes.plot([medians[-1]] * 2, [row - 0.38, row + 0.38], color=ACCENT, linewidth=2)
    if max(medians) > LOGARITHMIC * min(medians):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("ms a call")
    _rows(axes, _names(runs))
    facts = [
        f"{label}: {median:.4g} ms ({len(run.samples_s)})"
        for label, median, (_, run) in zip(_names(runs), medians, runs)
    ]
    caption = "One point for each timed call, a line at the median. "
    caption += f"Median and number of calls: {'; '.join(facts)}."
    return Plot("All samples", _svg(figure, f"samples-{name}", caption), caption)


def speedup_plot(groups: Sequence[Group], name: str) -> Optional[Plot]:
    """Speedups over Torch with their intervals, and what TorchBlade published beside them."""
    runs = [(group, run) for group in groups for run in group.runs if run.speedup]
    if not runs:
        return None
    figure, axes = _figure(len(runs))
    facts = []
    for row, ((group, run), label) in enumerate(zip(runs, _names(runs))):
        speedup = run.speedup
        if speedup.low is not None:
            axes.plot([speedup.low, speedup.high], [row, row], color=POINTS, linewidth=2)
        axes.plot(speedup.ratio, row, "o", color=POINTS)
        text = f"{label}: {speedup.ratio:.2f}x"
        theirs = published.beside(group.model, run.effective_precision or "")
        if theirs is not None:
            axes.plot(theirs.ratio, row, "D", color=PUBLISHED, markerfacecolor="none")
            text += f" (TorchBlade, {theirs.precision}: {theirs.ratio:.2f}x)"
        facts.append(text)
    axes.axvline(1, color=ACCENT, linewidth=1)
    axes.set_xlim(left=0)
    baseline = runner(groups[0].export)
    axes.set_xlabel(f"speedup over {baseline} at the same precision")
    _rows(axes, _names(runs))
    caption = "Points with 95% intervals; diamonds are what TorchBlade published for TensorRT on a "
    caption += f"GPU (fp16 beside our bf16). {'; '.join(facts)}."
    return Plot("Speedups", _svg(figure, f"speedups-{name}", caption), caption)


def accuracy_plot(
    groups: Sequence[Group], name: str, task: Task, least_ratio: float
) -> Optional[Plot]:
    """Average precision against the time of a call; None where there is nothing to compare.

    Args:
        least_ratio: the share of the reference's AP that is to be kept.
    """
    found = scatter.points(groups, task)
    if len(found) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4 + 0.08 * len(found)), layout="constrained")
    axes = figure.subplots()
    labels = dict.fromkeys(x.label for x in found if x.label != groups[0].baseline.label)
    known = dict(zip(labels, itertools.cycle(SERIES)))
    colours = [known.get(x.label, ACCENT) for x in found]
    for point, colour in zip(found, colours):
        _mark(axes, point, colour)
    steps = scatter.frontier(found)
    axes.plot(*zip(*steps), color=SOFT, linewidth=1, linestyle=":", zorder=1)
    theirs = scatter.reference_ap(groups, task)
    baseline = f"{runner(groups[0].export)} fp32"
    if theirs is not None:
        _mark_reference(axes, theirs, least_ratio, baseline)
    axes.margins(x=0.1, y=0.1)
    _time_axis(axes, [x.ms for x in found])
    axes.set(xlabel="ms a call", ylabel=f"{TASKS[task]} AP (%)")
    axes.grid(axis="y", color=LINE)
    axes.tick_params(axis="y", labelcolor=SOFT)
    lines = [list(line) for line in zip(steps, steps[1:])]
    lines += [[(x.ms, end) for end in x.interval] for x in found if x.interval]
    if theirs is not None:
        lines.append([(low, theirs) for low in axes.get_xlim()])
    _label(figure, axes, found, colours, lines)
    title = f"Time against {TASKS[task]} AP"
    caption = "Filled: of the runs that match, no other is as fast and finds as much."
    if theirs is not None:
        caption += (
            f" Bars: 95% intervals of the difference from {baseline}, whose AP is the line. The "
            f"band below is what may be lost of it: down to {least_ratio:.4g} of it."
        )
    words = f"{title}. {caption} {_spoken(found)}"
    return Plot(title, _svg(figure, f"{task}-{name}", words), caption)


def _mark(axes: Any, point: scatter.Point, colour: str) -> None:
    """A point with its interval: filled, if it is efficient."""
    if point.interval is not None:
        axes.plot([point.ms] * 2, point.interval, color=colour, linewidth=1.2, zorder=2)
    axes.plot(
        point.ms,
        point.ap,
        MARKERS.get(point.precision, "o"),
        color=colour,
        markersize=MARKER,
        markerfacecolor=colour if point.is_efficient else "none",
        markeredgewidth=1.3,
        zorder=3,
    )


def _mark_reference(axes: Any, ap: float, least_ratio: float, baseline: str) -> None:
    """A line at the reference's AP, and a band down to what has to be kept of it."""
    least = least_ratio * ap
    axes.axhline(ap, color=ACCENT, linewidth=1, zorder=1)
    axes.axhspan(least, ap, color=ACCENT, alpha=0.13, linewidth=0, zorder=0)
    texts = ((ap, baseline, "bottom"), (least, f"{least_ratio:.4g} of it", "top"))
    for height, text, side in texts:  # Beside the drawing, and away from each other.
        axes.text(
            *(1.01, height, _literal(text)),
            transform=axes.get_yaxis_transform(),
            color=ACCENT,
            fontsize=LABEL,
            va=side,
        )


def _time_axis(axes: Any, milliseconds: Sequence[float]) -> None:
    if max(milliseconds) > LOGARITHMIC * min(milliseconds):
        axes.set_xscale("log")
        _label_decades(axes.xaxis)
        axes.minorticks_off()


def _label_decades(axis: Any) -> None:
    """Matplotlib labels powers of ten only on a logarithmic axis, which may be but one."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _label(
    figure: Any,
    axes: Any,
    found: Sequence[scatter.Point],
    colours: Sequence[str],
    lines: Sequence[Sequence[Tuple[float, float]]],
) -> None:
    """The name of each point beside it.

    Args:
        lines: ends of those that a name must not lie on: upright ones and level ones.
    """
    figure.draw_without_rendering()  # From here on it is known what lies where.
    unit = 72 / figure.dpi
    places = [axes.transData.transform((x.ms, x.ap)) * unit for x in found]
    taken = [scatter.around([place], MARKER / 2) for place in places]
    taken += [scatter.around(axes.transData.transform(line) * unit, 1.0) for line in lines]
    within = tuple(axes.bbox.extents * unit)
    names = [f"{x.name}{'' if x.is_right else ', MISMATCH'}" for x in found]
    labels = scatter.place_labels(names, places, taken, within, LABEL)
    for point, name, (x, y), label, colour in zip(found, names, places, labels, colours):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            _literal(name),
            (point.ms, point.ap),
            (label.x - x, label.y - y),
            textcoords="offset points",
            color=colour,
            fontsize=LABEL,
            fontweight="bold" if point.is_efficient else "normal",
            ha="right" if label.is_left else "left",
            va="center",
            arrowprops=line if label.is_far else None,
            in_layout=False,
        )


def _spoken(found: Sequence[scatter.Point]) -> str:
    """What a scatter plot shows, for those who cannot see it; the table has it for the others."""
    facts = [
        f"{x.name}: {x.ms:.4g} ms, AP {x.ap:.2f}"
        + (f" ({x.interval[0]:.2f} to {x.interval[1]:.2f})" if x.interval else "")
        + ("" if x.is_right else ", mismatch")
        + (", filled" if x.is_efficient else "")
        for x in found
    ]
    return "; ".join(facts)


def sizes_plot(groups: Sequence[Group], name: str) -> Optional[Plot]:
    """Time against image size, for the runs that were timed at `opt` and called at the others.

    Not of several images together: their sample is a mean over them. The first has a plot alone.
    """
    runs = [
        (group, run)
        for group in groups
        if set(group.image_sizes) - {BLANK, TURNED, *DRAWN} == set(TUNING)
        for run in group.runs
        if run.samples_s and {"min", "max"} <= set(run.size_seconds)
    ]
    if not runs:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4 + 0.1 * len(runs)), layout="constrained")
    axes = figure.subplots()
    facts, ticks = [], set()
    styles = ("-", "--", ":", "-.")
    for number, ((group, run), label) in enumerate(zip(runs, _names(runs))):
        seconds = {**run.size_seconds, "opt": run.samples_s}
        points = sorted(
            (
                sum(height * width for height, width in group.image_sizes[size]) / 1e6,
                1000 * float(np.median(seconds[size])),
            )
            for size in TUNING
        )
        colour = ACCENT if run.baseline else (POINTS, PUBLISHED)[number // len(styles) % 2]
        axes.plot(
            *zip(*points),
            styles[number % len(styles)],
            marker=".",
            color=colour,
            label=_literal(label),
        )
        facts.append(f"{label}: " + ", ".join(f"{ms:.4g} ms" for _, ms in points))
        ticks.update(area for area, _ in points)
    axes.set(xlabel="megapixels a call", ylabel="ms a call", xscale="log", yscale="log")
    axes.grid(axis="y", color=LINE)
    axes.tick_params(axis="y", labelcolor=SOFT)
    axes.set_xticks(sorted(ticks), labels=[f"{area:.2g}" for area in sorted(ticks)])
    _label_decades(axes.yaxis)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    caption = (
        "Medians; at opt of all timed calls, at min and max of the few that the comparison of "
        "detections made, not in turns with the others. "
    )
    caption += f"min, opt, max: {'; '.join(facts)}."
    return Plot("Time against image size", _svg(figure, f"sizes-{name}", caption), caption)


# Pictures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A detection in a picture, in pixels.

    Attributes:
        kind: `matched`, `lost` or `spurious`.
        corners: of a rotated box, for SVG.
        keypoints: for SVG: a path of points.
        mask: for SVG: a path around the mask.
        opacity: 0 to 1: what hardly counts is faint.
    """

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str
    corners: str = ""
    keypoints: str = ""
    mask: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """What a run found, drawn on the image.

    Attributes:
        image: id of the image on the page; None where there is none.
        labels: a semantic map, a PNG file in Base64; None where there is none.
    """

    width: int
    height: int
    image: Optional[str]
    boxes: List[Box]
    caption: str
    labels: Optional[str] = None

    @property
    def pen(self) -> float:
        """How wide a line is, in pixels of the image: much the same on the screen."""
        return round(max(self.width, self.height) / PENS, 2)

    @property
    def description(self) -> str:
        """The words for those who cannot see it."""
        on_it = ["boxes"] * bool(self.boxes) + ["a map of labels"] * bool(self.labels)
        on_it += ["masks"] * any(box.mask for box in self.boxes)
        on_it += ["poses"] * any(box.keypoints for box in self.boxes)
        return f"The image with {_listed(on_it) or 'nothing'} drawn on it. {self.caption}"


def _listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def pictures(
    groups: Sequence[Group], found: Optional[Picture], image: Optional[str]
) -> List[Drawing]:
    """The image with the detections of the reference and of each run drawn on it.

    Args:
        groups: of one case.
        found: in its image; None where that is not known.
        image: id of the image on the page, or None.
    """
    if found is None or not found.reference or not groups[0].image_sizes:
        return []
    height, width = found.size or timed_size(groups[0])
    reference = found.reference[0]
    count = len(reference.scores)
    boxes = _boxes(reference, ["matched"] * count)
    caption = f"{runner(groups[0].export)} fp32, the reference: {_described(reference)}"
    drawn = [Drawing(width, height, image, boxes, caption, reference.labels)]
    for precision, runs in found.runs.items():
        for label, (own, *_) in runs.items():
            kinds = ["matched" if agrees else "spurious" for agrees in own.agrees]
            boxes = _boxes(own, kinds) + _boxes(
                _picked(reference, own.lost), ["lost"] * len(own.lost)
            )
            counted = f"{kinds.count('matched')} agree, "
            counted += f"{len(own.lost)} lost, {kinds.count('spurious')} spurious"
            said = counted if boxes or own.labels is None else "its map"
            drawn.append(
                Drawing(width, height, image, boxes, f"{label} {precision}: {said}", own.labels)
            )
    return drawn


def worst_of(groups: Sequence[Group]) -> List[WorstImage]:
    """All images in which some run differs most."""
    runs = [run for group in groups for run in group.runs]
    return [each for run in runs if run.accuracy for each in run.accuracy.worst]


def worst_images(groups: Sequence[Group], found: Found, images: Dict[str, bytes]) -> List[Worst]:
    """For each run that mismatches or has less AP: its worst images, the reference's beside them.

    Args:
        found: what was found, and in which images.
        images: names of the files that are there.
    """
    drawn = []
    for group in groups:
        for run in group.runs:
            pairs = [
                _worst_pair(each, found[each.picture], run, images)
                for each in (run.accuracy.worst if run.accuracy else ())
                if each.picture in found
                and run.label in found[each.picture].runs.get(run.requested_precision, {})
            ]
            if pairs:
                title = f"Where {run.label} {run.requested_precision} differs most"
                drawn.append(Worst(title, pairs))
    return drawn


def _worst_pair(
    each: WorstImage, picture: Picture, run: Run, images: Dict[str, bytes]
) -> Tuple[Drawing, Drawing]:
    height, width = picture.size or (1, 1)
    image = _identifier(picture.image) if picture.image in images else None
    reference = picture.reference[0]
    (own,) = picture.runs[run.requested_precision][run.label]
    kinds = ["matched" if agrees else "spurious" for agrees in own.agrees]
    boxes = _boxes(own, kinds) + _boxes(_picked(reference, own.lost), ["lost"] * len(own.lost))
    said = f"{each.image}: {each.lost} lost, {each.spurious} spurious"
    if each.classes:
        said += f" ({each.classes} of another class)"
    if each.score_difference is not None and each.iou is not None:
        said += f"; the others: scores off by {each.score_difference:.3f}, IoU {each.iou:.3f}"
    if each.mask_iou is not None:
        said += f", masks' IoU {each.mask_iou:.3f}"
    if each.oks is not None:
        said += f", OKS {each.oks:.3f}"
    expected = _boxes(reference, ["matched"] * len(reference.scores))
    return (
        Drawing(width, height, image, expected, f"{each.image}: the reference"),
        Drawing(width, height, image, boxes, said),
    )


def _described(found: Drawn) -> str:
    """What there is to see."""
    count = len(found.scores)
    if found.labels is not None and not count:
        return "a map of labels"
    # Of proposals, the best are drawn.
    return f"the best {count} proposals" if -1 in found.classes else f"{count} detections"


def timed_size(group: Group) -> Tuple[int, int]:
    """Height and width of the image that a group was timed on."""
    first, *_ = timed(group.image_sizes)
    return group.image_sizes[first][0]


def _picked(found: Drawn, places: Sequence[int]) -> Drawn:
    lists = {name: value for name, value in vars(found).items() if isinstance(value, tuple)}
    return Drawn(
        **{
            name: tuple(each[place] for place in places) if each else ()
            for name, each in lists.items()
        }
    )


def _boxes(found: Drawn, kinds: Sequence[str]) -> List[Box]:
    lines = zip(found.boxes, found.scores, found.classes, kinds)
    return [
        Box(
            *(x1, y1, max(0, x2 - x1), max(0, y2 - y1), kind),
            title=f"{_called(label)} {score:.2f}, {kind}",
            corners=" ".join(map(str, found.corners[place])) if found.corners else "",
            keypoints=_path(found.keypoints[place]) if found.keypoints else "",
            mask=_closed(found.masks[place]) if found.masks else "",
            # Of proposals there are but logits.
            opacity=1.0 if label < 0 else round(FAINTEST + (1 - FAINTEST) * score, 2),
        )
        for place, ((x1, y1, x2, y2), score, label, kind) in enumerate(lines)
    ]


def _called(label: int) -> str:
    return "proposal, logit" if label < 0 else f"class {label}, score"


def _path(points: Sequence[Tuple[float, float]]) -> str:
    """A path of lines without a length, which round ends make points of."""
    return "".join(f"M{x} {y}h0" for x, y in points)


def _closed(outlines: Sequence[Sequence[float]]) -> str:
    """A path of closed lines, of each the x and y of its corners."""
    return "".join(f"M{' '.join(f'{number:g}' for number in line)}Z" for line in outlines)


# The page --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worst:
    """The images of a data set in which a run differs most: what it finds beside the reference."""

    title: str
    pairs: List[Tuple[Drawing, Drawing]]


@dataclass(frozen=True)
class Section:
    """What the page says of one test model (and number of objects, and image)."""

    name: str
    id: str
    table: Table
    plots: List[Plot]
    pictures: List[Drawing]
    worst: List[Worst]


@dataclass(frozen=True)
class Image:
    """An image of the page, for all drawings on it: its data as an address."""

    id: str
    data: str
    height: int
    width: int


def page(results: Results, found: Found, images: Dict[str, bytes]) -> str:
    """The whole page.

    Args:
        found: name of a case -> what was found in its image.
        images: name -> file, of images that lie beside the result file.
    """
    matplotlib.rcParams.update(STYLE)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(TEMPLATES)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    names = list(dict.fromkeys(map(_case, results.groups)))
    where = results.environment
    return environment.get_template("report.html").render(
        title=f"run_blade: {_title(results)}",
        subtitle=f"{where.time}, {where.cpu.model}, device {results.settings.device}",
        complete=results.complete,
        warnings=results.warnings,
        answers=[sentences(x) for x in results.recommendations or recommend(results)],
        models=[_section(results, name, found, images) for name in names],
        images=_images(results, found, images),
        tables=_more_tables(results),
        environment=_flat({**asdict(where), "settings": asdict(results.settings)}),
    )


def _title(results: Results) -> str:
    tested = list(dict.fromkeys(group.model for group in results.groups))
    return ", ".join(map(short_name, tested)) if len(tested) < 4 else f"{len(tested)} test models"


def _more_tables(results: Results) -> List[Table]:
    """Those of all test models, where there is something in them."""
    several = len(set(map(_case, results.groups))) > len({x.model for x in results.groups})
    made = [
        *([tables.cases_table(results.groups)] if several else []),
        tables.accuracy_table(results.groups),
        *tables.class_tables(results.groups),
        tables.parts_table(results.groups),
        tables.stages_table(results.groups),
        tables.coverage_table(results.groups),
        tables.costs_table(results.groups),
    ]
    return [table for table in made if table.rows]


def _case(group: Group) -> str:
    return case_name(case(group))


def _section(results: Results, name: str, all_found: Found, images: Dict[str, bytes]) -> Section:
    groups = [group for group in results.groups if _case(group) == name]
    identifier = _identifier(name)
    found = all_found.get(name)
    image = _identifier(found.image) if found and found.image in images else None
    made = (samples_plot, speedup_plot, sizes_plot)
    tasks, least = tables.judged_tasks(groups), results.settings.min_ap_ratio
    plots = [
        *(accuracy_plot(groups, identifier, task, least) for task in tasks),
        *(make(groups, identifier) for make in made),
    ]
    return Section(
        name=short_name(name),
        id=identifier,
        table=reordered(tables.model_table(results, groups, results.settings.roofline)),
        plots=[plot for plot in plots if plot is not None],
        pictures=pictures(groups, found, image),
        worst=worst_images(groups, all_found, images),
    )


def _identifier(name: str) -> str:
    """A name that a page may use as an id; two that differ stay different."""
    return re.sub(r"[^\w.]", lambda match: f"-{ord(match[0]):x}-", name)


def _images(results: Results, found: Found, images: Dict[str, bytes]) -> List[Image]:
    """Each image, once for all drawings on it."""
    sizes = {
        found[_case(group)].image: found[_case(group)].size or timed_size(group)
        for group in results.groups
        if group.image_sizes and _case(group) in found
    }
    for each in worst_of(results.groups):
        picture = found.get(each.picture)
        if picture is not None and picture.size is not None:
            sizes[picture.image] = picture.size
    return [
        Image(
            id=_identifier(name),
            data=f"data:{_kind(name)};base64,{base64.b64encode(images[name]).decode()}",
            height=height,
            width=width,
        )
        for name, (height, width) in sizes.items()
        if name in images
    ]


def _kind(name: str) -> str:
    """What an image is, by the name of its file."""
    return "image/jpeg" if name.endswith(".jpg") else "image/png"


def _flat(value: Dict[str, Any], prefix: str = "") -> List[Tuple[str, str]]:
    """Nested facts as names and texts, without unknown ones."""
    lines: List[Tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{key}.")
        elif item not in (None, (), ""):
            text = ", ".join(map(str, item)) if isinstance(item, tuple) else str(item)
            lines.append((f"{prefix}{key}", text))
    return lines


def write(path: Path, to: Path) -> None:
    """Makes the page of a result file and writes it, whole or not at all.

    Raises:
        errors.InputError: the result file, or what lies beside it, cannot be read, or the page
            cannot be written.
    """
    results = load(path)
    if not results.groups:
        raise InputError(f"{path} has no measurements yet")
    found = load_found(path.parent)
    images = {}
    for name in {picture.image for picture in found.values()}:
        with suppress(OSError, ValueError):  # The latter, where it cannot be the name of a file.
            images[name] = (path.parent / Path(name).name).read_bytes()
    write_text(to, page(results, found, images))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command line; returns the exit code."""
    parse = Parser(description="Make a page of a result file of run_blade.py.")
    parse.add_argument(
        "results", metavar="results.json", type=result_file, help="or the folder that has it"
    )
    parse.add_argument("--output", metavar="FILE", type=Path, help="default: report.html beside it")
    options = parse.parse_args(arguments)
    to = options.output or options.results.parent / "report.html"
    try:
        write(options.results, to)
    except InputError as error:
        print(f"{parse.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {to}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
