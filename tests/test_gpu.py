"""What is read from NVML, with a stand-in for the library: there need not be a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from measure import gpu
from measure.protocol import Survey
from results.record import GpuState

UUID = "aaaa-bbbb"


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch) -> ModuleType:
    """A GPU that is hot and held back."""
    module = ModuleType("pynvml")
    answers = {
        "nvmlDeviceGetName": b"Some GPU",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 << 30),
        "nvmlDeviceGetMaxClockInfo": 1980,
        "nvmlDeviceGetTemperature": 88,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4 | 0x40,
    }
    for name, answer in answers.items():
        setattr(module, name, lambda handle, *more, answer=answer: check(handle, answer))
    module.nvmlDeviceGetClockInfo = lambda handle, kind: check(handle, {1: 1200, 2: 2600}[kind])
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlInit = lambda: setattr(module, "opened", module.opened + 1)
    module.nvmlShutdown = lambda: setattr(module, "opened", module.opened - 1)
    module.opened = 0
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return module


def check(handle: bytes, answer: object) -> object:
    assert handle == f"GPU-{UUID}".encode()
    return answer


def test_what_it_is_and_how_it_is(nvml):
    assert gpu.read() == GpuState(
        name="Some GPU",
        driver="580.1",
        memory_mb=8192,
        max_sm_clock_mhz=1980,
        sm_clock_mhz=1200,
        memory_clock_mhz=2600,
        temperature_c=88,
        throttled=("software power cap", "hardware thermal slowdown"),
    )
    assert nvml.opened == 0


def test_a_pytorch_that_does_not_tell_the_uuid(nvml, monkeypatch):
    """As before mid-2024: the only GPU is the one, and of several none is known."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    nvml.nvmlDeviceGetCount = lambda: 1
    nvml.nvmlDeviceGetHandleByIndex = lambda index: f"GPU-{UUID}".encode()
    assert gpu.read().name == "Some GPU"
    nvml.nvmlDeviceGetCount = lambda: 2
    assert gpu.read() == GpuState()
    assert nvml.opened == 0


def test_an_nvml_that_lacks_something(nvml):
    del nvml.nvmlDeviceGetMemoryInfo
    assert gpu.read() == GpuState()
    assert nvml.opened == 0


def test_its_name_takes_no_nvml(monkeypatch):
    from measure.run import survey

    monkeypatch.setitem(sys.modules, "pynvml", None)  # import raises ImportError
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    found = survey(Survey(("torch",), None))
    assert (found.device, found.gpu) == ("cuda", "Some GPU")
    assert found.cudnn_benchmark is False  # As Detectron2 has it.
    # It is none of those that were measured on.
    assert survey(Survey(("torch",), "cpu")).gpu is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = survey(Survey(("torch",), None))
    assert (found.device, found.gpu) == ("cpu", None)
    assert found.cudnn_benchmark is None


def test_an_idle_gpu_is_not_throttled():
    assert gpu.throttle_reasons(0x1 | 0x2 | 0x10 | 0x100) == ()


def test_without_nvml_there_is_nothing(monkeypatch, nvml):
    def refuse(*args: object) -> None:
        raise NVMLError("driver not loaded")

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", refuse)
    assert gpu.read() == GpuState()
    assert nvml.opened == 0
    monkeypatch.setattr(nvml, "nvmlInit", refuse)
    assert gpu.read() == GpuState()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import raises ImportError
    assert gpu.read() == GpuState()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_real_gpu():
    pytest.importorskip("pynvml")
    torch.zeros(1, device="cuda")
    found = gpu.read()
    assert found.name == torch.cuda.get_device_name()
    assert found.memory_mb > 1000
    assert 0 < found.sm_clock_mhz <= found.max_sm_clock_mhz
