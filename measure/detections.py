"""What was found in an image, taken from the flat tuple of a call and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

# Fields of which it is known what they are, besides boxes and scores.
KNOWN = ("pred_classes", "image_size", "pred_masks", "pred_keypoints", "sem_seg")


class Malformed(ValueError):
    """An output that is not what detections look like; the message says in what way."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, N objects.

    Attributes:
        boxes: N x 4, XYXY in pixels; or N x 5, rotated, see `geometry.corners`.
        scores: N; of proposals, logits.
        classes: N integers; of proposals, 0.
        image_size: height and width that the boxes refer to, in pixels.
        masks: N x 1 x S x S probabilities within the boxes, or N x H x W bool in the image, or
            None for a detector without masks.
        keypoints: N x K x 3: x and y in pixels, and a score; None for a detector without.
        sem_seg: K x H x W logits of the classes of each pixel, or None.
        others: name -> N x anything, what else there is of each object.
        are_proposals: whether they are a proposal network's.
        score_unit: what the scores were divided by.
        has_objects: False where there is but `sem_seg`.
        not_compared: names of what else there is, of which nobody knows what it is.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    image_size: Tuple[int, int]
    masks: Optional[np.ndarray] = None
    keypoints: Optional[np.ndarray] = None
    sem_seg: Optional[np.ndarray] = None
    others: Dict[str, np.ndarray] = field(default_factory=dict)
    are_proposals: bool = False
    score_unit: float = 1.0
    has_objects: bool = True
    not_compared: Tuple[str, ...] = ()


def split(outputs: Sequence[Any], fields: Sequence[str]) -> List[Detections]:
    """The detections of every image of a call, from its flat tuple.

    Args:
        outputs: arrays, `fields` of the first image, then those of the next.
        fields: Detectron2's names of an image's tensors: `pred_boxes`, `scores`, `pred_classes`
            and `image_size`, perhaps `pred_masks`, `pred_keypoints` and others before it, and
            `sem_seg`; or `proposal_boxes`, `objectness_logits` and `image_size`; or `sem_seg`.

    Raises:
        Malformed: the tuple does not hold detections.
    """
    if not isinstance(outputs, (tuple, list)):
        raise Malformed(f"a {type(outputs).__name__} instead of a tuple of tensors")
    if not outputs or len(outputs) % len(fields):
        raise Malformed(f"{len(outputs)} tensors, where an image has {len(fields)}")
    for value in outputs:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise Malformed(f"a {type(value).__name__} where a tensor should be")
    starts = range(0, len(outputs), len(fields))
    return [_detections(dict(zip(fields, outputs[at : at + len(fields)]))) for at in starts]


def _detections(arrays: Dict[str, np.ndarray]) -> Detections:
    boxes_name = next((x for x in ("pred_boxes", "proposal_boxes") if x in arrays), None)
    if boxes_name is not None:
        return _objects(arrays, boxes_name)
    if "sem_seg" not in arrays:
        raise Malformed(f"neither boxes nor sem_seg, but {', '.join(arrays)}")
    sem_seg = _map(arrays["sem_seg"])
    return Detections(
        boxes=np.zeros((0, 4)),
        scores=np.zeros(0),
        classes=np.zeros(0, dtype=np.int64),
        image_size=(sem_seg.shape[1], sem_seg.shape[2]),
        sem_seg=sem_seg,
        has_objects=False,
        not_compared=tuple(name for name in arrays if name != "sem_seg"),
    )


def _objects(arrays: Dict[str, np.ndarray], boxes_name: str) -> Detections:
    boxes = arrays[boxes_name]
    are_proposals = "scores" not in arrays and "objectness_logits" in arrays
    scores_name = "objectness_logits" if are_proposals else "scores"
    # A model may rank nothing, or know but one class.
    scores = arrays.get(scores_name, np.ones(len(boxes)))
    count = len(scores) if scores.ndim == 1 else -1
    _require(count >= 0, scores_name, scores, "one dimension")
    # N x 5 are rotated boxes.
    _require(boxes.shape in ((count, 4), (count, 5)), boxes_name, boxes, f"{count} x 4")
    classes = arrays.get("pred_classes", np.zeros(count, dtype=np.int64))
    _require(classes.shape == (count,), "pred_classes", classes, f"{count}")
    if "image_size" not in arrays:
        raise Malformed("there is no image_size")
    image_size = arrays["image_size"]
    _require(image_size.shape == (2,), "image_size", image_size, "2")
    masks, keypoints = arrays.get("pred_masks"), arrays.get("pred_keypoints")
    if masks is not None:
        right = masks.ndim in (3, 4) and len(masks) == count
        _require(right, "pred_masks", masks, f"{count} masks")
    if keypoints is not None:
        right = keypoints.ndim == 3 and len(keypoints) == count and keypoints.shape[2] == 3
        _require(right, "pred_keypoints", keypoints, f"{count} x K x 3")
    sem_seg = _map(arrays["sem_seg"]) if "sem_seg" in arrays else None
    # What is of the objects stands before the size of the image.
    before = list(arrays)[: list(arrays).index("image_size")]
    known = {boxes_name, scores_name, *KNOWN}
    others = {
        name: arrays[name]
        for name in before
        if name not in known and arrays[name].shape[:1] == (count,)
    }
    for name, array in arrays.items():
        if name in known or name in others:
            _require_finite(name, array)
    if (classes != np.floor(classes)).any():
        raise Malformed("pred_classes holds fractions")
    return Detections(
        boxes=boxes.astype(np.float64),
        scores=scores.astype(np.float64),
        classes=classes.astype(np.int64),
        image_size=(int(image_size[0]), int(image_size[1])),
        masks=masks,
        keypoints=None if keypoints is None else keypoints.astype(np.float64),
        sem_seg=sem_seg,
        others=others,
        are_proposals=are_proposals,
        not_compared=tuple(name for name in arrays if name not in {*known, *others}),
    )


def _map(logits: np.ndarray) -> np.ndarray:
    _require(logits.ndim == 3 and logits.size > 0, "sem_seg", logits, "K x H x W")
    _require_finite("sem_seg", logits)
    return logits


def _require_finite(name: str, array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Malformed(f"{name} holds NaN or infinity")


def _require(right: bool, name: str, array: np.ndarray, wanted: str) -> None:
    if not right:
        shape = by(array.shape) or "a single number"
        raise Malformed(f"{name} is {shape} where {wanted} was expected")


def by(lengths: Sequence[int]) -> str:
    """A shape in words: `7 x 4`."""
    return " x ".join(str(length) for length in lengths)
