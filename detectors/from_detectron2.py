"""The same test models from an installed Detectron2, through its own export helpers."""

from contextlib import contextmanager
from importlib import import_module
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from detectron2 import model_zoo
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn

from detectors import boxes as box_ops
from detectors.checkpoint import load_into
from detectors.export import Export
from detectors.images import batch_images, image_size
from detectors.zoo_configurations import zoo_configuration
from models import Model


def _detector(model: Model, state: Dict[str, Tensor], weights_name: str) -> nn.Module:
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
        if model.kind == "scripted":
            eager: nn.Module = _EagerScripted(self._detector)
        else:
            eager = TracingAdapter(self._detector, tuning_inputs["opt"], _inference(model))
        super().__init__(model, zoo_configuration(model.config), eager.eval(), tuning_inputs)

    def trace(self) -> torch.jit.ScriptModule:
        """Traces with two of Detectron2's functions replaced by the bundled ones.

        OpenVINO computes the padding wrongly as Detectron2 writes it: see `detectors.images`. And
        torchvision's non-maximum suppression is scripted when it is traced, without the casts of
        autocast, so that it would meet boxes and scores of different precisions.
        """
        detector, nms = self._detector, import_module("detectron2.layers.nms")
        with _replaced(nms, "box_ops", box_ops), _replaced(
            detector, "preprocess_image", lambda inputs: _preprocess(detector, inputs)
        ):
            return super().trace()

    def _script(self) -> torch.jit.ScriptModule:
        fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
        wrapper = _Scripted(scripting_with_instances(self._detector, fields))
        wrapper.training = False  # eval() would try to set it in the scripted detector as well.
        return torch.jit.script(wrapper)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _preprocess(detector: nn.Module, inputs: List[Dict[str, Tensor]]) -> ImageList:
    images = [x["image"] for x in inputs]
    batch = batch_images(
        images, detector.pixel_mean, detector.pixel_std, detector.backbone.size_divisibility
    )
    return ImageList(batch, [image_size(image) for image in images])
