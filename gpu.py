"""What an NVIDIA GPU says of itself: what it is and, by NVML, its clocks and what holds it back.

Written against nvidia-ml-py 13; not run on a GPU yet. Everything here is for the reader of a
result: where NVML cannot be had, there is nothing to read and nothing fails.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a busy GPU down (nvml.h). Not among them:
# idleness, clocks that a user has set, and synchronisation with other GPUs.
THROTTLE_REASONS = {
    0x0004: "software power cap",
    0x0008: "hardware slowdown",
    0x0020: "software thermal slowdown",
    0x0040: "hardware thermal slowdown",
    0x0080: "power brake",
}


def name() -> Optional[str]:
    """The name of the GPU that PyTorch uses, which takes no NVML; None where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def describe() -> Optional[Dict[str, Any]]:
    """The GPU that PyTorch uses: `name`, `driver`, `memory_mb`, `max_sm_clock_mhz`.

    Returns:
        None where NVML is not installed (nvidia-ml-py) or refuses.
    """

    def read(nvml: Any, handle: Any) -> Dict[str, Any]:
        return {
            "name": _text(nvml.nvmlDeviceGetName(handle)),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "memory_mb": nvml.nvmlDeviceGetMemoryInfo(handle).total >> 20,
            "max_sm_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        }

    return _ask(read)


def state() -> Optional[Dict[str, Any]]:
    """How it is now: `sm_clock_mhz`, `memory_clock_mhz`, `temperature_c`, `throttled`.

    Returns:
        `throttled` lists the `THROTTLE_REASONS` that hold; None as for `describe`.
    """

    def read(nvml: Any, handle: Any) -> Dict[str, Any]:
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "throttled": throttle_reasons(bits),
        }

    return _ask(read)


def throttle_reasons(bits: int) -> List[str]:
    """The reasons in a mask of NVML's that slow a GPU down."""
    return [reason for bit, reason in THROTTLE_REASONS.items() if bits & bit]


def _ask(read: Any) -> Optional[Dict[str, Any]]:
    """Opens NVML, finds PyTorch's device in it, and reads."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return read(pynvml, _handle(pynvml))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _handle(nvml: Any) -> Any:
    """By its UUID: PyTorch's numbers are of the visible devices, and NVML's are of all."""
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return nvml.nvmlDeviceGetHandleByUUID(uuid.encode())


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
