"""Torch-TensorRT: TensorRT engines inside the eager module, or inside the exported one.

Written against torch_tensorrt 2.11 to 2.14; not run yet: it waits for a GPU.

Of its front ends, `torch.compile(backend="torch_tensorrt")` comes first: it is the one that is
maintained, and a subgraph that it cannot build is left to PyTorch instead of failing the rest.
Where it builds no engine at all, the deprecated TorchScript front end has its turn. `ir="dynamo"`
is not among them: it needs `torch.export`, which fails on these models (PyTorch 2.14, testRetinaNet
and testMaskRCNNFPN: "The tensor has a non-zero number of elements, but its data is not allocated
yet", where non-maximum suppression meets a number of boxes that depends on data).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import operator
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
)
from unittest import mock

from backends.base import Backend, Optimized, Phases, allows_tf32, check_sizes
from backends.inductor import configure_dynamo
from backends.torch import autocast
from backends.torchscript import saved_bytes
from errors import Unsupported, first_cause
from results.record import Coverage

if TYPE_CHECKING:
    from detectors.export import Export

ENGINES = "Torch-TensorRT's engines"
# What PyTorch calls the operators that are worth an engine, in a graph that TorchDynamo captured.
HEAVY = re.compile(r"(conv\w*|linear|matmul|addmm|b?mm)\b")
# The same among the layers of a TensorRT engine, by `LayerType`, `ParameterType` and `Name`.
HEAVY_LAYER = re.compile(r"conv|gemm|matmul|matrix|fully", re.IGNORECASE)
# `Format/Datatype` of a layer's tensor reads "Half", or "Row major linear FP16 format". The first
# that is found counts: "BFloat16" has "Float" in it.
LAYER_TYPES = (
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|half|float16", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float", re.IGNORECASE)),
)
# The detectors pad images to a multiple of this.
SIZE_DIVISIBILITY = 32
# Never the reason for an engine to be dropped.
CACHE_BYTES = 1 << 36
# From here on TensorRT is 11, which has no fp16 builder flag.
STRONGLY_TYPED = (2, 13)


class TorchTensorRT(Backend):
    """`torch.compile` with Torch-TensorRT's backend, else its TorchScript front end."""

    name = "torch_tensorrt"
    label = "Torch-TensorRT"
    rank = 7
    in_pytorch = True
    devices = ("cuda",)
    precisions: Dict[str, Tuple[str, ...]] = {"cuda": ("fp32", "fp16", "bf16")}
    default = False

    def unavailable(self, device: str) -> Optional[str]:
        """See `Backend.unavailable`; imports torch_tensorrt where it is installed and may run."""
        import torch

        if device not in self.devices:
            return f"Torch-TensorRT runs on a CUDA device, not on '{device}'"
        if "torch_tensorrt" not in sys.modules and not importlib.util.find_spec("torch_tensorrt"):
            version = ".".join(torch.__version__.split(".")[:2])
            return (
                "Torch-TensorRT is not installed; its version is that of PyTorch: "
                f"pip install 'torch-tensorrt=={version}.*'"
            )
        if not torch.cuda.is_available():
            return "Torch-TensorRT needs a CUDA device, and PyTorch finds none here"
        try:
            _import()
        except Exception as error:  # a plain Exception where libnvinfer or a driver is missing
            return f"Torch-TensorRT is installed but cannot be imported: {first_cause(error)}"
        return None

    def versions(self) -> Dict[str, str]:
        """See `Backend.versions`."""
        import torch

        torch_tensorrt = _import()
        import tensorrt

        return {
            "torch_tensorrt": torch_tensorrt.__version__,
            "tensorrt": tensorrt.__version__,
            "torch": torch.__version__,
        }

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        """See `Backend.optimize`.

        The returned callable raises `errors.InputError` for images outside the sizes of the
        tuning inputs. Engines that may be cached have weights that can be exchanged, which
        TensorRT may run slower: `coverage` has `refittable_engines` then.

        Raises:
            errors.Unsupported: no front end built an engine; the message has the first cause.
        """
        _import()
        failures: List[str] = []
        for front_end in (_torch_compile, _torchscript):
            try:
                return front_end(export, precision, device, cache)
            except Unsupported as error:
                failures.append(str(error))
            except Exception as error:
                failures.append(first_cause(error))
        raise Unsupported(f"Torch-TensorRT built no engine for this export: {failures[0]}")


def _import() -> Any:
    """Imports torch_tensorrt, which prints why it fails, where tables are printed."""
    with contextlib.redirect_stdout(sys.stderr):
        import torch_tensorrt
    return torch_tensorrt


# --- torch.compile ---


@dataclasses.dataclass
class _Built:
    """What became of the graphs that TorchDynamo captured so far.

    Attributes:
        graphs: how many there were.
        engines: the modules that hold one.
        operators_in_engine: in the subgraphs that were made engines.
        fallback_operators: what is left to PyTorch, by name.
        problems: the cause of each subgraph that failed to build, or else what was warned of.
    """

    graphs: int = 0
    engines: List[Any] = dataclasses.field(default_factory=list)
    operators_in_engine: int = 0
    fallback_operators: Counter = dataclasses.field(default_factory=Counter)
    problems: List[Tuple[bool, str]] = dataclasses.field(default_factory=list)

    def add(self, compiled: Any, sizes: Sequence[int]) -> None:
        """Counts a graph that Torch-TensorRT has returned.

        Args:
            compiled: a torch.fx graph module with its engines, or without any.
            sizes: operators of each subgraph that was to become an engine.
        """
        modules = list(compiled.modules()) if hasattr(compiled, "modules") else []
        engines = [module for module in modules if hasattr(module, "get_layer_info")]
        self.engines += engines
        self.operators_in_engine += sum(sizes) if engines else 0
        for module in modules:
            self.fallback_operators.update(_names(module))

    def first_problem(self) -> str:
        """The first failure, or where nothing failed the first warning."""
        ordered = sorted(self.problems, key=lambda problem: not problem[0])
        return ordered[0][1] if ordered else "TensorRT takes too few operators of any graph"

    def failures(self) -> Tuple[str, ...]:
        """Why subgraphs failed to build, each cause once."""
        return tuple(dict.fromkeys(text for failed, text in self.problems if failed))

    def coverage(self) -> Coverage:
        """See `Optimized.coverage`; without what runs between the graphs, uncaptured."""
        return Coverage(
            operators=self.operators_in_engine + sum(self.fallback_operators.values()),
            operators_in_engine=self.operators_in_engine,
            segments=len(self.engines),
            graphs=self.graphs,
            fallback_operators=dict(self.fallback_operators.most_common()),
        )


def _torch_compile(export: Export, precision: str, device: str, cache: Optional[Path]) -> Optimized:
    """Engines for the parts of the eager module that convolve or multiply matrices.

    Raises:
        errors.Unsupported: there is no engine in it.
    """
    import torch

    built, start = _Built(), time.perf_counter()
    engine_cache = _engine_cache(cache / "engines") if cache else None
    with tempfile.TemporaryDirectory(prefix="run_blade_") as temporary:
        options = _options(cache or Path(temporary), engine_cache)
        configure_dynamo()
        # Precision is in the model: Torch-TensorRT's own autocast is a pass of `ir="dynamo"`
        # only, while casts of PyTorch's are part of the graph and TensorRT keeps to them.
        compiled = autocast(
            torch.compile(export.eager, backend=_backend(export, options, built), dynamic=True),
            precision,
            device,
        )

        def call(*images: Any) -> Tuple[Any, ...]:
            check_sizes(images, export, ENGINES)
            return tuple(compiled(*images))

        with _detailed_engines(), _collected_warnings(built.problems):
            call(*export.inputs)
            coverage = built.coverage()
            # At other sizes, engines are built anew where a guard of a graph does not hold.
            for which in ("min", "max", "opt"):
                call(*export.tuning_inputs[which])
            for images in export.other_inputs:
                call(*images)
    if not built.engines:
        raise Unsupported(built.first_problem())
    prepared = built.graphs
    problems = Coverage(failures=built.failures(), refittable_engines=engine_cache is not None)
    return Optimized(
        call=call,
        precision=engine_precision([x.get_layer_info() for x in built.engines], precision),
        provider="TensorRT through torch.compile",
        coverage=coverage.merged(problems),
        seconds=Phases(compile=time.perf_counter() - start),
        cached=engine_cache is not None and engine_cache.served(len(built.engines)),
        read_coverage=lambda: Coverage(recompilations_while_timed=built.graphs - prepared),
        read_artifact_bytes=lambda: sum(len(x.serialized_engine) for x in built.engines),
    )


def _options(folder: Path, engine_cache: Optional[Any]) -> Dict[str, Any]:
    """Options of the backend.

    Args:
        folder: where the timing cache is kept; by default all processes share one, and without
            a cache everything is to be built anew.

    Raises:
        errors.Unsupported: this version lacks one; it would be ignored in silence.
    """
    from torch_tensorrt.dynamo import CompilationSettings

    options: Dict[str, Any] = {
        "timing_cache_path": str(folder / "timing.bin"),
        "truncate_double": True,
    }
    if engine_cache is not None:
        # Engines whose weights are fixed are not cached.
        options.update(immutable_weights=False, cache_built_engines=True, reuse_cached_engines=True)
    known = {field.name for field in dataclasses.fields(CompilationSettings)}
    for name in options:
        if name not in known:
            raise Unsupported(f"this version of Torch-TensorRT has no setting '{name}'")
    if "use_explicit_typing" in known:
        options["use_explicit_typing"] = True  # Later there is nothing else.
    if "disable_tf32" in known:  # Else the variable alone says it: see `base.allow_tf32`.
        options["disable_tf32"] = not allows_tf32()
    if engine_cache is not None:
        options["custom_engine_cache"] = engine_cache
    return options


def _engine_cache(folder: Path) -> Any:
    """Torch-TensorRT's engine cache on disk, which counts what it serves and what it keeps."""
    from torch_tensorrt.dynamo._engine_cache import DiskEngineCache

    class CountingCache(DiskEngineCache):  # type: ignore[misc, valid-type]
        hits = saves = 0

        def load(self, hash: str, *args: Any, **kwargs: Any) -> Optional[bytes]:
            blob = super().load(hash, *args, **kwargs)
            self.hits += blob is not None
            return blob

        def save(self, hash: str, blob: bytes, *args: Any, **kwargs: Any) -> None:
            self.saves += 1
            super().save(hash, blob, *args, **kwargs)

        def served(self, engines: int) -> bool:
            """Whether that many engines came from here, and none was built."""
            return not self.saves and self.hits >= engines

    return CountingCache(str(folder), CACHE_BYTES)


def _backend(export: Export, options: Dict[str, Any], built: _Built) -> Callable[..., Any]:
    """A backend of TorchDynamo's that hands on to Torch-TensorRT's what is worth an engine.

    The other graphs, index arithmetic and non-maximum suppression, have sizes that depend on
    data: engines would be built again and again for nothing.
    """
    from torch_tensorrt.dynamo.backend import torch_tensorrt_backend

    weights = {id(x) for x in (*export.eager.parameters(), *export.eager.buffers())}
    shrink, grow = size_factors(export)

    def compile_graph(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        built.graphs += 1
        if not any(HEAVY.search(str(node.target)) for node in _operators(graph)):
            built.fallback_operators.update(_names(graph))
            return graph.forward
        bound, kept = bind_weights(graph, weights)
        kept_inputs = [inputs[position] for position in kept]
        bound_sizes(kept_inputs, shrink, grow)
        try:
            with _engine_sizes() as sizes:
                compiled = torch_tensorrt_backend(bound, kept_inputs, options=dict(options))
        except Exception as error:  # of kinds that it does not handle itself
            built.problems.append((True, first_cause(error)))
            built.fallback_operators.update(_names(graph))
            return graph.forward
        built.add(compiled, sizes)
        return lambda *values: compiled(*(values[position] for position in kept))

    return compile_graph


def _operators(graph: Any) -> List[Any]:
    """Nodes that compute, of a torch.fx graph module."""
    import torch

    if not isinstance(graph, torch.fx.GraphModule):
        return []
    kinds = ("call_function", "call_method")
    return [x for x in graph.graph.nodes if x.op in kinds and x.target is not operator.getitem]


def _names(graph: Any) -> List[str]:
    import torch

    targets = [node.target for node in _operators(graph)]
    return [
        str(x) if isinstance(x, (str, torch._ops.OpOverload)) else getattr(x, "__name__", str(x))
        for x in targets
    ]


def bind_weights(graph: Any, weights: Set[int]) -> Tuple[Any, List[int]]:
    """Makes a graph's weights its own constants.

    TorchDynamo passes the parameters and buffers of a module as inputs, and Torch-TensorRT would
    take them for inputs of its engines, which could then fold or convert none of them.

    Args:
        graph: a torch.fx graph module from TorchDynamo, which goes on using it: it is copied.
        weights: `id` of the tensors that are weights.

    Returns:
        The graph module, and the positions of the inputs that remain.
    """
    import torch

    bound = torch.fx.Graph()
    bound.output(bound.graph_copy(graph.graph, {}))
    graph = torch.fx.GraphModule(graph, bound)
    inputs = [node for node in bound.nodes if node.op == "placeholder"]
    first = next(node for node in bound.nodes if node.op != "placeholder")
    kept = []
    for position, node in enumerate(inputs):
        tensor = getattr(node.meta.get("grapharg"), "example", None)
        if id(tensor) not in weights:
            kept.append(position)
            continue
        graph.register_buffer(f"_weight_{position}", tensor.detach())
        with bound.inserting_before(first):
            constant = bound.get_attr(f"_weight_{position}")
        constant.meta.update((k, v) for k, v in node.meta.items() if k != "grapharg")
        node.replace_all_uses_with(constant)
        bound.erase_node(node)
    graph.recompile()
    return graph, kept


def size_factors(export: Export) -> Tuple[float, float]:
    """By how much a padded side of the images shrinks and grows at most, from `opt`."""

    def factors(which: str) -> List[float]:
        return [
            math.ceil(side / SIZE_DIVISIBILITY) / math.ceil(tuned / SIZE_DIVISIBILITY)
            for image, opt in zip(export.tuning_inputs[which], export.inputs)
            for side, tuned in zip(image.shape[1:], opt.shape[1:])
        ]

    return min(factors("min")), max(factors("max"))


def bound_sizes(inputs: Sequence[Any], shrink: float, grow: float) -> None:
    """Bounds the dynamic sizes of a graph's inputs, so that an engine has a range to be built for.

    Without bounds, Torch-TensorRT takes 1 to 4096. `mark_dynamic(min=, max=)` would bound images,
    but is an error where a guard holds for some sizes only, and says nothing of feature maps and
    proposals, which enter the graphs after a graph break. The bounds become guards: beyond them
    the graph is captured, and its engine built, once more.

    Args:
        inputs: fake tensors and symbolic integers; each size now is the one that engines are
            tuned for.
        shrink: a size may become this factor of what it is.
        grow: the same, upwards.
    """
    import torch

    sizes = [size for x in inputs for size in (getattr(x, "shape", None) or [x])]
    for size in sizes:
        if not isinstance(size, torch.SymInt) or not size.node.expr.is_symbol:
            continue
        now = size.node.hint
        if now is None or now < 2:
            continue  # No size: 0 and 1 have graphs of their own.
        # One more on either side, as sides are rounded.
        low, high = max(2, math.floor(now * shrink) - 1), math.ceil(now * grow) + 1
        size.node.shape_env.constrain_symbol_range(
            size.node.expr, compiler_min=low, compiler_max=high
        )


@contextlib.contextmanager
def _engine_sizes() -> Iterator[List[int]]:
    """Collects the number of operators of each subgraph that becomes an engine.

    They are in the statistics that Torch-TensorRT would log; the subgraphs themselves are lost.
    """
    from torch_tensorrt.dynamo import _compiler

    sizes: List[int] = []

    def collect(statistics: Any, *args: Any, **kwargs: Any) -> None:
        sizes.extend(x.subgraph_op_count for x in statistics.per_subgraph_data)

    if not hasattr(_compiler, "dryrun_stats_display"):
        yield sizes
        return
    with mock.patch.object(_compiler, "dryrun_stats_display", collect):
        yield sizes


@contextlib.contextmanager
def _detailed_engines() -> Iterator[None]:
    """Engines built inside can tell the types that their layers compute in.

    `dynamo.Debugger` would do that and more: it resets the logging of the process, and in 2.11
    profiles the engines. Without the method that is wrapped, types cannot be read.
    """
    import tensorrt
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    name = "_populate_trt_builder_config"
    original = getattr(TRTInterpreter, name, None)
    if original is None:
        yield
        return

    def populate(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
        return config

    with mock.patch.object(TRTInterpreter, name, populate):
        yield


@contextlib.contextmanager
def _collected_warnings(problems: List[Tuple[bool, str]]) -> Iterator[None]:
    """Adds what Torch-TensorRT logs; a subgraph that fails to build is reported only there."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            lines = record.getMessage().strip().splitlines() or [""]
            problems.append((error is not None, first_cause(error) if error else lines[0]))

    handler, logger = Collector(logging.WARNING), logging.getLogger("torch_tensorrt")
    level = logger.level
    if logger.getEffectiveLevel() > logging.WARNING:
        logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# --- TorchScript ---


def _torchscript(export: Export, precision: str, device: str, cache: Optional[Path]) -> Optimized:
    """The exported module with engines in it; this front end has no engine cache.

    Raises:
        errors.Unsupported: this build lacks the front end, or it built no engine.
    """
    import torch
    import torch_tensorrt

    if not torch_tensorrt.ENABLED_FEATURES.torchscript_frontend:
        raise Unsupported("this Torch-TensorRT is built without its TorchScript front end")
    if precision == "bf16":
        raise Unsupported("Torch-TensorRT's TorchScript front end has no bf16")
    start = time.perf_counter()
    has_flag = _version(torch_tensorrt) < STRONGLY_TYPED
    module = _export(export, precision, device, has_flag)
    exported = time.perf_counter()
    module = torch_tensorrt.compile(
        module,
        ir="ts",
        inputs=_inputs(export),
        enabled_precisions=(
            {torch.float32, torch.float16} if precision == "fp16" and has_flag else {torch.float32}
        ),
        disable_tf32=not allows_tf32(),
        # TensorRT's front end for TorchScript takes no int64 and no float64.
        truncate_long_and_double=True,
    )
    engines = _script_engines(module)
    if not engines:
        raise Unsupported("the TorchScript front end left everything to PyTorch")

    @torch.no_grad()
    def call(*images: Any) -> Tuple[Any, ...]:
        check_sizes(images, export, ENGINES)
        return tuple(module(*images))

    call(*export.inputs)
    return Optimized(
        call=call,
        # `debug=True` might make engines tell more, but it synchronizes after every layer.
        precision=engine_precision([x.get_engine_layer_info() for x in engines], precision),
        provider="TensorRT through TorchScript",
        coverage=_script_coverage(module, engines),
        seconds=Phases(export=exported - start, compile=time.perf_counter() - exported),
        read_artifact_bytes=lambda: saved_bytes(module),
    )


def _version(torch_tensorrt: Any) -> Tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch_tensorrt.__version__)[:2])


def _export(export: Export, precision: str, device: str, has_flag: bool) -> Any:
    """The exported module; where TensorRT has no flag for fp16, with the casts of autocast."""
    import torch

    if precision == "fp32" or has_flag or export.kind != "traced":
        return export.script_module()
    with torch.autocast(device, dtype=torch.float16, cache_enabled=False):
        return export.trace()


def _inputs(export: Export) -> List[Any]:
    """Ranges of the images' sizes."""
    import torch
    import torch_tensorrt

    tuning = export.tuning_inputs
    return [
        torch_tensorrt.Input(
            min_shape=tuple(low.shape),
            opt_shape=tuple(opt.shape),
            max_shape=tuple(high.shape),
            dtype=torch.float32,
        )
        for low, opt, high in zip(tuning["min"], tuning["opt"], tuning["max"])
    ]


def _script_engines(module: Any) -> List[Any]:
    """The `torch.classes.tensorrt.Engine` attributes that the graph of a module reads."""
    found = {
        node.s("name"): None
        for node in module.graph.findAllNodes("prim::GetAttr", True)
        if str(node.output().type()).endswith("tensorrt.Engine")
    }
    return [getattr(module, name) for name in found]


def _script_coverage(module: Any, engines: Sequence[Any]) -> Coverage:
    """What is left to PyTorch; how many operators an engine has taken is not kept."""
    left: Counter = Counter()
    blocks = [module.graph]
    while blocks:
        for node in blocks.pop().nodes():
            left[node.kind()] += not node.kind().startswith(("prim::", "tensorrt::"))
            blocks.extend(node.blocks())
    return Coverage(
        segments=len(engines),
        fallback_operators={name: count for name, count in left.most_common() if count},
    )


# --- what was built ---


def engine_precision(layer_infos: Sequence[str], precision: str) -> str:
    """The precision that most convolutions and matrix products of the engines compute in.

    Args:
        layer_infos: of each engine, what TensorRT's engine inspector says, as JSON. An engine
            that was not built to tell has names of layers only.
        precision: as requested; TensorRT uses no lower one than it was asked for.

    Returns:
        `precision`, or fp32 where the engines do not show it.
    """
    if precision == "fp32":
        return precision
    types: Counter = Counter()
    for text in layer_infos:
        types.update(_layer_types(text))
    return precision if types[precision] > sum(types.values()) / 2 else "fp32"


def _layer_types(text: str) -> Iterator[str]:
    """Of each heavy layer that has one, the type of its first input."""
    try:
        layers = json.loads(text).get("Layers", [])
    except (TypeError, ValueError, AttributeError):
        return
    for layer in layers:
        if not isinstance(layer, dict) or not layer.get("Inputs"):
            continue
        words = " ".join(str(layer.get(k, "")) for k in ("LayerType", "ParameterType", "Name"))
        stored = str(layer["Inputs"][0].get("Format/Datatype", ""))
        found = [name for name, pattern in LAYER_TYPES if pattern.search(stored)]
        if HEAVY_LAYER.search(words) and found:
            yield found[0]
