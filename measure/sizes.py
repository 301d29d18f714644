"""A stream of sizes: calls of images of which each has a size that was never seen before.

Detectron2's resizing gives nearly every photograph a size of its own, and engines do not like that:
they pick kernels, plan memory or compile when they first see one, and may keep what they made.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmark import RunFailed, StopRule
from detectors.inputs import MOST_ELONGATED, Size, narrower
from errors import InputError, Unsupported
from measure import protocol
from measure.progress import Progress
from models import DRAWN, TUNING

if TYPE_CHECKING:
    from measure.group import Running

# Calls of each run where nothing else is asked for, and the fewest that say something.
DEFAULT_COUNT, LEAST_COUNT = 20, 8
# The share of the rounds' time budget that they may take.
BUDGET_SHARE = 1 / 6
# Pixels of an image of the stream differ from those of `opt` by this share at most, so that what a
# call takes longer is for its size being new.
PIXEL_MARGIN = 0.02
# Tries to draw a size that lies on its side, or stands, where the range hardly has any.
MOST_TRIES = 100
# Of the seed, so that sizes and order are drawn each from a sequence of its own.
OF_STREAM, OF_DRAWN, OF_ORDER = 1, 2, 3


# Sizes -----------------------------------------------------------------------------------------


def candidates(
    opt: Size, smallest: Size, largest: Size, seen: Collection[Size]
) -> tuple[list[Size], list[Size]]:
    """The sizes that a stream may have: those that lie on their side, and those that stand.

    Args:
        opt: whose number of pixels they have, to `PIXEL_MARGIN`. Sides differ by no more than a
            factor of `MOST_ELONGATED`, or those of `opt`.
        smallest, largest: what engines are made for; every side lies within.
        seen: sizes of inputs, which are none of them.
    """
    pixels = opt[0] * opt[1]
    most = max(MOST_ELONGATED, max(opt) / min(opt))
    lying, standing = [], []
    for height in range(smallest[0], largest[0] + 1):
        first = max(smallest[1], -(-int((1 - PIXEL_MARGIN) * pixels) // height))
        last = min(largest[1], int((1 + PIXEL_MARGIN) * pixels) // height)
        for width in range(first, last + 1):
            is_taken = (height, width) in seen or abs(height * width / pixels - 1) > PIXEL_MARGIN
            if not is_taken and max(height, width) <= most * min(height, width):
                (standing if height > width else lying).append((height, width))
    return lying, standing


def stream_sizes(
    count: int, opt: Size, smallest: Size, largest: Size, seen: Collection[Size], seed: int
) -> tuple[Size, ...]:
    """The sizes of a stream: none comes twice, and the two orientations take turns.

    Args:
        count: how many; fewer come where there are no more.
        opt, smallest, largest, seen: see `candidates`.
    """
    generator = np.random.default_rng((seed, OF_STREAM))
    queues = [
        [each[place] for place in generator.permutation(len(each))[:count]]
        for each in candidates(opt, smallest, largest, seen)
    ]
    drawn: list[Size] = []
    while len(drawn) < count and any(queues):
        # Where one orientation has no more, the other goes on.
        queue = queues[len(drawn) % 2] or queues[1 - len(drawn) % 2]
        drawn.append(queue.pop())
    return tuple(drawn)


def drawn_sizes(
    count: int, smallest: Size, largest: Size, seen: Collection[Size], seed: int
) -> tuple[Size, ...]:
    """Sizes between those that engines are made for, each side drawn on its own.

    The first lies on its side and the second stands, where the range has both. Logarithms are drawn
    from, as small images are as frequent as large ones.
    """
    generator = np.random.default_rng((seed, OF_DRAWN))
    low, high = np.log(smallest), np.log(np.add(largest, 1))
    drawn: list[Size] = []
    for number in range(count):
        tries = [
            (int(height), int(width))
            for height, width in np.exp(generator.uniform(low, high, size=(MOST_TRIES, 2)))
        ]
        tries = [
            (min(max(height, smallest[0]), largest[0]), min(max(width, smallest[1]), largest[1]))
            for height, width in tries
        ]
        new = [size for size in tries if size not in (*seen, *drawn)]
        turned = [size for size in new if (size[0] > size[1]) == bool(number % 2)]
        drawn += (turned or new)[:1]
    return tuple(drawn)


# What is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Sizes that were drawn before anything is measured.

    Attributes:
        stream: in the order in which they are called; empty: there is no stream.
        drawn: of further inputs whose detections are compared.
        is_asked: whether `--sizes` says how many; else fewer are made where time is short.
        reason: why there is no stream, though it was not turned off; else None.
    """

    stream: tuple[Size, ...] = ()
    drawn: tuple[Size, ...] = ()
    is_asked: bool = False
    reason: str | None = None


def draw(
    asked: int | None, is_fixed: bool, ranges: Mapping[str, Size], others: Iterable[Size], seed: int
) -> Sizes:
    """Draws the sizes that a plan has.

    Args:
        asked: what `--sizes` says.
        is_fixed: whether the number of rounds is set, as in a protocol of someone else's.
        ranges: sizes of the tuning inputs, and of what else is made of the first image.
        others: sizes of further images.

    Raises:
        errors.InputError: so many were asked for, and there are fewer.
    """
    count = (0 if is_fixed else DEFAULT_COUNT) if asked is None else asked
    if count == 0:
        return Sizes()
    smallest, opt, largest = (ranges[name] for name in TUNING)
    if smallest == largest:
        reason = f"engines are made for images of {_text(opt)} alone"
        if asked is not None:
            raise InputError(f"--sizes {asked}: {reason}")
        return Sizes(reason=reason)
    seen = {*ranges.values(), narrower(smallest), *others}
    # The default run is to be short, and the second would be checked for as long as three others.
    drawn = drawn_sizes(1 if asked is None else len(DRAWN), smallest, largest, seen, seed)
    stream = stream_sizes(count, opt, smallest, largest, {*seen, *drawn}, seed)
    if len(stream) == count:
        return Sizes(stream, drawn, is_asked=asked is not None)
    there_are = (
        f"between {_text(smallest)} and {_text(largest)} there are {len(stream)} sizes with about "
        f"as many pixels as {_text(opt)}"
    )
    if asked is not None:
        raise InputError(f"--sizes {asked}: {there_are}, and no more")
    if len(stream) < LEAST_COUNT:
        return Sizes(reason=f"{there_are}, and {LEAST_COUNT} would say something")
    return Sizes(stream, drawn)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


# The stream of a group ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """The stream of a group, before it is made.

    Attributes:
        seconds: that it will take, about.
        limit_s: seconds after which it ends, if `LEAST_COUNT` sizes are done; None: there is no
            limit.
        reason: why there is none, though it was not turned off; else None.
    """

    sizes: tuple[Size, ...] = ()
    seconds: float = 0.0
    limit_s: float | None = None
    reason: str | None = None


def stream_of(asked: Sizes, calls_s: Sequence[float], budget_s: float | None) -> Stream:
    """As much of the stream as fits into the time budget.

    Args:
        calls_s: seconds of a call of each run that takes part, when it was warm.
        budget_s: of the rounds, of which the stream may take `BUDGET_SHARE`; None: no limit.
    """
    each = sum(calls_s)
    count = len(asked.stream)
    if asked.is_asked or budget_s is None or not count:
        return Stream(asked.stream, count * each, reason=asked.reason)
    limit_s = BUDGET_SHARE * budget_s
    if count * each > limit_s:
        count = int(limit_s / each)
    if count < LEAST_COUNT:
        return Stream(
            reason=f"{LEAST_COUNT} would take about {LEAST_COUNT * each:.0f} s, more than a sixth "
            f"of the time budget of {budget_s:g} s: --sizes {LEAST_COUNT} makes them"
        )
    return Stream(asked.stream[:count], count * each, limit_s)


def rounds_rule(rule: StopRule, stream: Stream) -> StopRule:
    """The rule with what the stream leaves of the budget, which is no less than five sixths."""
    if rule.budget_s is None:
        return rule
    taken = min(stream.seconds, BUDGET_SHARE * rule.budget_s)
    return replace(rule, budget_s=round(rule.budget_s - taken, 1)) if taken else rule


def call_stream(
    stream: Stream, runs: Sequence[Running], title: str, seed: int, progress: Progress
) -> None:
    """Calls every run that lives once for each size, in a random order; they take note of it.

    A failure costs a run only.

    Args:
        title: for the progress.
        seed: of the order.
    """
    if not stream.sizes or not any(run.worker for run in runs):
        return
    generator = np.random.default_rng((seed, OF_ORDER))
    start = time.monotonic()
    title = f"{title}: calls of sizes that were never seen before"
    with progress.counting(title, len(stream.sizes), 0, "size") as advance:
        for place, size in enumerate(stream.sizes):
            is_late = stream.limit_s is not None and time.monotonic() - start > stream.limit_s
            if is_late and place >= LEAST_COUNT:
                return  # Compiling for each size takes longer than calls were expected to.
            live = [run for run in runs if run.worker is not None]
            for turn in generator.permutation(len(live)):
                _call(live[turn], size, place)
            advance(1)


def _call(run: Running, size: Size, place: int) -> None:
    try:
        run.new_sizes.append(run.ask(protocol.CallNewSize(size, place)))
    except (RunFailed, InputError, Unsupported) as error:
        run.give_up("failed", f"while it was called at {_text(size)}, a new size: {error}")
