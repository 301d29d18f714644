"""The harness on made-up runs: functions that return seconds and clocks that count them."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import benchmark
from benchmark import Rounds, RunFailed, Speedup, StopRule, WarmUp


class Machine:
    """Runs of known lengths, on a clock that only they move."""

    def __init__(self, seed=0, noise=0.0):
        self.now = 0.0
        self.calls = []
        self.noise = noise
        self.generator = np.random.default_rng(seed)

    def clock(self):
        return self.now

    def run(self, name, seconds, fails_at=None):
        def call():
            self.calls.append(name)
            if fails_at is not None and self.calls.count(name) == fails_at:
                raise RunFailed(f"{name} was killed")
            spent = seconds * math.exp(self.noise * self.generator.normal())
            self.now += spent
            return spent

        return call


def measure(machine, rule, seed=0, baseline="Torch", progress=None, into=None, **runs):
    calls = {
        name: machine.run(name, *(run if isinstance(run, tuple) else (run,)))
        for name, run in runs.items()
    }
    return benchmark.run_rounds(calls, baseline, rule, seed, progress, machine.clock, into)


# Warm-up


def warmed(times, rule):
    remaining = iter(times)
    return benchmark.warm_up(lambda: next(remaining), rule)


def test_warm_up_ends_when_two_calls_agree():
    assert warmed([5, 2, 1, 1.05, 1, 1], WarmUp()) == [5, 2, 1, 1.05]


def test_warm_up_makes_three_calls_however_well_they_agree():
    assert warmed([1, 1, 1, 1], WarmUp()) == [1, 1, 1]


def test_warm_up_gives_up_after_ten_calls():
    times = [1.5**i for i in range(12)]
    assert warmed(times, WarmUp(seconds=None)) == times[:10]


def test_warm_up_of_slow_calls_ends_after_its_seconds():
    assert warmed([40, 30, 20, 10], WarmUp()) == [40, 30, 20]


def test_warm_up_on_cuda():
    rule = WarmUp.on("cuda")
    assert len(warmed([0.001] * 200, rule)) == 100
    assert len(warmed([0.25] * 200, rule)) == 8
    assert len(warmed([9.0] * 200, rule)) == 3
    assert WarmUp.on("cpu") == WarmUp()


@pytest.mark.parametrize("calls", [0, 1, 100])
def test_warm_up_of_a_fixed_number_of_calls(calls):
    assert len(warmed([1.0] * 200, WarmUp.fixed(calls))) == calls


# Rounds


def test_every_round_calls_every_run_once():
    machine = Machine()
    rounds = measure(machine, StopRule.fixed(50), Torch=1.0, OpenVINO=0.5, Inductor=0.7)
    assert (rounds.rounds, rounds.stopped) == (50, "fixed")
    by_round = np.array(machine.calls).reshape(50, 3)
    assert (np.sort(by_round, axis=1) == ["Inductor", "OpenVINO", "Torch"]).all()
    assert rounds.samples == {"Torch": [1.0] * 50, "OpenVINO": [0.5] * 50, "Inductor": [0.7] * 50}
    assert rounds.failures == {}


def test_order_is_random_and_fair():
    """Every run is first, second and third equally often: chi-squared over 600 rounds."""
    machine = Machine()
    measure(machine, StopRule.fixed(600), Torch=1.0, OpenVINO=0.5, Inductor=0.7)
    by_round = np.array(machine.calls).reshape(600, 3)
    orders, counts = np.unique(by_round, axis=0, return_counts=True)
    assert len(orders) == 6
    assert stats.chisquare(counts).pvalue > 0.001


def test_order_follows_the_seed():
    orders = []
    for seed in (1, 1, 2):
        machine = Machine()
        measure(machine, StopRule.fixed(50), seed, Torch=1.0, OpenVINO=0.5)
        orders.append(machine.calls)
    assert orders[0] == orders[1] != orders[2]


def test_failed_run_is_dropped_and_the_others_go_on():
    machine = Machine()
    rounds = measure(machine, StopRule.fixed(20), Torch=1.0, OpenVINO=(0.5, 8), Inductor=(0.7, 1))
    assert rounds.failures == {"OpenVINO": "OpenVINO was killed", "Inductor": "Inductor was killed"}
    assert {name: len(samples) for name, samples in rounds.samples.items()} == {
        "Torch": 20,
        "OpenVINO": 7,
        "Inductor": 0,
    }
    assert machine.calls.count("OpenVINO") == 8
    assert rounds.live() == ["Torch"]


def test_the_others_are_measured_without_a_baseline():
    rounds = measure(Machine(noise=0.02), StopRule(), Torch=(1.0, 4), OpenVINO=0.5, Inductor=0.7)
    assert rounds.stopped == "interval"
    assert len(rounds.samples["OpenVINO"]) == len(rounds.samples["Inductor"]) >= 15
    assert len(rounds.samples["Torch"]) == 3


def test_ends_when_all_have_failed():
    rounds = measure(Machine(), StopRule(), Torch=(1.0, 2), OpenVINO=(0.5, 3))
    assert (rounds.stopped, rounds.rounds) == ("all failed", 3)


def test_other_exceptions_come_through():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        benchmark.run_rounds({"Torch": broken}, "Torch", StopRule(), seed=0)


def test_interruption_keeps_what_was_measured():
    def interrupt(rounds):
        if rounds.rounds == 7:
            raise KeyboardInterrupt

    kept = Rounds()
    with pytest.raises(KeyboardInterrupt):
        measure(Machine(), StopRule(), progress=interrupt, into=kept, Torch=1.0, OpenVINO=(0.5, 3))
    assert (kept.rounds, kept.stopped) == (7, "interrupted")
    assert (len(kept.samples["Torch"]), len(kept.samples["OpenVINO"])) == (7, 2)
    assert list(kept.failures) == ["OpenVINO"]


def test_progress_sees_every_round():
    seen = []
    measure(Machine(), StopRule.fixed(4), progress=lambda rounds: seen.append(rounds.rounds), A=1.0)
    assert seen == [1, 2, 3, 4]


# Generations -----------------------------------------------------------------------------------


class Processes(Machine):
    """Runs whose processes differ, each by a factor of its own, and take time to start."""

    def __init__(self, seed=0, call=0.02, process=0.015, drift=0.05, renewal_s=8.0):
        super().__init__(seed, call)
        self.process, self.drift, self.renewal_s = process, drift, renewal_s
        self.renewals = 0

    def start(self, runs):
        """New processes for runs of these lengths; the machine as a whole is another, too."""
        common = self.drift * self.generator.normal()
        return {
            name: self.run(name, s * math.exp(common + self.process * self.generator.normal()))
            for name, s in runs.items()
        }

    def measure(self, rule, runs, seed=0, fails=(), **more):
        def renew():
            self.renewals += 1
            self.now += self.renewal_s
            started = self.start(runs)
            for name, at, reason in fails:
                if at <= self.renewals:
                    started[name] = RunFailed(reason)
            return started

        of = (next(iter(runs)), rule, seed, None, self.clock)
        return benchmark.run_rounds(self.start(runs), *of, renew=renew, **more)


def spread(rounds):
    """The speedup of the second run over the first."""
    baseline, run = rounds.samples.values()
    return benchmark.speedup(baseline, run, 0, rounds.generations)


SEVERAL = StopRule(min_generations=5, max_generations=20)
TWO = {"Torch": 0.4, "OpenVINO": 0.4}


def test_all_processes_are_started_anew_between_generations():
    machine = Processes()
    rounds = machine.measure(StopRule.fixed(22, 5), TWO)
    assert (rounds.generations, rounds.stopped) == ([4, 4, 5, 4, 5], "fixed")
    assert machine.renewals == 4
    assert [len(x) for x in rounds.samples.values()] == [22, 22]


def test_no_fewer_than_fifteen_rounds_in_five_generations():
    machine = Processes(call=0.0001, process=0.0001)
    rounds = machine.measure(SEVERAL, TWO)
    assert (rounds.generations, rounds.stopped) == ([3] * 5, "interval")


def test_noise_takes_more_rounds_in_each_generation():
    quiet, noisy = (
        Processes(call=call, process=0.0001).measure(SEVERAL, TWO) for call in (0.01, 0.06)
    )
    assert noisy.generations[0] > 2 * quiet.generations[0]
    assert noisy.generations[:5] == [noisy.generations[0]] * 5


def test_processes_that_differ_take_more_generations():
    rounds = Processes(process=0.04).measure(SEVERAL, TWO)
    assert rounds.stopped == "interval"
    assert len(rounds.generations) > 6
    # Short ones: within them there is little to be known.
    assert max(rounds.generations) < 12
    found = spread(rounds)
    assert max(found.high / found.ratio, found.ratio / found.low) <= 1.03 + 1e-9


@pytest.mark.parametrize(
    ("budget_s", "generations"),
    # A renewal takes 8 s, three rounds 2.4 s: five generations take 44 s, four 33.6, three 23.2.
    [(1.0, [3, 3, 3]), (25.0, [3, 3, 3]), (35.0, [3] * 4), (45.0, [3] * 5)],
)
def test_a_budget_that_cannot_hold_five_generations_holds_three(budget_s, generations):
    rule = StopRule(min_generations=5, max_generations=20, budget_s=budget_s)
    machine = Processes(process=0.05, drift=0.0)
    rounds = machine.measure(rule, TWO, renewal_s=8.0)
    assert rounds.generations == generations
    assert rounds.stopped == "time budget"
    assert machine.now < max(25.0, budget_s)


def test_a_budget_is_spent_on_rounds_and_on_renewals():
    for seed in range(10):
        rule = StopRule(min_generations=5, max_generations=20, budget_s=60.0, half_width=0.001)
        machine = Processes(seed, drift=0.02)
        rounds = machine.measure(rule, TWO, renewal_s=6.0)
        assert (rounds.stopped, len(rounds.generations)) == ("time budget", 5)
        assert 52 < machine.now <= 62


def test_a_renewal_that_takes_longer_than_expected_leaves_fewer_generations():
    rule = StopRule(min_generations=5, max_generations=20, budget_s=60.0, half_width=0.001)
    machine = Processes(renewal_s=25.0)
    rounds = machine.measure(rule, TWO, renewal_s=2.0)
    assert (rounds.stopped, len(rounds.generations)) == ("time budget", 3)


def test_as_many_generations_as_asked_for():
    rule = StopRule(min_generations=4, max_generations=4)
    rounds = Processes(process=0.1).measure(rule, TWO)
    assert (rounds.stopped, len(rounds.generations)) == ("generations", 4)
    assert min(rounds.generations) >= 4  # Fifteen rounds in all.
    # However little time there is.
    short = dataclasses.replace(rule, budget_s=1.0)
    assert Processes(process=0.1).measure(short, TWO).generations == [3] * 4


def test_ends_when_the_width_has_stopped_shrinking():
    # Each generation strays further than all before it.
    machine = Processes(process=0.05)
    start = machine.start

    def ever_worse(runs):
        machine.process *= 1.25
        return start(runs)

    machine.start = ever_worse
    rounds = machine.measure(SEVERAL, TWO)
    assert rounds.stopped == "width"
    assert 13 <= len(rounds.generations) <= 15


def test_the_most_rounds_of_all_generations():
    rule = StopRule(min_generations=5, max_generations=60, half_width=0.0001)
    rounds = Processes().measure(rule, TWO)
    assert (rounds.rounds, rounds.stopped) == (200, "max rounds")


def test_a_run_that_cannot_be_started_anew_is_dropped():
    fails = [("OpenVINO", 2, "no memory")]
    rounds = Processes().measure(StopRule.fixed(12, 4), {**TWO, "Inductor": 0.3}, fails=fails)
    assert rounds.failures == {"OpenVINO": "no memory"}
    assert {name: len(x) for name, x in rounds.samples.items()} == {
        "Torch": 12,
        "OpenVINO": 6,
        "Inductor": 12,
    }
    # What it has is compared.
    samples = (rounds.samples["Torch"], rounds.samples["OpenVINO"])
    assert benchmark.speedup(*samples, 0, rounds.generations).low is not None


def test_ends_when_none_can_be_started_anew():
    fails = [(name, 1, "no memory") for name in TWO]
    rounds = Processes().measure(StopRule.fixed(12, 4), TWO, fails=fails)
    assert rounds.stopped == "all failed"
    assert [len(x) for x in rounds.samples.values()] == [3, 3]


@pytest.mark.parametrize(("least", "most"), [(1, 5), (2, 2), (2, 5), (5, 4)], ids=lambda x: str(x))
def test_impossible_numbers_of_generations(least, most):
    with pytest.raises(ValueError, match=f"{least} to {most} generations"):
        StopRule(min_generations=least, max_generations=most)


def test_fewer_rounds_than_generations():
    with pytest.raises(ValueError, match="4 rounds in 5 to 5 generations"):
        StopRule.fixed(4, 5)


# The stop rule


def test_stops_at_the_least_rounds_when_there_is_no_noise():
    rounds = measure(Machine(), StopRule(), Torch=1.0, OpenVINO=0.5)
    assert (rounds.rounds, rounds.stopped) == (15, "interval")


def test_noise_takes_more_rounds_until_the_speedup_is_known():
    rounds = measure(Machine(noise=0.06), StopRule(), Torch=1.0, OpenVINO=0.5, Inductor=0.9)
    assert rounds.stopped == "interval"
    assert 15 < rounds.rounds < 200
    for name in ("OpenVINO", "Inductor"):
        result = benchmark.speedup(rounds.samples["Torch"], rounds.samples[name], seed=0)
        # The check has fewer resamples than the result: the two differ by a few percent.
        assert max(result.high - result.ratio, result.ratio - result.low) < 0.036 * result.ratio


def test_stops_at_the_most_rounds():
    rounds = measure(Machine(noise=0.5), StopRule(max_rounds=40), Torch=1.0, OpenVINO=0.5)
    assert (rounds.rounds, rounds.stopped) == (40, "max rounds")


def test_stops_before_the_round_that_would_exceed_the_budget():
    machine = Machine(noise=0.5)
    rounds = measure(machine, StopRule(budget_s=100.0), Torch=4.0, OpenVINO=2.0)
    assert rounds.stopped == "time budget"
    assert 5 <= rounds.rounds < 20
    assert machine.now < 110


def test_budget_ends_before_the_least_rounds():
    machine = Machine()
    rounds = measure(machine, StopRule(budget_s=50.0), Torch=4.0, OpenVINO=2.0)
    assert (rounds.rounds, rounds.stopped, machine.now) == (8, "time budget", 48.0)


def test_five_rounds_are_made_however_slow():
    rounds = measure(Machine(), StopRule(budget_s=1.0), Torch=40.0, OpenVINO=20.0)
    assert (rounds.rounds, rounds.stopped) == (benchmark.LEAST_ROUNDS, "time budget")


def test_lone_baseline_stops_by_its_own_median():
    rounds = measure(Machine(noise=0.02), StopRule(), Torch=1.0)
    assert rounds.stopped == "interval"


@pytest.mark.parametrize("rounds", [1, 3, 200])
def test_fixed_number_of_rounds(rounds):
    result = measure(Machine(noise=0.5), StopRule.fixed(rounds), Torch=1.0, OpenVINO=0.5)
    assert (result.rounds, result.stopped) == (rounds, "fixed")


@pytest.mark.parametrize(("least", "most"), [(0, 5), (6, 5)])
def test_impossible_rules(least, most):
    with pytest.raises(ValueError, match=f"{least} to {most}"):
        StopRule(min_rounds=least, max_rounds=most)


def test_impossible_warm_up():
    with pytest.raises(ValueError, match="-1 to -1"):
        WarmUp.fixed(-1)


# Statistics


def test_statistics_of_fixed_samples():
    result = benchmark.summarize([0.010, 0.020, 0.040, 0.030], images_per_call=2)
    assert result.samples == 4
    assert result.median_ms == pytest.approx(25)
    assert result.mean_ms == pytest.approx(25)
    assert result.std_dev_ms == pytest.approx(math.sqrt((225 + 25 + 225 + 25) / 4))
    assert result.max_ms == pytest.approx(40)
    # Images per second of the calls: 200, 100, 50, 66.7. Their median is not 2 / 25 ms = 80.
    assert result.median_fps == pytest.approx((100 + 200 / 3) / 2)
    assert result.mean_fps == pytest.approx((200 + 100 + 50 + 200 / 3) / 4)
    assert result.relative_iqr == pytest.approx((32.5 - 17.5) / 25)
    # Between the two longest, at 0.97 of the way.
    assert result.p99_ms == pytest.approx(39.7)
    assert result.p90_bound_ms is result.p95_bound_ms is result.p99_bound_ms is None


def test_statistics_against_numpy_and_scipy():
    times = np.random.default_rng(0).lognormal(-3, 0.2, size=500)
    result = benchmark.summarize(times, images_per_call=1)
    assert result.median_ms == pytest.approx(1000 * np.median(times))
    assert result.mean_ms == pytest.approx(1000 * np.mean(times))
    assert result.std_dev_ms == pytest.approx(1000 * np.std(times))
    assert result.p99_ms == pytest.approx(1000 * stats.scoreatpercentile(times, 99))
    assert result.relative_iqr == pytest.approx(stats.iqr(times) / np.median(times))
    assert result.mean_fps == pytest.approx(1 / stats.hmean(times))


@pytest.mark.parametrize(
    ("calls", "p90", "p95", "p99"),
    [
        (28, None, None, None),
        (29, 29, None, None),
        # From 46 calls on, one may lie above.
        (45, 45, None, None),
        (46, 45, None, None),
        (58, 57, None, None),
        (59, 58, 59, None),
        (298, 277, 290, None),
        (299, 278, 291, 299),
        (700, 644, 675, 698),
    ],
)
def test_bounds_by_number_of_calls(calls, p90, p95, p99):
    """How many of the calls lie at or below each bound; here the k-th smallest takes k ms."""
    times = np.random.default_rng(0).permutation(np.arange(1, calls + 1)) / 1000
    result = benchmark.summarize(times, 1)
    assert (result.p90_bound_ms, result.p95_bound_ms, result.p99_bound_ms) == (
        *(None if place is None else pytest.approx(place) for place in (p90, p95, p99)),
    )


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("calls", [1, 5, 100, 1000, 20_000])
def test_bound_agrees_with_the_binomial_distribution(calls, quantile):
    """The smallest k with P(Binomial(n, p) <= k - 1) >= 0.95."""
    place = int(stats.binom.ppf(0.95, calls, quantile)) + 1
    bound = benchmark.quantile_bound(range(1, calls + 1), quantile)
    assert bound == (place if place <= calls else None)


def odds_of_load_gen(under: int, over: int, quantile: float) -> float:
    """`odds` of MLPerf's early stopping: I_p(h, t + 1) for h calls below and t above a limit."""
    return float(stats.beta.cdf(quantile, under, over + 1))


@pytest.mark.parametrize(("calls", "quantile"), [(29, 0.9), (299, 0.9), (299, 0.99), (700, 0.95)])
def test_bound_is_where_early_stopping_passes(calls, quantile):
    above = calls - int(benchmark.quantile_bound(range(1, calls + 1), quantile))
    assert odds_of_load_gen(calls - above, above, quantile) <= 0.05
    assert odds_of_load_gen(calls - above - 1, above + 1, quantile) > 0.05


# Distribution -> its inverse. Latencies have long tails; a machine with two speeds has two humps.
DISTRIBUTIONS = {
    "uniform": stats.uniform(0.1, 0.1).ppf,
    "long tail": stats.lognorm(1.0).ppf,
    "Pareto": stats.pareto(1.5).ppf,
    "two humps": lambda share: np.where(share < 0.93, 0.1 + share, 5 + share),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("calls", "quantile"),
    [(29, 0.9), (100, 0.9), (100, 0.95), (299, 0.95), (299, 0.99), (700, 0.9), (700, 0.99)],
)
def test_bound_covers_the_quantile(calls, quantile, distribution):
    """In 95% of samples at least, and the next lower call would not."""
    inverse = DISTRIBUTIONS[distribution]
    samples = inverse(np.random.default_rng(7).random((4000, calls)))
    true = float(inverse(quantile))
    bounds = np.array([benchmark.quantile_bound(sample, quantile) for sample in samples])
    lower = np.array([sample[sample < bound].max() for sample, bound in zip(samples, bounds)])
    # Three standard errors of a share of 95% among 4000 samples are 1.03%.
    assert np.mean(bounds >= true) > 0.95 - 0.0103
    assert np.mean(lower >= true) < 0.95


@pytest.mark.parametrize(
    ("quantile", "confidence", "samples"),
    [(0.99, 0.95, 299), (0.95, 0.95, 59), (0.9, 0.95, 29), (0.5, 0.95, 5), (0.99, 0.99, 459)],
)
def test_samples_to_bound_a_quantile(quantile, confidence, samples):
    """The values in tables of tolerance limits; one sample fewer is not enough."""
    assert benchmark.samples_to_bound(quantile, confidence) == samples
    assert 1 - quantile**samples >= confidence > 1 - quantile ** (samples - 1)


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        benchmark.summarize([], 1)


# Speedups


def paired_noise(generator, rounds, ratio=1.0, drift=0.2, noise=0.05):
    """Two runs on a machine whose speed drifts: what is common to a round, and what is not."""
    common = drift * np.sin(np.linspace(0, generator.uniform(5, 20), rounds))
    own = np.abs(noise * generator.standard_t(3, size=(2, rounds)))
    baseline, run = np.exp(common + own)
    return baseline, run / ratio


@pytest.mark.parametrize("rounds", [15, 50])
@pytest.mark.parametrize("ratio", [1.0, 2.5])
def test_interval_covers_the_true_ratio(ratio, rounds):
    generator = np.random.default_rng(7)
    results = [
        benchmark.speedup(*paired_noise(generator, rounds, ratio), seed=i, resamples=1000)
        for i in range(300)
    ]
    covered = np.mean([result.low <= ratio <= result.high for result in results])
    assert covered >= 0.93
    # It could do so by being useless: it is also narrow, for noise that drifts by ±20%.
    widths = [(result.high - result.low) / result.ratio for result in results]
    assert np.median(widths) < (0.2 if rounds == 15 else 0.12)


def test_interval_covers_when_the_stop_rule_chose_the_rounds():
    """Looking after every round and stopping when it is narrow must not spoil the interval."""
    covered = 0
    for seed in range(100):
        rounds = measure(Machine(seed, noise=0.04), StopRule(), seed, Torch=1.0, OpenVINO=1.0)
        result = benchmark.speedup(*rounds.samples.values(), seed=seed, resamples=1000)
        covered += result.low <= 1 <= result.high
    assert covered >= 90


def simulated(generator, generations, call, process, count):
    """Samples of two runs that do the same: between generations and rounds the machine drifts.

    Returns:
        2 x count x all rounds.
    """
    parts = []
    for rounds in generations:
        drift = 0.05 * generator.normal(size=(1, count, 1))
        drift = drift + np.cumsum(0.01 * generator.normal(size=(1, count, rounds)), axis=2)
        own = process * generator.normal(size=(2, count, 1))
        parts.append(np.exp(drift + own + call * generator.normal(size=(2, count, rounds))))
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize("rounds", [5, 20, 60])
@pytest.mark.parametrize("call", [0.01, 0.02, 0.04])
@pytest.mark.parametrize("process", [0.0, 0.015, 0.03])
def test_the_interval_of_generations_covers(rounds, call, process):
    """Whatever the spread between calls (`call`) and between processes (`process`)."""
    generator = np.random.default_rng([rounds, int(1000 * call), int(1000 * process)])
    generations = [rounds] * 5
    samples = simulated(generator, generations, call, process, 1500)
    found = [benchmark.speedup(*pair, 0, generations) for pair in samples.transpose(1, 0, 2)]
    covered = np.mean([x.low <= 1 <= x.high for x in found])
    assert 0.93 <= covered <= 0.98


def test_the_bootstrap_does_not_cover_what_differs_between_processes():
    """Why there are generations at all: of one, however long, nobody can tell."""
    samples = simulated(np.random.default_rng(0), [60], 0.02, 0.015, 300)
    found = [benchmark.speedup(*x, 0, resamples=500) for x in samples.transpose(1, 0, 2)]
    assert np.mean([x.low <= 1 <= x.high for x in found]) < 0.6


@pytest.mark.parametrize(("call", "process"), [(0.02, 0.0), (0.02, 0.015), (0.04, 0.03)])
def test_the_interval_covers_when_the_stop_rule_chose_the_generations(call, process):
    covered = []
    for seed in range(400):
        rule = StopRule(min_generations=5, max_generations=14, budget_s=400.0)
        rounds = Processes(seed, call, process).measure(rule, TWO, seed)
        found = spread(rounds)
        covered.append(found.low <= 1 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.99


def test_a_speedup_of_generations_is_the_mean_of_theirs():
    baseline, run = [2.0] * 3 + [8.0] * 4, [1.0] * 3 + [2.0] * 4
    found = benchmark.speedup(baseline, run, 0, [3, 4])
    # Of 2 and 4: by Student's t of one degree of freedom.
    assert found.ratio == pytest.approx(math.sqrt(8))
    width = stats.t.ppf(0.98, 1) * math.log(2) / 2
    assert found.high == pytest.approx(found.ratio * math.exp(width))
    assert found.low == pytest.approx(found.ratio / math.exp(width))
    # One that was cut short after a round is no measurement.
    cut = benchmark.speedup([1.0] * 9 + [5.0], [1.0] * 10, 0, [3, 3, 3, 1])
    assert (cut.ratio, cut.verdict) == (1.0, "same")
    # One generation that is whole, and one that was interrupted in its first round.
    assert benchmark.speedup([2.0] * 7, [1.0] * 6, 0, [6]) == Speedup(2.0, 2.0, 2.0, "faster")


def test_same_against_same_is_never_faster():
    generator = np.random.default_rng(3)
    verdicts = [
        benchmark.speedup(*paired_noise(generator, 50), seed=i, resamples=500).verdict
        for i in range(200)
    ]
    assert sum(verdict in ("faster", "slower") for verdict in verdicts) <= 5


def test_resampling_keeps_rounds_together():
    """Whatever the machine does to a round, a run that takes half of it is 2x faster, exactly."""
    baseline = np.random.default_rng(0).lognormal(0, 1, size=31)
    assert benchmark.speedup(baseline, baseline / 2, seed=0) == Speedup(2.0, 2.0, 2.0, "faster")


def test_interval_agrees_with_scipy():
    baseline, run = paired_noise(np.random.default_rng(1), 41)
    result = benchmark.speedup(baseline, run, seed=0, resamples=9999)
    expected = stats.bootstrap(
        (baseline, run),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(5),
    ).confidence_interval
    assert result.low == pytest.approx(expected.low, rel=0.005)
    assert result.high == pytest.approx(expected.high, rel=0.005)


def test_speedup_follows_the_seed():
    samples = paired_noise(np.random.default_rng(1), 40)
    assert benchmark.speedup(*samples, seed=3) == benchmark.speedup(*samples, seed=3)
    assert benchmark.speedup(*samples, seed=3) != benchmark.speedup(*samples, seed=4)


def test_speedup_of_a_run_that_failed_uses_the_rounds_it_has():
    baseline = [1.0] * 10 + [9.0] * 30
    assert benchmark.speedup(baseline, [0.5] * 10, seed=0) == Speedup(2.0, 2.0, 2.0, "faster")


@pytest.mark.parametrize("rounds", range(1, benchmark.LEAST_ROUNDS))
def test_few_rounds_have_no_interval(rounds):
    result = benchmark.speedup([2.0] * rounds, [1.0] * rounds, seed=0)
    assert result == Speedup(2.0, None, None, "inconclusive")
    assert benchmark.resolution(result) is None


def test_no_rounds_have_no_speedup():
    with pytest.raises(ValueError, match="no round"):
        benchmark.speedup([1.0, 1.0], [], seed=0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.04, 1.10, "faster"),
        (1.02, 1.10, "inconclusive"),
        (0.98, 1.02, "same"),
        (1.01, 1.02, "same"),
        (0.97, 1.03, "same"),
        (0.96, 1.01, "inconclusive"),
        (0.90, 1.10, "inconclusive"),
        (0.90, 0.96, "slower"),
        (None, None, "inconclusive"),
    ],
)
def test_verdict(low, high, verdict):
    assert benchmark.verdict(low, high) == verdict
    # Less than 3% is never a difference, however well a machine resolves it.
    assert benchmark.verdict(low, high, margin=0.01) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.19, 1.30, "inconclusive"),
        (1.21, 1.30, "faster"),
        (0.70, 0.82, "slower"),
        (0.70, 0.84, "inconclusive"),
        (0.98, 1.02, "same"),
        (0.90, 1.10, "inconclusive"),
    ],
)
def test_a_difference_exceeds_what_the_machine_resolves(low, high, verdict):
    """What lies within 20% may be noise where that was seen; the same is what lies within 3%."""
    assert benchmark.verdict(low, high, margin=0.2) == verdict
    # Whatever it is, something can be slower.
    assert benchmark.verdict(0.1, 0.3, margin=2.0) == "slower"
    assert benchmark.verdict(3.1, 9.0, margin=2.0) == "faster"


def test_resolution_is_the_far_end_of_the_interval():
    # In either direction by the same factor.
    assert benchmark.resolution(Speedup(1.0, 0.5, 1.02, "inconclusive")) == pytest.approx(1.0)
    assert benchmark.resolution(Speedup(1.0, 0.98, 2.0, "inconclusive")) == pytest.approx(1.0)
    assert benchmark.resolution(Speedup(1.03, 1.01, 1.05, "inconclusive")) == pytest.approx(0.05)


# Costs -----------------------------------------------------------------------------------------


def test_break_even_is_when_the_seconds_saved_exceed_the_seconds_spent():
    baseline, run = [0.30] * 20, [0.20] * 20
    exact = benchmark.break_even(baseline, run, extra_s=15.0, images_per_call=2, seed=0)
    # 0.1 s a call, 150 calls, two images in each.
    assert exact.images == pytest.approx(300)
    assert (exact.low, exact.high) == (pytest.approx(300), pytest.approx(300))


def test_the_interval_of_a_break_even_covers_the_truth():
    covered = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        machine = generator.normal(1, 0.1, 30)
        baseline = machine * generator.normal(0.30, 0.01, 30)
        run = machine * generator.normal(0.24, 0.01, 30)
        found = benchmark.break_even(baseline, run, extra_s=6.0, images_per_call=1, seed=seed)
        assert found.low <= found.images <= found.high
        covered += found.low <= 100 <= found.high
    assert covered >= 88


def test_the_break_even_of_generations():
    baseline, run = [0.30] * 3 + [0.32] * 3 + [0.28] * 3, [0.20] * 9
    found = benchmark.break_even(baseline, run, 15.0, 2, 0, [3, 3, 3])
    width = stats.t.ppf(0.98, 2) * 0.02 / math.sqrt(3)
    assert found.images == pytest.approx(300)
    assert found.low == pytest.approx(30 / (0.1 + width))
    assert found.high == pytest.approx(30 / (0.1 - width))


def test_what_is_no_faster_never_breaks_even():
    slower = benchmark.break_even([1.0] * 20, [1.5] * 20, 5.0, 1, seed=0)
    assert (slower.images, slower.low, slower.high) == (None, None, None)
    # Faster or slower, who knows: the interval has no end.
    generator = np.random.default_rng(0)
    unknown = benchmark.break_even(
        generator.normal(1.01, 0.2, 30), generator.normal(1.0, 0.2, 30), 5.0, 1, seed=0
    )
    assert unknown.low > 0
    assert unknown.high is None


def test_what_costs_nothing_has_paid_at_once():
    cheap = benchmark.break_even([1.0] * 20, [0.5] * 20, extra_s=-0.2, images_per_call=1, seed=0)
    assert (cheap.images, cheap.low, cheap.high) == (0, 0, 0)


def test_a_break_even_from_few_rounds_has_no_interval():
    few = benchmark.break_even([1.0] * 3, [0.5] * 3, extra_s=5.0, images_per_call=1, seed=0)
    assert (few.images, few.low, few.high) == (10, None, None)


def test_it_needs_numpy_alone():
    """Workers of old environments import it."""
    program = (
        "import sys, numpy; before = set(sys.modules); import benchmark; "
        "print(*{x.split('.')[0] for x in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(benchmark.__file__).parent,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert done.stdout.split() == [b"benchmark"]
