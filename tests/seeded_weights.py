"""Weights and images for the tests of the detectors: seeded, and the same on every machine.

They come from the raw bits of NumPy's PCG64, whose stream NumPy guarantees, by arithmetic that is
exact or correctly rounded. The distributions of a generator, and PyTorch's, may change with a
release.
"""

from __future__ import annotations

import zlib
from typing import Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

# What a parameter is multiplied by: the first entry that fits the end of its name, and its shape if
# the entry has one. Found by trial, so that the outputs of every layer deviate by around 1 and
# differ from place to place.
_GAINS: Tuple[Tuple[str, Optional[Tuple[int, ...]], float], ...] = (
    # Pixels deviate by some 60 from their mean.
    ("stem.conv1.weight", None, 1 / 60),
    # Residual branches and boxes that change little keep rounding errors from growing with depth:
    # another order of summation moves boxes by 1e-4 pixels and probabilities by 1e-5.
    ("conv3.norm.weight", None, 0.2),
    ("head.bbox_pred.weight", None, 0.15),
    ("anchor_deltas.weight", None, 0.03),
    ("bbox_pred.weight", None, 0.1),
    # Scores are spread apart and not saturated. C4 averages the features of a region, which leaves
    # little of their differences.
    ("cls_score.weight", (81, 1024), 0.5),
    ("cls_score.weight", (81, 2048), 3.0),
    ("mask_head.predictor.weight", None, 0.7),
)
# What is added to the biases of the classes, so that some tens of objects score above the
# threshold in a small image: against all 80 of every anchor, or for the background, the last.
_CLASS_OFFSETS = (
    ("head.cls_score.bias", slice(None), -8.0),
    ("box_predictor.cls_score.bias", slice(80, 81), 7.5),
    ("cls_score.bias", slice(80, 81), 5.0),
)


def seeded_weights(like: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Weights with which a detector finds objects, of its own state dict's names and shapes.

    Args:
        like: a state dict of the bundled or of Detectron2's detector; its values do not matter.
    """
    return {name: torch.from_numpy(_parameter(name, tuple(x.shape))) for name, x in like.items()}


def seeded_image(seed: int, height: int, width: int) -> Tensor:
    """Patches of random colours, large and small on top of each other: 3 x H x W, 0 to 255."""
    total = np.zeros((3, height, width), dtype=np.int64)
    for side in (2, 8, 32):
        rows, columns = -(-height // side), -(-width // side)
        bits = np.random.PCG64([seed, side]).random_raw(3 * rows * columns)
        colors = (bits >> np.uint64(56)).astype(np.int64).reshape(3, rows, columns)
        patches = np.kron(colors, np.ones((1, side, side), dtype=np.int64))
        total += patches[:, :height, :width]
    return torch.from_numpy((total // 3).astype(np.float32))


def _parameter(name: str, shape: Tuple[int, ...]) -> np.ndarray:
    if not shape:  # Counts the batches of a training.
        return np.zeros(shape, dtype=np.int64)
    values = _uniform(name, shape)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        values = 1 + 0.5 * values
    elif name.endswith(("bias", "running_mean")):
        values = 0.1 * values
    else:
        # He's deviation for layers followed by a ReLU. Filters that sum to zero let through what
        # differs between places; the rest would drown in what they have in common.
        fan_in = int(np.prod(shape[1:]))
        filters = values.reshape(shape[0], fan_in)
        values = (filters - filters.mean(axis=1, keepdims=True)).reshape(shape)
        values = values * np.sqrt(6 / fan_in)
    for end, of_shape, gain in _GAINS:
        if name.endswith(end) and of_shape in (None, shape):
            values = values * gain
            break
    for end, classes, offset in _CLASS_OFFSETS:
        if name.endswith(end):
            values[classes] += offset
            break
    return values.astype(np.float32)


def _uniform(name: str, shape: Tuple[int, ...]) -> np.ndarray:
    """Multiples of 2**-23 from -1 to 1, seeded by the name; their sums in float64 are exact."""
    count = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw((count + 1) // 2)
    # The shifts spell out which half of a number comes first, which `view` leaves to the machine.
    halves = np.stack([bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)], axis=1).ravel()
    return ((halves[:count] >> np.uint64(8)).astype(np.float64) / 2**23 - 1).reshape(shape)
