"""What a worker does on a GPU: TF32, copies, calls that wake it. Stand-ins where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backends import base, onnxruntime
from measure import group as groups
from measure import protocol
from measure.group import load_outputs
from measure.tolerances import TOLERANCES, part_bound
from measure.worker import Command, Host
from models import MODELS

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


@pytest.mark.parametrize("tf32", [True, False, None])
def test_runs_and_the_peak_are_started_with_it(tmp_path, tf32):
    started = []

    class Hosted:
        """Both a host and a worker."""

        def start(self, *asked: Any) -> None:
            started.append(asked[-1])

        def worker(self, *asked: Any) -> Any:
            self.start(*asked)
            return self

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def ask(self, request: protocol.MeasurePeak) -> protocol.Peak:
            known = {"fp32": protocol.Peak(4e11, "tf32"), "int8": protocol.Peak(None, "int8")}
            return known[request.precision]

    hosts = SimpleNamespace(of=lambda command: Hosted(), folder=tmp_path)
    plan = SimpleNamespace(threads=1, tf32=tf32, device="cuda")
    choice = SimpleNamespace(command=Command.own())
    groups._start(hosts, SimpleNamespace(choice=choice, log=tmp_path / "log"), plan)
    # A peak has the name of what was computed in.
    assert groups.measure_peaks(("fp32", "int8"), plan, hosts) == {"tf32": 4e11}
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


@pytest.fixture(scope="module")
def prepared(exports, tmp_path_factory) -> Path:
    """Weights and inputs of a small RetinaNet, as the request `PrepareModel` leaves them."""
    export = exports("testRetinaNet")
    folder = tmp_path_factory.mktemp("prepared")
    state = {name: x.numpy() for name, x in export.eager.detector.state_dict().items()}
    np.savez(folder / "state.npz", **state)
    images = {f"{name}/0": call[0].numpy() for name, call in export.tuning_inputs.items()}
    np.savez(folder / "inputs.npz", **images)
    return folder


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
    assert off[False] < 0.02
    assert off[True] > off[False] or not has_it
