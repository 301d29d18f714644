"""A group: the runs of a test model at one precision. Prepare them, take turns, check them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import TypeVar

import numpy as np

import benchmark
from benchmark import RunFailed, StopRule
from errors import InputError, Unsupported
from measure import protocol, verify
from measure.bisection import bisection
from measure.calibration import Calibration
from measure.drawing import drawn_runs
from measure.evaluation import EVALUATED, Evaluator, NotJudged, check_model, validation_of
from measure.generations import Generations
from measure.plan import Choice, Plan
from measure.progress import Progress
from measure.sizes import Stream, call_stream, rounds_rule, stream_of
from measure.worker import CALL_LIMIT_S, PREPARE_LIMIT_S, Command, Hosts, Worker, scratch_folder
from models import BLANK, DRAWN, RUN_BUDGET_S, TUNING, TURNED, Model, runner
from results import facts
from results.environment import file_name
from results.file import write_text
from results.record import (
    Accuracy,
    Agreement,
    Bisection,
    Calibrated,
    Copies,
    Coverage,
    DrawnRun,
    GpuState,
    Group,
    Machine,
    Run,
    SameAgainstSame,
    Stages,
)

# Runs that take part without a row of their own: Torch once more, and Torch at fp32.
AGAIN = "torch again"
FP32 = "torch fp32"
# Where Torch is timed against itself, speedups are to be known this well: what the machine can
# resolve is the noise of both, and has to be below the 5% that most people ask for.
AGAIN_HALF_WIDTH = 0.02
# Calls of which the stages are timed.
STAGE_CALLS = 5
# An image goes through the network several times, with every activation looked at.
CALIBRATION_LIMIT_S = 20.0
VALIDATION_LIMIT_S = 200.0
# A process that has not stood still in time this often is not waited for any more.
MOST_UNSETTLED = 3

WHERE_NOTHING_IS = "while its detections were computed where nothing is to be found"

A = TypeVar("A")

# Timed input -> label of a run -> what it found in each image of the call.
FoundBy = dict[str, dict[str, tuple[DrawnRun, ...]]]


# A model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedModel:
    """A model that was made ready.

    Attributes:
        objects: that its weights find, if they are synthetic.
        folder: has its weights and inputs, for the workers.
        facts: what else is known of it.
        reference: input -> the flat tuple that eager fp32 found, as arrays.
        evaluator: of the data set, if there is one.
    """

    model: Model
    objects: int
    folder: Path
    facts: protocol.ModelFacts
    reference: dict[str, list[np.ndarray]]

    evaluator: Evaluator | None = None

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.model.name

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Names of what it gives besides, and nobody knows how to compare."""
        return verify.not_compared(self.reference["opt"], self.facts.fields)


def prepare_model(
    model: Model, objects: int, plan: Plan, hosts: Hosts, folder: Path, progress: Progress
) -> PreparedModel:
    """Makes weights and inputs of a model and computes its reference, in its own process.

    Args:
        objects: that synthetic weights find.
        folder: an existing one, for the files that workers share.

    Raises:
        errors.InputError: image or weights cannot be had.
        benchmark.RunFailed: the process died.
    """
    what = "weights, inputs, and the reference detections"
    progress.say(f"{model.name}: {what} ({runner(model.kind)} fp32)")
    request = protocol.PrepareModel(
        model=model,
        source=plan.source,
        weights=plan.weights,
        images=plan.images,
        view=plan.view,
        detections=objects,
        seed=plan.seed,
        folder=str(folder),
        drawn=plan.sizes.drawn,
    )
    with hosts.of(Command.own()).worker(folder / "model.log", plan.threads) as worker:
        try:
            answer = worker.ask(request, PREPARE_LIMIT_S * max(1, len(plan.images)))
        except RunFailed:
            if plan.debug:
                progress.say(worker.log.read_text(errors="replace"))
            raise
    if model.module is not None:  # From here on, nobody guesses.
        model = replace(model, module=replace(model.module, fields=answer.given))
    reference = {key: load_outputs(folder / f"reference-{key}.npz") for key in answer.sizes}
    evaluator = None
    if plan.dataset is not None:
        check_model(plan.dataset, model, answer.fields, answer.weights.source)
        kept = folder if plan.output is None else plan.output / EVALUATED
        evaluator = Evaluator(
            plan.dataset,
            model,
            plan.view,
            (answer.sizes["min"][0], answer.sizes["max"][0]),
            answer.fields,
            answer.weights.digest,
            plan,
            folder,
            kept,
            progress,
        )
    prepared = PreparedModel(model, objects, folder, answer, reference, evaluator)
    if prepared.not_compared:
        progress.say(f"{model.name}: not compared: {', '.join(prepared.not_compared)}")
    return prepared


def load_outputs(path: Path) -> list[np.ndarray]:
    """The flat tuple that a worker has left in a file."""
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in arrays.files]


def reference_detections(model: PreparedModel, name: str) -> list[verify.Detections]:
    """What eager fp32 found in each image of an input; nothing where that is malformed."""
    try:
        return verify.split(model.reference[name], model.facts.fields)
    except verify.Malformed:
        return []


def image_names(plan: Plan, model: PreparedModel) -> dict[str, str | None]:
    """Timed input -> the name of its image; None where there is but one image."""
    timed = model.facts.timed
    if len(timed) == 1:
        return {timed[0]: None}
    # They are to stand in a cell of a table.
    names = [re.sub(r"[|\s]+", " ", file_name(path)) for path in plan.images]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for place, name in enumerate(names, start=1)]
    return dict(zip(timed, names, strict=True))


# What is measured ------------------------------------------------------------------------------


@dataclass
class Running:
    """One run while it is being measured: its worker, and what is known of it so far.

    Attributes:
        key: tells it from the others that take turns.
        precision: requested.
        calls_s: seconds of each round's calls, one for each input that is timed.
        copies: what a GPU copied in these; empty on a CPU.
        new_sizes: what came of the calls of new sizes, in order.
        agreements: input -> whether its detections are those of the reference.
        found: timed input -> what was found in each image of the call.
        unsettled: how often its process still computed when the next had its turn.
        settled: whether that happened only a few times within the rounds.
    """

    key: str
    choice: Choice
    precision: str
    worker: Worker | None = None
    log: Path | None = None
    status: str = "ok"
    reason: str | None = None
    facts: protocol.RunFacts | None = None
    warmup_s: tuple[float, ...] = ()
    calls_s: list[tuple[float, ...]] = field(default_factory=list)
    copies: list[tuple[Copies, ...]] = field(default_factory=list)
    new_sizes: list[protocol.CalledNewSize] = field(default_factory=list)
    size_seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    first_call_s: dict[str, float] = field(default_factory=dict)
    memory: protocol.Memory | None = None
    coverage: Coverage | None = None
    artifact_mb: float | None = None
    effective_precision: str | None = None
    agreements: dict[str, Agreement] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    bisection: Bisection | None = None
    found: dict[str, tuple[DrawnRun, ...]] = field(default_factory=dict)
    artifacts: tuple[str, ...] = ()
    unsettled: int = 0
    settled: bool = True

    def ask(self, request: protocol.Request[A], limit_s: float = CALL_LIMIT_S) -> A:
        """Asks its worker, and waits until that stands still, as others have their turns next.

        Raises:
            benchmark.RunFailed, errors.InputError, errors.Unsupported: see `Worker.ask`.
        """
        answer = self.worker.ask(request, limit_s)
        if self.unsettled < MOST_UNSETTLED and not self.worker.settle():
            self.unsettled += 1
        return answer

    @property
    def is_wrong(self) -> bool:
        """Whether it finds something else than the reference, in its inputs or on the data set."""
        loses = self.accuracy is not None and self.accuracy.verdict == "loses"
        return self.status == "mismatch" or (self.status == "ok" and loses)

    @property
    def label(self) -> str:
        """What the table calls it."""
        return self.choice.labelled(self.facts and self.facts.label)

    def give_up(self, status: str, reason: str) -> None:
        """Takes note of why it goes no further, and ends its process."""
        self.status, self.reason = status, reason
        self.end()

    def end(self, politely: bool = False) -> None:
        """Ends its process, if there is one; politely, it can clear away what engines opened."""
        if self.worker is not None:
            self.worker.stop() if politely else self.worker.kill()
            self.worker = None


@dataclass(frozen=True)
class Measured:
    """What came of a group.

    Attributes:
        groups: with several images that of all together, then one for each; none where an
            interruption came before there was something in it.
        aa: where Torch took part twice, and could be measured.
        interruption: what ended it early, to be raised when the rest has been kept.
    """

    groups: tuple[Group, ...]
    found: FoundBy
    aa: SameAgainstSame | None = None
    interruption: BaseException | None = None


def runs_for(plan: Plan, precision: str) -> list[Running]:
    """The rows of a group: the baseline, and the backends that know that precision.

    A baseline that does not know it runs at fp32.
    """
    runs = []
    for choice in plan.choices:
        if precision in choice.backend.precisions[plan.device]:
            runs.append(Running(choice.name, choice, precision))
        elif choice.is_baseline:
            runs.append(Running(choice.name, choice, "fp32"))
    return runs


def extra_runs(runs: Sequence[Running], same_again: bool) -> list[Running]:
    """Runs that are timed with a group but have no row.

    Torch at fp32 takes part in the groups of lower precision: it is what a user has today, and
    only calls made side by side give a ratio to it. Where PyTorch runs what was optimized in
    another environment, the Torch of that environment takes part.
    """
    baseline = runs[0]
    extras = []
    if same_again:
        extras.append(Running(AGAIN, baseline.choice, baseline.precision))
    if baseline.precision != "fp32":
        extras.append(Running(FP32, baseline.choice, "fp32"))
    known = {run.choice.command.words for run in runs if run.choice.backend.rank == 0}
    for run in runs:
        command = run.choice.command
        if run.choice.backend.in_pytorch and command.words not in known:
            known.add(command.words)
            choice = Choice(baseline.choice.backend, command)
            extras.append(Running(f"torch of {command.name}", choice, run.precision))
    return extras


def measure_group(
    model: PreparedModel,
    precision: str,
    plan: Plan,
    hosts: Hosts,
    progress: Progress,
    same_again: bool = False,
    more: bool = False,
) -> Measured:
    """Measures all runs of a test model at one precision, in turns.

    Args:
        same_again: whether a second Torch takes part, to see what difference can be resolved.
        more: whether another group follows, so that its hosts may start when this one is checked.
    """
    measurement = Measurement(model, precision, plan, progress, same_again)
    try:
        measurement.measure(hosts, more)
    except BaseException as interruption:
        return measurement.result(interruption)
    return measurement.result()


class Measurement:
    """A group while it is measured: the one place where what is measured is collected."""

    def __init__(
        self, model: PreparedModel, precision: str, plan: Plan, progress: Progress, same_again: bool
    ) -> None:
        self.model, self.precision, self.plan, self.progress = model, precision, plan, progress
        self.rule = _rule(plan, same_again)
        self.runs = runs_for(plan, precision)
        self.extras = extra_runs(self.runs, same_again)
        self.rounds = benchmark.Rounds()
        self.stream = Stream()
        self.machine: Machine | None = None
        self.gpu: list[GpuState] = []
        self.stages: Stages | None = None

    @property
    def all_runs(self) -> list[Running]:
        """Those with a row, and the others that take turns."""
        return self.runs + self.extras

    @property
    def generations(self) -> tuple[int, ...]:
        """Complete rounds of each generation that has any."""
        return tuple(filter(None, self.rounds.generations))

    def measure(self, hosts: Hosts, more: bool) -> None:
        """Does it all; what comes of it is collected on the way."""
        try:
            with scratch_folder() as folder:
                for run in self.all_runs:
                    self.prepare(run, hosts, folder)
                self.time(hosts, folder)
                self.call_new_sizes()
                if self.plan.stages:
                    self.stages = self.time_stages()
                for run in self.runs:
                    self.check(run, folder)
                self.evaluate(hosts)
                self.bisect(hosts, folder)
                if more:
                    hosts.start_next()  # Not before: what is timed would notice their imports.
                self.report()
                for run in self.all_runs:
                    if run.worker is not None:
                        run.worker.dismiss()
                for run in self.all_runs:
                    run.end(politely=True)
        except BaseException:
            # Also where the rounds were made: what was not checked is measured again.
            self.rounds.stopped = "interrupted"
            raise
        finally:
            for run in self.all_runs:
                run.end()

    def prepare(self, run: Running, hosts: Hosts, folder: Path) -> None:
        """Starts a run's worker, prepares and warms it; a failure costs this run only."""
        model, plan = self.model, self.plan
        self.progress.say(f"{model.name}: preparing {run.label} {run.precision}")
        run.log = folder / f"{run.key}.log"
        request = self.request(run)
        calibration = plan.calibration if run.precision == "int8" else None
        limit_s = _prepare_limit_s(calibration, request.validation is not None)
        try:
            self.start(run, hosts)
            run.facts = run.ask(request, limit_s)
            run.artifacts = self.keep(run.choice, run.facts.artifacts)
            limit_s = PREPARE_LIMIT_S * len(model.facts.timed)
            run.warmup_s = run.ask(protocol.Warm.by(plan.warm_up), limit_s).seconds
        except Unsupported as error:
            run.give_up("unsupported", str(error))
        except RunFailed as error:
            run.give_up("failed", str(error))
        except InputError as error:
            if run.choice.command.name is None:
                raise
            # The cache, for example, cannot be written in there.
            run.give_up("failed", f"{run.choice.command}: {error}")

    def request(self, run: Running, saved: str | None = None) -> protocol.PrepareRun:
        """The request to prepare a run.

        Args:
            saved: folder in which its engine is saved; what int8 costs has been judged then.
        """
        model, plan = self.model, self.plan
        calibration = plan.calibration if run.precision == "int8" else None
        validation = self.validation if calibration and saved is None else None
        return protocol.PrepareRun(
            model=model.model,
            backend=run.choice.backend.name,
            precision=run.precision,
            device=plan.device,
            source=plan.source if run.choice.command.name is None else "bundled",
            folder=str(model.folder),
            cache=plan.cache and str(plan.cache),
            calibration=None if calibration is None else calibration.path,
            validation=validation if isinstance(validation, protocol.Validate) else None,
            saved=saved,
        )

    def start(self, run: Running, hosts: Hosts) -> None:
        """Starts a worker for a run.

        Raises:
            benchmark.RunFailed: the environment cannot be had any more.
        """
        try:
            command, plan = run.choice.command, self.plan
            run.worker = hosts.of(command).start(run.log, plan.threads, plan.tf32)
        except InputError as error:
            raise RunFailed(str(error)) from None

    @property
    def validation(self) -> protocol.Validate | str | None:
        """How int8 is judged while it is made, or why it cannot be."""
        known, calibration = self.model.facts, self.plan.calibration
        if calibration is None:
            return None
        least = self.plan.min_ap_ratio
        of = (self.model.model, known.fields, known.weights.source, least)
        return validation_of(calibration, *of)

    def keep(self, choice: Choice, artifacts: dict[str, str]) -> tuple[str, ...]:
        """Writes texts that a backend wants kept; returns the names of their files."""
        if self.plan.output is None:
            return ()
        # A backend that is measured in two environments names them the same in both.
        place = "" if choice.environment is None else f"{choice.environment}."
        named = {self.file_name(place + name): text for name, text in artifacts.items()}
        kept = []
        for name, text in named.items():
            try:
                write_text(self.plan.output / name, text)
                kept.append(name)
            except InputError as error:
                self.progress.say(f"{choice.labelled()}: {error}")
        return tuple(sorted(kept))

    def file_name(self, name: str) -> str:
        """The name of a run's file in the output folder."""
        objects = self.model.objects
        return name if objects == facts.OBJECTS else f"{objects}-objects.{name}"

    def time(self, hosts: Hosts, folder: Path) -> None:
        """Makes the rounds, and sees what else the machine did."""
        timed = self.model.facts.timed
        live = [run for run in self.all_runs if run.worker is not None]
        for run in live:
            run.unsettled = 0  # What it did while it was prepared disturbed no turn.
        self.rule = _with_budget(self.rule, len(live) * len(timed))
        self.stream = self.stream_of(self.rule)
        self.rule = rounds_rule(self.rule, self.stream)
        self.read_gpu()
        if live:
            generations = Generations(
                live,
                self.rounds,
                hosts,
                folder,
                start=lambda run: self.start(run, hosts),
                request=self.request,
                warm_up=self.plan.later_warm_up,
                timed_call=lambda run: _timed_call(run, len(timed)),
                seen=self.read_memory,
                say=self.progress.say,
            )
            title = f"{self.model.name} {self.precision}"
            with self.progress.rounds(title, self.rule) as advance:
                benchmark.run_rounds(
                    generations.calls(),
                    self.runs[0].key,
                    self.rule,
                    self.plan.seed,
                    progress=advance,
                    into=self.rounds,
                    renew=generations.renew,
                    renewal_s=generations.expected_s(),
                )
            self.machine = generations.machine()
        else:
            self.rounds.stopped = "all failed"
        for run in live:
            if run.key in self.rounds.failures:
                run.give_up("failed", self.rounds.failures[run.key])
            run.settled = run.unsettled < MOST_UNSETTLED
        for run in self.extras:
            if run.status != "ok":
                self.progress.say(f"{run.key}, which has no row: {run.status}: {run.reason}")
        self.read_gpu()

    def read_memory(self, run: Running) -> None:
        """Takes note of the most memory that a run has taken in one of its processes."""
        known = self.known(run, "how much memory it took", protocol.ReadMemory())
        run.memory = _larger(run.memory, known)

    def stream_of(self, rule: StopRule) -> Stream:
        """The calls of new sizes, as far as a budget allows for them.

        Args:
            rule: with the budget of the rounds and these calls.
        """
        if self.model.facts.drawn_failure is not None:
            return Stream(reason=self.model.facts.drawn_failure)
        live = [run for run in self.runs if run.worker is not None]
        calls_s = [median(run.warmup_s[-3:]) for run in live if run.warmup_s]
        return stream_of(self.plan.sizes, calls_s, rule.budget_s)

    def call_new_sizes(self) -> None:
        """Calls the runs that have a row with images of sizes that they have never seen."""
        title = f"{self.model.name} {self.precision}"
        call_stream(self.stream, self.runs, title, self.plan.seed, self.progress)

    def read_gpu(self) -> None:
        """Takes note of how the GPU is doing, as the first worker that lives sees it."""
        live = [run for run in self.runs if run.worker is not None]
        if self.plan.device != "cuda" or not live:
            return
        state = self.known(live[0], "how the GPU is doing", protocol.ReadGpu())
        if state is not None and state != GpuState():
            self.gpu.append(state)

    def time_stages(self) -> Stages | None:
        """Medians of each stage of the eager module; None where it runs at another precision."""
        baseline = self.runs[0]
        if baseline.precision != self.precision:
            return None
        answer = self.known(baseline, "where its time goes", protocol.TimeStages(STAGE_CALLS))
        if answer is None:
            return None
        names = [stage.name for stage in fields(Stages)]
        return Stages(
            **{name: median(getattr(call, name) for call in answer.calls) for name in names}
        )

    def known(self, run: Running, what: str, request: protocol.Request[A]) -> A | None:
        """The answer to a question that is beside the point: a failure costs the answer alone.

        Args:
            what: is asked for, in the words of the message.
        """
        if run.worker is None:
            return None
        try:
            return run.ask(request)
        except (RunFailed, Unsupported, InputError) as error:
            self.progress.say(f"{run.label}: it is not known {what}: {error}")
            return None

    def check(self, run: Running, folder: Path) -> None:
        """Compares what a run finds with the reference, in all inputs."""
        if run.worker is None:
            return
        self.progress.say(f"{self.model.name} {run.precision}: checking {run.key}")
        self.read_memory(run)
        run.coverage = self.known(run, "how much the engine took", protocol.ReadCoverage())
        failure = self.model.facts.blank_failure
        if failure is not None and run.choice.is_baseline:
            run.give_up("failed", f"{WHERE_NOTHING_IS}: {failure}")
            return
        outputs = {}
        for name in self.inputs_to_check(run):
            try:
                outputs[name] = self.detect(run, name, folder)
            except (RunFailed, InputError, Unsupported, OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                several = len(self.inputs_to_check(run)) > 1
                where = "while its detections were computed" + f" at {name}" * several
                run.give_up("failed", f"{WHERE_NOTHING_IS if name == BLANK else where}: {reason}")
                return
        if self.plan.costs:
            artifact = self.known(run, "how large its artifact is", protocol.ReadArtifact())
            run.artifact_mb = artifact and artifact.mb
        # Last, as PyTorch's profiler slows a process down.
        effective = self.known(run, "what it computes in", protocol.ReadPrecision())
        run.effective_precision = effective.precision if effective else run.facts.precision
        if self.plan.trace and run.choice.backend.in_pytorch:
            self.trace(run)
        if not self.is_reference(run):
            self.judge(run, outputs)

    def evaluate(self, hosts: Hosts) -> None:
        """Evaluates the runs on the data set, Torch fp32 first; a failure costs a run only."""
        evaluator = self.model.evaluator
        if evaluator is None:
            return
        reference = next(
            (run for run in self.all_runs if run.choice.is_baseline and run.precision == "fp32"),
            None,
        )
        runs = [run for run in self.runs if run is not reference]
        if reference is not None and evaluator.reference is None:
            runs.insert(0, reference)
        for run in runs:
            if run.worker is None:
                continue
            if evaluator.reference is None and run is not reference:
                run.accuracy = Accuracy(reason="Torch fp32 was not evaluated")
                continue
            key = "torch" if run is reference else run.key
            name = self.evaluated_name(run, key)
            try:
                known = evaluator.evaluate(run.worker, hosts, name, run.facts)
                run.accuracy = known  # Also where what follows is interrupted.
                if run.status == "mismatch" or known.has_less:
                    worst_of = hosts, name, run.label, run.precision
                    run.accuracy = evaluator.with_worst(known, *worst_of)
            except NotJudged as error:
                run.accuracy = Accuracy(reason=str(error))
                self.progress.say(f"{run.label} {run.precision}: no AP: {error}")
            except (RunFailed, Unsupported, InputError) as error:
                run.accuracy = Accuracy(reason=str(error))
                run.give_up("failed", f"on the data set: {error}")
        if reference is not None and reference.accuracy is None:
            reference.accuracy = evaluator.reference

    def evaluated_name(self, run: Running, key: str | None = None) -> str:
        """What an evaluation calls a run, in the names of its files."""
        return f"{self.model.name}.{key or run.key}.{run.precision}"

    def bisect(self, hosts: Hosts, folder: Path) -> None:
        """Looks for the part that each run which went wrong first leaves the reference in."""
        if not self.plan.bisect:
            return
        wrong = [run for run in self.runs if run.is_wrong]
        for run in wrong:
            run.bisection = self.bisected(run, hosts, folder)
        if not wrong:
            self.progress.say(
                f"{self.model.name} {self.precision}: no run mismatches or loses AP, so that "
                "--bisect has nothing to look for"
            )

    def bisected(self, run: Running, hosts: Hosts, folder: Path) -> Bisection:
        """The part that a run first leaves the reference in; a failure costs this answer alone."""
        if run.worker is None:
            return Bisection(reason="its process has ended")
        label = f"{run.label} {run.precision}"
        self.progress.say(f"{self.model.name}: looking for the part that {label} goes wrong in")
        name, image, file = "opt", "opt", None
        outputs = folder / f"{run.key}-parts.npz"
        calibration = self.plan.calibration if run.precision == "int8" else None
        try:
            if run.status == "mismatch":
                name = image = facts.worst_input(run.agreements)
            else:
                evaluated = self.evaluated_name(run)
                image, file = self.model.evaluator.read_worst(hosts, evaluated) or (name, None)
            request = protocol.Watch(name, file, str(outputs))
            answer = run.ask(request, _prepare_limit_s(calibration, is_judged=False))
            return bisection(answer, outputs, image, run.effective_precision, self.model.facts)
        except (RunFailed, Unsupported, InputError, NotJudged, OSError) as error:
            return Bisection(image, reason=str(error))

    def is_reference(self, run: Running) -> bool:
        """Whether it is the computation that all detections are compared with."""
        return run.choice.is_baseline and run.precision == "fp32" and self.plan.device == "cpu"

    def inputs_to_check(self, run: Running) -> list[str]:
        """Inputs that a run is called with once more: those it was just timed on come first."""
        timed, sizes = self.model.facts.timed, self.model.facts.sizes
        # Of one size they are the image of `opt` itself: a file may take no other.
        others = [
            name for name in sizes if name not in (*timed, BLANK) and sizes[name] != sizes["opt"]
        ]
        if self.is_reference(run):
            return others if self.times_sizes else []
        return [*timed, *others, *(name for name in sizes if name == BLANK)]

    @property
    def times_sizes(self) -> bool:
        """Whether someone will read how long calls at other sizes take."""
        return self.plan.costs

    def detect(self, run: Running, name: str, folder: Path) -> list[np.ndarray] | str:
        """What a run finds in an input, as arrays, or why that is malformed."""
        file = folder / f"{run.key}-{name}.npz"
        is_timed = name in self.model.facts.timed
        is_read = self.times_sizes and not is_timed and name != BLANK
        answer = run.ask(protocol.Detect(name, str(file), repeat=is_read))
        if is_read:
            run.size_seconds[name] = answer.seconds
            run.first_call_s[name] = answer.first_s
        if answer.malformed is not None:
            return answer.malformed
        outputs = load_outputs(file)
        file.unlink()
        return outputs

    def trace(self, run: Running) -> None:
        """Keeps a trace of a call."""
        name = f"{self.model.name}.{run.key}.{run.precision}.trace.json"
        name = self.file_name(name)
        path = self.plan.output / name
        if self.known(run, "what a trace of it looks like", protocol.Trace(str(path))) is None:
            return
        if path.exists():
            run.artifacts = (*run.artifacts, name)
        else:
            self.progress.say(f"{run.label}: {name} went to another folder of the same name")

    def judge(self, run: Running, outputs: dict[str, list[np.ndarray] | str]) -> None:
        """Whether detections are those of the reference; else the run is a mismatch."""
        known, precision = self.model.facts, run.effective_precision
        listed = (known.score_threshold, known.limit)
        for name, found in outputs.items():
            if isinstance(found, str):
                run.agreements[name] = Agreement("error", f"the output is malformed: {found}")
                continue
            both = (self.model.reference[name], found, known.fields, precision)
            run.agreements[name] = verify.verify(*both, *listed)
            if name in known.timed:
                place = known.timed.index(name)
                run.found[name] = drawn_runs(*both, self.plan.pictures[place].shape[-2:])
        worst = facts.worst(run.agreements)
        if worst.is_wrong:
            run.status, run.reason = "mismatch", worst.reason

    def report(self) -> None:
        """Says which runs went wrong; with `debug`, what their workers printed."""
        for run in self.runs:
            if run.status == "ok":
                continue
            self.progress.say(f"{run.label}: {run.status}: {run.reason}")
            if self.plan.debug and run.log is not None and run.log.exists():
                self.progress.say(run.log.read_text(errors="replace"))

    # Into records ----------------------------------------------------------------------------

    def result(self, interruption: BaseException | None = None) -> Measured:
        """What came of it."""
        groups: tuple[Group, ...] = ()
        if self.rounds.rounds or any(run.status != "ok" for run in self.runs):
            groups = (self.group(), *self.one_by_one())
        found: FoundBy = {}
        for run in self.runs:
            for name, images in run.found.items():
                if images:
                    found.setdefault(name, {})[run.label] = images
        samples = tuple(tuple(self.samples(key)) for key in (self.runs[0].key, AGAIN))
        aa = None
        if all(samples) and interruption is None and AGAIN not in self.rounds.failures:
            speedup = benchmark.speedup(*samples, self.plan.seed, self.generations)
            resolution = benchmark.resolution(speedup)
            of = (self.model.name, self.precision, speedup, resolution, samples)
            aa = SameAgainstSame(*of, self.generations)
        return Measured(groups, found, aa, interruption)

    def one_by_one(self) -> list[Group]:
        """A group for each image, of the same rounds, where there are several.

        What is not of one image (preparation, coverage, the state of the machine) is with the group
        of all of them only.
        """
        names = image_names(self.plan, self.model)
        if len(names) == 1:
            return []
        return [self.group(place, image) for place, image in enumerate(names.values())]

    def group(self, place: int | None = None, image: str | None = None) -> Group:
        """The record.

        Args:
            place, image: of the image that it is about; None: all together.
        """
        known = self.model.facts
        timed = known.timed if place is None else known.timed[place : place + 1]
        inputs = _inputs_of(timed, known.sizes, place)
        flops = [known.flops[name] for name in timed]
        found = [reference_detections(self.model, name) for name in timed]
        together = place is None
        evaluator = self.model.evaluator
        calibration = self.plan.calibration if self.precision == "int8" else None
        return Group(
            model=self.model.name,
            export=self.model.model.kind,
            precision=self.precision,
            images_per_call=self.model.model.images_per_call,
            image_sizes={name: known.sizes[name] for name in inputs},
            rounds=self.rounds.rounds,
            generations=self.generations,
            stopped=self.rounds.stopped,
            runs=tuple(self.record(run, inputs, place) for run in self.runs),
            image=image,
            objects=self.model.objects,
            found=_count([image for images in found for image in images]),
            flops=None if None in flops else sum(flops) // len(flops),
            image_digest=" ".join(known.image_digests[name] for name in timed),
            weights=known.weights,
            half_width=self.rule.half_width,
            budget_s=self.rule.budget_s,
            stages=self.stages if together else None,
            machine=self.machine if together else None,
            gpu=tuple(self.gpu) if together else (),
            fp32_samples_s=tuple(self.samples(FP32, place)),
            not_compared=self.model.not_compared,
            evaluated=evaluator.evaluated() if together and evaluator else None,
            calibrated=self.calibrated() if together and calibration else None,
            new_sizes=self.stream.sizes[: self.called_sizes] if together else (),
            no_new_sizes=self.stream.reason if together else None,
        )

    @property
    def called_sizes(self) -> int:
        """New sizes that some run was called with."""
        return max(len(run.new_sizes) for run in self.runs)

    def calibrated(self) -> Calibrated:
        """The record of what int8 is calibrated on."""
        reason = self.validation
        known = self.plan.calibration.record
        return replace(known, not_judged=reason) if isinstance(reason, str) else known

    def samples(self, key: str, place: int | None = None) -> list[float]:
        """Seconds of a run's timed calls, means over the images, or of one of them."""
        means = self.rounds.samples.get(key, [])
        if place is None:
            return means
        calls = next((run.calls_s for run in self.all_runs if run.key == key), [])
        return [call[place] for call in calls[: len(means)]]

    def record(self, run: Running, inputs: Iterable[str], place: int | None) -> Run:
        """The record of a run, of all inputs together or of one image."""
        together = place is None
        agreements = {name: run.agreements[name] for name in inputs if name in run.agreements}
        status, reason = _status_of(run, agreements)
        known, memory = run.facts, run.memory
        samples = tuple(self.samples(run.key, place))
        images = self.model.model.images_per_call
        prepare = known.prepare if known and together else None
        return Run(
            backend=run.choice.backend.name,
            environment=run.choice.environment,
            label=run.label,
            baseline=run.choice.is_baseline,
            requested_precision=run.precision,
            effective_precision=run.effective_precision or (known and known.precision),
            provider=known and known.provider,
            threads=known and known.threads,
            status=status,
            reason=reason,
            samples_s=samples,
            warmup_s=run.warmup_s if together else (),
            copies=median_copies(run.copies, place),
            size_seconds={
                name: run.size_seconds[name] for name in inputs if name in run.size_seconds
            },
            first_call_s={
                name: run.first_call_s[name] for name in inputs if name in run.first_call_s
            },
            new_size_s=tuple(call.seconds for call in run.new_sizes) if together else (),
            new_size_resident_mb=_resident_mb(run) if together else (),
            prepare=prepare,
            cached=bool(known and known.cached),
            artifact_mb=run.artifact_mb,
            peak_memory_mb=memory and memory.peak_memory_mb,
            peak_device_memory_mb=memory and memory.peak_device_memory_mb,
            statistics=benchmark.summarize(samples, images) if samples else None,
            speedup=None if run.choice.is_baseline else self.speedup(self.runs[0].key, run, place),
            speedup_over_fp32=self.speedup(FP32, run, place),
            speedup_over_own_torch=self.speedup(self.own_torch(run), run, place),
            break_even=self.break_even(run) if together else None,
            detections=agreements or None,
            coverage=(run.coverage or known.coverage) if known and together else Coverage(),
            python=known and known.python,
            versions=known.versions if known else {},
            artifacts=run.artifacts if together else (),
            settled=run.settled,
            accuracy=run.accuracy if together else None,
            control=known.control if known and together else None,
            bisection=run.bisection if together else None,
        )

    def speedup(
        self, over: str | None, run: Running, place: int | None
    ) -> benchmark.Speedup | None:
        """The speedup of a run over another one; None where one of them has no samples."""
        baseline = [] if over is None else self.samples(over, place)
        samples = self.samples(run.key, place)
        if not (baseline and samples):
            return None
        return benchmark.speedup(baseline, samples, self.plan.seed, self.generations)

    def own_torch(self, run: Running) -> str | None:
        """The key of Torch in the environment of a run, if that is not the suite's own."""
        command = run.choice.command
        if command.name is None or run.choice.backend.rank == 0:
            return None
        others = [x for x in self.all_runs if x.choice.backend.rank == 0]
        return next((x.key for x in others if x.choice.command.words == command.words), None)

    def break_even(self, run: Running) -> benchmark.BreakEven | None:
        """When the time to prepare has paid back."""
        baseline = self.runs[0]
        if run is baseline or run.facts is None or baseline.facts is None:
            return None
        samples = [self.samples(x.key) for x in (baseline, run)]
        if not all(samples):
            return None
        extra_s = run.facts.prepare.own - baseline.facts.prepare.own
        images = self.model.model.images_per_call
        of = (*samples, extra_s, images, self.plan.seed)
        return benchmark.break_even(*of, self.generations)


def _larger(one: protocol.Memory | None, other: protocol.Memory | None) -> protocol.Memory | None:
    """The peaks of two processes."""
    if one is None or other is None:
        return one or other
    device = [x.peak_device_memory_mb for x in (one, other) if x.peak_device_memory_mb is not None]
    resident = max(one.peak_memory_mb, other.peak_memory_mb)
    return protocol.Memory(resident, max(device, default=None))


def _resident_mb(run: Running) -> tuple[float, ...]:
    """Memory after each call of a new size; empty where it is not known."""
    known = [call.resident_mb for call in run.new_sizes]
    return tuple(each for each in known if each is not None)


def _count(found: Sequence[verify.Detections]) -> int | None:
    """Detections in all images; None of a model that lists nothing."""
    if found and not any(image.has_objects for image in found):
        return None
    return sum(len(image.scores) for image in found)


def _prepare_limit_s(calibration: Calibration | None, is_judged: bool) -> float:
    """Seconds to prepare a run, of which each image that it is calibrated on takes some.

    Args:
        is_judged: whether layers are sought that stay in fp32, which calls it many times.
    """
    images = 0 if calibration is None else calibration.record.images
    return PREPARE_LIMIT_S + images * (VALIDATION_LIMIT_S if is_judged else CALIBRATION_LIMIT_S)


def _timed_call(run: Running, images: int) -> Callable[[], float]:
    """A turn of a run: a call for each image. With several, their mean is what counts."""

    def call() -> float:
        try:
            answer = run.ask(protocol.TimedCalls(), CALL_LIMIT_S * images)
        except (InputError, Unsupported) as error:
            raise RunFailed(str(error)) from None
        run.calls_s.append(answer.seconds)
        run.copies += filter(None, [answer.copies])
        return fmean(answer.seconds)

    return call


def median_copies(calls: Sequence[tuple[Copies, ...]], place: int | None) -> Copies | None:
    """Medians over turns of what a GPU copied in them; None where there is none.

    Args:
        calls: of each turn, one for each input that is timed.
        place: of the input that it is about; None: the means over all.
    """
    if not calls:
        return None
    own = [call if place is None else call[place : place + 1] for call in calls]
    return Copies(
        upload_s=median(fmean(x.upload_s for x in call) for call in own),
        download_s=median(fmean(x.download_s for x in call) for call in own),
    )


def _rule(plan: Plan, same_again: bool) -> StopRule:
    if not same_again:
        return plan.rule
    return replace(plan.rule, half_width=min(plan.rule.half_width, AGAIN_HALF_WIDTH))


def _with_budget(rule: StopRule, calls: int) -> StopRule:
    """The rule with a budget that grows with the calls of a round, unless one was asked for."""
    if rule.is_fixed or rule.budget_s is not None:
        return rule
    return replace(rule, budget_s=RUN_BUDGET_S * calls)


def _inputs_of(timed: Sequence[str], sizes: Iterable[str], place: int | None) -> list[str]:
    """Inputs that a group is about: engines are made for the first image's range of sizes."""
    if place is None:
        return list(sizes)
    if timed[0] != "opt":
        return list(timed)
    return [name for name in (*TUNING, TURNED, *DRAWN) if name in sizes]


def _status_of(run: Running, agreements: dict[str, Agreement]) -> tuple[str, str | None]:
    """What became of a run, as far as it is about some of its inputs."""
    if run.status != "mismatch" or not agreements:
        return run.status, run.reason
    worst = facts.worst(agreements)
    return ("mismatch", worst.reason) if worst.is_wrong else ("ok", None)


def failed_group(model: Model, objects: int, precision: str, plan: Plan, reason: str) -> Group:
    """The group of a model that could not even be prepared."""
    runs = [
        Run(
            backend=run.choice.backend.name,
            environment=run.choice.environment,
            label=run.label,
            baseline=run.choice.is_baseline,
            requested_precision=run.precision,
            status="failed",
            reason=reason,
        )
        for run in runs_for(plan, precision)
    ]
    return Group(
        model=model.name,
        export=model.kind,
        precision=precision,
        images_per_call=model.images_per_call,
        image_sizes={},
        rounds=0,
        stopped="all failed",
        runs=tuple(runs),
        objects=objects,
        half_width=plan.rule.half_width,
        budget_s=plan.rule.budget_s,
    )


def measure_peaks(precisions: Sequence[str], plan: Plan, hosts: Hosts) -> dict[str, float]:
    """Operations per second that PyTorch reaches, by effective precision, where it has kernels.

    Raises:
        benchmark.RunFailed: the process died.
    """
    log, host = hosts.folder / "peak.log", hosts.of(Command.own())
    with host.worker(log, plan.threads, plan.tf32) as worker:
        peaks = [worker.ask(protocol.MeasurePeak(each, plan.device)) for each in precisions]
    return {peak.precision: peak.operations_per_s for peak in peaks if peak.operations_per_s}
