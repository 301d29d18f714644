"""What the real Detectron2 computes. Imports it, so import this only where it is installed."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2 import model_zoo
from detectron2.export import scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from seeded_weights import seeded_weights
from torch import Tensor, nn

from detectors.build import fields_of
from models import Model


def build(
    config: str,
    settings: Optional[Mapping[str, Any]] = None,
    weights: Callable[[Mapping[str, Tensor]], Dict[str, Tensor]] = seeded_weights,
) -> nn.Module:
    """Detectron2's detector of a model-zoo configuration, on the CPU, with seeded weights.

    Args:
        settings: what is different from that.
        weights: makes them for a state dict.
    """
    node = model_zoo.get_config(config + ".yaml")
    node.MODEL.DEVICE = "cpu"
    node.MODEL.WEIGHTS = ""
    for key, value in (settings or {}).items():
        node.merge_from_list([key, value])
    detector = build_model(node).eval()
    detector.load_state_dict(weights(detector.state_dict()))
    return detector


def cell_anchors(detector: nn.Module) -> List[Tensor]:
    """The anchors around the origin of each feature map, A x 4."""
    owner = detector if hasattr(detector, "anchor_generator") else detector.proposal_generator
    return list(owner.anchor_generator.cell_anchors)


def script(detector: nn.Module) -> torch.jit.ScriptModule:
    """RetinaNet by Detectron2's own export for scripting."""
    fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
    return scripting_with_instances(detector, fields)


@torch.no_grad()
def outputs(
    model: Model, detector: nn.Module, images: Tuple[Tensor, ...]
) -> List[Dict[str, Tensor]]:
    """The detections of a call, one set of fields for each image.

    Args:
        detector: from `build`; for a scripted test model from `script`.
    """
    inputs = [{"image": image} for image in images]
    if model.kind == "scripted":
        found = detector(inputs)
    elif "retinanet" in model.config:
        found = [x["instances"] for x in detector(inputs)]
    elif model.postprocess:
        found = [x["instances"] for x in detector.inference(inputs, do_postprocess=True)]
    else:
        found = detector.inference(inputs, do_postprocess=False)
    return [_fields(fields_of(model), instances) for instances in found]


@torch.no_grad()
def outputs_of_part(detector: nn.Module, images: Tuple[Tensor, ...]) -> List[Dict[str, Tensor]]:
    """What one of `parts` finds, one set of fields for each image, not postprocessed."""
    inputs = [{"image": image} for image in images]
    if not hasattr(detector, "roi_heads"):
        return [_fields_of_outcome(outcome) for outcome in detector(inputs)]
    found = detector.inference(inputs, do_postprocess=False)
    if not hasattr(detector, "sem_seg_head"):
        return [_all_fields(instances) for instances in found]
    # Logits come with the padding of the images.
    return [
        {**_all_fields(instances), "sem_seg": logits[:, : image.shape[1], : image.shape[2]]}
        for instances, logits, image in zip(*found, images)
    ]


def _fields_of_outcome(outcome: Dict[str, Any]) -> Dict[str, Tensor]:
    """Those of an image for which Detectron2 has one kind of result."""
    ((name, found),) = outcome.items()
    return {name: found} if isinstance(found, Tensor) else _all_fields(found)


def _all_fields(instances) -> Dict[str, Tensor]:
    """By name, and the size of the image last, as `TracingAdapter` puts them."""
    return _fields([*sorted(instances.get_fields()), "image_size"], instances)


def _fields(names: Sequence[str], instances) -> Dict[str, Tensor]:
    values = {name: getattr(instances, name) for name in names}
    fields = {name: x.tensor if isinstance(x, Boxes) else x for name, x in values.items()}
    fields["image_size"] = torch.tensor(fields["image_size"])
    return fields
