"""Generations of a group: real workers, ended and started anew."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scipy import stats
from test_group import OPENVINO, TORCH, TORCHSCRIPT, make_plan

import benchmark
from backends import base
from benchmark import StopRule
from measure import group as groups
from measure import protocol, quiet, run
from measure.generations import Generations
from measure.group import PreparedModel
from measure.progress import Progress
from measure.worker import Command, Hosts
from models import MODELS
from results.environment import cpu_flags, has_native_bf16
from results.record import Group

THREE = StopRule.fixed(7, 3)


@pytest.fixture
def own_hosts(tmp_path) -> Iterator[Hosts]:
    """Hosts that a test may end and start anew."""
    hosts = Hosts((Command.own(),), tmp_path)
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def model(hosts, tmp_path_factory) -> PreparedModel:
    folder = tmp_path_factory.mktemp("model")
    return groups.prepare_model(MODELS["testRetinaNet"], 30, make_plan(), hosts, folder, Progress())


class Watching(Progress):
    """Takes note of the processes that the rounds are made in, and of what is said.

    Args:
        kill_in: generation in which the second process is killed.
    """

    def __init__(self, hosts: Hosts, kill_in: int | None = None) -> None:
        super().__init__()
        self.hosts, self.kill_in = hosts, kill_in
        self.hosts_seen: list[int] = []
        self.workers_seen: list[frozenset[int]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextlib.contextmanager
    def rounds(self, title: str, rule: StopRule) -> Iterator[Any]:
        def advance(rounds: benchmark.Rounds) -> None:
            if rounds.generations[-1] > 1:
                return
            host = psutil.Process(self.hosts.of(Command.own()).wait().pid)
            workers = sorted(host.children(), key=lambda x: (x.create_time(), x.pid))
            self.hosts_seen.append(host.pid)
            self.workers_seen.append(frozenset(x.pid for x in workers))
            if len(rounds.generations) == self.kill_in:
                os.kill(workers[1].pid, signal.SIGKILL)

        yield advance


def measure(model: PreparedModel, hosts: Hosts, progress: Progress, **changes: Any) -> Group:
    plan = make_plan(rule=THREE, **changes)
    measured = groups.measure_group(model, plan.precisions[0], plan, hosts, progress)
    if measured.interruption is not None:
        raise measured.interruption
    (group,) = measured.groups
    return group


def test_each_generation_has_processes_of_its_own(model, own_hosts):
    seen = Watching(own_hosts)
    group = measure(model, own_hosts, seen, choices=(TORCH, TORCHSCRIPT, OPENVINO))
    assert (group.generations, group.rounds, group.stopped) == ((2, 2, 3), 7, "fixed")
    assert len(set(seen.hosts_seen)) == 3
    assert [len(workers) for workers in seen.workers_seen] == [3, 3, 3]
    assert len(frozenset().union(*seen.workers_seen)) == 9
    assert not [line for line in seen.said if "cannot be saved" in line]
    for run_of in group.runs:
        assert run_of.status == "ok"
        assert len(run_of.samples_s) == 7
        # Of the process that has compiled it.
        assert run_of.peak_memory_mb > 100
    torchscript = group.runs[1]
    assert torchscript.prepare.export > 0
    parts = [benchmark.by_generation(x.samples_s, group.generations) for x in group.runs[:2]]
    medians = [[np.median(part) for part in each] for each in parts]
    logs = np.log([a / b for a, b in zip(*medians)])
    assert torchscript.speedup.ratio == pytest.approx(float(np.exp(logs.mean())))
    width = stats.t.ppf(0.98, 2) * stats.sem(logs)
    assert torchscript.speedup.high == pytest.approx(float(np.exp(logs.mean() + width)))


def test_a_run_that_dies_in_a_later_generation_costs_its_row(model, own_hosts):
    group = measure(model, own_hosts, Watching(own_hosts, kill_in=2))
    torch_run, torchscript = group.runs
    assert torchscript.status == "failed"
    assert torchscript.reason.startswith("the process was killed by SIGKILL")
    assert len(torchscript.samples_s) == 3
    assert (torch_run.status, len(torch_run.samples_s)) == ("ok", 7)


def test_an_a_a_that_dies_is_said_and_measured_again(model, own_hosts):
    seen = Watching(own_hosts, kill_in=2)
    plan = make_plan(rule=THREE, choices=(TORCH,))
    measured = groups.measure_group(model, "fp32", plan, own_hosts, seen, same_again=True)
    assert measured.groups[0].runs[0].status == "ok"
    assert measured.aa is None
    (said,) = [line for line in seen.said if "which has no row" in line]
    assert said.startswith(
        "torch again, which has no row: failed: the process was killed by SIGKIL"
    )


def test_the_peak_of_memory_is_that_of_the_process_with_more():
    small, large = protocol.Memory(100.0, 7.0), protocol.Memory(300.0, 5.0)
    assert groups._larger(small, large) == protocol.Memory(300.0, 7.0)
    assert groups._larger(None, small) == groups._larger(small, None) == small
    assert groups._larger(protocol.Memory(1.0), protocol.Memory(2.0)) == protocol.Memory(2.0)


def test_a_run_that_cannot_be_started_anew_costs_its_row(model, own_hosts, monkeypatch, tmp_path):
    """What its engine was saved to is broken; what cannot be saved is said."""
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "frozen.ts").write_bytes(b"no archive")
    monkeypatch.setattr(Generations, "_saved", lambda self, run: str(garbage))
    seen = Watching(own_hosts)
    group = measure(model, own_hosts, seen)
    torch_run, torchscript = group.runs
    assert torchscript.status == "failed"
    assert torchscript.reason.startswith("when it was started anew: ")
    assert len(torchscript.samples_s) == 2
    assert (torch_run.status, len(torch_run.samples_s)) == ("ok", 7)
    assert [line for line in seen.said if line.startswith("TorchScript cannot be saved")]


def test_what_the_machine_did_between_generations_is_not_counted():
    moments = [(100.0, 50.0, 20.0), (110.0, 58.0, 26.0), (150.0, 97.0, 28.0), (170.0, 107.0, 36.0)]
    worker: Any = object()
    one, two, three, four = (
        quiet.Snapshot(total, busy, 0.0, {worker: own}, 0.0, 0) for total, busy, own in moments
    )
    # 10 s with 2 s of others, then 20 s with 2 s; 37 of the 40 s in between belong to nobody.
    found = quiet.within([(one, two), (three, four)])
    assert found.others_share == pytest.approx(4 / 30)


# The worker's side -----------------------------------------------------------------------------


def request(model: PreparedModel, backend: str, **changes: Any) -> protocol.PrepareRun:
    asked = protocol.PrepareRun(
        MODELS["testRetinaNet"], backend, "fp32", "cpu", "bundled", str(model.folder)
    )
    return dataclasses.replace(asked, **changes)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("torchscript", "fp32"),
        ("torchscript", "bf16"),
        ("openvino", "fp32"),
        ("openvino", "bf16"),
        ("onnxruntime", "fp32"),
        pytest.param("openvino", "int8", marks=pytest.mark.slow),
        pytest.param("onnxruntime", "int8", marks=pytest.mark.slow),
        pytest.param("inductor", "fp32", marks=pytest.mark.slow),
    ],
)
def test_a_worker_reloads_what_was_saved(model, tmp_path, monkeypatch, backend, precision):
    if precision == "bf16" and not has_native_bf16(cpu_flags()):
        pytest.skip("this CPU has no native bf16")
    asked = request(model, backend, precision=precision)
    torch.compiler.reset()  # What a worker, which is a process of its own, begins with.
    made = run.Run(asked)
    saved = str(tmp_path / "saved")
    made.save(protocol.Save(saved))
    assert os.listdir(saved)

    def refuse(*args: Any) -> None:
        raise AssertionError("it is made once more")

    monkeypatch.setattr(type(base.load(backend)), "optimize", refuse)
    images, coverage = made.inputs["opt"], made.facts().coverage
    outputs = made.optimized.call(*images)
    torch.compiler.reset()
    again = run.Run(dataclasses.replace(asked, saved=saved))
    for expected, found in zip(outputs, again.optimized.call(*images)):
        assert (expected == found).all()
    assert again.facts().coverage == coverage


def test_what_cannot_be_saved_is_made_once_more(model, tmp_path):
    made = run.Run(request(model, "torch"))
    saved = str(tmp_path / "saved")
    made.save(protocol.Save(saved))
    assert not Path(saved).exists()
    again = run.Run(request(model, "torch", saved=saved))
    assert len(again.optimized.call(*made.inputs["min"])) == len(made.export.fields)


def test_there_is_no_folder_of_which_a_part_is_missing(model, tmp_path, monkeypatch):
    made = run.Run(request(model, "onnxruntime"))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the disk is full")

    made.optimized = dataclasses.replace(made.optimized, save=fail)
    with pytest.raises(OSError, match="full"):
        made.save(protocol.Save(str(tmp_path / "saved")))
    assert not (tmp_path / "saved").exists()
