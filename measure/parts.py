"""How far each part of an engine is from eager fp32: a worker's side of `measure.bisection`.

The engine compiles the detector once more, with what leaves each part as outputs. For each part,
eager fp32 computes on the CPU what that part alone makes of what the engine's own parts before it
gave. So an error that is only handed on is not charged to who hands it on. `tolerances.part_bound`
has what healthy engines may differ by.

Valid on Python 3.8, as workers import it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from backends.base import Backend
from detectors.export import Export
from detectors.taps import (
    IMAGES,
    Part,
    State,
    TappedExport,
    can_be_tapped,
    computed,
    computed_part,
    detections,
)
from errors import Unsupported
from measure.protocol import WatchedPart

# Candidates that are compared with all others at once.
ROWS = 256


@dataclass(frozen=True)
class Watched:
    """What came of watching an engine's parts in a call.

    Attributes:
        differences: of each part, as far as they could be computed.
        found: the flat tuple of the engine, while it was watched; empty where it did not get there.
        wanted: that of eager fp32.
    """

    differences: Tuple[WatchedPart, ...]
    found: List[Tensor]
    wanted: List[Tensor]


def watch(
    backend: Backend, export: Export, precision: str, device: str, images: Sequence[Tensor]
) -> Watched:
    """Compiles a detector with its parts as outputs, and holds each against eager fp32.

    Args:
        export: of the detector; its module is on the device.
        images: of a call, on the device.

    Raises:
        errors.Unsupported: it is none of the bundled detectors, or the engine cannot take it with
            its parts as outputs.
    """
    if not can_be_tapped(export):
        raise Unsupported("only the bundled detectors have parts that can be watched")
    tapped = TappedExport(export)
    optimized = backend.optimize(tapped, precision, device)
    with torch.no_grad():
        outputs = optimized.call(*images)
    detector = export.eager.detector
    if device != "cpu":
        detector = copy.deepcopy(detector).cpu()
    return compare(tapped.parts, detector, tapped.state(outputs, images))


def compare(parts: Sequence[Part], detector: nn.Module, state: State) -> Watched:
    """Holds what left each part of an engine against eager fp32.

    It ends at the first part that gives what is no number: nothing can be computed from that.

    Args:
        detector: the reference, on the CPU.
        state: of the engine, see `TappedExport.state`.
    """
    images = state[IMAGES]
    wanted = computed(parts, detector, images)
    differences: List[WatchedPart] = []
    for part in parts:
        found = state[part.name]
        try:
            own = difference_of(part, computed_part(part, detector, state), found, len(images))
        except (IndexError, RuntimeError):  # A class that there is not, for example.
            own = None
        whole = None
        if not part.of_regions:
            listed = found[: part.listed * len(images)] if part.listed else found
            whole = difference_of(part, wanted[part.name][: len(listed)], listed, len(images))
        differences.append(WatchedPart(part.name, part.kind, own, whole))
        if own is None:
            return Watched(tuple(differences), [], detections(detector, wanted))
    found = detections(detector, state)
    return Watched(tuple(differences), found, detections(detector, wanted))


def difference_of(
    part: Part, wanted: Sequence[Tensor], found: Sequence[Tensor], images: int
) -> Optional[float]:
    """How far what left a part is from what should have.

    Args:
        images: of the call.

    Returns:
        the largest of all tensors and lists; None where they cannot be compared.
    """
    differences: List[Optional[float]] = []
    listed = part.listed * images
    for start in range(0, listed, part.listed or 1):
        own = slice(start, start + part.listed)
        differences.append(list_difference(wanted[own], found[own], part.are_logits))
    for one, other in zip(wanted[listed:], found[listed:]):
        differences.append(tensor_difference(one, other))
    known = [x for x in differences if x is not None]
    return max(known) if len(known) == len(differences) else None


def tensor_difference(wanted: Tensor, found: Tensor) -> Optional[float]:
    """The root mean square of the difference, as a share of the standard deviation.

    Returns:
        None where they differ in shape, or are no numbers.
    """
    if wanted.shape != found.shape:
        return None
    if wanted.numel() == 0:
        return 0.0
    one, other = wanted.double(), found.double()
    spread = float(one.std(unbiased=False)) or 1.0
    return _finite(float((one - other).square().mean().sqrt()) / spread)


def list_difference(
    wanted: Sequence[Tensor], found: Sequence[Tensor], are_logits: bool
) -> Optional[float]:
    """How far two lists of boxes are from each other, 0 to 1.

    To each box belongs the nearest of the other list, of its class. How far that is, is the largest
    difference of a coordinate, as a share of the mean side of the box, and the difference of the
    scores, of logits as a share of their range; 1 at most. The mean over all boxes of either list
    counts, the larger of the two, or the share that one list is shorter by.

    Args:
        wanted, found: boxes, N x 4, scores, N, and perhaps classes, N.

    Returns:
        None where there are values that are no numbers.
    """
    count, other = len(wanted[0]), len(found[0])
    if any(len(x) != other for x in found) or found[0].shape[1:] != wanted[0].shape[1:]:
        return None
    if not all(bool(torch.isfinite(x).all()) for x in found):
        return None
    if 0 in (count, other):
        return float(count != other)
    unit = float(wanted[1].std(unbiased=False)) * 12**0.5 if are_logits else 1.0
    sides = [_listed(x, unit or 1.0) for x in (wanted, found)]
    means = [_mean_distance(*pair) for pair in (sides, sides[::-1])]
    return max(*means, abs(count - other) / max(count, other))


def _listed(tensors: Sequence[Tensor], unit: float) -> Tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores in units of their range, and classes."""
    boxes, scores = tensors[0].float(), tensors[1].float() / unit
    return boxes, scores, tensors[2] if len(tensors) > 2 else torch.zeros_like(scores)


def _mean_distance(
    own: Tuple[Tensor, Tensor, Tensor], others: Tuple[Tensor, Tensor, Tensor]
) -> float:
    """The mean over boxes of how far the nearest of the others is, 1 at most."""
    total = 0.0
    for start in range(0, len(own[0]), ROWS):
        boxes, scores, classes = (x[start : start + ROWS] for x in own)
        sides = (boxes[:, 2:] - boxes[:, :2]).mean(dim=1).clamp(min=1)
        apart = torch.cdist(boxes, others[0], p=math.inf) / sides[:, None]
        apart += (scores[:, None] - others[1]).abs()
        apart[classes[:, None] != others[2]] = 1.0
        total += float(apart.min(dim=1).values.clamp(max=1).double().sum())
    return total / len(own[0])


def _finite(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None
