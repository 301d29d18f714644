"""Boxes: anchors, regression deltas, clipping, non-maximum suppression.

Boxes are N x 4 float tensors of corners x0, y0, x1, y1 in pixels.
"""

import math
from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torchvision import ops


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors around the origin, A x 4, sizes slowest.

    Args:
        sizes: square roots of the areas, in pixels.
        aspect_ratios: height over width.
    """
    anchors = []
    for size in sizes:
        for aspect_ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / aspect_ratio)
            height = aspect_ratio * width
            anchors.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
    return torch.tensor(anchors)


class AnchorGenerator(nn.Module):
    """Anchors for every cell of every feature map.

    Args:
        sizes: for each feature map, the square roots of its anchors' areas, in pixels; one for all
            where there is but one.
        aspect_ratios: height over width, likewise.
        strides: for each feature map, pixels per cell.
        offset: of the first anchor from the corner of the image, in cells.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.strides = list(strides)
        self.offset = float(offset)
        # One buffer for all levels, outside the state dict, as Detectron2's are.
        anchors = torch.stack(
            [
                cell_anchors(sizes[n % len(sizes)], aspect_ratios[n % len(aspect_ratios)])
                for n in range(len(self.strides))
            ]
        )
        self.num_anchors = anchors.shape[1]
        self.register_buffer("cell_anchors", anchors, persistent=False)

    def forward(self, features: List[Tensor]) -> List[Tensor]:
        """Returns one (H * W * A) x 4 tensor for each N x C x H x W feature map."""
        anchors: List[Tensor] = []
        for level, feature in enumerate(features):
            stride = self.strides[level]
            first = self.offset * stride
            cells = self.cell_anchors[level]
            ys = torch.arange(feature.shape[-2], device=cells.device, dtype=cells.dtype) * stride
            xs = torch.arange(feature.shape[-1], device=cells.device, dtype=cells.dtype) * stride
            if first != 0.0:
                ys, xs = ys + first, xs + first
            y, x = torch.meshgrid([ys, xs], indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
            anchors.append((shifts + cells.view(1, -1, 4)).reshape(-1, 4))
        return anchors


def apply_deltas(
    deltas: Tensor,
    boxes: Tensor,
    weights: Tuple[float, float, float, float],
    scale_clamp: float = math.log(1000.0 / 16),
) -> Tensor:
    """Moves and scales boxes by regression deltas (Girshick et al., https://arxiv.org/abs/1311.2524).

    Args:
        deltas: N x 4k, k sets of dx, dy, dw, dh for each box.
        boxes: N x 4.
        weights: what the deltas were multiplied by in training.
        scale_clamp: the largest dw and dh; Detectron2 lets no box grow more than 1000/16-fold.

    Returns:
        N x 4k boxes, in float32 whatever the deltas' precision.
    """
    deltas = deltas.float()
    boxes = boxes.to(deltas.dtype)
    widths = boxes[:, 2] - boxes[:, 0]
    heights = boxes[:, 3] - boxes[:, 1]
    center_x = boxes[:, 0] + 0.5 * widths
    center_y = boxes[:, 1] + 0.5 * heights

    dx = deltas[:, 0::4] / weights[0]
    dy = deltas[:, 1::4] / weights[1]
    dw = torch.clamp(deltas[:, 2::4] / weights[2], max=scale_clamp)
    dh = torch.clamp(deltas[:, 3::4] / weights[3], max=scale_clamp)

    x = dx * widths[:, None] + center_x[:, None]
    y = dy * heights[:, None] + center_y[:, None]
    half_w = 0.5 * (torch.exp(dw) * widths[:, None])
    half_h = 0.5 * (torch.exp(dh) * heights[:, None])
    moved = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)
    return moved.reshape(deltas.shape)


def four(weights: Sequence[float]) -> Tuple[float, float, float, float]:
    """The weights of `apply_deltas`, from a configuration."""
    x, y, width, height = weights
    return float(x), float(y), float(width), float(height)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Clips ... x 4 boxes to an image; `size` is its height and width, int64."""
    limits = size.to(device=boxes.device, dtype=boxes.dtype).flip(0).repeat(2)
    return torch.minimum(boxes.clamp(min=0), limits)


def nonempty(boxes: Tensor, smallest: float = 0.0) -> Tensor:
    """Mask of the boxes whose width and height are more than `smallest` pixels."""
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return (widths > smallest) & (heights > smallest)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within groups (levels or classes).

    Returns:
        Indices of the boxes that are kept, best score first.
    """
    boxes, scores = boxes.float(), scores.float()
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        # What torchvision does while tracing, without the branch for no boxes: each group is
        # moved to a place of its own. The zero makes the maximum of no boxes defined.
        extent = torch.cat([boxes, boxes.new_zeros(1, 4)]).max() + 1
        return ops.nms(boxes + (groups.to(boxes) * extent)[:, None], scores, iou_threshold)
    return ops.batched_nms(boxes, scores, groups, iou_threshold)


def topk(scores: Tensor, k: int) -> Tuple[Tensor, Tensor]:
    """The k largest values along the last dimension, or all where there are fewer, sorted."""
    available = scores.shape[-1]
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return scores.topk(torch.clamp(available, max=k), dim=-1)
    return scores.topk(min(available, k), dim=-1)
