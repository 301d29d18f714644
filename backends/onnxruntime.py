"""ONNX Runtime: the traced module as an ONNX graph, on TensorRT, on CUDA or on a CPU.

Written against ONNX Runtime 1.30 to 1.32. The CPU's execution provider was run; those of CUDA and
TensorRT wait for a GPU.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

from backends.base import (
    Backend,
    Optimized,
    Phases,
    allows_tf32,
    check_sizes,
    folder_bytes,
    module_name,
)
from errors import Unsupported, first_cause
from results.environment import cpu_flags
from results.record import AccuracyControl, Coverage

if TYPE_CHECKING:
    from detectors.export import Export

# Of the graph, in the folder that it is saved to.
FILE = "model.onnx"
OPSET = 18
# The first that has deformable convolutions.
OPSET_OF_DEFORM_CONV = 19
TENSORRT, CUDA, CPU = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU"))
# Operators that do floating-point operations to speak of, fused ones included.
HEAVY = re.compile(r"(Conv|ConvTranspose|Gemm|MatMul|Integer|IntegerToFloat)$")
# Those of them that have kernels of int8 on a CPU.
QUANTIZED = ("Conv", "Gemm", "MatMul")
# As the optimized graph names those that run in int8.
INT8 = re.compile(r"QLinear|QGemm|Integer")
LABELS = {TENSORRT: "ONNXRuntime-TensorRT", CUDA: "ONNXRuntime-CUDA", CPU: "ONNXRuntime"}


class ONNXRuntime(Backend):
    """`torch.onnx.export` of the traced module and an inference session of one execution provider.

    On CUDA that is TensorRT with CUDA and the CPU behind it, where TensorRT can be loaded.
    """

    name = "onnxruntime"
    label = "ONNXRuntime"
    rank = 6
    devices = ("cpu", "cuda")
    precisions = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")}
    default = False

    def unavailable(self, device: str) -> Optional[str]:
        try:
            import onnx  # noqa: F401
            import onnxruntime
        except ImportError as error:
            return f"ONNX Runtime is not usable here ({error}): pip install onnx onnxruntime"
        if device == "cpu":
            return None
        import torch

        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device here"
        if CUDA not in onnxruntime.get_available_providers():
            return "this ONNX Runtime is built without CUDA: pip install onnxruntime-gpu"
        return None

    def versions(self) -> Dict[str, str]:
        import onnx
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        if export.onnx_file is not None:
            raise Unsupported("ONNX Runtime is the baseline of an ONNX file")
        start = time.perf_counter()
        module = export.graph_module()
        exported = time.perf_counter()
        graph = convert(module, export)
        control = None
        if precision == "int8" and export.validation is not None:
            graph, control = quantize_under_control(graph, export)
        elif precision == "int8":
            graph = quantize(graph, export)
        converted = time.perf_counter()
        # TensorRT's engines are kept in any case: that is how their size is known.
        kept = cache or Path(tempfile.mkdtemp(prefix="tensorrt_"))
        before = _engines(kept)
        made = self._optimized(graph, export, precision, device, kept)
        is_cached = made.provider == TENSORRT and bool(before) and _engines(kept) == before
        phases = {"export": exported - start, "convert": converted - exported}
        seconds = replace(made.seconds, **phases)
        return replace(made, seconds=seconds, control=control, cached=is_cached)

    def load(self, export: Export, precision: str, device: str, folder: Path) -> Optimized:
        return self._optimized((folder / FILE).read_bytes(), export, precision, device, folder)

    def _optimized(
        self, graph: bytes, export: Export, precision: str, device: str, kept: Path
    ) -> Optimized:
        """A session of a serialized model.

        Args:
            kept: folder for TensorRT's engines.

        Raises:
            errors.Unsupported: ONNX Runtime cannot take it.
        """
        import torch

        start, threads = time.perf_counter(), torch.get_num_threads()
        layers, is_int8 = None, precision == "int8"
        if is_int8:
            session, layers = quantized_session(graph, threads)
        else:
            session = create_session(graph, _providers(export, precision, device, kept), threads)
        provider = session.get_providers()[0]
        if device == "cuda" and provider == CPU:
            raise Unsupported("ONNX Runtime could load neither TensorRT nor CUDA")
        call = caller(session, export)
        call(*export.inputs)  # TensorRT builds its engines when it first sees the sizes.

        def save(folder: Path) -> None:
            (folder / FILE).write_bytes(graph)
            for engine in kept.iterdir() if provider == TENSORRT else ():
                shutil.copy(str(engine), str(folder / engine.name))

        return Optimized(
            call=call,
            # But for int8 the graph is fp32: only TensorRT has a switch for less.
            precision=precision if provider == TENSORRT or is_int8 else "fp32",
            label=LABELS[provider],
            provider=provider,
            threads=threads if provider == CPU else None,
            coverage=replace(_coverage(session, provider), heavy_layers=layers),
            seconds=Phases(compile=time.perf_counter() - start),
            read_artifact_bytes=lambda: (
                folder_bytes(kept, "*.engine") if provider == TENSORRT else len(graph)
            ),
            save=save,
        )


def convert(module: Any, export: Export) -> bytes:
    """The exported module as a serialized ONNX model for images of any size.

    With the exporter for TorchScript: that for `torch.export` cannot take these models, as what
    they compute depends on how many objects there are.

    Raises:
        errors.Unsupported: it has something that the exporter does not know.
    """
    import torch

    from detectors.lowering import copied

    names = _input_names(export)
    file = io.BytesIO()
    parse, register = torch.onnx.symbolic_helper.parse_args, torch.onnx.register_custom_op_symbolic
    parsed = parse("v", "i", "v", "v", "f", "i")(_group_norm)
    register("aten::group_norm", parsed, OPSET)
    deform = "torchvision::deform_conv2d"
    register(deform, parse(*"vvvvviiiiiiiib")(_deform_conv), OPSET_OF_DEFORM_CONV)
    opset = OPSET_OF_DEFORM_CONV if deform in str(module.inlined_graph) else OPSET
    try:
        torch.onnx.export(
            # It rewrites functions in the graph that it is given, which OpenVINO then refused.
            copied(module),
            export.inputs,
            file,
            input_names=names,
            dynamic_axes={name: {1: f"{name}_height", 2: f"{name}_width"} for name in names},
            opset_version=opset,
            dynamo=False,
        )
    except Exception as error:
        raise Unsupported(
            f"PyTorch cannot export the module to ONNX: {first_cause(error)}"
        ) from error
    return _with_any_sizes(file.getvalue())


def _with_any_sizes(graph: bytes) -> bytes:
    """The same without the names that the exporter gives to the sizes of what comes out.

    Feature maps of all strides have the same there, and ONNX Runtime takes it at its word.
    """
    import onnx

    model = onnx.load_from_string(graph)
    for output in model.graph.output:
        for size in output.type.tensor_type.shape.dim:
            if size.dim_param:
                size.Clear()
    return bytes(model.SerializeToString())


def quantize(graph: bytes, export: Export, **changes: Any) -> bytes:
    """Static quantization by ONNX Runtime's own tool, of a serialized model.

    Convolutions and matrix products with learned weights are quantized, and the activations that
    follow them: weights by channel to int8, what goes in and comes out to uint8, with the extremes
    over all calls as ranges. All else is as it was: additions in 8 bits cost a trained Mask R-CNN 3
    points of AP, boxes could not have less. Ranges from histograms (entropy, percentiles) are no
    better on RetinaNet, and the tool cannot make them where the number of objects varies
    (tools/compare_quantization.py).

    Args:
        changes: arguments of `quantize_static` in place of ours, for comparing them.

    Raises:
        errors.Unsupported: it cannot be quantized.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        simple = _simplified(graph, folder)
        return _quantized(simple, _to_quantize(onnx.load(simple)), export, **changes)


def quantize_under_control(graph: bytes, export: Export) -> Tuple[bytes, AccuracyControl]:
    """The same, with the layers in fp32 that cost more AP than the export's validation allows.

    Returns:
        the model, and what of it stays in fp32.

    Raises:
        errors.Unsupported: it cannot be quantized.
    """
    import onnx
    import torch

    validation = export.validation
    assert validation is not None
    with tempfile.TemporaryDirectory() as folder:
        simple = _simplified(graph, folder)
        model = onnx.load(simple)
        nodes = _to_quantize(model)
        groups = _neighbours(model, nodes)
        heavy = {x.name: module_name(x.name) for x in model.graph.node if x.op_type in QUANTIZED}
        ranges = str(Path(folder) / "ranges.json")  # So that it is calibrated once.

        def excluded(kept: Sequence[str]) -> List[str]:
            return list(dict.fromkeys(node for name in kept for node in groups[name]))

        def without(kept: Sequence[str]) -> bytes:
            changes = {"nodes_to_exclude": excluded(kept), "calibration_cache_path": ranges}
            return _quantized(simple, nodes, export, **changes)

        def quantized(kept: Sequence[str]) -> Callable[..., Tuple[Any, ...]]:
            return caller(create_session(without(kept), [CPU], torch.get_num_threads()), export)

        # A group is two layers or more, and most of them have to stay in int8.
        control = validation.layers_to_keep(list(groups), quantized, len(groups) // 4)
        names = dict.fromkeys(heavy[x] for x in excluded(control.kept) if x in heavy)
        layers = len({heavy[x] for x in nodes if x in heavy})
        return without(control.kept), replace(control, kept=tuple(names), layers=layers)


def _simplified(graph: bytes, folder: str) -> str:
    """A file in a folder with the model in which norms are part of the convolutions.

    Raises:
        errors.Unsupported: ONNX Runtime cannot take the model.
    """
    simple = str(Path(folder) / "simple")
    create_session(graph, [CPU], 1, simple, basic=True)
    return simple


def _quantized(simple: str, nodes: Sequence[str], export: Export, **changes: Any) -> bytes:
    """See `quantize`.

    Args:
        simple: file of the model.
        nodes: of it that are quantized, see `_to_quantize`.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = _input_names(export)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out the calls one by one."""

        def __init__(self) -> None:
            self.calls = iter(export.calibration_calls())

        def get_next(self) -> Optional[Dict[str, Any]]:
            images = next(self.calls, None)
            return images and {name: x.numpy() for name, x in zip(names, images)}

    try:
        with tempfile.TemporaryDirectory() as folder:
            quantized = str(Path(folder) / "quantized")
            ours = {
                "op_types_to_quantize": [*QUANTIZED, "Relu"],
                "nodes_to_quantize": list(nodes),
                "per_channel": True,
                "reduce_range": _saturates(),
                "activation_type": QuantType.QUInt8,
                "weight_type": QuantType.QInt8,
            }
            quantize_static(simple, quantized, Reader(), **{**ours, **changes})
            model = onnx.load(quantized)
    except Exception as error:
        raise Unsupported(
            f"ONNX Runtime cannot quantize the model: {first_cause(error)}"
        ) from error
    # By the shapes that the tool has added, ONNX Runtime 1.32 makes constants of those of reshapes
    # that then fail where nothing is found.
    del model.graph.value_info[:]
    return model.SerializeToString()


def _to_quantize(model: Any) -> List[str]:
    """Names of the nodes that are quantized; the tool takes activations only after the others."""
    learned = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Relu" or (node.op_type in QUANTIZED and node.input[1] in learned)
    ]


def _neighbours(model: Any, nodes: Sequence[str]) -> Dict[str, List[str]]:
    """Modules that are in fp32 together -> the nodes of which that takes.

    They share what they take. That stays exact only where what gives it is not quantized either: it
    would be rounded on the way out.

    Args:
        nodes: that are quantized otherwise, see `_to_quantize`.
    """
    wanted = set(nodes)
    makers = {name: node for node in model.graph.node for name in node.output}
    takers: Dict[str, List[Any]] = {}
    for node in model.graph.node:
        if node.name in wanted:
            takers.setdefault(node.input[0], []).append(node)
    groups: Dict[str, List[str]] = {}
    for name, together in takers.items():
        heavy = [node for node in together if node.op_type in QUANTIZED]
        if not heavy:
            continue
        maker = makers.get(name)
        while maker is not None and maker.name in wanted:
            together = [*together, maker]
            maker = makers.get(maker.input[0]) if maker.op_type == "Relu" else None
        key = ", ".join(dict.fromkeys(module_name(node.name) for node in heavy))
        groups.setdefault(key, []).extend(node.name for node in together)
    return groups


def _saturates() -> bool:
    """Whether this CPU adds products of 8 bits in 16, where they may be cut off.

    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    flags = cpu_flags()
    return "avx2" in flags and not {"avx_vnni", "avx512_vnni"} & set(flags)


def _deform_conv(
    graph: Any,
    x: Any,
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_y: int,
    stride_x: int,
    top: int,
    left: int,
    dilation_y: int,
    dilation_x: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    """torchvision's deformable convolution, of which PyTorch's exporter does not know."""
    return graph.op(
        "DeformConv",
        *(x, weight, offset, bias),
        *((mask,) if use_mask else ()),
        strides_i=[stride_y, stride_x],
        pads_i=[top, left, top, left],
        dilations_i=[dilation_y, dilation_x],
        group_i=groups,
        offset_group_i=offset_groups,
    )


def _group_norm(
    graph: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float, use_cudnn: int
) -> Any:
    """Group norm of N x C x H x W in ONNX, also where N is 0.

    PyTorch's own reshapes to 0 x groups x -1, and what -1 stands for cannot be told there.
    """
    import torch

    def constant(*values: int) -> Any:
        return graph.op("Constant", value_t=torch.tensor(values))

    of_group = graph.op("ReduceProd", graph.op("Shape", x, start_i=1), keepdims_i=1)
    of_group = graph.op("Div", of_group, constant(groups))
    rows = graph.op("Shape", x, start_i=0, end_i=1)
    grouped = graph.op("Concat", rows, constant(groups), of_group, axis_i=0)
    normed = graph.op(
        "InstanceNormalization",
        graph.op("Reshape", x, grouped, allowzero_i=1),
        graph.op("Constant", value_t=torch.ones(groups)),
        graph.op("Constant", value_t=torch.zeros(groups)),
        epsilon_f=eps,
    )
    normed = graph.op("Reshape", normed, graph.op("Shape", x), allowzero_i=1)
    normed.setType(x.type())
    weight, bias = (graph.op("Reshape", each, constant(-1, 1, 1)) for each in (weight, bias))
    return graph.op("Add", graph.op("Mul", normed, weight), bias)


def _input_names(export: Export) -> List[str]:
    return [f"image_{number}" for number in range(len(export.inputs))]


def _providers(export: Export, precision: str, device: str, kept: Path) -> List[Any]:
    """Execution providers with their options, the preferred one first.

    Args:
        kept: directory for TensorRT's engines.
    """
    if device == "cpu":
        return [CPU]
    import onnxruntime

    _load_tensorrt()
    tensorrt: Dict[str, Any] = {
        "trt_fp16_enable": precision == "fp16",
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(kept),
    }
    for which in ("min", "opt", "max"):
        tensorrt[f"trt_profile_{which}_shapes"] = ",".join(
            f"{name}:{'x'.join(str(side) for side in image.shape)}"
            for name, image in zip(_input_names(export), export.tuning_inputs[which])
        )
    # TensorRT's provider has no such switch, and goes by the variable: see `base.allow_tf32`.
    cuda = {"use_tf32": int(allows_tf32())}
    wanted = [(TENSORRT, tensorrt), (CUDA, cuda), CPU]
    available = onnxruntime.get_available_providers()
    return [x for x in wanted if (x[0] if isinstance(x, tuple) else x) in available]


def _load_tensorrt() -> None:
    """Loads TensorRT's libraries where its Python package has them; the provider finds them then.

    Those of CUDA and cuDNN are loaded with PyTorch.
    """
    # Without TensorRT, or without its libraries, the next provider takes its place.
    with contextlib.suppress(Exception):
        import tensorrt  # noqa: F401


def _engines(folder: Path) -> Dict[str, int]:
    """TensorRT's engines in a directory, with the times at which they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.engine")}


def quantized_session(graph: bytes, threads: int) -> Tuple[Any, Dict[str, int]]:
    """An inference session of a quantized model on a CPU, and precision -> heavy layers in it.

    Raises:
        errors.Unsupported: ONNX Runtime cannot take it, or runs most of it in fp32.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = str(Path(folder) / "optimized")
        session = create_session(graph, [CPU], threads, optimized)
        kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    heavy = ["u8" if INT8.search(x) else "f32" for x in kinds if HEAVY.search(x)]
    layers = {name: heavy.count(name) for name in sorted(set(heavy))}
    quantized = layers.get("u8", 0)
    if 2 * quantized <= len(heavy):
        raise Unsupported(f"ONNX Runtime runs only {quantized} of the heavy layers in int8")
    return session, layers


def create_session(
    graph: bytes,
    providers: Sequence[Any],
    threads: int,
    optimized: Optional[str] = None,
    basic: bool = False,
) -> Any:
    """An inference session of a serialized model.

    Args:
        providers: names, or pairs of a name and options.
        optimized: file that takes the graph as the session runs it.
        basic: whether it is optimized with ONNX's own operators only.

    Raises:
        errors.Unsupported: ONNX Runtime cannot take the model.
    """
    import onnxruntime

    from detectors.exported import session_options

    options = session_options(threads)
    if optimized is not None:
        options.optimized_model_filepath = optimized
    if basic:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=list(providers))
    except Exception as error:
        raise Unsupported(f"ONNX Runtime cannot take the model: {first_cause(error)}") from error


def _coverage(session: Any, provider: str) -> Coverage:
    """Nodes of the optimized graph by provider, those of subgraphs not counted.

    FLOPs are known where one provider has all nodes that have any.
    """
    nodes: Counter = Counter()
    segments: Counter = Counter()
    heavy: Counter = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        own = subgraph.get_nodes()
        nodes[subgraph.ep_name] += len(own)
        segments[subgraph.ep_name] += 1
        heavy[subgraph.ep_name] += sum(1 for node in own if HEAVY.search(node.op_type))
    return Coverage(
        operators=sum(nodes.values()),
        operators_in_engine=nodes[provider],
        # A provider that does not compile takes nodes one by one.
        segments=segments[provider] if provider == TENSORRT else 1,
        share_of_flops=1.0 if 0 < heavy[provider] == sum(heavy.values()) else None,
        operators_by_provider=dict(nodes),
    )


def caller(session: Any, export: Export) -> Callable[..., Tuple[Any, ...]]:
    """A function of images that runs the session where they are, without copies."""
    import numpy as np
    import torch

    names = _input_names(export)
    outputs = session.get_outputs()

    def call(*images: Any) -> Tuple[Any, ...]:
        check_sizes(images, export, "ONNX Runtime's session")
        images = tuple(image.contiguous() for image in images)
        device, number = images[0].device.type, images[0].device.index or 0
        binding = session.io_binding()
        for name, image in zip(names, images):
            shape, address = tuple(image.shape), image.data_ptr()
            binding.bind_input(name, device, number, np.float32, shape, address)
        for output in outputs:
            binding.bind_output(output.name, device, number)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # The session has a stream of its own.
        session.run_with_iobinding(binding)
        found = [torch.from_dlpack(value._ortvalue) for value in binding.get_outputs()]
        # DLPack of bool comes as uint8.
        kinds = [output.type == "tensor(bool)" for output in outputs]
        return tuple(x.bool() if is_bool else x for x, is_bool in zip(found, kinds))

    return call
