"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002), inference only."""

from typing import List, Tuple

import torch
from torch import Tensor, nn
from torch.jit import Final

from detectors import boxes as box_ops
from detectors.backbone import RetinaNetFPN
from detectors.images import batch_images, image_size
from detectors.instances import Instances

NUM_CLASSES = 80


def _subnet() -> nn.Sequential:
    layers: List[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class RetinaNetHead(nn.Module):
    """Class logits and box deltas from each level of the pyramid, with shared weights."""

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.cls_subnet = _subnet()
        self.bbox_subnet = _subnet()
        self.cls_score = nn.Conv2d(256, num_anchors * NUM_CLASSES, 3, padding=1)
        self.bbox_pred = nn.Conv2d(256, num_anchors * 4, 3, padding=1)

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Returns, per level, N x (A * K) x H x W logits and N x (A * 4) x H x W deltas."""
        logits: List[Tensor] = []
        anchor_deltas: List[Tensor] = []
        for feature in features:
            logits.append(self.cls_score(self.cls_subnet(feature)))
            anchor_deltas.append(self.bbox_pred(self.bbox_subnet(feature)))
        return logits, anchor_deltas


def _per_anchor(prediction: Tensor, channels: int) -> Tensor:
    """N x (A * channels) x H x W to N x (H * W * A) x channels."""
    n, _, height, width = prediction.shape
    prediction = prediction.view(n, -1, channels, height, width)
    return prediction.permute(0, 3, 4, 1, 2).reshape(n, -1, channels)


class RetinaNet(nn.Module):
    """RetinaNet R50-FPN with Detectron2's parameter names and model-zoo settings.

    Args:
        postprocess: clip the boxes to the image and leave out what is empty then.
    """

    num_classes: Final[int] = NUM_CLASSES
    score_threshold: Final[float] = 0.05
    topk_candidates: Final[int] = 1000
    nms_threshold: Final[float] = 0.5
    detections_per_image: Final[int] = 100

    def __init__(self, postprocess: bool = True) -> None:
        super().__init__()
        self.postprocess = postprocess
        self.register_buffer(
            "pixel_mean", torch.tensor([103.530, 116.280, 123.675]).view(-1, 1, 1), False
        )
        self.register_buffer("pixel_std", torch.ones(3, 1, 1), False)
        self.backbone = RetinaNetFPN()
        sizes = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]
        self.anchor_generator = box_ops.AnchorGenerator(
            sizes, (0.5, 1.0, 2.0), (8, 16, 32, 64, 128)
        )
        self.head = RetinaNetHead(self.anchor_generator.num_anchors)

    def forward(self, images: List[Tensor]) -> List[Instances]:
        """Detects objects.

        Args:
            images: 3 x H x W float tensors, BGR, 0 to 255.
        """
        batch = batch_images(images, self.pixel_mean, self.pixel_std, 32)
        features = self.backbone(batch)
        logits, anchor_deltas = self.head(features)
        anchors = self.anchor_generator(features)
        logits = [_per_anchor(x, self.num_classes) for x in logits]
        anchor_deltas = [_per_anchor(x, 4) for x in anchor_deltas]
        results: List[Instances] = []
        for n, image in enumerate(images):
            scores = [x[n].sigmoid_() for x in logits]
            deltas = [x[n] for x in anchor_deltas]
            results.append(self.inference_single_image(anchors, scores, deltas, image_size(image)))
        return results

    def inference_single_image(
        self, anchors: List[Tensor], scores: List[Tensor], deltas: List[Tensor], size: Tensor
    ) -> Instances:
        """Thresholds, decodes and suppresses the predictions of one image.

        Args:
            anchors, scores, deltas: per level, R x 4, R x K (probabilities), R x 4.
            size: height and width of the image.
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
                    deltas[level][anchor_index], anchors[level][anchor_index], (1.0, 1.0, 1.0, 1.0)
                )
            )
            all_scores.append(top_scores)
            all_classes.append(class_index)
        boxes, top, classes = torch.cat(all_boxes), torch.cat(all_scores), torch.cat(all_classes)
        keep = box_ops.batched_nms(boxes, top, classes, self.nms_threshold)
        keep = keep[: self.detections_per_image]
        boxes, top, classes = boxes[keep], top[keep], classes[keep]
        if self.postprocess:
            boxes = box_ops.clip(boxes, size)
            keep = box_ops.nonempty(boxes)
            boxes, top, classes = boxes[keep], top[keep], classes[keep]
        return Instances(size, boxes, top, classes, None)
