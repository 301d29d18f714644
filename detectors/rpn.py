"""Region proposal network (Ren et al. 2015, https://arxiv.org/abs/1506.01497), inference only."""

from typing import List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import Final

from detectors import boxes as box_ops


class RPNHead(nn.Module):
    """Objectness and box deltas of every anchor."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(in_channels, num_anchors * 4, 1)

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Returns, per level, N x A x H x W logits and N x (A * 4) x H x W deltas."""
        logits: List[Tensor] = []
        deltas: List[Tensor] = []
        for feature in features:
            hidden = F.relu_(self.conv(feature))
            logits.append(self.objectness_logits(hidden))
            deltas.append(self.anchor_deltas(hidden))
        return logits, deltas


class RPN(nn.Module):
    """Proposals from feature maps.

    Args:
        in_channels: of each feature map.
        anchor_generator: makes the anchors of these feature maps.
        pre_nms_topk: candidates that each feature map may put forward.
    """

    nms_threshold: Final[float] = 0.7
    post_nms_topk: Final[int] = 1000

    def __init__(
        self, in_channels: int, anchor_generator: box_ops.AnchorGenerator, pre_nms_topk: int
    ) -> None:
        super().__init__()
        self.pre_nms_topk = pre_nms_topk
        self.rpn_head = RPNHead(in_channels, anchor_generator.num_anchors)
        self.anchor_generator = anchor_generator

    def forward(self, features: List[Tensor], sizes: List[Tensor]) -> List[Tensor]:
        """Returns up to 1000 proposals for each image, R x 4, best objectness first.

        Args:
            features: per level, N x C x H x W.
            sizes: height and width of each image.
        """
        anchors = self.anchor_generator(features)
        logits, deltas = self.rpn_head(features)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [_per_anchor(x) for x in deltas]
        proposals: List[Tensor] = []
        for n, size in enumerate(sizes):
            proposals.append(
                self.proposals_of_image(
                    anchors, [x[n] for x in logits], [x[n] for x in deltas], size
                )
            )
        return proposals

    def proposals_of_image(
        self, anchors: List[Tensor], logits: List[Tensor], deltas: List[Tensor], size: Tensor
    ) -> Tensor:
        """Selects, decodes and suppresses the candidates of one image.

        Args:
            anchors, logits, deltas: per level, R x 4, R, R x 4.
        """
        all_boxes: List[Tensor] = []
        all_logits: List[Tensor] = []
        all_levels: List[Tensor] = []
        for level, level_logits in enumerate(logits):
            top_logits, order = box_ops.topk(level_logits, self.pre_nms_topk)
            all_boxes.append(
                box_ops.apply_deltas(
                    deltas[level][order], anchors[level][order], (1.0, 1.0, 1.0, 1.0)
                )
            )
            all_logits.append(top_logits)
            all_levels.append(torch.full_like(order, level))
        boxes, top, levels = torch.cat(all_boxes), torch.cat(all_logits), torch.cat(all_levels)

        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(top)
        boxes = box_ops.clip(boxes, size)
        keep = finite & box_ops.nonempty(boxes)
        boxes, top, levels = boxes[keep], top[keep], levels[keep]
        keep = box_ops.batched_nms(boxes, top, levels, self.nms_threshold)
        return boxes[keep[: self.post_nms_topk]]


def _per_anchor(deltas: Tensor) -> Tensor:
    """N x (A * 4) x H x W to N x (H * W * A) x 4."""
    n, _, height, width = deltas.shape
    return deltas.view(n, -1, 4, height, width).permute(0, 3, 4, 1, 2).flatten(1, -2)
