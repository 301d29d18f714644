"""TorchInductor: `torch.compile` of the eager module, for a range of image sizes."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any, Dict, Optional

from backends.base import Backend, Optimized, check_sizes
from backends.torch import Torch, autocast, effective_precision

if TYPE_CHECKING:
    from models import Export


class Inductor(Backend):
    """`torch.compile` with height and width dynamic between `min` and `max`.

    What depends on how many objects there are (non-maximum suppression, the selection of
    detections) breaks the graph and runs in eager mode.
    """

    name = "inductor"
    label = "Inductor"
    rank = 3
    devices = ("cpu", "cuda")
    precisions = Torch.precisions
    default = False

    def unavailable(self, device: str) -> Optional[str]:
        import torch

        if not hasattr(torch, "compile"):
            return f"torch.compile comes with PyTorch 2.0, and this is {torch.__version__}"
        if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return "TorchInductor needs a C++ compiler on a CPU: install g++"
        return Torch().unavailable(device)

    def versions(self) -> Dict[str, str]:
        return Torch().versions()

    def optimize(self, export: Export, precision: str, device: str) -> Optimized:
        import torch

        _configure(device)
        before, start = _counts(), time.perf_counter()
        _declare_dynamic(export)
        compiled = autocast(torch.compile(export.eager), precision, device)

        def call(*images: Any) -> Any:
            check_sizes(images, export, "TorchInductor's code")
            return compiled(*images)

        # Code is made when a size is first seen, and once more for what turns out to be dynamic.
        for which in ("opt", "min", "max", "opt"):
            call(*export.tuning_inputs[which])
        prepared = _counts()
        return Optimized(
            call=call,
            precision=precision,
            provider=device,
            threads=torch.get_num_threads() if device == "cpu" else None,
            seconds={"compile": time.perf_counter() - start},
            coverage={key: count - before[key] for key, count in prepared.items()},
            read_precision=lambda: effective_precision(compiled, export, precision),
            read_coverage=lambda: {
                "recompilations_while_timed": _counts()["segments"] - prepared["segments"]
            },
        )


def _configure(device: str) -> None:
    """Settings of the process: weights are constants, and no function is given up as too varied."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 64
    # TorchDynamo takes its result for a torch.Size, which is not a tensor.
    torch._dynamo.disallow_in_graph(torch._shape_as_tensor)
    torch._inductor.config.freezing = device == "cpu"


def _declare_dynamic(export: Export) -> None:
    """Says which sides of the images vary, so that no code is made for one size alone.

    Without their range: `mark_dynamic(min=, max=)` is an error where any guard holds for some
    sizes only, and padding to a multiple of 32 makes such guards.
    """
    import torch._dynamo

    smallest, largest = export.tuning_inputs["min"], export.tuning_inputs["max"]
    for images in export.tuning_inputs.values():
        for image, low, high in zip(images, smallest, largest):
            for side in (1, 2):
                if low.shape[side] < high.shape[side]:
                    torch._dynamo.maybe_mark_dynamic(image, side)


def _counts() -> Dict[str, int]:
    """What TorchDynamo has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return {
        "operators_in_engine": int(counters["stats"]["calls_captured"]),
        "segments": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": sum(counters["graph_break"].values()),
    }
