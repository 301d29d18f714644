"""Two-stage detectors: Faster, Mask, Keypoint and Cascade R-CNN, inference only.

And the first stage alone, the proposal network.
"""

from typing import List, Sequence

import torch
from torch import Tensor, nn

from detectors import boxes as box_ops
from detectors.images import batch_images, image_size
from detectors.instances import Instances, Proposals
from detectors.masks import paste_masks
from detectors.rpn import RPN


class GeneralizedRCNN(nn.Module):
    """Backbone, proposals, heads.

    Args:
        backbone: N x 3 x H x W -> feature maps.
        proposal_generator: feature maps -> proposals.
        roi_heads: feature maps, proposals -> detections.
        pixel_mean, pixel_std: of each channel.
        postprocess: clip the boxes to the image, and paste the masks into it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: RPN,
        roi_heads: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        postprocess: bool = False,
    ) -> None:
        super().__init__()
        self.postprocess = postprocess
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.backbone = backbone
        self.size_divisibility: int = backbone.size_divisibility
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads

    def forward(self, images: List[Tensor]) -> List[Instances]:
        """Detects objects.

        Args:
            images: 3 x H x W float tensors in the format of the configuration, 0 to 255.
        """
        sizes = [image_size(image) for image in images]
        batch = batch_images(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        return self.instances(self.backbone(batch), sizes)

    def instances(self, features: List[Tensor], sizes: List[Tensor]) -> List[Instances]:
        """Detects objects.

        Args:
            features: of the backbone, N x C x H x W each.
            sizes: height and width of each image.
        """
        proposals = [boxes for boxes, _ in self.proposal_generator(features, sizes)]
        results = self.roi_heads(features, proposals, sizes)
        if self.postprocess:
            return [postprocess(x) for x in results]
        return results


class ProposalNetwork(nn.Module):
    """Backbone and proposals (Ren et al. 2015, https://arxiv.org/abs/1506.01497).

    There is nothing to postprocess: proposals lie within the image.

    Args: as for `GeneralizedRCNN`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        proposal_generator: RPN,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.backbone = backbone
        self.size_divisibility: int = backbone.size_divisibility
        self.proposal_generator = proposal_generator

    def forward(self, images: List[Tensor]) -> List[Proposals]:
        """Proposes boxes.

        Args:
            images: 3 x H x W float tensors in the format of the configuration, 0 to 255.
        """
        sizes = [image_size(image) for image in images]
        batch = batch_images(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        scored = self.proposal_generator(self.backbone(batch), sizes)
        proposals: List[Proposals] = []
        for size, (boxes, logits) in zip(sizes, scored):
            proposals.append(Proposals(size, boxes, logits))
        return proposals


def postprocess(result: Instances) -> Instances:
    """Clips boxes, leaves out empty ones, and pastes masks into the image."""
    boxes = box_ops.clip(result.pred_boxes, result.image_size)
    keep = box_ops.nonempty(boxes)
    boxes = boxes[keep]
    masks = result.pred_masks
    if masks is not None:
        masks = paste_masks(masks[keep][:, 0], boxes, result.image_size)
    heatmaps, keypoints = result.pred_keypoint_heatmaps, result.pred_keypoints
    return Instances(
        result.image_size,
        boxes,
        result.scores[keep],
        result.pred_classes[keep],
        masks,
        None if keypoints is None else keypoints[keep],
        None if heatmaps is None else heatmaps[keep],
    )
