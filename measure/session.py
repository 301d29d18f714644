"""One invocation: test models in turn, tables as they come, and what an earlier one has left."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backends import base
from benchmark import RunFailed
from detectors import inputs, zoo
from errors import InputError
from measure import group as groups
from measure import protocol
from measure.drawing import drawn
from measure.evaluation import EVALUATED
from measure.group import PreparedModel, image_names, reference_detections
from measure.plan import Plan, environments, make_plan, survey_of
from measure.progress import Progress
from measure.worker import Command, Hosts, remove_left_behind, scratch_folder
from models import MODELS, VERSION, Model
from results import facts, tables
from results.environment import environment, file_name
from results.facts import case, case_name
from results.file import (
    RESULTS,
    Found,
    as_json,
    image_files,
    load,
    load_found,
    locked,
    save,
    save_found,
)
from results.recommendation import recommend, sentences
from results.record import Accuracy, Group, Picture, Results, Settings

# What to do about results that must not be mixed with what is asked for.
WAY_OUT = "choose another --output, or measure all again with --rerun"


@contextlib.contextmanager
def opened(commands: Sequence[Command]) -> Iterator[Hosts]:
    """Hosts for these environments and the suite's own."""
    with scratch_folder() as folder:
        remove_left_behind()
        hosts = Hosts((Command.own(), *commands), folder)
        try:
            yield hosts
        finally:
            hosts.close()


def listing(options: argparse.Namespace) -> str:
    """Test models and backends, with the reason where one cannot be had.

    Raises:
        errors.InputError: a device was asked for that cannot be had.
    """
    lines = ["Test models:"]
    for model in MODELS.values():
        images = "2 images" if model.images_per_call == 2 else "1 image"
        lines.append(f"  {model.name:24}{model.config}, {model.kind}, {images} per call")
    commands = environments(options.environment)
    with opened(tuple(commands.values())) as hosts:
        hosts.start()
        backends = tuple(backend.name for backend in base.load_all())
        survey = survey_of(Command.own(), protocol.Survey(backends, options.device), 1, hosts)
        lines.append(f"Backends on {survey.device}:")
        for backend in base.load_all():
            known = survey.backends[backend.name]
            lines.append(_backend_line(backend.name, backend, survey.device, known))
        if commands:
            lines.append(f"Environments on {survey.device}:")
        for name, command in commands.items():
            lines.append(_environment_line(name, command, survey.device, hosts))
    return "\n".join(lines)


def _backend_line(
    name: str, backend: base.Backend, device: str, known: protocol.Availability
) -> str:
    precisions = ", ".join(backend.precisions.get(device, ()))
    return f"  {name:24}{f'unavailable: {known.reason}' if known.reason else precisions}"


def _environment_line(name: str, command: Command, device: str, hosts: Hosts) -> str:
    backend = base.load(name.partition("@")[0])
    request = protocol.Survey((backend.name,), device, "bundled")
    try:
        survey = survey_of(command, request, 1, hosts)
    except InputError as error:
        return f"  {name:24}unavailable: {error}"
    known = survey.backends[backend.name]
    line = _backend_line(name, backend, device, known)
    versions = ", ".join(f"{library} {version}" for library, version in known.versions.items())
    return f"{line} (Python {survey.python}{', ' if versions else ''}{versions})"


def measure(options: argparse.Namespace) -> int:
    """Measures what the command line asks for, and prints tables; returns the exit code.

    Raises:
        errors.InputError: something that was asked for cannot be had.
    """
    commands = environments(options.environment)
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(opened(tuple(commands.values())))
        plan = make_plan(options, commands, hosts)
        if plan.output is not None:
            stack.enter_context(locked(plan.output))
        return Session(options, plan, hosts).run()


class Session:
    """One invocation: its plan, what was measured so far, its tables.

    Args:
        options: of the command line, see `run_blade.parser`.

    Raises:
        errors.InputError: `--output` has something that must not be mixed with what is asked for;
            nothing was measured.
    """

    def __init__(self, options: argparse.Namespace, plan: Plan, hosts: Hosts) -> None:
        self.options, self.plan, self.hosts = options, plan, hosts
        self.progress = Progress()
        self.empty = Results(
            version=VERSION,
            environment=environment(plan.versions, plan.gpu),
            settings=settings(plan, options),
            left_out=plan.left_out,
            without=plan.without,
        )
        self.earlier: Results | None = None
        self.groups: list[Group] = []
        self.aa = None
        self.peaks: dict[str, float] = {}
        self.found: Found = {}
        self.complete = False
        self.failures: list[str] = []
        # What could not be kept on the way, and is not there any more.
        self.lost: list[str] = []
        if plan.output is not None:
            if options.rerun:
                shutil.rmtree(plan.output / EVALUATED, ignore_errors=True)
            else:
                self._resume(plan.output)

    def _resume(self, output: Path) -> None:
        """Takes over the groups that an earlier invocation of the same settings has completed.

        Raises:
            errors.InputError: what is there is no result file, or of other settings.
        """
        if not (output / RESULTS).exists():
            return
        earlier = load(output / RESULTS)
        ignored = ("memory_mb", "kernel", "cpu.governor")
        differing = facts.differences(earlier, self.empty, ignored)
        differing += facts.other_files(earlier.settings, self.empty.settings)
        differing += self._other_images(earlier.groups)
        differing += self._other_environments(earlier.groups)
        if differing:
            # What was asked for comes before what follows from it.
            first = ("--dataset", "--")
            differing.sort(key=lambda line: [not line.startswith(each) for each in first])
            raise InputError(f"{output} has results of another run ({differing[0]}): {WAY_OUT}")
        unfinished = ("interrupted", "all failed")
        self.groups = [
            group
            for group in earlier.groups
            if group.stopped not in unfinished and not _is_to_be_judged(group)
        ]
        self.aa, self.peaks = earlier.aa, earlier.peaks
        self.earlier = earlier if self.groups else None
        self.found = load_found(output)

    def _other_images(self, kept: Sequence[Group]) -> list[str]:
        """Whether groups were measured on other images, by whatever name."""
        known = {
            (group.images_per_call, group.image_digest)
            for group in kept
            if group.image_digest and not group.image
        }
        for count, before in known:
            digests = [
                inputs.call_digest(picture, count, self.plan.view) for picture in self.plan.pictures
            ]
            if before != " ".join(digests):
                return ["--image: another image of the same name"]
        return []

    def _other_environments(self, kept: Sequence[Group]) -> list[str]:
        """Whether groups were measured in other environments of the same name."""
        for run in (run for group in kept for run in group.runs if run.python):
            before = {"python": run.python, **run.versions}
            now = self.plan.environments.get(run.name, before)
            if before != now:
                texts = [", ".join(map(" ".join, x.items())) for x in (before, now)]
                return [f"--environment {run.name}: {texts[0]} before, {texts[1]} now"]
        return []

    def results(self) -> Results:
        """What was measured so far; where groups were kept, the environment is that of theirs."""
        kept = self.earlier or self.empty
        return Results(
            version=VERSION,
            environment=kept.environment,
            settings=self.empty.settings,
            groups=tuple(self.groups),
            aa=self.aa,
            peaks=self.peaks,
            left_out={**kept.left_out, **self.plan.left_out},
            without={**kept.without, **self.plan.without},
            warnings=(*self._general_warnings(), *self._warnings(self.groups)),
            complete=self.complete,
        )

    def recommended(self) -> Results:
        """The same with which run to ship."""
        known = self.results()
        return replace(known, recommendations=recommend(known))

    def _print(self, text: str) -> None:
        """Prints tables where they belong: with `--json`, standard output is for machines."""
        print(text, flush=True, file=sys.stderr if self.options.json else sys.stdout)

    def _general_warnings(self) -> list[str]:
        known = [x.environment for x in (self.earlier, self.empty) if x is not None]
        return list(dict.fromkeys(x for place in known for x in facts.general_warnings(place)))

    def _warnings(self, of: Sequence[Group]) -> list[str]:
        return [x for group in of for x in facts.warnings(group, self.plan.rule.least_rounds)]

    def run(self) -> int:
        """Measures everything, printing a table after each test model; returns the exit code."""
        for note in facts.missing_notes(self.empty):
            print(note, file=sys.stderr)
        if self.plan.note is not None:
            self.progress.say(self.plan.note)
        for warning in self._general_warnings():
            self.progress.say(f"warning: {warning}")
        try:
            if self.options.roofline and not self.peaks:
                self._measure_peaks()
            for model in self.plan.models:
                for objects in self.plan.detections:
                    self._run_model(model, objects)
            self.complete = True
            if self.plan.output is not None:
                shutil.rmtree(self.plan.output / EVALUATED, ignore_errors=True)
        finally:
            # An interrupted run has its page, too.
            self.failures = []  # What could be kept in the end is not lost.
            self._save()
            self._write_page()
        self._print_tables()
        if self.options.json:
            print(as_json(self.recommended().recommendations))
        return 2 if self.failures or self.lost else exit_code(self.groups, self.options.fail_on)

    def _print_tables(self) -> None:
        """Those that are about all test models."""
        wanted = [
            (len(self.plan.detections) > 1, tables.cases_table),
            (self.plan.dataset is not None, tables.accuracy_table),
            (self.options.coverage, tables.coverage_table),
            (self.options.stages, tables.stages_table),
            (self.options.costs, tables.costs_table),
            (self.options.compare_published, tables.published_table),
            (self.options.bisect, tables.parts_table),
        ]
        for is_wanted, make in wanted:
            if is_wanted:
                self._print("\n" + tables.markdown(make(self.groups)))

    def _measure_peaks(self) -> None:
        self.progress.say("how fast this machine multiplies matrices, at most")
        precisions = list(dict.fromkeys(("fp32", *self.plan.precisions)))
        try:
            self.peaks = groups.measure_peaks(precisions, self.plan, self.hosts)
        except RunFailed as error:
            self.progress.say(f"there is no % of peak: {error}")

    def _groups_of(self, name: str, objects: int) -> list[Group]:
        """What was measured of a test model, of all images together, by precision."""
        return [
            group
            for precision in self.plan.precisions
            for group in self.groups
            if case(group) == (name, objects, None) and group.precision == precision
        ]

    def _run_model(self, model: Model, objects: int) -> None:
        """Measures one model; an interruption still prints and keeps what there is."""
        name = model.name
        kept = [group.precision for group in self._groups_of(name, objects)]
        missing = [precision for precision in self.plan.precisions if precision not in kept]
        if kept:
            self.progress.say(f"{name}: kept from before: {', '.join(kept)}")
        try:
            if missing:
                self._measure(model, objects, missing)
        except RunFailed as error:
            reason = f"the model cannot be prepared: {error}"
            self.groups += [
                groups.failed_group(model, objects, precision, self.plan, reason)
                for precision in missing
            ]
        finally:
            self._save()
            self._print_model(name, objects)

    def _print_model(self, name: str, objects: int) -> None:
        """The table of a test model and, with several images, one that sets them side by side."""
        own = self._groups_of(name, objects)
        if not own:
            return
        results = self.recommended()
        table = tables.model_table(results, own, self.options.roofline)
        self._print(tables.markdown(table) + "\n")
        if len(self.plan.images) > 1:
            each = [x for x in self.groups if case(x)[:2] == (name, objects)]
            self._print(tables.markdown(tables.cases_table(each)) + "\n")
        for answer in results.recommendations:
            if answer.model == case_name(case(own[0])):
                self._print("\n".join(sentences(answer)) + "\n")

    def _measure(self, model: Model, objects: int, precisions: Sequence[str]) -> None:
        with scratch_folder() as folder:
            if self.plan.rule.max_generations > 1:
                self.hosts.start_next()  # What follows is not timed.
            prepared = groups.prepare_model(
                model, objects, self.plan, self.hosts, folder, self.progress
            )
            self.hosts.wait_for_next()
            self._check_weights(prepared)
            self._keep_reference(prepared)
            for precision in precisions:
                self._run_group(prepared, precision)

    def _check_weights(self, model: PreparedModel) -> None:
        """Weights may be had now that an earlier run, whose groups are kept, had to do without.

        Raises:
            errors.InputError: they are not those of the groups.
        """
        for group in self._groups_of(model.name, model.objects):
            weights = group.weights
            if weights and weights.digest not in (None, model.facts.weights.digest):
                raise InputError(
                    f"{model.name} was measured at {group.precision} with other weights "
                    f"({facts.weights_note(weights)}): {WAY_OUT}"
                )

    def _keep_reference(self, model: PreparedModel) -> None:
        """What Torch fp32 found, for drawing it."""
        files = image_files(self.plan.pictures)
        named = zip(self._pictures_of(model).items(), files, self.plan.pictures)
        for (name, picture), file, image in named:
            size = (image.shape[-2], image.shape[-1])
            reference = tuple(drawn(found, size) for found in reference_detections(model, name))
            kept = self.found[picture].runs if picture in self.found else {}
            self.found[picture] = Picture(file, reference, kept, size)

    def _pictures_of(self, model: PreparedModel) -> dict[str, str]:
        """Timed input -> its name in `detections.json`."""
        return {
            name: case_name((model.name, model.objects, image))
            for name, image in image_names(self.plan, model).items()
        }

    def _run_group(self, model: PreparedModel, precision: str) -> None:
        last = (self.plan.models[-1].name, self.plan.detections[-1], self.plan.precisions[-1])
        more = (model.name, model.objects, precision) != last
        measured = groups.measure_group(
            model,
            precision,
            self.plan,
            self.hosts,
            self.progress,
            same_again=self.aa is None,
            more=more,
        )
        self.groups += measured.groups
        self.aa = self.aa or measured.aa
        if self.aa is not None:
            self.groups = list(facts.with_margin(self.groups, self.aa.resolution or 0.0))
        for name, picture in self._pictures_of(model).items():
            self.found[picture].runs[precision] = measured.found.get(name, {})
        if model.evaluator is not None:
            self.lost += model.evaluator.failures
            model.evaluator.failures.clear()
            for name, picture in model.evaluator.pictures.items():
                kept = self.found[name].runs if name in self.found else {}
                self.found[name] = replace(picture, runs={**kept, **picture.runs})
        for warning in self._warnings(measured.groups):
            self.progress.say(f"warning: {warning}")
        if measured.interruption is not None:
            raise measured.interruption
        if more:
            self.hosts.renew()
        self._save()

    def _save(self) -> None:
        """Keeps what there is. A disk that is full costs the files, not the run and its tables."""
        output = self.plan.output
        if output is None or not self.groups:
            return
        with self._keeping("results"):
            save(self.recommended(), output / RESULTS)
        with self._keeping("what was found"):
            save_found(self.found, output)
        for picture, name in zip(self.plan.pictures, image_files(self.plan.pictures)):
            with self._keeping("an image"):
                inputs.write_image(picture, output / name)

    def _write_page(self) -> None:
        """Makes the page of what there is."""
        if self.plan.output is None or not self.groups or self.failures:
            return
        with self._keeping("a page"):
            try:
                import report  # Drawing takes a second to import, and only this needs it.
            except ImportError as error:
                self.progress.say(f"no page is made: {error}")
                return
            report.write(self.plan.output / RESULTS, self.plan.output / "report.html")

    @contextlib.contextmanager
    def _keeping(self, what: str) -> Iterator[None]:
        """Takes note of why something could not be kept."""
        try:
            yield
        except (InputError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            self.failures.append(f"{what} could not be kept: {reason}")
            self.progress.say(self.failures[-1])


def _is_to_be_judged(group: Group) -> bool:
    """Whether a run could not be judged on the data set, though it did not fail."""
    return any(
        run.status == "ok" and run.accuracy is not None and run.accuracy.reason is not None
        for run in group.runs
    )


def settings(plan: Plan, options: argparse.Namespace) -> Settings:
    """The record of the command line: nothing private is in it."""
    return Settings(
        model=tuple(model.name for model in plan.models),
        config_file=options.config_file and file_name(options.config_file),
        config_digest=_digest_of(plan.models[0]),
        opts=tuple(map(file_name, options.opts)),
        module=options.module and file_name(options.module),
        module_digest=plan.models[0].module and plan.models[0].module.digest,
        fields=options.fields,
        trust_module=options.trust_module,
        backend=tuple(choice.name for choice in plan.choices),
        precision=plan.precisions,
        device=plan.device,
        source=plan.source,
        trust_config=options.trust_config,
        image=tuple(file_name(image) for image in plan.images),
        image_size=options.image_size,
        min_size=options.min_size,
        max_size=options.max_size,
        weights=file_name(options.weights),
        weights_digest=zoo.checkpoint_digest(plan.weights),
        detections=plan.detections,
        environment=tuple(x.command.name for x in plan.choices if x.command.name is not None),
        warmup=options.warmup,
        iterations=options.iterations,
        generations=options.generations,
        time_budget=options.time_budget,
        sizes=options.sizes,
        threads=plan.threads,
        seed=plan.seed,
        output=options.output and file_name(options.output),
        cache=options.cache and file_name(options.cache),
        rerun=options.rerun,
        fail_on=tuple(options.fail_on),
        coverage=options.coverage,
        costs=options.costs,
        stages=options.stages,
        roofline=options.roofline,
        trace=options.trace,
        compare_published=options.compare_published,
        bisect=options.bisect,
        debug=options.debug,
        dataset=options.dataset and file_name(options.dataset),
        dataset_digest=plan.dataset and plan.dataset.digest,
        limit=options.limit,
        min_ap_ratio=options.min_ap_ratio,
        max_latency_ms=options.max_latency_ms,
        max_memory_mb=options.max_memory_mb,
        max_prepare_s=options.max_prepare_s,
        calibration=options.calibration and file_name(options.calibration),
        calibration_annotations=options.calibration_annotations
        and file_name(options.calibration_annotations),
        calibration_limit=options.calibration_limit,
        calibration_digest=plan.calibration and plan.calibration.digest,
        tf32=plan.tf32,
        cudnn_benchmark=plan.cudnn_benchmark,
    )


def _digest_of(model: Model) -> str | None:
    """Tells the configuration of a model of the user's own from others.

    Of a program that is its text, and not what it imports.
    """
    own: Any = model.configuration or model.detectron2
    if own is None:
        return None
    text = b""
    if model.detectron2 is not None and model.detectron2.program is not None:
        text = Path(model.detectron2.program).read_bytes()
        own = replace(model.detectron2, program=None)
    text += json.dumps(asdict(own), sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def _may_lose_ap(accuracy: Accuracy) -> bool:
    if accuracy.verdict == "loses" or accuracy.reason is not None:
        return True
    # The reference itself: of an AP of 0, nothing can be lost.
    return not any(known.ap for known in accuracy.tasks.values())


def exit_code(of: Sequence[Group], fail_on: Sequence[str]) -> int:
    """1 where a run failed or mismatched or, where that is in `fail_on`, was slower or lost AP.

    What is not known to have an AP counts as lost, too; too few images to tell do not.
    """
    runs = [run for group in of for run in group.runs]
    slower = [run for run in runs if run.speedup and run.speedup.verdict == "slower"]
    losing = [run for run in runs if run.accuracy and _may_lose_ap(run.accuracy)]
    if any(run.status in ("failed", "mismatch") for run in runs):
        return 1
    return int(bool((slower and "slower" in fail_on) or (losing and "loses-ap" in fail_on)))
