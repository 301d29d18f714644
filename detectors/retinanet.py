"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002), inference only."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn

from configuration import RetinaNet as Settings
from detectors import boxes as box_ops
from detectors.images import batch_images, image_size
from detectors.instances import Instances
from detectors.layers import make_norm

# Batch norms that have statistics of their own for each level of the pyramid.
PER_LEVEL_NORMS = ("BN", "SyncBN")


class LevelBatchNorm(nn.ModuleList):
    """Batch norms, one for each level of the pyramid, that share their weight and bias.

    Detectron2's names; see Wu and Johnson 2021, https://arxiv.org/abs/2105.07576, section 5.2.
    """

    def __init__(self, num_levels: int, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels, affine=False) for _ in range(num_levels))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        return self[level](x) * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class RetinaNetHead(nn.Module):
    """Class logits and box deltas from each level of the pyramid, with shared weights.

    Args:
        channels: of each level.
        num_levels: of the pyramid.
        num_anchors: of each cell.
        config: what else is set.
    """

    def __init__(self, channels: int, num_levels: int, num_anchors: int, config: Settings) -> None:
        super().__init__()
        self.cls_subnet = self.make_subnet(channels, num_levels, config)
        self.bbox_subnet = self.make_subnet(channels, num_levels, config)
        self.cls_score = nn.Conv2d(channels, num_anchors * config.num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)

    @staticmethod
    def make_subnet(channels: int, num_levels: int, config: Settings) -> nn.Sequential:
        """Convolutions, each with what the configuration has for a norm, and a ReLU."""
        layers: List[nn.Module] = []
        for _ in range(config.num_convs):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1))
            if config.norm in PER_LEVEL_NORMS:
                layers.append(LevelBatchNorm(num_levels, channels))
            elif config.norm:
                layers.append(make_norm(config.norm, channels))
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Returns, per level, N x (A * K) x H x W logits and N x (A * 4) x H x W deltas."""
        logits: List[Tensor] = []
        anchor_deltas: List[Tensor] = []
        for feature in features:
            logits.append(self.cls_score(self.cls_subnet(feature)))
            anchor_deltas.append(self.bbox_pred(self.bbox_subnet(feature)))
        return logits, anchor_deltas


class PerLevelRetinaNetHead(RetinaNetHead):
    """One with batch norms, of which each level of the pyramid has its own."""

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """As that of `RetinaNetHead`."""
        logits: List[Tensor] = []
        anchor_deltas: List[Tensor] = []
        for level, feature in enumerate(features):
            logits.append(self.cls_score(self._hidden(self.cls_subnet, feature, level)))
            anchor_deltas.append(self.bbox_pred(self._hidden(self.bbox_subnet, feature, level)))
        return logits, anchor_deltas

    def _hidden(self, subnet: nn.Sequential, x: Tensor, level: int) -> Tensor:
        for layer in subnet:
            x = layer(x, level) if isinstance(layer, LevelBatchNorm) else layer(x)
        return x


def _probabilities(logits: Tensor) -> Tensor:
    """In the memory of the logits, but not in TorchScript: engines change nothing in place."""
    if torch.jit.is_scripting():
        return logits.sigmoid()
    return logits.sigmoid_()


def _per_anchor(prediction: Tensor, channels: int) -> Tensor:
    """N x (A * channels) x H x W to N x (H * W * A) x channels."""
    n, _, height, width = prediction.shape
    prediction = prediction.view(n, -1, channels, height, width)
    return prediction.permute(0, 3, 4, 1, 2).reshape(n, -1, channels)


class RetinaNet(nn.Module):
    """RetinaNet with Detectron2's parameter names.

    Args:
        backbone: images -> feature maps.
        in_features: places of those that are looked at.
        anchor_generator: makes the anchors of these.
        config: what else is set.
        pixel_mean, pixel_std: of each channel.
        detections_per_image: how many are kept, the best of all classes.
        postprocess: clip the boxes to the image and leave out what is empty then.
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_features: Sequence[int],
        anchor_generator: box_ops.AnchorGenerator,
        config: Settings,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        detections_per_image: int,
        postprocess: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = list(in_features)
        self.num_classes = config.num_classes
        self.score_threshold = float(config.score_thresh_test)
        self.topk_candidates = config.topk_candidates_test
        self.nms_threshold = float(config.nms_thresh_test)
        self.weights = box_ops.four(config.bbox_reg_weights)
        self.detections_per_image = detections_per_image
        self.postprocess = postprocess
        self.size_divisibility: int = backbone.size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.backbone = backbone
        self.anchor_generator = anchor_generator
        kind = PerLevelRetinaNetHead if config.norm in PER_LEVEL_NORMS else RetinaNetHead
        channels = backbone.channels[in_features[0]]
        self.head = kind(channels, len(in_features), anchor_generator.num_anchors, config)

    def forward(self, images: List[Tensor]) -> List[Instances]:
        """Detects objects.

        Args:
            images: 3 x H x W float tensors in the format of the configuration, 0 to 255.
        """
        batch = batch_images(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        features = self.backbone(batch)
        features = [features[n] for n in self.in_features]
        logits, anchor_deltas = self.head(features)
        candidates = self.candidates(features, logits, anchor_deltas, len(images))
        results: List[Instances] = []
        for n, image in enumerate(images):
            boxes, scores, classes = candidates[n]
            results.append(self.suppressed(boxes, scores, classes, image_size(image)))
        return results

    def candidates(
        self, features: List[Tensor], logits: List[Tensor], anchor_deltas: List[Tensor], images: int
    ) -> List[Tuple[Tensor, Tensor, Tensor]]:
        """Boxes, scores and classes of each image before suppression: R x 4, R, R.

        Args:
            features: per level, N x C x H x W.
            logits, anchor_deltas: of the head; the logits become probabilities.
            images: N.
        """
        anchors = self.anchor_generator(features)
        logits = [_per_anchor(x, self.num_classes) for x in logits]
        anchor_deltas = [_per_anchor(x, 4) for x in anchor_deltas]
        candidates: List[Tuple[Tensor, Tensor, Tensor]] = []
        for n in range(images):
            scores = [_probabilities(x[n]) for x in logits]
            deltas = [x[n] for x in anchor_deltas]
            candidates.append(self.candidates_of_image(anchors, scores, deltas))
        return candidates

    def candidates_of_image(
        self, anchors: List[Tensor], scores: List[Tensor], deltas: List[Tensor]
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Thresholds and decodes the predictions of one image.

        Args:
            anchors, scores, deltas: per level, R x 4, R x K (probabilities), R x 4.
        """
        all_boxes: List[Tensor] = []
        all_scores: List[Tensor] = []
        all_classes: List[Tensor] = []
        for level, level_scores in enumerate(scores):
            candidates = level_scores > self.score_threshold
            top_scores, order = box_ops.topk(level_scores[candidates], self.topk_candidates)
            anchor_index, class_index = candidates.nonzero()[order].unbind(1)
            all_boxes.append(
                box_ops.apply_deltas(
                    deltas[level][anchor_index], anchors[level][anchor_index], self.weights
                )
            )
            all_scores.append(top_scores)
            all_classes.append(class_index)
        return torch.cat(all_boxes), torch.cat(all_scores), torch.cat(all_classes)

    def suppressed(self, boxes: Tensor, top: Tensor, classes: Tensor, size: Tensor) -> Instances:
        """What is left of the candidates of one image, whose height and width `size` has."""
        keep = box_ops.batched_nms(boxes, top, classes, self.nms_threshold)
        keep = keep[: self.detections_per_image]
        boxes, top, classes = boxes[keep], top[keep], classes[keep]
        if self.postprocess:
            boxes = box_ops.clip(boxes, size)
            keep = box_ops.nonempty(boxes)
            boxes, top, classes = boxes[keep], top[keep], classes[keep]
        return Instances(size, boxes, top, classes, None)
