"""What an NVIDIA GPU says of itself: what it is and, by NVML, its clocks and what holds it back.

Written against nvidia-ml-py 13, and run on an NVIDIA H200. Everything here is for the reader of a
result: where NVML cannot be had, there is nothing to read and nothing fails.
"""

from __future__ import annotations

from typing import Any, Tuple

from results.record import GpuState

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a busy GPU down (nvml.h). Not among them:
# idleness, clocks that a user has set, and synchronisation with other GPUs.
THROTTLE_REASONS = {
    0x0004: "software power cap",
    0x0008: "hardware slowdown",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "power brake",
}


def read() -> GpuState:
    """The GPU that PyTorch uses, as NVML tells.

    Returns:
        nothing in it where NVML is not installed (nvidia-ml-py) or refuses.
    """
    try:
        import pynvml
    except ImportError:
        return GpuState()
    try:
        pynvml.nvmlInit()
        try:
            return _state(pynvml, _handle(pynvml))
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML refuses, or is of a version that lacks something.
        return GpuState()


def _state(nvml: Any, handle: Any) -> GpuState:
    return GpuState(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        memory_mb=nvml.nvmlDeviceGetMemoryInfo(handle).total >> 20,
        max_sm_clock_mhz=nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        throttled=throttle_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    )


def throttle_reasons(bits: int) -> Tuple[str, ...]:
    """The reasons in a mask of NVML's that slow a GPU down."""
    return tuple(reason for bit, reason in THROTTLE_REASONS.items() if bits & bit)


def _handle(nvml: Any) -> Any:
    """By its UUID: PyTorch's numbers are of the visible devices, and NVML's are of all.

    Raises:
        LookupError: PyTorch does not tell it, as before mid-2024, and there are several GPUs.
    """
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    if nvml.nvmlDeviceGetCount() > 1:
        raise LookupError("which of the GPUs it is")
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
