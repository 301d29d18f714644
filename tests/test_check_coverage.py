"""`tools/check_coverage.py`: what it measures, what it keeps, and what it says of the intervals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import check_coverage
from check_coverage import Invocation

import benchmark
from benchmark import Speedup, verdict
from results import file
from results.record import Environment, Group, Results, Run, Settings


def run_of(backend, **changes):
    facts = {"label": backend, "baseline": False, "requested_precision": "fp32", "status": "ok"}
    return Run(backend=backend, **{**facts, **changes})


def results_of(speedup, precision="fp32", backend="torch", again=None, **changes):
    """What an invocation measures: Torch, perhaps another backend, and a second side."""
    again = again or run_of(backend, environment="again", speedup=speedup)
    runs = [run_of("torch", baseline=True)]
    runs += [] if backend == "torch" else [run_of(backend, samples_s=(0.1, 0.2, 0.1, 0.2, 0.1))]
    group = Group(
        model="testRetinaNet",
        export="traced",
        precision=precision,
        images_per_call=1,
        image_sizes={},
        rounds=20,
        stopped="interval",
        runs=(*runs, again),
    )
    facts = {"version": "0", "environment": Environment(), "settings": Settings(), "complete": True}
    return Results(groups=(group,), **{**facts, **changes})


def speedup_of(low, high):
    return Speedup((low + high) / 2, low, high, verdict(low, high))


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Calls the tool; gives its exit code, what it prints, and what it tells."""

    def check(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["check", "--folder", str(tmp_path), *arguments])
        code = check_coverage.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return check


@pytest.fixture
def measures(monkeypatch):
    """Stands in for run_blade.py: measures what it is told, and lists the command lines."""

    def with_results(*measured, code=0):
        commands = []

        def run(command, **options):
            commands.append(command)
            folder = Path(command[command.index("--output") + 1])
            if len(commands) <= len(measured):
                file.save(measured[len(commands) - 1], folder / "results.json")
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(check_coverage.subprocess, "run", run)
        return commands

    return with_results


def cells(text):
    return [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]


# What is measured ------------------------------------------------------------------------------


def test_seeds_follow_each_other(call, measures, tmp_path):
    commands = measures(*(results_of(speedup_of(0.98, 1.02)) for _ in range(3)))
    code, printed, told = call("--runs", "3", "--image-size", "96x128", "--", "--time-budget", "9")
    assert code == 0
    assert [command[command.index("--seed") + 1] for command in commands] == ["0", "1", "2"]
    assert commands[0][2:] == [
        *("--model", "testRetinaNet", "--image-size", "96x128", "--weights", "synthetic"),
        *("--precision", "fp32", "--backend", "torch"),
        *("--environment", f"torch@again={sys.executable}", "--time-budget", "9"),
        *("--seed", "0", "--output", str(tmp_path / "seed-000")),
    ]
    assert cells(printed)[:2] == ["3", "3"]
    assert told.splitlines()[0] == "seed 0: 1.000x, 0.980 to 1.020, same, 20 rounds"


def test_what_is_complete_is_not_measured_again(call, measures, tmp_path):
    measures(results_of(speedup_of(0.98, 1.02)), results_of(speedup_of(0.97, 1.01)))
    call("--runs", "2")
    unfinished = results_of(None, complete=False)
    file.save(unfinished, tmp_path / "seed-001" / "results.json")
    commands = measures(results_of(speedup_of(1.01, 1.02)), results_of(speedup_of(0.9, 1.2)))
    code, printed, _ = call("--runs", "3")
    assert code == 0
    assert [command[command.index("--seed") + 1] for command in commands] == ["1", "2"]
    assert cells(printed)[:2] == ["3", "2"]


def test_results_of_other_settings_are_refused(call, measures):
    measures(results_of(speedup_of(0.98, 1.02)))
    call("--runs", "1")
    measures(results_of(speedup_of(0.98, 1.02), settings=Settings(image_size=(96, 128))))
    code, printed, told = call("--runs", "2")
    assert (code, printed) == (2, "")
    assert "seed-001 has results of other settings" in told


def test_seeds_and_folders_may_differ(call, measures):
    settings = [Settings(seed=seed, output=f"seed-00{seed}") for seed in range(2)]
    measures(*(results_of(speedup_of(0.98, 1.02), settings=x) for x in settings))
    assert call("--runs", "2")[0] == 0


@pytest.mark.parametrize(("measured", "code"), [(True, 2), (True, 130), (False, 0)])
def test_an_invocation_that_fails_ends_it(call, measures, measured, code, tmp_path):
    measures(*([results_of(speedup_of(0.98, 1.02))] if measured else []), code=code)
    assert call("--runs", "1") == (
        2,
        "",
        f"check: error: run_blade.py ended with {code} for seed 0: see "
        f"{tmp_path / 'seed-000' / 'log.txt'}\n",
    )


def test_a_mismatch_is_measured_all_the_same(call, measures):
    measures(results_of(speedup_of(0.98, 1.02)), code=1)
    assert call("--runs", "1")[0] == 0


def test_rows_that_are_missing_are_named(call, measures):
    measures(results_of(speedup_of(0.98, 1.02), precision="bf16"))
    code, _, told = call("--runs", "1")
    assert code == 2
    assert "seed-000 has no rows torch and torch@again at fp32" in told


def test_two_rows_of_an_engine_are_compared_by_their_samples(call, measures):
    again = run_of(
        "openvino",
        environment="again",
        samples_s=(0.05, 0.1, 0.05, 0.1, 0.05),
        speedup=speedup_of(9.0, 9.1),
    )
    commands = measures(results_of(None, backend="openvino", again=again))
    _, printed, told = call("--runs", "1", "--backend", "openvino")
    assert f"openvino@again={sys.executable}" in commands[0]
    assert told.startswith("seed 0: 2.000x, 2.000 to 2.000, faster")
    assert cells(printed)[1] == "0"


def test_two_rows_of_an_engine_are_compared_by_generation():
    one, other = (run_of("openvino", samples_s=x) for x in ((0.1, 0.3, 0.2) * 2, (0.1,) * 6))
    found = check_coverage.speedup_of(one, other, (3, 3), 0)
    assert found == benchmark.speedup(one.samples_s, other.samples_s, 0, (3, 3))
    assert found != benchmark.speedup(one.samples_s, other.samples_s, 0)


@pytest.mark.slow
def test_torch_against_itself(call, tmp_path):
    options = ("--runs", "1", "--image-size", "96x128")
    code, printed, told = call(*options, "--", "--warmup", "2", "--iterations", "5")
    assert code == 0
    assert cells(printed)[0] == "1"
    (group,) = file.load(tmp_path / "seed-000" / "results.json").groups
    assert [run.name for run in group.runs] == ["torch", "torch@again"]
    assert told.startswith(f"seed 0: {group.runs[1].speedup.ratio:.3f}x, ")
    assert call(*options, "--", "--warmup", "2", "--iterations", "5")[:2] == (0, printed)


# What is said of it ----------------------------------------------------------------------------


def invocations(*intervals, **changes):
    facts = {"rounds": 20, "seconds": 30.0, **changes}
    return [
        Invocation(seed=seed, speedup=speedup_of(*interval), **facts)
        for seed, interval in enumerate(intervals)
    ]


def test_the_table():
    found = invocations((0.99, 1.01), (0.98, 1.06), (1.04, 1.06), (0.90, 0.96))
    table = check_coverage.coverage_table(found)
    (row,) = table.rows
    # Clopper and Pearson's interval of 2 of 4, from the quantiles of beta distributions.
    assert row[:3] == ("4", "2", "50.0% (6.8% to 93.2%)")
    # Off by 0, 2, 5 and 7%; half widths are 1, 4, 1 and 3%.
    assert row[3:8] == ("3.50%", f"{np.percentile([0, 2, 5, 7], 95):.2f}%", "2.00%", "20", "30")
    assert dict(zip([c.heading for c in table.columns][8:], row[8:])) == {
        "faster": "1",
        "slower": "1",
        "same": "1",
        "inconclusive": "1",
    }
    assert len(table.notes) == 1


def test_a_bound_of_1_holds_1():
    assert check_coverage.holding(invocations((1.0, 1.1), (0.9, 1.0), (1.001, 1.1))) == (2, 3)


def test_invocations_without_an_interval_are_told_apart():
    few = Invocation(1, Speedup(1.2, None, None, "inconclusive"), rounds=3, seconds=None)
    failed = Invocation(2, None, rounds=0, seconds=None)
    found = [*invocations((0.9, 1.1), seconds=None), few, failed]
    table = check_coverage.coverage_table(found)
    assert table.rows[0][:2] == ("1", "1")
    assert table.rows[0][7] == "-"
    assert table.notes[-1] == "2 more without an interval"
    assert failed.text == "seed 2: no interval"
    assert check_coverage.coverage_table([few]).rows == ()


@pytest.mark.parametrize(("missed", "code"), [(0, 0), (3, 0), (8, 1)])
def test_the_exit_code_says_whether_too_few_hold_1(call, measures, missed, code):
    """Of 40 intervals 2 should miss; with 3 that is chance, with 8 it is not."""
    wrong, right = speedup_of(1.01, 1.02), speedup_of(0.99, 1.02)
    measures(*(results_of(wrong if at < missed else right) for at in range(40)))
    assert call("--runs", "40")[0] == code
