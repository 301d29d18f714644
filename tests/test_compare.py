"""Two result files against each other: verdicts, refusals, exit codes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
from scipy import stats
from test_results import DAMAGES, NAME, SPELLED, make_document, records, write

import compare
from results.file import load, save
from results.record import Results

# How much two processes that do the same differ, and two calls in a row; and the drift of a shared
# machine between two invocations, of which an engine feels a part only: as measured on two cores,
# see docs/performance.md.
PROCESS_SD, CALL_SD, DRIFT_SD, ENGINE_SHARE = 0.01, 0.03, 0.08, 0.35


def make_run(backend: str, seconds: List[float], **changes: Any) -> Dict[str, Any]:
    run = copy.deepcopy(make_document()["groups"][0]["runs"][0])
    run["statistics"]["median_ms"] = 1000 * float(np.median(seconds))
    return {
        **run,
        "backend": backend,
        "label": backend.title(),
        "baseline": backend == "torch",
        "samples_s": seconds,
        **changes,
    }


def measured(
    seed: int, times: Optional[Dict[str, float]] = None, rounds: int = 20, **settings: Any
) -> Dict[str, Any]:
    """A result file of made-up runs on a machine of its own mood."""
    generator = np.random.default_rng(seed)
    document = make_document()
    document["settings"].update(settings)
    document["environment"] = {"cpu": {"model": "A", "usable_cores": 2}, "versions": {}}
    machine = generator.normal(0, DRIFT_SD) + generator.normal(0, 0.02, rounds)
    runs = []
    for backend, seconds in (times or {"torch": 0.4, "openvino": 0.25}).items():
        noise = generator.normal(0, PROCESS_SD) + generator.normal(0, CALL_SD, rounds)
        felt = machine if backend == "torch" else ENGINE_SHARE * machine
        runs.append(make_run(backend, (seconds * np.exp(felt + noise)).tolist()))
    document["groups"][0]["runs"] = runs
    return document


def verdicts(before: Results, after: Results, **options: Any) -> Dict[str, str]:
    options = {"threshold": 0.05, "by": "both", **options}
    compared = compare.compare_all(compare.pairs(before, after), **options)
    return {x.pair.after.backend: x.verdict for x in compared}


def verdicts_of(before: Dict[str, Any], after: Dict[str, Any], **options: Any) -> Dict[str, str]:
    """The same of documents."""
    return verdicts(records(before), records(after), **options)


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command line on two documents."""

    def run(before: Dict[str, Any], after: Dict[str, Any], *options: str) -> Any:
        paths = [tmp_path / "before.json", tmp_path / "after.json"]
        for path, document in zip(paths, (before, after)):
            write(document, path)
        return compare.main([*map(str, paths), *options]), capsys.readouterr()

    return run


def count_slower(by: str) -> int:
    """In how many of 100 pairs of the same something is said to be slower."""
    pairs = [(measured(2 * seed), measured(2 * seed + 1)) for seed in range(100)]
    return sum("slower" in verdicts_of(*pair, by=by).values() for pair in pairs)


def test_the_same_is_never_slower():
    """A/A: at least 95 of 100 pairs, on a machine that is 8% faster or slower each time."""
    assert count_slower("both") <= 5


@pytest.mark.parametrize("by", ["time", "speedup"])
def test_one_alone_would_be_fooled_by_the_machine(by):
    """The test above can fail."""
    assert count_slower(by) > 5


@pytest.mark.parametrize(("factor", "verdict"), [(1.25, "slower"), (0.8, "faster")])
def test_another_speed_is_seen(factor, verdict):
    seen = 0
    for seed in range(50):
        before = measured(2 * seed)
        after = measured(2 * seed + 1, {"torch": 0.4, "openvino": 0.25 * factor})
        seen += verdicts_of(before, after)["openvino"] == verdict
    assert seen >= 45


REAL = Path(__file__).parent / "data" / "compare"
SAME, SLOWER, WRONG = (sorted(REAL.glob(f"{name}-*.json")) for name in ("same", "slower", "wrong"))


def test_real_runs_of_the_same_are_never_slower():
    """RetinaNet on two cores, eleven times the same commit and settings: each against each."""
    documents = [load(path) for path in SAME]
    pairs = list(itertools.permutations(documents, 2))
    assert len(pairs) >= 100
    slower = sum("slower" in verdicts(*pair).values() for pair in pairs)
    assert slower <= 0.05 * len(pairs)
    # Each of them alone is fooled by the neighbours of a shared machine.
    for by in ("time", "speedup"):
        assert sum("slower" in verdicts(*pair, by=by).values() for pair in pairs) > slower


def test_a_real_engine_that_was_slowed_by_a_tenth():
    """OpenVINO's calls were made to take 10% longer; measured between those of the same."""
    seen = [verdicts(load(before), load(after)) for before in SAME for after in SLOWER]
    assert {found["torchscript"] for found in seen} <= {"same", "inconclusive"}
    assert sum(found["openvino"] == "slower" for found in seen) > 0.75 * len(seen)


FAIL_ON_ALL = ("--fail-on", "slower,wrong,broken")


@pytest.mark.parametrize(
    ("after", "code", "words"),
    [
        (SAME[1], 0, "| unchanged "),
        (SLOWER[0], 3, "| slower "),
        (WRONG[0], 4, "- RetinaNet OpenVINO fp32: at min: of 100 detections 100 are lost"),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_exit_codes_of_real_runs(after, code, words, capsys):
    assert compare.main([str(SAME[0]), str(after)]) == 0
    assert words in capsys.readouterr().out
    assert compare.main([str(SAME[0]), str(after), *FAIL_ON_ALL]) == code


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        ((0.90, 0.87, 0.98), "slower"),
        ((0.97, 0.96, 0.99), "same"),
        ((0.97, 0.94, 0.99), "inconclusive"),
        ((0.90, 0.80, 1.01), "inconclusive"),
        ((1.00, 0.96, 1.04), "same"),
        ((1.00, 0.90, 1.10), "inconclusive"),
        ((1.10, 1.01, 1.20), "faster"),
        ((0.50, None, None), "inconclusive"),
    ],
)
def test_verdict_of_a_ratio(ratio, verdict):
    assert compare.Ratio(*ratio).verdict(0.05) == verdict


def of_generations(generator, generations, process=0.02, call=0.02):
    """Seconds of a run whose processes differ, 1 x rounds."""
    parts = [
        np.exp(process * generator.normal() + call * generator.normal(size=(1, count)))
        for count in generations
    ]
    return np.concatenate(parts, axis=1)


def test_the_ratio_of_files_with_generations_covers_what_differs_between_processes():
    generator, generations = np.random.default_rng(0), [(4,) * 5, (6,) * 4]
    found = []
    for _ in range(600):
        sides = [of_generations(generator, made) for made in generations]
        found.append(compare._ratio(sides, generations, 1))
    assert 0.93 <= np.mean([x.low <= 1 <= x.high for x in found]) <= 0.985
    # Of one generation nobody can tell.
    single = [
        compare._ratio([of_generations(generator, (20,)) for _ in range(2)], [(20,), (20,)], 1)
        for _ in range(100)
    ]
    assert np.mean([x.low <= 1 <= x.high for x in single]) < 0.6


def test_a_ratio_of_generations_is_welchs():
    generator, generations = np.random.default_rng(1), [(3,) * 5, (3,) * 7]
    sides = [of_generations(generator, made) for made in generations]
    logs = [np.log(np.median(side.reshape(-1, 3), axis=1)) for side in sides]
    expected = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.96)
    found = compare._ratio(sides, generations, 1)
    assert found.ratio == pytest.approx(np.exp(logs[0].mean() - logs[1].mean()))
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(expected)))


@pytest.mark.parametrize("generations", [[(30,), (30,)], [(6,) * 5, (6,) * 5]])
def test_the_intervals_of_many_runs_hold_together(generations):
    """Twelve runs that are the same: rarely is any of them said to have changed."""
    generator, together, alone = np.random.default_rng(2), 0, 0
    for _ in range(30):
        sides = [[of_generations(generator, x, 0.0) for x in generations] for _ in range(12)]
        for judged in (1, 12):
            found = [compare._ratio(each, generations, judged) for each in sides]
            miss = any(not x.low <= 1 <= x.high for x in found)
            if judged == 1:
                alone += miss
            else:
                together += miss
    assert together <= 4 < 8 <= alone


def test_as_many_runs_are_allowed_for_as_are_judged():
    times = {"torch": 0.4, "openvino": 0.25, "torchscript": 0.3, "onnxruntime": 0.3}
    before, after = (records(measured(seed, times)) for seed in (0, 1))
    pairs = compare.pairs(before, after)
    pairs[-1] = dataclasses.replace(pairs[-1], obstacle="gpu differs")
    compared = compare.compare_all(pairs, 0.05, "both")
    assert [x.time and x.time.low for x in compared] == [
        *(compare.compare(pair, 0.05, "both", 3).time.low for pair in pairs[:3]),
        None,
    ]


def test_time_and_speedup_have_a_ratio_each():
    before = measured(0, {"torch": 0.4, "openvino": 0.2})
    after = copy.deepcopy(before)
    torch_run, openvino = after["groups"][0]["runs"]  # The machine has become slower.
    torch_run["samples_s"] = [1.2 * x for x in torch_run["samples_s"]]
    openvino["samples_s"] = [1.8 * x for x in openvino["samples_s"]]
    torch_run, openvino = (
        compare.compare(pair, 0.05, "both")
        for pair in compare.pairs(records(before), records(after))
    )
    assert openvino.speedup.ratio == pytest.approx(2 / 3)
    assert openvino.speedup.low < 2 / 3 < openvino.speedup.high
    assert openvino.time.ratio == pytest.approx(1 / 1.8)
    assert openvino.verdict == "slower"
    # Of the baseline nobody knows whether it is that or the machine.
    assert torch_run.time.ratio == pytest.approx(1 / 1.2)
    assert torch_run.speedup is None
    assert torch_run.verdict == "inconclusive"
    assert verdicts_of(before, after, by="time") == {"torch": "slower", "openvino": "slower"}


@pytest.mark.parametrize(
    ("by", "verdict"), [("both", "inconclusive"), ("time", "slower"), ("speedup", "same")]
)
def test_a_slower_machine_is_no_slower_engine(by, verdict):
    before, after = measured(0), measured(0)
    for run in after["groups"][0]["runs"]:
        run["samples_s"] = [1.2 * x for x in run["samples_s"]]
    assert verdicts_of(before, after, by=by)["openvino"] == verdict


@pytest.mark.parametrize("drift", [1.2, 0.7, 2.0])
def test_on_a_machine_that_is_another_nothing_is_said(command, drift):
    """Twice as slow an engine is, on a machine of the same name that is much slower or faster."""
    before, after = measured(0), measured(0)
    for run, factor in zip(after["groups"][0]["runs"], (1.0, 2.0)):
        run["samples_s"] = [drift * factor * x for x in run["samples_s"]]
    said = "the baseline itself changed by a factor of"
    is_another = drift != 1.2
    assert verdicts_of(before, after)["openvino"] == ("inconclusive" if is_another else "slower")
    assert (said in command(before, after)[1].out) == is_another
    for by in ("time", "speedup"):
        assert verdicts_of(before, after, by=by)["openvino"] == "slower"
        assert said not in command(before, after, "--by", by)[1].out


def test_few_rounds_are_inconclusive():
    before, after = measured(0, rounds=3), measured(1, {"torch": 0.4, "openvino": 9.0}, rounds=3)
    assert verdicts_of(before, after)["openvino"] == "inconclusive"


def test_without_a_baseline_times_are_compared():
    before, after = measured(0), measured(0)
    before["groups"][0]["runs"][0]["samples_s"] = []
    assert verdicts_of(before, after) == {"torch": "-", "openvino": "same"}
    after = measured(0, SLOW)
    assert verdicts_of(before, after)["openvino"] == "inconclusive"
    assert verdicts_of(before, after, by="time")["openvino"] == "slower"


OTHER_SIZE = {"opt": [[32, 32]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["environment"]["cpu"].update(model="B"), "cpu.model differs"),
        (lambda d: d["environment"]["cpu"].update(flags=["fma", "avx2"]), "cpu.flags differs"),
        (lambda d: d["environment"].update(gpu="B"), "gpu differs"),
        (lambda d: d["settings"].update(threads=4), "--threads differs"),
        (lambda d: d["settings"].update(device="cuda"), "--device differs"),
        (lambda d: d["settings"].update(weights="mine.pth"), "--weights differs"),
        (lambda d: d["settings"].update(config_digest="b"), "configuration differs"),
        (lambda d: d["settings"].update(module_digest="b"), "--module: another file of the same"),
        (lambda d: d["groups"][0].update(image_digest="b"), "image digest differs"),
        (lambda d: d["groups"][0].update(image_sizes=OTHER_SIZE), "image sizes differs"),
    ],
)
def test_what_is_not_comparable_is_refused(command, change, words):
    before, after = measured(0), measured(1)
    for document in (before, after):
        document["groups"][0]["image_digest"] = "a"
        document["settings"].update(module="m.ts", module_digest="a")
        document["environment"]["gpu"] = "A"
        document["environment"]["cpu"]["flags"] = ["fma", "avx2", "avx512f"]
    change(after)
    code, printed = command(before, after)
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert words in printed.err


def agreement(matched: int, expected: int) -> Dict[str, Any]:
    return {"verdict": "match", "reason": "", "matched": matched, "expected": expected}


FOUND = {size: agreement(100, 100) for size in ("min", "opt", "max")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: None, None),
        (lambda d: d["groups"][0].update(image_digest="b"), "image digest differs"),
        (lambda d: d["groups"][0]["weights"].update(digest="b"), "weights digest differs"),
        (lambda d: d["settings"].update(seed=9), "--seed differs"),
    ],
)
def test_what_is_found_in_another_task_is_not_compared(command, change, words):
    """Neither counts nor a mismatch there say anything of what was before."""
    before, after = measured(0), measured(1)
    for document in (before, after):
        weights = {"source": "synthetic", "digest": "a"}
        document["groups"][0].update(image_digest="a", weights=weights)
        document["groups"][0]["runs"][1]["detections"] = FOUND
    spoil(after, "mismatch", detections={"opt": agreement(20, 40)})
    change(after)
    code, printed = command(before, after, *FAIL_ON_ALL)
    if words is None:
        assert code == 4
    else:
        assert (code, printed.out) == (2, "")
        assert words in printed.err


def test_what_is_found_on_another_machine_is_compared(command):
    before, after = measured(0), spoil(measured(1), "mismatch")
    after["environment"]["cpu"]["model"] = "B"
    for document, digest in ((before, "a"), (after, "b")):
        # Other kernels round the same synthetic weights in another way.
        group = document["groups"][0]
        group["weights"] = {"source": "synthetic", "objects": 100, "digest": digest}
    code, printed = command(before, after, *FAIL_ON_ALL)
    assert code == 4
    assert "times not compared, as cpu.model differs" in printed.out
    for document in (after, before):
        document["groups"][0]["weights"].update(source="file", file="synthetic.pth")
        assert command(before, after, *FAIL_ON_ALL)[0] == 2


def test_a_model_that_cannot_be_prepared_any_more_is_broken(command):
    """Then nothing is known of its images."""
    before, after = measured(0), spoil(measured(1), "failed", samples_s=[])
    before["groups"][0].update(image_sizes={"opt": [[96, 128]]})
    after["groups"][0].update(image_sizes={}, stopped="all failed")
    assert command(before, after, *FAIL_ON_ALL)[0] == 5


def test_one_run_that_is_not_comparable_is_named(command):
    before, after = measured(0), measured(1)
    after["groups"][0]["runs"][1]["effective_precision"] = "bf16"
    code, printed = command(before, after, "--fail-on", "slower,wrong,broken")
    assert code == 0
    assert "times not compared, as it ran as fp32 before, and as bf16 after" in printed.out


def test_runs_with_and_without_tf32_are_not_compared(command):
    """Of files from before there was the setting, it is not known how much was rounded."""
    before, after = measured(0), measured(1)
    for document in (before, after):
        document["settings"]["device"] = "cuda"
    after["settings"]["tf32"] = True
    after["groups"][0]["runs"][1]["effective_precision"] = "tf32"
    code, printed = command(before, after)
    assert code == 0
    assert "times not compared, as it ran as fp32 before, and as tf32 after" in printed.out
    assert "--tf32: none before, on now" in printed.out


@pytest.mark.parametrize("flags", [None, []])
def test_a_file_without_flags_is_not_of_another_machine(command, flags):
    before, after = measured(0), measured(1)
    after["environment"]["cpu"]["flags"] = ["fma", "avx2"]
    after["environment"]["gpu"] = "A"
    before["environment"]["cpu"].update({} if flags is None else {"flags": flags})
    code, printed = command(before, after)
    assert code == 0
    assert "What differs:\n\n- nothing that is recorded\n" in printed.out


def with_new_sizes(document: Dict[str, Any], seconds: float) -> Dict[str, Any]:
    """The same with calls of new sizes, of the second run some as long as that."""
    group = document["groups"][0]
    group["new_sizes"] = [[100 + place, 200] for place in range(20)]
    noise = np.random.default_rng(3).normal(0, 0.02, 20)
    group["runs"][1]["new_size_s"] = (seconds * np.exp(noise)).tolist()
    return document


def test_calls_of_new_sizes_are_a_figure_of_their_own(command):
    both = with_new_sizes(measured(0), 0.3), with_new_sizes(measured(1), 0.6)
    code, printed = command(*both, "--fail-on", "slower")
    assert code == 0  # No verdict stands on it.
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.out.splitlines()]
    (head,) = (row for row in rows if "by speedup" in row)
    place = head.index("by speedup") + 1
    assert head[place] == "at new sizes"
    cells = {row[2]: row[place] for row in rows if len(row) == len(head) and "RetinaNet" in row}
    assert cells["Torch"] == "-"
    assert cells["Openvino"].startswith("0.500 (0.4")
    assert "- at new sizes: how much faster calls" in printed.out


@pytest.mark.parametrize("change", [[], [[9, 9]] * 20])
def test_calls_of_other_sizes_are_not_compared(command, change):
    before, after = with_new_sizes(measured(0), 0.3), with_new_sizes(measured(1), 0.6)
    after["groups"][0]["new_sizes"] = change
    if not change:
        after["groups"][0]["runs"][1]["new_size_s"] = []
    _, printed = command(before, after)
    assert "at new sizes" not in printed.out


def test_a_file_without_drawn_sizes_can_be_compared(command):
    before, after = measured(0), measured(1)
    for document, digest in ((before, "a"), (after, "b")):
        weights = {"source": "synthetic", "objects": 100, "digest": digest}
        document["groups"][0]["weights"] = weights
    _, printed = command(before, after)
    assert "weights digest differs" in printed.err
    # They are made for the drawn sizes, too.
    after["groups"][0]["image_sizes"]["drawn 1"] = [[111, 222]]
    code, printed = command(before, after)
    assert (code, printed.err) == (0, "")
    assert "differs" not in printed.out.split("| Model")[1]


def test_what_differs_is_named_first(command):
    before, after = measured(0), measured(1)
    before["environment"]["versions"] = {"openvino": "2026.3"}
    after["environment"]["versions"] = {"openvino": "2026.4"}
    _, printed = command(before, after)
    assert printed.out.startswith(
        "What differs:\n\n- openvino: 2026.3 before, 2026.4 now\n\n| Model"
    )


def test_runs_of_other_environments_are_pairs_of_their_own(command):
    before, after = measured(0, THREE), measured(1, THREE)
    for document, version in ((before, "2025.3"), (after, "2025.4")):
        other = document["groups"][0]["runs"][2]
        other.update(backend="openvino", environment="old", label="OpenVINO@old")
        other.update(python="3.11.7", versions={"openvino": version})
    found = compare.pairs(records(before), records(after))
    assert [pair.key[1] for pair in found] == ["torch", "openvino", "openvino@old"]
    _, printed = command(before, after)
    assert printed.out.startswith(
        "What differs:\n\n- openvino@old: openvino 2025.3 before, 2025.4 now\n\n| Model"
    )
    assert printed.out.count("| unchanged") == 3
    after["groups"][0]["runs"][2]["environment"] = "new"
    _, printed = command(before, after)
    assert "- missing: testRetinaNet openvino@old fp32" in printed.out
    assert "- new: testRetinaNet openvino@new fp32" in printed.out


THREE = {"torch": 0.4, "openvino": 0.2, "inductor": 0.3}


@pytest.mark.parametrize(
    ("label", "environment", "code"),
    [
        ("ONNXRuntime", None, 5),
        ("ONNXRuntime-TensorRT", None, 5),
        ("ONNXRuntime@old", "old", 0),
        ("ONNX", None, 0),
    ],
)
def test_what_is_left_out_is_of_the_own_environment(command, label, environment, code):
    before, after = measured(0), measured(1, {"torch": 0.4})
    before["groups"][0]["runs"][1].update(label=label, environment=environment)
    after["left_out"] = {"ONNXRuntime": "it is not installed"}
    assert command(before, after, *FAIL_ON_ALL)[0] == code


def test_missing_and_new_runs_are_listed(command):
    before = measured(0, {"torch": 0.4, "openvino": 0.2, "inductor": 0.3})
    after = measured(1, {"torch": 0.4, "openvino": 0.2, "onnxruntime": 0.3})
    _, printed = command(before, after)
    assert "- missing: testRetinaNet inductor fp32" in printed.out
    assert "- new: testRetinaNet onnxruntime fp32" in printed.out


def spoil(document: Dict[str, Any], status: str, **changes: Any) -> Dict[str, Any]:
    document["groups"][0]["runs"][1].update(status=status, reason="a reason", **changes)
    return document


SLOW = {"torch": 0.4, "openvino": 0.5}


@pytest.mark.parametrize(
    ("after", "fail_on", "code"),
    [
        (measured(1), "slower,wrong,broken", 0),
        (measured(1, SLOW), "slower", 3),
        (measured(1, SLOW), "wrong,broken", 0),
        (spoil(measured(1), "mismatch"), "wrong", 4),
        (spoil(measured(1), "mismatch"), "slower,broken", 0),
        (spoil(measured(1, SLOW), "mismatch"), "slower,wrong,broken", 4),
        (spoil(measured(1), "failed", samples_s=[]), "slower,wrong,broken", 5),
        (spoil(measured(1), "unsupported", samples_s=[]), "broken", 5),
        (spoil(measured(1), "failed", samples_s=[]), "slower,wrong", 0),
    ],
)
def test_exit_codes(command, after, fail_on, code):
    assert command(measured(0), after)[0] == 0
    assert command(measured(0), after, "--fail-on", fail_on)[0] == code


@pytest.mark.parametrize("before", ["failed", "unsupported"])
@pytest.mark.parametrize("after", ["failed", "unsupported", "mismatch", "ok"])
def test_what_never_ran_is_not_broken(command, before, after):
    documents = spoil(measured(0), before, samples_s=[]), spoil(measured(1), after)
    assert command(*documents, *FAIL_ON_ALL)[0] == 0


def test_a_backend_that_cannot_be_had_any_more_is_broken(command):
    before, after = measured(0), measured(1, {"torch": 0.4})
    assert command(before, after, *FAIL_ON_ALL)[0] == 0  # It was not asked for.
    after["left_out"] = {"Openvino": "it is not usable here"}
    code, printed = command(before, after, *FAIL_ON_ALL)
    assert code == 5
    assert "- missing: testRetinaNet openvino fp32 (Openvino left out: it is not" in printed.out
    assert command(before, after, "--fail-on", "slower,wrong")[0] == 0
    after["groups"][0]["model"] = "testMaskRCNNFPN"  # That model was not measured.
    after["groups"].append(measured(1, {"torch": 0.4})["groups"][0])
    after["groups"][1]["precision"] = "bf16"
    before["groups"].append(after["groups"][1])
    assert command(before, after, *FAIL_ON_ALL)[0] == 0


ASKED = {"model": ["testRetinaNet"], "backend": ["torch", "openvino"], "precision": ["fp32"]}


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_that_was_asked_for_and_is_not_there_is_broken(command, complete):
    before, after = measured(0, **ASKED), measured(1, {"torch": 0.4}, **ASKED)
    after["complete"] = complete
    code, printed = command(before, after, *FAIL_ON_ALL)
    assert code == 5
    why = "after was asked for it, and does not have it"
    why += "" if complete else ", as that was interrupted"
    assert f"- missing: testRetinaNet openvino fp32 ({why})" in printed.out
    assert ("after is not complete" in printed.out) != complete
    # What never ran is not missed, nor what was not asked for.
    assert command(spoil(measured(0, **ASKED), "failed"), after, *FAIL_ON_ALL)[0] == 0
    after["settings"]["backend"] = ["torch"]
    assert command(before, after, *FAIL_ON_ALL)[0] == 0


def test_a_group_that_was_asked_for_and_is_not_there_is_broken(command):
    asked = {**ASKED, "precision": ["fp32", "bf16"]}
    before, after = measured(0, **asked), measured(1, **asked)
    lower = copy.deepcopy(before["groups"][0])
    before["groups"].append({**lower, "precision": "bf16"})
    after["complete"] = False
    assert command(before, after, *FAIL_ON_ALL)[0] == 5
    after["settings"]["precision"] = ["fp32"]
    assert command(before, after, *FAIL_ON_ALL)[0] == 0


def test_another_image_is_no_run_that_has_vanished(command):
    """The group of all images has the same runs, and says that they were measured on others."""
    documents = []
    for seed, image in ((0, "a.jpg"), (1, "b.jpg")):
        document = measured(seed, **ASKED)
        document["groups"].append({**document["groups"][0], "image": image})
        documents.append(document)
    assert command(*documents, *FAIL_ON_ALL)[0] == 0


def test_a_group_that_was_interrupted_is_broken(command):
    before, after = measured(0), measured(1)
    after["groups"][0]["stopped"] = "interrupted"
    after["complete"] = False
    code, printed = command(before, after, *FAIL_ON_ALL)
    assert code == 5
    assert "| interrupted" in printed.out
    before["groups"][0]["stopped"] = "interrupted"
    assert command(before, after, *FAIL_ON_ALL)[0] == 0


def test_folders_are_as_good_as_the_files_in_them(tmp_path, capsys):
    for name, seed in (("before", 0), ("after", 1)):
        (tmp_path / name).mkdir()
        write(measured(seed), tmp_path / name / "results.json")
    assert compare.main([str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    assert "| RetinaNet" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert compare.main([str(tmp_path / "before"), str(tmp_path / "empty")]) == 2
    assert f"cannot read {tmp_path / 'empty' / 'results.json'}" in capsys.readouterr().err


def test_what_was_not_checked_is_not_unchanged(command):
    before, after = measured(0), measured(1)
    before["groups"][0]["runs"][1]["detections"] = FOUND
    after["groups"][0]["runs"][1]["detections"] = None
    after["complete"] = False
    _, printed = command(before, after)
    assert "detections at opt: 100/100 before, not checked after" in printed.out
    assert "- after is not complete: it was interrupted\n" in printed.out
    assert "before is not complete" not in printed.out


def test_what_was_wrong_before_is_no_news(command):
    before, after = (spoil(measured(seed), "mismatch") for seed in (0, 1))
    assert command(before, after, "--fail-on", "slower,wrong,broken")[0] == 0


def test_fewer_detections_are_shown(command):
    before, after = measured(0), measured(1)
    for document, matched in ((before, 100), (after, 97)):
        found = agreement(matched, 100)
        document["groups"][0]["runs"][1]["detections"] = {"opt": found}
    _, printed = command(before, after)
    assert "| detections at opt: 100/100 before, 97/100 after |" in printed.out


def test_labels_of_a_map_are_shown(command):
    before, after = measured(0), measured(1)
    for document, share in ((before, 0.99996), (after, 0.5)):
        found = {**agreement(0, 0), "labels": share, "has_objects": False}
        document["groups"][0]["runs"][1]["detections"] = {"opt": found}
    _, printed = command(before, after)
    assert "| detections at opt: 99.99% before, 50.00% after |" in printed.out


def test_the_order_of_the_sizes_is_no_change(command):
    before, after = measured(0), measured(1)
    found = {size: agreement(9, 9) for size in ("min", "opt", "max")}
    before["groups"][0]["runs"][1]["detections"] = found
    after["groups"][0]["runs"][1]["detections"] = dict(reversed(found.items()))
    assert "detections at" not in command(before, after)[1].out


def test_a_changed_status_is_shown_with_its_reason(command):
    _, printed = command(measured(0), spoil(measured(1), "failed", samples_s=[]))
    assert "| ok before, failed after |" in printed.out
    assert "- RetinaNet Openvino fp32: a reason" in printed.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"tool": "run_blade", "schema": 2, "groups": [', "cut short"),
        ('{"tool": "run_blade", "schema": 99}', "schema 99"),
        ('{"tool": "run_blade", "schema": 1}', "schema 1, of an older version"),
        ('{"tool": "other"}', "not a result file of run_blade"),
    ],
)
def test_a_bad_file(tmp_path, capsys, content, words):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    save(records(measured(0)), good)
    bad.write_text(content)
    for paths in ((good, bad), (bad, good)):
        assert compare.main([str(path) for path in paths]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert words in printed.err
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_file_of_the_wrong_shape(command, damage, words):
    damaged = measured(1)
    damage(damaged)
    for documents in ((measured(0), damaged), (damaged, measured(0))):
        code, printed = command(*documents)
        assert code == 2
        assert printed.out == ""
        assert words in printed.err
        assert printed.err.count("\n") == 1


def test_keys_that_were_added_later_do_not_matter(command):
    after = measured(1)
    group = after["groups"][0]
    group["runs"][1]["detections"] = {"opt": {**agreement(9, 9), "added": 1}}
    parts = (after, after["environment"], group, *group["runs"])
    for part in (*parts, *(run["statistics"] for run in group["runs"])):
        part["added"] = {"x": [1]}
    assert command(measured(0), after)[0] == 0


def test_a_name_that_is_no_utf8_is_printed(tmp_path, capsys):
    """The suite saves it spelled out."""

    def saved(before: Dict[str, Any], after: Dict[str, Any], *options: str) -> Any:
        paths = [tmp_path / "before.json", tmp_path / "after.json"]
        for path, document in zip(paths, (before, after)):
            save(records(document), path)
        return compare.main([*map(str, paths), *options]), capsys.readouterr()

    code, printed = saved(measured(0, weights="a"), measured(1, weights="a", cache=NAME))
    assert (code, printed.err) == (0, "")
    code, printed = saved(measured(0, image=["a.jpg"]), measured(1, image=[NAME]), "--by", "time")
    assert "--image differs" in printed.err
    after = measured(1)
    after["environment"]["variables"] = {"OMP_PLACES": NAME}
    assert f"- OMP_PLACES: none before, {SPELLED} now" in saved(measured(0), after)[1].out


def test_half_a_character_is_refused(command):
    code, printed = command(measured(0), measured(1, cache=NAME))
    assert (code, printed.out) == (2, "")
    assert "is not JSON" in printed.err
    assert printed.err.count("\n") == 1


def test_nothing_in_common(command):
    before, after = measured(0), measured(1)
    after["groups"][0]["model"] = "testMaskRCNNC4"
    code, printed = command(before, after)
    assert code == 2
    assert "no run in common" in printed.err


@pytest.mark.parametrize("arguments", [["--threshold", "2"], ["--fail-on", "slow"], ["one.json"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["a.json", "b.json", *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def with_ap(ap: float, verdict: str, images: int = 60) -> Dict[str, Any]:
    """A result file whose engine has that AP on so many images."""
    document = measured(0)
    group = document["groups"][0]
    group["evaluated"] = {"images": images, "objects": 183}
    known = {"low": -1.0, "high": 1.0, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}
    difference = {"value": ap - 50, "verdict": verdict, **known}
    tasks = {"bbox": {"ap": ap, "difference": difference}}
    group["runs"][1]["accuracy"] = {"images": images, "detections": 9, "tasks": tasks}
    return document


def test_ap_that_is_lost_is_wrong(command):
    code, printed = command(with_ap(50, "keeps"), with_ap(40, "loses"), "--fail-on", "wrong")
    assert code == 4
    assert "box AP: 50.00 before, 40.00 after" in printed.out
    assert "lost AP" in printed.out


@pytest.mark.parametrize(
    ("before", "after", "is_told"),
    [
        (with_ap(50, "keeps"), with_ap(50, "keeps"), False),
        (with_ap(40, "loses"), with_ap(39, "loses"), True),
        (with_ap(50, "keeps"), with_ap(49.9, "too few"), True),
        # On other images it may be anything.
        (with_ap(50, "keeps"), with_ap(45, "keeps", images=70), False),
        (with_ap(50, "keeps"), measured(0), False),
    ],
)
def test_ap_that_is_another_is_told(command, before, after, is_told):
    code, printed = command(before, after, "--fail-on", "wrong,broken")
    assert code == 0
    assert ("box AP: " in printed.out) == is_told
