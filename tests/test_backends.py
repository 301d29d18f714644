"""The registry, and the real engines on real exports: healthy ones match, broken ones do not."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Dict, List, Sequence, Set, Tuple

import parts
import pytest
import torch
from conftest import arrays, needs_bf16, small_export
from seeded_weights import seeded_image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import detectors.boxes
from backends import base
from backends.base import Backend, Optimized, check_sizes
from backends.torch import autocast, count_flops, effective_precision
from configuration import from_settings
from detectors.build import build, on_device
from detectors.config import build_detector
from detectors.export import Export
from detectors.images import batch_images, image_size
from detectors.zoo_configurations import zoo_configuration, zoo_settings
from errors import InputError, Unsupported, first_cause
from measure import verify
from models import MODELS, Model
from results.record import Agreement, Coverage

ROOT = Path(base.__file__).parent.parent
OPENVINO_UNAVAILABLE = base.load("openvino").unavailable("cpu")


def needs(backend: str) -> Any:
    reason = base.load(backend).unavailable("cpu")
    return pytest.mark.skipif(reason is not None, reason=str(reason))


needs_openvino, needs_onnxruntime = needs("openvino"), needs("onnxruntime")
# It compiles for minutes.
SLOW = ("inductor",)
ENGINES = [
    pytest.param(
        backend,
        precision,
        marks=[
            needs(backend),
            *[needs_bf16] * (precision == "bf16"),
            *[pytest.mark.slow] * (backend in SLOW),
        ],
    )
    for backend, precisions in (
        ("torch", ("fp32", "bf16")),
        ("torch_channels_last", ("fp32", "bf16")),
        ("torchscript", ("fp32", "bf16")),
        ("inductor", ("fp32", "bf16")),
        ("openvino", ("fp32", "bf16")),
        ("onnxruntime", ("fp32",)),
    )
    for precision in precisions
]
# The sizes of the issue tracker's reports: multiples of 32, and one that is not.
PADDED = {(288, 384): (288, 384), (480, 640): (480, 640), (427, 611): (448, 640)}


# The registry ----------------------------------------------------------------------------------


def test_every_file_is_a_backend():
    assert base.names() == sorted(base.names())
    expected = {"inductor", "onnxruntime", "openvino", "torch", "torch_blade", "torchscript"}
    assert set(base.names()) >= {*expected, "torch_channels_last"}
    backends = base.load_all()
    assert [backend.label for backend in backends][:2] == ["Torch", "Torch channels_last"]
    assert len({backend.rank for backend in backends}) == len(backends)
    for backend in backends:
        assert backend.name in base.names()
        assert set(backend.devices) == set(backend.precisions) <= set(base.DEVICES)
        assert all(set(x) <= set(base.PRECISIONS) for x in backend.precisions.values())


def test_an_unknown_backend():
    with pytest.raises(InputError) as error:
        base.load("tvm")
    assert str(error.value) == f"unknown backend 'tvm'; there are {', '.join(base.names())}"
    with pytest.raises(InputError):
        base.load("base")


def test_a_file_with_two_backends_is_a_mistake(monkeypatch):
    module = ModuleType("backends.twins")
    for name in ("One", "Two"):
        setattr(module, name, type(name, (Backend,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(base, "names", lambda: ["twins"])
    with pytest.raises(TypeError, match="exactly one Backend, not 2"):
        base.load("twins")


def test_backends_of_one_rank_stand_side_by_side(monkeypatch):
    others = []
    for name in ("atwin", "zwin"):
        module = ModuleType(f"backends.{name}")
        namespace = {"__module__": module.__name__, "name": name, "rank": 5, "label": name}
        module.Twin = type("Twin", (Backend,), namespace)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        others.append(name)
    names = base.names()
    for order in (others, others[::-1]):
        monkeypatch.setattr(base, "names", lambda order=order: [*order, *names])
        found = [backend.name for backend in base.load_all()]
        assert sorted(found) == sorted([*others, *names])
        assert found[found.index("atwin") :][:3] == ["atwin", "openvino", "zwin"]


def test_versions_are_those_of_the_libraries():
    for name in ("torch", "torch_channels_last", "torchscript"):
        assert base.load(name).versions()["torch"] == torch.__version__
    if OPENVINO_UNAVAILABLE is None:
        import openvino

        assert base.load("openvino").versions() == {"openvino": openvino.__version__}


def test_a_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # import raises ImportError
    assert "pip install openvino" in base.load("openvino").unavailable("cpu")


@needs_openvino
@needs_onnxruntime
def test_engines_report_nothing_to_their_makers(tmp_path):
    """Before the first report they leave a number at home that tells this user from others."""
    pytest.importorskip("nncf")
    code = (
        "import backends\n"
        "import nncf, openvino, onnx, onnxruntime\n"
        "graph = onnx.parser.parse_model(\n"
        "    '<ir_version: 8, opset_import: [\"\" : 17]> g (float[1] x) => (float[1] y)'\n"
        "    '{ y = Add(x, x) }'\n"
        ")\n"
        "providers = ['CPUExecutionProvider']\n"
        "onnxruntime.InferenceSession(graph.SerializeToString(), providers=providers)\n"
    )
    known = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")  # In a CI job they are silent anyway.
    variables = {name: os.environ[name] for name in known if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={**variables, "HOME": str(tmp_path)},
    )
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert not {path for path in left if path.startswith(("intel", ".cache/Microsoft"))}


@needs_openvino
def test_engines_that_are_gone_leave_signals_working():
    """OpenVINO's plugins could leave a stack for signals that is freed: see `openvino._core`."""
    code = (
        "import gc, os, signal\n"
        "import numpy as np, openvino\n"
        "from openvino import opset13 as ops\n"
        "from backends.openvino import compile_model\n"
        "def engine():\n"
        "    x = ops.parameter([1, 3], np.float32)\n"
        "    return compile_model(openvino.Model([ops.add(x, x)], [x], 'twice'), 'fp32', 1)\n"
        "first, second = engine(), engine()\n"
        "del first\n"
        "gc.collect()\n"
        "del second\n"
        "gc.collect()\n"
        "signal.signal(signal.SIGINT, lambda *_: print('received', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "received\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_a_reason():
    for name in ("torch", "torch_channels_last", "torchscript"):
        assert base.load(name).unavailable("cpu") is None
        assert "no CUDA device" in base.load(name).unavailable("cuda")


# Healthy engines -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def reference(name: str) -> Dict[str, Tuple[Tensor, ...]]:
    """What eager fp32 finds, by size."""
    export = small_export(name)
    with torch.no_grad():
        return {size: export.eager(*images) for size, images in export.tuning_inputs.items()}


def made(name: str, backend: str, precision: str) -> Optimized:
    """An engine that one test has for itself."""
    export = small_export(name)
    if backend == "torch_channels_last":  # It changes the module, which others use, too.
        export = on_device(export, MODELS[name], "cpu")
    return base.load(backend).optimize(export, precision, "cpu")


@functools.lru_cache(maxsize=None)
def engine(backend: str, precision: str) -> Optimized:
    """One of RetinaNet, which many tests call: no more than there are backends and precisions."""
    return made("testRetinaNet", backend, precision)


@pytest.fixture(scope="module", autouse=True)
def freed():
    """Engines take gigabytes, which the processes of later tests need."""
    yield
    engine.cache_clear()
    reference.cache_clear()
    gc.collect()


def agreement_of(
    expected: Sequence[Tensor], found: Sequence[Tensor], export: Export, precision: str
) -> Agreement:
    """What verify says of the flat tuples of two calls."""
    return verify.verify(arrays(expected), arrays(found), export.fields, precision)


def compare(name: str, call: Callable, precision: str) -> Dict[str, Agreement]:
    """What verify says of a call, by size."""
    export = small_export(name)
    return {
        size: agreement_of(expected, call(*export.tuning_inputs[size]), export, precision)
        for size, expected in reference(name).items()
    }


def assert_all_found(agreements: Dict[str, Agreement]) -> None:
    for size, agreement in agreements.items():
        assert agreement.verdict == "match", (size, agreement)
        assert agreement.expected > 20


@pytest.mark.parametrize(("backend", "precision"), ENGINES)
def test_a_healthy_engine_matches(backend, precision):
    call = engine(backend, precision).call
    agreements = compare("testRetinaNet", call, precision)
    assert_all_found(agreements)
    if precision == "fp32":
        for agreement in agreements.values():
            assert (agreement.lost, agreement.spurious, agreement.exempt) == (0, 0, 0)
            assert agreement.box_drift < 0.05
            assert agreement.score_drift < 1e-3


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("torchscript", "fp32"),
        pytest.param("torchscript", "bf16", marks=needs_bf16),
        pytest.param("openvino", "fp32", marks=needs_openvino),
        pytest.param("onnxruntime", "fp32", marks=needs_onnxruntime),
    ],
)
def test_a_healthy_engine_matches_with_masks(backend, precision):
    call = made("testMaskRCNNFPN", backend, precision).call
    agreements = compare("testMaskRCNNFPN", call, precision)
    assert_all_found(agreements)
    assert all(agreement.mask_drift is not None for agreement in agreements.values())


def effective(optimized: Optimized) -> str:
    """The precision that it computes in, read back where the engine does not tell."""
    return (optimized.read_precision or (lambda: optimized.precision))()


TAKE_TORCHSCRIPT = [
    # The others are slow tests: each makes an engine of its own.
    each
    if each.values == ("openvino", "fp32")
    else pytest.param(*each.values, marks=[*each.marks, pytest.mark.slow])
    for each in ENGINES
    if each.values[0] in ("torchscript", "openvino", "onnxruntime")
]


@pytest.mark.parametrize(("backend", "precision"), TAKE_TORCHSCRIPT)
def test_a_healthy_scripted_engine_matches(backend, precision):
    optimized = made("testRetinaNet_scripted", backend, precision)
    assert_all_found(compare("testRetinaNet_scripted", optimized.call, precision))
    assert effective(optimized) == precision


@pytest.mark.parametrize(("backend", "precision"), ENGINES)
def test_a_call_changes_neither_its_images_nor_earlier_outputs(backend, precision):
    export = small_export("testRetinaNet")
    call = engine(backend, precision).call
    before = export.inputs[0].clone()
    first = call(*export.inputs)
    kept = [tensor.clone() for tensor in first]
    call(*(255 - image for image in export.inputs))
    assert torch.equal(export.inputs[0], before)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(first, kept))


@pytest.mark.parametrize(("backend", "precision"), ENGINES)
def test_outputs_are_what_eager_gives(backend, precision):
    export = small_export("testRetinaNet")
    outputs = engine(backend, precision).call(*export.inputs)
    assert len(outputs) == len(export.fields)
    for field, expected, found in zip(export.fields, reference("testRetinaNet")["opt"], outputs):
        assert found.device == expected.device
        assert found.dim() == expected.dim(), field
        assert not found.requires_grad
        assert found.is_floating_point() == expected.is_floating_point(), field


# On a GPU --------------------------------------------------------------------------------------

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ON_DEVICES = [pytest.param("torch", "fp32", "cpu")] + [
    pytest.param(backend.name, precision, "cuda", marks=needs_cuda)
    for backend in base.load_all()
    for precision in backend.precisions.get("cuda", ())
]


@pytest.mark.parametrize(("backend", "precision", "device"), ON_DEVICES)
def test_a_healthy_engine_matches_on_its_device(backend, precision, device):
    reason = base.load(backend).unavailable(device)
    if reason is not None:
        pytest.skip(reason)
    export = on_device(small_export("testRetinaNet"), MODELS["testRetinaNet"], device)
    optimized = base.load(backend).optimize(export, precision, device)
    known = effective(optimized)
    for size, expected in reference("testRetinaNet").items():
        found = optimized.call(*export.tuning_inputs[size])
        # What size an image has is known on the host.
        devices = {x.device.type for f, x in zip(export.fields, found) if f != "image_size"}
        assert devices == {device}
        assert agreement_of(expected, found, export, known).verdict == "match", size


# What they say of themselves -------------------------------------------------------------------


def phases(optimized: Optimized) -> Set[str]:
    """Names of the phases that took time."""
    return {name for name, seconds in vars(optimized.seconds).items() if seconds is not None}


@pytest.mark.parametrize(("backend", "precision"), ENGINES)
def test_precision_and_threads_are_read_back(backend, precision):
    optimized = engine(backend, precision)
    assert optimized.precision == precision
    if optimized.read_precision is not None:
        assert optimized.read_precision() == precision
    assert optimized.threads == torch.get_num_threads() == 1


def test_what_shows_in_running_is_added_to_the_coverage():
    prepared = Coverage(operators=10, segments=2, failures=())
    later = Coverage(segments=3, recompilations_while_timed=0)
    assert prepared.merged(later) == Coverage(
        operators=10, segments=3, failures=(), recompilations_while_timed=0
    )
    assert prepared.merged(Coverage()) == prepared
    assert Coverage().merged(prepared) == prepared


def test_a_call_that_ignores_autocast_is_fp32():
    """A row must not be labelled bf16 for having been asked to be."""
    export = small_export("testRetinaNet")
    assert effective_precision(autocast(export.eager, "fp32", "cpu"), export, "bf16") == "fp32"


def test_a_call_that_shows_no_operator_has_no_precision():
    """As one that replays a CUDA graph: it must not be labelled fp32."""
    export = small_export("testRetinaNet")
    outputs = export.eager(*export.inputs)
    with pytest.raises(RuntimeError, match="sees no convolution"):
        effective_precision(lambda *images: outputs, export, "fp16")


class Casts(TorchDispatchMode):
    """Counts the parameters that are cast to another type."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and isinstance(
            args[0], nn.Parameter
        )
        return function(*args, **(kwargs or {}))


def casts_of(call: Callable, *images: Tensor) -> int:
    with Casts() as casts:
        call(*images)
    return casts.count


def test_a_worker_casts_weights_once():
    """Each call would cast them anew, in a context of its own."""
    export = small_export("testRetinaNet")
    optimized = base.load("torch").optimize(export, "bf16", "cpu")
    assert casts_of(optimized.call, *export.inputs) > 50
    assert casts_of(optimized.call, *export.inputs) > 50
    with optimized.context():
        assert casts_of(optimized.call, *export.inputs) > 50
        assert casts_of(optimized.call, *export.inputs) == 0
    assert base.load("torch").optimize(export, "fp32", "cpu").context is None


def layouts(name: str, backend: str, precision: str, device: str = "cpu") -> Counter:
    """Layout -> how many convolutions of a call give it, as far as their shapes tell."""
    export = on_device(small_export(name), MODELS[name], device)
    optimized = base.load(backend).optimize(export, precision, device)
    found: Counter = Counter()

    def look(module: nn.Module, inputs: Tuple[Tensor, ...], output: Tensor) -> None:
        rows, channels, *size = output.shape
        if rows and channels > 1 and max(size) > 1:
            last = output.is_contiguous(memory_format=torch.channels_last)
            found["channels_last" if last else "contiguous"] += 1

    for module in export.eager.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(look)
    optimized.call(*export.inputs)
    return found


@pytest.mark.parametrize(
    ("name", "precision", "device"),
    [
        ("testRetinaNet", "fp32", "cpu"),
        pytest.param("testRetinaNet", "bf16", "cpu", marks=needs_bf16),
        ("testMaskRCNNFPN", "fp32", "cpu"),
        pytest.param("testMaskRCNNC4", "fp32", "cpu", marks=pytest.mark.slow),
        pytest.param("testMaskRCNNFPN", "fp32", "cuda", marks=needs_cuda),
        pytest.param("testMaskRCNNC4", "fp16", "cuda", marks=needs_cuda),
    ],
)
def test_convolutions_run_channels_last(name, precision, device):
    """Of a model whose images are 3 x H x W, all of them: with masks, also those of regions."""
    found = layouts(name, "torch_channels_last", precision, device)
    assert found["channels_last"] > 50
    assert found["contiguous"] == 0


@pytest.mark.parametrize("form", ["traced", "exported"])
def test_a_file_with_weights_runs_channels_last(form):
    image = torch.rand(1, 3, 8, 8)
    module = nn.Conv2d(3, 4, 3).eval()
    if form == "traced":
        file = torch.jit.trace(module, image)
    else:
        file = torch.export.export(module, (image,)).module()
    export = SimpleNamespace(eager=file, own_runner=None)
    found = base.load("torch_channels_last").optimize(export, "fp32", "cpu").call(image)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found, module(image), atol=1e-5)


def test_the_baseline_does_not_run_channels_last():
    """The test above can fail."""
    found = layouts("testRetinaNet", "torch", "fp32")
    assert found["contiguous"] > 50
    assert found["channels_last"] == 0


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_the_layers_of_openvino_run_in_that_precision(precision):
    coverage = engine("openvino", precision).coverage
    layers = {name.lower(): count for name, count in coverage.heavy_layers.items()}
    assert layers.get({"fp32": "f32", "bf16": "bf16"}[precision], 0) > 0.9 * sum(layers.values())
    # 53 convolutions of the backbone at least.
    assert sum(layers.values()) > 53
    assert coverage.operators_in_engine == coverage.operators > sum(layers.values())


@needs_openvino
@needs_bf16
def test_openvino_does_not_round_the_regions_it_pools():
    module = small_export("testMaskRCNNFPN")
    ov = sys.modules[type(base.load("openvino")).__module__]
    compiled = ov.compile_model(ov.convert(module.script_module(), module), "bf16", threads=2)
    sources = [
        op.input_value(1).get_node()
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info() and op.get_rt_info()["layerType"].astype(str) == "ROIAlign"
    ]
    assert len(sources) == 8
    for node in sources:
        assert node.get_rt_info()["runtimePrecision"].astype(str) == "f32", node


@needs_onnxruntime
def test_onnxruntime_says_which_provider_got_how_many_nodes():
    optimized = engine("onnxruntime", "fp32")
    assert (optimized.label, optimized.provider) == ("ONNXRuntime", "CPUExecutionProvider")
    coverage = optimized.coverage
    assert coverage.operators > 200
    assert coverage.operators_by_provider == {"CPUExecutionProvider": coverage.operators}
    assert phases(optimized) == {"export", "convert", "compile"}


@needs_onnxruntime
def test_the_module_is_left_as_it_was_by_onnx():
    """The exporter wrote into its graph, and OpenVINO could not convert it any more."""
    from backends import onnxruntime

    export = small_export("testMaskRCNNFPN_pproc")
    module = export.script_module()
    before = str(module.inlined_graph)
    onnxruntime.convert(module, export)
    assert str(module.inlined_graph) == before


@pytest.mark.slow
@needs_onnxruntime
def test_masks_of_onnxruntime_are_bool():
    export = small_export("testMaskRCNNFPN_pproc")
    call = made("testMaskRCNNFPN_pproc", "onnxruntime", "fp32").call
    found = call(*export.inputs)
    assert found[export.fields.index("pred_masks")].dtype == torch.bool
    assert_all_found(compare("testMaskRCNNFPN_pproc", call, "fp32"))


@pytest.mark.slow
def test_inductor_counts_graphs():
    optimized = engine("inductor", "fp32")
    assert optimized.coverage.operators_in_engine > 200
    assert optimized.coverage.segments >= optimized.coverage.graph_breaks > 0


def test_a_folder_without_permission_to_execute_is_named(monkeypatch, tmp_path):
    """With what there is to do about it: the variable that PyTorch names is the suite's."""
    module = sys.modules[type(base.load("inductor")).__module__]

    def refuse(*_: object) -> None:
        try:
            raise ImportError(f"{tmp_path}/a.so: failed to map segment from shared object")
        except ImportError as error:
            raise OSError("set another directory with TORCHINDUCTOR_CACHE_DIR") from error

    monkeypatch.setattr(module, "_compile", refuse)
    with pytest.raises(OSError, match="mounted noexec: TMPDIR, or --cache") as caught:
        base.load("inductor").optimize(tiny_export(), "fp32", "cpu", tmp_path)
    assert str(tmp_path) in first_cause(caught.value)
    assert "TORCHINDUCTOR" not in first_cause(caught.value)


def test_inductor_says_when_it_compiled_again():
    export = tiny_export()
    optimized = base.load("inductor").optimize(export, "fp32", "cpu")
    optimized.call(*images_of((290, 388)))
    # Counting FLOPs compiles, too, and is not taken for it.
    for _ in range(2):
        assert optimized.read_coverage().recompilations_while_timed == 0
    optimized.call(*(image.double() for image in export.inputs))
    assert optimized.read_coverage().recompilations_while_timed > 0


@needs_openvino
def test_openvino_says_what_its_plugin_does_not_have():
    """An image of no type."""
    import openvino
    from openvino import opset13 as ops

    from backends.openvino import compile_model

    image = ops.parameter([3, 8, 8], openvino.Type.dynamic)
    model = openvino.Model([ops.convert(image, "f32")], [image], "cast")
    with pytest.raises(Unsupported, match=r"^OpenVINO cannot compile the model: .*Convert"):
        compile_model(model, "fp32", 1)


@needs_openvino
def test_openvino_quantizes_the_heavy_layers_and_finds_the_objects():
    pytest.importorskip("nncf")
    optimized = engine("openvino", "int8")
    layers = optimized.coverage.heavy_layers
    assert layers.get("i8", 0) + layers.get("u8", 0) > 0.9 * sum(layers.values())
    agreements = compare("testRetinaNet", optimized.call, "int8")
    assert_all_found(agreements)
    assert all(x.matched >= 0.9 * x.expected for x in agreements.values())
    # Nor is it fp32 under another name.
    assert all(agreement.score_drift > 0.01 for agreement in agreements.values())


@pytest.mark.slow
@needs_openvino
def test_openvino_quantizes_a_model_with_a_loop():
    """Masks are pasted in one. Those of synthetic weights are near the threshold all over."""
    pytest.importorskip("nncf")
    optimized = made("testMaskRCNNFPN_pproc", "openvino", "int8")
    layers = optimized.coverage.heavy_layers
    assert layers.get("i8", 0) + layers.get("u8", 0) > 0.9 * sum(layers.values())
    agreements = compare("testMaskRCNNFPN_pproc", optimized.call, "int8")
    assert all(x.matched >= 0.9 * x.expected > 20 for x in agreements.values())


@needs_openvino
@pytest.mark.parametrize(
    ("name", "exact"),
    [("testRetinaNet", ("NonMaxSuppression", "TopK")), ("testMaskRCNNFPN", ("NonMaxSuppression",))],
)
def test_what_handles_boxes_is_not_quantized(name, exact):
    """NNCF gave the boxes of RetinaNet the range 0 to 0, and with it nothing was left."""
    from backends import openvino

    export = small_export(name)
    model = openvino.convert(export.script_module(), export)
    names = set(openvino._exact_operators(model))
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    assert set(exact) <= {kinds[name] for name in names}
    assert not names & {name for name, kind in kinds.items() if kind in openvino.HEAVY_OPERATORS}
    # Anchors are decoded with exponentials, and nothing else is.
    assert {name for name, kind in kinds.items() if kind == "Exp"} <= names


@needs_openvino
def test_a_quantized_model_has_exact_boxes():
    pytest.importorskip("nncf")
    from backends import openvino

    export = small_export("testRetinaNet")
    model = openvino.convert(export.script_module(), export)
    exact = set(openvino._exact_operators(model))
    quantized = {
        port.get_node().get_friendly_name()
        for op in openvino.quantize(model, export).get_ops()
        if op.get_type_name() == "FakeQuantize"
        for port in op.output(0).get_target_inputs()
        if port.get_node().get_type_name() != "ShapeOf"  # A shape is what it was.
    }
    assert len(quantized) > 100
    assert not quantized & exact


def test_torchscript_counts_operators_and_seconds():
    optimized = engine("torchscript", "fp32")
    assert optimized.coverage.operators > 200
    assert phases(optimized) == {"export", "compile"}


@needs_openvino
def test_openvino_threads_follow_torch():
    torch.set_num_threads(2)
    try:
        optimized = base.load("openvino").optimize(tiny_export(), "fp32", "cpu")
    finally:
        torch.set_num_threads(1)
    assert optimized.threads == 2


# The cache -------------------------------------------------------------------------------------


def test_a_cache_has_a_directory_for_what_matters(tmp_path):
    export, other = small_export("testRetinaNet"), small_export("testRetinaNet_scripted")
    openvino, torchscript = base.load("openvino"), base.load("torchscript")

    def folder(backend: Backend = openvino, of: Export = export, precision: str = "fp32") -> Path:
        return base.cache_folder(tmp_path, backend, of, precision, "cpu")

    assert folder() == folder()
    folders = {folder(), folder(torchscript), folder(of=other), folder(precision="bf16")}
    smaller = copy.copy(export)
    smaller.tuning_inputs = {**export.tuning_inputs, "min": images_of((40, 50))}
    folders.add(folder(of=smaller))
    changed = copy.copy(export)
    changed.eager = copy.deepcopy(export.eager)
    next(changed.eager.parameters()).data.view(-1)[0] += 1
    folders.add(folder(of=changed))
    other_anchors = copy.copy(export)
    configuration = from_settings({"MODEL.ANCHOR_GENERATOR.SIZES": ((16.0,),)})
    other_anchors.model = replace(export.model, configuration=configuration)
    folders.add(folder(of=other_anchors))
    torch.set_num_threads(2)
    try:
        folders.add(folder())
    finally:
        torch.set_num_threads(1)
    assert len(folders) == 8
    assert all(path.is_dir() for path in folders)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "openvino").write_text("a file")
    with pytest.raises(InputError, match=r"^cache .* cannot be written: "):
        base.cache_folder(
            tmp_path, base.load("openvino"), small_export("testRetinaNet"), "fp32", "cpu"
        )


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_openvino_takes_the_model_from_the_cache(tmp_path, precision):
    export, backend = small_export("testRetinaNet"), base.load("openvino")
    built = backend.optimize(export, precision, "cpu", tmp_path)
    assert not built.cached
    assert not engine("openvino", precision).cached
    kept = backend.optimize(export, precision, "cpu", tmp_path)
    assert kept.cached
    assert kept.coverage == built.coverage
    assert_all_found(compare("testRetinaNet", kept.call, precision))


@pytest.mark.slow
def test_inductor_takes_its_code_from_the_cache(tmp_path):
    """In processes of their own, as the suite does it: what is compiled stays in a process."""
    first, second = (run_inductor(tmp_path) for _ in range(2))
    assert first == (False, True)
    assert second == (True, True)


def run_inductor(cache: Path) -> Tuple[bool, bool]:
    """Whether a process that compiles a small model took it from the cache, and used that."""
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from backends import base\n"
        "torch.set_num_threads(1)\n"
        "images = {k: (torch.zeros(3, n, n),) for k, n in dict(min=32, opt=40, max=64).items()}\n"
        "export = SimpleNamespace(name='net', eager=lambda x: (x.exp() + x.sum(0),),"
        " tuning_inputs=images, inputs=images['opt'], other_inputs=())\n"
        "export.python_module = lambda: export.eager\n"
        "done = base.load('inductor').optimize(export, 'fp32', 'cpu', Path(sys.argv[1]))\n"
        "print(done.cached, done.read_artifact_bytes() > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(cache)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cached, has_files = done.stdout.split()[-2:]
    return cached == "True", has_files == "True"


# What they cost --------------------------------------------------------------------------------


def test_flops_are_those_of_the_layers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))
    # Two for each multiply-add; 8 x 6 x 6 outputs of 3 x 3 x 3 inputs, and 5 of 288.
    assert count_flops(net, (torch.zeros(1, 3, 8, 8),)) == 2 * (8 * 6 * 6 * 27 + 5 * 288)


def test_inductor_knows_the_share_of_flops_in_its_graphs():
    """What is not to be compiled counts as outside."""
    inside, outside = nn.Linear(64, 32), nn.Linear(32, 64)
    eager = torch.compiler.disable(outside.forward)

    def forward(x: Tensor) -> Tuple[Tensor, ...]:
        return (eager(inside(x)) + inside(x).sum(),)

    export = SimpleNamespace(eager=forward, inputs=(torch.zeros(4, 64),))
    share = sys.modules["backends.inductor"]._share_of_flops(export, "fp32", "cpu")
    assert share == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize(
    "backend",
    [
        "torchscript",
        pytest.param("inductor", marks=pytest.mark.slow),
        "openvino",
        "onnxruntime",
    ],
)
def test_artifacts_have_a_size(backend):
    if base.load(backend).unavailable("cpu"):
        pytest.skip(f"{backend} is not installed")
    optimized = engine(backend, "fp32")
    size = optimized.read_artifact_bytes()
    # 38 million parameters of 4 bytes; TorchInductor keeps code alone.
    assert size > (100_000 if backend == "inductor" else 140_000_000)


@pytest.mark.parametrize(
    "backend",
    [pytest.param("inductor", marks=pytest.mark.slow), "openvino", "onnxruntime"],
)
def test_all_flops_of_retinanet_are_in_engines(backend):
    if base.load(backend).unavailable("cpu"):
        pytest.skip(f"{backend} is not installed")
    optimized = engine(backend, "fp32")
    coverage = optimized.coverage.merged((optimized.read_coverage or Coverage)())
    assert coverage.share_of_flops == 1.0


# What they refuse ------------------------------------------------------------------------------


class Unknown(torch.nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.eigvals(image[:, :3, :3])


@pytest.mark.filterwarnings("ignore")
@needs_openvino
def test_openvino_says_why_it_cannot_take_a_module(monkeypatch):
    export = small_export("testRetinaNet_scripted")
    unknown = torch.jit.script(Unknown().eval())
    monkeypatch.setattr(type(export), "graph_module", lambda self: unknown)
    with pytest.raises(Unsupported) as error:
        base.load("openvino").optimize(export, "fp32", "cpu")
    reason = str(error.value)
    assert reason.startswith("OpenVINO cannot convert the module: ")
    assert "\n" not in reason
    assert len(reason) < 300


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("size", ["min", "max"])
def test_images_out_of_range_are_refused(side, size):
    export = small_export("testRetinaNet")
    shape = list(export.tuning_inputs[size][0].shape)
    check_sizes([torch.zeros(shape)], export, "the engine")
    shape[1 + side] += -1 if size == "min" else 1
    with pytest.raises(InputError) as error:
        check_sizes([torch.zeros(shape)], export, "the engine")
    bounds = [" x ".join(map(str, export.tuning_inputs[x][0].shape)) for x in ("min", "max")]
    assert str(error.value).startswith(
        f"image 1 is {' x '.join(map(str, shape))}, and the engine was built for testRetinaNet "
        f"with {bounds[0]} to {bounds[1]}"
    )


def test_another_number_of_images_is_refused():
    export = small_export("testRetinaNet")
    with pytest.raises(InputError, match=r"takes 1 image\(s\) a call, not 2"):
        check_sizes(export.inputs * 2, export, "the engine")


@needs_openvino
def test_openvino_refuses_images_out_of_range():
    call = engine("openvino", "fp32").call
    with pytest.raises(InputError, match="OpenVINO's model was built for testRetinaNet with 3 x "):
        call(torch.zeros(3, 32, 32))


# Padding ---------------------------------------------------------------------------------------


class Padding(nn.Module):
    """What every detector does first, alone, for one image or two."""

    def forward(self, *images: Tensor) -> Tuple[Tensor, Tensor]:
        mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        return batch_images(list(images), mean, std, 32), image_size(images[0])


def images_of(*sizes: Sequence[int]) -> Tuple[Tensor, ...]:
    return tuple(torch.rand(3, *size) for size in sizes)


def tiny_export(images: int = 1) -> Export:
    tuning = {
        name: images_of(*[size] * images)
        for name, size in (("min", (288, 384)), ("opt", (300, 400)), ("max", (480, 640)))
    }
    model = MODELS["testMaskRCNNFPN_b2" if images == 2 else "testRetinaNet"]
    return Export(model, zoo_configuration(model.config), Padding().eval(), tuning)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("backend", ["torchscript", pytest.param("openvino", marks=needs_openvino)])
def test_engines_pad_as_eager_does(backend, images):
    export = tiny_export(images)
    call = base.load(backend).optimize(export, "fp32", "cpu").call
    for size, padded in PADDED.items():
        inputs = images_of(*[size] * images)
        with torch.no_grad():
            expected = export.eager(*inputs)
        assert expected[0].shape == (images, 3, *padded)
        found = call(*inputs)
        assert found[0].shape == expected[0].shape
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert found[1].tolist() == list(size)


@pytest.mark.parametrize("backend", ["torchscript", pytest.param("openvino", marks=needs_openvino)])
def test_two_images_of_different_sizes_are_padded_to_the_larger_of_each_side(backend):
    export = tiny_export(2)
    call = base.load(backend).optimize(export, "fp32", "cpu").call
    inputs = images_of((290, 611), (427, 390))
    with torch.no_grad():
        expected = export.eager(*inputs)[0]
    assert expected.shape == (2, 3, 448, 640)
    assert torch.allclose(call(*inputs)[0], expected, atol=1e-6)


def eager_padded_size(export: Export, detector: nn.Module, image: Tensor) -> Tuple[int, ...]:
    seen: List[Tuple[int, ...]] = []
    hook = detector.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:]))
    )
    with torch.no_grad():
        export.eager(image)
    hook.remove()
    return seen[0]


def openvino_padded_sizes(export: Export, images: Sequence[Tensor]) -> List[Tuple[int, ...]]:
    """The size of what the first convolution of the whole compiled model really gets."""
    from backends.openvino import compile_model, convert

    model = convert(export.script_module(), export)
    first = next(x for x in model.get_ordered_ops() if x.get_type_name() == "Convolution")
    model.add_outputs(first.input_value(0))
    compiled = compile_model(model, "fp32", 1)
    last = len(compiled.outputs) - 1
    return [tuple(compiled([image.numpy()])[last].shape[-2:]) for image in images]


@needs_openvino
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "source", ["bundled", pytest.param("detectron2", marks=pytest.mark.detectron2)]
)
def test_the_whole_model_is_padded_as_eager_is(source):
    """OpenVINO 2026.4 pads Detectron2's own arithmetic by one stride too many."""
    if source == "detectron2":
        pytest.importorskip("detectron2.model_zoo")
    small = small_export("testRetinaNet", source)
    detector = small._detector if source == "detectron2" else small.eager.detector
    tuning = {"min": images_of((288, 384)), "opt": images_of((288, 384))}
    model = MODELS["testRetinaNet"]
    tuning["max"] = images_of((480, 640))
    export = Export(model, zoo_configuration(model.config), small.eager, tuning)
    if source == "detectron2":
        export._script_module = small.script_module()
    images = [images_of(size)[0] for size in PADDED]
    assert [eager_padded_size(export, detector, image) for image in images] == list(PADDED.values())
    assert openvino_padded_sizes(export, images) == list(PADDED.values())


@needs_onnxruntime
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolutions_in_onnx(modulated, groups):
    name = "deformable"
    settings = {
        **zoo_settings(parts.PARTS[name][0]),
        **parts.settings_of(name),
        "MODEL.RESNETS.DEFORM_MODULATED": modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": groups,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    configuration = from_settings(settings)
    state = parts.weights_of(build_detector(configuration, False).state_dict())
    sizes = {"min": (70, 90), "opt": (100, 125), "max": (130, 150)}
    calls = {size: (seeded_image(1, *sides),) for size, sides in sizes.items()}
    export = build(Model("own", name, configuration=configuration), state, "the weights", calls)
    call = base.load("onnxruntime").optimize(export, "fp32", "cpu").call
    for images in calls.values():
        with torch.no_grad():
            wanted = export.eager(*images)
        for one, other in zip(wanted, call(*images)):
            assert len(one) > 1
            assert torch.allclose(one.float(), other.float(), atol=1e-3)


# Engines broken on purpose ---------------------------------------------------------------------

Call = Callable[..., Tuple[Tensor, ...]]


def blind(call: Call) -> Call:
    """An engine whose scores are so low that hardly anything passes the threshold."""

    def broken(*images: Tensor) -> Tuple[Tensor, ...]:
        boxes, classes, scores, size = call(*images)
        seen = scores > 0.94
        return boxes[seen], classes[seen], scores[seen], size

    return broken


def channels_swapped(call: Call) -> Call:
    return lambda *images: call(*(image.flip(0).contiguous() for image in images))


def shifted(call: Call) -> Call:
    return lambda *images: call(*(torch.roll(image, (8, 8), (1, 2)) for image in images))


def one_class_off(call: Call) -> Call:
    def broken(*images: Tensor) -> Tuple[Tensor, ...]:
        boxes, classes, scores, size = call(*images)
        return boxes, (classes + 1) % 80, scores, size

    return broken


@pytest.mark.parametrize("fault", [blind, channels_swapped, shifted, one_class_off])
@pytest.mark.parametrize(("backend", "precision"), ENGINES)
def test_a_broken_engine_is_caught(backend, precision, fault):
    healthy = engine(backend, precision).call
    for size, agreement in compare("testRetinaNet", fault(healthy), precision).items():
        assert agreement.verdict == "mismatch", (size, agreement)
        assert agreement.reason


def crowded_export() -> Export:
    """A RetinaNet in which anchors of other scales find the same objects again, less surely.

    With synthetic weights as they are, there is nothing to suppress.
    """
    small = small_export("testRetinaNet")
    state = {name: value.clone() for name, value in small.eager.detector.state_dict().items()}
    weights = state["head.cls_score.weight"].view(3, 3, 80, 256, 3, 3)  # by scale, shape, class
    biases = state["head.cls_score.bias"].view(3, 3, 80)
    used = weights.flatten(3).abs().sum(dim=-1) > 0
    for scale, other in itertools.permutations(range(3), 2):
        again = used[scale] & ~used[other]
        weights[other][again] = weights[scale][again]
        biases[other][again] = biases[scale][again] - 0.5
    return build(MODELS["testRetinaNet"], state, "crowded", small.tuning_inputs)


@pytest.mark.parametrize("backend", ["torch", "torchscript"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_an_engine_without_non_maximum_suppression_is_caught(monkeypatch, backend, precision):
    def keep_all(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
        return scores.argsort(descending=True)

    export = crowded_export()
    with torch.no_grad():
        expected = {size: export.eager(*x) for size, x in export.tuning_inputs.items()}
    monkeypatch.setattr(detectors.boxes, "batched_nms", keep_all)
    call: Any = base.load(backend).optimize(export, precision, "cpu").call
    for size, images in export.tuning_inputs.items():
        found = agreement_of(expected[size], call(*images), export, precision)
        assert found.verdict == "mismatch", (size, found)
