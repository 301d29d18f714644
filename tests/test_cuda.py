"""What a worker does on a GPU: TF32, copies, calls that wake it. Stand-ins where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import run_blade
from backends import base, onnxruntime
from benchmark import WarmUp
from measure import copies, plan, protocol, run
from measure import group as groups
from measure.group import load_outputs
from measure.run import Run, waking_calls
from measure.tolerances import TOLERANCES, part_bound
from measure.worker import Command, Host
from models import MODELS
from results.record import Copies

ROOT = Path(base.__file__).parent.parent
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


# TF32 ------------------------------------------------------------------------------------------


@pytest.fixture
def flags(monkeypatch):
    """Puts back what `allow_tf32` changes."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    monkeypatch.setenv(base.TF32_OVERRIDE, "1")
    monkeypatch.delenv(base.TF32_OVERRIDE)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def capability(monkeypatch):
    """Makes PyTorch see a GPU of some compute capability."""
    return lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)


@pytest.mark.parametrize(
    ("found", "is_allowed", "precision"),
    [
        ((9, 0), True, "tf32"),
        ((8, 0), True, "tf32"),
        ((7, 5), True, "fp32"),
        ((9, 0), False, "fp32"),
    ],
)
def test_fp32_on_a_gpu_may_be_tf32(flags, capability, found, is_allowed, precision):
    capability(*found)
    base.allow_tf32(is_allowed)
    assert base.computed_in("fp32", "cuda") == precision
    assert base.computed_in("fp32", "cpu") == "fp32"
    assert [base.computed_in(x, "cuda") for x in ("fp16", "bf16")] == ["fp16", "bf16"]


def test_nvidias_own_variable_forbids_it_too(flags, capability, monkeypatch):
    capability(9, 0)
    base.allow_tf32(True)
    monkeypatch.setenv(base.TF32_OVERRIDE, "0")
    assert base.computed_in("fp32", "cuda") == "fp32"


@pytest.mark.parametrize(
    ("tf32", "said"),
    [(True, "True True None"), (False, "False False 0"), (None, "False True None")],
)
def test_a_worker_has_it_from_the_start(tmp_path, tf32, said):
    """Its life, without a request; None leaves what PyTorch does by itself."""
    code = (
        "import os, torch\n"
        "from measure import protocol, run\n"
        "source, other = os.pipe()\n"
        "os.close(other)\n"
        f"run.work(protocol.Start(1, {str(tmp_path / 'log')!r}, 1, {tf32}), source, 1)\n"
        "flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32\n"
        "print(*flags, os.environ.get('NVIDIA_TF32_OVERRIDE'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(base.TF32_OVERRIDE, None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "log").read_text().splitlines()[-1] == said


def test_a_worker_is_told(tmp_path):
    asked = []
    host = Host(Command.own(), tmp_path / "log")
    host.wait()
    host.ask = lambda number, request, limit_s: asked.append(request) or protocol.Started(1)
    try:
        host.start(tmp_path / "1.log", 1)
        host.start(tmp_path / "2.log", 1, tf32=False)
    finally:
        host.close()
    assert [request.tf32 for request in asked] == [None, False]


@pytest.mark.parametrize(
    ("arguments", "device", "tf32"),
    [
        ([], "cuda", True),
        (["--tf32"], "cuda", True),
        (["--no-tf32"], "cuda", False),
        ([], "cpu", None),
        (["--no-tf32"], "cpu", None),
    ],
)
def test_tf32_is_a_matter_of_gpus(arguments, device, tf32):
    options = run_blade.parser().parse_args(["--all", *arguments])
    assert plan._tf32(options, device) is tf32


@pytest.mark.parametrize("tf32", [True, False, None])
def test_runs_and_the_peak_are_started_with_it(tmp_path, tf32):
    started = []

    class Hosted:
        """Both a host and a worker."""

        def start(self, *told: Any) -> None:
            started.append(told[-1])

        def worker(self, *told: Any) -> Any:
            self.start(*told)
            return self

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def ask(self, request: protocol.MeasurePeak) -> protocol.Peak:
            known = {"fp32": protocol.Peak(4e11, "tf32"), "int8": protocol.Peak(None, "int8")}
            return known[request.precision]

    hosts = SimpleNamespace(of=lambda command: Hosted(), folder=tmp_path)
    asked = SimpleNamespace(threads=1, tf32=tf32, device="cuda")
    choice = SimpleNamespace(command=Command.own())
    measurement = object.__new__(groups.Measurement)
    measurement.plan = asked
    measurement.start(SimpleNamespace(choice=choice, log=tmp_path / "log"), hosts)
    # A peak has the name of what was computed in.
    assert groups.measure_peaks(("fp32", "int8"), asked, hosts) == {"tf32": 4e11}
    assert started == [tf32, tf32]


@pytest.mark.parametrize("is_allowed", [True, False])
def test_onnx_runtime_is_told(monkeypatch, exports, tmp_path, is_allowed):
    known = [onnxruntime.TENSORRT, onnxruntime.CUDA, onnxruntime.CPU]
    module = ModuleType("onnxruntime")
    module.get_available_providers = lambda: known[1:]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(onnxruntime, "allows_tf32", lambda: is_allowed)
    providers = onnxruntime._providers(exports("testRetinaNet"), "fp32", "cuda", tmp_path)
    assert providers == [(onnxruntime.CUDA, {"use_tf32": int(is_allowed)}), onnxruntime.CPU]


def test_engines_are_cached_apart(flags, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    machines = []
    for is_allowed in (True, False):
        base.allow_tf32(is_allowed)
        machines.append(base._machine("cuda"))
    assert machines[0] != machines[1]


def test_what_tf32_may_be_off():
    assert TOLERANCES["tf32"] == TOLERANCES["fp32"]
    assert part_bound("backbone", "fp32") == 1e-4
    # Two bits more than bf16, and never less than fp32.
    assert part_bound("backbone", "tf32") == part_bound("backbone", "bf16") / 4
    kinds = ("backbone", "FPN", "heads", "decoding", "NMS", "postprocessing")
    assert all(part_bound(kind, "tf32") >= part_bound(kind, "fp32") for kind in kinds)


def prepare(prepared: Path, device: str, backend: str = "torch") -> protocol.PrepareRun:
    model = MODELS["testRetinaNet"]
    return protocol.PrepareRun(model, backend, "fp32", device, "bundled", str(prepared))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("backend", ["torch", "torch_channels_last", "torchscript"])
def test_fp32_without_tf32_is_what_the_cpu_computes(
    hosts, prepared, exports, tmp_path, device, backend
):
    export, off = exports("testRetinaNet"), {}
    with torch.no_grad():
        wanted = export.eager(*export.inputs)[export.fields.index("pred_boxes")].numpy()
    for tf32 in (True, False):
        log = tmp_path / f"{tf32}.log"
        with hosts.of(Command.own()).worker(log, 1, tf32) as worker:
            facts = worker.ask(prepare(prepared, device, backend))
            worker.ask(protocol.Detect("opt", str(tmp_path / "found.npz")))
            has_it = torch.cuda.get_device_capability() >= base.TF32_CAPABILITY
            assert facts.precision == ("tf32" if tf32 and has_it else "fp32")
            assert worker.ask(protocol.ReadPrecision()).precision == facts.precision
        found = load_outputs(tmp_path / "found.npz")[export.fields.index("pred_boxes")]
        off[tf32] = np.abs(found - wanted).max() if found.shape == wanted.shape else np.inf
    assert off[False] < 0.05
    assert off[True] > off[False] or not has_it


# Copies ----------------------------------------------------------------------------------------


class Event:
    """A moment of a GPU that does everything 2 ms after the one before."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.moment = None

    def record(self) -> None:
        Event.now += 2
        self.moment = Event.now

    def elapsed_time(self, end: Event) -> float:
        return float(end.moment - self.moment)


@pytest.fixture
def on_stand_in(monkeypatch, prepared) -> Run:
    """A run as on a GPU, of which the CPU takes the part."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda image: image.clone())
    monkeypatch.setattr(copies, "DEVICE", "cpu")
    one = Run(prepare(prepared, "cpu"))
    one.given = {name: copies.pinned(call) for name, call in one.inputs.items()}
    one.copier = copies.Copier()
    return one


def test_copies_are_told_apart(on_stand_in):
    called = []
    call = on_stand_in.optimized.call
    wanted = call(*on_stand_in.inputs["opt"])

    def engine(*images: Tensor) -> Any:
        called.append(Event.now)
        return call(*images)

    on_stand_in.optimized = replace(on_stand_in.optimized, call=engine)
    timed = on_stand_in._timed(on_stand_in.given["opt"])
    # Between the two events of the upload and those of the download; all in order.
    events = [event.moment for event in on_stand_in.copier._events]
    assert events == sorted(events)
    assert called == [events[1]]
    assert timed.copies == Copies(0.002, 0.002)
    assert all(torch.equal(one, other) for one, other in zip(timed.outputs, wanted, strict=True))
    assert on_stand_in.timed_calls().copies == (Copies(0.002, 0.002),)


def test_detections_are_read_where_a_call_ends(on_stand_in, exports, tmp_path):
    export = exports("testRetinaNet")
    for name, images in export.tuning_inputs.items():
        answer = on_stand_in.detect(protocol.Detect(name, str(tmp_path / "found.npz")))
        assert answer.malformed is None
        with torch.no_grad():
            wanted = export.eager(*images)
        for one, other in zip(load_outputs(tmp_path / "found.npz"), wanted, strict=True):
            assert np.allclose(one, other.numpy(), atol=1e-3)


def test_what_is_malformed_is_not_copied(on_stand_in, tmp_path):
    for output, words in ((None, "a NoneType instead of"), ((3,), "a int where a tensor")):
        on_stand_in.optimized = replace(on_stand_in.optimized, call=lambda *_, x=output: x)
        answer = on_stand_in.detect(protocol.Detect("opt", str(tmp_path / "found.npz")))
        assert words in answer.malformed


def test_there_are_no_copies_on_a_cpu(prepared):
    one = Run(prepare(prepared, "cpu"))
    assert one.given is one.inputs
    assert one.timed_calls().copies == ()


def test_a_turn_keeps_what_was_copied():
    answers = iter(
        [protocol.Seconds((0.1, 0.3), (Copies(1.0, 2.0),) * 2), protocol.Seconds((0.1, 0.3))]
    )
    turns = SimpleNamespace(ask=lambda *asked: next(answers), calls_s=[], copies=[])
    call = groups._timed_call(turns, 2)
    assert call() == call() == pytest.approx(0.2)
    assert turns.calls_s == [(0.1, 0.3)] * 2
    assert turns.copies == [(Copies(1.0, 2.0),) * 2]  # On a CPU there are none.


def test_medians_of_copies():
    turns = [(Copies(1.0, 10.0), Copies(3.0, 30.0)), (Copies(2.0, 5.0), Copies(2.0, 5.0))]
    turns.append((Copies(100.0, 5.0), Copies(300.0, 7.0)))
    assert groups.median_copies(turns, None) == Copies(2.0, 6.0)
    assert groups.median_copies(turns, 1) == Copies(3.0, 7.0)
    assert groups.median_copies([], None) is None


@pytest.mark.parametrize("backend", ["torch", "torch_channels_last", "torchscript"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
def test_images_and_detections_are_in_pinned_memory(prepared, device, backend):
    one = Run(prepare(prepared, device, backend))
    assert all(image.is_pinned() for call in one.given.values() for image in call)
    seen = []
    call = one.optimized.call
    one.optimized = replace(one.optimized, call=lambda *x: seen.append(call(*x)) or seen[-1])
    timed = one._timed(one.given["opt"])
    for given, found in zip(seen[0], timed.outputs, strict=True):
        assert found.device.type == "cpu"
        assert found.is_pinned() == given.is_cuda
        assert torch.equal(given.cpu(), found)
    assert 0 < timed.copies.upload_s < timed.seconds
    assert 0 < timed.copies.download_s < timed.seconds
    assert timed.copies.upload_s + timed.copies.download_s < timed.seconds


# Calls that wake a worker ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_s", "calls"),
    [(None, 0), (0.2, 0), (0.051, 0), (0.05, 1), (0.02, 2), (0.012, 4), (0.001, 10), (0.0, 0)],
)
def test_short_calls_are_woken(last_s, calls):
    assert waking_calls(last_s) == calls


class Clock:
    """Seconds that only calls take."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def counted(monkeypatch, prepared):
    """A run with two timed inputs, and a clock on which a call takes seconds by its input."""
    one, clock = Run(prepare(prepared, "cpu")), Clock()
    one.inputs["image 2"] = tuple(image + 1 for image in one.inputs["opt"])
    one.timed = ["opt", "image 2"]
    takes = {"opt": 0.02, "image 2": 0.3}
    called = []

    def call(*images: Tensor) -> Any:
        name = next(x for x in one.timed if torch.equal(images[0], one.inputs[x][0]))
        called.append(name)
        clock.now += takes[name]
        return images

    one.optimized = replace(one.optimized, call=call)
    monkeypatch.setattr(run, "time", clock)
    return one, takes, called


def test_a_turn_of_short_calls_begins_with_others(counted):
    one, takes, called = counted
    # Nothing is known of it yet.
    assert one.timed_calls().seconds == pytest.approx((0.02, 0.3))
    assert called == ["opt", "image 2"]
    called.clear()
    # Of two inputs each as its own last call says.
    assert one.timed_calls().seconds == pytest.approx((0.02, 0.3))
    assert called == ["opt"] * 3 + ["image 2"]
    called.clear()
    takes.update({"opt": 0.3, "image 2": 0.011})
    one.timed_calls()
    assert called == ["opt"] * 3 + ["image 2"]
    called.clear()
    one.timed_calls()
    assert called == ["opt"] + ["image 2"] * 5


def test_the_warm_up_needs_no_waking(counted):
    one, _, called = counted
    seconds = one.warm(protocol.Warm.by(WarmUp.fixed(3))).seconds
    assert seconds == pytest.approx([0.16] * 3)
    assert called == ["opt", "image 2"] * 3
    called.clear()
    one.timed_calls()
    assert called == ["opt"] * 3 + ["image 2"]
