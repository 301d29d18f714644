"""What happens to each proposal: classes, boxes, masks, keypoints.

The heads of Mask R-CNN (He et al. 2017, https://arxiv.org/abs/1703.06870) on a pyramid and on C4
features, and of Cascade R-CNN (Cai and Vasconcelos 2018, https://arxiv.org/abs/1712.00726).
"""

from collections import OrderedDict
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import Final

from configuration import ROIBoxHead, ROIMaskHead
from detectors import boxes as box_ops
from detectors.instances import Instances
from detectors.keypoints import KeypointHead, keypoints
from detectors.layers import Conv2d


class Selection(NamedTuple):
    """Which of the predictions are detections.

    Attributes:
        score_threshold: detections score more than this.
        nms_threshold: IoU above which the lower score of a class is suppressed.
        limit: of detections in an image, the best of all classes.
    """

    score_threshold: float
    nms_threshold: float
    limit: int


class ROIPooler(nn.Module):
    """Pools regions, each on the pyramid level that fits the size of its box.

    Args:
        output_size: P; regions are pooled to P x P.
        strides: of the feature maps that are given to `forward`, finest first.
        kind: `ROIAlignV2`, `ROIAlign` (half a pixel off) or `ROIPool`.
        sampling_ratio: samples in each direction of a cell, 0 for as many as it has pixels.
    """

    # A box of 224 x 224 pixels is pooled from level 4 (equation 1 of the FPN paper).
    canonical_box_size: Final[int] = 224
    canonical_level: Final[int] = 4

    def __init__(
        self,
        output_size: int,
        strides: Sequence[int],
        kind: str = "ROIAlignV2",
        sampling_ratio: int = 0,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.scales = [1.0 / stride for stride in strides]
        self.min_level = strides[0].bit_length() - 1
        self.max_level = strides[-1].bit_length() - 1
        self.is_max = kind == "ROIPool"
        self.aligned = kind == "ROIAlignV2"
        self.sampling_ratio = sampling_ratio

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
            return self._pool(features[0], rois, self.scales[0])
        levels = self._levels(torch.cat(boxes))
        pooled = torch.zeros(
            [rois.shape[0], features[0].shape[1], self.output_size, self.output_size],
            dtype=features[0].dtype,
            device=features[0].device,
        )
        for level, scale in enumerate(self.scales):
            (index,) = (levels == level).nonzero().unbind(1)
            pooled.index_put_([index], self._pool(features[level], rois[index], scale))
        return pooled

    def _pool(self, feature: Tensor, rois: Tensor, scale: float) -> Tensor:
        # The coordinates stay float32: bfloat16 would move a corner at x = 600 by up to 2 pixels.
        feature, dtype = feature.to(rois.dtype), feature.dtype
        # The operators and not torchvision.ops.roi_align, whose checks make the tracer warn.
        size = self.output_size
        if self.is_max:
            return torch.ops.torchvision.roi_pool(feature, rois, scale, size, size)[0].to(dtype)
        # Aligned: pixel centers, not corners.
        pooled = torch.ops.torchvision.roi_align(
            feature, rois, scale, size, size, self.sampling_ratio, self.aligned
        )
        return pooled.to(dtype)

    def _levels(self, boxes: Tensor) -> Tensor:
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        sizes = torch.sqrt(areas) / self.canonical_box_size
        levels = torch.floor(self.canonical_level + torch.log2(sizes + 1e-8))
        return levels.clamp(self.min_level, self.max_level).to(torch.int64) - self.min_level


class BoxHead(nn.Sequential):
    """Convolutions and fully connected layers. M x C x P x P in, M x D out.

    Without any fully connected layer, M x C x P x P out.

    Args:
        in_channels: of the pooled regions.
        config: what is set for it.

    Attributes:
        features: D, or C * P * P.
    """

    def __init__(self, in_channels: int, config: ROIBoxHead) -> None:
        layers: Dict[str, nn.Module] = OrderedDict()
        for n in range(1, config.num_conv + 1):
            layers[f"conv{n}"] = Conv2d(in_channels, config.conv_dim, 3, norm=config.norm)
            layers[f"conv_relu{n}"] = nn.ReLU(inplace=True)
            in_channels = config.conv_dim
        features = in_channels * config.pooler_resolution**2
        for n in range(1, config.num_fc + 1):
            if n == 1:
                layers["flatten"] = nn.Flatten()
            layers[f"fc{n}"] = nn.Linear(features, config.fc_dim)
            layers[f"fc_relu{n}"] = nn.ReLU(inplace=True)
            features = config.fc_dim
        super().__init__(layers)
        self.features = features


class BoxPredictor(nn.Module):
    """Class logits (background last) and box deltas of each region.

    Args:
        in_features: of the region's feature vector.
        num_classes: K.
        class_agnostic: whether there is one set of deltas for all classes.
        weights: what the deltas were multiplied by in training.
        by_sigmoid: whether each class has a probability of its own.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        class_agnostic: bool,
        weights: Sequence[float],
        by_sigmoid: bool = False,
    ) -> None:
        super().__init__()
        self.weights = box_ops.four(weights)
        self.by_sigmoid = by_sigmoid
        self.class_agnostic = class_agnostic
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (1 if class_agnostic else num_classes))

    def forward(self, features: Tensor, boxes: Tensor) -> Tuple[Tensor, Tensor]:
        """Returns M x (K + 1) probabilities and M x 4k boxes, k = K or 1.

        Args:
            features: M x D, or what flattens to it.
            boxes: M x 4.
        """
        logits, deltas = self.predictions(features)
        return self.decoded(logits, deltas, boxes)

    def predictions(self, features: Tensor) -> Tuple[Tensor, Tensor]:
        """Returns M x (K + 1) logits and M x 4k deltas; `features` as for `forward`."""
        features = features.flatten(1)
        return self.cls_score(features), self.bbox_pred(features)

    def decoded(self, logits: Tensor, deltas: Tensor, boxes: Tensor) -> Tuple[Tensor, Tensor]:
        """What `forward` returns, from `predictions`."""
        scores = logits.sigmoid() if self.by_sigmoid else F.softmax(logits, dim=-1)
        return scores, box_ops.apply_deltas(deltas, boxes, self.weights)


def candidates_of_image(
    boxes: Tensor, scores: Tensor, size: Tensor, class_agnostic: bool, selection: Selection
) -> Tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes of one image before suppression: C x 4, C, C.

    Args:
        boxes: R x 4k, k = K or, where they are class-agnostic, 1.
        scores: R x (K + 1), background last.
        size: height and width of the image.
        class_agnostic: whether all classes share one box.
        selection: what is a detection.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    candidates = (scores > selection.score_threshold) & finite[:, None]
    region, classes = candidates.nonzero().unbind(1)
    # Not -1: of no regions, it could be any number.
    boxes = box_ops.clip(boxes.reshape(-1, boxes.shape[1] // 4, 4), size)
    boxes = boxes[region, 0] if class_agnostic else boxes[candidates]
    return boxes, scores[candidates], classes


def suppressed(
    boxes: Tensor, scores: Tensor, classes: Tensor, size: Tensor, selection: Selection
) -> Instances:
    """What is left of the candidates of one image, whose height and width `size` has."""
    keep = box_ops.batched_nms(boxes, scores, classes, selection.nms_threshold)
    keep = keep[: selection.limit]
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


def candidates_of_images(
    boxes: Tensor,
    scores: Tensor,
    proposals: List[Tensor],
    sizes: List[Tensor],
    class_agnostic: bool,
    selection: Selection,
) -> List[Tuple[Tensor, Tensor, Tensor]]:
    """The candidates of each image from the predictions for the regions of all images."""
    image_boxes = split_like(boxes, proposals)
    image_scores = split_like(scores, proposals)
    candidates: List[Tuple[Tensor, Tensor, Tensor]] = []
    for n, size in enumerate(sizes):
        candidates.append(
            candidates_of_image(image_boxes[n], image_scores[n], size, class_agnostic, selection)
        )
    return candidates


def detections_of_images(
    boxes: Tensor,
    scores: Tensor,
    proposals: List[Tensor],
    sizes: List[Tensor],
    class_agnostic: bool,
    selection: Selection,
) -> List[Instances]:
    """The detections of each image from the predictions for the regions of all images."""
    candidates = candidates_of_images(boxes, scores, proposals, sizes, class_agnostic, selection)
    results: List[Instances] = []
    for n, size in enumerate(sizes):
        own_boxes, own_scores, classes = candidates[n]
        results.append(suppressed(own_boxes, own_scores, classes, size, selection))
    return results


class MaskHead(nn.Sequential):
    """Convolutions, a transposed one that doubles the resolution, and a mask for each class.

    Args:
        in_channels: of the pooled regions.
        num_classes: of masks, 1 where all classes share one.
        config: what is set for it.
    """

    def __init__(self, in_channels: int, num_classes: int, config: ROIMaskHead) -> None:
        layers: Dict[str, nn.Module] = OrderedDict()
        for n in range(1, config.num_conv + 1):
            layers[f"mask_fcn{n}"] = Conv2d(in_channels, config.conv_dim, 3, norm=config.norm)
            layers[f"mask_fcn_relu{n}"] = nn.ReLU()
            in_channels = config.conv_dim
        layers["deconv"] = nn.ConvTranspose2d(in_channels, config.conv_dim, 2, stride=2)
        layers["deconv_relu"] = nn.ReLU()
        layers["predictor"] = nn.Conv2d(config.conv_dim, num_classes, 1)
        super().__init__(layers)
        self.class_agnostic = num_classes == 1

    def probabilities(self, x: Tensor, classes: Tensor) -> Tensor:
        """Returns M x 1 x 2P x 2P probabilities, each of the mask of its region's class.

        Args:
            x: M x C x P x P pooled regions.
            classes: M, int64.
        """
        logits = self(x)
        if self.class_agnostic:
            return logits.sigmoid()
        index = torch.arange(logits.shape[0], device=logits.device)
        return logits[index, classes][:, None].sigmoid()


def with_masks(results: List[Instances], masks: Tensor) -> List[Instances]:
    """Gives each image its part of the masks of all images."""
    parts = split_like(masks, [x.pred_boxes for x in results])
    given: List[Instances] = []
    for n, x in enumerate(results):
        given.append(Instances(x.image_size, x.pred_boxes, x.scores, x.pred_classes, parts[n]))
    return given


def with_keypoints(results: List[Instances], heatmaps: Tensor) -> List[Instances]:
    """Gives each image its part of the heatmaps of all images, and the keypoints in it."""
    parts = split_like(heatmaps, [x.pred_boxes for x in results])
    given: List[Instances] = []
    for n, x in enumerate(results):
        given.append(
            Instances(
                x.image_size,
                x.pred_boxes,
                x.scores,
                x.pred_classes,
                x.pred_masks,
                keypoints(parts[n], x.pred_boxes),
                parts[n],
            )
        )
    return given


class StandardROIHeads(nn.Module):
    """Box, mask and keypoint heads, each of which pools regions of the backbone's features.

    Args:
        in_features: places of the feature maps that regions are pooled from.
        box_pooler, box_head, box_predictor: see there; those of a cascade are lists.
        selection: what is a detection.
        mask_pooler, mask_head: see there; None where there are no masks.
        keypoint_pooler, keypoint_head: likewise.
    """

    selection: Selection  # TorchScript would take it for a bare tuple.

    def __init__(
        self,
        in_features: Sequence[int],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        selection: Selection,
        mask_pooler: Optional[ROIPooler] = None,
        mask_head: Optional[MaskHead] = None,
        keypoint_pooler: Optional[ROIPooler] = None,
        keypoint_head: Optional[KeypointHead] = None,
    ) -> None:
        super().__init__()
        self.in_features = list(in_features)
        self.selection = selection
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.keypoint_pooler = keypoint_pooler
        self.keypoint_head = keypoint_head

    def forward(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """Returns the detections of each image.

        Args:
            features: of the backbone, N x C x H x W each.
            proposals: per image, R x 4.
            sizes: height and width of each image.
        """
        features = [features[n] for n in self.in_features]
        results = self.boxes(features, proposals, sizes)
        boxes = [x.pred_boxes for x in results]
        if self.mask_head is not None:
            pooled = self.mask_pooler(features, boxes)
            classes = torch.cat([x.pred_classes for x in results])
            results = with_masks(results, self.mask_head.probabilities(pooled, classes))
        if self.keypoint_head is not None:
            results = with_keypoints(
                results, self.keypoint_head(self.keypoint_pooler(features, boxes))
            )
        return results

    def boxes(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """The detections of each image, boxes only, from the features that are pooled."""
        hidden = self.box_head(self.box_pooler(features, proposals))
        scores, boxes = self.box_predictor(hidden, torch.cat(proposals))
        class_agnostic = self.box_predictor.class_agnostic
        return detections_of_images(boxes, scores, proposals, sizes, class_agnostic, self.selection)


class CascadeROIHeads(StandardROIHeads):
    """Several box heads, each refining the boxes of the one before; scores are averaged."""

    def boxes(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """The detections of each image, boxes only, from the features that are pooled."""
        total = torch.zeros(1)
        boxes = torch.cat(proposals)
        regions = proposals
        for stage, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor)):
            if stage > 0:
                regions = split_like(boxes, proposals)
                regions = [box_ops.clip(x, size) for x, size in zip(regions, sizes)]
            # torchvision reads outside of the features at what is no number, and may crash.
            numbers = [torch.where(torch.isfinite(x), x, torch.zeros_like(x)) for x in regions]
            hidden = head(self.box_pooler(features, numbers))
            scores, boxes = predictor(hidden, torch.cat(regions))
            total = scores if stage == 0 else total + scores
        scores = total * (1.0 / len(self.box_head))
        return detections_of_images(boxes, scores, proposals, sizes, True, self.selection)


class Res5ROIHeads(nn.Module):
    """Box and mask heads on C4 features that run the last stage of the ResNet per region.

    Args:
        in_features: the place of the feature map that regions are pooled from.
        pooler, box_predictor, selection, mask_head: as for `StandardROIHeads`.
        res5: the stage.
    """

    selection: Selection

    def __init__(
        self,
        in_features: Sequence[int],
        pooler: ROIPooler,
        res5: nn.Sequential,
        box_predictor: BoxPredictor,
        selection: Selection,
        mask_head: Optional[MaskHead] = None,
    ) -> None:
        super().__init__()
        self.in_features = list(in_features)
        self.selection = selection
        self.pooler = pooler
        self.res5 = res5
        self.box_predictor = box_predictor
        self.mask_head = mask_head

    def forward(
        self, features: List[Tensor], proposals: List[Tensor], sizes: List[Tensor]
    ) -> List[Instances]:
        """Returns the detections of each image; arguments as for `StandardROIHeads`."""
        features = [features[n] for n in self.in_features]
        hidden = self.res5(self.pooler(features, proposals)).mean(dim=[2, 3])
        scores, boxes = self.box_predictor(hidden, torch.cat(proposals))
        class_agnostic = self.box_predictor.class_agnostic
        results = detections_of_images(
            boxes, scores, proposals, sizes, class_agnostic, self.selection
        )
        if self.mask_head is None:
            return results
        pooled = self.res5(self.pooler(features, [x.pred_boxes for x in results]))
        classes = torch.cat([x.pred_classes for x in results])
        return with_masks(results, self.mask_head.probabilities(pooled, classes))
