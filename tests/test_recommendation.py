"""Which run to ship: on results made for the purpose, and on those that were measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import pytest

import benchmark
from benchmark import Speedup
from results.file import as_json, load
from results.recommendation import constraints, recommend, sentences
from results.record import (
    Accuracy,
    AveragePrecision,
    Difference,
    Environment,
    Evaluated,
    Group,
    Preparation,
    Recommendation,
    Results,
    Run,
    SameAgainstSame,
    Settings,
    Weights,
)

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measured"
ROUNDS = 20
PACKAGES: Dict[str, Dict[str, str]] = {
    "torch": {"torch": "2", "torchvision": "0"},
    "torchscript": {"torch": "2", "torchvision": "0"},
    "openvino": {"openvino": "2026"},
    "onnxruntime": {"onnxruntime": "1", "onnx": "1"},
}
LABELS = {
    "torch": "Torch",
    "torchscript": "TorchScript",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNXRuntime",
}


def samples(ms: float) -> Tuple[float, ...]:
    """Seconds of calls that vary by 1%."""
    return tuple(ms / 1000 * (1 + 0.01 * ((7 * n) % 5 - 2) / 2) for n in range(ROUNDS))


def ap(value: float, verdict: Optional[str] = None, needed: Optional[int] = None) -> Accuracy:
    if verdict is None:
        return Accuracy(60, 300, {"bbox": AveragePrecision(value)})
    ratio = value / 50
    known = Difference(value - 50, value - 51, value - 49, ratio, ratio, ratio, verdict, needed)
    return Accuracy(60, 300, {"bbox": AveragePrecision(value, difference=known)})


def run(backend: str, precision: str, ms: float, fp32_ms: float, **more: Any) -> Run:
    is_reference = backend == "torch" and precision == "fp32"
    own = samples(ms)
    speedup = None if backend == "torch" else benchmark.speedup(samples(fp32_ms), own, 0)
    known = Run(
        backend=backend,
        label=LABELS[backend],
        baseline=backend == "torch",
        requested_precision=precision,
        effective_precision=precision,
        status="ok",
        samples_s=own,
        statistics=benchmark.summarize(own, 1),
        prepare=Preparation(build=1.0, total=1.0 if backend == "torch" else 6.0),
        peak_memory_mb=500.0 if backend == "torch" else 800.0,
        speedup=speedup if precision == "fp32" else None,
        speedup_over_fp32=None
        if precision == "fp32"
        else benchmark.speedup(samples(fp32_ms), own, 0),
        versions=PACKAGES[backend],
    )
    return known if is_reference and not more else dataclasses.replace(known, **more)


def group(*runs: Run, precision: str = "fp32", evaluated: bool = False) -> Group:
    return Group(
        model="own",
        export="traced",
        precision=precision,
        images_per_call=1,
        image_sizes={},
        rounds=ROUNDS,
        stopped="interval",
        runs=runs,
        weights=Weights("file", "model.pth"),
        fp32_samples_s=() if precision == "fp32" else samples(100),
        evaluated=Evaluated(60, 200) if evaluated else None,
    )


def answer(*groups: Group, resolution: float = 0.01, **settings: Any) -> Recommendation:
    aa = SameAgainstSame("own", "fp32", Speedup(1, 0.99, 1.01, "same"), resolution, ((), ()))
    results = Results("0", Environment(), Settings(**settings), groups, aa)
    (only,) = recommend(results)
    assert len(sentences(only)) == 4
    assert all(line.endswith(".") for line in sentences(only))
    # It is a record like any other.
    assert json.loads(as_json([only]))[0]["model"] == "own"
    return only


FP32 = (
    run("torch", "fp32", 100, 100),
    run("torchscript", "fp32", 80, 100),
    run("openvino", "fp32", 50, 100),
)


def test_the_fastest_is_shipped():
    told = answer(group(*FP32))
    assert told.ship.run == "openvino"
    assert told.ship.speedup.ratio == pytest.approx(2)
    assert told.runner_up.run == "torchscript"
    assert not told.is_tie
    # 5 s more to prepare, at 50 ms an image.
    assert told.ship.pays_back.images == pytest.approx(100, rel=0.01)
    first, second, third, fourth = sentences(told)
    assert first.startswith("Ship: OpenVINO fp32, 2.00x as fast as Torch fp32 (")
    assert "with 95% confidence), 50 ms a call" in first
    assert "800 MiB of memory, 6.0 s to prepare, paid back after" in second
    assert "1 package beside PyTorch" in second
    assert "AP was not looked at (--dataset)." in second
    assert third == "Next: TorchScript fp32, 1.25x: OpenVINO fp32 is 1.60x as fast."
    assert "nothing that was measured is faster" in fourth


@pytest.mark.parametrize(("ms", "is_told"), [(54, False), (81.25, True)])
def test_what_an_image_of_a_new_size_takes_is_a_cost(ms, is_told):
    new = run("openvino", "fp32", 50, 100, new_size_s=(ms / 1000, 9.0, 0.001))
    told = answer(group(*FP32[:2], new))
    assert told.ship.new_size_ms == pytest.approx(ms)
    assert told.runner_up.new_size_ms is None
    assert ("81.25 ms for an image of a new size" in sentences(told)[1]) is is_told


def test_what_was_interrupted_is_not_shipped():
    told = answer(dataclasses.replace(group(*FP32), stopped="interrupted"))
    assert told.ship is None
    assert "(it was not measured to the end)" in sentences(told)[1]


def test_what_is_paid_back_goes_by_generations():
    of = dataclasses.replace(group(*FP32), generations=(ROUNDS - 6, 3, 3))
    found = answer(of).ship.pays_back
    samples_s = (FP32[0].samples_s, FP32[2].samples_s)
    assert found == benchmark.break_even(*samples_s, 5.0, 1, 0, of.generations)
    assert found != benchmark.break_even(*samples_s, 5.0, 1, 0)


def test_a_tie_goes_to_the_simpler_one():
    close = (*FP32[:1], run("torchscript", "fp32", 50.5, 100), run("openvino", "fp32", 50, 100))
    told = answer(group(*close))
    assert told.ship.run == "torchscript"
    assert told.is_tie
    assert told.runner_up.run == "openvino"
    assert "no faster than can be told from noise, and it needs more packages" in sentences(told)[2]
    # Where more is noise, a larger difference is a tie.
    apart = (*FP32[:1], run("torchscript", "fp32", 53, 100), run("openvino", "fp32", 50, 100))
    assert answer(group(*apart)).ship.run == "openvino"
    assert answer(group(*apart), resolution=0.08).ship.run == "torchscript"


def test_of_two_precisions_as_fast_the_higher_one():
    lower = group(
        run("torch", "bf16", 90, 100), run("openvino", "bf16", 49.5, 100), precision="bf16"
    )
    told = answer(group(*FP32), lower)
    assert (told.ship.run, told.ship.precision) == ("openvino", "fp32")
    assert "at a lower precision" in sentences(told)[2]


def test_torch_itself_where_nothing_is_faster():
    told = answer(group(FP32[0], run("openvino", "fp32", 99, 100)))
    assert told.ship.run == "torch"
    assert (
        "nothing that qualifies is faster by more than can be told from noise" in sentences(told)[0]
    )
    assert "quiet" not in sentences(told)[0]


def test_a_noisy_machine_is_no_judge():
    told = answer(group(*FP32), resolution=1.5)
    assert told.ship.run == "torch"
    assert "only differences of 150% could be told here" in sentences(told)[0]


def test_a_lower_precision_that_nothing_vouches_for_is_said_to_be_one():
    lower = group(run("torch", "bf16", 60, 100), run("openvino", "bf16", 25, 100), precision="bf16")
    told = answer(group(*FP32), lower)
    assert told.ship.name == "OpenVINO bf16"
    assert (
        "AP was not looked at (--dataset): nothing says what bf16 costs; at fp32 it would be "
        "OpenVINO fp32, 2.00x." in sentences(told)[1]
    )
    synthetic = dataclasses.replace(lower, weights=Weights("synthetic", objects=100))
    assert "and its weights are synthetic" in sentences(answer(group(*FP32), synthetic))[1]


def evaluated(verdict: str, needed: Optional[int] = None) -> Tuple[Group, Group]:
    first = [dataclasses.replace(x, accuracy=ap(50, "keeps")) for x in FP32[1:]]
    reference = dataclasses.replace(FP32[0], accuracy=ap(50))
    lower = (
        run("torch", "bf16", 60, 100, accuracy=ap(49.9, "keeps")),
        run("openvino", "bf16", 25, 100, accuracy=ap(48, verdict, needed)),
    )
    return (
        group(reference, *first, evaluated=True),
        group(*lower, precision="bf16", evaluated=True),
    )


def test_what_keeps_its_ap_is_shipped():
    told = answer(*evaluated("keeps"))
    assert told.ship.name == "OpenVINO bf16"
    assert told.images == 60
    assert "box AP 48.00 (-2.00 ±1.00 keeps AP)" in sentences(told)[1]
    assert "AP was looked at on 60 images." in sentences(told)[1]


def test_what_loses_its_ap_is_not():
    told = answer(*evaluated("loses"))
    assert told.ship.name == "OpenVINO fp32"
    assert sentences(told)[3] == "To change that: OpenVINO bf16 (4.00x), if it kept its AP."
    assert [x.excluded for x in told.others if x.name == "OpenVINO bf16"] == [("ap",)]


def test_what_too_few_images_tell_is_not_and_how_many_would():
    told = answer(*evaluated("too few", 240))
    assert told.ship.name == "OpenVINO fp32"
    assert "if about 240 images told that it keeps its AP" in sentences(told)[3]


def test_a_run_whose_ap_is_not_known_is_not_shipped():
    reference, lower = evaluated("keeps")
    unknown = dataclasses.replace(lower.runs[1], accuracy=Accuracy(reason="it crashed"))
    told = answer(reference, dataclasses.replace(lower, runs=(lower.runs[0], unknown)))
    assert told.ship.name == "OpenVINO fp32"
    assert "if it were known to keep its AP" in sentences(told)[3]


@pytest.mark.parametrize(
    ("limits", "ship", "words"),
    [
        ({"max_memory_mb": 600}, "TorchScript fp32", ""),
        ({"max_prepare_s": 2}, "TorchScript fp32", ""),
        ({"max_latency_ms": 60}, "OpenVINO fp32", "below --max-latency-ms 50 none would be left"),
    ],
)
def test_constraints(limits, ship, words):
    script = dataclasses.replace(
        FP32[1], peak_memory_mb=550.0, prepare=Preparation(build=1.0, total=1.5)
    )
    told = answer(group(FP32[0], script, FP32[2]), **limits)
    assert told.ship.name == ship
    assert words in sentences(told)[3]


def test_a_constraint_that_stands_in_the_way_is_named():
    script = dataclasses.replace(FP32[1], peak_memory_mb=550.0)
    told = answer(group(FP32[0], script, FP32[2]), max_memory_mb=600)
    assert "OpenVINO fp32 (2.00x) would do with --max-memory-mb 800" in sentences(told)[3]
    told = answer(group(*FP32), max_prepare_s=5.0)
    assert told.ship.run == "torch"
    assert "would do with --max-prepare-s 6" in sentences(told)[3]


def test_a_run_that_breaks_several_limits_is_named_with_all_of_them():
    """The slower one that breaks a single limit is not the way out."""
    told = answer(group(*FP32), max_latency_ms=20, max_memory_mb=600)
    assert told.ship is None
    assert (
        "OpenVINO fp32 (2.00x) would do with --max-latency-ms 50 and --max-memory-mb 800."
        in (sentences(told)[3])
    )
    wrong = dataclasses.replace(FP32[2], status="mismatch", reason="it is blind")
    told = answer(group(*FP32[:1], wrong), max_latency_ms=20)
    assert "(it does not find what Torch fp32 finds; 50 ms a call" in sentences(told)[1]
    # What finds something else is the last to be thought of.
    assert "Torch fp32 (1.00x) would do with --max-latency-ms 100." in sentences(told)[3]
    told = answer(group(*FP32[:1], wrong), max_memory_mb=600)
    assert told.others[0].excluded == ("mismatch", "memory")
    assert "with --max-memory-mb 800, if it found what Torch fp32 finds." in sentences(told)[3]


def test_where_nothing_else_qualifies_it_is_no_close_race():
    wrong = dataclasses.replace(FP32[2], status="mismatch", reason="it is blind")
    assert "noise" not in sentences(answer(group(FP32[0], wrong)))[0]


def test_nothing_qualifies():
    told = answer(group(*FP32), max_latency_ms=12.34)
    assert told.ship is None
    first, second, _, fourth = sentences(told)
    assert first == "Ship: nothing that was measured of own qualifies."
    for name, ms in (("OpenVINO fp32", 50), ("TorchScript fp32", 80), ("Torch fp32", 100)):
        assert f"{name} ({ms} ms a call, --max-latency-ms 12.34)" in second
    assert "OpenVINO fp32 (2.00x) would do with --max-latency-ms 50" in fourth


def test_a_limit_that_is_named_lets_the_run_pass():
    slow = run("openvino", "fp32", 33.3333, 100)
    told = answer(group(FP32[0], slow), max_latency_ms=5)
    limit = float(sentences(told)[3].rsplit(" ", 1)[1].rstrip("."))
    assert limit == pytest.approx(33.4, abs=0.11)
    assert answer(group(FP32[0], slow), max_latency_ms=limit).ship.run == "openvino"


def test_wrong_and_failed_runs_are_not_shipped():
    wrong = dataclasses.replace(FP32[2], status="mismatch", reason="it is blind")
    failed = dataclasses.replace(
        FP32[2], backend="onnxruntime", label="ONNXRuntime", status="failed", statistics=None
    )
    told = answer(group(*FP32[:2], wrong, failed))
    assert told.ship.run == "torchscript"
    assert sentences(told)[3] == (
        "To change that: OpenVINO fp32 (2.00x), if it found what Torch fp32 finds."
    )


def test_torch_that_stands_in_two_groups_is_one():
    again = group(*FP32[:1], run("openvino", "int8", 30, 100), precision="int8")
    told = answer(group(*FP32), again)
    names = [x.name for x in (told.ship, told.runner_up, *told.others)]
    assert sorted(names) == sorted(
        ["OpenVINO int8", "OpenVINO fp32", "TorchScript fp32", "Torch fp32"]
    )


def test_with_too_few_rounds_the_ratio_alone_counts():
    def short(of: Run) -> Run:
        few = of.samples_s[:3]
        speedup = None if of.baseline else benchmark.speedup(FP32[0].samples_s[:3], few, 0)
        return dataclasses.replace(of, samples_s=few, speedup=speedup)

    told = answer(group(*map(short, FP32)))
    assert told.ship.run == "openvino"
    assert "(in too few rounds for an interval)" in sentences(told)[0]


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).resolve().parent.parent / "docs" / "measured").rglob("results.json")),
)
def test_of_everything_that_was_measured(path):
    results = load(path)
    answers = recommend(results)
    assert len(answers) == len({(x.model, x.objects) for x in results.groups})
    for each in answers:
        assert len(sentences(each)) == 4
        if each.ship is not None:
            runs = [each.ship, *filter(None, [each.runner_up]), *each.others]
            fastest = max((x.ratio for x in runs if not x.excluded), default=0)
            assert each.ship.ratio > fastest / (1 + 2 * each.resolution) * 0.9
    assert constraints(results.settings).min_ap_ratio == 0.99


def test_torch_fp32_is_named_where_it_took_part_without_a_row():
    lower = group(
        run("torch", "bf16", 120, 100), run("torchscript", "bf16", 110, 100), precision="bf16"
    )
    told = answer(lower)
    assert told.ship.name == "Torch fp32"
    assert told.ship.median_ms == pytest.approx(100, rel=0.01)
    told = answer(lower, max_memory_mb=900)
    assert told.ship.name == "TorchScript bf16"


def test_ap_that_was_not_judged_was_not_looked_at():
    reference, lower = evaluated("keeps")
    unknown = [
        dataclasses.replace(x, accuracy=Accuracy(reason="it crashed")) for x in reference.runs
    ]
    told = answer(dataclasses.replace(reference, runs=tuple(unknown)))
    assert told.images is None
    assert lower.evaluated is not None
