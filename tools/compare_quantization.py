#!/usr/bin/env python3
"""What do ways to quantize cost a trained detector in average precision?

Quantizes it in several ways with the engines that can, evaluates each on a data set, and prints a
row for each. Nothing is timed. From the root of the repository:

    python3 tools/compare_quantization.py --config-file config.yaml --weights model_final.pth \
        --calibration train --dataset val.json --image-root val
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import run_blade
from backends import base
from backends.torch import autocast
from detectors import inputs
from detectors.build import build, find_weights
from detectors.export import Export
from detectors.inputs import Calls
from errors import InputError, Unsupported
from measure import accuracy
from measure.coco_results import results
from measure.detections import split
from measure.evaluation import tasks_of
from measure.plan import Plan, make_plan
from measure.progress import Progress
from measure.session import opened
from models import TUNING
from results.facts import OBJECTS
from results.record import AveragePrecision
from results.tables import Table, left, markdown, right

ENGINES = ("openvino", "onnxruntime")

Call = Callable[..., tuple[Any, ...]]


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = run_blade.parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--only", default="", help="ways of which the name has this in it")
    options = parser.parse_args(["--precision", "int8", "--backend", "torch", *sys.argv[1:]])
    options.backend = [x for x in ENGINES if base.load(x).unavailable("cpu") is None]
    try:
        with opened(()) as hosts:
            plan = make_plan(options, {}, hosts)
            if plan.dataset is None or plan.calibration is None or plan.calibration.path is None:
                raise InputError("--dataset and --calibration are needed")
            print(markdown(table(plan, options.only, hosts.folder)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table(plan: Plan, only: str, folder: Path) -> Table:
    """What each way costs.

    Args:
        only: ways of which the name has this in it.
        folder: for files that are needed meanwhile.
    """
    torch.set_num_threads(plan.threads)
    model = plan.models[0]
    calls = inputs.inputs(plan.pictures, model.images_per_call, plan.seed, plan.view)
    weights = find_weights(model, plan.weights, calls, OBJECTS, plan.seed)
    export = build(model, weights.state, weights.name, {name: calls[name] for name in TUNING})
    export.calibration = Calls(Path(plan.calibration.path), model.images_per_call)
    judge = Judge(plan, export, folder / "truth.json")
    rows: list[Sequence[str]] = []
    for engine, name, make in ways(export):
        if only not in f"{engine} {name}" and judge.reference:
            continue
        judge.progress.say(f"{engine}, {name}")
        try:
            layers, call = make()
            found = judge(call)
        except (Unsupported, InputError) as error:
            rows.append((engine, name, f"cannot: {error}", *["-"] * 5))
            continue
        rows += [(engine, name, layers, task, *cells(own)) for task, own in found.items()]
    columns = (*left("engine", "how", "heavy layers", "of"), *right("AP", "dAP", "95%", "verdict"))
    return Table("quantization", columns, tuple(rows))


class Judge:
    """Average precision of what is called, and what it differs by from that of the first call."""

    def __init__(self, plan: Plan, export: Export, truth: Path) -> None:
        self.plan, self.dataset, self.export, self.truth = plan, plan.dataset, export, truth
        self.progress = Progress()
        self.oks_sigmas = export.model.oks_sigmas
        self.tasks, _ = tasks_of(self.dataset, export.fields, self.oks_sigmas)
        self.reference: dict[str, tuple[AveragePrecision, np.ndarray]] = {}
        self.dataset.write([x.id for x in self.dataset.images], truth)

    def __call__(self, call: Call) -> dict[str, AveragePrecision]:
        found = []
        for picture in self.dataset.images:
            image = inputs.seen(inputs.read_image(picture.path, None, least=1), self.plan.view)
            outputs = [x.numpy() for x in call(torch.from_numpy(image))]
            (detections,) = split(outputs, self.export.fields)
            found += results(detections, picture.size, picture.id, self.dataset.category_ids)
        return {task: self.judged(found, task) for task in self.tasks}

    def judged(self, found: list[dict[str, Any]], task: Any) -> AveragePrecision:
        """The figures of a task."""
        evaluation = accuracy.evaluate(self.truth, found, task, self.oks_sigmas or None)
        own = accuracy.average_precision(evaluation, self.dataset.classes)
        values = accuracy.resampled(evaluation, self.plan.seed)
        if task not in self.reference:
            self.reference[task] = (own, values)
            return own
        known, theirs = self.reference[task]
        both, images = (values, theirs), evaluation.images
        return accuracy.with_difference(own, known, both, images, self.plan.min_ap_ratio)


def cells(own: AveragePrecision) -> list[str]:
    """What the table says of average precision."""
    known = own.difference
    ap = "-" if own.ap is None else f"{own.ap:.2f}"
    if known is None:
        return [ap, "-", "-", "-"]
    interval = f"{known.low:+.2f} to {known.high:+.2f}"
    return [ap, f"{known.value:+.2f}", interval, known.verdict]


def ways(export: Export) -> Iterator[tuple[str, str, Callable[[], tuple[str, Call]]]]:
    """Engine, what is done, and what does it; the reference comes first."""

    def eager() -> tuple[str, Call]:
        return "-", autocast(export.eager, "fp32", "cpu")

    yield "Torch", "fp32", eager
    if base.load("openvino").unavailable("cpu") is None:
        yield from ways_of_openvino(export)
    if base.load("onnxruntime").unavailable("cpu") is None:
        yield from ways_of_onnxruntime(export)
    export.calibration = ()  # From here on.
    for name in ENGINES:
        backend = base.load(name)
        if backend.unavailable("cpu") is None:
            how = "ours, calibrated on crops of an image"
            yield backend.label, how, lambda name=name: _ours(export, name)


def _ours(export: Export, name: str) -> tuple[str, Call]:
    optimized = base.load(name).optimize(export, "int8", "cpu")
    return str(optimized.coverage.heavy_layers), optimized.call


def ways_of_openvino(export: Export) -> Iterator[tuple[str, str, Callable[[], tuple[str, Call]]]]:
    """NNCF's defaults, and ours one by one."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    from backends import openvino

    def quantized(**changes: Any) -> tuple[str, Call]:
        model = openvino.convert(export.script_module(), export)
        model = openvino.quantize(model, export, **changes)
        compiled = openvino.compile_model(model, "int8", torch.get_num_threads())
        layers = openvino._coverage(compiled).heavy_layers
        return str(layers), openvino._caller(compiled.create_infer_request(), export)

    def ranges(name: str) -> Any:
        return nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=getattr(RangeEstimatorParametersSet, name),
        )

    everything: dict[str, Any] = {"ignored_scope": None}
    averages: dict[str, Any] = {"advanced_parameters": None}
    for name, changes in (
        ("NNCF's defaults", {**everything, **averages}),
        ("boxes exact", averages),
        ("extremes", everything),
        ("ours: boxes exact, extremes, biases not corrected", {}),
        ("ours, symmetric", {"preset": nncf.QuantizationPreset.PERFORMANCE}),
        (
            "ours, biases corrected slowly",
            {"advanced_parameters": ranges("MINMAX"), "fast_bias_correction": False},
        ),
        ("ours, biases corrected", {"advanced_parameters": ranges("MINMAX")}),
        ("boxes exact, medians", {"advanced_parameters": ranges("MEDIAN_MINMAX")}),
        ("boxes exact, histograms", {"advanced_parameters": ranges("HISTOGRAM")}),
    ):
        yield "OpenVINO", name, lambda changes=changes: quantized(**changes)


def ways_of_onnxruntime(
    export: Export,
) -> Iterator[tuple[str, str, Callable[[], tuple[str, Call]]]]:
    """The tool's defaults, and ours with other ranges and other operators."""
    from onnxruntime.quantization import CalibrationMethod, QuantType

    from backends import onnxruntime

    graph = onnxruntime.convert(export.script_module(), export)

    def quantized(**changes: Any) -> tuple[str, Call]:
        own = onnxruntime.quantize(graph, export, **changes)
        session, layers = onnxruntime.quantized_session(own, torch.get_num_threads())
        return str(layers), onnxruntime.caller(session, export)

    heavy = list(onnxruntime.QUANTIZED)
    percentile = {"CalibPercentile": 99.99}
    for name, changes in (
        (
            "its defaults: all operators, by tensor",
            {"op_types_to_quantize": [], "nodes_to_quantize": [], "per_channel": False},
        ),
        ("all operators", {"op_types_to_quantize": [], "nodes_to_quantize": []}),
        (
            "heavy layers, activations, additions",
            {"op_types_to_quantize": [*heavy, "Relu", "Add"], "nodes_to_quantize": []},
        ),
        ("heavy layers alone", {"op_types_to_quantize": heavy}),
        ("ours: heavy layers, activations", {}),
        ("ours, by tensor", {"per_channel": False}),
        ("ours, signed", {"activation_type": QuantType.QInt8}),
        ("ours, entropy", {"calibrate_method": CalibrationMethod.Entropy}),
        (
            "ours, percentiles",
            {"calibrate_method": CalibrationMethod.Percentile, "extra_options": percentile},
        ),
    ):
        yield "ONNXRuntime", name, lambda changes=changes: quantized(**changes)


if __name__ == "__main__":
    sys.exit(main())
