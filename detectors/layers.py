"""Convolutions with their normalisation, and the blocks and stages of a ResNet."""

from typing import Any, List, Optional, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from errors import InputError

# Groups of a group norm, whatever its channels.
NORM_GROUPS = 32


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


def make_norm(norm: str, channels: int) -> Optional[nn.Module]:
    """The normalisation that a configuration names; None for an empty name.

    A synchronised batch norm is one like any other where nothing is trained.

    Args:
        norm: a key of `NORMS`, or empty.

    Raises:
        errors.InputError: it cannot divide the channels into its groups.
    """
    return NORMS[norm](channels) if norm else None


class GroupNorm(nn.GroupNorm):
    """PyTorch's, without its check that there is more than one value in a group.

    The check makes the tracer warn, and refuses feature maps of 1 x 1 pixels.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _group_norm(channels: int) -> nn.GroupNorm:
    if channels % NORM_GROUPS:
        raise InputError(f"is GN, and {channels} channels are no multiple of {NORM_GROUPS}")
    return GroupNorm(NORM_GROUPS, channels)


NORMS = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.BatchNorm2d,
    "nnSyncBN": nn.BatchNorm2d,
    "naiveSyncBN": nn.BatchNorm2d,
    "naiveSyncBN_N": nn.BatchNorm2d,
    "GN": _group_norm,
}


class Conv2d(nn.Conv2d):
    """A convolution that owns its normalisation, as `norm`.

    Args:
        norm: see `make_norm`.
        bias: by default there is one where there is no normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: str = "FrozenBN",
        bias: Optional[bool] = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=not norm if bias is None else bias,
        )
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return x


class DeformConv2d(Conv2d):
    """A 3x3 convolution that samples its input at given offsets (Dai et al. 2017,
    https://arxiv.org/abs/1703.06211), each weighted where it is modulated (Zhu et al. 2018,
    https://arxiv.org/abs/1811.11168).
    """

    def forward(self, x: Tensor, offset: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Convolves.

        Args:
            x: N x C x H x W.
            offset: N x (2 * G * 9) x H' x W', for each of G groups of channels y and x in turns.
            mask: None, or N x (G * 9) x H' x W', 0 to 1.
        """
        x = deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )
        if self.norm is not None:
            x = self.norm(x)
        return x


class ResidualBlock(nn.Module):
    """A branch that is added to its input (He et al. 2015, https://arxiv.org/abs/1512.03385).

    The input is convolved for that where the channels differ.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.shortcut: Optional[Conv2d] = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride, norm=norm, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        out += x
        return F.relu_(out)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, for ResNets of 18 and 34 layers."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride, norm=norm, bias=False)
        self.conv2 = Conv2d(out_channels, out_channels, 3, norm=norm, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the input."""
        return self.conv2(F.relu_(self.conv1(x)))


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions.

    Args:
        in_channels, channels, out_channels: before, within and after.
        stride: of the first 1x1, where the MSRA weights that Detectron2 starts from have it, or of
            the 3x3.
        groups: of the 3x3 (Xie et al. 2016, https://arxiv.org/abs/1611.05431).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        norm: str = "FrozenBN",
        groups: int = 1,
        stride_in_1x1: bool = True,
        dilation: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, norm)
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = Conv2d(in_channels, channels, 1, first, norm=norm, bias=False)
        self.conv2 = Conv2d(channels, channels, 3, second, dilation, groups, norm, bias=False)
        self.conv3 = Conv2d(channels, out_channels, 1, norm=norm, bias=False)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the input."""
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.middle(out))
        return self.conv3(out)

    def middle(self, x: Tensor) -> Tensor:
        """The 3x3 convolution."""
        return self.conv2(x)


class DeformBottleneck(Bottleneck):
    """A bottleneck whose 3x3 convolution is deformable.

    Args:
        modulated: whether what is sampled is weighted.
        offset_groups: groups of channels that have offsets of their own.
        rest: as for `Bottleneck`.
    """

    def __init__(self, modulated: bool = False, offset_groups: int = 1, **rest: Any) -> None:
        super().__init__(**rest)
        plain, norm = self.conv2, rest["norm"]
        channels, stride, dilation = plain.in_channels, plain.stride[0], plain.dilation[0]
        self.modulated = modulated
        per_group = 27 if modulated else 18
        self.conv2_offset = Conv2d(
            channels, per_group * offset_groups, 3, stride, dilation, norm="", bias=True
        )
        self.conv2 = DeformConv2d(
            channels, channels, 3, stride, dilation, plain.groups, norm, bias=False
        )

    def middle(self, x: Tensor) -> Tensor:
        """The 3x3 convolution."""
        offset = self.conv2_offset(x)
        if not self.modulated:
            return self.conv2(x, offset)
        # As Detectron2 cuts them: the first two thirds are offsets, y and x in turns.
        first, second, mask = offset.chunk(3, dim=1)
        return self.conv2(x, torch.cat((first, second), dim=1), mask.sigmoid())


def res_stage(
    block: Type[nn.Module], num_blocks: int, in_channels: int, stride: int, **rest: Any
) -> nn.Sequential:
    """One stage of a ResNet.

    Args:
        block: the class of its blocks.
        stride: of the first block.
        rest: what else each block takes; `out_channels` among it.
    """
    blocks: List[nn.Module] = [block(in_channels=in_channels, stride=stride, **rest)]
    for _ in range(num_blocks - 1):
        blocks.append(block(in_channels=rest["out_channels"], stride=1, **rest))
    return nn.Sequential(*blocks)
