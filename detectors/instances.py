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
        pred_keypoints: None, or N x K x 3: x and y in pixels, and a score.
        pred_keypoint_heatmaps: None, or N x K x S x S logits within each box.
    """

    image_size: Tensor
    pred_boxes: Tensor
    scores: Tensor
    pred_classes: Tensor
    pred_masks: Optional[Tensor]
    pred_keypoints: Optional[Tensor] = None
    pred_keypoint_heatmaps: Optional[Tensor] = None


def flatten(instances: Instances) -> List[Tensor]:
    """The tensors of one image in the order of Detectron2's `TracingAdapter`.

    That is by field name, image size last, without those that there are not: see
    `detectors.config.fields`.
    """
    tensors = [instances.pred_boxes, instances.pred_classes]
    heatmaps, keypoints = instances.pred_keypoint_heatmaps, instances.pred_keypoints
    if heatmaps is not None and keypoints is not None:
        tensors += [heatmaps, keypoints]
    masks = instances.pred_masks
    if masks is not None:
        tensors.append(masks)
    return tensors + [instances.scores, instances.image_size]
