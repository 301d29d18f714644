"""From the name of a Detectron2 model-zoo configuration to a network."""

from contextlib import contextmanager
from typing import Callable, Dict, Iterator

from torch import nn

from detectors.rcnn import cascade_rcnn, mask_rcnn_c4, mask_rcnn_fpn
from detectors.retinanet import RetinaNet

ARCHITECTURES: Dict[str, Callable[[bool], nn.Module]] = {
    "COCO-Detection/retinanet_R_50_FPN_3x": RetinaNet,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": mask_rcnn_fpn,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": mask_rcnn_c4,
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": cascade_rcnn,
}


def build_detector(config: str, postprocess: bool, initialize: bool = True) -> nn.Module:
    """The detector of a model-zoo configuration, in eval mode, with untrained weights.

    Args:
        config: a key of `ARCHITECTURES`.
        postprocess: clip the boxes to the image and paste the masks into it.
        initialize: give the parameters PyTorch's random values. Where all of them are overwritten
            anyway, False saves nine tenths of the time: they hold whatever the memory holds.
    """
    if initialize:
        return ARCHITECTURES[config](postprocess).eval()
    with _uninitialized():
        return ARCHITECTURES[config](postprocess).eval()


@contextmanager
def _uninitialized() -> Iterator[None]:
    """While it lasts, new layers leave their parameters as the memory was."""
    # Not the device "meta": the anchors and the mean pixel, which no checkpoint has, would be lost.
    kept = {kind: kind.reset_parameters for kind in (nn.modules.conv._ConvNd, nn.Linear)}
    try:
        for kind in kept:
            kind.reset_parameters = lambda layer: None
        yield
    finally:
        for kind, initialize in kept.items():
            kind.reset_parameters = initialize
