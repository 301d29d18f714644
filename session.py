"""One invocation: from options to a plan, through groups of runs, to tables and a result file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

import models
import results
import suite
import tables
from backends import base
from benchmark import RunFailed, StopRule, WarmUp
from catalog import MODELS, VERSION
from errors import InputError
from progress import Progress


def listing(device: str) -> str:
    """Test models and backends, with the reason where one is not available."""
    lines = ["Test models:"]
    for model in MODELS.values():
        images = "2 images" if model.images_per_call == 2 else "1 image"
        lines.append(f"  {model.name:24}{model.config}, {model.kind}, {images} per call")
    lines.append(f"Backends on {device}:")
    for backend in base.load_all():
        reason = _unavailable(backend, device)
        precisions = ", ".join(backend.precisions.get(device, ()))
        lines.append(f"  {backend.name:24}{f'unavailable: {reason}' if reason else precisions}")
    return "\n".join(lines)


def _unavailable(backend: base.Backend, device: str) -> Optional[str]:
    reason = backend.unavailable(device)
    if reason is None and device not in backend.devices:
        reason = f"{backend.label} does not run on {device}"
    return reason


def resolve_device(asked: Optional[str]) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError("CUDA was asked for, and PyTorch sees no CUDA device here")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _backends(asked: Optional[List[str]], device: str, notes: List[str]) -> Tuple[Any, ...]:
    """The backends to measure, the baseline first; notes say which were left out and why.

    Raises:
        errors.InputError: one that was asked for by name is unknown or cannot be had.
    """
    if asked is None:
        chosen = []
        for backend in base.load_all():
            reason = _unavailable(backend, device)
            if reason is None and backend.default:
                chosen.append(backend)
            elif reason is not None and device in backend.devices:
                notes.append(f"{backend.label} left out: {reason}")
        return tuple(chosen)
    chosen = {name: base.load(name) for name in asked}
    for name, backend in chosen.items():
        reason = _unavailable(backend, device)
        if reason is not None:
            raise InputError(f"backend '{name}' is unavailable: {reason}")
    ranked = {backend.rank: backend for backend in (*chosen.values(), base.load("torch"))}
    return tuple(ranked[rank] for rank in sorted(ranked))


def _precisions(
    asked: Optional[List[str]], device: str, backends: Sequence[base.Backend], notes: List[str]
) -> Tuple[str, ...]:
    """The precisions to measure, each once.

    Raises:
        errors.InputError: no backend but perhaps the baseline has one that was asked for.
    """
    if asked is None:
        if device == "cuda":
            return ("fp32", "fp16")
        return ("fp32", "bf16") if results.has_native_bf16(results.cpu_flags()) else ("fp32",)
    for precision in asked:
        able = [x.label for x in backends if precision in x.precisions[device]]
        unable = [x.label for x in backends if precision not in x.precisions[device]]
        if not able:
            raise InputError(f"no backend here computes in {precision} on {device}")
        if unable:
            notes.append(f"not at {precision} on {device}: {', '.join(unable)}")
    return tuple(dict.fromkeys(asked))


def _plan(options: argparse.Namespace, notes: List[str]) -> suite.Plan:
    """Fills in the defaults, and checks all that can be checked before anything is measured."""
    device = resolve_device(options.device)
    cores = results.usable_cores()
    if options.threads is not None and options.threads > cores:
        raise InputError(f"--threads {options.threads}: only {cores} cores can be used here")
    models.read_image(options.image and Path(options.image), options.image_size)
    backends = _backends(options.backend, device, notes)
    precisions = _precisions(options.precision, device, backends, notes)
    names = tuple(MODELS) if options.all else tuple(dict.fromkeys(options.model))
    models.check_weights([MODELS[name] for name in names], options.weights)
    return suite.Plan(
        models=names,
        backends=backends,
        precisions=precisions,
        device=device,
        source=models.resolve_source(options.source),
        image=options.image,
        image_size=options.image_size,
        weights=options.weights,
        detections=options.detections,
        warm_up=WarmUp.on(device) if options.warmup is None else WarmUp.fixed(options.warmup),
        rule=_stop_rule(options, device),
        threads=options.threads or cores,
        seed=options.seed,
        output=results.prepare_directory(options.output) if options.output else None,
        debug=options.debug,
        cache=results.prepare_directory(options.cache, "cache") if options.cache else None,
    )


def _stop_rule(options: argparse.Namespace, device: str) -> StopRule:
    if options.iterations is not None:
        return StopRule.fixed(options.iterations)
    half_width = 0.01 if device == "cuda" else 0.03
    return StopRule(half_width=half_width, budget_s=options.time_budget)


def _document(plan: suite.Plan, options: argparse.Namespace, notes: List[str]) -> Dict[str, Any]:
    """The result file of a plan, before anything was measured: see docs/results.md."""
    versions: Dict[str, str] = {}
    for backend in plan.backends:
        versions.update(backend.versions())
    settings = dict(vars(options))
    for name in ("image", "weights", "output", "cache"):
        settings[name] = settings[name] and Path(settings[name]).name
    settings.update(
        model=list(plan.models),
        backend=[backend.name for backend in plan.backends],
        precision=list(plan.precisions),
        device=plan.device,
        source=plan.source,
        threads=plan.threads,
    )
    return {
        "schema": results.SCHEMA,
        "tool": results.TOOL,
        "version": VERSION,
        "environment": results.environment(versions),
        "settings": settings,
        "groups": [],
        "aa": None,
        "notes": notes,
        "complete": False,
    }


class Session:
    """One invocation: its plan, its result file, its tables.

    Args:
        options: of the command line, see `run_blade.parser`.

    Raises:
        errors.InputError: something that was asked for cannot be had; nothing was measured.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.progress = Progress()
        self.notes: List[str] = []
        self.plan = _plan(options, self.notes)
        self.plan_notes = list(self.notes)
        self.document = _document(self.plan, options, self.notes)

    def run(self) -> int:
        """Measures everything, printing a table after each test model; returns the exit code."""
        for note in self.notes:
            print(note, file=sys.stderr)
        with suite.scratch_folder() as folder:
            for name in self.plan.models:
                self._run_model(name, folder)
        self.document["complete"] = True
        self._save()
        if self.options.coverage:
            print("\n" + tables.coverage_table(self.document["groups"]))
        if self.options.costs:
            print("\n" + tables.costs_table(self.document["groups"]))
        if self.options.compare_published:
            print("\n" + tables.published_table(self.document["groups"]))
        return exit_code(self.document["groups"], self.options.fail_on)

    def _run_model(self, name: str, folder: Path) -> None:
        """Measures one test model; an interruption still prints and keeps what there is."""
        groups, before = self.document["groups"], len(self.document["groups"])
        own_notes: List[str] = []
        try:
            model = suite.prepare_model(name, self.plan, folder, self.progress)
            own_notes = [model.note]
            self.notes += [note for note in own_notes if note not in self.notes]
            for precision in self.plan.precisions:
                self._run_group(model, precision)
            model.file.unlink()
        except RunFailed as error:
            reason = f"the model cannot be prepared: {error}"
            for precision in self.plan.precisions:
                groups.append(suite.failed_group(name, precision, self.plan, reason))
        finally:
            self._save()
            if len(groups) > before:
                notes = tables.aa_note(self.document["aa"]) + self.plan_notes + own_notes
                print(tables.model_table(groups[before:], self.plan.rule, notes) + "\n", flush=True)

    def _run_group(self, model: suite.Prepared, precision: str) -> None:
        first = self.document["aa"] is None
        aa = suite.measure_group(
            model, precision, self.plan, self.progress, self.document["groups"], same_again=first
        )
        if first:
            self.document["aa"] = aa
        self._save()

    def _save(self) -> None:
        if self.plan.output is not None and self.document["groups"]:
            results.save(self.document, self.plan.output / "results.json")


def exit_code(groups: Sequence[Dict[str, Any]], fail_on: Sequence[str]) -> int:
    """1 where a run failed or mismatched or, with `slower` in `fail_on`, was slower; else 0.

    Args:
        groups: of the result file.
    """
    runs = [run for group in groups for run in group["runs"]]
    slower = [run for run in runs if run["speedup"] and run["speedup"]["verdict"] == "slower"]
    if any(run["status"] in ("failed", "mismatch") for run in runs):
        return 1
    return 1 if slower and "slower" in fail_on else 0
