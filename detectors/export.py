"""A detector made ready: the eager module, its traced or scripted module, and its inputs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from configuration import Configuration
from detectors import masks
from detectors.config import NO_DETECTIONS, fields
from detectors.inputs import crops
from detectors.instances import Instances, flatten
from detectors.lowering import lowered
from models import Model

if TYPE_CHECKING:
    from measure.validation import Validation


class Outcome(NamedTuple):
    """What is known of what a detector finds: see the attributes of `Export`."""

    fields: Tuple[str, ...]
    score_threshold: Optional[float]
    limit: Optional[int]


def script(module: nn.Module) -> torch.jit.ScriptModule:
    """The scripted module, which shares its parameters with the one that is given.

    PyTorch puts what `__prepare_scriptable__` gives into the module that it scripts. So it gets a
    copy of the tree.
    """
    return torch.jit.script(_copy_of_tree(module))


def _copy_of_tree(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    copied._modules = {
        name: each if each is None else _copy_of_tree(each)
        for name, each in module._modules.items()
    }
    return copied


class TraceableDetector(nn.Module):
    """A detector with the flat signature of an export: images in, tuple of tensors out."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, *images: Tensor) -> Tuple[Tensor, ...]:
        found = self.detector(list(images))
        return tuple(tensor for instances in found for tensor in flatten(instances))


class ScriptableBoxDetector(nn.Module):
    """The same for TorchScript, which knows no variable number of images: one, without masks."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        found: Instances = self.detector([image])[0]
        return found.pred_boxes, found.pred_classes, found.scores, found.image_size


class Export:
    """A detector made ready.

    Attributes:
        model: that it was made of.
        name: of the model.
        kind: of the model.
        eager: module in eval mode; takes the images of a call and gives the flat tuple.
        tuning_inputs: `min`, `opt`, `max` -> the images of a call, float tensors 3 x H x W.
        other_inputs: images of calls that are timed besides `opt`, for backends that compile when
            they first see a size.
        calibration: calls with images of the user's that int8 takes its ranges from; empty: see
            `calibration_calls`.
        validation: judges what int8 costs on these; None: that is not judged.
        fields: names of the tensors that the flat tuple has for each image.
        score_threshold: detections score more; None: there is no threshold, or, of a file, it is
            not known.
        limit: of detections, or proposals, in an image; None where nothing is listed, or it is not
            known.
        own_runner: what runs `eager`, if PyTorch's operators do not, which autocast reaches.
        onnx_file: the ONNX graph that it is, or None.
        program: the program of torch.export that it is, or None.
    """

    other_inputs: Sequence[Tuple[Tensor, ...]] = ()
    calibration: Sequence[Tuple[Tensor, ...]] = ()
    validation: Optional[Validation] = None
    score_threshold: Optional[float]
    limit: Optional[int]
    own_runner: Optional[str] = None
    onnx_file: Optional[str] = None
    program: Optional[Any] = None

    def __init__(
        self,
        model: Model,
        configuration: Union[Configuration, Outcome],
        eager: nn.Module,
        tuning_inputs: Dict[str, Tuple[Tensor, ...]],
    ) -> None:
        if isinstance(configuration, Configuration):
            configuration = outcome(configuration, model.postprocess)
        self.model = model
        self.name = model.name
        self.kind = model.kind
        self.fields, self.score_threshold, self.limit = configuration
        self.eager = eager
        self.tuning_inputs = tuning_inputs
        self._script_module: Optional[torch.jit.ScriptModule] = None
        self._graph_module: Optional[torch.jit.ScriptModule] = None

    @property
    def inputs(self) -> Tuple[Tensor, ...]:
        """The images that are timed: those of `opt`."""
        return self.tuning_inputs["opt"]

    def calibration_calls(self) -> Sequence[Tuple[Tensor, ...]]:
        """Calls that int8 takes the ranges of activations from.

        Without images of the user's they are made of every size that the model is tuned for:
        activations at `max` leave the ranges of `opt`.
        """
        if len(self.calibration):
            return self.calibration
        return [
            call
            for images in self.tuning_inputs.values()
            for call in zip(*(crops(image) for image in images))
        ]

    def script_module(self) -> torch.jit.ScriptModule:
        """The traced or scripted module, called like `eager`; made the first time it is needed."""
        if self._script_module is None:
            self._script_module = self._script() if self.kind == "scripted" else self.trace()
        return self._script_module

    def graph_module(self) -> torch.jit.ScriptModule:
        """`script_module` as it suits engines with kernels of their own, with the same outputs."""
        if self._graph_module is None:
            self._graph_module = self._for_engines()
        return self._graph_module

    def _for_engines(self) -> torch.jit.ScriptModule:
        if self.kind == "scripted":
            return lowered(self.script_module())
        if "pred_masks" in self.fields and self.model.postprocess:
            with masks.for_engine():
                return self.trace()
        return self.script_module()

    def python_module(self) -> nn.Module:
        """The module as Python code, called like `eager`."""
        return self.eager

    @property
    def outputs(self) -> int:
        """Number of the tensors that a call gives."""
        return len(self.inputs) * len(self.fields)

    @property
    def compared_fields(self) -> Tuple[str, ...]:
        """Names of the tensors of an image in what `completed` gives."""
        return self.fields

    def completed(self, outputs: Sequence[Tensor], images: Sequence[Tensor]) -> Sequence[Tensor]:
        """A flat tuple with all that is needed to compare detections, which a file's may lack.

        Args:
            images: of the call.
        """
        return outputs

    def trace(self) -> torch.jit.ScriptModule:
        """Traces the eager module as it would run now: under autocast, the casts are traced too."""
        with torch.no_grad():
            return torch.jit.trace(self.eager, self.inputs, check_trace=False)

    def _script(self) -> torch.jit.ScriptModule:
        return script(self.eager)


def outcome(configuration: Configuration, postprocess: bool) -> Outcome:
    """What is known of what the detector of a configuration finds."""
    return Outcome(
        fields(configuration, postprocess), score_threshold(configuration), limit(configuration)
    )


def score_threshold(configuration: Configuration) -> Optional[float]:
    """What detections score more than; None: proposals have any logit, and maps list nothing."""
    model = configuration.model
    if model.meta_architecture in NO_DETECTIONS:
        return None
    is_retinanet = model.meta_architecture == "RetinaNet"
    return (model.retinanet if is_retinanet else model.roi_heads).score_thresh_test


def limit(configuration: Configuration) -> Optional[int]:
    """The most that is listed for an image; None for maps, which list nothing."""
    model = configuration.model
    if model.meta_architecture == "ProposalNetwork":
        return int(model.rpn.post_nms_topk_test)
    if model.meta_architecture in NO_DETECTIONS:
        return None
    return int(configuration.test.detections_per_image)
