"""Semantic segmentation on a pyramid, and with things as well as stuff (Kirillov et al. 2019,
https://arxiv.org/abs/1901.02446), inference only.
"""

from typing import Any, List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configuration import SemSegHead
from detectors.images import batch_images, image_size
from detectors.instances import Panorama, Segmentation
from detectors.layers import Conv2d
from detectors.rcnn import GeneralizedRCNN


class _Conv2d(Conv2d):
    """A convolution with a ReLU of its own, which Detectron2 does not count as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class SemSegFPNHead(nn.Module):
    """Features of all levels, brought to one resolution and added, and logits from the sum.

    Args:
        in_features: names of the feature maps, the finest first.
        places: of these among those of the backbone.
        channels, strides: of each.
        config: what else is set.
    """

    def __init__(
        self,
        in_features: Sequence[str],
        places: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        config: SemSegHead,
    ) -> None:
        super().__init__()
        self.in_features = dict(zip(in_features, places))
        self.common_stride = config.common_stride
        for name, in_channels, stride in zip(in_features, channels, strides):
            self.add_module(name, self.make_scale_head(in_channels, stride, config))
        self.predictor = nn.Conv2d(config.convs_dim, config.num_classes, 1)

    @staticmethod
    def make_scale_head(channels: int, stride: int, config: SemSegHead) -> nn.Sequential:
        """A convolution for each doubling of the resolution, and one where there is none."""
        doublings = (stride // config.common_stride).bit_length() - 1
        layers: List[nn.Module] = []
        for _ in range(max(1, doublings)):
            layers.append(_Conv2d(channels, config.convs_dim, 3, norm=config.norm))
            if doublings:
                layers.append(nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False))
            channels = config.convs_dim
        return nn.Sequential(*layers)

    def forward(self, features: List[Tensor], images: List[Tensor]) -> List[Tensor]:
        """Returns K x H x W logits for each image, of its own size.

        Args:
            features: of the backbone, N x C x H x W each.
            images: that they were computed from, 3 x H x W.
        """
        scaled = [
            self.get_submodule(name)(features[place]) for name, place in self.in_features.items()
        ]
        total = scaled[0]
        for x in scaled[1:]:
            total = total + x
        logits = F.interpolate(
            self.predictor(total),
            scale_factor=float(self.common_stride),
            mode="bilinear",
            align_corners=False,
        )
        return [
            logits[n, :, : image.shape[-2], : image.shape[-1]] for n, image in enumerate(images)
        ]


class SemanticSegmentor(nn.Module):
    """Backbone and a head for each pixel's class.

    Args:
        backbone: N x 3 x H x W -> feature maps.
        sem_seg_head: feature maps -> logits.
        pixel_mean, pixel_std: of each channel.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sem_seg_head: SemSegFPNHead,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.backbone = backbone
        self.size_divisibility: int = backbone.size_divisibility
        self.sem_seg_head = sem_seg_head

    def forward(self, images: List[Tensor]) -> List[Segmentation]:
        """Segments images.

        Args:
            images: 3 x H x W float tensors in the format of the configuration, 0 to 255.
        """
        batch = batch_images(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        logits = self.sem_seg_head(self.backbone(batch), images)
        return [Segmentation(x) for x in logits]


class PanopticFPN(GeneralizedRCNN):
    """A two-stage detector with a head for each pixel's class besides.

    Detectron2 goes on to combine the two to one map of segments. That is left out: it is a list of
    segments besides, which Detectron2 itself does not export.

    Args:
        sem_seg_head: feature maps -> logits.
        rest: as for `GeneralizedRCNN`.
    """

    def __init__(self, sem_seg_head: SemSegFPNHead, **rest: Any) -> None:
        super().__init__(**rest)
        self.sem_seg_head = sem_seg_head

    def forward(self, images: List[Tensor]) -> List[Panorama]:
        """Detects things and segments images.

        Args:
            images: 3 x H x W float tensors in the format of the configuration, 0 to 255.
        """
        sizes = [image_size(image) for image in images]
        batch = batch_images(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        features = self.backbone(batch)
        logits = self.sem_seg_head(features, images)
        return [Panorama(*both) for both in zip(self.instances(features, sizes), logits)]
