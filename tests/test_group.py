"""Groups of runs in real processes: a run that fails costs its own row, and what is wrong shows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Iterator, List, Set, Tuple

import psutil
import pytest
import torch
from conftest import full_disk

import run_blade
from backends import base
from benchmark import RunFailed, StopRule, WarmUp
from detectors import inputs
from detectors.inputs import View
from errors import InputError
from measure import group as groups
from measure import plan as plans
from measure import protocol, session, worker
from measure.group import Measured, Measurement, PreparedModel
from measure.plan import Choice, Plan
from measure.progress import Progress
from measure.worker import Command, Hosts, Worker
from models import MODELS, RUN_BUDGET_S
from results import facts
from results.record import Coverage, Group
from tools.check_settling import suite_with_stand_in

TORCH, TORCHSCRIPT, OPENVINO = (
    Choice(base.load(name)) for name in ("torch", "torchscript", "openvino")
)


def make_plan(**changes: Any) -> Plan:
    plan = Plan(
        models=(MODELS["testRetinaNet"],),
        choices=(TORCH, TORCHSCRIPT),
        precisions=("fp32",),
        device="cpu",
        source="bundled",
        images=(),
        view=View((96, 128)),
        weights="synthetic",
        detections=(30,),
        warm_up=WarmUp.fixed(1),
        later_warm_up=WarmUp.fixed(1),
        rule=StopRule.fixed(6),
        threads=1,
        seed=0,
        pictures=inputs.read_images([], View((96, 128)), 0),
    )
    return dataclasses.replace(plan, **changes)


@pytest.fixture(scope="module")
def model(hosts, tmp_path_factory) -> PreparedModel:
    folder = tmp_path_factory.mktemp("model")
    return groups.prepare_model(MODELS["testRetinaNet"], 30, make_plan(), hosts, folder, Progress())


def test_images_of_names_that_are_no_utf8(model, tmp_path):
    odd = str(tmp_path / os.fsdecode(b"caf\xe9.jpg"))
    Path(odd).touch()
    plan = make_plan(images=(odd, "/b/d|og.jpg"), weights=odd)
    both = dataclasses.replace(model.facts, timed=("opt", "image 2"))
    names = groups.image_names(plan, dataclasses.replace(model, facts=both))
    assert names == {"opt": "caf\\udce9.jpg", "image 2": "d og.jpg"}
    # Each has a name of its own, whatever they are called.
    paths = ("/a/x", "/b/x", "/c/x (1)")
    both = dataclasses.replace(both, timed=("opt", "image 2", "image 3"))
    names = groups.image_names(make_plan(images=paths), dataclasses.replace(model, facts=both))
    assert list(names.values()) == ["x (1)", "x (2)", "x (1) (3)"]
    options = run_blade.parser().parse_args(["--model", "testRetinaNet", "--weights", odd])
    settings = session.settings(plan, options)
    assert settings.image == ("caf\\udce9.jpg", "d|og.jpg")
    assert settings.weights == "caf\\udce9.jpg"


class Killing(Progress):
    """Kills the process of one run after some rounds.

    Args:
        hosts: whose workers are those of a group that is measured.
        victim: its place among them, in the order in which they were started.
    """

    def __init__(self, hosts: Hosts, victim: int, after_rounds: int) -> None:
        super().__init__()
        self.host = psutil.Process(hosts.of(Command.own()).wait().pid)
        self.victim, self.after_rounds = victim, after_rounds
        self.before = set(self.host.children())

    @contextlib.contextmanager
    def rounds(self, title: str, rule: StopRule):
        workers = set(self.host.children()) - self.before
        workers = sorted(workers, key=lambda process: (process.create_time(), process.pid))

        def advance(rounds) -> None:
            if rounds.rounds == self.after_rounds:
                os.kill(workers[self.victim].pid, signal.SIGKILL)

        yield advance


def measure(
    model: PreparedModel, plan: Plan, hosts: Hosts, progress: Progress, same_again: bool = False
) -> Tuple[Group, Measured]:
    """Measures a group of which nothing interrupts the measurement, and which has one image."""
    measured = groups.measure_group(model, plan.precisions[0], plan, hosts, progress, same_again)
    if measured.interruption is not None:
        raise measured.interruption
    (group,) = measured.groups
    return group, measured


def processes() -> Set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def leaves_no_process(hosts):
    hosts.of(Command.own()).wait()
    before = processes()
    yield
    assert processes() <= before


def test_a_model_is_prepared_for_all(model, leaves_no_process):
    assert (model.folder / "state.npz").exists()
    assert (model.folder / "inputs.npz").exists()
    assert model.facts.sizes["opt"] == ((96, 128),)
    assert (model.facts.weights.source, model.facts.weights.objects) == ("synthetic", 30)
    for size, found in model.reference.items():
        assert len(found[0]) > 20, size


def test_a_model_that_kills_its_process_is_a_failed_run(
    hosts, tmp_path, monkeypatch, leaves_no_process
):
    """The process dies in the middle of its work, as it would for want of memory."""
    monkeypatch.setattr(worker, "Worker", Dying)
    with pytest.raises(RunFailed, match="killed by SIGKILL"):
        groups.prepare_model(MODELS["testRetinaNet"], 30, make_plan(), hosts, tmp_path, Progress())


class Dying(Worker):
    """A worker whose process is killed as soon as it has something to do."""

    def ask(self, *args: Any, **kwargs: Any) -> Any:
        os.kill(self.pid, signal.SIGKILL)
        return super().ask(*args, **kwargs)


def test_a_killed_run_costs_one_row(model, hosts, leaves_no_process):
    group, _ = measure(model, make_plan(), hosts, Killing(hosts, victim=1, after_rounds=2))
    torch_run, torchscript = group.runs
    assert torchscript.status == "failed"
    assert torchscript.reason.startswith("the process was killed by SIGKILL")
    assert len(torchscript.samples_s) == 2
    assert torch_run.status == "ok"
    assert len(torch_run.samples_s) == 6
    assert torch_run.statistics.samples == 6
    assert (group.rounds, group.stopped) == (6, "fixed")


def test_a_killed_baseline_costs_one_row(model, hosts, leaves_no_process):
    group, _ = measure(model, make_plan(), hosts, Killing(hosts, victim=0, after_rounds=2))
    torch_run, torchscript = group.runs
    assert torch_run.status == "failed"
    assert torchscript.status == "ok"
    assert len(torchscript.samples_s) == 6
    assert {x.verdict for x in torchscript.detections.values()} == {"match"}
    # Two rounds that both have are too few for an interval.
    assert torchscript.speedup.verdict == "inconclusive"


# A backend that takes no module.
PICKY = """
from backends.torch import Torch
from errors import Unsupported


class StandIn(Torch):
    name, label, rank, default = "spinning", "Picky", 9, False

    def optimize(self, *run):
        raise Unsupported("it has no rule for aten::sort")
"""


def test_what_is_unsupported_has_its_reason(model, tmp_path, monkeypatch, leaves_no_process):
    run, picky = suite_with_stand_in(tmp_path / "suite", stand_in=PICKY)
    monkeypatch.setattr(worker, "RUN", run)
    with contextlib.closing(Hosts((Command.own(),), tmp_path)) as hosts:
        plan = make_plan(choices=(TORCH, Choice(picky)))
        group, measured = measure(model, plan, hosts, Progress(), same_again=True)
    torch_run, refused = group.runs
    assert torch_run.status == "ok"
    assert refused.status == "unsupported"
    assert refused.reason == "it has no rule for aten::sort"
    assert (refused.samples_s, refused.statistics) == ((), None)
    # The second Torch was measured all the same, and has no row.
    assert [len(samples) for samples in measured.aa.samples_s] == [6, 6]
    assert measured.aa.speedup.low <= measured.aa.speedup.ratio <= measured.aa.speedup.high
    assert measured.aa.resolution >= 0


def test_what_finds_something_else_is_a_mismatch(model, hosts, leaves_no_process):
    """The reference is changed, which to the comparison is the same as a wrong engine."""
    wrong = {size: list(outputs) for size, outputs in model.reference.items()}
    wrong["max"][1] = wrong["max"][1] + 1
    wrong_model = dataclasses.replace(model, reference=wrong)
    group, measured = measure(wrong_model, make_plan(), hosts, Progress())
    torch_run, torchscript = group.runs
    assert torch_run.status == "ok"
    assert torchscript.status == "mismatch"
    count = len(wrong["max"][1])
    assert torchscript.reason.startswith(f"at max: of {count} detections {count} are lost")
    verdicts = {size: x.verdict for size, x in torchscript.detections.items()}
    assert verdicts == {"min": "match", "opt": "match", "max": "mismatch"}
    assert torchscript.speedup is not None
    # Where another Torch is not asked for, there is none.
    assert measured.aa is None


@pytest.fixture(scope="module")
def two_images(hosts, tmp_path_factory) -> Tuple[Plan, PreparedModel]:
    """A plan with two images, of the same file name, and RetinaNet made ready for it."""
    folder = tmp_path_factory.mktemp("two")
    paths = []
    for name, shape in (("a", (96, 128)), ("b", (128, 96))):
        (folder / name).mkdir()
        paths.append(str(folder / name / "p|1.png"))
        inputs.write_image(inputs.read_image(None, shape), Path(paths[-1]))
    pictures = inputs.read_images([Path(path) for path in paths], View(), 0)
    plan = make_plan(images=tuple(paths), view=View(), pictures=pictures)
    return plan, groups.prepare_model(MODELS["testRetinaNet"], 20, plan, hosts, folder, Progress())


def test_one_image_of_several_may_mismatch(two_images, hosts, leaves_no_process):
    plan, model = two_images
    wrong = {name: list(outputs) for name, outputs in model.reference.items()}
    wrong["image 2"][1] = wrong["image 2"][1] + 1
    wrong_model = dataclasses.replace(model, reference=wrong)
    measured = groups.measure_group(wrong_model, "fp32", plan, hosts, Progress())
    assert [group.image for group in measured.groups] == [None, "p 1.png (1)", "p 1.png (2)"]
    together, first, second = (group.runs[1] for group in measured.groups)
    assert [run.status for run in (together, first, second)] == ["mismatch", "ok", "mismatch"]
    assert together.reason.startswith("at image 2: of 20 detections 20 are lost")
    assert first.reason is None
    assert second.reason == together.reason
    assert set(first.detections) == {"min", "opt", "max"}
    assert set(second.detections) == {"image 2"}
    # What is not of one image is said once.
    assert together.prepare.total > 0
    assert together.break_even is not None
    assert (first.prepare, first.coverage) == (None, Coverage())
    assert first.break_even is None


def test_a_run_that_is_killed_between_several_images(two_images, hosts, leaves_no_process):
    plan, model = two_images
    killing = Killing(hosts, victim=1, after_rounds=2)
    measured = groups.measure_group(model, "fp32", plan, hosts, killing)
    assert len(measured.groups) == 3
    for group in measured.groups:
        torch_run, torchscript = group.runs
        assert (torchscript.status, len(torchscript.samples_s)) == ("failed", 2)
        assert torchscript.detections is None
        assert (torch_run.status, len(torch_run.samples_s)) == ("ok", 6)


def test_the_gpu_is_named_by_a_process_of_its_own(hosts, monkeypatch, leaves_no_process):
    def gpu(device: str) -> Any:
        request = protocol.Survey(("torch",), device, "bundled")
        return plans.survey_of(Command.own(), request, 1, hosts).gpu

    assert gpu("cpu") is None
    if torch.cuda.is_available():
        assert gpu("cuda") == torch.cuda.get_device_name()
    else:
        with pytest.raises(InputError, match="PyTorch sees no CUDA device here"):
            gpu("cuda")
    monkeypatch.setattr(worker, "Worker", Dying)
    with pytest.raises(InputError, match=r"own environment does not answer: .* by SIGKILL"):
        gpu("cpu")


def test_a_baseline_without_the_precision_runs_at_fp32():
    runs = groups.runs_for(make_plan(choices=(TORCH, OPENVINO)), "int8")
    assert [(run.choice.name, run.precision) for run in runs] == [
        ("torch", "fp32"),
        ("openvino", "int8"),
    ]
    assert groups.extra_runs(runs, same_again=False) == []


def test_lower_precision_is_compared_with_fp32(model, hosts, leaves_no_process):
    plan = make_plan(choices=(TORCH,), precisions=("bf16",))
    group, _ = measure(model, plan, hosts, Progress())
    (run,) = group.runs
    assert run.status == "ok"
    assert run.effective_precision == "bf16"
    assert {x.verdict for x in run.detections.values()} == {"match"}
    assert run.speedup is None
    assert len(group.fp32_samples_s) == 6
    medians = [median(samples) for samples in (group.fp32_samples_s, run.samples_s)]
    assert run.speedup_over_fp32.ratio == pytest.approx(medians[0] / medians[1])
    assert run.speedup_over_fp32.ratio != 1


class Interrupting(Progress):
    """Ctrl-C after two rounds."""

    @contextlib.contextmanager
    def rounds(self, title: str, rule: StopRule):
        def advance(rounds) -> None:
            if rounds.rounds == 2:
                raise KeyboardInterrupt

        yield advance


def test_an_interruption_keeps_the_samples(model, hosts, leaves_no_process):
    measured = groups.measure_group(
        model, "fp32", make_plan(), hosts, Interrupting(), same_again=True
    )
    assert isinstance(measured.interruption, KeyboardInterrupt)
    (group,) = measured.groups
    assert group.stopped == "interrupted"
    assert [len(run.samples_s) for run in group.runs] == [2, 2]
    # It is measured again, and A/A with it.
    assert measured.aa is None


def test_an_interruption_before_the_first_round_leaves_no_group(model, hosts, leaves_no_process):
    class Impatient(Progress):
        def say(self, text: str) -> None:
            if "preparing TorchScript" in text:
                raise KeyboardInterrupt

    measured = groups.measure_group(model, "fp32", make_plan(), hosts, Impatient())
    assert isinstance(measured.interruption, KeyboardInterrupt)
    assert measured.groups == ()


# Turns -----------------------------------------------------------------------------------------


class Watching(Worker):
    """Looks, before each timed call, whether any other worker computes.

    Attributes:
        used: worker that has its turn -> shares of a core that others used just before.
        spun: shares of a core that a worker used right after its own calls.
    """

    prepared: ClassVar[List[Worker]] = []
    used: ClassVar[List[float]] = []
    spun: ClassVar[List[float]] = []

    def ask(self, request: Any, *args: Any) -> Any:
        if isinstance(request, protocol.PrepareRun):
            self.prepared.append(self)
        if isinstance(request, protocol.TimedCalls):
            self.used.extend(share_of_core(x) for x in self.prepared if x is not self)
        return super().ask(request, *args)

    def settle(self, *args: Any) -> bool:
        self.spun.append(share_of_core(self))
        return super().settle(*args)


def share_of_core(worker: Worker) -> float:
    before = worker._cpu_clock()
    time.sleep(0.01)
    after = worker._cpu_clock()
    return (after.cpu - before.cpu) / (after.time - before.time)


@pytest.fixture
def spinning(tmp_path, monkeypatch) -> Iterator[Tuple[Choice, Hosts]]:
    """A backend that computes on for 200 ms after each call, and hosts that know it."""
    run, backend = suite_with_stand_in(tmp_path / "suite", seconds=0.2)
    monkeypatch.setattr(worker, "RUN", run)
    hosts = Hosts((Command.own(),), tmp_path)
    yield Choice(backend), hosts
    hosts.close()


def test_no_turn_begins_while_a_worker_computes(model, spinning, monkeypatch):
    choice, hosts = spinning
    for name in ("prepared", "used", "spun"):
        monkeypatch.setattr(Watching, name, [])
    monkeypatch.setattr(worker, "Worker", Watching)
    group, _ = measure(model, make_plan(choices=(TORCH, choice)), hosts, Progress())
    assert [(run.label, run.status) for run in group.runs] == [("Torch", "ok"), ("Spinning", "ok")]
    assert all(run.settled for run in group.runs)
    # On a machine that is busy it has a part of a core only.
    assert sum(share > 0.2 for share in Watching.spun) >= 6
    assert len(Watching.used) == 12
    assert max(Watching.used) < 0.2


def test_a_process_that_never_stands_still_is_not_waited_for_again_and_again(
    model, spinning, monkeypatch
):
    choice, hosts = spinning
    waits = []

    def in_vain(self: Worker) -> bool:
        waits.append(self)
        return False

    monkeypatch.setattr(Worker, "settle", in_vain)
    group, _ = measure(model, make_plan(choices=(TORCH, choice)), hosts, Progress())
    prepared = 2 * 2  # Each is prepared and warmed up, which disturbs no turn.
    assert len(waits) == prepared + 2 * groups.MOST_UNSETTLED
    assert not any(run.settled for run in group.runs)
    warnings = facts.warnings(group, least_rounds=1)
    assert any("Spinning: its process computes on after its calls" in x for x in warnings)


# What is beside the point ----------------------------------------------------------------------


class Forgetful(Worker):
    """A worker that fails at every question but those that it is there for."""

    def ask(self, request: Any, *args: Any) -> Any:
        beside = (protocol.ReadMemory, protocol.ReadCoverage, protocol.ReadArtifact)
        if isinstance(request, (*beside, protocol.ReadPrecision, protocol.TimeStages)):
            raise RunFailed("it does not know")
        return super().ask(request, *args)


def test_statistics_that_fail_cost_their_own_line(model, hosts, monkeypatch, capfd):
    monkeypatch.setattr(worker, "Worker", Forgetful)
    group, _ = measure(model, make_plan(costs=True, stages=True), hosts, Progress())
    for run in group.runs:
        assert (run.status, run.effective_precision) == ("ok", "fp32")
        assert (run.peak_memory_mb, run.artifact_mb) == (None, None)
        assert len(run.samples_s) == 6
    assert group.stages is None
    assert group.runs[1].detections["opt"].verdict == "match"
    said = capfd.readouterr().err
    assert "TorchScript: it is not known how much memory it took: it does not know" in said
    assert "Torch: it is not known where its time goes: it does not know" in said


class Refusing(Worker):
    """A worker whose engine refuses an image: of that run, and of no other."""

    def ask(self, request: Any, *args: Any) -> Any:
        if isinstance(request, self.requests) and "torchscript" in self.log.name:
            raise InputError("image 1 is too large for it")
        return super().ask(request, *args)


@pytest.mark.parametrize(
    ("request_kind", "words"),
    [(protocol.TimedCalls, ""), (protocol.Detect, "while its detections were computed at opt: ")],
)
def test_an_engine_that_refuses_an_image_costs_its_row(
    model, hosts, monkeypatch, request_kind, words
):
    monkeypatch.setattr(Refusing, "requests", request_kind, raising=False)
    monkeypatch.setattr(worker, "Worker", Refusing)
    group, _ = measure(model, make_plan(), hosts, Progress())
    torch_run, torchscript = group.runs
    assert torch_run.status == "ok"
    assert (torchscript.status, torchscript.reason) == (
        "failed",
        f"{words}image 1 is too large for it",
    )


def test_a_gpu_that_cannot_be_read_costs_no_row(model, hosts, monkeypatch, capfd):
    plan = make_plan()
    measurement = Measurement(model, "fp32", plan, Progress(), same_again=False)
    (run, _) = measurement.runs
    with hosts.of(Command.own()).worker(model.folder / "gpu.log", 1) as run.worker:
        monkeypatch.setattr(measurement, "plan", dataclasses.replace(plan, device="cuda"))
        monkeypatch.setattr(Worker, "ask", lambda *_: (_ for _ in ()).throw(RunFailed("no NVML")))
        measurement.read_gpu()
        monkeypatch.undo()
    assert (run.status, measurement.gpu) == ("ok", [])
    assert "Torch: it is not known how the GPU is doing: no NVML" in capfd.readouterr().err


def test_only_eager_fp32_on_the_cpu_is_not_checked():
    for device, precision, is_reference in (
        ("cpu", "fp32", True),
        ("cpu", "bf16", False),
        ("cuda", "fp32", False),
    ):
        plan = make_plan(device=device, precisions=(precision,))
        measurement = Measurement(None, precision, plan, Progress(), same_again=False)
        assert measurement.is_reference(measurement.runs[0]) == is_reference
        assert not measurement.is_reference(measurement.runs[1])


def test_a_full_disk_of_temporary_files_is_the_reason(tmp_path):
    """The log lies there, too, and cannot take the traceback."""
    hosts = Hosts((Command.own(),), tmp_path)
    with contextlib.closing(hosts), full_disk(100):
        hosts.of(Command.own()).wait()
        with pytest.raises(RunFailed, match="File too large"):
            groups.prepare_model(
                MODELS["testRetinaNet"], 5, make_plan(), hosts, tmp_path, Progress()
            )


# Other environments ----------------------------------------------------------------------------

# The same interpreter, by another command: all that is different is that it is another environment.
AGAIN = Choice(base.load("torchscript"), Command.of("torchscript@again", f"env {sys.executable}"))


def keys(runs) -> list:
    return [(run.key, run.choice.name, run.precision) for run in runs]


def test_torch_of_an_environment_takes_part():
    extras = groups.extra_runs(groups.runs_for(make_plan(choices=(TORCH, AGAIN)), "fp32"), False)
    assert keys(extras) == [("torch of torchscript@again", "torch@again", "fp32")]
    assert extras[0].choice.command.words == AGAIN.command.words
    assert not extras[0].choice.is_baseline


def test_torch_of_an_environment_takes_part_once():
    """Not beside its own row, nor for what PyTorch does not run, nor where it is the baseline."""
    own = Choice(base.load("torch"), Command.of("torch@again", f"env {sys.executable}"))
    engine = Choice(base.load("openvino"), Command.of("openvino@old", f"env -u A {sys.executable}"))
    here = Choice(base.load("torchscript"), Command.of("torchscript@here", sys.executable))
    plan = make_plan(choices=(TORCH, own, AGAIN, here, engine))
    runs = groups.runs_for(plan, "fp32")
    assert groups.extra_runs(runs, same_again=False) == []
    measurement = Measurement(None, "fp32", plan, Progress(), same_again=False)
    assert [measurement.own_torch(run) for run in measurement.runs] == [
        *(None, None, "torch@again", "torch", None)
    ]


def test_the_same_backend_of_another_environment_is_a_row_of_its_own(
    model, tmp_path, leaves_no_process
):
    plan = make_plan(choices=(TORCH, TORCHSCRIPT, AGAIN))
    hosts = Hosts((Command.own(), AGAIN.command), tmp_path)
    try:
        group, measured = measure(model, plan, hosts, Progress())
    finally:
        hosts.close()
    torch_run, own, again = group.runs
    assert [run.label for run in group.runs] == ["Torch", "TorchScript", "TorchScript@again"]
    assert [run.name for run in group.runs] == ["torch", "torchscript", "torchscript@again"]
    assert [run.environment for run in group.runs] == [None, None, "again"]
    assert [run.baseline for run in group.runs] == [True, False, False]
    for run in group.runs:
        assert (run.status, run.python) == ("ok", sys.version.split()[0])
        assert run.versions["torch"] == torch.__version__
    # They took turns, and each is judged and timed on its own.
    assert {x.verdict for x in again.detections.values()} == {"match"}
    assert (len(again.samples_s), len(own.samples_s)) == (6, 6)
    assert again.samples_s != own.samples_s
    assert set(measured.found["opt"]) == {"TorchScript", "TorchScript@again"}
    # Torch of that environment took part, and has no row.
    assert again.speedup_over_own_torch.ratio > 0
    assert again.speedup_over_own_torch.ratio != again.speedup.ratio
    assert (torch_run.speedup_over_own_torch, own.speedup_over_own_torch) == (None, None)


def test_an_environment_that_is_gone_costs_its_row(model, hosts, tmp_path, leaves_no_process):
    """It was there when the plan was made."""
    gone = tmp_path / "python"
    gone.write_text("#!/bin/sh\nexit 3\n")
    gone.chmod(0o755)
    choice = Choice(base.load("torchscript"), Command.of("torchscript@gone", str(gone)))
    group, _ = measure(model, make_plan(choices=(TORCH, choice)), hosts, Progress())
    torch_run, run = group.runs
    assert (torch_run.status, run.status) == ("ok", "failed")
    assert run.reason.startswith("environment torchscript@gone cannot run workers")
    assert run.label == "TorchScript@gone"


# The rest --------------------------------------------------------------------------------------


def test_the_budget_grows_with_the_processes():
    assert groups._with_budget(StopRule(), 4).budget_s == 4 * RUN_BUDGET_S
    assert groups._with_budget(StopRule(budget_s=5.0), 4).budget_s == 5
    assert groups._with_budget(StopRule.fixed(9), 4).budget_s is None


def test_files_that_a_backend_wants_kept(model, tmp_path):
    texts = {"a.txt": "one", "b.txt": "two"}

    def keep(choice: Choice = TORCHSCRIPT, objects: int = 100, **changes: Any) -> Tuple[str, ...]:
        of = dataclasses.replace(model, objects=objects)
        measurement = Measurement(of, "fp32", make_plan(**changes), Progress(), False)
        return measurement.keep(choice, texts)

    assert keep(output=tmp_path) == ("a.txt", "b.txt")
    assert (tmp_path / "b.txt").read_text() == "two"
    assert keep() == ()
    # None overwrites another's.
    texts = {"a.txt": "three"}
    assert keep(output=tmp_path, objects=5) == ("5-objects.a.txt",)
    assert keep(AGAIN, output=tmp_path) == ("again.a.txt",)
    assert (tmp_path / "a.txt").read_text() == "one"


def test_a_model_that_cannot_be_prepared_has_failed_rows():
    group = groups.failed_group(MODELS["testRetinaNet"], 30, "fp32", make_plan(), "no memory")
    assert [(run.status, run.reason) for run in group.runs] == [("failed", "no memory")] * 2
    assert (group.rounds, group.stopped) == (0, "all failed")
