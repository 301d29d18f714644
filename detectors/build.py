"""From a model and weights to an export, and from `--weights` to the weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from configuration import Configuration, Input
from detectors.checkpoint import load_into, read
from detectors.config import build_detector
from detectors.export import Export, ScriptableBoxDetector, TraceableDetector, fields
from detectors.inputs import digest
from detectors.zoo import NAMED_WEIGHTS, CheckpointUnavailable, zoo_checkpoint
from detectors.zoo_configurations import zoo_configuration
from errors import InputError
from models import TUNING, Detectron2Model, Model
from results.environment import file_name
from results.record import Weights


def build(
    model: Model,
    state: Dict[str, Tensor],
    weights_name: str,
    tuning_inputs: Dict[str, Tuple[Tensor, ...]],
    source: str = "bundled",
) -> Export:
    """Builds a model with the given weights, which are copied.

    Args:
        state: parameters by Detectron2's names.
        weights_name: what errors call them.
        tuning_inputs: `min`, `opt`, `max` -> the images of a call.
        source: `bundled`, or `detectron2` where it is installed.

    Raises:
        errors.InputError: the weights are of another architecture, or a file cannot be taken.
    """
    if model.module is not None:
        from detectors.exported import ExportedElsewhere

        return ExportedElsewhere(model, tuning_inputs)
    if model.detectron2 is not None:
        source = resolve_source("detectron2")
    if source == "detectron2":
        from detectors.from_detectron2 import Detectron2Export

        return Detectron2Export(model, state, weights_name, tuning_inputs)
    configuration = configuration_of(model)
    detector = build_detector(configuration, model.postprocess, initialize=False)
    load_into(detector, state, weights_name)
    wrapper = ScriptableBoxDetector if model.kind == "scripted" else TraceableDetector
    return Export(model, configuration, wrapper(detector).eval(), tuning_inputs)


def fields_of(model: Model) -> Tuple[str, ...]:
    """Names of the tensors of one image in the flat tuple of a model."""
    return fields(configuration_of(model), model.postprocess)


def configuration_of(model: Model) -> Configuration:
    """The configuration that a model is built from."""
    return model.configuration or zoo_configuration(model.config)


def on_device(export: Export, model: Model, device: str) -> Export:
    """The bundled export of a model, made anew with its module and its images on a device."""
    images = {
        size: tuple(image.to(device) for image in call)
        for size, call in export.tuning_inputs.items()
    }
    moved = build(model, export.eager.detector.state_dict(), "the weights", images)
    moved.eager.to(device)
    return moved


# Detectron2 as the source ----------------------------------------------------------------------


def detectron2_unavailable() -> Optional[str]:
    """Why `--source detectron2` does not work here, in a sentence; None where it does."""
    try:
        with warnings.catch_warnings():
            # It uses what recent PyTorch calls deprecated.
            warnings.simplefilter("ignore")
            import detectron2.model_zoo  # noqa: F401
    except ImportError as error:
        return f"detectron2 is not usable here ({error}); install it or use --source bundled"
    return None


def resolve_source(source: str) -> str:
    """The source that is meant by `auto`, `detectron2` or `bundled`: one of the latter two.

    Raises:
        errors.InputError: detectron2 was asked for and is not usable.
    """
    if source == "bundled":
        return source
    reason = detectron2_unavailable()
    if reason is None:
        return "detectron2"
    if source == "detectron2":
        raise InputError(reason)
    return "bundled"


def detectron2_input(own: Detectron2Model) -> Tuple[Input, Optional[str]]:
    """How a model that Detectron2 builds wants its images; and what was assumed of it, or None.

    Raises:
        errors.InputError: Detectron2 is not usable, or does not know what its configuration says.
    """
    resolve_source("detectron2")
    from detectors.detectron2_configuration import input_of

    return input_of(own)


# Weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundWeights:
    """Parameters of a model.

    Attributes:
        state: parameters by Detectron2's names.
        name: of where they come from, for errors.
        record: the same for the result file, with their digest.
    """

    state: Dict[str, Tensor]
    name: str
    record: Weights


def find_weights(
    model: Model,
    weights: str,
    inputs: Dict[str, Tuple[Tensor, ...]],
    detections: int,
    seed: int,
) -> FoundWeights:
    """Finds the weights that `--weights` asks for.

    Args:
        weights: `auto`, `zoo`, `synthetic` or the path of a checkpoint.
        inputs: whose images synthetic weights are made for, see `detectors.inputs.inputs`.
        detections: how many objects synthetic weights find.
        seed: of synthetic weights.

    Raises:
        errors.InputError: the checkpoint cannot be downloaded or read.
    """
    if model.module is not None:  # It has its own.
        name = file_name(model.module.path)
        return FoundWeights({}, name, Weights("file", name, digest=model.module.digest))
    no_zoo = None
    if weights in ("auto", "zoo"):
        try:
            return _from_file(zoo_checkpoint(model.config), "zoo")
        except CheckpointUnavailable as error:
            if weights == "zoo":
                raise
            no_zoo = str(error)
    elif weights != "synthetic":
        return _from_file(Path(weights), "file")
    from detectors.synthetic import synthesize

    others = [name for name in inputs if name not in TUNING]
    first = [inputs[name][0] for name in (*TUNING, *others)]
    images = first + [image for call in inputs.values() for image in call[1:]]
    state = synthesize(configuration_of(model), images, detections, seed)
    record = Weights("synthetic", None, detections, no_zoo, _digest(state))
    return FoundWeights(state, "synthetic weights", record)


def _from_file(path: Path, source: str) -> FoundWeights:
    state = read(path)
    return FoundWeights(state, str(path), Weights(source, file_name(path), digest=_digest(state)))


def _digest(state: Dict[str, Tensor]) -> str:
    return digest(_array(state[name]) for name in sorted(state))


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    try:
        return tensor.numpy()
    except TypeError:  # NumPy has no bfloat16, for example, and of a digest only the bytes count.
        return tensor.reshape(-1).view(torch.uint8).numpy()


def check_weights(models: Iterable[Model], weights: str) -> None:
    """Makes sure that a checkpoint fits all of these models, before any is measured.

    Args:
        weights: as for `find_weights`; named ones fit. `detectors.zoo.download_zoo` makes sure that
            they are there.

    Raises:
        errors.InputError: the checkpoint cannot be read, or is of another architecture.
    """
    if weights in NAMED_WEIGHTS:
        return
    state = read(weights)
    own = [model.detectron2 for model in models if model.detectron2 is not None]
    if own:
        resolve_source("detectron2")
        from detectors import from_detectron2

        for each in own:
            from_detectron2.check_weights(each, state, weights)
        return
    for configuration in {model.config: configuration_of(model) for model in models}.values():
        detector = build_detector(configuration, False, initialize=False)
        load_into(detector, state, weights)
