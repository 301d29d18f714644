"""The TorchBlade backend against a stand-in that records what is done to it.

TorchBlade cannot be installed where these tests run. The stand-in has the names, properties and
checks of the real `torch_blade` (BladeDISC v0.2.0 and v0.4.0) as far as the backend meets them,
and what it returns is a real frozen TorchScript module. docs/torchblade.md says what was run for
real.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
from torch import nn

from backends import base
from backends.torch_blade import TorchBlade
from errors import InputError, Unsupported, first_cause
from results.record import Coverage

FALLBACK = "TORCH_BLADE_ENABLE_RUNTIME_FALLBACK"
SUBGRAPH = """graph(%x : Tensor, %w : Tensor):
  %1 : int[] = prim::Constant[value=[1, 1]]()
  %2 : Tensor = aten::_convolution(%x, %w)
  %3 : Tensor = aten::relu(%2)
  %4 : Tensor[] = prim::ListConstruct(%3)
  return (%4)"""


class Net(nn.Module):
    """Two convolutions, and an output for each field and image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, *images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(self.head(torch.relu(self.stem(image[None]))) for image in images)


@dataclass(frozen=True)
class Export:
    """What `detectors.export.Export` shows of itself to a backend."""

    name: str
    eager: nn.Module
    tuning_inputs: Dict[str, Tuple[torch.Tensor, ...]]

    @property
    def inputs(self) -> Tuple[torch.Tensor, ...]:
        return self.tuning_inputs["opt"]

    def script_module(self) -> torch.jit.ScriptModule:
        return torch.jit.trace(self.eager, self.inputs)


def make_export(images: int = 1) -> Export:
    sizes = {"min": (8, 10), "opt": (16, 20), "max": (40, 50)}
    torch.manual_seed(0)
    tuning = {
        name: tuple(torch.rand(3, *size) for _ in range(images)) for name, size in sizes.items()
    }
    return Export(f"testTiny_b{images}", Net().eval(), tuning)


class Engine:
    """The part of a `torch.classes.torch_blade.Engine` that describes it."""

    def get_attr_string(self, name: str) -> str:
        return {"module_graph": SUBGRAPH}.get(name, "")


@dataclass
class Blade:
    """What a test arranges for the stand-in, and what the stand-in saw.

    `events` are in order: contexts entered and left, `optimize`, `disable_pytorch_jit`.
    """

    old: bool = False
    engines: List[Tuple[str, Engine]] = field(
        default_factory=lambda: [("trt_grp0_len6_0", Engine()), ("trt_grp1_len9_2", Engine())]
    )
    before: Callable[[], None] = lambda: None
    result: Callable[[torch.jit.ScriptModule], nn.Module] = torch.jit.freeze
    events: List[str] = field(default_factory=list)
    settings: Dict[str, Any] = field(default_factory=dict)
    optimized_with: Optional[Tuple[Any, ...]] = None


def boolean(name: str) -> property:
    def set_it(self: Any, value: bool) -> None:
        assert isinstance(value, bool), f"{name} should be bool, got {type(value)}"
        vars(self)["_" + name] = value

    return property(lambda self: vars(self).get("_" + name), set_it)


def check_ranges(value: Any, tuples: bool) -> List[Dict[str, Any]]:
    ranges = [value] if isinstance(value, dict) else value
    assert isinstance(ranges, list)
    for one in ranges:
        assert {"min", "max", "opts"} <= set(one), "min/max/opt should be set"
        inputs = [one["min"], one["max"]] + one["opts"]
        if tuples and not all(isinstance(each, tuple) for each in inputs):
            raise Exception("The dynamic tuning shapes setting is illegal")
    return ranges


def config_class(blade: Blade) -> type:
    """A `torch_blade.Config`: checked properties, any other attribute silently accepted."""
    current: List[Any] = []

    class Config:
        enable_fp16 = boolean("enable_fp16")
        enable_onnx_shape_white_list = boolean("enable_onnx_shape_white_list")

        @property
        def optimization_pipeline(self) -> str:
            return vars(self).get("_pipeline", "DISC")

        @optimization_pipeline.setter
        def optimization_pipeline(self, value: str) -> None:
            assert isinstance(value, str)
            assert value in ("DISC", "TensorRT"), f"The pipeline {value} haven't been registered"
            vars(self)["_pipeline"] = value

        @property
        def dynamic_tuning_shapes(self) -> List[Dict[str, Any]]:
            return vars(self).get("_shapes", [])

        @dynamic_tuning_shapes.setter
        def dynamic_tuning_shapes(self, value: Any) -> None:
            vars(self)["_shapes"] = check_ranges(value, tuples=True)

        def __enter__(self) -> Any:
            blade.events.append("enter")
            current.append(self)
            return self

        def __exit__(self, *error: object) -> None:
            blade.events.append("exit")
            current.pop()

        @staticmethod
        def get_current_context() -> Optional[Any]:
            return current[-1] if current else None

    if not blade.old:
        Config.dynamic_tuning_inputs = property(
            lambda self: vars(self).get("_inputs", []),
            lambda self, value: vars(self).update(_inputs=check_ranges(value, tuples=False)),
        )
    return Config


def make_modules(blade: Blade) -> Dict[str, ModuleType]:
    package, tensorrt, utils, version = (
        ModuleType(name)
        for name in (
            "torch_blade",
            "torch_blade.tensorrt",
            "torch_blade.utils",
            "torch_blade.version",
        )
    )
    package.Config = config_class(blade)

    def optimize(model: Any, allow_tracing: Any = None, model_inputs: Any = None) -> nn.Module:
        blade.events.append("optimize")
        blade.settings = dict(vars(package.Config.get_current_context()))
        blade.optimized_with = (model, allow_tracing, model_inputs)
        blade.before()
        return blade.result(model)

    package.optimize = optimize
    tensorrt.is_available = lambda: True
    tensorrt.backend_name = lambda: "TensorRT"
    tensorrt.collect_engines = lambda module: blade.engines
    tensorrt.num_engines = lambda module: len(blade.engines)
    if not blade.old:
        tensorrt.num_compiled_nodes = lambda module: [6, 9][: len(blade.engines)]
    utils.disable_pytorch_jit = lambda: blade.events.append("disable_pytorch_jit")
    version.__version__ = "0.2.0" if blade.old else "0.4.0"
    package.tensorrt, package.utils, package.version = tensorrt, utils, version
    return {module.__name__: module for module in (package, tensorrt, utils, version)}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Blade]:
    """Installs a stand-in; the environment variable that the backend sets is put back."""
    monkeypatch.setenv(FALLBACK, "1")

    def make(**arranged: Any) -> Blade:
        blade = Blade(**arranged)
        for name, module in make_modules(blade).items():
            monkeypatch.setitem(sys.modules, name, module)
        return blade

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_settings_are_those_of_torchblades_own_benchmark(install, precision):
    blade = install()
    export = make_export()
    TorchBlade().optimize(export, precision, "cuda")
    tuning = export.tuning_inputs
    assert blade.settings == {
        "_inputs": [{"min": tuning["min"], "max": tuning["max"], "opts": [tuning["opt"]]}],
        "_pipeline": "TensorRT",
        "_enable_fp16": precision == "fp16",
        "_enable_onnx_shape_white_list": False,
    }
    assert isinstance(blade.settings["_inputs"][0]["min"], tuple)


def test_before_v0_3_the_tuning_inputs_are_given_as_shapes(install):
    blade = install(old=True)
    export = make_export()
    result = TorchBlade().optimize(export, "fp32", "cuda")
    tuning = export.tuning_inputs
    assert blade.settings["_shapes"] == [
        {"min": tuning["min"], "max": tuning["max"], "opts": [tuning["opt"]]}
    ]
    assert not {"dynamic_tuning_inputs", "_inputs"} & set(blade.settings)
    assert result.coverage.nodes_by_segment is None


def test_optimizes_the_script_module_in_the_context_and_then_stops_the_jit(install):
    blade = install()
    export = make_export(images=2)
    TorchBlade().optimize(export, "fp32", "cuda")
    assert blade.events == ["enter", "optimize", "exit", "disable_pytorch_jit"]
    module, allow_tracing, inputs = blade.optimized_with
    assert isinstance(module, torch.jit.ScriptModule)
    assert allow_tracing is False
    assert inputs is export.inputs
    assert os.environ[FALLBACK] == "0"


def test_a_setting_that_the_version_lacks_is_not_lost_in_silence(install):
    install()
    del sys.modules["torch_blade"].Config.enable_onnx_shape_white_list
    with pytest.raises(Unsupported, match="no setting 'enable_onnx_shape_white_list'"):
        TorchBlade().optimize(make_export(), "fp32", "cuda")


@pytest.mark.parametrize("name", ["min", "opt", "max"])
def test_call_equals_eager_at_the_tuned_sizes(install, name):
    install()
    export = make_export(images=2)
    result = TorchBlade().optimize(export, "fp32", "cuda")
    images = [image.clone().requires_grad_() for image in export.tuning_inputs[name]]
    outputs = result.call(*images)
    assert len(outputs) == 2
    for output, expected in zip(outputs, export.eager(*images)):
        assert not output.requires_grad
        torch.testing.assert_close(output, expected.detach())


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(3, 16, 20), (3, 7, 10)], "image 2 is 3 x 7 x 10"),
        ([(3, 41, 50), (3, 16, 20)], "3 x 8 x 10 to 3 x 40 x 50"),
        ([(3, 16, 51), (3, 16, 20)], "image 1 is 3 x 16 x 51"),
        ([(1, 16, 20), (3, 16, 20)], "image 1 is 1 x 16 x 20"),
        ([(3, 16), (3, 16, 20)], "image 1 is 3 x 16, "),
        ([(3, 16, 20)], "takes 2 image"),
    ],
)
def test_refuses_sizes_that_the_engines_are_not_built_for(install, sizes, words):
    install()
    result = TorchBlade().optimize(make_export(images=2), "fp32", "cuda")
    with pytest.raises(InputError, match=words):
        result.call(*(torch.rand(*size) for size in sizes))


def has_fp16_autocast_on_cpu() -> bool:
    try:
        with torch.autocast("cpu", dtype=torch.float16):
            return torch.mm(torch.eye(2), torch.eye(2)).dtype == torch.float16
    except RuntimeError:  # PyTorch 2.0 has it for bfloat16 only
        return False


@pytest.mark.skipif(not has_fp16_autocast_on_cpu(), reason="no fp16 autocast on a CPU")
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_what_is_left_to_pytorch_runs_under_autocast_at_fp16(install, precision, dtype):
    install()
    export = make_export()
    result = TorchBlade().optimize(export, precision, "cpu")
    assert result.precision == precision
    assert result.call(*export.inputs)[0].dtype == getattr(torch, dtype)


def test_says_what_the_engines_took_and_keeps_code_and_graph(install):
    def warn() -> None:
        for _ in range(2):
            logging.getLogger("torch_blade.logging").warning("Building engine failed")

    install(before=warn)
    result = TorchBlade().optimize(make_export(), "fp32", "cuda")
    graph = result.artifacts["testTiny_b1.graph.txt"]
    assert graph.count("= aten::") > 0
    # Each engine's subgraph has two operators, a constant and a list.
    assert result.coverage == Coverage(
        operators=graph.count("= aten::") + 4,
        operators_in_engine=4,
        segments=2,
        nodes_by_segment=(6, 9),
        warnings=("Building engine failed",),
    )
    assert result.artifacts["testTiny_b1.code.py"].startswith("def forward(self")
    assert set(result.artifacts) == {"testTiny_b1.code.py", "testTiny_b1.graph.txt"}
    assert result.provider == "TensorRT"
    assert result.seconds.export > 0
    assert result.seconds.convert is None
    assert result.seconds.compile > 0


def test_a_module_without_an_engine_is_not_torchblade(install):
    def warn() -> None:
        logger = logging.getLogger("torch_blade.logging")
        logger.warning("Building engine exception: no importer\nfor this operator")
        logger.warning("Building engine failed with empty engine binary.")

    blade = install(engines=[], before=warn)
    with pytest.raises(Unsupported) as error:
        TorchBlade().optimize(make_export(), "fp32", "cuda")
    assert str(error.value) == (
        "TorchBlade built no TensorRT engine for this export: "
        "Building engine exception: no importer"
    )
    assert "disable_pytorch_jit" not in blade.events
    assert logging.getLogger("torch_blade").handlers == []


def test_a_module_that_torchblade_could_not_export_as_a_whole_is_refused(install):
    install(result=lambda module: Net())
    with pytest.raises(Unsupported, match="built no TensorRT engine"):
        TorchBlade().optimize(make_export(), "fp32", "cuda")


def test_a_failure_inside_torchblade_is_a_sentence_with_its_cause(install):
    def fail() -> None:
        try:
            raise ValueError("unsupported operator\nand its stack")
        except ValueError:
            raise RuntimeError("merge failed, please report a bug")  # noqa: B904

    blade = install(before=fail)
    with pytest.raises(Unsupported) as error:
        TorchBlade().optimize(make_export(), "fp32", "cuda")
    assert str(error.value) == (
        "TorchBlade cannot take this export: ValueError: unsupported operator"
    )
    assert blade.events == ["enter", "optimize", "exit"]


def test_a_setting_that_torchblade_rejects_is_a_sentence(install):
    install()
    sys.modules["torch_blade.tensorrt"].backend_name = lambda: "TensorRT 99"
    with pytest.raises(Unsupported, match="The pipeline TensorRT 99 haven't been registered"):
        TorchBlade().optimize(make_export(), "fp32", "cuda")


def test_first_cause_of_a_torchscript_error_is_its_last_line():
    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.narrow(0, 5, 1)

    with pytest.raises(RuntimeError) as error:
        torch.jit.trace(narrow, torch.ones(6))(torch.ones(2))
    assert "TorchScript interpreter" in str(error.value)
    cause = first_cause(error.value)
    assert cause == str(error.value).splitlines()[-1]
    assert cause.startswith("RuntimeError: ")


def test_first_cause_of_a_bare_assertion_names_the_function():
    def check_two_shape() -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as error:
        check_two_shape()
    assert first_cause(error.value) == "AssertionError in check_two_shape()"


def test_unavailable_on_a_cpu():
    assert "CUDA device, not on 'cpu'" in TorchBlade().unavailable("cpu")


@pytest.mark.skipif(find_spec("torch_blade") is not None, reason="TorchBlade is installed")
def test_unavailable_where_it_is_not_installed():
    reason = TorchBlade().unavailable("cuda")
    assert reason.startswith("TorchBlade is not installed")
    assert torch.__version__.split("+")[0] in reason
    assert "docs/torchblade.md" in reason


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise OSError('libnvinfer.so.8: cannot open shared object file')", "libnvinfer.so.8"),
        ("import a_module_that_torch_blade_needs", "No module named 'a_module_that_torch"),
        ("raise SyntaxError('not for this Python')", "not for this Python"),
    ],
)
def test_unavailable_where_its_import_fails(monkeypatch, tmp_path, source, words):
    (tmp_path / "torch_blade").mkdir()
    (tmp_path / "torch_blade" / "__init__.py").write_text(source)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_blade"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    reason = TorchBlade().unavailable("cuda")
    assert reason.startswith("TorchBlade is installed but cannot be imported: ")
    assert words in reason
    assert "\n" not in reason


def test_unavailable_when_built_without_tensorrt(install, monkeypatch):
    install()
    tensorrt = sys.modules["torch_blade.tensorrt"]
    tensorrt.is_available = lambda: False
    del tensorrt.backend_name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "built without TensorRT" in TorchBlade().unavailable("cuda")


@pytest.mark.parametrize("cuda", [True, False])
def test_availability_depends_on_a_cuda_device(install, monkeypatch, cuda):
    install()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    reason = TorchBlade().unavailable("cuda")
    assert reason is None if cuda else "needs a CUDA device" in reason


def test_the_registry_finds_it_with_its_place_in_the_table(install):
    install(old=True)
    backend = base.load("torch_blade")
    assert (backend.label, backend.rank, backend.devices) == ("TorchBlade", 2, ("cuda",))
    assert backend.precisions == {"cuda": ("fp32", "fp16")}
    assert backend.versions() == {"torch_blade": "0.2.0", "torch": torch.__version__}
