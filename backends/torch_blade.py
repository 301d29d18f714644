"""TorchBlade: `torch_blade.optimize` with its TensorRT pipeline; see docs/torchblade.md.

Written against BladeDISC v0.2.0 to v0.4.0 and its main branch of 2024-08-27, with the settings of
its own `pytorch_blade/benchmark/detectron2/run_blade.py`. No import of torch at the top: this
file is imported wherever the backends are listed.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple

from backends.base import Backend, Optimized, Phases, check_sizes
from errors import Unsupported, first_cause
from results.record import Coverage

if TYPE_CHECKING:
    from types import ModuleType

    from detectors.export import Export

# A node of a printed TorchScript graph that computes: `%7 : Tensor = aten::relu(%6)`. The prim
# namespace holds constants, lists, control flow and the calls of the engines.
OPERATOR = re.compile(r"= (?!prim::)\w+::\w+[\[(]")


class TorchBlade(Backend):
    """BladeDISC's TorchBlade: the subgraphs that TensorRT takes become engines in the module."""

    name = "torch_blade"
    label = "TorchBlade"
    rank = 2
    in_pytorch = True
    devices = ("cuda",)
    precisions: Dict[str, Tuple[str, ...]] = {"cuda": ("fp32", "fp16")}

    def unavailable(self, device: str) -> Optional[str]:
        """See `Backend.unavailable`; imports torch_blade where it is installed."""
        if device not in self.devices:
            return f"TorchBlade's TensorRT pipeline runs on a CUDA device, not on '{device}'"
        try:
            import torch_blade.tensorrt
        except ModuleNotFoundError as error:
            if error.name == "torch_blade":
                return _not_installed()
            return f"TorchBlade is installed but cannot be imported: {first_cause(error)}"
        except Exception as error:  # a missing CUDA library is an OSError, for example
            return f"TorchBlade is installed but cannot be imported: {first_cause(error)}"
        # Without TensorRT there is no `backend_name` to ask for.
        if not torch_blade.tensorrt.is_available():
            return (
                "this TorchBlade was built without TensorRT; its GPU containers have it, "
                "see docs/torchblade.md"
            )
        import torch

        if not torch.cuda.is_available():
            return "TorchBlade needs a CUDA device, and PyTorch finds none here"
        return None

    def versions(self) -> Dict[str, str]:
        """See `Backend.versions`."""
        import torch
        import torch_blade.version

        return {"torch_blade": torch_blade.version.__version__, "torch": torch.__version__}

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        """See `Backend.optimize`.

        The returned callable raises `errors.InputError` for images outside the sizes of the
        tuning inputs. For the rest of the process, PyTorch's own JIT optimizer is off and an
        engine that fails raises.

        Raises:
            errors.Unsupported: TorchBlade failed, or left everything to PyTorch.
        """
        import torch_blade
        from torch_blade import tensorrt

        # Read whenever an engine fails; by default the original subgraph would run in silence.
        os.environ["TORCH_BLADE_ENABLE_RUNTIME_FALLBACK"] = "0"
        started = time.perf_counter()
        module = export.script_module()
        exported = time.perf_counter()
        with _as_unsupported():
            config = _configure(torch_blade.Config(), tensorrt.backend_name(), export, precision)
            optimized, warnings = _compile(torch_blade.optimize, config, module, export.inputs)
            _check_has_engines(tensorrt, optimized, warnings)
        compiled = time.perf_counter()
        torch_blade.utils.disable_pytorch_jit()
        effective = "fp16" if config.enable_fp16 else "fp32"
        return Optimized(
            call=_caller(optimized, export, effective, device),
            precision=effective,
            provider=tensorrt.backend_name(),
            coverage=_coverage(tensorrt, optimized, warnings),
            seconds=Phases(export=exported - started, compile=compiled - exported),
            artifacts={
                f"{export.name}.code.py": optimized.code,
                f"{export.name}.graph.txt": str(optimized.graph),
            },
        )


def _not_installed() -> str:
    try:
        pytorch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        pytorch = "none"
    return (
        "TorchBlade is not installed and has no package for this Python "
        f"{platform.python_version()} and PyTorch {pytorch}; it comes in containers of its own, "
        "see docs/torchblade.md"
    )


@contextmanager
def _as_unsupported() -> Iterator[None]:
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"TorchBlade cannot take this export: {first_cause(error)}") from error


def _configure(config: Any, pipeline: str, export: Export, precision: str) -> Any:
    """Sets a `torch_blade.Config` as TorchBlade's own benchmark does."""
    tuning = {
        "min": export.tuning_inputs["min"],
        "max": export.tuning_inputs["max"],
        "opts": [export.tuning_inputs["opt"]],
    }
    # Before v0.3.0 there is only the second, which takes the same; where both are set it wins.
    has_inputs = hasattr(type(config), "dynamic_tuning_inputs")
    settings = {
        "dynamic_tuning_inputs" if has_inputs else "dynamic_tuning_shapes": tuning,
        "optimization_pipeline": pipeline,
        "enable_fp16": precision == "fp16",
        "enable_onnx_shape_white_list": False,
    }
    for name, value in settings.items():
        # Config takes any attribute, and then no notice of it.
        if not hasattr(type(config), name):
            raise Unsupported(f"this version of TorchBlade has no setting '{name}'")
        setattr(config, name, value)
    return config


def _compile(
    optimize: Callable[..., Any], config: Any, module: Any, inputs: Tuple[Any, ...]
) -> Tuple[Any, List[str]]:
    """Runs `torch_blade.optimize`; returns the module and what TorchBlade warned of."""
    with config, _collected_warnings() as warnings:
        # False: the module is TorchScript already and is not traced again.
        optimized = optimize(module, False, inputs)
    return optimized, warnings


@contextmanager
def _collected_warnings() -> Iterator[List[str]]:
    """The first lines of what TorchBlade logs; it reports an engine it cannot build only there."""
    messages: List[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append((record.getMessage().strip().splitlines() or [""])[0])

    handler = Collector(logging.WARNING)
    logger = logging.getLogger("torch_blade")
    level = logger.level
    if logger.getEffectiveLevel() > logging.WARNING:
        # Some other library has told the root logger to say less.
        logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _check_has_engines(tensorrt: ModuleType, optimized: Any, warnings: List[str]) -> None:
    """A module that TorchBlade left to PyTorch must not be measured under its name.

    Where TorchBlade cannot export a module as a whole, it returns one that is not TorchScript.
    """
    import torch

    is_script = isinstance(optimized, torch.jit.ScriptModule)
    if is_script and tensorrt.num_engines(optimized) > 0:
        return
    because = f": {warnings[0]}" if warnings else ""
    raise Unsupported(f"TorchBlade built no TensorRT engine for this export{because}")


def _coverage(tensorrt: ModuleType, optimized: Any, warnings: List[str]) -> Coverage:
    """Operators (all but TorchScript's prim), of the graph and in its engines.

    `nodes_by_segment`, from v0.3.0 on, is TorchBlade's own count, constants and lists included.
    `warnings` say why subgraphs that TensorRT should have taken were left to PyTorch.
    """
    engines = [engine for _, engine in tensorrt.collect_engines(optimized)]
    inside = sum(len(OPERATOR.findall(e.get_attr_string("module_graph"))) for e in engines)
    outside = len(OPERATOR.findall(str(optimized.graph)))
    has_nodes = hasattr(tensorrt, "num_compiled_nodes")
    return Coverage(
        operators=inside + outside,
        operators_in_engine=inside,
        segments=len(engines),
        warnings=tuple(dict.fromkeys(warnings)),
        nodes_by_segment=tuple(tensorrt.num_compiled_nodes(optimized)) if has_nodes else None,
    )


def _caller(
    optimized: Any, export: Export, precision: str, device: str
) -> Callable[..., Tuple[Any, ...]]:
    """Calls the optimized module, for images of the tuned sizes only.

    Beyond them TorchBlade runs the original subgraphs, which nothing would tell from a slow
    engine. As in its own benchmark, what is left to PyTorch runs under autocast at fp16.
    """
    import torch

    @torch.no_grad()
    def call(*images: Any) -> Tuple[Any, ...]:
        check_sizes(images, export, "TorchBlade's engines")
        with torch.autocast(device, dtype=torch.float16, enabled=precision == "fp16"):
            return optimized(*images)

    return call
