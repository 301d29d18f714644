"""Groups of runs in real processes: a run that fails costs its own row, and what is wrong shows."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch

import models
import run_blade
import session
import suite
from backends import base
from benchmark import StopRule, WarmUp
from progress import Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("suite")


def make_plan(**changes: Any) -> suite.Plan:
    plan = suite.Plan(
        models=("testRetinaNet",),
        backends=(base.load("torch"), base.load("torchscript")),
        precisions=("fp32",),
        device="cpu",
        source="bundled",
        images=(),
        image_size=(96, 128),
        weights="synthetic",
        detections=(30,),
        warm_up=WarmUp.fixed(1),
        rule=StopRule.fixed(6),
        threads=1,
        seed=0,
        output=None,
        debug=False,
    )
    return dataclasses.replace(plan, **changes)


@pytest.fixture(scope="module")
def model(folder) -> suite.Prepared:
    return suite.prepare_model("testRetinaNet", 30, make_plan(), folder, Progress())


def test_images_of_names_that_are_no_utf8(model, tmp_path):
    odd, both = str(tmp_path / os.fsdecode(b"caf\xe9.jpg")), ["opt", "image 2"]
    Path(odd).touch()
    plan = make_plan(images=(odd, "/b/d|og.jpg"), weights=odd)
    names = suite.image_names(plan, dataclasses.replace(model, timed=both))
    assert names == {"opt": "caf\\udce9.jpg", "image 2": "d og.jpg"}
    options = run_blade.parser().parse_args(["--model", "testRetinaNet", "--weights", odd])
    settings = session._document(plan, options, [])["settings"]
    assert settings["image"] == ["caf\\udce9.jpg", "d|og.jpg"]
    assert settings["weights"] == "caf\\udce9.jpg"


class Killing(Progress):
    """Kills the process of one run after some rounds."""

    def __init__(self, victim: int, after_rounds: int) -> None:
        super().__init__()
        self.victim, self.after_rounds = victim, after_rounds
        self.before = set(multiprocessing.active_children())

    @contextlib.contextmanager
    def rounds(self, title: str, rule: StopRule):
        children = set(multiprocessing.active_children()) - self.before
        # They are named in the order in which they were started: SpawnProcess-12.
        children = sorted(children, key=lambda process: int(process.name.rsplit("-", 1)[1]))

        def advance(rounds) -> None:
            if rounds.rounds == self.after_rounds:
                os.kill(children[self.victim].pid, signal.SIGKILL)

        yield advance


def measure(
    model: suite.Prepared, plan: suite.Plan, progress: Progress, same_again: bool = False
) -> Tuple[Dict[str, Any], Any]:
    groups: List[Dict[str, Any]] = []
    aa = suite.measure_group(model, plan.precisions[0], plan, progress, groups, same_again)
    (group,) = groups
    return group, aa


def no_children_but(before: set) -> bool:
    return set(multiprocessing.active_children()) <= before


@pytest.fixture
def leaves_no_process():
    before = set(multiprocessing.active_children())
    yield
    assert no_children_but(before)


def test_a_model_is_prepared_for_all(model, leaves_no_process):
    assert model.file.exists()
    assert model.sizes["opt"] == [[96, 128]]
    assert model.note == "weights: synthetic, made to find 30 objects"
    for size, found in model.reference.items():
        assert len(found[0]) > 20, size


def test_a_model_that_kills_its_process_is_a_failed_run(folder, monkeypatch, leaves_no_process):
    """The process dies in the middle of its work, as it would for want of memory."""
    started: List[Any] = []
    monkeypatch.setattr(suite, "Worker", lambda *args: started.append(Dying(*args)) or started[0])
    with pytest.raises(suite.RunFailed, match="killed by SIGKILL"):
        suite.prepare_model("testRetinaNet", 30, make_plan(), folder, Progress())


class Dying(suite.Worker):
    """A worker whose process is killed as soon as it has something to do."""

    def ask(self, *args: Any, **kwargs: Any) -> Any:
        self.process.kill()
        return super().ask(*args, **kwargs)


def test_a_killed_run_costs_one_row(model, leaves_no_process):
    group, _ = measure(model, make_plan(), Killing(victim=1, after_rounds=2))
    torch_run, torchscript = group["runs"]
    assert torchscript["status"] == "failed"
    assert torchscript["reason"].startswith("the process was killed by SIGKILL")
    assert len(torchscript["samples_s"]) == 2
    assert torch_run["status"] == "ok"
    assert len(torch_run["samples_s"]) == 6
    assert torch_run["statistics"]["samples"] == 6
    assert (group["rounds"], group["stopped"]) == (6, "fixed")


def test_a_killed_baseline_costs_one_row(model, leaves_no_process):
    group, _ = measure(model, make_plan(), Killing(victim=0, after_rounds=2))
    torch_run, torchscript = group["runs"]
    assert torch_run["status"] == "failed"
    assert torchscript["status"] == "ok"
    assert len(torchscript["samples_s"]) == 6
    assert {x["verdict"] for x in torchscript["detections"].values()} == {"match"}
    # Two rounds that both have are too few for an interval.
    assert torchscript["speedup"]["verdict"] == "inconclusive"


def test_what_is_unsupported_has_its_reason(folder, leaves_no_process):
    plan = make_plan(backends=(base.load("torch"), base.load("openvino")))
    scripted = suite.prepare_model("testRetinaNet_scripted", 30, plan, folder, Progress())
    group, aa = measure(scripted, plan, Progress(), same_again=True)
    torch_run, openvino = group["runs"]
    assert group["export"] == "scripted"
    assert torch_run["status"] == "ok"
    assert openvino["status"] == "unsupported"
    assert openvino["reason"].startswith("OpenVINO cannot convert the module: ")
    assert "\n" not in openvino["reason"]
    assert (openvino["samples_s"], openvino["statistics"]) == ([], None)
    # The second Torch was measured all the same, and has no row.
    assert [len(samples) for samples in aa["samples_s"]] == [6, 6]
    assert aa["low"] <= aa["ratio"] <= aa["high"]
    assert aa["resolution"] >= 0


def test_what_finds_something_else_is_a_mismatch(model, leaves_no_process):
    """The reference is changed, which to the comparison is the same as a wrong engine."""
    wrong = {size: list(outputs) for size, outputs in model.reference.items()}
    wrong["max"][1] = wrong["max"][1] + 1
    group, _ = measure(dataclasses.replace(model, reference=wrong), make_plan(), Progress())
    torch_run, torchscript = group["runs"]
    assert torch_run["status"] == "ok"
    assert torchscript["status"] == "mismatch"
    count = len(wrong["max"][1])
    assert torchscript["reason"].startswith(f"at max: of {count} detections {count} are lost")
    verdicts = {size: x["verdict"] for size, x in torchscript["detections"].items()}
    assert verdicts == {"min": "match", "opt": "match", "max": "mismatch"}
    assert torchscript["speedup"] is not None


@pytest.fixture(scope="module")
def two_images(tmp_path_factory) -> Tuple[suite.Plan, suite.Prepared]:
    """A plan with two images, of the same file name, and RetinaNet made ready for it."""
    folder = tmp_path_factory.mktemp("two")
    paths = []
    for name, shape in (("a", (96, 128)), ("b", (128, 96))):
        (folder / name).mkdir()
        paths.append(str(folder / name / "p|1.png"))
        models.write_image(models.read_image(None, shape), Path(paths[-1]))
    plan = make_plan(images=tuple(paths), image_size=None)
    return plan, suite.prepare_model("testRetinaNet", 20, plan, folder, Progress())


def measure_all(model: suite.Prepared, plan: suite.Plan, progress: Progress) -> List[Any]:
    groups: List[Dict[str, Any]] = []
    suite.measure_group(model, "fp32", plan, progress, groups, False)
    return groups


def test_one_image_of_several_may_mismatch(two_images, leaves_no_process):
    plan, model = two_images
    wrong = {name: list(outputs) for name, outputs in model.reference.items()}
    wrong["image 2"][1] = wrong["image 2"][1] + 1
    groups = measure_all(dataclasses.replace(model, reference=wrong), plan, Progress())
    assert [group["image"] for group in groups] == [None, "p 1.png (1)", "p 1.png (2)"]
    together, first, second = (group["runs"][1] for group in groups)
    assert [run["status"] for run in (together, first, second)] == ["mismatch", "ok", "mismatch"]
    assert together["reason"].startswith("at image 2: of 20 detections 20 are lost")
    assert first["reason"] is None
    assert second["reason"] == together["reason"]
    assert set(first["detections"]) == {"min", "opt", "max"}
    assert set(second["detections"]) == {"image 2"}
    # What is not of one image is said once.
    assert together["prepare"]["total"] > 0
    assert together["break_even"] is not None
    assert first["prepare"] == first["coverage"] == {}
    assert first["break_even"] is None


def test_a_run_that_is_killed_between_several_images(two_images, leaves_no_process):
    groups = measure_all(two_images[1], two_images[0], Killing(victim=1, after_rounds=2))
    for group in groups:
        torch_run, torchscript = group["runs"]
        assert (torchscript["status"], len(torchscript["samples_s"])) == ("failed", 2)
        assert torchscript["detections"] is None
        assert (torch_run["status"], len(torch_run["samples_s"])) == ("ok", 6)


def test_the_gpu_is_named_by_a_process_of_its_own(monkeypatch, leaves_no_process):
    assert suite.gpu_name(make_plan(device="cpu")) is None
    # Here, or by the process, where there is no GPU.
    known = torch.cuda.is_available()
    assert (suite.gpu_name(make_plan(device="cuda")) is not None) == known
    monkeypatch.setattr(suite, "Worker", Dying)
    assert suite.gpu_name(make_plan(device="cuda")) is None


def test_a_baseline_without_the_precision_runs_at_fp32():
    plan = make_plan(backends=(base.load("torch"), base.load("openvino")), precisions=("int8",))
    records = [run.record for run in plan.runs_for("int8")]
    assert [(x["backend"], x["requested_precision"]) for x in records] == [
        ("torch", "fp32"),
        ("openvino", "int8"),
    ]
    assert suite._extra_runs(plan.runs_for("int8")[0], same_again=False) == []


def test_lower_precision_is_compared_with_fp32(model, leaves_no_process):
    plan = make_plan(backends=(base.load("torch"),), precisions=("bf16",))
    group, _ = measure(model, plan, Progress())
    (run,) = group["runs"]
    assert run["status"] == "ok"
    assert run["effective_precision"] == "bf16"
    assert {x["verdict"] for x in run["detections"].values()} == {"match"}
    assert run["speedup"] is None
    assert run["speedup_over_fp32"]["ratio"] > 0


def test_an_interruption_keeps_the_samples(model, leaves_no_process):
    class Interrupting(Progress):
        @contextlib.contextmanager
        def rounds(self, title: str, rule: StopRule):
            def advance(rounds) -> None:
                if rounds.rounds == 2:
                    raise KeyboardInterrupt

            yield advance

    groups: List[Dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        suite.measure_group(model, "fp32", make_plan(), Interrupting(), groups, False)
    assert groups[0]["stopped"] == "interrupted"
    assert [len(run["samples_s"]) for run in groups[0]["runs"]] == [2, 2]


def test_the_budget_grows_with_the_processes():
    assert suite._with_budget(StopRule(), 4).budget_s == 60
    assert suite._with_budget(StopRule(budget_s=5.0), 4).budget_s == 5
    assert suite._with_budget(StopRule.fixed(9), 4).budget_s is None


def test_files_that_a_backend_wants_kept(tmp_path):
    keep: Callable[..., List[str]] = suite._keep
    assert keep({"a.txt": "one", "b.txt": "two"}, tmp_path) == ["a.txt", "b.txt"]
    assert (tmp_path / "b.txt").read_text() == "two"
    assert keep({"a.txt": "one"}, None) == []


def test_a_model_that_cannot_be_prepared_has_failed_rows():
    group = suite.failed_group("testRetinaNet", 30, "fp32", make_plan(), "no memory")
    assert [(run["status"], run["reason"]) for run in group["runs"]] == [
        ("failed", "no memory")
    ] * 2
    assert (group["rounds"], group["stopped"]) == (0, "all failed")
