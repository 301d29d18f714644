"""Weights and images for the tests of the detectors: seeded, and the same on every machine.

They come from the raw bits of NumPy's PCG64, a stream that NumPy guarantees, by integer and exactly
rounded arithmetic. A generator's distributions, and PyTorch's, may change with a release.
"""

import zlib
from typing import Dict, Mapping

import numpy as np
import torch
from torch import Tensor, nn

# What scales the last layers, so that a detector finds some tens of objects, with scores well
# apart. The first entry that fits the end of a parameter's name, and its shape if it has one.
_GAINS = (
    ("stem.conv1.weight", None, 1 / 60),  # pixels differ by some 60
    ("conv3.norm.weight", None, 0.4),  # residuals that grow slowly keep rounding errors small
    ("head.cls_score.weight", None, 2.0),
    ("head.bbox_pred.weight", None, 0.15),
    ("anchor_deltas.weight", None, 0.15),
    ("objectness_logits.weight", None, 1.0),
    ("cls_score.weight", (81, 2048), 8.0),
    ("cls_score.weight", None, 2.0),
    ("bbox_pred.weight", None, 0.5),
    ("predictor.weight", None, 2.0),
)


def _uniform(name: str, shape) -> np.ndarray:
    """Float32 between -1 and 1, seeded by the name."""
    count = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw((count + 1) // 2)
    integers = bits.view(np.uint32)[:count] >> 8
    return (integers.astype(np.float32) / 2**23 - 1).reshape(shape)


def _gain(name: str, shape) -> float:
    for end, of_shape, gain in _GAINS:
        if name.endswith(end) and of_shape in (None, tuple(shape)):
            return gain
    return 1.0
