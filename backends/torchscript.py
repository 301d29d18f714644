"""TorchScript: the exported module, frozen and optimized for inference."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional

from backends.base import Backend, Optimized, Phases
from backends.torch import Torch, autocast, effective_precision
from results.record import Coverage

if TYPE_CHECKING:
    from detectors.export import Export


# Of the frozen module, in the folder that it is saved to.
FILE = "frozen.ts"


class TorchScript(Backend):
    """`torch.jit.freeze` and `torch.jit.optimize_for_inference`."""

    name = "torchscript"
    label = "TorchScript"
    rank = 3
    in_pytorch = True
    devices = ("cpu", "cuda")
    precisions = Torch.precisions

    def unavailable(self, device: str) -> Optional[str]:
        return Torch().unavailable(device)

    def versions(self) -> Dict[str, str]:
        return Torch().versions()

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        import torch

        start = time.perf_counter()
        exported_module = self._export(export, precision, device).eval()
        exported = time.perf_counter()
        made = self._optimized(lambda: torch.jit.freeze(exported_module), export, precision, device)
        return replace(made, seconds=replace(made.seconds, export=exported - start))

    def load(self, export: Export, precision: str, device: str, folder: Path) -> Optimized:
        import torch

        file = str(folder / FILE)
        return self._optimized(
            lambda: torch.jit.load(file, map_location=device), export, precision, device
        )

    def _optimized(
        self, frozen: Callable[[], Any], export: Export, precision: str, device: str
    ) -> Optimized:
        """What becomes of a frozen module.

        Args:
            frozen: makes it: what is optimized for oneDNN cannot be saved any more.
        """
        import torch

        start = time.perf_counter()
        module = frozen()
        traced_casts = precision != "fp32" and export.kind == "traced"
        if precision == "fp32" or traced_casts:
            # Its own operators would compute in fp32 whatever autocast says.
            module = torch.jit.optimize_for_inference(module)
        compiled = time.perf_counter()
        # Where the casts are part of the graph, autocast would only cast once more.
        call = autocast(module, "fp32" if traced_casts else precision, device)
        return Optimized(
            call=call,
            precision=precision,
            provider=device,
            threads=torch.get_num_threads() if device == "cpu" else None,
            coverage=Coverage(operators=count_operators(module.graph)),
            seconds=Phases(compile=compiled - start),
            read_precision=lambda: effective_precision(call, export, precision),
            read_artifact_bytes=lambda: saved_bytes(frozen()),
            save=lambda folder: torch.jit.save(frozen(), str(folder / FILE)),
        )

    def _export(self, export: Export, precision: str, device: str) -> Any:
        """The exported module; traced under autocast, so that freezing folds the weights' casts."""
        import torch

        if precision == "fp32" or export.kind != "traced":
            return export.script_module()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        # Without its cache: the tracer would take cached casts for constants of another graph.
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return export.trace()


def saved_bytes(module: Any) -> int:
    """Size of the file that a TorchScript module is saved to."""
    import torch

    file = io.BytesIO()
    torch.jit.save(module, file)
    return len(file.getvalue())


def count_operators(graph: Any) -> int:
    """Number of operators of a TorchScript graph, those of its blocks included."""
    bookkeeping = ("prim::Constant", "prim::ListConstruct", "prim::TupleConstruct")
    nodes = [node for node in graph.nodes() if node.kind() not in bookkeeping]
    inner = [block for node in nodes for block in node.blocks()]
    return len(nodes) + sum(count_operators(block) for block in inner)
