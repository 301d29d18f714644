"""The timing harness: interleaved rounds, the rule that ends them, and statistics.

It knows nothing of models or backends. A run is a name and a callable that makes one timed call
and returns its seconds. Runs that are to be compared take turns, in rounds: a shared machine's
speed drifts by tens of percent within minutes, and only calls made next to each other share that.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np

# A difference of less than this share is none: below it lie code placement and memory layout.
MARGIN = 0.03
# No fewer rounds, however slow the calls: the range of five samples holds the true median with a
# probability of 1 - 2 * 0.5**5 = 94%, that of four with 88%.
LEAST_ROUNDS = 5
# Resamples of the check after a round: it wants to know whether to go on, not two exact digits.
CHECK_RESAMPLES = 400


class RunFailed(Exception):
    """A run died during a timed call; the message becomes the status of its row."""


@dataclass(frozen=True)
class WarmUp:
    """When a run is warm.

    Attributes:
        minimum: calls that are made in any case.
        maximum: calls after which it ends in any case.
        agreement: ends when the last two calls differ by no more than this share of the shorter;
            None: they are not compared.
        seconds: ends when the calls have taken this long together; None: no such limit.
    """

    minimum: int = 3
    maximum: int = 10
    agreement: Optional[float] = 0.10
    seconds: Optional[float] = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError(f"a warm-up of {self.minimum} to {self.maximum} calls")

    @classmethod
    def on(cls, device: str) -> WarmUp:
        """What warms up a device: clocks and caches on a GPU take longer to settle."""
        if device == "cuda":
            return cls(minimum=3, maximum=100, agreement=None, seconds=2.0)
        return cls()

    @classmethod
    def fixed(cls, calls: int) -> WarmUp:
        """Exactly that many calls, which may be 0."""
        return cls(minimum=calls, maximum=calls, agreement=None, seconds=None)

    def done(self, times: Sequence[float]) -> bool:
        """Whether calls that took `times` (seconds) are enough."""
        if len(times) >= self.maximum:
            return True
        if len(times) < self.minimum:
            return False
        if self.seconds is not None and sum(times) >= self.seconds:
            return True
        if self.agreement is None or len(times) < 2:
            return False
        return abs(times[-1] - times[-2]) <= self.agreement * min(times[-2:])


def warm_up(call: Callable[[], float], rule: WarmUp) -> List[float]:
    """Makes uncounted calls until the rule is content.

    Args:
        call: makes one call and returns its seconds.

    Returns:
        the seconds of every call made.
    """
    times: List[float] = []
    while not rule.done(times):
        times.append(call())
    return times


@dataclass(frozen=True)
class StopRule:
    """When enough rounds have been made.

    It looks at how well the speedups are known, never at what they are: stopping as soon as a
    result pleases would bias it.

    Attributes:
        min_rounds: rounds that are made unless the budget is spent.
        max_rounds: the most rounds.
        half_width: ends when every speedup's 95% interval reaches no further than this share of
            the speedup to either side.
        budget_s: ends before a round that would, at the average length of those before, end after
            this many seconds; `LEAST_ROUNDS` are made all the same. None: no limit.
    """

    min_rounds: int = 15
    max_rounds: int = 200
    half_width: float = 0.03
    budget_s: Optional[float] = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(f"a stop rule of {self.min_rounds} to {self.max_rounds} rounds")

    @classmethod
    def fixed(cls, rounds: int) -> StopRule:
        """Exactly that many rounds, without a budget."""
        return cls(min_rounds=rounds, max_rounds=rounds)

    @property
    def is_fixed(self) -> bool:
        """Whether the number of rounds is set beforehand."""
        return self.min_rounds == self.max_rounds


@dataclass
class Rounds:
    """What was measured: filled while measuring, so that an interruption loses nothing.

    Attributes:
        samples: run -> seconds of its timed calls. Sample i was taken in round i, for every run;
            a run that failed has those from before its failure.
        failures: run -> why it failed.
        rounds: complete rounds.
        stopped: what ended it: `interval`, `max rounds`, `fixed`, `time budget`, `all failed`;
            `interrupted` until one of them has.
    """

    samples: Dict[str, List[float]] = field(default_factory=dict)
    failures: Dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    stopped: str = "interrupted"

    def live(self) -> List[str]:
        """The runs that have not failed."""
        return [name for name in self.samples if name not in self.failures]


def run_rounds(
    calls: Dict[str, Callable[[], float]],
    baseline: str,
    rule: StopRule,
    seed: int,
    progress: Optional[Callable[[Rounds], None]] = None,
    clock: Callable[[], float] = time.monotonic,
    into: Optional[Rounds] = None,
) -> Rounds:
    """Times runs against each other: in every round each is called once, in random order.

    A run that raises `RunFailed` is left out from then on. When the baseline is the one to fail,
    or there is nothing else, the rule goes by how well each run's own median is known instead of
    its speedup. Any other exception ends the measurement.

    Args:
        calls: run -> a function that makes one timed call and returns its seconds.
        baseline: the run that the speedups are relative to.
        seed: of the order within rounds.
        progress: called after every round.
        clock: seconds, for the budget.
        into: an empty `Rounds` to fill. A caller who keeps it has what was measured when
            `KeyboardInterrupt` or another exception comes through.
    """
    rounds = Rounds() if into is None else into
    rounds.samples.update({name: [] for name in calls})
    order, resampling = (np.random.default_rng([seed, stream]) for stream in range(2))
    start, next_check, stopped = clock(), rule.min_rounds, None
    while stopped is None:
        _one_round(calls, rounds, order)
        if progress is not None:
            progress(rounds)
        stopped = _limit_reached(rounds, rule, clock() - start)
        if stopped is None and rounds.rounds >= next_check:
            # Every round at first, then ever fewer, so that the cost of a check stays unseen.
            next_check = rounds.rounds + max(1, rounds.rounds // 10)
            if _widest(rounds, baseline, resampling) <= rule.half_width:
                stopped = "interval"
    rounds.stopped = stopped
    return rounds


def _one_round(
    calls: Dict[str, Callable[[], float]], rounds: Rounds, order: np.random.Generator
) -> None:
    live = rounds.live()
    for position in order.permutation(len(live)):
        name = live[position]
        try:
            rounds.samples[name].append(calls[name]())
        except RunFailed as failure:
            rounds.failures[name] = str(failure)
    rounds.rounds += 1


def _limit_reached(rounds: Rounds, rule: StopRule, elapsed_s: float) -> Optional[str]:
    if not rounds.live():
        return "all failed"
    if rounds.rounds >= rule.max_rounds:
        return "fixed" if rule.is_fixed else "max rounds"
    if rule.budget_s is not None and rounds.rounds >= LEAST_ROUNDS:
        end_of_next = elapsed_s * (rounds.rounds + 1) / rounds.rounds
        return "time budget" if end_of_next > rule.budget_s else None
    return None


def _widest(rounds: Rounds, baseline: str, generator: np.random.Generator) -> float:
    """The widest interval of a live run's speedup (else median): half of it, as a share."""
    live = rounds.live()
    samples = np.array([rounds.samples[name] for name in live])
    estimates = np.median(samples, axis=1)
    resampled = bootstrap_medians(samples, CHECK_RESAMPLES, generator)
    if baseline in live and len(live) > 1:
        reference = live.index(baseline)
        estimates = np.delete(estimates[reference] / estimates, reference)
        resampled = np.delete(resampled[reference] / resampled, reference, axis=0)
    low, high = np.quantile(resampled, (0.025, 0.975), axis=1)
    return float(np.max(np.maximum(estimates - low, high - estimates) / estimates))


def bootstrap_medians(
    samples: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Medians of rounds drawn with replacement, the same rounds for every run.

    Args:
        samples: runs x rounds.

    Returns:
        runs x resamples.
    """
    count = samples.shape[1]
    drawn = generator.integers(count, size=(resamples, count))
    return np.median(samples[:, drawn], axis=2)


@dataclass(frozen=True)
class Statistics:
    """Of the timed calls of one run.

    Attributes:
        samples: number of calls.
        median_ms, mean_ms, std_dev_ms, max_ms: of a call, in milliseconds.
        p99_ms: 99th percentile of these calls, as TorchBlade computes it. It says what was seen,
            not what to expect: that of all calls is often larger. Earlier versions left it out
            where there were fewer than 299 calls; `results.file.load` takes it from the samples.
        median_fps, mean_fps: of each call's images per second, which is how TorchBlade computes
            them; not the inverses of the medians and means of time.
        relative_iqr: interquartile range over median: how quiet the machine was.
        p90_bound_ms, p95_bound_ms, p99_bound_ms: at least 90%, 95%, 99% of calls are shorter, with
            95% confidence (see `quantile_bound`); None with fewer than 29, 59, 299 calls.
    """

    samples: int
    median_ms: float
    mean_ms: float
    std_dev_ms: float
    max_ms: float
    p99_ms: Optional[float]
    median_fps: float
    mean_fps: float
    relative_iqr: float
    p90_bound_ms: Optional[float] = None
    p95_bound_ms: Optional[float] = None
    p99_bound_ms: Optional[float] = None


def samples_to_bound(quantile: float, confidence: float = 0.95) -> int:
    """How many samples it takes for their maximum to exceed a quantile with that confidence.

    All of n independent samples lie below the quantile p with probability p**n, whatever their
    distribution, so it is the smallest n with 1 - p**n >= confidence (S. S. Wilks, Determination
    of sample sizes for setting tolerance limits, Annals of Mathematical Statistics 12, 1941).
    """
    return math.ceil(math.log(1 - confidence) / math.log(quantile))


def quantile_bound(
    samples: Sequence[float], quantile: float, confidence: float = 0.95
) -> Optional[float]:
    """The smallest sample that exceeds a quantile with that confidence, whatever the distribution.

    Of n independent samples the k-th smallest lies below the quantile p only where at least k of
    them do, so it is that with the smallest k for which P(Binomial(n, p) <= k - 1) >= confidence
    (H. A. David, H. N. Nagaraja, Order Statistics, 2003, section 7.1). The more samples there are,
    the more of them may lie above. This is the criterion by which MLPerf stops early (LoadGen,
    early_stopping.cc, `odds`). LoadGen itself asks for 99% confidence, and takes the sample next
    above.

    Returns:
        in the unit of the samples; None where there are fewer than `samples_to_bound`.
    """
    # Whoever reads result files or works in another environment need not have SciPy.
    from scipy import special

    count = len(samples)
    # P(Binomial(n, p) <= k - 1) for k = 1 ... n; with all n it would be 1.
    at_most = special.bdtr(np.arange(count), count, quantile)
    place = int(np.searchsorted(at_most, confidence))
    return float(np.sort(samples)[place]) if place < count else None


def summarize(samples_s: Sequence[float], images_per_call: int) -> Statistics:
    """Statistics of the seconds of timed calls, at least one.

    The standard deviation is that of the population (ddof 0) and the 99th percentile interpolates
    linearly, both as in TorchBlade's benchmark.
    """
    times = np.asarray(samples_s, dtype=float)
    if times.size == 0:
        raise ValueError("no samples to summarize")
    milliseconds = 1000 * times
    rates = images_per_call / times
    lower, median, upper = np.percentile(milliseconds, (25, 50, 75))
    bounds = [quantile_bound(milliseconds, quantile) for quantile in (0.90, 0.95, 0.99)]
    return Statistics(
        samples=int(times.size),
        median_ms=float(median),
        mean_ms=float(milliseconds.mean()),
        std_dev_ms=float(milliseconds.std(ddof=0)),
        max_ms=float(milliseconds.max()),
        p99_ms=float(np.percentile(milliseconds, 99)),
        median_fps=float(np.median(rates)),
        mean_fps=float(rates.mean()),
        relative_iqr=float((upper - lower) / median),
        p90_bound_ms=bounds[0],
        p95_bound_ms=bounds[1],
        p99_bound_ms=bounds[2],
    )


@dataclass(frozen=True)
class Speedup:
    """How much faster than the baseline a run is.

    Attributes:
        ratio: median time of the baseline over that of the run.
        low, high: the ratio's confidence interval; None with fewer than `LEAST_ROUNDS` rounds.
        verdict: `faster` or `slower` when the whole interval lies beyond ±3% of 1, `same` when it
            lies within, else `inconclusive`.
    """

    ratio: float
    low: Optional[float]
    high: Optional[float]
    verdict: str


def speedup(
    baseline_s: Sequence[float],
    samples_s: Sequence[float],
    seed: int,
    confidence: float = 0.95,
    resamples: int = 4000,
) -> Speedup:
    """The ratio of medians of two runs that took turns, with its percentile-bootstrap interval.

    Whole rounds are resampled: the two calls of a round saw the same machine, and keeping them
    together lets what they share cancel (B. Efron, R. J. Tibshirani, An Introduction to the
    Bootstrap, 1993, chapters 8 and 13).

    Args:
        baseline_s, samples_s: seconds, by round. Where one has fewer (it failed, or the last
            round was interrupted) only the rounds that both have are compared, at least one.
        seed: of the resampling.
    """
    shared = min(len(baseline_s), len(samples_s))
    if shared == 0:
        raise ValueError("no round that both runs completed")
    samples = np.array([baseline_s[:shared], samples_s[:shared]], dtype=float)
    baseline_median, run_median = np.median(samples, axis=1)
    ratio = float(baseline_median / run_median)
    if shared < LEAST_ROUNDS:
        return Speedup(ratio, None, None, "inconclusive")
    medians = bootstrap_medians(samples, resamples, np.random.default_rng(seed))
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = (float(bound) for bound in np.quantile(medians[0] / medians[1], tails))
    return Speedup(ratio, low, high, verdict(low, high))


def verdict(low: float, high: float) -> str:
    """What a speedup's confidence interval says of it: see `Speedup`."""
    if low > 1 + MARGIN:
        return "faster"
    if high < 1 - MARGIN:
        return "slower"
    return "same" if low >= 1 - MARGIN and high <= 1 + MARGIN else "inconclusive"


@dataclass(frozen=True)
class BreakEven:
    """After how many images a run has paid back what it took to prepare.

    Attributes:
        images: None: never, it is no faster than the baseline.
        low, high: 95% interval; None: never, or with too few rounds not known.
    """

    images: Optional[float]
    low: Optional[float]
    high: Optional[float]


def break_even(
    baseline_s: Sequence[float],
    samples_s: Sequence[float],
    extra_s: float,
    images_per_call: int,
    seed: int,
    resamples: int = 4000,
) -> BreakEven:
    """The images after which the seconds saved by a faster run exceed those to prepare it.

    Args:
        baseline_s, samples_s: seconds by round, as for `speedup`.
        extra_s: seconds that the run took longer to prepare than the baseline.
        seed: of the resampling; as there, whole rounds are drawn.
    """
    shared = min(len(baseline_s), len(samples_s))
    samples = np.array([baseline_s[:shared], samples_s[:shared]], dtype=float)
    extra_s = max(0.0, extra_s)

    def images(saved_s: float) -> Optional[float]:
        return images_per_call * extra_s / saved_s if saved_s > 0 else None

    baseline_median, run_median = np.median(samples, axis=1)
    found = images(float(baseline_median - run_median))
    if shared < LEAST_ROUNDS:
        return BreakEven(found, None, None)
    medians = bootstrap_medians(samples, resamples, np.random.default_rng(seed))
    least, most = (float(x) for x in np.quantile(medians[0] - medians[1], (0.025, 0.975)))
    return BreakEven(found, images(most), images(least))


def resolution(same_against_same: Speedup) -> Optional[float]:
    """The difference that a machine can resolve, as a share of 1.

    Args:
        same_against_same: the speedup of a run against an identical one (A/A): how far its
            interval strays from 1 is noise, and a smaller difference cannot be told from that.

    Returns:
        None where the speedup has no interval.
    """
    if same_against_same.low is None or same_against_same.high is None:
        return None
    return max(abs(same_against_same.low - 1), abs(same_against_same.high - 1))
