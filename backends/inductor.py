"""TorchInductor: `torch.compile` of the eager module, for a range of image sizes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

from backends.base import Backend, Optimized, Phases, check_sizes, folder_bytes
from backends.torch import Torch, autocast, count_flops, effective_precision
from errors import first_cause
from results.record import Coverage

if TYPE_CHECKING:
    from detectors.export import Export


# What the loader says of a library on a file system without permission to execute.
NO_EXEC = "failed to map segment from shared object"
# A file beside saved code that is to be replayed as CUDA graphs.
REPLAYS = "cuda_graphs"


class Inductor(Backend):
    """`torch.compile` with height and width dynamic between `min` and `max`.

    What depends on how many objects there are (non-maximum suppression, the selection of
    detections) breaks the graph and runs in eager mode.
    """

    name = "inductor"
    label = "Inductor"
    rank = 4
    in_pytorch = True
    devices = ("cpu", "cuda")
    precisions = Torch.precisions
    default = False

    def unavailable(self, device: str) -> Optional[str]:
        if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return "TorchInductor needs a C++ compiler on a CPU: install g++"
        return Torch().unavailable(device)

    def versions(self) -> Dict[str, str]:
        return Torch().versions()

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        return self._compiled(export, precision, device, cache)

    def load(self, export: Export, precision: str, device: str, folder: Path) -> Optimized:
        """TorchDynamo traces the module again; the code that comes out is there."""
        return self._compiled(export, precision, device, folder, (folder / REPLAYS).exists())

    def _compiled(
        self,
        export: Export,
        precision: str,
        device: str,
        cache: Optional[Path],
        replays: Optional[bool] = None,
    ) -> Optimized:
        """The module is compiled.

        Args:
            replays: whether CUDA graphs are replayed; None: if that is faster.
        """
        import torch

        kept = cache or Path(tempfile.mkdtemp(prefix="inductor_"))
        _configure(device, kept)
        before, start = _counts(), time.perf_counter()
        _declare_dynamic(export)
        try:
            compiled = _compile(export, precision, device, replays)
        except Exception as error:
            if NO_EXEC not in first_cause(error):
                raise
            # PyTorch's own advice names TORCHINDUCTOR_CACHE_DIR, which is set here.
            raise OSError(
                f"TorchInductor's code cannot be run from {kept}, as that is mounted noexec: "
                "TMPDIR, or --cache, names another folder for it"
            ) from None
        seconds = Phases(compile=time.perf_counter() - start)
        prepared = _counts()

        def call(*images: Any) -> Any:
            check_sizes(images, export, "TorchInductor's code")
            return compiled.call(*images)

        def save(folder: Path) -> None:
            shutil.copytree(str(kept), str(folder), dirs_exist_ok=True)
            if compiled.replays:
                (folder / REPLAYS).touch()

        return Optimized(
            call=call,
            precision=precision,
            provider=f"{device}, CUDA graphs" if compiled.replays else device,
            threads=torch.get_num_threads() if device == "cpu" else None,
            seconds=seconds,
            coverage=prepared.since(before),
            cached=_all_cached(),
            read_precision=lambda: effective_precision(
                compiled.plain, export, precision, export.inputs
            ),
            read_coverage=lambda: Coverage(
                recompilations_while_timed=_counts().graphs - prepared.graphs,
                share_of_flops=_share_of_flops(export, precision, device),
            ),
            read_artifact_bytes=lambda: folder_bytes(kept),
            save=save,
        )


@dataclass(frozen=True)
class _Compiled:
    """The compiled module.

    Attributes:
        call: a function of images, warm at all sizes.
        plain: one without CUDA graphs, warm at `opt`; where they are replayed, a profiler sees no
            operator.
    """

    call: Callable
    plain: Callable

    @property
    def replays(self) -> bool:
        """Whether it replays CUDA graphs."""
        return self.call is not self.plain


def _compile(
    export: Export, precision: str, device: str, replays: Optional[bool] = None
) -> _Compiled:
    """The module is compiled; on CUDA with CUDA graphs if it is faster with them.

    Args:
        replays: whether it has CUDA graphs, where that is known.
    """
    import torch

    module = export.python_module()
    plain = chosen = autocast(torch.compile(module), precision, device)
    if device == "cuda" and replays is not False:
        recorded = torch.compile(module, options={"triton.cudagraphs": True})
        recorded = _own_outputs(autocast(recorded, precision, device))
        # At one size, as each takes half a minute to compile for.
        plain_s = _seconds_of_calls(plain, export.inputs)  # Its profile is read, too.
        if replays or _seconds_of_calls(recorded, export.inputs) < plain_s:
            chosen = recorded
    _warm(chosen, export)
    return _Compiled(chosen, plain)


def _warm(call: Callable, export: Export) -> None:
    """Code is made when a size is first seen, and once more for what turns out to be dynamic."""
    for which in ("opt", "min", "max", "opt"):
        call(*export.tuning_inputs[which])
    for images in export.other_inputs:
        call(*images)


def _own_outputs(call: Callable) -> Callable[..., Tuple[Any, ...]]:
    """The call with outputs of its own: a CUDA graph's next replay overwrites the last one's."""
    import torch

    def own(*images: Any) -> Tuple[Any, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(tensor.clone() for tensor in call(*images))

    return own


def _seconds_of_calls(call: Callable, images: Tuple[Any, ...], calls: int = 10) -> float:
    """Seconds that some calls on a CUDA device take."""
    import torch

    # The first compiles, and CUDA graphs are recorded in the second or the one after it.
    for _ in range(3):
        call(*images)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call(*images)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _configure(device: str, kept: Path) -> None:
    """Settings of the process: on a CPU weights are constants.

    Args:
        kept: directory for the generated code; by default the next invocation would find it.
    """
    import torch._inductor.config

    configure_dynamo()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
    torch._inductor.config.freezing = device == "cpu"


def configure_dynamo() -> None:
    """Settings of the process: TorchDynamo gives up no function of a detector as too varied."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    # TorchDynamo takes its result for a torch.Size, which is not a tensor.
    torch._dynamo.disallow_in_graph(torch._shape_as_tensor)


def _declare_dynamic(export: Export) -> None:
    """Says which sides of the images vary, so that no code is made for one size alone.

    Without their range: `mark_dynamic(min=, max=)` is an error where any guard holds for some
    sizes only, and padding to a multiple of 32 makes such guards.
    """
    import torch._dynamo

    smallest, largest = export.tuning_inputs["min"], export.tuning_inputs["max"]
    for images in (*export.tuning_inputs.values(), *export.other_inputs):
        for image, low, high in zip(images, smallest, largest):
            for side in (1, 2):
                if low.shape[side] < high.shape[side]:
                    torch._dynamo.maybe_mark_dynamic(image, side)


def _all_cached() -> bool:
    """Whether every graph that can be cached came from the cache."""
    from torch._dynamo.utils import counters

    graphs = counters["inductor"]
    return graphs["fxgraph_cache_hit"] > 0 and graphs["fxgraph_cache_miss"] == 0


def _share_of_flops(export: Export, precision: str, device: str) -> Optional[float]:
    """The share of a call's FLOPs that lies in captured graphs, 0 to 1.

    The eager module is captured once more, with a compiler that counts and runs the graphs as
    they are; TorchDynamo's counts are put back after that.
    """
    import torch
    from torch._dynamo.utils import counters
    from torch.utils.flop_counter import FlopCounterMode

    inside = 0

    def counting(graph: Any, inputs: Any) -> Callable:
        def run(*arguments: Any) -> Any:
            nonlocal inside
            with FlopCounterMode(display=False) as counter:
                outputs = graph(*arguments)
            inside += counter.get_total_flops()
            return outputs

        return run

    images = export.inputs
    before = {kind: counts.copy() for kind, counts in counters.items()}
    autocast(torch.compile(export.eager, backend=counting), precision, device)(*images)
    counters.update(before)
    total = count_flops(export.eager, images)
    return inside / total if total else None


@dataclass(frozen=True)
class _Counts:
    """What TorchDynamo has compiled up to some moment: operators, graphs, breaks between them."""

    operators: int
    graphs: int
    graph_breaks: int

    def since(self, before: _Counts) -> Coverage:
        """What came after an earlier moment."""
        return Coverage(
            operators_in_engine=self.operators - before.operators,
            segments=self.graphs - before.graphs,
            graph_breaks=self.graph_breaks - before.graph_breaks,
        )


def _counts() -> _Counts:
    """The counts of this process so far."""
    from torch._dynamo.utils import counters

    stats = counters["stats"]
    return _Counts(
        operators=int(stats["calls_captured"]),
        graphs=int(stats["unique_graphs"]),
        graph_breaks=sum(counters["graph_break"].values()),
    )
