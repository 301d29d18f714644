"""Models from an installed Detectron2, through its own export helpers: the test models, and own."""

from typing import Any, Callable, Dict, List, Tuple

import torch
from detectron2 import model_zoo
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.export.flatten import DictSchema, InstancesSchema, ListSchema, Schema
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from detectors.checkpoint import load_into
from detectors.detectron2_configuration import detector_of
from detectors.detectron2_tracing import replaced_while_tracing
from detectors.export import Export, Outcome
from detectors.images import image_size
from detectors.zoo_configurations import zoo_configuration
from errors import InputError, first_cause
from models import Detectron2Model, Model

# Detections of an image, where a detector does not say how many it keeps.
UNLIMITED = 1 << 31


def check_weights(own: Detectron2Model, state: Dict[str, Tensor], weights_name: str) -> None:
    """Makes sure that weights fit a model of the user's own.

    Raises:
        errors.InputError: they do not, or Detectron2 cannot build it.
    """
    _loaded(own, state, weights_name)


def _loaded(own: Detectron2Model, state: Dict[str, Tensor], weights_name: str) -> nn.Module:
    detector = detector_of(own)
    load_into(detector, state, weights_name, has_keys=own.program is None)
    return detector


def _detector(model: Model, state: Dict[str, Tensor], weights_name: str) -> nn.Module:
    if model.detectron2 is not None:
        return _loaded(model.detectron2, state, weights_name)
    config = model_zoo.get_config(model.config + ".yaml")
    config.MODEL.DEVICE = "cpu"
    config.MODEL.WEIGHTS = ""
    detector = build_model(config).eval()
    load_into(detector, state, weights_name)
    return detector


def _inference(model: Model) -> Callable:
    """The function of (detector, *images) whose result Detectron2's adapter flattens."""
    if "retinanet" in model.config:
        return lambda detector, image: detector.forward([{"image": image}])[0]["instances"]
    if model.postprocess:
        return lambda detector, image: detector.inference(
            [{"image": image, "height": image.shape[1], "width": image.shape[2]}],
            do_postprocess=True,
        )[0]["instances"]
    if model.images_per_call == 1:
        return lambda detector, image: detector.inference([{"image": image}], do_postprocess=False)[
            0
        ]
    return lambda detector, *images: detector.inference(
        [{"image": image} for image in images], do_postprocess=False
    )


# Models of the user's own ----------------------------------------------------------------------


def _own_inference(detector: nn.Module) -> Callable:
    """As `_inference`: what the bundled detectors give, and of others what they call their own."""
    if isinstance(detector, PanopticFPN):
        return _panoptic_inference
    if isinstance(detector, GeneralizedRCNN):
        return lambda detector, image: detector.inference([{"image": image}], do_postprocess=False)[
            0
        ]
    return _any_inference


def _panoptic_inference(detector: nn.Module, image: Tensor) -> Dict[str, Any]:
    found, logits = detector.inference([{"image": image}], do_postprocess=False)
    # Logits come with the padding of the image.
    return {"instances": found[0], "sem_seg": logits[0][:, : image.shape[1], : image.shape[2]]}


def _any_inference(detector: nn.Module, image: Tensor) -> Dict[str, Any]:
    found = detector.forward([{"image": image}])[0]
    return {name: x for name, x in found.items() if isinstance(x, (Tensor, Instances))}


def _outcome(
    detector: nn.Module, adapter: TracingAdapter, images: Tuple[Tensor, ...], name: str
) -> Outcome:
    """What is known of what a detector finds; it is called for that, on the CPU.

    Raises:
        errors.InputError: the call fails, or finds nothing that is a tensor.
    """
    try:
        adapter(*(image.cpu() for image in images))
    except Exception as error:
        raise InputError(f"{name}: Detectron2 cannot run it here: {first_cause(error)}") from error
    fields = tuple(_names(adapter.outputs_schema, ""))
    if not fields:
        raise InputError(f"{name}: what Detectron2 finds with it are no tensors")
    # Logits of proposals have no range, and maps list nothing.
    return Outcome(fields, *(_limits(detector) if "scores" in fields else (None, None)))


def _names(schema: Schema, name: str) -> List[str]:
    """Names of the tensors of a flat tuple, in their order."""
    if not isinstance(schema, ListSchema):
        return [name]
    keys = schema.keys if isinstance(schema, DictSchema) else [name] * len(schema.schemas)
    names = [each for key, inner in zip(keys, schema.schemas) for each in _names(inner, key)]
    return [*names, "image_size"] if isinstance(schema, InstancesSchema) else names


def _limits(detector: nn.Module) -> Tuple[float, int]:
    """The score that detections exceed, and how many there are in an image at most."""
    owner = getattr(getattr(detector, "roi_heads", detector), "box_predictor", detector)
    if isinstance(owner, nn.ModuleList):  # Of a cascade, the last stage decides.
        owner = owner[-1]
    threshold = getattr(owner, "test_score_thresh", 0.0)
    limits = [
        getattr(owner, key, None) for key in ("test_topk_per_image", "max_detections_per_image")
    ]
    return float(threshold), next((int(x) for x in limits if x is not None), UNLIMITED)


# Test models that are scripted -----------------------------------------------------------------


class _EagerScripted(nn.Module):
    """What a scripted RetinaNet computes, in eager mode: everything but the postprocessing."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        detector = self.detector
        images = detector.preprocess_image([{"image": image}])
        features = detector.backbone(images.tensor)
        features = [features[name] for name in detector.head_in_features]
        found = detector.forward_inference(images, features, detector.head(features))[0]
        return found.pred_boxes.tensor, found.pred_classes, found.scores, image_size(image)


class _Scripted(nn.Module):
    """A scripted RetinaNet with the flat signature of an export."""

    def __init__(self, scripted: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.detector = scripted

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.detector([{"image": image}])[0]
        size = torch._shape_as_tensor(image)[1:]
        return found.pred_boxes.tensor, found.pred_classes, found.scores, size


class Detectron2Export(Export):
    """An export of Detectron2's own module."""

    def __init__(
        self,
        model: Model,
        state: Dict[str, Tensor],
        weights_name: str,
        tuning_inputs: Dict[str, Tuple[Tensor, ...]],
    ) -> None:
        self._detector = _detector(model, state, weights_name)
        opt = tuning_inputs["opt"]
        if model.detectron2 is not None:
            eager: nn.Module = TracingAdapter(self._detector, opt, _own_inference(self._detector))
            outcome = _outcome(self._detector, eager, tuning_inputs["min"], model.detectron2.name)
            super().__init__(model, outcome, eager.eval(), tuning_inputs)
            return
        if model.kind == "scripted":
            eager = _EagerScripted(self._detector)
        else:
            eager = TracingAdapter(self._detector, opt, _inference(model))
        super().__init__(model, zoo_configuration(model.config), eager.eval(), tuning_inputs)

    def trace(self) -> torch.jit.ScriptModule:
        """Traces with some of Detectron2 replaced: see `detectors.detectron2_tracing`."""
        with replaced_while_tracing():
            return super().trace()

    def graph_module(self) -> torch.jit.ScriptModule:
        """`script_module`: Detectron2 pastes masks in its own way."""
        return self.script_module()

    def _script(self) -> torch.jit.ScriptModule:
        fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
        wrapper = _Scripted(scripting_with_instances(self._detector, fields))
        wrapper.training = False  # eval() would try to set it in the scripted detector as well.
        return torch.jit.script(wrapper)
