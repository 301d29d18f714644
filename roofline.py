"""How fast the machine multiplies matrices: what an engine could reach at the very most."""

from __future__ import annotations

import time
from typing import Optional

# Side of the matrices: large enough that reading them does not matter.
SIDES = {"cpu": 2048, "cuda": 8192}


def matmul_peak(precision: str, device: str, seconds: float = 0.5) -> Optional[float]:
    """Operations per second of PyTorch's matrix product, the fastest of some calls.

    Args:
        precision: `fp32`, `fp16`, `bf16` or `int8`; the product of int8 is int32.
        seconds: that it takes, about.

    Returns:
        two for each multiply-add; None where PyTorch has no such product on this device.
    """
    import torch

    dtype = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "int8": torch.int8,
    }[precision]
    side = SIDES[device]
    multiply = torch._int_mm if precision == "int8" else torch.mm

    def timed() -> float:
        start = time.perf_counter()
        multiply(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    try:
        left, right = (torch.ones(side, side, device=device).to(dtype) for _ in range(2))
        timed()
        times = [timed()]
        while sum(times) < seconds:
            times.append(timed())
    except RuntimeError:
        return None
    return 2 * side**3 / min(times)
