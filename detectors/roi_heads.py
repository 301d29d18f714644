"""What happens to each proposal: classes, boxes, masks.

The heads of Mask R-CNN (He et al. 2017, https://arxiv.org/abs/1703.06870) on a pyramid and on C4
features, and of Cascade R-CNN (Cai and Vasconcelos 2018, https://arxiv.org/abs/1712.00726).
"""

from collections import OrderedDict
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import Final

from detectors import boxes as box_ops
from detectors.instances import Instances
from detectors.layers import res_stage

NUM_CLASSES = 80


class ROIPooler(nn.Module):
    """ROI align on the pyramid level that fits the size of each box.

    Args:
        output_size: P; regions are pooled to P x P.
        strides: of the feature maps that are given to `forward`, finest first.
    """

    # A box of 224 x 224 pixels is pooled from level 4 (equation 1 of the FPN paper).
    canonical_box_size: Final[int] = 224
    canonical_level: Final[int] = 4

    def __init__(self, output_size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.output_size = output_size
        self.scales = [1.0 / stride for stride in strides]
        self.min_level = strides[0].bit_length() - 1
        self.max_level = strides[-1].bit_length() - 1

    def forward(self, features: List[Tensor], boxes: List[Tensor]) -> Tensor:
        """Pools regions.

        Args:
            features: per level, N x C x H x W.
            boxes: per image, R x 4.

        Returns:
            M x C x P x P, the regions of all images one after the other.
        """
        indexed: List[Tensor] = []
        for n, image_boxes in enumerate(boxes):
            indexed.append(torch.cat([torch.full_like(image_boxes[:, :1], n), image_boxes], dim=1))
        rois = torch.cat(indexed)
        if len(self.scales) == 1:
            return self._align(features[0], rois, self.scales[0])
        levels = self._levels(torch.cat(boxes))
        pooled = torch.zeros(
            [rois.shape[0], features[0].shape[1], self.output_size, self.output_size],
            dtype=features[0].dtype,
            device=features[0].device,
        )
        for level, scale in enumerate(self.scales):
            (index,) = (levels == level).nonzero().unbind(1)
            pooled.index_put_([index], self._align(features[level], rois[index], scale))
        return pooled

    def _align(self, feature: Tensor, rois: Tensor, scale: float) -> Tensor:
        # The coordinates stay float32: bfloat16 would move a corner at x = 600 by up to 2 pixels.
        # The operator and not torchvision.ops.roi_align, whose checks make the tracer warn.
        # 0 samples: as many as a region has cells; aligned: pixel centers, not corners.
        pooled = torch.ops.torchvision.roi_align(
            feature.to(rois.dtype), rois, scale, self.output_size, self.output_size, 0, True
        )
        return pooled.to(feature.dtype)

    def _levels(self, boxes: Tensor) -> Tensor:
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        sizes = torch.sqrt(areas) / self.canonical_box_size
        levels = torch.floor(self.canonical_level + torch.log2(sizes + 1e-8))
        return levels.clamp(self.min_level, self.max_level).to(torch.int64) - self.min_level


class BoxHead(nn.Module):
    """Two fully connected layers. M x 256 x 7 x 7 in, M x 1024 out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(256 * 7 * 7, 1024)
        self.fc2 = nn.Linear(1024, 1024)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.fc1(x.flatten(1)))
        return F.relu_(self.fc2(x))


class BoxPredictor(nn.Module):
    """Class logits (background last) and box deltas of each region.

    Args:
        in_channels: of the region's feature vector.
        num_regressed: 80 sets of deltas, one for each class, or 1 for all of them.
        weights: what the deltas were multiplied by in training.
    """

    def __init__(
        self,
        in_channels: int,
        num_regressed: int,
        weights: Tuple[float, float, float, float],
    ) -> None:
        super().__init__()
        self.weights = weights
        self.cls_score = nn.Linear(in_channels, NUM_CLASSES + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_regressed)

    def forward(self, features: Tensor, boxes: Tensor) -> Tuple[Tensor, Tensor]:
        """Returns M x 81 probabilities and M x 4k boxes."""
        probabilities = F.softmax(self.cls_score(features), dim=-1)
        return probabilities, box_ops.apply_deltas(self.bbox_pred(features), boxes, self.weights)


def detections_of_image(
    boxes: Tensor,
    scores: Tensor,
    size: Tensor,
    class_agnostic: bool,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    limit: int = 100,
) -> Instances:
    """Thresholds and suppresses the predictions of one image.

    Args:
        boxes: R x 4k, k = 80 or, where they are class-agnostic, 1.
        scores: R x 81, background last.
        size: height and width of the image.
        class_agnostic: whether all classes share one box.
        score_threshold: detections score more than this.
        nms_threshold: IoU above which the lower score of a class is suppressed.
        limit: of detections, the best of all classes.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    candidates = (scores > score_threshold) & finite[:, None]
    region, classes = candidates.nonzero().unbind(1)
    boxes = box_ops.clip(boxes.reshape(boxes.shape[0], -1, 4), size)
    boxes = boxes[region, 0] if class_agnostic else boxes[candidates]
    scores = scores[candidates]
    keep = box_ops.batched_nms(boxes, scores, classes, nms_threshold)[:limit]
    return Instances(size, boxes[keep], scores[keep], classes[keep], None)


def split_like(values: Tensor, proposals: List[Tensor]) -> List[Tensor]:
    """Divides the rows of all images' regions among the images."""
    parts: List[Tensor] = []
    start = 0
    for regions in proposals:
        end = start + regions.shape[0]
        parts.append(values[start:end])
        start = end
    return parts


def detections_of_images(
    boxes: Tensor,
    scores: Tensor,
    proposals: List[Tensor],
    sizes: List[Tensor],
    class_agnostic: bool = False,
) -> List[Instances]:
    """The detections of each image from the predictions for the regions of all images."""
    image_boxes = split_like(boxes, proposals)
    image_scores = split_like(scores, proposals)
    results: List[Instances] = []
    for n, size in enumerate(sizes):
        results.append(detections_of_image(image_boxes[n], image_scores[n], size, class_agnostic))
    return results


class MaskHead(nn.Sequential):
    """Convolutions, a transposed one that doubles the resolution, and a mask for each class.

    Args:
        in_channels: of the pooled regions.
        num_convs: 3x3 convolutions before the transposed one.
    """

    def __init__(self, in_channels: int, num_convs: int) -> None:
        layers: Dict[str, nn.Module] = OrderedDict()
        for n in range(num_convs):
            layers[f"mask_fcn{n + 1}"] = nn.Conv2d(in_channels, 256, 3, padding=1)
            layers[f"mask_fcn_relu{n + 1}"] = nn.ReLU()
            in_channels = 256
        layers["deconv"] = nn.ConvTranspose2d(in_channels, 256, 2, stride=2)
        layers["deconv_relu"] = nn.ReLU()
        layers["predictor"] = nn.Conv2d(256, NUM_CLASSES, 1)
        super().__init__(layers)

    def probabilities(self, x: Tensor, classes: Tensor) -> Tensor:
        """Returns M x 1 x 2P x 2P probabilities, each of the mask of its region's class.

        Args:
            x: M x C x P x P pooled regions.
            classes: M, int64.
        """
        logits = self(x)
        index = torch.arange(logits.shape[0], device=logits.device)
        return logits[index, classes][:, None].sigmoid()


def with_masks(results: List[Instances], masks: Tensor) -> List[Instances]:
    """Gives each image its part of the masks of all images."""
    parts = split_like(masks, [x.pred_boxes for x in results])
    given: List[Instances] = []
    for n, x in enumerate(results):
        given.append(Instances(x.image_size, x.pred_boxes, x.scores, x.pred_classes, parts[n]))
    return given


class StandardROIHeads(nn.Module):
    """Box and mask heads on a pyramid [p2, p3, p4, p5, ...] of 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.box_pooler = ROIPooler(7, (4, 8, 16, 32))
        self.box_head = BoxHead()
        self.box_predictor = BoxPredictor(1024, NUM_CLASSES, (10.0, 10.0, 5.0, 5.0))
        self.mask_pooler = ROIPooler(14, (4, 8, 16, 32))
        self.mask_head = MaskHead(256, 4)

    def forward(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """Returns the detections of each image.

        Args:
            features: per level, N x 256 x H x W.
            proposals: per image, R x 4.
            sizes: height and width of each image.
        """
        results = self.boxes(features[:4], proposals, sizes)
        pooled = self.mask_pooler(features[:4], [x.pred_boxes for x in results])
        classes = torch.cat([x.pred_classes for x in results])
        return with_masks(results, self.mask_head.probabilities(pooled, classes))

    def boxes(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """The detections of each image, without masks."""
        hidden = self.box_head(self.box_pooler(features, proposals))
        scores, boxes = self.box_predictor(hidden, torch.cat(proposals))
        return detections_of_images(boxes, scores, proposals, sizes)


class CascadeROIHeads(StandardROIHeads):
    """Three box heads, each refining the boxes of the one before; scores are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.box_head = nn.ModuleList([BoxHead() for _ in range(3)])
        self.box_predictor = nn.ModuleList(
            [
                BoxPredictor(1024, 1, (10.0, 10.0, 5.0, 5.0)),
                BoxPredictor(1024, 1, (20.0, 20.0, 10.0, 10.0)),
                BoxPredictor(1024, 1, (30.0, 30.0, 15.0, 15.0)),
            ]
        )

    def boxes(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """The detections of each image, without masks."""
        total = torch.zeros(1)
        boxes = torch.cat(proposals)
        regions = proposals
        for stage, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor)):
            if stage > 0:
                regions = split_like(boxes, proposals)
                regions = [box_ops.clip(x, size) for x, size in zip(regions, sizes)]
            hidden = head(self.box_pooler(features, regions))
            scores, boxes = predictor(hidden, torch.cat(regions))
            total = scores if stage == 0 else total + scores
        return detections_of_images(boxes, total * (1.0 / 3), proposals, sizes, class_agnostic=True)


class Res5ROIHeads(nn.Module):
    """Box and mask heads on C4 features that run the last stage of the ResNet per region."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = ROIPooler(14, (16,))
        self.res5 = res_stage(1024, 512, 3, 2)
        self.box_predictor = BoxPredictor(2048, NUM_CLASSES, (10.0, 10.0, 5.0, 5.0))
        self.mask_head = MaskHead(2048, 0)

    def forward(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """Returns the detections of each image; arguments as for `StandardROIHeads`."""
        hidden = self.res5(self.pooler(features, proposals)).mean(dim=[2, 3])
        scores, boxes = self.box_predictor(hidden, torch.cat(proposals))
        results = detections_of_images(boxes, scores, proposals, sizes)
        pooled = self.res5(self.pooler(features, [x.pred_boxes for x in results]))
        classes = torch.cat([x.pred_classes for x in results])
        return with_masks(results, self.mask_head.probabilities(pooled, classes))
