"""Region proposal network (Ren et al. 2015, https://arxiv.org/abs/1506.01497), inference only."""

from collections import OrderedDict
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configuration import RPN as Settings
from detectors import boxes as box_ops


class RPNHead(nn.Module):
    """Objectness and box deltas of every anchor.

    Args:
        in_channels: of each feature map.
        num_anchors: of each cell.
        conv_dims: channels of the hidden convolutions, -1 for as many as come in.
    """

    def __init__(
        self, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)
    ) -> None:
        super().__init__()
        convs: List[nn.Module] = []
        for channels in conv_dims:
            out_channels = in_channels if channels == -1 else channels
            convs.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            in_channels = out_channels
        if len(convs) == 1:
            self.conv = convs[0]
        else:
            # The first of them are followed by a ReLU in here, the last one in `forward`.
            layers: Dict[str, nn.Module] = OrderedDict()
            for n, conv in enumerate(convs):
                layers[f"conv{n}"] = conv
                if n < len(convs) - 1:
                    layers[f"relu{n}"] = nn.ReLU()
            self.conv = nn.Sequential(layers)
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
        in_features: places of the feature maps that it looks at, among those of the backbone.
        in_channels: of each feature map.
        anchor_generator: makes the anchors of these feature maps.
        config: what else is set.
        min_size: proposals have a width and a height of more than this, in pixels.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        in_channels: int,
        anchor_generator: box_ops.AnchorGenerator,
        config: Settings,
        min_size: float,
    ) -> None:
        super().__init__()
        self.in_features = list(in_features)
        self.pre_nms_topk = config.pre_nms_topk_test
        self.post_nms_topk = config.post_nms_topk_test
        self.nms_threshold = float(config.nms_thresh)
        self.weights = box_ops.four(config.bbox_reg_weights)
        self.min_size = float(min_size)
        self.rpn_head = RPNHead(in_channels, anchor_generator.num_anchors, config.conv_dims)
        self.anchor_generator = anchor_generator

    def forward(self, features: List[Tensor], sizes: List[Tensor]) -> List[Tuple[Tensor, Tensor]]:
        """Returns the proposals for each image, R x 4, and their logits, R, the best first.

        Args:
            features: of the backbone, N x C x H x W each.
            sizes: height and width of each image.
        """
        features = [features[n] for n in self.in_features]
        logits, deltas = self.rpn_head(features)
        proposals: List[Tuple[Tensor, Tensor]] = []
        for boxes, top, levels in self.candidates(features, logits, deltas, sizes):
            proposals.append(self.suppressed(boxes, top, levels))
        return proposals

    def candidates(
        self,
        features: List[Tensor],
        logits: List[Tensor],
        deltas: List[Tensor],
        sizes: List[Tensor],
    ) -> List[Tuple[Tensor, Tensor, Tensor]]:
        """Boxes, logits and levels of each image before suppression: R x 4, R, R.

        Args:
            features: that are looked at, N x C x H x W each.
            logits, deltas: of the head.
            sizes: height and width of each image.
        """
        anchors = self.anchor_generator(features)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [_per_anchor(x) for x in deltas]
        candidates: List[Tuple[Tensor, Tensor, Tensor]] = []
        for n, size in enumerate(sizes):
            own_logits, own_deltas = [x[n] for x in logits], [x[n] for x in deltas]
            candidates.append(self.candidates_of_image(anchors, own_logits, own_deltas, size))
        return candidates

    def proposals_of_image(
        self, anchors: List[Tensor], logits: List[Tensor], deltas: List[Tensor], size: Tensor
    ) -> Tensor:
        """The proposals for one image, R x 4; arguments as for `candidates_of_image`."""
        boxes, top, levels = self.candidates_of_image(anchors, logits, deltas, size)
        return self.suppressed(boxes, top, levels)[0]

    def candidates_of_image(
        self, anchors: List[Tensor], logits: List[Tensor], deltas: List[Tensor], size: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Selects and decodes the candidates of one image.

        Args:
            anchors, logits, deltas: per level, R x 4, R, R x 4.
            size: height and width of the image.
        """
        all_boxes: List[Tensor] = []
        all_logits: List[Tensor] = []
        all_levels: List[Tensor] = []
        for level, level_logits in enumerate(logits):
            top_logits, order = box_ops.topk(level_logits, self.pre_nms_topk)
            all_boxes.append(
                box_ops.apply_deltas(deltas[level][order], anchors[level][order], self.weights)
            )
            all_logits.append(top_logits)
            all_levels.append(torch.full_like(order, level))
        boxes, top, levels = torch.cat(all_boxes), torch.cat(all_logits), torch.cat(all_levels)

        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(top)
        boxes = box_ops.clip(boxes, size)
        keep = finite & box_ops.nonempty(boxes, self.min_size)
        return boxes[keep], top[keep], levels[keep]

    def suppressed(self, boxes: Tensor, top: Tensor, levels: Tensor) -> Tuple[Tensor, Tensor]:
        """The proposals for one image, R x 4, and their logits, R, of its candidates."""
        keep = box_ops.batched_nms(boxes, top, levels, self.nms_threshold)
        keep = keep[: self.post_nms_topk]
        return boxes[keep], top[keep]


def _per_anchor(deltas: Tensor) -> Tensor:
    """N x (A * 4) x H x W to N x (H * W * A) x 4."""
    n, _, height, width = deltas.shape
    return deltas.view(n, -1, 4, height, width).permute(0, 3, 4, 1, 2).flatten(1, -2)
