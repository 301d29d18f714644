"""What of Detectron2 is replaced while a detector of its own is traced, and why.

Eager mode runs Detectron2 as it is: it is the baseline, and what an export has to find. Each of the
replacements computes the same, up to rounding:

- Padding, as OpenVINO computes it wrongly the way Detectron2 writes it: see `detectors.images`.
- Non-maximum suppression: torchvision's is scripted when it is traced, without the casts of
  autocast, so that it would meet boxes and scores of different precisions.
- Keypoints from heatmaps, for which Detectron2 scripts a loop that neither OpenVINO nor ONNX takes.
- Deformable convolutions: engines know torchvision's operator, and not Detectron2's.
"""

from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from detectron2.structures import ImageList, Instances
from torch import Tensor
from torchvision.ops import deform_conv2d

from detectors import boxes as box_ops
from detectors.images import image_size, pad_images
from detectors.keypoints import keypoints

_pad_as_detectron2_does = ImageList.from_tensors


@contextmanager
def replaced_while_tracing() -> Iterator[None]:
    """While it lasts, Detectron2's detectors are ready to be traced."""
    with ExitStack() as stack:
        for module, name, value in REPLACEMENTS:
            stack.enter_context(_replaced(import_module(f"detectron2.{module}"), name, value))
        stack.enter_context(_replaced(ImageList, "from_tensors", staticmethod(_from_tensors)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, an attribute has another value."""
    before = vars(owner)[name]  # Not getattr(), which unpacks a static method.
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _from_tensors(
    tensors: List[Tensor],
    size_divisibility: int = 0,
    pad_value: float = 0.0,
    padding_constraints: Optional[Dict[str, int]] = None,
) -> ImageList:
    constraints = padding_constraints or {}
    if pad_value != 0.0 or constraints.get("square_size", 0) > 0:
        return _pad_as_detectron2_does(tensors, size_divisibility, pad_value, padding_constraints)
    divisibility = constraints.get("size_divisibility", size_divisibility)
    return ImageList(pad_images(tensors, divisibility), [image_size(image) for image in tensors])


def _keypoint_rcnn_inference(logits: Tensor, instances: List[Instances]) -> None:
    (found,) = instances
    found.pred_keypoints = keypoints(logits, found.pred_boxes.tensor)
    found.pred_keypoint_heatmaps = logits


def _deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *groups: int,
) -> Tensor:
    return deform_conv2d(x, offset, weight, None, stride, padding, dilation)


def _modulated_deform_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *groups: int,
) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


# Module of Detectron2, name in it, what stands in.
REPLACEMENTS: Sequence[Tuple[str, str, Any]] = (
    ("layers.nms", "box_ops", box_ops),
    ("modeling.roi_heads.keypoint_head", "keypoint_rcnn_inference", _keypoint_rcnn_inference),
    ("layers.deform_conv", "deform_conv", _deform_conv),
    ("layers.deform_conv", "modulated_deform_conv", _modulated_deform_conv),
)
