"""The baseline: the eager module, under autocast at lower precisions."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Dict, List, Optional, Tuple

from backends.base import Backend, Optimized

if TYPE_CHECKING:
    from detectors.export import Export


class Torch(Backend):
    """PyTorch as it comes."""

    name = "torch"
    label = "Torch"
    rank = 0
    in_pytorch = True
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

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        import torch

        if export.own_runner is not None:
            precision = "fp32"
        # Autocast keeps what it has cast only of parameters that require gradients.
        for parameter in export.eager.parameters():
            parameter.requires_grad_(True)
        call = autocast(export.eager, precision, device)
        return Optimized(
            call=call,
            label=export.own_runner,
            context=autocasting(precision, device),
            precision=precision,
            provider=device,
            threads=torch.get_num_threads() if device == "cpu" else None,
            read_precision=lambda: effective_precision(call, export, precision),
        )

    def load(self, export: Export, precision: str, device: str, folder: Path) -> Optimized:
        return self.optimize(export, precision, device)


def autocast(module: Callable, precision: str, device: str) -> Callable[..., Tuple[Any, ...]]:
    """The module called without gradients and, at a lower precision, under autocast.

    Args:
        module: takes images, gives the flat tuple.
    """
    import torch

    context = autocasting(precision, device)

    def call(*images: Any) -> Tuple[Any, ...]:
        with torch.no_grad():
            if context is None:
                return module(*images)
            with context():
                return module(*images)

    return call


def autocasting(precision: str, device: str) -> Optional[Callable[[], ContextManager[Any]]]:
    """Autocast to a lower precision; None for fp32.

    Where the outermost context ends, PyTorch forgets which weights it has cast. So a call in a
    context of its own casts them all again; within one that lasts, once.
    """
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return None if dtype is None else lambda: torch.autocast(device, dtype=dtype)


def count_flops(module: Callable, images: Tuple[Any, ...]) -> Optional[int]:
    """Floating-point operations of a call.

    These are two for each multiply-add of a convolution or product, as `torch.utils.flop_counter`
    counts them, nothing else counted; None where it cannot: before PyTorch 2.1, which does not have
    it, and of loops (`while_loop`). What the module gives meanwhile is of no use: of `torch.cond`
    both branches are run, and what comes out is always that of the first.
    """
    import torch

    try:
        from torch.utils.flop_counter import FlopCounterMode
    except ImportError:
        return None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            module(*images)
        except Exception:  # Other calls of the module do not fail.
            return None
    return int(counter.get_total_flops())


# What PyTorch's profiler calls operators that have kernels of lower precision, fused ones included.
HEAVY = re.compile(r"(convolution(_pointwise_?)?|addmm|linear\w*|b?mm)$")


def effective_precision(
    call: Callable, export: Export, precision: str, images: Optional[Tuple[Any, ...]] = None
) -> str:
    """The precision that most convolutions and matrix products of a call are computed in.

    Read from a profile of one call, where each operator has the types of its inputs. The profiler
    slows the process down for some seconds more.

    Args:
        call: takes the images of the export.
        precision: as requested; fp32 is what PyTorch computes in unless something asks for less.
        images: those of the call; by default, the smallest.

    Raises:
        RuntimeError: the profiler sees none of them, as where a CUDA graph is replayed.
    """
    if precision == "fp32":
        return precision
    types = Counter(_input_types(call, images or export.tuning_inputs["min"]))
    if not types:
        raise RuntimeError("PyTorch's profiler sees no convolution or matrix product in a call")
    lower = {"fp16": "c10::Half", "bf16": "c10::BFloat16"}[precision]
    return precision if types[lower] > sum(types.values()) / 2 else "fp32"


def _input_types(call: Callable, images: Tuple[Any, ...]) -> List[str]:
    """C++ types of the data that the heavy operators of a call compute on."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        call(*images)
    with tempfile.TemporaryDirectory(prefix="run_blade_") as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    heavy = [event["args"]["Input type"] for event in events if HEAVY.search(event.get("name", ""))]
    return [types[0] for types in heavy if types and types[0]]
