"""From records to tables: what stands in them, and what is said below."""

from __future__ import annotations

from typing import Any, Dict

import tables
from benchmark import StopRule


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
    inductor = {"operators_in_engine": 700, "segments": 9, "graph_breaks": 8}
    onnx = {"operators": 900, "operators_in_engine": 850, "operators_by_provider": {"A": 850}}
    runs = [run("Torch", {}), run("Inductor", inductor), run("ONNXRuntime", onnx)]
    lines = tables.coverage_table([group(*runs)]).splitlines()
    assert cells(lines[0])[4:] == ["operators", "in engines", "segments", "graph breaks", "more"]
    assert cells(lines[2]) == ["RetinaNet", "Inductor", "fp32", "cpu", "-", "700", "9", "8", ""]
    assert cells(lines[3])[4:] == ["900", "850", "-", "-", "operators by provider: 850 A"]
    assert len(lines) == 4


def test_no_coverage():
    assert tables.coverage_table([group(run("Torch", {}))]) == "no coverage is known"


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
