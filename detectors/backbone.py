"""Backbones: ResNet-50 up to res4 or res5, and the feature pyramid network on top of it."""

from typing import List

import torch.nn.functional as F
from torch import Tensor, nn

from detectors.layers import Conv2d, res_stage


class Stem(nn.Module):
    """7x7 convolution and max pooling, each of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, 64, 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class ResNet50C4(nn.Module):
    """ResNet-50 without its last stage, which a C4 detector runs per region.

    N x 3 x H x W in, a list with res4 out: N x 1024 x H/16 x W/16.
    """

    size_divisibility = 0

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.res2 = res_stage(64, 64, 3, 1)
        self.res3 = res_stage(256, 128, 4, 2)
        self.res4 = res_stage(512, 256, 6, 2)

    def forward(self, x: Tensor) -> List[Tensor]:
        return [self.res4(self.res3(self.res2(self.stem(x))))]


class ResNet50(nn.Module):
    """ResNet-50. N x 3 x H x W in, [res2, res3, res4, res5] out, of strides 4, 8, 16, 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.res2 = res_stage(64, 64, 3, 1)
        self.res3 = res_stage(256, 128, 4, 2)
        self.res4 = res_stage(512, 256, 6, 2)
        self.res5 = res_stage(1024, 512, 3, 2)

    def forward(self, x: Tensor) -> List[Tensor]:
        res2 = self.res2(self.stem(x))
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        return [res2, res3, res4, self.res5(res4)]


class LastLevelMaxPool(nn.Module):
    """p6 of Mask R-CNN: every second pixel of p5."""

    def forward(self, res5: Tensor, p5: Tensor) -> List[Tensor]:
        return [F.max_pool2d(p5, kernel_size=1, stride=2, padding=0)]


class LastLevelP6P7(nn.Module):
    """p6 and p7 of RetinaNet: strided convolutions of res5."""

    def __init__(self) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(2048, 256, 3, 2, 1)
        self.p7 = nn.Conv2d(256, 256, 3, 2, 1)

    def forward(self, res5: Tensor, p5: Tensor) -> List[Tensor]:
        p6 = self.p6(res5)
        return [p6, self.p7(F.relu(p6))]


def _lateral(in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, 256, 1)


def _output() -> nn.Conv2d:
    return nn.Conv2d(256, 256, 3, padding=1)


class FPN(nn.Module):
    """Feature pyramid on res2 to res5 (Lin et al. 2017, https://arxiv.org/abs/1612.03144).

    N x 3 x H x W in, with H and W divisible by 32; [p2, p3, p4, p5, p6] out, 256 channels each.
    """

    size_divisibility = 32

    def __init__(self) -> None:
        super().__init__()
        self.fpn_lateral2 = _lateral(256)
        self.fpn_output2 = _output()
        self.fpn_lateral3 = _lateral(512)
        self.fpn_output3 = _output()
        self.fpn_lateral4 = _lateral(1024)
        self.fpn_output4 = _output()
        self.fpn_lateral5 = _lateral(2048)
        self.fpn_output5 = _output()
        self.top_block = LastLevelMaxPool()
        self.bottom_up = ResNet50()

    def forward(self, x: Tensor) -> List[Tensor]:
        res2, res3, res4, res5 = self.bottom_up(x)
        top5 = self.fpn_lateral5(res5)
        top4 = _merge(self.fpn_lateral4(res4), top5)
        top3 = _merge(self.fpn_lateral3(res3), top4)
        top2 = _merge(self.fpn_lateral2(res2), top3)
        p5 = self.fpn_output5(top5)
        pyramid = [self.fpn_output2(top2), self.fpn_output3(top3), self.fpn_output4(top4), p5]
        return pyramid + self.top_block(res5, p5)


class RetinaNetFPN(nn.Module):
    """Feature pyramid on res3 to res5 with two more levels: [p3, p4, p5, p6, p7] out."""

    size_divisibility = 32

    def __init__(self) -> None:
        super().__init__()
        self.fpn_lateral3 = _lateral(512)
        self.fpn_output3 = _output()
        self.fpn_lateral4 = _lateral(1024)
        self.fpn_output4 = _output()
        self.fpn_lateral5 = _lateral(2048)
        self.fpn_output5 = _output()
        self.top_block = LastLevelP6P7()
        self.bottom_up = ResNet50()

    def forward(self, x: Tensor) -> List[Tensor]:
        _, res3, res4, res5 = self.bottom_up(x)
        top5 = self.fpn_lateral5(res5)
        top4 = _merge(self.fpn_lateral4(res4), top5)
        top3 = _merge(self.fpn_lateral3(res3), top4)
        p5 = self.fpn_output5(top5)
        pyramid = [self.fpn_output3(top3), self.fpn_output4(top4), p5]
        return pyramid + self.top_block(res5, p5)


def _merge(lateral: Tensor, top: Tensor) -> Tensor:
    return lateral + F.interpolate(top, scale_factor=2.0, mode="nearest")
