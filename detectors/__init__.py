"""Bundled Detectron2-compatible detectors, inference only.

Each has the parameter names and shapes of its Detectron2 counterpart and computes the same: the
model-zoo configurations are the ones that `ARCHITECTURES` names.
"""

from typing import Callable, Dict

from torch import nn

from detectors.rcnn import cascade_rcnn, mask_rcnn_c4, mask_rcnn_fpn
from detectors.retinanet import RetinaNet

ARCHITECTURES: Dict[str, Callable[[bool], nn.Module]] = {
    "COCO-Detection/retinanet_R_50_FPN_3x": RetinaNet,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": mask_rcnn_fpn,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": mask_rcnn_c4,
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": cascade_rcnn,
}


def build(config: str, postprocess: bool) -> nn.Module:
    """The detector of a model-zoo configuration, in eval mode, with untrained weights.

    Args:
        config: a key of `ARCHITECTURES`.
        postprocess: clip the boxes to the image and paste the masks into it.
    """
    return ARCHITECTURES[config](postprocess).eval()
