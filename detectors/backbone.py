"""Backbones: ResNets, and the feature pyramid network on top of one."""

import copy
from typing import Any, Dict, List, Sequence, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configuration import ResNets
from detectors.layers import BasicBlock, Bottleneck, Conv2d, DeformBottleneck, res_stage

# Blocks of res2 to res5, by depth.
NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STAGES = ("res2", "res3", "res4", "res5")


class Stem(nn.Module):
    """7x7 convolution and max pooling, each of stride 2."""

    def __init__(self, out_channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, out_channels, 7, 2, norm=norm, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class ResNet(nn.Module):
    """A ResNet or ResNeXt as far as its features are asked for.

    N x 3 x H x W in, a list of the features that are asked for out.

    Attributes:
        names: of the features, the finest first.
        channels, strides: of each feature.
    """

    size_divisibility = 0

    def __init__(self, config: ResNets) -> None:
        super().__init__()
        self.stem = Stem(config.stem_out_channels, config.norm)
        self.names = [name for name in ("stem", *STAGES) if name in config.out_features]
        self.returns_stem = "stem" in self.names
        self.channels: List[int] = []
        self.strides: List[int] = []
        channels, stride = config.stem_out_channels, 4
        if self.returns_stem:
            self.channels.append(channels)
            self.strides.append(stride)
        self.returned: List[bool] = []
        self.stages: List[nn.Module] = []
        last = self.names[-1]
        for name in STAGES[: STAGES.index(last) + 1] if last in STAGES else ():
            first_stride = stage_stride(config, name)
            stage = make_stage(config, name, channels, first_stride)
            self.add_module(name, stage)
            self.stages.append(stage)
            channels, stride = stage_channels(config, name), stride * first_stride
            self.returned.append(name in self.names)
            if name in self.names:
                self.channels.append(channels)
                self.strides.append(stride)

    def forward(self, x: Tensor) -> List[Tensor]:
        x = self.stem(x)
        features: List[Tensor] = []
        if self.returns_stem:
            features.append(x)
        for n, stage in enumerate(self.stages):
            x = stage(x)
            if self.returned[n]:
                features.append(x)
        return features

    def __prepare_scriptable__(self) -> nn.Module:
        return _with_module_lists(self, "stages")


def stage_channels(config: ResNets, name: str) -> int:
    """Channels that come out of a stage: they double from one to the next."""
    return config.res2_out_channels * 2 ** STAGES.index(name)


def stage_width(config: ResNets, name: str) -> int:
    """Channels within the bottlenecks of a stage, which double likewise."""
    return config.num_groups * config.width_per_group * 2 ** STAGES.index(name)


def stage_stride(config: ResNets, name: str) -> int:
    """The stride of a stage; that of a dilated res5 is 1."""
    return 1 if name == "res2" or (name == "res5" and config.res5_dilation == 2) else 2


def make_stage(config: ResNets, name: str, in_channels: int, stride: int) -> nn.Sequential:
    """One stage of a ResNet, as a backbone has it and as a C4 detector runs it per region."""
    place = STAGES.index(name)
    num_blocks, norm = NUM_BLOCKS[config.depth][place], config.norm
    out_channels = stage_channels(config, name)
    if config.depth in (18, 34):
        return res_stage(
            BasicBlock, num_blocks, in_channels, stride, out_channels=out_channels, norm=norm
        )
    rest: Dict[str, Any] = {}
    block: Type[nn.Module] = Bottleneck
    if config.deform_on_per_stage[place]:
        block = DeformBottleneck
        rest = {"modulated": config.deform_modulated, "offset_groups": config.deform_num_groups}
    return res_stage(
        block,
        num_blocks,
        in_channels,
        stride,
        channels=stage_width(config, name),
        out_channels=out_channels,
        norm=norm,
        groups=config.num_groups,
        stride_in_1x1=config.stride_in_1x1,
        dilation=config.res5_dilation if name == "res5" else 1,
        **rest,
    )


class LastLevelMaxPool(nn.Module):
    """p6 of Mask R-CNN: every second pixel of p5."""

    num_levels = 1

    def forward(self, res5: Tensor, p5: Tensor) -> List[Tensor]:
        return [F.max_pool2d(p5, kernel_size=1, stride=2, padding=0)]


class LastLevelP6P7(nn.Module):
    """p6 and p7 of RetinaNet: strided convolutions of res5."""

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)

    def forward(self, res5: Tensor, p5: Tensor) -> List[Tensor]:
        p6 = self.p6(res5)
        return [p6, self.p7(F.relu(p6))]


def _doubled(x: Tensor) -> Tensor:
    """N x C x H x W to N x C x 2H x 2W."""
    if torch.jit.is_scripting():
        # What is behind `F.interpolate`, which asks for the rank first: that is nowhere in a graph.
        return torch._C._nn.upsample_nearest2d(x, None, [2.0, 2.0])
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017, https://arxiv.org/abs/1612.03144).

    N x 3 x H x W in, with H and W divisible by `size_divisibility`; [p2, p3, p4, p5, p6] out, or
    what there is.

    Args:
        bottom_up: gives the features.
        in_features: places of those that the pyramid is built on, each of half the resolution of
            the one before.
        out_channels: of every level.
        norm: see `detectors.layers.make_norm`.
        average: whether what meets is averaged, and not added.
        top_block: makes the levels above, of res5 and the coarsest level.

    Attributes:
        names, channels, strides: of each level.
    """

    def __init__(
        self,
        bottom_up: ResNet,
        in_features: Sequence[int],
        out_channels: int,
        norm: str,
        average: bool,
        top_block: nn.Module,
    ) -> None:
        super().__init__()
        self.average = average
        # The coarsest first, as they are used. The names are of Detectron2; a list of their own
        # that no state dict sees is what `forward` goes through.
        self.laterals: List[nn.Module] = []
        self.outputs: List[nn.Module] = []
        self.in_features = list(in_features)
        strides = [bottom_up.strides[n] for n in in_features]
        levels = [stride.bit_length() - 1 for stride in strides]
        for level, channels in zip(levels, [bottom_up.channels[n] for n in in_features]):
            lateral = Conv2d(channels, out_channels, 1, norm=norm)
            output = Conv2d(out_channels, out_channels, 3, norm=norm)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
            self.laterals.insert(0, lateral)
            self.outputs.insert(0, output)
        self.top_block = top_block
        self.bottom_up = bottom_up
        self.res5 = bottom_up.names.index("res5")
        levels += [levels[-1] + n + 1 for n in range(top_block.num_levels)]
        self.names = [f"p{level}" for level in levels]
        self.strides = [2**level for level in levels]
        self.channels = [out_channels] * len(levels)
        self.size_divisibility = strides[-1]

    def forward(self, x: Tensor) -> List[Tensor]:
        return self.pyramid(self.bottom_up(x))

    def pyramid(self, features: List[Tensor]) -> List[Tensor]:
        """The levels, the finest first, from all features of `bottom_up`, N x C x H x W each."""
        res5 = features[self.res5]
        features = [features[n] for n in self.in_features]
        pyramid: List[Tensor] = []
        top = features[-1]
        for n, (lateral, output) in enumerate(zip(self.laterals, self.outputs)):
            merged = lateral(features[len(features) - 1 - n])
            if n > 0:
                merged = merged + _doubled(top)
                if self.average:
                    merged = merged / 2
            top = merged
            pyramid.insert(0, output(merged))
        return pyramid + self.top_block(res5, pyramid[-1])

    def __prepare_scriptable__(self) -> nn.Module:
        return _with_module_lists(self, "laterals", "outputs")


def _with_module_lists(module: nn.Module, *names: str) -> nn.Module:
    """A shallow copy for TorchScript, which wants lists of modules registered.

    Each of them is then known by two names, which matters to a state dict only.
    """
    scriptable = copy.copy(module)
    scriptable._modules = dict(module._modules)
    for name in names:
        modules = scriptable.__dict__.pop(name)
        for known in [key for key, each in scriptable._modules.items() if each in modules]:
            del scriptable._modules[known]
        scriptable.add_module(name, nn.ModuleList(modules))
    return scriptable
