"""The golden outputs: for which images, how they are stored, and when others are the same.

An archive per test model in `data` has, for each call, image and field, one array, and as `about` a
JSON text that says what computed them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from seeded_weights import seeded_image
from torch import Tensor, nn

from detectors.build import fields_of as fields_in
from models import Model

DATA = Path(__file__).parent / "data"
# Scores this close may change places by rounding.
TIE = 2e-5
# Largest differences: pixels, score, probability; and the share of pixels of pasted masks.
BOX, SCORE, MASK, PIXELS = 1e-2, 1e-4, 1e-4, 1e-4
# Largest difference of a logit, and its share of it: half of what 16 bits leave, and some more.
LOGIT = 1e-3
# Fields of logits for each pixel, which are stored in 16 bits.
MAPS = ("pred_keypoint_heatmaps", "sem_seg")
# Field -> the largest difference, and its share of the value.
TOLERANCES = {
    "scores": (SCORE, 0.0),
    "objectness_logits": (SCORE, 0.0),
    "pred_boxes": (BOX, 0.0),
    "proposal_boxes": (BOX, 0.0),
    **dict.fromkeys(MAPS, (LOGIT, LOGIT)),
}

Fields = Dict[str, np.ndarray]


def calls(model: Model) -> Dict[str, Tuple[Tensor, ...]]:
    """Name -> images of a call. The modules are traced with `trace`; the others differ in size.

    `divisible` needs no padding, `odd` does, and `tiny` is about as small as can be.
    """
    if model.images_per_call == 2:
        return {
            "trace": (seeded_image(1, 96, 128), seeded_image(2, 96, 128)),
            "odd": (seeded_image(1, 107, 141), seeded_image(2, 64, 96)),
            "tiny": (seeded_image(1, 33, 32), seeded_image(3, 75, 101)),
        }
    # The head of C4 is heavy: less to propose in smaller images.
    sizes = ((64, 96), (75, 101)) if "_C4_" in model.config else ((96, 128), (107, 141))
    return {
        "trace": (seeded_image(1, *sizes[0]),),
        "odd": (seeded_image(1, *sizes[1]),),
        "tiny": (seeded_image(1, 33, 32),),
    }


def shapes_of(module: nn.Module) -> Dict[str, str]:
    """The names of a module's parameters and buffers, and their shapes, as 64x3x7x7."""
    return {
        name: "x".join(str(side) for side in value.shape)
        for name, value in module.state_dict().items()
    }


def fields_of(outputs: Sequence[Tensor], model: Model) -> List[Fields]:
    """The flat tuple of an export as one set of named arrays for each image."""
    count = len(fields_in(model))
    assert len(outputs) == count * model.images_per_call
    return [
        {name: x.numpy() for name, x in zip(fields_in(model), outputs[start : start + count])}
        for start in range(0, len(outputs), count)
    ]


def save(name: str, outputs: Mapping[str, Sequence[Fields]], about: Mapping[str, Any]) -> Path:
    """Writes the archive of a test model. Heatmaps and probabilities keep 16 bits.

    Of probabilities that is an error of 0.8e-5, of logits one of 1/2048 of each.
    """
    arrays = {"about": np.array(json.dumps(about))}
    for call, images in outputs.items():
        for n, fields in enumerate(images):
            arrays.update({f"{call}/{n}/{field}": _pack(x, field) for field, x in fields.items()})
            masks = fields.get("pred_masks")
            if masks is not None and masks.dtype == bool:
                arrays[f"{call}/{n}/shape"] = np.array(masks.shape)
    path = DATA / f"golden_{name}.npz"
    np.savez_compressed(path, **arrays)
    return path


def load(name: str) -> Dict[str, List[Fields]]:
    """Call -> the fields of each image, as `save` was given them."""
    outputs: Dict[str, List[Fields]] = {}
    with np.load(DATA / f"golden_{name}.npz") as arrays:
        for key in arrays.files:
            call, _, rest = key.partition("/")
            if not rest or rest.endswith("/shape"):
                continue
            n, field = rest.split("/")
            images = outputs.setdefault(call, [])
            if int(n) == len(images):
                images.append({})
            shape = arrays.get(f"{call}/{n}/shape")
            images[int(n)][field] = _unpack(arrays[key], field, shape)
    return outputs


def _pack(values: np.ndarray, field: str) -> np.ndarray:
    if field in MAPS:
        return values.astype(np.float16)
    if field != "pred_masks":
        return values
    return np.packbits(values) if values.dtype == bool else np.round(values * 65535).astype("u2")


def _unpack(values: np.ndarray, field: str, shape: Any) -> np.ndarray:
    if field in MAPS:
        return values.astype(np.float32)
    if field != "pred_masks":
        return values
    if shape is None:
        return values.astype(np.float32) / 65535
    return np.unpackbits(values, count=int(np.prod(shape))).reshape(shape).astype(bool)


def assert_same(found: Fields, expected: Fields) -> None:
    """Asserts that one image's detections are the expected ones, in the same order but for ties."""
    assert list(found) == list(expected)
    for field, values in expected.items():
        assert found[field].shape == values.shape, field
    if _scores(expected) is not None:
        order = _order(found, expected)
        found = {
            field: values if field in ("image_size", "sem_seg") else values[order]
            for field, values in found.items()
        }
    for field, values in expected.items():
        _assert_same_field(field, found[field], values)


def _assert_same_field(field: str, found: np.ndarray, expected: np.ndarray) -> None:
    if field in TOLERANCES:
        atol, rtol = TOLERANCES[field]
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=field)
    elif field == "pred_masks":
        _assert_same_masks(found, expected)
    elif field == "pred_keypoints":
        np.testing.assert_allclose(found[..., :2], expected[..., :2], rtol=0, atol=BOX)
        np.testing.assert_allclose(found[..., 2], expected[..., 2], rtol=0, atol=SCORE)
    else:
        np.testing.assert_array_equal(found, expected, err_msg=field)


def _assert_same_masks(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype == bool) == (expected.dtype == bool)
    if expected.dtype == bool:
        assert np.count_nonzero(found != expected) <= PIXELS * expected.size
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=MASK)


def _scores(fields: Fields) -> Any:
    """What detections or proposals are sorted by; None of what is neither."""
    return fields.get("scores", fields.get("objectness_logits"))


def _order(found: Fields, expected: Fields) -> np.ndarray:
    """Which detection found belongs to each expected one: its own place, or one it ties with."""
    scores = _scores(expected)
    boxes = "pred_boxes" if "pred_boxes" in expected else "proposal_boxes"
    order = np.arange(len(scores))
    for tied in np.split(order.copy(), np.flatnonzero(np.diff(scores) < -TIE) + 1):
        if len(tied) > 1:
            first, second = (x[boxes][tied] for x in (expected, found))
            distances = np.abs(first[:, None] - second[None]).max(axis=2)
            if "pred_classes" in expected:
                classes = (x["pred_classes"][tied] for x in (expected, found))
                distances = distances + 1e4 * np.not_equal.outer(*classes)
            order[tied] = tied[linear_sum_assignment(distances)[1]]
    return order
