"""From raw images to the network's input: normalise, pad, batch.

The sizes of an image are numbers in eager mode and in TorchScript, and tensors while tracing.
The padding is written so that it means the same in all three, and in every engine. OpenVINO 2026.4
pads one stride too many where a maximum over a single image precedes the division by the stride,
and pads nothing where the padding is computed with a remainder.
"""

from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor


def image_size(image: Tensor) -> Tensor:
    """Height and width of a ... x H x W image as an int64 tensor, also in a traced graph."""
    return torch._shape_as_tensor(image)[-2:]


def batch_images(images: List[Tensor], mean: Tensor, std: Tensor, size_divisibility: int) -> Tensor:
    """Normalises images, pads them at the right and the bottom with zeros, and stacks them.

    Args:
        images: 3 x H x W float tensors, BGR, 0 to 255; they may differ in size.
        mean, std: 3 x 1 x 1, per channel.
        size_divisibility: H and W of the batch are multiples of it; 0 pads only as far as the
            largest image asks.

    Returns:
        N x 3 x H' x W'.
    """
    return pad_images([(image - mean) / std for image in images], size_divisibility)


def pad_images(images: List[Tensor], size_divisibility: int) -> Tensor:
    """Pads images as `batch_images` does, and stacks them."""
    if len(images) == 1:
        return _pad_to_multiple(images[0], size_divisibility).unsqueeze(0)
    largest = image_size(images[0])
    for image in images[1:]:
        largest = torch.maximum(largest, image_size(image))
    # Padding to the largest size first leaves one number per side to round up.
    batch = torch.stack([_pad_to(image, largest) for image in images])
    return _pad_to_multiple(batch, size_divisibility)


def _pad_to_multiple(image: Tensor, divisor: int) -> Tensor:
    if divisor == 0:
        return image
    height, width = image.shape[-2], image.shape[-1]
    right = (width + divisor - 1) // divisor * divisor - width
    bottom = (height + divisor - 1) // divisor * divisor - height
    return F.pad(image, [0, right, 0, bottom])


def _pad_to(image: Tensor, size: Tensor) -> Tensor:
    missing = size - image_size(image)
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return F.pad(image, [0, missing[1], 0, missing[0]])
    return F.pad(image, [0, int(missing[1]), 0, int(missing[0])])
