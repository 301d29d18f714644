"""Building blocks: frozen batch norm, convolution with norm, bottleneck block."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine parameters, all of them buffers.

    torchvision has one too, but it multiplies and adds in two steps; Detectron2 calls
    `batch_norm`, which rounds differently and costs one pass less.

    Args:
        num_features: channels C of the N x C x H x W input.
        eps: added to the variance; Detectron2's 1e-5.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class Conv2d(nn.Conv2d):
    """A convolution without bias that owns its frozen batch norm, as `norm`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
        )
        self.norm = FrozenBatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self._conv_forward(x, self.weight, self.bias))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2015, https://arxiv.org/abs/1512.03385).

    The stride is in the first 1x1, where the MSRA weights that Detectron2 starts from have it.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut: Optional[Conv2d] = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride)
        self.conv1 = Conv2d(in_channels, channels, 1, stride)
        self.conv2 = Conv2d(channels, channels, 3)
        self.conv3 = Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        if self.shortcut is not None:
            x = self.shortcut(x)
        out += x
        return F.relu_(out)


def res_stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    """One stage of a ResNet: `num_blocks` bottlenecks of `channels`, 4 x `channels` out."""
    blocks = [Bottleneck(in_channels, channels, 4 * channels, stride)]
    blocks += [Bottleneck(4 * channels, channels, 4 * channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
