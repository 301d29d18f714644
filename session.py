"""One invocation: from options to a plan, through groups of runs, to tables and a result file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

import machine
import models
import results
import suite
import tables
import worker
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
            elif reason is not None and backend.default and device in backend.devices:
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
    images = tuple(dict.fromkeys(options.image or ()))
    pictures = models.read_images([Path(x) for x in images], options.image_size, options.seed)
    backends = _backends(options.backend, device, notes)
    precisions = _precisions(options.precision, device, backends, notes)
    names = tuple(MODELS) if options.all else tuple(dict.fromkeys(options.model))
    weights = _weights(options)
    models.check_weights([MODELS[name] for name in names], weights)
    return suite.Plan(
        models=names,
        backends=backends,
        precisions=precisions,
        device=device,
        source=models.resolve_source(options.source),
        images=images,
        image_size=options.image_size,
        pictures=pictures,
        weights=weights,
        detections=options.detections,
        warm_up=WarmUp.on(device) if options.warmup is None else WarmUp.fixed(options.warmup),
        rule=_stop_rule(options, device),
        threads=options.threads or cores,
        seed=options.seed,
        output=results.prepare_directory(options.output) if options.output else None,
        debug=options.debug,
        stages=options.stages,
        trace=options.trace,
        cache=results.prepare_directory(options.cache, "cache") if options.cache else None,
    )


def _weights(options: argparse.Namespace) -> str:
    """What `--weights` comes to: how many objects are found is to be had of synthetic ones only.

    Raises:
        errors.InputError: a number of objects was asked for of others.
    """
    if options.detections == (results.OBJECTS,) or options.weights == "synthetic":
        return options.weights
    if options.weights != "auto":
        raise InputError(
            f"--detections makes synthetic weights: it does not go with --weights {options.weights}"
        )
    return "synthetic"


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
    for name in ("weights", "output", "cache"):
        settings[name] = settings[name] and results.file_name(settings[name])
    names = [results.file_name(image) for image in plan.images]
    settings.update(
        weights_digest=models.checkpoint_digest(plan.weights),
        image=names[0] if len(names) == 1 else names or None,
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
        "environment": results.environment(versions, suite.gpu_name(plan)),
        "settings": settings,
        "groups": [],
        "aa": None,
        "peaks": {},
        "notes": notes,
        "warnings": [],
        "complete": False,
    }


# What is to be done about results that must not be mixed with those that are asked for.
WAY_OUT = "choose another --output, or measure all again with --rerun"


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
        self.found: Dict[str, Any] = {}
        # Of general warnings: where groups are kept, the file's environment is that of theirs.
        self.environments = [self.document["environment"]]
        if self.plan.output is not None and not options.rerun:
            self._resume(self.plan.output)

    def _resume(self, output: Path) -> None:
        """Takes over the groups that an earlier run of the same settings has completed.

        Raises:
            errors.InputError: what is there is no result file, or of other settings.
        """
        if not (output / "results.json").exists():
            return
        earlier = results.load(output / "results.json")
        ignored = ("memory_mb", "kernel", "cpu.governor")
        differing = results.differences(earlier, self.document, ignored)
        differing += self._other_weights(earlier["settings"])
        differing += self._other_images(earlier["groups"])
        if differing:
            # What was asked for comes before what follows from it.
            differing.sort(key=lambda line: not line.startswith("--"))
            raise InputError(f"{output} has results of another run ({differing[0]}): {WAY_OUT}")
        unfinished = ("interrupted", "all failed")
        kept = [group for group in earlier["groups"] if group["stopped"] not in unfinished]
        self.document.update(groups=kept, aa=earlier["aa"], peaks=earlier.get("peaks", {}))
        if kept:
            self.document["environment"] = earlier["environment"]
            self.environments.insert(0, earlier["environment"])
        self.notes += [note for note in earlier["notes"] if note not in self.notes]
        self.found = results.read_found(output)

    def _other_weights(self, settings: Dict[str, Any]) -> List[str]:
        """Whether the checkpoint is another file than that of earlier settings, in words."""
        digests = [x.get("weights_digest") for x in (settings, self.document["settings"])]
        if None in digests or digests[0] == digests[1]:
            return []
        return ["--weights: another file of the same name"]

    def _other_images(self, groups: Sequence[Dict[str, Any]]) -> List[str]:
        """Whether groups were measured on other images, by whatever name, in words."""
        known = {
            (group["images_per_call"], group["image_digest"])
            for group in groups
            if group.get("image_digest") and not group.get("image")
        }
        for count, before in known:
            digests = [worker.digest([picture] * count) for picture in self.plan.pictures]
            if before != " ".join(digests):
                return ["--image: another image of the same name"]
        return []

    def run(self) -> int:
        """Measures everything, printing a table after each test model; returns the exit code."""
        for note in self.notes:
            print(note, file=sys.stderr)
        for warning in self._general_warnings():
            self.progress.say(f"warning: {warning}")
        try:
            with suite.scratch_folder() as folder:
                if self.options.roofline and not self.document["peaks"]:
                    self._measure_peaks(folder)
                for name in self.plan.models:
                    for objects in self.plan.detections:
                        self._run_model(name, objects, folder)
            self.document["complete"] = True
        finally:
            # An interrupted run has its page, too.
            self._save()
            failure = self._write_page()
            if failure:
                self.progress.say(f"no page is made: {failure}")
        if len(self.plan.detections) > 1:
            print("\n" + tables.cases_table(self.document["groups"]))
        if self.options.coverage:
            print("\n" + tables.coverage_table(self.document["groups"]))
        if self.options.stages:
            print("\n" + tables.stages_table(self.document["groups"]))
        if self.options.costs:
            print("\n" + tables.costs_table(self.document["groups"]))
        if self.options.compare_published:
            print("\n" + tables.published_table(self.document["groups"]))
        return 2 if failure else exit_code(self.document["groups"], self.options.fail_on)

    def _general_warnings(self) -> List[str]:
        found = [x for known in self.environments for x in machine.general_warnings(known)]
        return list(dict.fromkeys(found))

    def _measure_peaks(self, folder: Path) -> None:
        self.progress.say("how fast this machine multiplies matrices, at most")
        precisions = list(dict.fromkeys(("fp32", *self.plan.precisions)))
        try:
            self.document["peaks"] = suite.measure_peaks(precisions, self.plan, folder)
        except RunFailed as error:
            self.progress.say(f"there is no % of peak: {error}")

    def _groups_of(self, name: str, objects: int) -> List[Dict[str, Any]]:
        """What was measured of a test model, of all images together, by precision."""
        return [
            group
            for precision in self.plan.precisions
            for group in self.document["groups"]
            if results.case(group) == (name, objects, None) and group["precision"] == precision
        ]

    def _cases_of(self, name: str, objects: int) -> List[Dict[str, Any]]:
        """The same, with each image."""
        return [x for x in self.document["groups"] if results.case(x)[:2] == (name, objects)]

    def _run_model(self, name: str, objects: int, folder: Path) -> None:
        """Measures one test model; an interruption still prints and keeps what there is."""
        kept = [group["precision"] for group in self._groups_of(name, objects)]
        missing = [precision for precision in self.plan.precisions if precision not in kept]
        if kept:
            self.progress.say(f"{name}: kept from before: {', '.join(kept)}")
        try:
            if missing:
                self._measure(name, objects, missing, folder)
        except RunFailed as error:
            reason = f"the model cannot be prepared: {error}"
            self.document["groups"] += [
                suite.failed_group(name, objects, precision, self.plan, reason)
                for precision in missing
            ]
        finally:
            self._save()
            groups = self._groups_of(name, objects)
            if groups:
                notes = tables.aa_note(self.document["aa"]) + self.plan_notes
                peaks = self.document["peaks"] if self.options.roofline else {}
                text = tables.model_table(groups, self.plan.rule, notes, peaks)
                print(text + "\n", flush=True)
                if len(self.plan.images) > 1:
                    print(tables.cases_table(self._cases_of(name, objects)) + "\n", flush=True)

    def _measure(self, name: str, objects: int, precisions: Sequence[str], folder: Path) -> None:
        model = suite.prepare_model(name, objects, self.plan, folder, self.progress)
        self._check_weights(model)
        if model.note not in self.notes:
            self.notes.append(model.note)
        self._keep_reference(model)
        for precision in precisions:
            self._run_group(model, precision)
        model.file.unlink()

    def _check_weights(self, model: suite.Prepared) -> None:
        """Weights may be had now that an earlier run, whose groups are kept, had to do without.

        Raises:
            errors.InputError: they are not those of the groups.
        """
        for group in self._groups_of(model.name, model.objects):
            if group.get("weights_digest") not in (None, model.weights_digest):
                raise InputError(
                    f"{model.name} was measured at {group['precision']} with other weights "
                    f"({group.get('weights')}): {WAY_OUT}"
                )

    def _keep_reference(self, model: suite.Prepared) -> None:
        """What Torch fp32 found, for drawing it."""
        files = results.image_files(self.plan.pictures)
        for (name, case), file in zip(self._cases(model).items(), files):
            drawn = [suite.drawable(image) for image in suite.reference_detections(model, name)]
            kept = self.found.get(case, {}).get("runs", {})
            self.found[case] = {"image": file, "reference": drawn, "runs": kept}

    def _cases(self, model: suite.Prepared) -> Dict[str, str]:
        """Timed input -> its name in `detections.json`."""
        return {
            name: results.case_name((model.name, model.objects, image))
            for name, image in suite.image_names(self.plan, model).items()
        }

    def _run_group(self, model: suite.Prepared, precision: str) -> None:
        first = self.document["aa"] is None
        groups, before = self.document["groups"], len(self.document["groups"])
        found: Dict[str, Any] = {}
        try:
            aa = suite.measure_group(
                *(model, precision, self.plan, self.progress, groups),
                same_again=first,
                found=found,
            )
            if first:
                self.document["aa"] = aa
        finally:
            for name, case in self._cases(model).items():
                self.found[case]["runs"][precision] = found.get(name, {})
            for group in groups[before:]:
                for warning in machine.warnings(group, self.plan.rule.min_rounds):
                    self.progress.say(f"warning: {warning}")
        self._save()

    def _save(self) -> None:
        groups, least = self.document["groups"], self.plan.rule.min_rounds
        self.document["warnings"] = [
            *self._general_warnings(),
            *(x for group in groups for x in machine.warnings(group, least)),
        ]
        if self.plan.output is not None and self.document["groups"]:
            results.save(self.document, self.plan.output / "results.json")
            results.write_text(self.plan.output / results.FOUND, json.dumps(self.found))
            for picture, name in zip(self.plan.pictures, results.image_files(self.plan.pictures)):
                models.write_image(picture, self.plan.output / name)

    def _write_page(self) -> Optional[str]:
        """Makes the page of what there is; returns why it cannot be written, or None.

        That must not take the place of what ended the run, nor cost what is printed after it.
        """
        if self.plan.output is None or not self.document["groups"]:
            return None
        try:
            import report  # Drawing takes a second to import, and only this needs it.
        except ImportError as error:
            self.progress.say(f"no page is made: {error}")
            return None
        try:
            report.write(self.plan.output / "results.json", self.plan.output / "report.html")
        except InputError as error:
            return str(error)
        return None


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
