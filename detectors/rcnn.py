"""Two-stage detectors: Mask R-CNN on FPN and on C4 features, Cascade Mask R-CNN."""

from typing import List

import torch
from torch import Tensor, nn

from detectors import boxes as box_ops
from detectors.backbone import FPN, ResNet50C4
from detectors.images import batch_images, image_size
from detectors.instances import Instances
from detectors.masks import paste_masks
from detectors.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectors.rpn import RPN


class GeneralizedRCNN(nn.Module):
    """Backbone, proposals, heads.

    Args:
        backbone: N x 3 x H x W -> feature maps.
        proposal_generator: feature maps -> proposals.
        roi_heads: feature maps, proposals -> detections.
        postprocess: paste the masks into the image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: RPN,
        roi_heads: nn.Module,
        postprocess: bool = False,
    ) -> None:
        super().__init__()
        self.postprocess = postprocess
        self.register_buffer(
            "pixel_mean", torch.tensor([103.530, 116.280, 123.675]).view(-1, 1, 1), False
        )
        self.register_buffer("pixel_std", torch.ones(3, 1, 1), False)
        self.backbone = backbone
        self.size_divisibility: int = backbone.size_divisibility
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads

    def forward(self, images: List[Tensor]) -> List[Instances]:
        """Detects objects.

        Args:
            images: 3 x H x W float tensors, BGR, 0 to 255.
        """
        sizes = [image_size(image) for image in images]
        batch = batch_images(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        features = self.backbone(batch)
        proposals = self.proposal_generator(features, sizes)
        results = self.roi_heads(features, proposals, sizes)
        if self.postprocess:
            return [postprocess(x) for x in results]
        return results


def postprocess(result: Instances) -> Instances:
    """Clips boxes, leaves out empty ones, and pastes masks into the image."""
    boxes = box_ops.clip(result.pred_boxes, result.image_size)
    keep = box_ops.nonempty(boxes)
    boxes = boxes[keep]
    masks = result.pred_masks
    if masks is not None:
        masks = paste_masks(masks[keep][:, 0], boxes, result.image_size)
    return Instances(
        result.image_size, boxes, result.scores[keep], result.pred_classes[keep], masks
    )


def _pyramid_rpn() -> RPN:
    anchors = box_ops.AnchorGenerator(
        [[32], [64], [128], [256], [512]], (0.5, 1.0, 2.0), (4, 8, 16, 32, 64)
    )
    return RPN(256, anchors, pre_nms_topk=1000)


def mask_rcnn_fpn(postprocess: bool = False) -> GeneralizedRCNN:
    """Mask R-CNN R50-FPN."""
    return GeneralizedRCNN(FPN(), _pyramid_rpn(), StandardROIHeads(), postprocess)


def cascade_rcnn(postprocess: bool = False) -> GeneralizedRCNN:
    """Cascade Mask R-CNN R50-FPN."""
    return GeneralizedRCNN(FPN(), _pyramid_rpn(), CascadeROIHeads(), postprocess)


def mask_rcnn_c4(postprocess: bool = False) -> GeneralizedRCNN:
    """Mask R-CNN R50-C4."""
    anchors = box_ops.AnchorGenerator([[32, 64, 128, 256, 512]], (0.5, 1.0, 2.0), (16,))
    rpn = RPN(1024, anchors, pre_nms_topk=6000)
    return GeneralizedRCNN(ResNet50C4(), rpn, Res5ROIHeads(), postprocess)
