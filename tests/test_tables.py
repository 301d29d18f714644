"""From records to tables: what stands in them, and what is said below."""

from __future__ import annotations

from typing import Any, Dict, Optional

import tables
from benchmark import StopRule
from stages import STAGES


def run(backend: str, coverage: Dict[str, Any], **changes: Any) -> Dict[str, Any]:
    return {
        "backend": backend.lower(),
        "label": backend,
        "baseline": backend == "Torch",
        "requested_precision": "fp32",
        "effective_precision": "fp32",
        "provider": "cpu",
        "status": "ok",
        "reason": None,
        "statistics": None,
        "speedup": None,
        "detections": None,
        "coverage": coverage,
        **changes,
    }


def group(*runs: Dict[str, Any], **changes: Any) -> Dict[str, Any]:
    return {
        "model": "testRetinaNet",
        "export": "traced",
        "precision": "fp32",
        "image_sizes": {},
        "rounds": 20,
        "stopped": "interval",
        "runs": list(runs),
        **changes,
    }


def cells(line: str) -> list:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_coverage_says_what_each_engine_took():
    inductor = {
        "operators_in_engine": 700,
        "share_of_flops": 0.987,
        "segments": 9,
        "graph_breaks": 8,
    }
    onnx = {"operators": 900, "operators_in_engine": 850, "operators_by_provider": {"A": 850}}
    runs = [run("Torch", {}), run("Inductor", inductor), run("ONNXRuntime", onnx)]
    lines = tables.coverage_table([group(*runs)]).splitlines()
    headings = ["operators", "in engines", "FLOPs in engines", "segments", "graph breaks", "more"]
    assert cells(lines[0])[4:] == headings
    names = ["RetinaNet", "Inductor", "fp32", "cpu"]
    assert cells(lines[2]) == [*names, "-", "700", "99%", "9", "8", ""]
    assert cells(lines[3])[4:] == ["900", "850", "-", "-", "-", "operators by provider: 850 A"]
    assert len(lines) == 4


def test_no_coverage():
    assert tables.coverage_table([group(run("Torch", {}))]) == "no coverage is known"


def prepared(backend: str, cached: bool = False, **changes: Any) -> Dict[str, Any]:
    costs = {
        "prepare": {"build": 2.0, "export": 3.0, "compile": 40.0, "total": 47.04},
        "cached": cached,
        "artifact_mb": 145.6,
        "peak_memory_mb": 1500.2,
        "break_even": {"images": 120.2, "low": 98.0, "high": None},
    }
    return run(backend, {}, **{**costs, **changes})


def test_costs_say_what_a_run_took():
    runs = [
        prepared("Torch", prepare={"build": 2.0, "total": 2.0}, artifact_mb=None, break_even=None),
        prepared("TorchScript"),
        prepared("Inductor", cached=True, peak_device_memory_mb=700.0),
        prepared("OpenVINO", prepare={}),
    ]
    lines = tables.costs_table([group(*runs)]).splitlines()
    assert cells(lines[0])[3:] == [
        *("export (s)", "convert (s)", "compile (s)", "total (s)"),
        *("artifact (MiB)", "peak memory (MiB)", "break-even (images)"),
    ]
    assert cells(lines[2])[1:] == ["Torch", "fp32", "-", "-", "-", "0.0", "-", "1500", "-"]
    costs = ["3.0", "-", "40.0", "45.0", "146", "1500", "121 (98 to never)"]
    assert cells(lines[3])[3:] == costs
    assert cells(lines[4])[3:] == [*costs[:2], "40.0 cached", *costs[3:5], "700", costs[6]]
    assert len(lines) == 5  # What was never prepared has no costs.


def test_no_costs():
    assert tables.costs_table([group(prepared("Torch", prepare={}))]) == "no run was prepared"


def test_the_share_of_the_peak_has_a_column_if_it_is_known():
    statistics = {
        **dict.fromkeys(("mean_ms", "std_dev_ms", "max_ms", "median_fps", "mean_fps"), 1.0),
        "samples": 9,
        "median_ms": 500.0,
        "p99_ms": None,
        "relative_iqr": 0.0,
    }
    runs = [run("Torch", {}, statistics=statistics), run("OpenVINO", {}, statistics=None)]
    one = group(*runs, flops=10**11)
    assert "% of peak" not in tables.model_table([one], StopRule())
    text = tables.model_table([one], StopRule(), peaks={"fp32": 4e11})
    lines = text.splitlines()
    # 1e11 operations in half a second.
    assert [cells(line)[-1] for line in (lines[0], *lines[2:4])] == ["% of peak", "50.0%", "-"]
    assert "in GFLOP/s fp32 400; a call is 100.0 GFLOPs" in text


def test_counts_of_objects_have_a_line_each():
    def timed(objects: int, found: int) -> Dict[str, Any]:
        statistics = {"median_ms": 100.0 + objects}
        runs = [run(name, {}, statistics=statistics) for name in ("Torch", "OpenVINO")]
        return group(*runs, objects=objects, found=found)

    lines = tables.cases_table([timed(0, 0), timed(30, 29)]).splitlines()
    assert cells(lines[0])[3:6] == ["objects", "found", "Median(ms)"]
    assert [cells(line)[1:6] for line in lines[2:]] == [
        ["Torch", "fp32", "0", "0", "100.0"],
        ["Torch", "fp32", "30", "29", "130.0"],
        ["OpenVINO", "fp32", "0", "0", "100.0"],
        ["OpenVINO", "fp32", "30", "29", "130.0"],
    ]


def test_rows_say_which_number_of_objects_they_are_of():
    """With --detections, each table has several groups of the same test model and precision."""
    seconds = {**dict.fromkeys(STAGES, 0.0), "backbone + FPN": 0.3, "rest": 0.1}
    engine = {**prepared("OpenVINO"), "coverage": {"segments": 1}}
    groups = [group(engine, objects=objects, stages=seconds) for objects in (0, 30, 100)]
    for make in (
        *(tables.coverage_table, tables.costs_table, tables.stages_table),
        tables.published_table,
    ):
        lines = [line for line in make(groups).splitlines() if line.startswith("|")]
        names = [cells(line)[0] for line in lines[2:]]
        assert names == ["RetinaNet with 0 objects", "RetinaNet with 30 objects", "RetinaNet"], make


def test_images_have_a_line_each_and_one_together():
    def timed(image: Optional[str], milliseconds: float) -> Dict[str, Any]:
        statistics = {"median_ms": milliseconds}
        return group(run("Torch", {}, statistics=statistics), image=image, found=9)

    both = [timed(None, 150.0), timed("b.jpg", 100.0), timed("a.jpg", 200.0)]
    lines = tables.cases_table(both).splitlines()
    assert cells(lines[0])[3:6] == ["image", "found", "Median(ms)"]
    assert [cells(line)[3:6] for line in lines[2:]] == [
        ["b.jpg", "9", "100.0"],
        ["a.jpg", "9", "200.0"],
        ["together", "9", "150.0"],
    ]


def test_what_several_images_were_timed_on_is_said():
    sizes = {"min": [[40, 60]], "opt": [[70, 90]], "max": [[150, 200]], "image 2": [[80, 80]]}
    text = tables.model_table([group(run("Torch", {}), image_sizes=sizes)], StopRule())
    assert "- timed on 2 images in turn (70x90, 80x80), the mean of a round is what counts" in text
    assert "Torch fp32 on each, and at 40x60 and 150x200, the worst of all" in text
    one = group(run("Torch", {}), image_sizes={"image 2": [[80, 80]]})
    assert "- timed at 80x80\n" in tables.model_table([one], StopRule())


def test_stages_say_where_the_time_goes():
    seconds = {"backbone + FPN": 0.3, "proposals": 0.0, "head": 0.08, "ROI heads": 0.0}
    timed = group(run("Torch", {}), stages={**seconds, "NMS": 0.01, "rest": 0.01})
    lines = tables.stages_table([timed, group(run("Torch", {}))]).splitlines()
    assert cells(lines[0])[2:] == [
        *("backbone + FPN (ms)", "head (ms)", "NMS (ms)", "rest (ms)", "total (ms)", "ceiling"),
    ]
    assert cells(lines[2]) == [
        *("RetinaNet", "fp32", "300.0", "80.0", "10.0", "10.0", "400.0", "4.00x"),
    ]
    assert tables.stages_table([group(run("Torch", {}))]) == "no stages were timed"


def test_stages_of_a_file_without_postprocessing():
    old = {"backbone + FPN": 0.3, "NMS": 0.01, "rest": 0.09}
    new = {"backbone + FPN": 0.3, "NMS": 0.01, "postprocessing": 0.07, "rest": 0.02}
    lines = tables.stages_table([group(run("Torch", {}), stages=x) for x in (old, new)])
    header, _, *rows = map(cells, lines.splitlines()[:4])
    assert header[4:6] == ["postprocessing (ms)", "rest (ms)"]
    assert [row[4:] for row in rows] == [
        ["-", "90.0", "400.0", "4.00x"],
        ["70.0", "20.0", "400.0", "4.00x"],
    ]


def test_a_throttled_gpu_is_a_warning_and_not_said_again():
    states = [{"throttled": ["power brake"]}]
    text = tables.model_table([group(run("Torch", {}), gpu=states)], StopRule())
    assert "throttled" not in text


def test_a_recompilation_while_timed_is_said():
    quiet = run("Inductor", {"recompilations_while_timed": 0})
    assert "compiled" not in tables.model_table([group(quiet)], StopRule())
    busy = run("Inductor", {"recompilations_while_timed": 2})
    text = tables.model_table([group(busy)], StopRule())
    assert "- Inductor fp32: compiled 2 more times within the timed rounds" in text


def test_rounds_are_explained_by_the_rule_of_their_group():
    text = tables.model_table([group(run("Torch", {}), half_width=0.02)], StopRule())
    assert "- fp32: 20 rounds, until every speedup was known to ±2%" in text
    text = tables.model_table([group(run("Torch", {}))], StopRule())
    assert "known to ±3%" in text
