"""What a detector finds in one image."""

from typing import List, NamedTuple, Optional

from torch import Tensor


class Instances(NamedTuple):
    """Detections in one image, best score first.

    Attributes:
        image_size: int64 [H, W].
        pred_boxes: N x 4, corners x0, y0, x1, y1 in pixels.
        scores: N, 0 to 1.
        pred_classes: N, int64, 0 to 79.
        pred_masks: None, or N x 1 x M x M probabilities within each box, or, pasted into the
            image, N x H x W bool.
    """

    image_size: Tensor
    pred_boxes: Tensor
    scores: Tensor
    pred_classes: Tensor
    pred_masks: Optional[Tensor]


def flatten(instances: Instances) -> List[Tensor]:
    """The tensors of one image in the order of Detectron2's `TracingAdapter`.

    That is by field name, image size last: `pred_boxes`, `pred_classes`, `pred_masks` (if there
    are any), `scores`, `image_size`.
    """
    tensors = [instances.pred_boxes, instances.pred_classes]
    masks = instances.pred_masks
    if masks is not None:
        tensors.append(masks)
    return tensors + [instances.scores, instances.image_size]
