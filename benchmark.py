"""The timing harness: interleaved rounds, the rule that ends them, and statistics.

It knows nothing of models or backends. A run is a name and a callable that makes one timed call
and returns its seconds. Runs that are to be compared take turns, in rounds: a shared machine's
speed drifts by tens of percent within minutes, and only calls made next to each other share that.
Rounds are made in generations, between which all processes are started anew: two processes that do
the same differ steadily, by up to 4.5%, which no number of rounds of the same two shows.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

# A difference of less than this share is none: below it lie code placement and memory layout.
MARGIN = 0.03
# No fewer rounds, however slow the calls: the range of five samples holds the true median with a
# probability of 1 - 2 * 0.5**5 = 94%, that of four with 88%.
LEAST_ROUNDS = 5
# Resamples of the check after a round: it wants to know whether to go on, not two exact digits.
CHECK_RESAMPLES = 400
# Generations that are made in any case, if there are to be several, and rounds in each of them.
LEAST_GENERATIONS = 3
LEAST_ROUNDS_OF_GENERATION = 3
# The more rounds a generation has, the less its ratio strays; what differs between processes stays.
# So it ends when its own share of the width that is sought is this small.
WITHIN_SHARE = 0.4
MOST_ROUNDS_OF_GENERATION = 40
# The width has stopped shrinking when it is not this much narrower than some generations before.
SHRINKS_TO, SHRINKS_WITHIN = 0.95, 8
# The quantile of a normal distribution one standard deviation above its mean.
ONE_SIGMA = 0.8413
# Of Student's t. To end as soon as an interval is narrow takes up to 2.5% off what it covers, in
# the simulation of tests/test_benchmark.py: so that at least 93% of the 95% are left.
LEVEL = 0.96


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
    def again(cls, device: str) -> WarmUp:
        """Of a process that was started anew: the machine is warm."""
        if device == "cuda":
            return cls(minimum=3, maximum=100, agreement=None, seconds=0.5)
        return cls.fixed(2)

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
        budget_s: ends before a round or a generation that would, at the average length of those
            before, end after this many seconds, of which starting processes anew is a part;
            `LEAST_ROUNDS`, or `LEAST_GENERATIONS` of `LEAST_ROUNDS_OF_GENERATION`, are made all the
            same. None: no limit.
        min_generations, max_generations: where the budget cannot hold the least number, as many
            as it holds will do, but no fewer than `LEAST_GENERATIONS`. Where both are the same, so
            many are made; both 1: processes are never started anew.
    """

    min_rounds: int = 15
    max_rounds: int = 200
    half_width: float = 0.03
    budget_s: Optional[float] = None
    min_generations: int = 1
    max_generations: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(f"a stop rule of {self.min_rounds} to {self.max_rounds} rounds")
        least, most = self.min_generations, self.max_generations
        if not (least == most == 1 or LEAST_GENERATIONS <= least <= most):
            raise ValueError(f"a stop rule of {least} to {most} generations")
        if self.is_fixed and not least == most <= self.max_rounds:
            raise ValueError(f"{self.max_rounds} rounds in {least} to {most} generations")

    @classmethod
    def fixed(cls, rounds: int, generations: int = 1) -> StopRule:
        """Exactly that many rounds in all, without a budget."""
        return cls(rounds, rounds, min_generations=generations, max_generations=generations)

    @property
    def least_rounds(self) -> int:
        """Rounds below which there are too few."""
        if self.max_generations == 1:
            return self.min_rounds
        return LEAST_GENERATIONS * LEAST_ROUNDS_OF_GENERATION

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
        generations: complete rounds of each.
        stopped: what ended it: `interval`, `max rounds`, `generations`, `fixed`, `time budget`,
            `width`, `all failed`; `interrupted` until one of them has.
    """

    samples: Dict[str, List[float]] = field(default_factory=dict)
    failures: Dict[str, str] = field(default_factory=dict)
    generations: List[int] = field(default_factory=list)
    stopped: str = "interrupted"

    @property
    def rounds(self) -> int:
        """Complete rounds, of all generations."""
        return sum(self.generations)

    def live(self) -> List[str]:
        """The runs that have not failed."""
        return [name for name in self.samples if name not in self.failures]


Calls = Dict[str, Callable[[], float]]
# Starts the processes of all runs anew: run -> its call from then on, or why there is none.
Renew = Callable[[], Dict[str, Union[Callable[[], float], RunFailed]]]


def run_rounds(
    calls: Calls,
    baseline: str,
    rule: StopRule,
    seed: int,
    progress: Optional[Callable[[Rounds], None]] = None,
    clock: Callable[[], float] = time.monotonic,
    into: Optional[Rounds] = None,
    renew: Optional[Renew] = None,
    renewal_s: float = 0.0,
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
        renew: called between two generations; needed where the rule wants several.
        renewal_s: seconds that it is expected to take.
    """
    rounds = Rounds() if into is None else into
    rounds.samples.update({name: [] for name in calls})
    schedule = _Schedule(rule, baseline, rounds, seed, clock, renewal_s)
    order, stopped = np.random.default_rng([seed, 0]), None
    while stopped is None:
        schedule.begin_generation()
        while True:
            _one_round(calls, rounds, order)
            if progress is not None:
                progress(rounds)
            if schedule.generation_is_complete():
                break
        stopped = schedule.stopped()
        if stopped is None:
            assert renew is not None
            calls = _renewed(renew(), rounds)
    rounds.stopped = stopped
    return rounds


def _renewed(started: Dict[str, Union[Callable[[], float], RunFailed]], rounds: Rounds) -> Calls:
    """The calls of a new generation; takes note of the runs that have none."""
    calls: Calls = {}
    for name, call in started.items():
        if isinstance(call, RunFailed):
            rounds.failures.setdefault(name, str(call))
        else:
            calls[name] = call
    return calls


def _one_round(calls: Calls, rounds: Rounds, order: np.random.Generator) -> None:
    live = rounds.live()
    for position in order.permutation(len(live)):
        name = live[position]
        try:
            rounds.samples[name].append(calls[name]())
        except RunFailed as failure:
            rounds.failures[name] = str(failure)
    rounds.generations[-1] += 1


class _Schedule:
    """Says when a generation has enough rounds, and whether another one follows.

    Args:
        rounds: that are being made.
        renewal_s: seconds that starting all processes anew is expected to take.
    """

    def __init__(
        self,
        rule: StopRule,
        baseline: str,
        rounds: Rounds,
        seed: int,
        clock: Callable[[], float],
        renewal_s: float,
    ) -> None:
        self.rule, self.baseline, self.rounds = rule, baseline, rounds
        self.clock, self.expected_s = clock, renewal_s
        self.resampling = np.random.default_rng([seed, 1])
        self.start = self.began = self.ended = clock()
        self.renewals_s: List[float] = []
        self.widths: List[float] = []
        self.next_check = rule.min_rounds
        self.is_known = False

    def begin_generation(self) -> None:
        """Takes note of its start."""
        self.began = self.clock()
        if self.rounds.generations:
            self.renewals_s.append(self.began - self.ended)
        self.rounds.generations.append(0)

    def generation_is_complete(self) -> bool:
        """Whether the current generation has enough rounds."""
        rule, made = self.rule, self.rounds.generations[-1]
        if not self.rounds.live() or self.rounds.rounds >= rule.max_rounds:
            return True
        if rule.is_fixed:
            # The others have as many, as far as that is possible.
            done, all_of_them = len(self.rounds.generations), rule.max_generations
            return self.rounds.rounds >= rule.max_rounds * done // all_of_them
        if rule.max_generations == 1:
            return self._is_late() or self._is_known()
        return made >= LEAST_ROUNDS_OF_GENERATION and made >= self._enough()

    def stopped(self) -> Optional[str]:
        """What ends the rounds after a complete generation; None: nothing, another one follows."""
        rule, made = self.rule, len(self.rounds.generations)
        self.ended = self.clock()
        if not self.rounds.live():
            return "all failed"
        if self.rounds.rounds >= rule.max_rounds:
            return "fixed" if rule.is_fixed else "max rounds"
        if rule.is_fixed or made < self._planned():
            return None
        if rule.max_generations == 1:
            return "interval" if self.is_known else "time budget"
        self.widths.append(_widest(self.rounds, self.baseline))
        if self.widths[-1] <= rule.half_width:
            return "interval"
        if made >= rule.max_generations:
            return "generations"
        if rule.budget_s is not None and self._next_ends() > rule.budget_s:
            return "time budget"
        before = self.widths[:-SHRINKS_WITHIN]
        return "width" if before and self.widths[-1] > SHRINKS_TO * before[-1] else None

    # The only generation ----------------------------------------------------------------------

    def _is_late(self) -> bool:
        made, budget_s = self.rounds.rounds, self.rule.budget_s
        if budget_s is None or made < LEAST_ROUNDS:
            return False
        return (self.clock() - self.start) * (made + 1) / made > budget_s

    def _is_known(self) -> bool:
        made = self.rounds.rounds
        if made < self.next_check:
            return False
        # Every round at first, then ever fewer, so that the cost of a check stays unseen.
        self.next_check = made + max(1, made // 10)
        self.is_known = self._strays(0.975) <= self.rule.half_width
        return self.is_known

    # One of several ---------------------------------------------------------------------------

    @property
    def _renewal_s(self) -> float:
        return float(np.mean(self.renewals_s)) if self.renewals_s else self.expected_s

    @property
    def _round_s(self) -> float:
        spent = self.clock() - self.start - sum(self.renewals_s)
        return max(1e-9, spent / max(1, self.rounds.rounds))

    def _next_ends(self) -> float:
        """Seconds after the start when another generation would end, if it is short."""
        short_s = LEAST_ROUNDS_OF_GENERATION * self._round_s
        return self.clock() - self.start + self._renewal_s + short_s

    def _planned(self) -> int:
        """Generations that are made before anyone looks at the intervals."""
        wanted = self.rule.min_generations
        if wanted == self.rule.max_generations:  # So many were asked for.
            return wanted
        for count in range(wanted, LEAST_GENERATIONS, -1):
            if self._affordable(count) >= LEAST_ROUNDS_OF_GENERATION:
                return count
        return LEAST_GENERATIONS

    def _affordable(self, generations: int) -> float:
        """Rounds of the current generation for which there is time, if so many are made in all."""
        if self.rule.budget_s is None:
            return math.inf
        left = max(1, generations - len(self.rounds.generations) + 1)
        rest_s = self.rule.budget_s - (self.began - self.start) - (left - 1) * self._renewal_s
        return rest_s // (left * self._round_s)

    def _enough(self) -> float:
        """Rounds of the current generation."""
        generations, planned = self.rounds.generations, self._planned()
        most = min(
            self._affordable(planned),
            MOST_ROUNDS_OF_GENERATION,
            self.rule.max_rounds // self.rule.min_generations,
        )
        if len(generations) > planned:
            return min(most, self._best_number())
        if len(generations) > 1:
            return min(most, generations[0])
        least = math.ceil(self.rule.min_rounds / planned)
        is_steady = (
            generations[0] >= least
            and self._strays(ONE_SIGMA) <= WITHIN_SHARE * self.rule.half_width
        )
        return 0 if is_steady else most

    def _best_number(self) -> float:
        """Rounds of a generation with which the interval shrinks fastest.

        The variance of a mean of g ratios is (between + within / rounds) / g, and takes
        g (renewal_s + rounds round_s) to get. Their product is least where
        rounds = sqrt(renewal_s within / (round_s between)).
        """
        ratios = _log_ratios(self.rounds, self.baseline)
        made, of_medians = self.rounds.generations[-1], self._strays(ONE_SIGMA) ** 2
        between = float(np.max(np.var(ratios, axis=1, ddof=1))) - of_medians
        if between <= 0:
            return math.inf
        return math.sqrt(self._renewal_s * of_medians * made / (self._round_s * between))

    def _strays(self, quantile: float) -> float:
        """How far the ratios of medians of the last generation stray to either side, as a share.

        Args:
            quantile: of their bootstrap distribution, above 0.5.
        """
        live, made, end = self.rounds.live(), self.rounds.generations[-1], self.rounds.rounds
        samples = np.array([self.rounds.samples[name][end - made : end] for name in live])
        estimates = np.median(samples, axis=1)
        resampled = bootstrap_medians(samples, CHECK_RESAMPLES, self.resampling)
        if self.baseline in live and len(live) > 1:
            reference = live.index(self.baseline)
            estimates = np.delete(estimates[reference] / estimates, reference)
            resampled = np.delete(resampled[reference] / resampled, reference, axis=0)
        low, high = np.quantile(resampled, (1 - quantile, quantile), axis=1)
        return float(np.max(np.maximum(estimates - low, high - estimates) / estimates))


def _log_ratios(rounds: Rounds, baseline: str) -> np.ndarray:
    """Logarithms of live runs' speedups (else of their medians), runs x complete generations."""
    live = rounds.live()
    made = [count for count in rounds.generations if count]
    medians = np.log(
        [[np.median(x) for x in by_generation(rounds.samples[name], made)] for name in live]
    )
    if baseline in live and len(live) > 1:
        reference = live.index(baseline)
        return np.delete(medians[reference] - medians, reference, axis=0)
    return medians


def _widest(rounds: Rounds, baseline: str) -> float:
    """The widest interval of a live run's speedup (else median): half of it, as a share."""
    return max(math.expm1(_interval(ratios)[1]) for ratios in _log_ratios(rounds, baseline))


def _interval(values: Sequence[float], level: float = LEVEL) -> Tuple[float, float]:
    """The mean of some values, and half its confidence interval by Student's t."""
    count = len(values)
    spread = float(np.std(values, ddof=1))
    width = t_quantile((1 + level) / 2, count - 1) * spread / math.sqrt(count)
    return float(np.mean(values)), width


def t_quantile(quantile: float, degrees: float) -> float:
    """A quantile of Student's t."""
    from scipy import special  # Workers, which import this file, may be where there is no SciPy.

    return float(special.stdtrit(degrees, quantile))


def by_generation(samples: Sequence[float], generations: Sequence[int]) -> List[Sequence[float]]:
    """Samples of each generation, as far as there are any.

    Args:
        samples: by round.
        generations: complete rounds of each; empty: one. What is beyond them was interrupted, and
            belongs to none.
    """
    if not generations:
        return [samples] if len(samples) else []
    ends = np.cumsum(generations)
    parts = [samples[end - count : end] for end, count in zip(ends, generations)]
    # One that was cut short is not worth as much as the others, where there are enough of these.
    whole = [part for part in parts if len(part) >= LEAST_ROUNDS_OF_GENERATION]
    return whole if len(whole) >= LEAST_GENERATIONS else [part for part in parts if len(part)]


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
        ratio: median time of the baseline over that of the run; of several generations, the
            geometric mean of these ratios.
        low, high: the ratio's confidence interval; None with one generation of fewer than
            `LEAST_ROUNDS` rounds.
        verdict: `faster` or `slower` when the whole interval lies beyond a margin around 1: 3%, or
            what A/A resolves where that is more; `same` when it lies within 3%; else
            `inconclusive`.
    """

    ratio: float
    low: Optional[float]
    high: Optional[float]
    verdict: str


def speedup(
    baseline_s: Sequence[float],
    samples_s: Sequence[float],
    seed: int,
    generations: Sequence[int] = (),
    margin: float = MARGIN,
    confidence: float = 0.95,
    resamples: int = 4000,
) -> Speedup:
    """The ratio of medians of two runs that took turns, with its interval.

    Each generation gives a ratio; the interval is Student's t on their logarithms, so that it
    covers what differs between processes. One generation cannot tell that: its interval is the
    percentile bootstrap. Whole rounds are resampled: the two calls of a round saw the same machine,
    and keeping them together lets what they share cancel (B. Efron, R. J. Tibshirani, An
    Introduction to the Bootstrap, 1993, chapters 8 and 13).

    Args:
        baseline_s, samples_s: seconds, by round. Where one has fewer (it failed, or the last
            round was interrupted) only the rounds that both have are compared, at least one.
        seed: of the resampling.
        generations: complete rounds of each; empty: one generation.
        margin: what a difference has to exceed, as a share.
        confidence: of the bootstrap, and of Student's t as `LEVEL` is for 0.95.
    """
    shared = min(len(baseline_s), len(samples_s))
    if shared == 0:
        raise ValueError("no round that both runs completed")
    both = [by_generation(x[:shared], generations) for x in (baseline_s, samples_s)]
    if len(both[0]) > 1:
        logs = [math.log(float(np.median(a) / np.median(b))) for a, b in zip(*both)]
        mean, width = _interval(logs, confidence + LEVEL - 0.95)
        ratio, low, high = (math.exp(x) for x in (mean, mean - width, mean + width))
        return Speedup(ratio, low, high, verdict(low, high, margin))
    samples = np.array([baseline_s[:shared], samples_s[:shared]], dtype=float)
    baseline_median, run_median = np.median(samples, axis=1)
    ratio = float(baseline_median / run_median)
    if shared < LEAST_ROUNDS:
        return Speedup(ratio, None, None, "inconclusive")
    medians = bootstrap_medians(samples, resamples, np.random.default_rng(seed))
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = (float(bound) for bound in np.quantile(medians[0] / medians[1], tails))
    return Speedup(ratio, low, high, verdict(low, high, margin))


def verdict(low: Optional[float], high: Optional[float], margin: float = MARGIN) -> str:
    """What a speedup's confidence interval says of it: see `Speedup`."""
    if low is None or high is None:
        return "inconclusive"
    margin = max(margin, MARGIN)
    if low > 1 + margin:
        return "faster"
    if high < min(1 - MARGIN, 1 / (1 + margin)):
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
    generations: Sequence[int] = (),
    resamples: int = 4000,
) -> BreakEven:
    """The images after which the seconds saved by a faster run exceed those to prepare it.

    Args:
        baseline_s, samples_s, generations: as for `speedup`.
        extra_s: seconds that the run took longer to prepare than the baseline.
        seed: of the resampling; as there, whole rounds are drawn.
    """
    shared = min(len(baseline_s), len(samples_s))
    extra_s = max(0.0, extra_s)

    def images(saved_s: float) -> Optional[float]:
        return images_per_call * extra_s / saved_s if saved_s > 0 else None

    both = [by_generation(x[:shared], generations) for x in (baseline_s, samples_s)]
    if len(both[0]) > 1:
        saved, width = _interval([float(np.median(a) - np.median(b)) for a, b in zip(*both)])
        return BreakEven(images(saved), images(saved + width), images(saved - width))
    samples = np.array([baseline_s[:shared], samples_s[:shared]], dtype=float)
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
    return max(1 / same_against_same.low, same_against_same.high) - 1
