"""How fast the machine multiplies matrices: what an engine could reach at the very most."""

from __future__ import annotations

import time
from typing import Any, Callable, List, Optional, Tuple

# Sides of the matrices, and of the image that is convolved: large enough to keep all cores busy.
MATRIX_SIDES = {"cpu": 2048, "cuda": 8192}
IMAGE_SIDES = {"cpu": 64, "cuda": 256}
CHANNELS = 256

# A function to call, and its operations: two for each multiply-add.
Product = Tuple[Callable[[], Any], int]


def measure_peak(precision: str, device: str, seconds: float = 0.5) -> Optional[float]:
    """Operations per second of PyTorch's matrix products, the fastest of some calls.

    A product of matrices, and a convolution as in the heads of detectors: on some CPUs the library
    behind one of them is twice as fast as that behind the other.

    Args:
        precision: `fp32`, `fp16`, `bf16` or `int8`; the product of int8 is int32.
        seconds: that each takes, about.

    Returns:
        None where PyTorch has no such product on this device.
    """
    rates: List[float] = []
    for make in (_matrix_product, _convolution):
        try:
            product, operations = make(precision, device)
            rates.append(operations / _fastest(product, device, seconds))
        except RuntimeError:  # PyTorch has no kernel for it.
            continue
    return max(rates, default=None)


def _ones(precision: str, device: str, *shape: int) -> Any:
    import torch

    types = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "int8": torch.int8,
    }
    return torch.ones(*shape, device=device).to(types[precision])


def _matrix_product(precision: str, device: str) -> Product:
    import torch

    side = MATRIX_SIDES[device]
    left, right = (_ones(precision, device, side, side) for _ in range(2))
    multiply = torch._int_mm if precision == "int8" else torch.mm
    return lambda: multiply(left, right), 2 * side**3


def _convolution(precision: str, device: str) -> Product:
    import torch

    side = IMAGE_SIDES[device]
    image = _ones(precision, device, 1, CHANNELS, side, side)
    weight = _ones(precision, device, CHANNELS, CHANNELS, 3, 3)
    return lambda: torch.conv2d(image, weight, padding=1), 2 * 9 * (CHANNELS * side) ** 2


def _fastest(product: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    times = [timed()]
    while sum(times) < seconds:
        times.append(timed())
    return min(times)
