"""Keypoints of Mask R-CNN (He et al. 2017, https://arxiv.org/abs/1703.06870, section 5)."""

from collections import OrderedDict
from typing import Dict, List

import torch
from torch import Tensor, nn

from configuration import ROIKeypointHead


class KeypointHead(nn.Sequential):
    """Convolutions, a transposed one that doubles the resolution, and a resize that does it again.

    M x C x P x P in, M x K x 4P x 4P heatmaps out, of logits.

    Args:
        in_channels: of the pooled regions.
        config: what is set for it.
    """

    def __init__(self, in_channels: int, config: ROIKeypointHead) -> None:
        layers: Dict[str, nn.Module] = OrderedDict()
        for n, channels in enumerate(config.conv_dims, 1):
            layers[f"conv_fcn{n}"] = nn.Conv2d(in_channels, channels, 3, padding=1)
            layers[f"conv_fcn_relu{n}"] = nn.ReLU()
            in_channels = channels
        layers["score_lowres"] = nn.ConvTranspose2d(
            in_channels, config.num_keypoints, 4, stride=2, padding=1
        )
        layers["upsample"] = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
        super().__init__(layers)


@torch.jit.script_if_tracing
def _peaks(heatmaps: Tensor, sizes: Tensor) -> Tensor:
    """The best pixel of each heatmap, stretched over its box: N x K x 3, column, row and logit.

    Args:
        heatmaps: N x K x S x S.
        sizes: N x 2, height and width of each box in whole pixels.
    """
    count, kinds = heatmaps.shape[0], heatmaps.shape[1]
    # One tensor for all three: with two that a loop changes, OpenVINO computes neither.
    peaks = torch.zeros([count, kinds, 3], dtype=heatmaps.dtype, device=heatmaps.device)
    for n in range(count):
        size: List[int] = [int(sizes[n, 0]), int(sizes[n, 1])]
        # Not torch.nn.functional.interpolate, which OpenVINO makes another result of.
        resized = torch._C._nn.upsample_bicubic2d(heatmaps[n : n + 1], size, False, None)
        resized = resized.reshape(kinds, -1)
        pixels = resized.argmax(dim=1)
        rows = torch.div(pixels, size[1], rounding_mode="floor")
        columns = pixels - rows * size[1]
        peaks[n] = torch.stack([columns.float(), rows.float(), resized.amax(dim=1)], dim=1)
    # After a loop of no rounds, OpenVINO 2025 gives as many rows as the call before had.
    return peaks[:count]


def keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """Where the keypoints of each box are most likely.

    As Detectron2 finds them, the heatmaps are resized to the boxes by bicubic interpolation.

    Args:
        heatmaps: N x K x S x S logits.
        boxes: N x 4.

    Returns:
        N x K x 3: x and y of a pixel's center, and a score. That is the pixel's share of what a
        softmax divides among S x S, so that it does not depend on the size of the box.
    """
    heatmaps = heatmaps.float()
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    whole = sides.ceil()
    peaks = _peaks(heatmaps, whole.to(torch.int64).flip(1))
    places = (peaks[:, :, :2] + 0.5) * (sides / whole)[:, None] + boxes[:, None, :2]
    shares = (heatmaps - peaks[:, :, 2:, None]).exp().sum(dim=[2, 3])
    return torch.cat([places, 1 / shares[:, :, None]], dim=2)
