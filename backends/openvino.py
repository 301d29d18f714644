"""OpenVINO on a CPU: the whole exported graph, with a range of image sizes."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from backends.base import Backend, Optimized, Phases, check_sizes, module_name
from errors import Unsupported, first_cause
from results.record import AccuracyControl, Coverage

if TYPE_CHECKING:
    from detectors.export import Export

# int8 is in the graph, as quantized operators; what is not quantized stays fp32.
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
# What the CPU plugin calls the layers that have kernels of lower precision.
HEAVY_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
# What they are called in a model that is not yet compiled.
HEAVY_OPERATORS = ("Convolution", "ConvolutionBackpropData", "MatMul")
# How the CPU plugin says that it has no such operator, or not for such types.
_NOT_HAD = "Unsupported operation"
# Of the compiled model, in the folder that it is saved to.
FILE = "model.blob"
NO_LAYERS = ("Const", "Input", "Output", "Reorder", "Parameter", "Result")


class OpenVINO(Backend):
    """`openvino.convert_model` of the exported module, compiled for latency."""

    name = "openvino"
    label = "OpenVINO"
    rank = 5
    devices = ("cpu",)
    precisions = {"cpu": ("fp32", "bf16", "int8")}

    def unavailable(self, device: str) -> Optional[str]:
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            return f"OpenVINO is not usable here ({error}): pip install openvino"
        return None

    def versions(self) -> Dict[str, str]:
        import openvino

        return {"openvino": openvino.__version__}

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        import torch

        start = time.perf_counter()
        module = export.onnx_file or export.program or export.graph_module()
        exported = time.perf_counter()
        model = convert(module, export)
        control = None
        if precision == "int8" and export.validation is not None:
            model, control = quantize_under_control(model, export)
        elif precision == "int8":
            model = quantize(model, export)
        converted = time.perf_counter()
        compiled = compile_model(model, precision, torch.get_num_threads(), cache)
        compiled_at = time.perf_counter()
        seconds = Phases(
            export=exported - start,
            convert=converted - exported,
            compile=compiled_at - converted,
        )
        made = _optimized(compiled, export, precision, seconds)
        is_cached = bool(compiled.get_property("LOADED_FROM_CACHE"))
        return replace(made, control=control, cached=is_cached)

    def load(self, export: Export, precision: str, device: str, folder: Path) -> Optimized:
        import torch

        start = time.perf_counter()
        settings = _settings(precision, torch.get_num_threads())
        compiled = _core().import_model((folder / FILE).read_bytes(), "CPU", settings)
        seconds = Phases(compile=time.perf_counter() - start)
        return _optimized(compiled, export, precision, seconds)


def _optimized(compiled: Any, export: Export, precision: str, seconds: Phases) -> Optimized:
    """What becomes of a compiled model.

    Raises:
        errors.Unsupported: it computes in another precision.
    """
    coverage = _coverage(compiled)
    _check_precision(compiled, precision, coverage.heavy_layers or {})
    call = _caller(compiled.create_infer_request(), export)
    call(*export.inputs)  # The plugin picks its kernels when it first sees the sizes.

    def save(folder: Path) -> None:
        (folder / FILE).write_bytes(compiled.export_model().getvalue())

    return Optimized(
        call=call,
        precision=precision,
        provider="CPU",
        threads=int(compiled.get_property("INFERENCE_NUM_THREADS")),
        coverage=coverage,
        seconds=seconds,
        read_artifact_bytes=lambda: len(compiled.export_model().getvalue()),
        save=save,
    )


def quantize(model: Any, export: Export, **changes: Any) -> Any:
    """Post-training quantization of a converted model by NNCF, with three choices of ours.

    What handles boxes stays exact. Ranges are the extremes over all calls: NNCF's own choice are
    averages, which cut off what is rare, activations at `max`, and those of a mask head, where most
    calls find nothing. Biases are not corrected: on two trained detectors, calibrated on 200
    images, that costs AP. With NNCF's defaults RetinaNet finds nothing, and Mask R-CNN has no mask
    (tools/compare_quantization.py, docs/performance.md).

    Args:
        changes: arguments of `nncf.quantize` in place of ours, for comparing them.

    Raises:
        errors.Unsupported: NNCF is not installed, or cannot quantize the model.
    """
    nncf, model = _nncf(), _of_its_own(model)
    arguments, advanced = _quantization(model, export)
    ours = {**arguments, "advanced_parameters": advanced}
    try:
        return nncf.quantize(model, **{**ours, **changes})
    except Exception as error:
        raise Unsupported(f"NNCF cannot quantize the model: {first_cause(error)}") from error


def quantize_under_control(model: Any, export: Export) -> Tuple[Any, AccuracyControl]:
    """The same, with the layers in fp32 that cost more AP than the export's validation allows.

    NNCF ranks its quantizers by what AP gains without each, and takes them out one by one.

    Returns:
        the model, and what of it stays in fp32.

    Raises:
        errors.Unsupported: NNCF is not installed, or cannot quantize the model.
    """
    import torch

    nncf, model = _nncf(), _of_its_own(model)
    validation = export.validation
    assert validation is not None
    arguments, advanced = _quantization(model, export)
    calibration = arguments.pop("calibration_dataset")
    layers = len(_layers(model))

    shares: List[float] = []  # Of all calls: that of the model as it was comes first.

    def judged(compiled: Any, places: Sequence[int]) -> Tuple[float, List[float]]:
        call = _caller(compiled.create_infer_request(), export)
        share, of_calls = validation.judged(call, list(places))
        if len(of_calls) == len(validation):
            shares.append(share)
        return share, of_calls

    try:
        quantized = nncf.quantize_with_accuracy_control(
            model,
            calibration,
            nncf.Dataset(range(len(validation))),
            judged,
            max_drop=1 - validation.least_ratio,
            drop_type=nncf.DropType.RELATIVE,
            advanced_quantization_parameters=advanced,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                max_num_iterations=max(1, layers // 2),
                ranking_subset_size=validation.ranking_calls,
                num_ranking_workers=1,  # Each would have all threads.
            ),
            **arguments,
        )
    except Exception as error:
        raise Unsupported(f"NNCF cannot quantize the model: {first_cause(error)}") from error
    kept = tuple(name for name, is_int8 in _layers(quantized).items() if not is_int8)
    after = shares[1]
    if kept:  # The last that was judged need not be the one that came out.
        compiled = compile_model(quantized, "int8", torch.get_num_threads())
        after = judged(compiled, range(len(validation)))[0]
    return quantized, validation.control(shares[1], after, kept, layers)


def _nncf() -> Any:
    """NNCF.

    Raises:
        errors.Unsupported: it is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise Unsupported(f"int8 needs NNCF ({error}): pip install nncf") from error
    _core()  # Before NNCF makes cores of its own.
    return nncf


def _of_its_own(model: Any) -> Any:
    """A copy, in which loops share no constants with what is around them: NNCF 3.4 looks for what
    uses these in the graph around, and fails (pasted masks have such a loop).
    """
    return model.clone()


def _quantization(model: Any, export: Export) -> Tuple[Dict[str, Any], Any]:
    """Arguments of NNCF's functions, and its advanced parameters, which each calls differently."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    calls = export.calibration_calls()
    arguments = {
        "calibration_dataset": nncf.Dataset(calls, lambda call: [image.numpy() for image in call]),
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": len(calls),
        "ignored_scope": nncf.IgnoredScope(names=_exact_operators(model), validate=False),
    }
    advanced = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
    )
    return arguments, advanced


def _layers(model: Any) -> Dict[str, bool]:
    """Heavy layers with learned weights, by module, and whether these are all in int8."""
    layers: Dict[str, bool] = {}
    for op in model.get_ops():
        if op.get_type_name() not in HEAVY_OPERATORS:
            continue
        kinds = _constant_types(op.input_value(1).get_node())
        if kinds:
            name = _layer_name(op)
            is_int8 = bool({"i8", "u8"} & kinds)
            layers[name] = layers.get(name, True) and is_int8
    return layers


def _layer_name(op: Any) -> str:
    """The module of a heavy layer; into those without a name of it a norm was folded."""
    follower = next(iter(op.output(0).get_target_inputs())).get_node()
    names = [module_name(each.get_friendly_name()) for each in (op, follower)]
    return names[0] if "." in names[0] else re.sub(r"\.norm$", "", names[1])


def _constant_types(node: Any) -> Set[str]:
    """Types of the constants that a value is computed from; empty where it is no constant."""
    if node.get_type_name() == "Constant":
        return {node.get_element_type().get_type_name()}
    if node.get_type_name() == "Parameter" or not node.get_input_size():
        return set()
    own = [_constant_types(value.get_node()) for value in node.input_values()]
    return set().union(*own) if all(own) else set()


def _exact_operators(model: Any) -> List[str]:
    """Names of the operators that no heavy layer gets its features from: all that handles boxes.

    NNCF would quantize their additions and multiplications as well. 256 steps are too few for
    coordinates, and ranges are unknown where the calibration images have no detections.
    """
    features = set()
    pending = [op for op in model.get_ops() if op.get_type_name() in HEAVY_OPERATORS]
    while pending:
        op = pending.pop()
        if op.get_friendly_name() not in features:
            features.add(op.get_friendly_name())
            pending += [value.get_node() for value in _feature_inputs(op)]
    names = [op.get_friendly_name() for op in model.get_ops()]
    return [name for name in names if name not in features]


def _feature_inputs(op: Any) -> List[Any]:
    """Those inputs of an operator that are neither regions to pool from nor shapes and indices."""
    inputs = op.input_values()[:1] if op.get_type_name() == "ROIAlign" else op.input_values()
    return [value for value in inputs if value.get_element_type().is_real()]


def _sizes(export: Export, which: str) -> List[Tuple[int, int]]:
    return [(image.shape[-2], image.shape[-1]) for image in export.tuning_inputs[which]]


def convert(module: Any, export: Export) -> Any:
    """The exported module as an OpenVINO model for images between `min` and `max`.

    Args:
        module: traced or scripted, the path of an ONNX file, or a program of torch.export.

    Raises:
        errors.Unsupported: OpenVINO cannot convert it.
    """
    import openvino
    import torch

    try:
        example = export.inputs if isinstance(module, torch.jit.ScriptModule) else None
        model = openvino.convert_model(module, example_input=example)
    except Exception as error:
        raise Unsupported(f"OpenVINO cannot convert the module: {first_cause(error)}") from error
    bounds = zip(model.inputs, _sizes(export, "min"), _sizes(export, "max"))
    for port, smallest, largest in bounds:
        shape = openvino.PartialShape([3, *zip(smallest, largest)])
        port.get_node().set_partial_shape(shape)
        if port.get_element_type().is_dynamic():  # Of some scripted modules.
            port.get_node().set_element_type(openvino.Type.f32)
    model.validate_nodes_and_infer_types()
    _keep_regions_exact(model)
    return model


def _keep_regions_exact(model: Any) -> None:
    """Makes the boxes of ROI pooling outputs of the model, after its own.

    At bf16 the CPU plugin keeps fp32 between the last heavy layer and an output, and rounds all
    else to bf16: also the boxes that regions are pooled from, by up to 4 pixels at 1024 and above.
    """
    regions = [op.input_value(1) for op in model.get_ops() if op.get_type_name() == "ROIAlign"]
    if regions:
        model.add_outputs(regions)


def compile_model(model: Any, precision: str, threads: int, cache: Optional[Path] = None) -> Any:
    """Compiles a converted model for the latency of one call at a time on a CPU.

    Args:
        cache: directory that compiled models are kept in and taken from.

    Raises:
        errors.Unsupported: the CPU plugin does not have one of its operators.
    """
    settings = _settings(precision, threads)
    if cache is not None:
        settings["CACHE_DIR"] = str(cache)
    try:
        return _core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        if _NOT_HAD not in str(error):
            raise
        raise Unsupported(f"OpenVINO cannot compile the model: {first_cause(error)}") from error


def _settings(precision: str, threads: int) -> Dict[str, Any]:
    """Of a model compiled for the latency of one call at a time."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
    }


@functools.lru_cache(maxsize=None)
def _core() -> Any:
    """The one of this process, for good.

    Each loads a CPU plugin, which gives the thread an alternate stack for signals, and, when it is
    destroyed, the one that was there before. Where that went first (seen with OpenVINO 2026.4), the
    next signal that Python handles ends the process, without a word from faulthandler.
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # It loads the plugin when it first needs it.
    return core


def _check_precision(compiled: Any, precision: str, heavy_layers: Dict[str, int]) -> None:
    if precision == "int8":
        quantized = sum(heavy_layers.get(kind, 0) for kind in ("i8", "u8"))
        if 2 * quantized <= sum(heavy_layers.values()):
            raise Unsupported(f"OpenVINO quantized only {quantized} of the heavy layers")
        return
    read_back = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if read_back not in (HINTS[precision], {"fp32": "float32", "bf16": "bfloat16"}[precision]):
        raise Unsupported(f"OpenVINO compiled for {read_back} on this CPU instead of {precision}")


def _coverage(compiled: Any) -> Coverage:
    """Layers of the compiled graph, and how many of the heavy ones run in which precision."""
    layers = [
        node.get_rt_info() for node in compiled.get_runtime_model().get_ops() if node.get_rt_info()
    ]
    layers = [(str(x["layerType"].astype(str)), x["runtimePrecision"].astype(str)) for x in layers]
    layers = [layer for layer in layers if layer[0] not in NO_LAYERS]
    heavy = [precision for kind, precision in layers if kind in HEAVY_LAYERS]
    return Coverage(
        operators=len(layers),
        operators_in_engine=len(layers),
        segments=1,
        share_of_flops=1.0,
        heavy_layers={precision: heavy.count(precision) for precision in sorted(set(heavy))},
    )


def _caller(request: Any, export: Export) -> Callable[..., Tuple[Any, ...]]:
    import torch

    def call(*images: Any) -> Tuple[Any, ...]:
        check_sizes(images, export, "OpenVINO's model")
        # Inputs are read where they are; outputs are copied, as the next call overwrites them.
        found = request.infer([image.numpy() for image in images], share_inputs=True)
        own = found.to_tuple()[: export.outputs]
        return tuple(torch.from_numpy(value) for value in own)

    return call
