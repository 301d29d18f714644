"""From records to tables, and from tables to text: what stands in them, and what is said below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, List, Optional, Sequence

import numpy as np
import pytest

import benchmark
from benchmark import BreakEven, Speedup, Statistics
from results import tables
from results.record import (
    Accuracy,
    AccuracyControl,
    Agreement,
    AveragePrecision,
    Copies,
    Coverage,
    Difference,
    Environment,
    Evaluated,
    GpuState,
    Group,
    Preparation,
    Results,
    Run,
    SameAgainstSame,
    Settings,
    Stages,
    Weights,
)
from results.tables import Table, left, markdown, right


def run(backend: str, **changes: Any) -> Run:
    facts = {
        "backend": backend.lower(),
        "label": backend,
        "baseline": backend == "Torch",
        "requested_precision": "fp32",
        "effective_precision": "fp32",
        "provider": "cpu",
        "status": "ok",
    }
    return Run(**{**facts, **changes})


def group(*runs: Run, **changes: Any) -> Group:
    facts = {
        "model": "testRetinaNet",
        "export": "traced",
        "precision": "fp32",
        "images_per_call": 1,
        "image_sizes": {},
        "rounds": 20,
        "stopped": "interval",
    }
    return Group(runs=runs, **{**facts, **changes})


def results(*groups: Group, **changes: Any) -> Results:
    facts = {"version": "0.1.0", "environment": Environment(), "settings": Settings()}
    return Results(groups=groups, **{**facts, **changes})


def model_text(*groups: Group, peaks: bool = False, **changes: Any) -> str:
    return markdown(tables.model_table(results(*groups, **changes), groups, peaks))


def notes(*groups: Group, **changes: Any) -> Sequence[str]:
    return tables.model_table(results(*groups, **changes), groups).notes


def headings(table: Table) -> List[str]:
    return [column.heading for column in table.columns]


def statistics(milliseconds: Sequence[float], images: int = 1) -> Statistics:
    return benchmark.summarize([value / 1000 for value in milliseconds], images)


# Tables as text --------------------------------------------------------------------------------


def test_text_is_padded_and_aligned():
    table = Table(
        title="Anything",
        columns=(*left("name"), *right("ms", "a longer heading")),
        rows=(("Torch", "1.50", "1e5"), ("ö", "123.00", "007")),
        notes=("one", "two"),
    )
    assert markdown(table).splitlines() == [
        "| name  |     ms | a longer heading |",
        "| ----- | -----: | ---------------: |",
        "| Torch |   1.50 |              1e5 |",
        "| ö     | 123.00 |              007 |",
        "",
        "- one",
        "- two",
    ]


def test_text_may_be_compact():
    table = Table(
        title="Anything",
        columns=(*left("name"), *right("a longer heading")),
        rows=(("Torch", "1.50"), ("ö", "")),
        notes=("one",),
        compact=True,
    )
    assert markdown(table).splitlines() == [
        "| name | a longer heading |",
        "| :-- | --: |",
        "| Torch | 1.50 |",
        "| ö |  |",
        "",
        "one",
    ]


def test_what_would_end_a_cell_or_a_note_is_a_space():
    table = Table("Anything", left("a", "b"), (("1 |  2\n| 3", "\t4"),), ("5\n  6 | 7",))
    assert table.rows == (("1 2 3", "4"),)
    assert markdown(table).splitlines()[2:] == ["| 1 2 3 | 4 |", "", "- 5 6 | 7"]


def test_a_table_without_rows():
    assert markdown(Table("Anything", left("a"), (), nothing="nothing is known")) == (
        "nothing is known"
    )
    assert markdown(Table("Anything", left("ab"), ())) == "| ab |\n| -- |"


def test_every_row_has_a_cell_for_every_column():
    with pytest.raises(ValueError, match="Anything: a row has more or fewer cells"):
        Table("Anything", left("a", "b"), (("1", "2"), ("3",)))


# The table of a test model ---------------------------------------------------------------------


def example() -> Group:
    slow = statistics([468.2, 470.1, 475.3, 469.0, 530.5])
    fast = statistics([296.0, 297.3, 295.1, 299.9, 301.2])

    def checked(matched: int, verdict: str = "match", reason: str = "") -> Any:
        return {"max": Agreement(verdict, reason, expected=100, matched=matched)}

    reason = "at max: of 100 detections 97 are lost, and 0 are spurious"
    return group(
        run("Torch", statistics=slow),
        run(
            "OpenVINO",
            statistics=fast,
            speedup=Speedup(1.582, 1.559, 1.605, "faster"),
            detections=checked(100),
        ),
        run(
            "TorchScript",
            statistics=slow,
            speedup=Speedup(1.011, 0.991, 1.02, "same"),
            detections=checked(99),
        ),
        run(
            "Inductor",
            statistics=fast,
            speedup=Speedup(1.5, 1.4, 1.6, "faster"),
            detections=checked(3, "mismatch", "of 100 detections"),
            status="mismatch",
            reason=reason,
        ),
        run("TorchBlade", status="failed", reason="the worker was killed\n  by signal 9"),
        rounds=5,
        stopped="fixed",
    )


def test_a_model():
    assert model_text(example()).splitlines() == [
        "| Model(traced) | Backend     | precision | Median(FPS) | Mean(FPS) | Median(ms) |"
        " Mean(ms) | 99th_p | std_dev | Speedup          | Detections         |",
        "| ------------- | ----------- | --------- | ----------: | --------: | ---------: |"
        " -------: | -----: | ------: | ---------------- | ------------------ |",
        "| RetinaNet     | Torch       | fp32      |       2.127 |     2.077 |      470.1 |"
        "    482.6 | 528.3* |    24.1 | 1.00x            | -                  |",
        "| RetinaNet     | OpenVINO    | fp32      |       3.364 |     3.357 |      297.3 |"
        "    297.9 | 301.1* |    2.31 | 1.58x ±0.03      | 100/100 match      |",
        "| RetinaNet     | TorchScript | fp32      |       2.127 |     2.077 |      470.1 |"
        "    482.6 | 528.3* |    24.1 | 1.01x ±0.02 same | 99/100 match       |",
        "| RetinaNet     | Inductor    | fp32      |       3.364 |     3.357 |      297.3 |"
        "    297.9 | 301.1* |    2.31 | 1.50x ±0.10      | MISMATCH 3/100 [1] |",
        "| RetinaNet     | TorchBlade  | fp32      |           - |         - |          - |"
        "        - |      - |       - | -                | failed [2]         |",
        "",
        "- [1] Inductor fp32: at max: of 100 detections 97 are lost, and 0 are spurious",
        "- [2] TorchBlade fp32: the worker was killed by signal 9",
        "- *: of fewer than 299 calls, too few to bound the 99th percentile with 95% confidence",
        "- fp32: 5 rounds, as asked for",
    ]


def test_a_model_is_aligned():
    lines = model_text(example()).split("\n\n")[0].splitlines()
    bars = [[at for at, character in enumerate(line) if character == "|"] for line in lines]
    assert all(at == bars[0] for at in bars)
    assert len(bars[0]) == 12


def test_a_percentile_needs_no_mark():
    times = statistics(np.linspace(10.0, 11.0, 299), 2)
    fp16 = {"requested_precision": "fp16", "effective_precision": "fp16"}
    torch_run = run("Torch", statistics=times, detections={"opt": Agreement("match")}, **fp16)
    text = model_text(group(torch_run, model="testMaskRCNNFPN_b2", rounds=0, precision="fp16"))
    assert text.splitlines()[2:] == [
        "| MaskRCNNFPN_b2 | Torch   | fp16      |       190.5 |     190.6 |      10.50 |"
        "    10.50 |  10.99 |   10.93 |   10.97 |   11.00 |   0.290 | 1.00x   | 0/0 match  |",
        "",
        "- p90(ms), p95(ms), p99(ms): it is 95% sure that at least 90%, 95% and 99% of calls are "
        "shorter",
    ]


@pytest.mark.parametrize(
    ("calls", "marked", "bounds"),
    [
        ((28, 5), True, []),
        ((29, 5), True, ["p90(ms)"]),
        ((5, 59), True, ["p90(ms)", "p95(ms)"]),
        ((298, 298), True, ["p90(ms)", "p95(ms)"]),
        ((299, 5), True, ["p90(ms)", "p95(ms)", "p99(ms)"]),
        ((299, 300), False, ["p90(ms)", "p95(ms)", "p99(ms)"]),
    ],
)
def test_bounds_stand_where_some_run_has_them(calls, marked, bounds):
    times = [statistics(np.linspace(10.0, 11.0, count)) for count in calls]
    runs = [run(name, statistics=x) for name, x in zip(("Torch", "OpenVINO"), times)]
    both = group(*runs, run("TorchBlade", status="failed"))
    table = tables.model_table(results(both), [both])
    place = headings(table).index("99th_p") + 1
    assert headings(table)[place:] == [*bounds, "std_dev", "Speedup", "Detections"]
    for count, row in zip((*calls, 0), table.rows):
        known = [count >= least for least in (29, 59, 299)][: len(bounds)]
        assert [cell != "-" for cell in row[place : place + len(bounds)]] == known
        assert row[place - 1].endswith("*") == (0 < count < 299)
    assert any(note.startswith("*: of fewer than 299 calls") for note in table.notes) == marked
    said = [note for note in table.notes if note.startswith("p90(ms)")]
    assert len(said) == (1 if bounds else 0)
    assert not said or said[0].startswith(f"{', '.join(bounds)}: it is 95% sure")


def test_bounds_of_groups_stand_in_one_table():
    """A run of another precision with fewer calls has none."""
    many, few = (statistics(np.linspace(10.0, 11.0, count)) for count in (40, 20))
    half = {"requested_precision": "bf16", "effective_precision": "bf16"}
    groups = (
        group(run("Torch", statistics=few)),
        group(run("Torch", statistics=many, **half), precision="bf16"),
    )
    table = tables.model_table(results(*groups), groups)
    place = headings(table).index("p90(ms)")
    # Of 40 calls none may lie above: the bound is the longest.
    assert [row[place] for row in table.rows] == ["-", "11.00"]
    assert "p90(ms): it is 95% sure that at least 90% of calls are shorter" in table.notes


def test_a_scripted_model():
    failed = run("Torch", status="failed", reason="out of memory")
    lines = model_text(
        group(failed, model="testRetinaNet_scripted", export="scripted")
    ).splitlines()
    assert lines[0].startswith("| Model(scripted)    | Backend |")
    assert "| RetinaNet_scripted | Torch   |" in lines[2]
    assert lines[2].endswith("| -       | failed [1] |")


def test_what_it_ran_in_is_said_where_that_is_something_else():
    other = run("OpenVINO", requested_precision="bf16", effective_precision="fp32")
    table = tables.model_table(results(group(other)), [group(other)])
    assert table.rows[0][2] == "fp32 (not bf16)"


def test_copies_are_told_below_the_costs():
    known = prepared("Torch", copies=Copies(0.0003146, 0.00004))
    text = markdown(tables.costs_table([group(known, prepared("TorchScript"))]))
    told = "ms of a call in which images go to the GPU, and detections come back: "
    assert text.splitlines()[-1] == f"- RetinaNet fp32, {told}Torch 0.31 and 0.040"
    assert "copies" not in markdown(tables.costs_table([group(prepared("Torch"))]))


def test_tf32_is_said_and_explained():
    ran = group(run("Torch", effective_precision="tf32"))
    table = tables.model_table(results(ran), [ran])
    assert table.rows[0][2] == "tf32 (not fp32)"
    assert "--no-tf32 forbids it" in markdown(table)
    assert "tf32" not in model_text(group(run("Torch")))


def test_what_was_not_checked_is_not_the_reference():
    half = run("Torch", requested_precision="bf16", effective_precision="bf16")
    both = group(run("Torch"), half, run("OpenVINO"))
    rows = tables.model_table(results(both), [both]).rows
    assert [row[-1] for row in rows] == ["-", "not checked", "not checked"]


def test_the_worst_of_the_sizes_is_shown():
    detections = {
        "min": Agreement("match", expected=9, matched=9),
        "opt": Agreement("match", expected=100, matched=98),
        "max": Agreement("match", expected=100, matched=100),
    }
    wrong = {**detections, "max": Agreement("mismatch", expected=100, matched=99)}
    both = group(run("A", detections=detections), run("B", detections=wrong))
    rows = tables.model_table(results(both), [both]).rows
    assert [row[-1] for row in rows] == ["98/100 match", "MISMATCH 99/100"]


def test_what_else_there_is_has_its_words():
    found = [
        Agreement("match", expected=9, matched=9, labels=0.99996),
        Agreement("mismatch", expected=9, matched=7, lost=2, labels=1.0),
        Agreement("match", labels=1.0, has_objects=False),
        Agreement("mismatch", labels=0.4321, has_objects=False),
    ]
    both = group(*(run(str(at), detections={"opt": x}) for at, x in enumerate(found)))
    assert [row[-1] for row in tables.model_table(results(both), [both]).rows] == [
        "9/9, 99.99% match",
        "MISMATCH 7/9, 100.00%",
        "100.00% match",
        "MISMATCH 43.21%",
    ]


def test_the_map_that_agrees_least_is_shown():
    maps = {
        size: Agreement("match", labels=share, has_objects=False)
        for size, share in (("min", 1.0), ("opt", 0.97), ("max", 0.99))
    }
    both = group(run("A", detections=maps))
    assert tables.model_table(results(both), [both]).rows[0][-1] == "97.00% match"


def test_what_is_not_compared_is_said():
    both = group(run("Torch"), not_compared=("panoptic_seg", "depth"))
    notes = tables.model_table(results(both), [both]).notes
    assert "not compared, as it is not known what they are: panoptic_seg, depth" in notes
    assert not any(
        "not compared" in note
        for note in tables.model_table(results(group(run("Torch"))), [group(run("Torch"))]).notes
    )


@pytest.mark.parametrize(
    ("speedup", "text"),
    [
        (Speedup(1.58, 1.56, 1.61, "faster"), "1.58x ±0.03"),
        (Speedup(1.58, 1.5501, 1.5802, "faster"), "1.58x ±0.03"),
        (Speedup(1.5, 1.4989, 1.5, "faster"), "1.50x ±0.01"),
        (Speedup(0.8, 0.78, 0.82, "slower"), "0.80x ±0.02 slower"),
        (Speedup(1.0, 0.99, 1.0, "same"), "1.00x ±0.01 same"),
        (Speedup(1.02, 0.95, 1.05, "inconclusive"), "1.02x ±0.07 inconclusive"),
        (Speedup(2.0, None, None, "inconclusive"), "2.00x ±? inconclusive"),
    ],
)
def test_speedup_in_words(speedup, text):
    assert tables.describe_speedup(speedup) == text


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (BreakEven(120.2, 98.0, None), "121 (98 to never)"),
        (BreakEven(10.0, None, None), "10"),
        (BreakEven(None, None, None), "never"),
        (BreakEven(0.0, 0.0, 0.0), "0 (0 to 0)"),
    ],
)
def test_break_even_in_words(result, text):
    assert tables.describe_break_even(result) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12346"),
        (1234.56, "1235"),
        (123.456, "123.5"),
        (12.3456, "12.35"),
        (1.23456, "1.235"),
        (0.0123456, "0.01235"),
        (0, "0"),
    ],
)
def test_four_digits(value, text):
    assert tables._digits(value) == text


@pytest.mark.parametrize(
    ("rounds", "stopped", "text"),
    [
        (23, "interval", "23 rounds, until every speedup was known to ±3%"),
        (
            *(200, "max rounds"),
            "200 rounds, the most allowed, before every speedup was known to ±3%",
        ),
        (9, "time budget", "9 rounds, until the time budget of 90 s"),
        (1, "fixed", "1 round, as asked for"),
        (2, "all failed", "2 rounds, until every run had failed"),
        (2, "interrupted", "2 rounds, until it was interrupted"),
    ],
)
def test_stop_in_words(rounds, stopped, text):
    assert tables.describe_stop(rounds, stopped, budget_s=90.0) == text


def test_the_share_of_the_peak_has_a_column_if_it_is_known():
    runs = [run("Torch", statistics=statistics([500.0])), run("OpenVINO")]
    one, peaks = group(*runs, flops=10**11), {"fp32": 4e11}
    assert "% of peak" not in model_text(one, peaks=True)
    table = tables.model_table(results(one, peaks=peaks), [one], peaks=True)
    # 1e11 operations in half a second.
    assert [headings(table)[-1], *(row[-1] for row in table.rows)] == ["% of peak", "50.0%", "-"]
    assert table.columns[-1].right
    assert "in GFLOP/s fp32 400; a call is 100.0 GFLOPs" in markdown(table)
    assert "% of peak" not in markdown(tables.model_table(results(one, peaks=peaks), [one]))
    unknown = group(*runs)
    table = tables.model_table(results(unknown, peaks=peaks), [unknown], peaks=True)
    assert "% of peak" not in headings(table)
    assert "the FLOPs of a call are not known" in markdown(table)


def test_what_several_images_were_timed_on_is_said():
    sizes = {
        "min": ((40, 60),),
        "opt": ((70, 90),),
        "max": ((150, 200),),
        "image 2": ((80, 80),),
    }
    text = model_text(group(run("Torch"), image_sizes=sizes))
    assert "- timed on 2 images in turn (70x90, 80x80), the mean of a round is what counts" in text
    assert "Torch fp32 on each, and at 40x60 and 150x200, the worst of all" in text
    one = group(run("Torch"), image_sizes={"image 2": ((80, 80),)})
    assert "- timed at 80x80\n" in model_text(one)
    assert "fp32: 20 rounds, those of all images together" in notes(
        group(run("Torch"), image="a.jpg")
    )


def test_a_throttled_gpu_is_a_warning_and_not_said_again():
    states = (GpuState(throttled=("power brake",)),)
    assert "throttled" not in model_text(group(run("Torch"), gpu=states))


def test_a_recompilation_while_timed_is_said():
    quiet = run("Inductor", coverage=Coverage(recompilations_while_timed=0))
    assert "compiled" not in model_text(group(quiet))
    busy = run("Inductor", coverage=Coverage(recompilations_while_timed=2))
    text = model_text(group(busy))
    assert "- Inductor fp32: compiled 2 more times within the timed rounds" in text


def test_rounds_are_explained_by_the_rule_of_their_group():
    text = model_text(group(run("Torch"), half_width=0.02))
    assert "- fp32: 20 rounds, until every speedup was known to ±2%" in text
    assert "known to ±3%" in model_text(group(run("Torch")))
    ended = group(run("Torch"), stopped="time budget", budget_s=40.0)
    assert "until the time budget of 40 s" in model_text(ended)
    ended = group(run("Torch"), stopped="time budget")
    text = model_text(ended, settings=Settings(time_budget=60.0))
    assert "until the time budget of 60 s" in text
    assert "rounds" not in model_text(group(run("Torch"), rounds=0))


def test_what_runs_are_compared_with_besides_is_said():
    over = Speedup(2.5, 2.4, 2.6, "faster")
    own = Speedup(1.3, 1.28, 1.31, "faster")
    blade = run("TorchBlade", speedup_over_fp32=over, speedup_over_own_torch=own)
    torch_run = run("Torch", speedup_over_fp32=Speedup(1.0, 0.99, 1.0, "same"))
    said = notes(group(torch_run, blade, precision="fp16"), group(run("Torch")))
    assert list(said[:4]) == [
        "fp16: 20 rounds, until every speedup was known to ±3%",
        "fp32: 20 rounds, until every speedup was known to ±3%",
        "fp16 over Torch fp32, same rounds: Torch 1.00x ±0.01 same, TorchBlade 2.50x ±0.10",
        "fp16 over Torch of its own environment: TorchBlade 1.30x ±0.02",
    ]


def test_environments_are_named_where_there_are_several():
    new = run("OpenVINO", python="3.11.7", versions={"openvino": "2026.4.1"})
    old = run(
        "OpenVINO",
        label="OpenVINO@old",
        environment="old",
        python="3.11.7",
        versions={"openvino": "2025.4.1", "numpy": "2.1"},
    )
    torch_run = run("Torch", python="3.11.7", versions={"torch": "2.14"})
    said = [
        "OpenVINO: Python 3.11.7, openvino 2026.4.1",
        "OpenVINO@old: Python 3.11.7, openvino 2025.4.1, numpy 2.1",
    ]
    assert [x for x in notes(group(torch_run, new, old)) if "Python" in x] == said
    # Two precisions do not say it twice.
    both = (group(torch_run, new, old), group(torch_run, new, old, precision="bf16"))
    assert [x for x in notes(*both) if "Python" in x] == said
    assert not any("Python" in note for note in notes(group(torch_run, new)))
    # An environment may come without a name.
    settings = Settings(environment=("openvino",))
    assert [x for x in notes(group(torch_run, new), settings=settings) if "Python" in x] == said[:1]


def test_notes_are_in_order():
    """First what is wrong, then what explains the rows, then what is true of all tables."""
    wrong = run("OpenVINO", status="failed", reason="no memory")
    aa = SameAgainstSame("testRetinaNet", "fp32", Speedup(1.0, 0.99, 1.02, "same"), 0.02, ((), ()))
    said = notes(
        group(run("Torch", statistics=statistics([9.0])), wrong, weights=Weights("synthetic")),
        aa=aa,
        left_out={"Inductor": "no compiler"},
        without={"int8": ("Torch", "Inductor")},
    )
    begins = [
        "[1]",
        "*: of fewer than 299",
        "fp32: 20",
        "A/A, ",
        "Inductor left out: no compiler",
        "not at int8",
    ]
    begins += ["weights: synth", "synthetic weights survive rounding"]
    assert len(said) == len(begins)
    assert all(note.startswith(begin) for note, begin in zip(said, begins))
    assert said[3] == (
        "A/A, Torch against itself in two processes (testRetinaNet fp32): 1.000x, 0.990 to 1.020; "
        "differences below 2.0% cannot be told from noise here"
    )
    assert said[5] == "not at int8 on cpu: Torch, Inductor"
    one = notes(group(run("Torch"), image="a.jpg"), aa=aa)
    assert not any("A/A" in note for note in one)
    few = SameAgainstSame("a", "fp32", Speedup(1.0, None, None, "inconclusive"), None, ((), ()))
    assert not any("A/A" in note for note in notes(group(run("Torch")), aa=few))


def test_names_lose_what_all_test_models_begin_with():
    assert tables.short_name("testRetinaNet with 5 objects") == "RetinaNet with 5 objects"
    assert tables.short_name("testing") == "testing"


def test_what_a_checkpoint_does_not_say():
    mine = Weights("file", file="mine.pth")
    (note,) = (x for x in notes(group(run("Torch"), weights=mine)) if x.startswith("weights"))
    assert note == (
        "weights: mine.pth, with the anchors, means and thresholds of "
        "COCO-Detection/retinanet_R_50_FPN_3x: for others give the --config-file"
    )
    own = notes(group(run("Torch"), model="street", weights=mine))
    assert "weights: mine.pth" in own


# The other tables ------------------------------------------------------------------------------


def test_coverage_says_what_each_engine_took():
    inductor = Coverage(
        operators_in_engine=700,
        share_of_flops=0.987,
        segments=9,
        graph_breaks=8,
        resident_warm_mb=612.4,
        resident_end_mb=1023.9,
    )
    onnx = Coverage(
        operators=900,
        operators_in_engine=850,
        operators_by_provider={"A": 850, "B": 50},
        failures=("one", "two"),
    )
    runs = [
        run("Torch", coverage=Coverage(operators=5)),
        run("Inductor", coverage=inductor),
        run("ONNXRuntime", coverage=onnx),
        run("OpenVINO"),
    ]
    # The baseline is there for its memory alone.
    known = run("Torch", coverage=Coverage(resident_warm_mb=500.0, resident_end_mb=600.0))
    assert tables.coverage_table([group(known)]).rows[0][1:] == (
        *("Torch", "fp32", "cpu", *["-"] * 5, "500", "600", ""),
    )
    table = tables.coverage_table([group(*runs)])
    assert headings(table)[4:] == [
        *("operators", "in engines", "FLOPs in engines", "segments", "graph breaks"),
        *("warm (MiB)", "at the end (MiB)", "more"),
    ]
    names = ("RetinaNet", "Inductor", "fp32", "cpu")
    more = "operators by provider: 850 A, 50 B; failures: ['one', 'two']"
    assert table.rows == (
        (*names, "-", "700", "99%", "9", "8", "612", "1024", ""),
        ("RetinaNet", "ONNXRuntime", "fp32", "cpu", "900", "850", *["-"] * 5, more),
    )


def test_no_coverage():
    table = tables.coverage_table([group(run("Torch"))])
    assert (table.rows, markdown(table)) == ((), "no coverage is known")


def prepared(backend: str, **changes: Any) -> Run:
    costs = {
        "prepare": Preparation(build=2.0, export=3.0, compile=40.0, total=47.04),
        "artifact_mb": 145.6,
        "peak_memory_mb": 1500.2,
        "break_even": BreakEven(120.2, 98.0, None),
    }
    return run(backend, **{**costs, **changes})


def test_costs_say_what_a_run_took():
    eager = Preparation(build=2.0, total=2.0)
    runs = [
        prepared("Torch", prepare=eager, artifact_mb=None, break_even=None),
        prepared(
            "TorchScript",
            first_call_s={"min": 0.9, "max": 2.5, "drawn 1": 0.1},
            size_seconds={"min": (0.1, 0.1), "max": (2.5,), "drawn 1": (0.1, 0.1)},
        ),
        prepared(
            "Inductor",
            cached=True,
            peak_device_memory_mb=700.0,
            first_call_s={"min": 0.9, "max": 0.8},
            size_seconds={"min": (0.1, 0.2), "max": (0.7, 0.7)},
        ),
        prepared("OpenVINO", prepare=None),
    ]
    table = tables.costs_table([group(*runs)])
    assert headings(table)[3:] == [
        *("export (s)", "convert (s)", "compile (s)", "total (s)"),
        *("artifact (MiB)", "peak memory (MiB)", "break-even (images)"),
        "longest first call",
    ]
    assert table.rows[0][1:] == ("Torch", "fp32", "-", "-", "-", "0.0", "-", "1500", "-", "-")
    costs = ("3.0", "-", "40.0", "45.0", "146", "1500", "121 (98 to never)")
    # A call of more than a second is not repeated.
    assert table.rows[1][3:] == (*costs, "2500 ms at max")
    assert table.rows[2][3:-1] == (*costs[:2], "40.0 cached", *costs[3:5], "700", costs[6])
    assert table.rows[2][-1] == "900.0 ms at min, then 150.0"
    assert len(table.rows) == 3  # What was never prepared has no costs.


def test_no_costs():
    table = tables.costs_table([group(prepared("Torch", prepare=None))])
    assert (table.rows, markdown(table)) == ((), "no run was prepared")


def test_counts_of_objects_have_a_line_each():
    def timed(objects: int, found: int) -> Group:
        known = statistics([100.0 + objects])
        runs = [run(name, statistics=known) for name in ("Torch", "OpenVINO")]
        return group(*runs, objects=objects, found=found)

    table = tables.cases_table([timed(0, 0), timed(30, 29)])
    assert headings(table)[3:6] == ["objects", "found", "Median(ms)"]
    assert table.notes[0].startswith("found: in the image itself; Detections: the worst of all")
    assert [row[1:6] for row in table.rows] == [
        ("Torch", "fp32", "0", "0", "100.0"),
        ("Torch", "fp32", "30", "29", "130.0"),
        ("OpenVINO", "fp32", "0", "0", "100.0"),
        ("OpenVINO", "fp32", "30", "29", "130.0"),
    ]


def test_a_backend_of_two_environments_keeps_its_lines_together():
    def timed(objects: int) -> Group:
        other = run("OpenVINO", label="OpenVINO@old", environment="old")
        return group(run("OpenVINO"), other, objects=objects)

    labels = [row[1] for row in tables.cases_table([timed(5), timed(9)]).rows]
    assert labels == ["OpenVINO", "OpenVINO", "OpenVINO@old", "OpenVINO@old"]


def test_rows_say_which_number_of_objects_they_are_of():
    """With --detections, each table has several groups of the same test model and precision."""
    engine = prepared("OpenVINO", coverage=Coverage(segments=1))
    stages = Stages(backbone=0.3, rest=0.1)
    groups = [group(engine, objects=objects, stages=stages) for objects in (0, 30, 100)]
    for make in (
        *(tables.coverage_table, tables.costs_table, tables.stages_table),
        tables.published_table,
    ):
        names = [row[0] for row in make(groups).rows]
        assert names == ["RetinaNet with 0 objects", "RetinaNet with 30 objects", "RetinaNet"], make


def test_images_have_a_line_each_and_one_together():
    def timed(image: Optional[str], milliseconds: float) -> Group:
        known = statistics([milliseconds])
        return group(run("Torch", statistics=known), image=image, found=9)

    table = tables.cases_table([timed(None, 150.0), timed("b.jpg", 100.0), timed("a.jpg", 200.0)])
    assert headings(table)[3:6] == ["image", "found", "Median(ms)"]
    assert [row[3:6] for row in table.rows] == [
        ("b.jpg", "9", "100.0"),
        ("a.jpg", "9", "200.0"),
        ("together", "9", "150.0"),
    ]


def test_stages_say_where_the_time_goes():
    timed = group(run("Torch"), stages=Stages(backbone=0.3, head=0.08, nms=0.01, rest=0.01))
    table = tables.stages_table([timed, group(run("Torch"))])
    assert headings(table)[2:] == [
        *("backbone + FPN (ms)", "head (ms)", "NMS (ms)", "rest (ms)", "total (ms)", "ceiling"),
    ]
    assert table.rows == (("RetinaNet", "fp32", "300.0", "80.0", "10.0", "10.0", "400.0", "4.00x"),)
    assert markdown(table).endswith(
        "\n\n- ceiling: the speedup of an engine that takes backbone + FPN only, and no time for "
        "them"
    )
    empty = tables.stages_table([group(run("Torch"))])
    assert (empty.rows, markdown(empty)) == ((), "no stages were timed")


def test_stages_of_a_file_without_postprocessing():
    old = Stages(backbone=0.3, nms=0.01, rest=0.09)
    new = Stages(backbone=0.3, nms=0.01, postprocessing=0.07, rest=0.02)
    table = tables.stages_table([group(run("Torch"), stages=x) for x in (old, new)])
    assert headings(table)[4:6] == ["postprocessing (ms)", "rest (ms)"]
    assert [row[4:] for row in table.rows] == [
        ("-", "90.0", "400.0", "4.00x"),
        ("70.0", "20.0", "400.0", "4.00x"),
    ]


def test_all_stages_have_a_name():
    assert list(tables.STAGES) == list(Stages.__dataclass_fields__)


def test_published_speedups_stand_beside_ours():
    def beside(model: str, precision: str, label: str, speedup: Optional[Speedup]) -> Group:
        asked = {"requested_precision": precision, "effective_precision": precision}
        ours = run(label, speedup=speedup, **asked)
        export = "scripted" if model.endswith("scripted") else "traced"
        return group(run("Torch"), ours, model=model, export=export, precision=precision)

    groups = [
        beside("testRetinaNet", "fp32", "OpenVINO", Speedup(1.2, 1.17, 1.22, "faster")),
        beside("testMaskRCNNC4", "bf16", "OpenVINO", Speedup(1.0, 0.99, 1.01, "same")),
        beside(
            *("testRetinaNet_scripted", "fp16", "TorchBlade"),
            Speedup(2.5, None, None, "inconclusive"),
        ),
        beside("testRetinaNet_scripted", "fp32", "TorchScript", None),
        beside("testCascadeRCNN", "int8", "TorchBlade", Speedup(2.0, 1.9, 2.1, "faster")),
        beside("Other", "fp32", "OpenVINO", Speedup(2.0, 1.9, 2.1, "faster")),
        group(run("Torch"), run("OpenVINO"), image="a.jpg"),
    ]
    lines = markdown(tables.published_table(groups)).splitlines()
    assert lines[:8] == [
        "| Model | Export | precision | Backend | Speedup | TorchBlade, published |",
        "| :-- | :-- | :-- | :-- | --: | --: |",
        "| RetinaNet | traced | fp32 | OpenVINO | 1.20x ±0.03 | 1.48x |",
        "| MaskRCNNC4 | traced | bf16 | OpenVINO | 1.00x ±0.01 same | 2.72x (fp16) |",
        "| RetinaNet_scripted | scripted | fp16 | TorchBlade | 2.50x ±? inconclusive | 2.01x |",
        "| RetinaNet_scripted | scripted | fp32 | TorchScript | - | - |",
        "| CascadeRCNN | traced | int8 | TorchBlade | 2.00x ±0.10 | - |",
        "| Other | traced | fp32 | OpenVINO | 2.00x ±0.10 | - |",
    ]
    assert {line.count("|") for line in lines[:8]} == {7}
    assert len(lines) == 10
    assert "compare ratios" in lines[-1]


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "text"),
    [
        (-0.12, -0.4301, 0.1, "keeps", "-0.12 ±0.32 keeps AP"),
        (-24.7, -29.0, -20.0, "loses", "-24.70 ±4.70 LOSES AP"),
        (0.3, 0.1, 0.6, "too few", "+0.30 ±0.30 too few images"),
        (0.0, 0.0, 0.0, "keeps", "+0.00 ±0.00 keeps AP"),
        # The interval of a skewed distribution may leave the value out.
        (0.5, 0.6, 0.7, "keeps", "+0.50 ±0.20 keeps AP"),
    ],
)
def test_what_ap_differs_by_shows_the_larger_half(value, low, high, verdict, text):
    known = Difference(value, low, high, 1.0, 1.0, 1.0, verdict)
    assert tables.describe_difference(known) == text


def judged_run(label: str, classes: Any, differs: Any, **more: Any) -> Run:
    """A run with an AP of each class, and what that differs by from the reference's."""
    known = Difference(-1.0, -2.0, -0.5, 0.9, 0.9, 0.9, "loses", classes=differs)
    own = AveragePrecision(40.0, classes=classes, difference=known)
    return run(label, accuracy=Accuracy(tasks={"bbox": own}), **more)


def test_ap_by_class_is_there_without_a_row_of_the_reference():
    classes, differs = {"cat": 40.0, "dog": None, "emu": 60.0}, {"cat": -5.0, "emu": 2.5}
    asked = {"requested_precision": "bf16", "effective_precision": "bf16"}
    alone = group(judged_run("Torch", classes, {**differs, "dog": None}, **asked))
    (table,) = tables.class_tables([alone])
    assert [column.heading for column in table.columns] == ["class", "Torch fp32", "Torch bf16"]
    assert table.rows == (
        ("cat", "45.00", "-5.00"),
        ("dog", "-", "-"),
        ("emu", "57.50", "+2.50"),
    )


def test_ap_by_class_of_a_file_that_has_but_the_reference_s_own():
    reference = AveragePrecision(40.0, classes={"cat": 45.0, "dog": None})
    torch = run("Torch", accuracy=Accuracy(tasks={"bbox": reference}))
    other = judged_run("OpenVINO", {"cat": 40.0, "dog": None}, {})
    (table,) = tables.class_tables([group(torch, other)])
    assert table.rows == (("cat", "45.00", "-5.00"), ("dog", "-", "-"))
    # Nothing says what the reference has.
    assert tables.class_tables([group(other)]) == []


def test_an_evaluation_that_was_interrupted_is_said_to_be_unfinished():
    done = run("Torch", accuracy=Accuracy(tasks={"bbox": AveragePrecision(40.0)}))
    others = [run("OpenVINO"), run("ONNXRuntime", status="failed", reason="it died")]
    known = {"evaluated": Evaluated(images=60, objects=100)}
    line = "fp32: interrupted before the AP of OpenVINO was known"
    assert line in notes(group(done, *others, stopped="interrupted", **known))
    assert line not in notes(group(done, *others, **known))
    assert line not in notes(group(done, *others, stopped="interrupted"))


@pytest.mark.parametrize(
    ("control", "verdict", "line"),
    [
        (
            AccuracyControl({"bbox": 40.0}, 0.99, 0.9, 0.995, ("fc2",), 60),
            "keeps",
            "1 of 60 layers stay in fp32",
        ),
        (None, "loses", "--calibration-annotations, of images that are not evaluated"),
        (None, "keeps", None),
    ],
)
def test_what_int8_costs_is_said(control, verdict, line):
    known = Difference(-1.0, -2.0, -0.5, 0.9, 0.9, 0.9, verdict)
    own = Accuracy(tasks={"bbox": AveragePrecision(40.0, difference=known)})
    asked = {"requested_precision": "int8", "effective_precision": "int8"}
    engine = run("OpenVINO", accuracy=own, control=control, **asked)
    found = [x for x in notes(group(run("Torch"), engine)) if x.startswith("OpenVINO int8: ")]
    assert [x.startswith(f"OpenVINO int8: {line}") for x in found] == [True] * (line is not None)


# Calls of new sizes ----------------------------------------------------------------------------


SIZES = ((300, 500), (500, 300), (390, 390))


def streamed(**changes: Any) -> Group:
    torch = run("Torch", statistics=statistics([400] * 5), new_size_s=(0.5, 0.4, 0.61))
    compiled = run("Inductor", statistics=statistics([200] * 5), new_size_s=(0.25, 9.0, 0.26))
    failed = run("OpenVINO", status="failed", reason="it died")
    return group(torch, compiled, failed, new_sizes=SIZES, **changes)


def test_new_sizes_have_a_column_beside_the_median():
    table = tables.model_table(results(streamed()), [streamed()])
    place = headings(table).index("new size(ms)")
    assert headings(table)[place - 1 : place + 2] == ["Median(ms)", "new size(ms)", "Mean(ms)"]
    assert [row[place] for row in table.rows] == ["500.0", "260.0", "-"]
    assert [row[place - 1] for row in table.rows] == ["400.0", "200.0", "-"]


def test_without_new_sizes_there_is_no_column():
    table = tables.model_table(results(group(run("Torch"))), [group(run("Torch"))])
    assert "new size(ms)" not in headings(table)
    assert not any("new size" in note for note in table.notes)


def test_it_is_said_which_sizes_were_new_and_which_call_was_long():
    found = notes(streamed())
    which = "the median of 3 calls, each of a size that was never seen before, 300x500 to 500x300"
    assert f"new size(ms): {which}" in found
    assert [x for x in found if "as where an engine is compiled again" in x] == [
        "Inductor fp32: a call of a new size took 9000 ms, 35 times the median, as where an engine "
        "is compiled again"
    ]
    fewer = replace(streamed(precision="bf16"), new_sizes=SIZES[:1])
    found = notes(streamed(), fewer)
    assert f"new size(ms) at fp32: {which}" in found
    assert "new size(ms) at bf16: the median of 1 call, of a new size, 300x500" in found


def test_it_is_said_why_there_are_no_new_sizes():
    why = "only images of 96x128 are taken"
    both = [group(run("Torch"), no_new_sizes=why, precision=x) for x in ("fp32", "bf16")]
    assert f"no calls of new sizes at fp32 and bf16: {why}" in notes(*both)


def test_drawn_sizes_are_among_those_of_the_check():
    sizes = {
        "min": ((50, 70),),
        "opt": ((96, 128),),
        "max": ((260, 200),),
        "drawn 1": ((66, 111),),
        "drawn 2": ((140, 120),),
    }
    checked = (
        "against Torch fp32 at 50x70, 96x128, 66x111, 140x120 and 260x200, the worst of the five"
    )
    assert f"timed at 96x128; Detections: {checked}" in notes(
        group(run("Torch"), image_sizes=sizes)
    )
