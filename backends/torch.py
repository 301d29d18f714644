"""The baseline: the eager module, under autocast at lower precisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Optional

from backends.base import Backend, Optimized

if TYPE_CHECKING:
    from models import Export


class Torch(Backend):
    """PyTorch as it comes."""

    name = "torch"
    label = "Torch"
    rank = 0
    devices = ("cpu", "cuda")
    precisions = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}

    def unavailable(self, device: str) -> Optional[str]:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            return "PyTorch sees no CUDA device here"
        return None

    def versions(self) -> Dict[str, str]:
        import torch
        import torchvision

        return {"torch": torch.__version__, "torchvision": torchvision.__version__}

    def optimize(self, export: Export, precision: str, device: str) -> Optimized:
        import torch

        return Optimized(
            call=autocast(export.eager, precision, device),
            precision=precision,
            provider=device,
            threads=torch.get_num_threads() if device == "cpu" else None,
        )


def autocast(module, precision: str, device: str):
    """The module called without gradients and, at a lower precision, under autocast.

    Args:
        module: takes images, gives the flat tuple.
    """
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)

    def call(*images):
        with torch.no_grad():
            if dtype is None:
                return module(*images)
            with torch.autocast(device, dtype=dtype):
                return module(*images)

    return call
