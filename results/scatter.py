"""Time against average precision: which points there are, which are efficient, where labels go.

It draws nothing: report.py does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Iterator, List, Optional, Sequence, Tuple

from results.record import Group, Run, Task
from results.tables import judged

# Left, bottom, right and top of something on the drawing, in points.
Area = Tuple[float, float, float, float]
# Of labels, in points: their distance from what they stand at.
GAP = 7.0
# As shares of the size of letters: how far lines are apart, how wide a letter of a wide font is.
LEADING, LETTER = 1.2, 0.6
# Lines up or down that a label may move.
MOST_LINES = 8


@dataclass(frozen=True)
class Point:
    """A run by its speed and what it finds.

    Attributes:
        precision: that it computed in.
        ms: of the median call.
        ap: in percent.
        interval: of the AP, by the difference from the reference; None where that is not known.
        is_reference: whether it is what the others differ from.
        is_right: whether it neither failed nor mismatched.
        is_efficient: whether no other that is right is at least as fast and finds at least as much,
            and more of one of them.
    """

    label: str
    precision: str
    ms: float
    ap: float
    interval: Optional[Tuple[float, float]] = None
    is_reference: bool = False
    is_right: bool = True
    is_efficient: bool = False

    @property
    def name(self) -> str:
        """What it is called: `OpenVINO bf16`."""
        return f"{self.label} {self.precision}"


def points(groups: Sequence[Group], task: Task) -> List[Point]:
    """The runs that were timed and have an AP; of Torch fp32, which several groups have, the first.

    Args:
        groups: of one test model.
    """
    found: List[Point] = []
    for run in (run for group in groups for run in group.runs):
        point = _point(run, task)
        if point is None or (point.is_reference and any(x.is_reference for x in found)):
            continue
        found.append(point)
    return [replace(x, is_efficient=_is_efficient(x, found)) for x in found]


def _point(run: Run, task: Task) -> Optional[Point]:
    known = judged(run).get(task)
    if known is None or known.ap is None or run.statistics is None:
        return None
    differs = known.difference
    theirs = known.ap - differs.value if differs else 0.0
    return Point(
        label=run.label,
        precision=run.effective_precision or run.requested_precision,
        ms=run.statistics.median_ms,
        ap=known.ap,
        interval=(theirs + differs.low, theirs + differs.high) if differs else None,
        is_reference=run.baseline and run.requested_precision == "fp32",
        is_right=run.status == "ok",
    )


def _is_efficient(point: Point, among: Sequence[Point]) -> bool:
    place = (point.ms, -point.ap)
    others = [(x.ms, -x.ap) for x in among if x.is_right]
    return point.is_right and not any(
        x[0] <= place[0] and x[1] <= place[1] and x != place for x in others
    )


def frontier(found: Sequence[Point]) -> List[Tuple[float, float]]:
    """Corners of the line through the efficient ones: the AP to be had in so many ms."""
    efficient = sorted({(x.ms, x.ap) for x in found if x.is_efficient})
    corners = efficient[:1]
    for ms, ap in efficient[1:]:
        corners += [(ms, corners[-1][1]), (ms, ap)]
    return corners


def reference_ap(groups: Sequence[Group], task: Task) -> Optional[float]:
    """AP of Torch fp32, which need not have a row, in percent; None where nothing differs from it.

    Args:
        groups: of one test model.
    """
    for run in (run for group in groups for run in group.runs):
        known = judged(run).get(task)
        if known is not None and known.ap is not None and known.difference is not None:
            return known.ap - known.difference.value
    return None


# Labels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """Where a text stands, in points.

    Attributes:
        x, y: of its end that is nearer to what it names, in the middle of its height.
        is_left: whether it ends there, and does not begin.
        is_far: whether a line is needed to what it names.
    """

    x: float
    y: float
    is_left: bool = False
    is_far: bool = False


def around(places: Sequence[Tuple[float, float]], margin: float) -> Area:
    """The area of some places and so much around them."""
    xs, ys = zip(*places)
    return min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin


def place_labels(
    texts: Sequence[str],
    at: Sequence[Tuple[float, float]],
    taken: Sequence[Area],
    within: Area,
    size: float,
) -> List[Label]:
    """Places for texts beside points, so that none lies on another or on what is there already.

    Where there is no such place, it is the one that lies on the least.

    Args:
        at: x and y of each point, in points.
        taken: areas of what is there, the points themselves too.
        within: the area of the drawing.
        size: of letters, in points.
    """
    occupied = list(taken)
    placed: List[Tuple[int, Label]] = []
    # From the top: who stands below moves on downwards.
    for place in sorted(range(len(texts)), key=lambda place: -at[place][1]):
        width, height = LETTER * size * len(texts[place]), LEADING * size
        options = [
            (_hidden(area, occupied, within), number, label, area)
            for number, label in enumerate(_options(at[place], size))
            for area in [_area(label, width, height)]
        ]
        _, _, label, area = min(options, key=lambda option: option[:2])
        occupied.append(area)
        placed.append((place, label))
    return [label for _, label in sorted(placed, key=lambda item: item[0])]


def _options(at: Tuple[float, float], size: float) -> Iterator[Label]:
    """Places beside a point, the nearest first."""
    x, y = at
    for lines in sorted(range(-MOST_LINES, MOST_LINES + 1), key=abs):
        # One line up or down is still seen to belong to it.
        is_far = abs(lines) > 1
        gap = 2 * GAP if is_far else GAP
        for is_left in (False, True):
            yield Label(x + (-gap if is_left else gap), y + lines * LEADING * size, is_left, is_far)


def _area(label: Label, width: float, height: float) -> Area:
    start = label.x - width if label.is_left else label.x
    return start, label.y - height / 2, start + width, label.y + height / 2


def _hidden(area: Area, occupied: Sequence[Area], within: Area) -> float:
    """How much of an area lies on others, or outside."""
    inside = _common(area, within)
    whole = (area[2] - area[0]) * (area[3] - area[1])
    return round(whole - inside + sum(_common(area, other) for other in occupied), 6)


def _common(one: Area, other: Area) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
