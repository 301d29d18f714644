"""What is done with a test model: prepare its runs, let them take turns, check what they find."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import benchmark
import machine
import results
import verify
from backends.base import Backend
from benchmark import RunFailed, StopRule, WarmUp
from catalog import MODELS, RUN_BUDGET_S, TUNING
from errors import Unsupported
from progress import Progress
from worker import CALL_LIMIT_S, PREPARE_LIMIT_S, Job, ModelRequest, Worker

# Runs that take part without a row of their own: Torch once more, and Torch at fp32.
AGAIN = "torch again"
# Where Torch is timed against itself, speedups are to be known this well: what the machine can
# resolve is the noise of both, and shall be told in less than the 5% that most people ask for.
AGAIN_HALF_WIDTH = 0.02
FP32 = "torch fp32"
# Calls of which the stages are timed.
STAGE_CALLS = 5


@dataclass(frozen=True)
class Plan:
    """What is asked for, with all defaults filled in.

    Attributes:
        models: names of test models, in the order in which they are measured.
        backends: the baseline first.
        precisions: requested, each a group of its own.
        images: paths; empty for the default image.
        image_size: height and width, or None for the images' own.
        detections: how many objects synthetic weights find; with several, each is measured.
        warm_up, rule: of the timing.
        output: directory for results and the files that backends want kept, or None.
        cache: directory in which engines are kept between invocations, or None.
        pictures: the images that were read, 3 x H x W, to be kept beside the results.
        stages: whether the stages of the eager module are timed.
        trace: whether a profile of a call is kept in `output`, where PyTorch can make one.
        debug: whether to show what the worker of a failed run printed.
    """

    models: Tuple[str, ...]
    backends: Tuple[Backend, ...]
    precisions: Tuple[str, ...]
    device: str
    source: str
    images: Tuple[str, ...]
    image_size: Optional[Tuple[int, int]]
    weights: str
    detections: Tuple[int, ...]
    warm_up: WarmUp
    rule: StopRule
    threads: int
    seed: int
    output: Optional[Path]
    debug: bool
    cache: Optional[Path] = None
    pictures: Sequence[Any] = ()
    stages: bool = False
    trace: bool = False

    def runs_for(self, precision: str) -> List[Run]:
        """The rows of a group: the baseline, and the backends that know that precision.

        A baseline that does not know it runs at fp32.
        """
        runs = []
        for backend in self.backends:
            if precision in backend.precisions[self.device]:
                runs.append(_new_run(backend.name, backend, precision))
            elif backend.rank == 0:
                runs.append(_new_run(backend.name, backend, "fp32"))
        return runs


@dataclass
class Run:
    """One run while it is being measured: its process and what is known of it so far.

    Attributes:
        calls_s: seconds of each round's calls, one for each input that is timed.
        agreements: input -> whether its detections are those of the reference.
        found: timed input -> what was found in each image of the call, for `detections.json`.
    """

    key: str
    backend: Backend
    record: Dict[str, Any]
    worker: Optional[Worker] = None
    log: Optional[Path] = None
    calls_s: List[List[float]] = field(default_factory=list)
    agreements: Dict[str, verify.Agreement] = field(default_factory=dict)
    found: Dict[str, List[Dict[str, Any]]] = field(default_factory=dict)

    def give_up(self, status: str, reason: str) -> None:
        """Takes note of why it goes no further, and ends its process."""
        self.record.update(status=status, reason=reason)
        self.end()

    def end(self, politely: bool = False) -> None:
        """Ends its process, if there is one; politely, it can clear away what engines opened."""
        if self.worker is not None:
            self.worker.stop() if politely else self.worker.kill()
            self.worker = None


@dataclass(frozen=True)
class Prepared:
    """A test model that was made ready.

    Attributes:
        name: of the test model.
        objects: that its weights find, if they are synthetic.
        file: its weights and inputs, for the workers.
        reference: input (`min`, `opt`, `max`, and with several images `image 2` and so on) -> the
            flat tuple that eager fp32 found.
        sizes: input -> height and width of each image.
        fields: names of the tensors of one image in a flat tuple.
        timed: the inputs that are timed: `opt`, and the further images.
        flops: timed input -> of a call, or None where PyTorch does not count them.
        image_digests, weights_digest: that tell images and weights from others.
        note: where the weights come from.
    """

    name: str
    objects: int
    file: Path
    reference: Dict[str, List[Any]]
    sizes: Dict[str, List[List[int]]]
    fields: Tuple[str, ...]
    timed: List[str]
    flops: Dict[str, Optional[int]]
    image_digests: Dict[str, str]
    weights_digest: str
    note: str


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A directory for temporary files, removed at the end.

    Also where a compiler that an engine started has not noticed yet that its worker is gone.
    """
    folder = Path(tempfile.mkdtemp(prefix="run_blade_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_model(
    name: str, objects: int, plan: Plan, folder: Path, progress: Progress
) -> Prepared:
    """Makes weights and inputs of a test model and computes its reference, in its own process.

    Args:
        objects: that synthetic weights find.
        folder: for the files that workers share, and their logs.

    Raises:
        errors.InputError: image or weights cannot be had.
        benchmark.RunFailed: the process died.
    """
    progress.say(f"{name}: weights, inputs, and the reference detections (Torch fp32)")
    prepared = folder / f"{name}.pt"
    worker = Worker(folder / f"{name}.log", plan.threads)
    request = ModelRequest(
        model=name,
        source=plan.source,
        weights=plan.weights,
        images=plan.images,
        image_size=plan.image_size,
        detections=objects,
        seed=plan.seed,
        threads=plan.threads,
        prepared=str(prepared),
    )
    try:
        limit_s = PREPARE_LIMIT_S * max(1, len(plan.images))
        answer = worker.ask("prepare_model", request, limit_s)
    except RunFailed:
        if plan.debug:
            progress.say(worker.log.read_text(errors="replace"))
        raise
    finally:
        worker.kill()
    return Prepared(name=name, objects=objects, file=prepared, **answer)


def measure_group(
    model: Prepared,
    precision: str,
    plan: Plan,
    progress: Progress,
    groups: List[Dict[str, Any]],
    same_again: bool,
    found: Optional[Dict[str, Any]] = None,
) -> Optional[Dict[str, Any]]:
    """Measures all runs of a test model at one precision, in turns.

    Args:
        groups: of the result file; the new one is added as soon as there is something in it, also
            when an interruption comes through. With several images that is one for all of them
            together, and one for each.
        found: takes what was found in each timed input, by label: of `detections.json`.
        same_again: whether a second Torch takes part, to see what difference can be resolved.

    Returns:
        the A/A record of the result file, if that was asked for and could be measured.
    """
    rule = _rule(plan, same_again)
    group = _new_group(model.name, model.objects, precision, rule)
    group.update(weights=model.note, weights_digest=model.weights_digest)
    group.update(_facts_of(model, model.timed, list(model.sizes)))
    runs = plan.runs_for(precision)
    extras = _extra_runs(runs[0], same_again)
    rounds = benchmark.Rounds()
    complete = False
    try:
        with scratch_folder() as folder:
            for run in runs + extras:
                _prepare_run(run, model, plan, folder, progress)
            gpu = [_gpu(runs, plan)]
            pids = [x.worker.process.pid for x in runs + extras if x.worker is not None]
            rule = _with_budget(rule, len(pids) * len(model.timed))
            group["budget_s"] = rule.budget_s
            before = machine.snapshot(pids)
            title = f"{model.name} {precision}"
            _time(runs + extras, rounds, rule, plan.seed, progress, title, len(model.timed))
            group["machine"] = machine.between(before, machine.snapshot(pids))
            group["gpu"] = [state for state in (*gpu, _gpu(runs, plan)) if state]
            if plan.stages:
                group["stages"] = _stages(runs[0], precision)
            for run in runs:
                _check(run, model, plan, progress)
            _report(runs, plan, progress)
            for run in runs + extras:
                run.end(politely=True)
        complete = True
    finally:
        for run in runs + extras:
            run.end()
        if not complete:
            # Also where the rounds were made: what was not checked is measured again.
            rounds.stopped = "interrupted"
        if rounds.rounds or any(run.record["status"] != "ok" for run in runs):
            _conclude(group, runs, rounds, plan)
            groups.append(group)
            if len(model.timed) > 1:
                groups += _one_by_one(group, model, runs, extras, plan)
        for run in runs if found is not None else ():
            for name, images in run.found.items():
                if images:
                    found.setdefault(name, {})[run.record["label"]] = images
    samples = [rounds.samples.get(key, []) for key in (runs[0].key, AGAIN)]
    return _same_against_same(group, samples, plan) if all(samples) else None


def reference_detections(model: Prepared, name: str) -> List[verify.Detections]:
    """What eager fp32 found in each image of an input; nothing where that is malformed."""
    try:
        return verify.split(model.reference[name], model.fields)
    except verify.Malformed:
        return []


def image_names(plan: Plan, model: Prepared) -> Dict[str, Optional[str]]:
    """Timed input -> the name of its image; None where there is but one image."""
    if len(model.timed) == 1:
        return {model.timed[0]: None}
    # They are to stand in a cell of a Markdown table.
    names = [re.sub(r"[|\s]+", " ", results.file_name(path)) for path in plan.images]
    return {
        key: name if names.count(name) == 1 else f"{name} ({place})"
        for place, (key, name) in enumerate(zip(model.timed, names), start=1)
    }


def _facts_of(model: Prepared, timed: Sequence[str], inputs: Sequence[str]) -> Dict[str, Any]:
    """What a group says of the inputs that it is about."""
    flops = [model.flops[name] for name in timed]
    found = [len(image.scores) for name in timed for image in reference_detections(model, name)]
    return {
        "image_sizes": {name: model.sizes[name] for name in inputs},
        "image_digest": " ".join(model.image_digests[name] for name in timed),
        "flops": None if None in flops else sum(flops) // len(flops),
        "found": sum(found),
    }


def _one_by_one(
    together: Dict[str, Any], model: Prepared, runs: List[Run], extras: List[Run], plan: Plan
) -> List[Dict[str, Any]]:
    """A group for each image, of the same rounds.

    What is not of one image (preparation, coverage, the state of the machine) is with the group of
    all of them only.
    """
    groups = []
    for place, (name, image) in enumerate(image_names(plan, model).items()):
        inputs = list(TUNING) if name == "opt" else [name]
        group = {**together, **_facts_of(model, [name], inputs), "image": image}
        group.update(stages=None, machine=None, gpu=[])
        samples = {run.key: [calls[place] for calls in run.calls_s] for run in runs + extras}
        rounds = benchmark.Rounds(samples, {}, together["rounds"], together["stopped"])
        _conclude(group, [_of_inputs(run, inputs) for run in runs], rounds, plan)
        groups.append(group)
    return groups


def _of_inputs(run: Run, inputs: Sequence[str]) -> Run:
    """What a run did with some of its inputs."""

    def of_these(known: Dict[str, Any]) -> Dict[str, Any]:
        return {name: known[name] for name in inputs if name in known}

    record = {**run.record, "warmup_s": [], "prepare": {}, "coverage": {}, "artifacts": []}
    record["break_even"] = None
    record["size_seconds"] = of_these(record["size_seconds"])
    record["detections"] = record["detections"] and of_these(record["detections"])
    if record["status"] == "mismatch":
        worst = verify.worst({name: run.agreements[name] for name in inputs})
        matches = worst.verdict == "match"
        record.update(
            status="ok" if matches else "mismatch", reason=None if matches else worst.reason
        )
    return Run(run.key, run.backend, record)


def failed_group(
    name: str, objects: int, precision: str, plan: Plan, reason: str
) -> Dict[str, Any]:
    """The group of a test model that could not even be prepared."""
    group = _new_group(name, objects, precision, plan.rule)
    runs = plan.runs_for(precision)
    for run in runs:
        run.give_up("failed", reason)
    _conclude(group, runs, benchmark.Rounds(stopped="all failed"), plan)
    return group


def _rule(plan: Plan, same_again: bool) -> StopRule:
    if not same_again:
        return plan.rule
    return replace(plan.rule, half_width=min(plan.rule.half_width, AGAIN_HALF_WIDTH))


def _with_budget(rule: StopRule, calls: int) -> StopRule:
    """The rule with a budget that grows with the calls of a round, unless one was asked for."""
    if rule.is_fixed or rule.budget_s is not None:
        return rule
    return replace(rule, budget_s=RUN_BUDGET_S * calls)


def _new_group(name: str, objects: int, precision: str, rule: StopRule) -> Dict[str, Any]:
    return {
        "model": name,
        "image": None,
        "objects": objects,
        "found": None,
        "export": MODELS[name].kind,
        "precision": precision,
        "images_per_call": MODELS[name].images_per_call,
        "image_sizes": {},
        "flops": None,
        "rounds": 0,
        "stopped": "interrupted",
        "half_width": rule.half_width,
        "budget_s": rule.budget_s,
        "stages": None,
        "machine": None,
        "gpu": [],
        "runs": [],
    }


def _new_run(key: str, backend: Backend, precision: str) -> Run:
    record = {
        "backend": backend.name,
        "label": backend.label,
        "baseline": backend.rank == 0,
        "requested_precision": precision,
        "effective_precision": None,
        "provider": None,
        "threads": None,
        "status": "ok",
        "reason": None,
        "samples_s": [],
        "warmup_s": [],
        "size_seconds": {},
        "prepare": {},
        "cached": False,
        "artifact_mb": None,
        "peak_memory_mb": None,
        "statistics": None,
        "speedup": None,
        "speedup_over_fp32": None,
        "break_even": None,
        "detections": None,
        "coverage": {},
        "versions": {},
        "artifacts": [],
    }
    return Run(key, backend, record)


def _extra_runs(baseline: Run, same_again: bool) -> List[Run]:
    """Runs that are timed with a group but have no row.

    Torch at fp32 takes part in the groups of lower precision: it is what a user has today, and a
    ratio to it is to be had only from calls made side by side.
    """
    extras = []
    precision = baseline.record["requested_precision"]
    if same_again:
        extras.append(_new_run(AGAIN, baseline.backend, precision))
    if precision != "fp32":
        extras.append(_new_run(FP32, baseline.backend, "fp32"))
    return extras


def _prepare_run(run: Run, model: Prepared, plan: Plan, folder: Path, progress: Progress) -> None:
    """Starts a run's process, prepares and warms it; a failure costs this run only."""
    precision = run.record["requested_precision"]
    progress.say(f"{model.name}: preparing {run.backend.label} {precision}")
    run.log = folder / f"{run.key}.log"
    run.worker = Worker(run.log, plan.threads)
    job = Job(
        model=model.name,
        backend=run.backend.name,
        precision=precision,
        device=plan.device,
        source=plan.source,
        prepared=str(model.file),
        threads=plan.threads,
        cache=plan.cache and str(plan.cache),
    )
    try:
        description = run.worker.ask("prepare", job, PREPARE_LIMIT_S)
        artifacts = description.pop("artifacts")
        artifacts = {_file_name(model, name): text for name, text in artifacts.items()}
        run.record.update(description, artifacts=_keep(artifacts, plan.output))
        limit_s = PREPARE_LIMIT_S * len(model.timed)
        run.record["warmup_s"] = run.worker.ask("warm_up", plan.warm_up, limit_s)
    except Unsupported as error:
        run.give_up("unsupported", str(error))
    except RunFailed as error:
        run.give_up("failed", str(error))


def _file_name(model: Prepared, name: str) -> str:
    """The name of a run's file in the output directory, of a model that finds so many objects."""
    return name if model.objects == results.OBJECTS else f"{model.objects}-objects.{name}"


def _keep(artifacts: Dict[str, str], output: Optional[Path]) -> List[str]:
    if output is None:
        return []
    for name, text in artifacts.items():
        (output / name).write_text(text, encoding="utf-8")
    return sorted(artifacts)


def _time(
    runs: List[Run],
    rounds: benchmark.Rounds,
    rule: StopRule,
    seed: int,
    progress: Progress,
    title: str,
    images: int,
) -> None:
    """Makes the rounds.

    Args:
        images: calls that a turn has.
    """
    calls = {run.key: _timed_call(run, images) for run in runs if run.worker is not None}
    if not calls:
        rounds.stopped = "all failed"
        return
    with progress.rounds(title, rule) as advance:
        benchmark.run_rounds(calls, runs[0].key, rule, seed, progress=advance, into=rounds)
    for run in runs:
        if run.key in rounds.failures:
            run.give_up("failed", rounds.failures[run.key])


def _gpu(runs: List[Run], plan: Plan) -> Dict[str, Any]:
    """How the GPU is doing, as the first process that lives sees it; empty on a CPU."""
    live = [run for run in runs if run.worker is not None]
    if plan.device != "cuda" or not live:
        return {}
    try:
        return live[0].worker.ask("gpu")
    except RunFailed as error:
        live[0].give_up("failed", str(error))
        return {}


def _stages(baseline: Run, precision: str) -> Optional[Dict[str, float]]:
    """Median seconds of each stage of the eager module; None where it runs at another precision."""
    if baseline.worker is None or baseline.record["requested_precision"] != precision:
        return None
    try:
        calls = baseline.worker.ask("stages", (STAGE_CALLS,))
    except RunFailed as error:
        baseline.give_up("failed", str(error))
        return None
    return {stage: median(call[stage] for call in calls) for stage in calls[0]}


def gpu_name(plan: Plan) -> Optional[str]:
    """What PyTorch calls the GPU that is measured on; None on a CPU, and where it cannot be had.

    In a process of its own, as this one must not take memory and time of the GPU for itself.
    """
    if plan.device != "cuda":
        return None
    with scratch_folder() as folder:
        worker = Worker(folder / "gpu.log", plan.threads)
        try:
            return worker.ask("gpu_name")
        except RunFailed:
            return None  # Why, the runs will say.
        finally:
            worker.kill()


def measure_peaks(precisions: Sequence[str], plan: Plan, folder: Path) -> Dict[str, float]:
    """Operations per second that PyTorch reaches, by precision, where it has such kernels."""
    worker = Worker(folder / "peak.log", plan.threads)
    try:
        peaks = {
            precision: worker.ask("peak", (precision, plan.device)) for precision in precisions
        }
    finally:
        worker.kill()
    return {precision: peak for precision, peak in peaks.items() if peak}


def _timed_call(run: Run, images: int) -> Callable[[], float]:
    """A turn of a run: a call for each image. With several, their mean is what counts."""

    def call() -> float:
        run.calls_s.append(run.worker.ask("timed_calls", (), CALL_LIMIT_S * images))
        return fmean(run.calls_s[-1])

    return call


def _check(run: Run, model: Prepared, plan: Plan, progress: Progress) -> None:
    """Compares what a run finds with the reference, in all inputs."""
    if run.worker is None:
        return
    try:
        run.record.update(run.worker.ask("peak_memory"))
        run.record["coverage"] = run.worker.ask("coverage")
        progress.say(f"{model.name} {run.record['requested_precision']}: checking {run.key}")
        # Those that it was just timed on come first, as it has kernels for them.
        names = sorted(model.sizes, key=lambda name: name not in model.timed)
        answers = {name: run.worker.ask("detect", (name,)) for name in names}
        run.record["size_seconds"] = {name: x["seconds"] for name, x in answers.items()}
        run.record["artifact_mb"] = run.worker.ask("artifact_mb")
        # Last, as PyTorch's profiler slows a process down.
        run.record["effective_precision"] = run.worker.ask("precision")
        if plan.trace and run.backend.in_pytorch:
            name = f"{model.name}.{run.backend.name}.{run.record['requested_precision']}.trace.json"
            name = _file_name(model, name)
            run.worker.ask("trace", (str(plan.output / name),))
            run.record["artifacts"].append(name)
    except RunFailed as error:
        run.give_up("failed", f"while its detections were computed: {error}")
        return
    if run.record["baseline"] and run.record["requested_precision"] == "fp32":
        return  # It is the reference.
    precision = run.record["effective_precision"]
    for name, answer in answers.items():
        both = (model.reference[name], answer["outputs"], model.fields, precision)
        run.agreements[name] = verify.verify(*both)
        if name in model.timed:
            run.found[name] = _drawable(*both)
    run.record["detections"] = {
        name: {**asdict(agreement), "text": agreement.text}
        for name, agreement in run.agreements.items()
    }
    worst = verify.worst(run.agreements)
    if worst.verdict != "match":
        run.record.update(status="mismatch", reason=worst.reason)


def _drawable(
    reference: Sequence[Any], found: Sequence[Any], fields: Sequence[str], precision: str
) -> List[Dict[str, Any]]:
    """What was found in each image, for `detections.json`; nothing where it is malformed."""
    try:
        images = verify.find(reference, found, fields, precision)
    except ValueError:
        return []
    return [
        {
            **drawable(image.detections),
            "agrees": image.agrees.tolist(),
            "lost": image.lost.tolist(),
        }
        for image in images
    ]


def drawable(detections: verify.Detections) -> Dict[str, Any]:
    """Boxes in tenths of a pixel, scores and classes as plain lists."""
    return {
        "boxes": detections.boxes.round(1).tolist(),
        "scores": detections.scores.round(4).tolist(),
        "classes": detections.classes.tolist(),
    }


def _report(runs: List[Run], plan: Plan, progress: Progress) -> None:
    """Says which runs went wrong; with `debug`, what their processes printed."""
    for run in runs:
        if run.record["status"] == "ok":
            continue
        progress.say(f"{run.backend.label}: {run.record['status']}: {run.record['reason']}")
        if plan.debug and run.log is not None and run.log.exists():
            progress.say(run.log.read_text(errors="replace"))


def _conclude(group: Dict[str, Any], runs: List[Run], rounds: benchmark.Rounds, plan: Plan) -> None:
    """Fills in what follows from the samples."""
    group.update(rounds=rounds.rounds, stopped=rounds.stopped, runs=[run.record for run in runs])
    baseline = rounds.samples.get(runs[0].key, [])
    group["fp32_samples_s"] = fp32 = rounds.samples.get(FP32, [])
    for run in runs:
        samples = rounds.samples.get(run.key, [])
        run.record["samples_s"] = samples
        if samples:
            statistics = benchmark.summarize(samples, group["images_per_call"])
            run.record["statistics"] = asdict(statistics)
        if samples and baseline and not run.record["baseline"]:
            run.record["speedup"] = asdict(benchmark.speedup(baseline, samples, plan.seed))
        if samples and baseline and not run.record["baseline"] and run.record["prepare"]:
            extra_s = _prepare_seconds(run) - _prepare_seconds(runs[0])
            paid_back = benchmark.break_even(
                baseline, samples, extra_s, group["images_per_call"], plan.seed
            )
            run.record["break_even"] = asdict(paid_back)
        if samples and fp32:
            over_fp32 = benchmark.speedup(fp32, samples, plan.seed)
            run.record["speedup_over_fp32"] = asdict(over_fp32)


def _prepare_seconds(run: Run) -> float:
    """What it took to prepare, without building the model, which every run has to."""
    return run.record["prepare"]["total"] - run.record["prepare"]["build"]


def _same_against_same(
    group: Dict[str, Any], samples: List[List[float]], plan: Plan
) -> Dict[str, Any]:
    speedup = benchmark.speedup(samples[0], samples[1], plan.seed)
    return {
        "model": group["model"],
        "precision": group["precision"],
        **asdict(speedup),
        "resolution": benchmark.resolution(speedup),
        "samples_s": samples,
    }
