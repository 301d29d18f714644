"""The Torch-TensorRT backend against a stand-in that checks what is asked of it.

Torch-TensorRT needs a GPU. The stand-in has the names, arguments and options of the real
torch_tensorrt (2.12.1 and 2.14.0) as far as the backend meets them. TorchDynamo, AOTAutograd and
the detectors are real: the stand-in lowers the graphs that it is given as the real one does, and
its engines run them. What nothing here shows is whether TensorRT builds them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.fx.passes.split_module import split_module

from backends import base
from backends.torch_tensorrt import TorchTensorRT, bound_sizes, engine_precision, size_factors
from errors import InputError, Unsupported, first_cause
from results.record import Coverage

DTYPES = {
    torch.float16: "Row major linear FP16 format",
    torch.bfloat16: "BFloat16",
    torch.float32: "Row major linear FP32",
}
SIZES = {"min": (40, 60), "opt": (70, 90), "max": (150, 200)}


class Net(nn.Module):
    """Pads, convolves twice with an operator between them, and keeps what is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.register_buffer("scale", torch.tensor([0.5]))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        padded = nn.functional.pad(image[None], [0, -width % 32, 0, -height % 32])
        return self.head(torch.sigmoid(self.stem(padded))) * self.scale

    def forward(self, *images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        found: List[torch.Tensor] = []
        for image in images:
            scores = self.features(image)
            found.append(scores[scores > 0])
        return tuple(found)


class Whole(nn.Module):
    """The same without what depends on data, for tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (torch.relu(self.stem(image[None])),)


@dataclasses.dataclass(frozen=True)
class Export:
    """What `detectors.export.Export` shows of itself to a backend."""

    name: str
    eager: nn.Module
    tuning_inputs: Dict[str, Tuple[torch.Tensor, ...]]
    kind: str = "traced"
    other_inputs: Tuple[Tuple[torch.Tensor, ...], ...] = ()

    @property
    def inputs(self) -> Tuple[torch.Tensor, ...]:
        return self.tuning_inputs["opt"]

    def script_module(self) -> torch.jit.ScriptModule:
        return self.trace()

    def trace(self) -> torch.jit.ScriptModule:
        with torch.no_grad():
            return torch.jit.trace(self.eager, self.inputs, check_trace=False)


def make_export(images: int = 1, eager: Callable[[], nn.Module] = Net) -> Export:
    torch.manual_seed(0)
    tuning = {
        name: tuple(torch.rand(3, *size) for _ in range(images)) for name, size in SIZES.items()
    }
    return Export(f"testTiny_b{images}", eager().eval(), tuning)


@dataclasses.dataclass
class Settings212:
    """Fields of 2.12.1's `CompilationSettings` that matter here."""

    truncate_double: bool = False
    timing_cache_path: str = "/tmp/shared"
    cache_built_engines: bool = False
    reuse_cached_engines: bool = False
    immutable_weights: bool = True
    disable_tf32: bool = False
    enabled_precisions: Set[Any] = dataclasses.field(default_factory=lambda: {torch.float32})
    use_explicit_typing: bool = True


@dataclasses.dataclass
class Settings214:
    """And of 2.14.0's."""

    truncate_double: bool = False
    timing_cache_path: str = "/tmp/shared"
    cache_built_engines: bool = False
    reuse_cached_engines: bool = False
    immutable_weights: bool = True
    disable_tf32: bool = False


class DiskEngineCache:
    """The real one's interface; entries are `<hash>/blob.bin`."""

    def __init__(self, engine_cache_dir: str, engine_cache_size: int) -> None:
        self.folder = Path(engine_cache_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        assert engine_cache_size > 0

    def save(self, hash: str, blob: bytes, *args: Any, **kwargs: Any) -> None:
        (self.folder / hash).mkdir(exist_ok=True)
        (self.folder / hash / "blob.bin").write_bytes(blob)

    def load(self, hash: str, *args: Any, **kwargs: Any) -> Optional[bytes]:
        path = self.folder / hash / "blob.bin"
        return path.read_bytes() if path.exists() else None


class Engine(nn.Module):
    """A `TorchTensorRTModule`: runs the subgraph, and says what the engine inspector would."""

    def __init__(self, graph: torch.fx.GraphModule, layers: List[Any]) -> None:
        super().__init__()
        self.run = [graph]  # in a list: the real one keeps no graph
        self.layers = layers
        self.serialized_engine = b"engine" * 10

    def forward(self, *values: Any) -> Any:
        # TensorRT knows nothing of PyTorch's autocast.
        with torch.autocast("cpu", enabled=False):
            return self.run[0](*values)

    def get_layer_info(self) -> str:
        return json.dumps({"Layers": self.layers, "Bindings": []})


@dataclasses.dataclass
class Script:
    """A module from the TorchScript front end, with the graph that it has after compilation."""

    module: torch.jit.ScriptModule
    engines: Dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.engines[name]

    def __call__(self, *images: torch.Tensor) -> Any:
        return self.module(*images)

    @property
    def graph(self) -> Any:
        def node(kind: str, name: str = "", type: str = "Tensor") -> Any:
            return SimpleNamespace(
                kind=lambda: kind,
                s=lambda key: {"name": name}[key],
                output=lambda: SimpleNamespace(type=lambda: type),
                blocks=list,
            )

        engine = "__torch__.torch.classes.tensorrt.Engine"
        gets = [node("prim::GetAttr", name, engine) for name in self.engines]
        gets.append(node("prim::GetAttr", "weight"))
        others = [node(kind) for kind in ("tensorrt::execute_engine", "aten::nonzero")]
        return SimpleNamespace(
            findAllNodes=lambda kind, recurse: gets if kind == "prim::GetAttr" else [],
            nodes=lambda: gets + others,
        )


@dataclasses.dataclass
class TRT:
    """What a test arranges for the stand-in, and what the stand-in saw.

    Attributes:
        version: of torch_tensorrt.
        built_type: the type that engines compute in whatever the graph says; None: the graph's.
        fail: raises where an engine would be built.
        no_engine: partitioning finds nothing that TensorRT takes.
        script_engines: engines that the TorchScript front end makes; none: it is not there.
        options: of each subgraph that was compiled.
        ranges: `(min, opt, max)` of each dynamic size of the graph's inputs.
        weights: how many tensors of each lowered graph are constants.
        inputs: how many inputs it has.
        script_calls: arguments of `torch_tensorrt.compile`.
    """

    version: str = "2.14.0+cu130"
    built_type: Optional[str] = None
    fail: Callable[[], None] = lambda: None
    no_engine: bool = False
    script_engines: Optional[Dict[str, Any]] = None
    options: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    ranges: List[Set[Tuple[int, int, int]]] = dataclasses.field(default_factory=list)
    weights: List[int] = dataclasses.field(default_factory=list)
    inputs: List[int] = dataclasses.field(default_factory=list)
    script_calls: List[Dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> type:
        return Settings212 if self.version < "2.13" else Settings214


def lower(graph: Any, inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """As in torch_tensorrt's `_pretraced_backend`."""
    fake_mode = detect_fake_mode(inputs)
    with mock.patch.object(fake_mode, "allow_non_fake_inputs", True), fake_mode:
        return aot_export_joint_simple(graph, inputs, trace_joint=False, decompositions={})


def ranges_of(graph: torch.fx.GraphModule) -> Set[Tuple[int, int, int]]:
    """As `extract_var_range_info` reads them: of unbounded sizes, `int` raises."""
    found = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    bounds = size.node.shape_env.bound_sympy(size.node.expr)
                    found.add((int(bounds.lower), size.node.hint, int(bounds.upper)))
    return found


def layers_of(graph: torch.fx.GraphModule, detailed: bool, type: Optional[str]) -> List[Any]:
    layers: List[Any] = []
    for node in graph.graph.nodes:
        if "convolution" not in str(node.target):
            continue
        stored = type or DTYPES[node.meta["val"].dtype]
        tensor = {"Name": "x", "Format/Datatype": stored}
        layer = {"Name": node.name, "LayerType": "CaskConvolution", "Inputs": [tensor]}
        layers.append(layer if detailed else node.name)
    return layers + [{"Name": "shape", "LayerType": "NoOp", "Inputs": []}]


def make_modules(trt: TRT) -> Dict[str, ModuleType]:
    names = ("", ".dynamo", ".dynamo.backend", ".dynamo._engine_cache", ".dynamo._compiler")
    names += (".dynamo.conversion", ".dynamo.conversion._TRTInterpreter")
    modules = {f"torch_tensorrt{name}": ModuleType(f"torch_tensorrt{name}") for name in names}
    modules["tensorrt"] = ModuleType("tensorrt")
    for name, module in modules.items():
        module.__path__ = []
        if "." in name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    package, dynamo = modules["torch_tensorrt"], modules["torch_tensorrt.dynamo"]
    package.__version__ = trt.version
    package.ENABLED_FEATURES = SimpleNamespace(torchscript_frontend=trt.script_engines is not None)
    package.Input, package.compile = Input, script_compile(trt)
    dynamo.CompilationSettings = trt.settings
    dynamo.backend.torch_tensorrt_backend = compile_backend(trt, modules)
    dynamo._engine_cache.DiskEngineCache = DiskEngineCache
    dynamo._compiler.dryrun_stats_display = lambda dryrun_tracker, dryrun_enabled: None
    dynamo.conversion._TRTInterpreter.TRTInterpreter = interpreter_class()
    modules["tensorrt"].__version__ = "11.1.0"
    modules["tensorrt"].ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    return modules


def interpreter_class() -> type:
    class TRTInterpreter:
        def _populate_trt_builder_config(
            self, strict_type_constraints: bool = False, tactic_sources: Optional[int] = None
        ) -> Any:
            return SimpleNamespace(profiling_verbosity="layer names only")

    return TRTInterpreter


class Input:
    """`torch_tensorrt.Input`, of which the backend uses ranges only."""

    def __init__(self, *, min_shape: Any, opt_shape: Any, max_shape: Any, dtype: Any) -> None:
        assert len(min_shape) == len(opt_shape) == len(max_shape)
        self.shapes, self.dtype = (min_shape, opt_shape, max_shape), dtype


def script_compile(trt: TRT) -> Callable[..., Script]:
    def compile(
        module: Any,
        ir: str = "default",
        inputs: Any = None,
        enabled_precisions: Any = None,
        *,
        disable_tf32: bool = False,
        truncate_long_and_double: bool = False,
        require_full_compilation: bool = False,
        min_block_size: int = 3,
        torch_executed_ops: Any = None,
        debug: bool = False,
    ) -> Script:
        assert ir == "ts"
        assert isinstance(module, torch.jit.ScriptModule)
        assert isinstance(enabled_precisions, set)
        assert not debug, "kDEBUG synchronizes after every layer"
        trt.script_calls.append(
            {
                "inputs": inputs,
                "enabled_precisions": enabled_precisions,
                "disable_tf32": disable_tf32,
                "truncate_long_and_double": truncate_long_and_double,
                "graph": str(module.graph),
            }
        )
        return Script(module, trt.script_engines)

    return compile


def compile_backend(trt: TRT, modules: Dict[str, ModuleType]) -> Callable[..., Any]:
    """A `torch_tensorrt_backend`: lowers, cuts at sigmoid, and makes engines of the rest."""
    logger = logging.getLogger("torch_tensorrt.dynamo.backend.backends")

    def backend(graph: Any, sample_inputs: List[Any], **kwargs: Any) -> Any:
        assert set(kwargs) == {"options"}
        assert isinstance(sample_inputs, list), "the real one pops from it"
        options = dict(kwargs["options"])
        trt.options.append(dict(options))
        cache = options.pop("custom_engine_cache", None)
        settings = trt.settings(**options)  # The real one would drop what it does not know.
        original = graph
        try:
            lowered = lower(graph, sample_inputs)
            trt.ranges.append(ranges_of(lowered))
            kinds = [node.op for node in lowered.graph.nodes]
            trt.weights.append(kinds.count("get_attr"))
            trt.inputs.append(kinds.count("placeholder"))
            if trt.no_engine:
                logger.warning("0 supported operations detected in subgraph\nSkipping")
                return lowered
            return convert(lowered, settings, cache)
        except (AssertionError, RuntimeError, TypeError):
            logger.warning("TRT conversion failed on the subgraph.", exc_info=True)
            return original

    def convert(lowered: Any, settings: Any, cache: Any) -> Any:
        part = iter_parts()
        split = split_module(lowered, None, part)
        counts = []
        for name, child in list(split.named_children()):
            nodes = [node for node in child.graph.nodes if node.op == "call_function"]
            if any("sigmoid" in str(node.target) for node in nodes):
                continue
            trt.fail()
            counts.append(SimpleNamespace(subgraph_op_count=len(nodes)))
            setattr(split, name, build(child, settings, cache))
        statistics = SimpleNamespace(per_subgraph_data=counts)
        modules["torch_tensorrt.dynamo._compiler"].dryrun_stats_display(statistics, False)
        return split

    def build(child: Any, settings: Any, cache: Any) -> Engine:
        interpreter = modules["torch_tensorrt.dynamo.conversion._TRTInterpreter"].TRTInterpreter()
        config = interpreter._populate_trt_builder_config()
        detailed = config.profiling_verbosity == "detailed"
        key = f"{len(child.graph.nodes)}-{len(trt.ranges)}"
        if cache is not None and settings.reuse_cached_engines and not settings.immutable_weights:
            blob = cache.load(key)
            if blob is None and settings.cache_built_engines:
                cache.save(key, b"engine without weights")
        return Engine(child, layers_of(child, detailed, trt.built_type))

    return backend


def iter_parts() -> Callable[[torch.fx.Node], int]:
    """Partition of a node: 0 before the first sigmoid, 1 for it, 2 behind it."""
    state = [0]

    def part(node: torch.fx.Node) -> int:
        if "sigmoid" in str(node.target):
            state[0] = 2
            return 1
        return state[0]

    return part


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TRT]]:
    """Installs a stand-in; TorchDynamo forgets what it has compiled."""
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit

    def make(**arranged: Any) -> TRT:
        trt = TRT(**arranged)
        for name, module in make_modules(trt).items():
            monkeypatch.setitem(sys.modules, name, module)
        return trt

    yield make
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


# --- torch.compile ---


@pytest.mark.parametrize("name", ["min", "opt", "max"])
def test_call_equals_eager_at_the_tuned_sizes(install, name):
    install()
    export = make_export(images=2)
    result = TorchTensorRT().optimize(export, "fp32", "cpu")
    images = [image.clone().requires_grad_() for image in export.tuning_inputs[name]]
    outputs = result.call(*images)
    assert len(outputs) == 2
    for output, expected in zip(outputs, export.eager(*images)):
        assert not output.requires_grad
        torch.testing.assert_close(output, expected.detach())
    assert result.provider == "TensorRT through torch.compile"
    assert result.precision == "fp32"
    assert result.seconds.compile > 0


@pytest.mark.slow
def test_a_detector_as_a_whole(install, exports):
    """Every convolution of RetinaNet goes into an engine with its weights, at every size."""
    trt = install()
    export = exports("testRetinaNet")
    result = TorchTensorRT().optimize(export, "fp32", "cpu")
    for images in export.tuning_inputs.values():
        for output, expected in zip(result.call(*images), export.eager(*images)):
            torch.testing.assert_close(output, expected)
    assert not any("convolution" in name for name in result.coverage.fallback_operators)
    assert sum(trt.weights) > 100
    # The network is one of them; of the rest it depends on how operators are grouped.
    assert result.coverage.segments >= 1
    assert result.coverage.operators_in_engine > 0.6 * result.coverage.operators
    assert result.read_coverage() == Coverage(recompilations_while_timed=0)


def test_engines_have_their_weights_and_take_images_only(install):
    trt = install()
    TorchTensorRT().optimize(make_export(), "fp32", "cpu")
    # Weight and bias of two convolutions, and the buffer.
    assert set(trt.weights) == {5}
    # The image, and its height and width.
    assert set(trt.inputs) == {3}


def test_engines_are_built_for_the_range_of_the_tuning_inputs(install):
    trt = install()
    export = make_export()
    assert size_factors(export) == (2 / 3, 7 / 3)
    TorchTensorRT().optimize(export, "fp32", "cpu")
    # Whatever was captured at `opt` holds its size and all that it may become.
    assert {(45, 70, 165), (59, 90, 211)} <= trt.ranges[0]
    assert all(low <= opt <= high for sizes in trt.ranges for low, opt, high in sizes)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(3, 70, 90), (3, 39, 90)], "image 2 is 3 x 39 x 90"),
        ([(3, 151, 90), (3, 70, 90)], "3 x 40 x 60 to 3 x 150 x 200"),
        ([(3, 70, 90)], "takes 2 image"),
    ],
)
def test_refuses_sizes_that_the_engines_are_not_built_for(install, sizes, words):
    install()
    result = TorchTensorRT().optimize(make_export(images=2), "fp32", "cpu")
    with pytest.raises(InputError, match=words):
        result.call(*(torch.rand(*size) for size in sizes))


@pytest.mark.parametrize("version", ["2.12.1", "2.14.0"])
def test_options_are_those_that_the_version_has(install, version):
    trt = install(version=version)
    TorchTensorRT().optimize(make_export(), "fp16", "cpu")
    options = trt.options[0]
    assert "enabled_precisions" not in options  # the casts are in the graph
    assert options.get("use_explicit_typing") == (True if version < "2.13" else None)
    assert options["truncate_double"] is True
    assert options["timing_cache_path"] != "/tmp/shared"
    assert not Path(options["timing_cache_path"]).parent.exists()
    assert not {"cache_built_engines", "custom_engine_cache", "immutable_weights"} & set(options)


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_is_forbidden_to_both_front_ends(install, monkeypatch, is_allowed):
    monkeypatch.setattr("backends.torch_tensorrt.allows_tf32", lambda: is_allowed)
    trt = install()
    TorchTensorRT().optimize(make_export(), "fp32", "cpu")
    assert trt.options[0]["disable_tf32"] is not is_allowed
    trt = install_script(install)
    TorchTensorRT().optimize(make_export(eager=Whole), "fp32", "cpu")
    assert trt.script_calls[0]["disable_tf32"] is not is_allowed


def test_a_setting_that_the_version_lacks_is_not_lost_in_silence(install):
    install()

    @dataclasses.dataclass
    class Fewer:
        timing_cache_path: str = ""

    sys.modules["torch_tensorrt.dynamo"].CompilationSettings = Fewer
    with pytest.raises(Unsupported, match="no setting 'truncate_double'"):
        TorchTensorRT().optimize(make_export(), "fp32", "cpu")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("version", ["2.12.1", "2.14.0"])
def test_lower_precision_is_in_the_graph_and_read_back_from_the_engines(
    install, precision, version
):
    install(version=version)
    assert TorchTensorRT().optimize(make_export(), precision, "cpu").precision == precision


@pytest.mark.parametrize("built", ["Row major linear FP32", "Float NCHW", "Int8 NC/32HW32"])
def test_engines_of_another_type_are_not_called_by_the_one_requested(install, built):
    install(built_type=built)
    assert TorchTensorRT().optimize(make_export(), "fp16", "cpu").precision == "fp32"


def test_engines_that_do_not_tell_their_types_are_called_fp32(install):
    install()
    interpreter = sys.modules["torch_tensorrt.dynamo.conversion._TRTInterpreter"].TRTInterpreter
    # As where the method that sets how much an engine tells has another name.
    terse = interpreter()._populate_trt_builder_config()
    del interpreter._populate_trt_builder_config
    interpreter.__getattr__ = lambda self, name: lambda: terse
    assert TorchTensorRT().optimize(make_export(), "fp16", "cpu").precision == "fp32"


def test_bounds_of_a_size_become_guards():
    """Beyond them TorchDynamo captures the graph once more, and does not run the engine."""
    seen: List[int] = []

    def backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        bound_sizes(inputs, shrink=0.5, grow=2.0)
        seen.append(next(x.node.hint for x in inputs if isinstance(x, torch.SymInt)))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(torch.sin, backend=backend, dynamic=True)
    for size in (20, 10, 40, 9, 41, 60, 20):
        compiled(torch.ones(size))
    assert seen == [20, 60]
    torch._dynamo.reset()


def test_an_integer_that_is_no_size_is_not_bounded():
    def backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        bound_sizes(inputs, shrink=0.5, grow=2.0)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, n: x + n, backend=backend, dynamic=True)
    assert compiled(torch.ones(20), -3).tolist() == [-2.0] * 20
    torch._dynamo.reset()


def test_says_what_the_engines_took_and_what_is_left(install):
    install()
    result = TorchTensorRT().optimize(make_export(), "fp32", "cpu")
    coverage = result.coverage
    assert coverage.segments == 2
    assert coverage.fallback_operators == {"aten.sigmoid.default": 1}
    # Two convolutions and a product, padding, and arithmetic on sizes.
    assert coverage.operators_in_engine >= 4
    assert coverage.operators == coverage.operators_in_engine + 1
    assert coverage.failures == ()
    assert coverage.refittable_engines is False
    assert result.cached is False


def test_counts_what_is_compiled_while_timed(install):
    install()
    export = make_export()
    result = TorchTensorRT().optimize(export, "fp32", "cpu")
    assert result.read_coverage() == Coverage(recompilations_while_timed=0)
    torch._dynamo.reset()
    result.call(*export.inputs)
    assert result.read_coverage() == Coverage(recompilations_while_timed=1)


def test_size_of_the_engines(install):
    trt = install()
    result = TorchTensorRT().optimize(make_export(), "fp32", "cpu")
    assert result.read_artifact_bytes() == 2 * len(trt.ranges) * len(b"engine" * 10)


def test_engines_come_from_the_cache_the_second_time(install, tmp_path):
    trt = install()
    first = TorchTensorRT().optimize(make_export(), "fp32", "cpu", tmp_path)
    options = trt.options[0]
    assert options["timing_cache_path"] == str(tmp_path / "timing.bin")
    assert options["cache_built_engines"] is options["reuse_cached_engines"] is True
    assert options["immutable_weights"] is False  # else nothing would be cached
    assert first.cached is False
    assert first.coverage.refittable_engines is True

    torch._dynamo.reset()
    install()
    assert TorchTensorRT().optimize(make_export(), "fp32", "cpu", tmp_path).cached is True

    next((tmp_path / "engines").iterdir()).joinpath("blob.bin").unlink()
    torch._dynamo.reset()
    install()
    assert TorchTensorRT().optimize(make_export(), "fp32", "cpu", tmp_path).cached is False


def fail_in_tensorrt() -> None:
    logging.getLogger("torch_tensorrt.dynamo").warning("a warning is not the cause")
    try:
        raise ValueError("no tactic for convolution\nand its stack")
    except ValueError:
        raise RuntimeError("building the engine failed")  # noqa: B904


def test_without_an_engine_the_first_cause_is_the_status(install):
    install(fail=fail_in_tensorrt)
    with pytest.raises(Unsupported) as error:
        TorchTensorRT().optimize(make_export(), "fp32", "cpu")
    assert str(error.value) == (
        "Torch-TensorRT built no engine for this export: ValueError: no tactic for convolution"
    )
    assert logging.getLogger("torch_tensorrt").handlers == []


def test_what_tensorrt_cannot_take_is_a_sentence(install):
    install(no_engine=True)
    with pytest.raises(Unsupported, match=r"export: 0 supported operations detected in subgraph$"):
        TorchTensorRT().optimize(make_export(), "fp32", "cpu")


@pytest.mark.parametrize("error", [RuntimeError("no tactic"), KeyError("no converter")])
def test_a_subgraph_that_fails_is_left_to_pytorch_and_named(install, error):
    """Of a RuntimeError the real one logs and goes on; of a KeyError it does not."""
    failures = iter([True])

    def fail_once() -> None:
        if next(failures, False):
            raise error

    install(fail=fail_once)
    export = make_export()
    result = TorchTensorRT().optimize(export, "fp32", "cpu")
    assert result.coverage.failures == (first_cause(error),)
    assert result.coverage.operators_in_engine == 0  # of the graph at `opt`
    assert result.coverage.fallback_operators["conv2d"] == 2
    torch.testing.assert_close(result.call(*export.inputs), export.eager(*export.inputs))


# --- the TorchScript front end ---


def script_engine(detailed: bool = True) -> Any:
    tensor = {"Name": "x", "Format/Datatype": "Half"}
    layer = {"Name": "myl", "LayerType": "gemm", "Inputs": [tensor]}
    text = json.dumps({"Layers": [layer if detailed else "myl"]})
    return SimpleNamespace(get_engine_layer_info=lambda: text)


def install_script(install: Callable[..., TRT], **arranged: Any) -> TRT:
    """Where `torch.compile` builds no engine, and there is a TorchScript front end."""
    arranged.setdefault("script_engines", {"_engine_0x1": script_engine()})
    return install(fail=fail_in_tensorrt, **arranged)


def test_the_torchscript_front_end_has_its_turn_where_torch_compile_builds_nothing(
    install, monkeypatch
):
    trt = install_script(install)
    export = make_export(eager=Whole)
    result = TorchTensorRT().optimize(export, "fp32", "cpu")
    assert result.provider == "TensorRT through TorchScript"
    (call,) = trt.script_calls
    assert [x.shapes for x in call["inputs"]] == [((3, 40, 60), (3, 70, 90), (3, 150, 200))]
    assert [x.dtype for x in call["inputs"]] == [torch.float32]
    assert call["enabled_precisions"] == {torch.float32}
    assert call["truncate_long_and_double"] is True
    assert result.coverage == Coverage(segments=1, fallback_operators={"aten::nonzero": 1})
    torch.testing.assert_close(result.call(*export.inputs), export.eager(*export.inputs))
    with pytest.raises(InputError, match="Torch-TensorRT's engines"):
        result.call(torch.rand(3, 39, 60))
    monkeypatch.setattr(torch.jit, "save", lambda module, file: file.write(b"12345"))
    assert result.read_artifact_bytes() == 5


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0", "2.14.0"])
def test_fp16_of_the_torchscript_front_end_is_a_flag_and_later_in_the_graph(install, version):
    trt = install_script(install, version=version)
    result = TorchTensorRT().optimize(make_export(eager=Whole), "fp16", "cpu")
    (call,) = trt.script_calls
    flag = version < "2.13"
    assert call["enabled_precisions"] == (
        {torch.float32, torch.float16} if flag else {torch.float32}
    )
    assert ("Half(" in call["graph"]) is not flag
    assert result.precision == "fp16"


def test_script_engines_that_do_not_tell_their_types_are_called_fp32(install):
    install_script(install, script_engines={"_engine": script_engine(detailed=False)})
    result = TorchTensorRT().optimize(make_export(eager=Whole), "fp16", "cpu")
    assert result.precision == "fp32"


@pytest.mark.parametrize(("precision", "engines"), [("fp32", {}), ("bf16", {"_engine": None})])
def test_without_script_engines_the_cause_is_that_of_torch_compile(install, precision, engines):
    install_script(install, script_engines=engines)
    with pytest.raises(Unsupported, match=r"no tactic for convolution$"):
        TorchTensorRT().optimize(make_export(eager=Whole), precision, "cpu")


# --- precision read back ---


@pytest.mark.parametrize(
    ("stored", "precision"),
    [
        ("Half NHWC8", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("BFloat16", "bf16"),
        ("BF16 NHWC8", "bf16"),
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
    ],
)
def test_reads_a_type_as_tensorrt_writes_it(stored, precision):
    layer = {"Name": "a + b", "ParameterType": "Convolution"}
    text = json.dumps({"Layers": [{**layer, "Inputs": [{"Format/Datatype": stored}]}]})
    for requested in ("fp32", "fp16", "bf16"):
        expected = requested if requested == precision else "fp32"
        assert engine_precision([text], requested) == expected


def test_most_heavy_layers_decide():
    def layer(kind: str, stored: str) -> Dict[str, Any]:
        return {"LayerType": kind, "Inputs": [{"Format/Datatype": stored}]}

    def info(*layers: Any) -> str:
        return json.dumps({"Layers": layers})

    half, single = layer("CaskConvolution", "Half"), layer("gemm", "Float")
    light = [layer("PointWise", "Float")] * 9
    assert engine_precision([info(half, half, *light), info(single)], "fp16") == "fp16"
    assert engine_precision([info(half, *light), info(single)], "fp16") == "fp32"
    assert engine_precision([info("conv1", "conv2")], "fp16") == "fp32"
    assert engine_precision(["", "null", "[]", "no JSON"], "fp16") == "fp32"
    assert engine_precision([], "bf16") == "fp32"


# --- availability ---


def test_unavailable_on_a_cpu():
    assert "CUDA device, not on 'cpu'" in TorchTensorRT().unavailable("cpu")


@pytest.mark.skipif(find_spec("torch_tensorrt") is not None, reason="Torch-TensorRT is installed")
def test_unavailable_where_it_is_not_installed():
    reason = base.load("torch_tensorrt").unavailable("cuda")
    version = ".".join(torch.__version__.split(".")[:2])
    assert reason.startswith("Torch-TensorRT is not installed")
    assert reason.endswith(f"pip install 'torch-tensorrt=={version}.*'")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("print('import error')\nraise Exception('libnvinfer.so.11: cannot open')", "libnvinfer"),
        ("raise OSError('libcuda.so.1: cannot open shared object')", "libcuda.so.1"),
        ("import a_module_that_torch_tensorrt_needs", "No module named 'a_module_that"),
    ],
)
def test_unavailable_where_its_import_fails(monkeypatch, tmp_path, capsys, source, words):
    (tmp_path / "torch_tensorrt").mkdir()
    (tmp_path / "torch_tensorrt" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = TorchTensorRT().unavailable("cuda")
    assert reason.startswith("Torch-TensorRT is installed but cannot be imported: ")
    assert words in reason
    assert "\n" not in reason
    # Tables are printed there, and the real one prints why it fails.
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cuda", [True, False])
def test_availability_depends_on_a_cuda_device(install, monkeypatch, cuda):
    install()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    reason = TorchTensorRT().unavailable("cuda")
    assert reason is None if cuda else "needs a CUDA device" in reason


def test_the_registry_finds_it_with_its_place_in_the_table(install):
    install()
    backend = base.load("torch_tensorrt")
    assert (backend.label, backend.rank, backend.devices) == ("Torch-TensorRT", 7, ("cuda",))
    assert backend.precisions == {"cuda": ("fp32", "fp16", "bf16")}
    assert not backend.default
    assert backend.versions() == {
        "torch_tensorrt": "2.14.0+cu130",
        "tensorrt": "11.1.0",
        "torch": torch.__version__,
    }
