"""What a detector finds in one image."""

from typing import List, NamedTuple, Optional, Union

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


class Proposals(NamedTuple):
    """Where objects may be in one image, the best first.

    Attributes:
        image_size: int64 [H, W].
        proposal_boxes: R x 4, corners x0, y0, x1, y1 in pixels.
        objectness_logits: R.
    """

    image_size: Tensor
    proposal_boxes: Tensor
    objectness_logits: Tensor


class Segmentation(NamedTuple):
    """What each pixel of one image belongs to.

    Attributes:
        sem_seg: K x H x W logits of the classes.
    """

    sem_seg: Tensor


class Panorama(NamedTuple):
    """Things, and what each pixel of one image belongs to.

    Attributes:
        instances: the things.
        sem_seg: as of `Segmentation`; class 0 are all things.
    """

    instances: Instances
    sem_seg: Tensor


def flatten(found: Union[Instances, Proposals, Segmentation, Panorama]) -> List[Tensor]:
    """The tensors of one image in the order of Detectron2's `TracingAdapter`.

    That is by field name, image size last, without those that there are not: see
    `detectors.config.fields`.
    """
    if isinstance(found, Panorama):
        return [*_of_instances(found.instances), found.sem_seg]
    if isinstance(found, Segmentation):
        return [found.sem_seg]
    if isinstance(found, Proposals):
        return [found.objectness_logits, found.proposal_boxes, found.image_size]
    return _of_instances(found)


def _of_instances(instances: Instances) -> List[Tensor]:
    tensors = [instances.pred_boxes, instances.pred_classes]
    heatmaps, keypoints = instances.pred_keypoint_heatmaps, instances.pred_keypoints
    if heatmaps is not None and keypoints is not None:
        tensors += [heatmaps, keypoints]
    masks = instances.pred_masks
    if masks is not None:
        tensors.append(masks)
    return tensors + [instances.scores, instances.image_size]
