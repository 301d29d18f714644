#!/usr/bin/env python3
"""Do the intervals of the speedup hold 1 where both sides are the same?

Measures a backend against itself, in two environments with the same interpreter, so many times with
the seeds 0, 1, 2 and so on, one after the other. Of intervals with 95% confidence 95% should hold
1. The results of each invocation are kept in a folder, and what is complete there is not measured
again. Prints a table in Markdown. Options after `--` are run_blade.py's. From the root of the
repository:

    python3 tools/check_coverage.py --folder FOLDER --runs 60 -- --time-budget 30

Exit codes: 0; 1: so few hold 1 that they cannot be intervals with 95% confidence; 2: an invocation
has failed, or the folder has results of other settings; 130: interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import stats

import benchmark
import run_blade
from benchmark import Speedup
from errors import InputError
from models import MODELS
from results import file
from results.record import Results, Run, Settings
from results.tables import Table, left, markdown, right

ROOT = Path(__file__).resolve().parent.parent
CONFIDENCE = 0.95
# The environment of the second side.
AGAIN = "again"
# In the folder of an invocation, beside what run_blade.py keeps there.
SECONDS = "seconds.txt"


@dataclass(frozen=True)
class Invocation:
    """What one invocation says of a backend against itself.

    Attributes:
        speedup: None where one of the sides has failed.
        seconds: that it took; None where it was measured otherwise than by this tool.
    """

    seed: int
    speedup: Optional[Speedup]
    rounds: int
    seconds: Optional[float]

    @property
    def interval(self) -> Optional[Tuple[float, float]]:
        """Of the speedup; None where it has none."""
        known = self.speedup
        if known is None or known.low is None or known.high is None:
            return None
        return known.low, known.high

    @property
    def text(self) -> str:
        """One line."""
        if self.speedup is None or self.interval is None:
            return f"seed {self.seed}: no interval"
        low, high = self.interval
        known = self.speedup
        return (
            f"seed {self.seed}: {known.ratio:.3f}x, {low:.3f} to {high:.3f}, {known.verdict}, "
            f"{self.rounds} rounds"
        )


# Measuring -------------------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> List[Invocation]:
    """All invocations, those that are not in the folder made now.

    Raises:
        InputError: one has failed, or was made with other settings.
    """
    found: List[Invocation] = []
    settings: Optional[Settings] = None
    for seed in range(options.runs):
        folder = options.folder / f"seed-{seed:03}"
        if not is_complete(folder):
            measure(options, seed, folder)
        results = file.load(folder / file.RESULTS)
        own = without_seed(results.settings)
        if settings not in (None, own):
            raise InputError(f"{folder} has results of other settings: choose another --folder")
        settings = own
        found.append(invocation_of(results, options, seed, folder))
        print(found[-1].text, file=sys.stderr, flush=True)
    return found


def is_complete(folder: Path) -> bool:
    """Whether an invocation has ended.

    Raises:
        InputError: its file is damaged.
    """
    path = folder / file.RESULTS
    return path.exists() and file.load(path).complete


def measure(options: argparse.Namespace, seed: int, folder: Path) -> None:
    """One invocation of run_blade.py, which keeps its results in `folder`.

    Raises:
        InputError: it has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as text:
        done = subprocess.run(command(options, seed, folder), stdout=text, stderr=text, cwd=ROOT)
    # 1: a run has failed or mismatched, which its row says.
    if done.returncode not in (0, 1) or not is_complete(folder):
        raise InputError(f"run_blade.py ended with {done.returncode} for seed {seed}: see {log}")
    (folder / SECONDS).write_text(f"{time.monotonic() - start:.1f}\n", encoding="utf-8")


def command(options: argparse.Namespace, seed: int, folder: Path) -> List[str]:
    """The command line of an invocation."""
    height, width = options.image_size
    return [
        *(sys.executable, str(ROOT / "run_blade.py"), "--model", options.model),
        *("--image-size", f"{height}x{width}", "--weights", "synthetic"),
        *("--precision", options.precision, "--backend", options.backend),
        *("--environment", f"{options.backend}@{AGAIN}={sys.executable}"),
        *options.further,
        *("--seed", str(seed), "--output", str(folder)),
    ]


def without_seed(settings: Settings) -> Settings:
    """What all invocations have in common."""
    return replace(settings, seed=0, output=None)


# What was measured -----------------------------------------------------------------------------


def invocation_of(
    results: Results, options: argparse.Namespace, seed: int, folder: Path
) -> Invocation:
    """What a result file says of the two sides.

    Raises:
        InputError: it has no such rows.
    """
    name, again = options.backend, f"{options.backend}@{AGAIN}"
    for group in results.groups:
        rows = {run.name: run for run in group.runs}
        if group.precision == options.precision and {name, again} <= set(rows):
            speedup = speedup_of(rows[name], rows[again], group.generations, seed)
            return Invocation(seed, speedup, group.rounds, seconds_of(folder))
    raise InputError(f"{folder} has no rows {name} and {again} at {options.precision}")


def speedup_of(one: Run, other: Run, generations: Tuple[int, ...], seed: int) -> Optional[Speedup]:
    """Of the second side over the first: the row's own where that is the baseline."""
    if one.baseline:
        return other.speedup
    if not (one.samples_s and other.samples_s):
        return None
    return benchmark.speedup(one.samples_s, other.samples_s, seed, generations)


def seconds_of(folder: Path) -> Optional[float]:
    """That an invocation took."""
    path = folder / SECONDS
    return float(path.read_text(encoding="utf-8")) if path.exists() else None


def holding(found: Sequence[Invocation]) -> Tuple[int, int]:
    """How many intervals hold 1, and how many there are."""
    intervals = [x.interval for x in found if x.interval]
    return sum(low <= 1 <= high for low, high in intervals), len(intervals)


def share_interval(hold: int, count: int) -> Tuple[float, float]:
    """The exact interval of a share with 95% confidence.

    C. J. Clopper, E. S. Pearson, The use of confidence or fiducial limits illustrated in the case
    of the binomial, Biometrika 26, 1934.
    """
    interval = stats.binomtest(hold, count).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def coverage_table(found: Sequence[Invocation]) -> Table:
    """A row for all invocations."""
    known = [x for x in found if x.interval]
    left_out = len(found) - len(known)
    return Table(
        title="Coverage",
        columns=(
            *right("invocations", "hold 1"),
            *left("share (95%)"),
            *right("off by, median", "95th percentile", "half width", "rounds", "seconds"),
            *right("faster", "slower", "same", "inconclusive"),
        ),
        rows=(_cells(known),) if known else (),
        notes=(
            "off by: the difference of the speedup from 1; half width (the larger half of the "
            "interval), rounds and seconds of an invocation: their medians",
            *((f"{left_out} more without an interval",) if left_out else ()),
        ),
        nothing="no invocation has an interval",
    )


def _cells(known: Sequence[Invocation]) -> Tuple[str, ...]:
    hold, count = holding(known)
    low, high = share_interval(hold, count)
    speedups = [x.speedup for x in known if x.speedup]
    off = [abs(x.ratio - 1) for x in speedups]
    halves = [max(x.ratio - x.low, x.high - x.ratio) for x in speedups]
    seconds = [x.seconds for x in known if x.seconds is not None]
    verdicts = [x.verdict for x in speedups]
    return (
        str(count),
        str(hold),
        f"{100 * hold / count:.1f}% ({100 * low:.1f}% to {100 * high:.1f}%)",
        f"{100 * np.median(off):.2f}%",
        f"{100 * np.percentile(off, 95):.2f}%",
        f"{100 * np.median(halves):.2f}%",
        f"{np.median([x.rounds for x in known]):g}",
        f"{np.median(seconds):.0f}" if seconds else "-",
        *(str(verdicts.count(x)) for x in ("faster", "slower", "same", "inconclusive")),
    )


# The command -----------------------------------------------------------------------------------


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where results are kept")
    add("--runs", type=int, default=60, help="invocations (default: 60)")
    add("--model", choices=list(MODELS), default="testRetinaNet")
    add("--backend", default="torch")
    add("--precision", default="fp32")
    add("--image-size", type=run_blade.image_size, default=(192, 256), metavar="HxW")
    add("further", nargs="*", metavar="-- OPTION", help="options of run_blade.py")
    options = parser.parse_args()
    try:
        found = measured(options)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(markdown(coverage_table(found)))
    hold, count = holding(found)
    return 1 if count and share_interval(hold, count)[1] < CONFIDENCE else 0


if __name__ == "__main__":
    sys.exit(main())
