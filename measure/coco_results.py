"""The evaluator's side of a data set: images in, detections out in COCO's format, judged.

It runs in a worker of the suite's own environment, as pycocotools is C that may crash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from detectors import inputs
from errors import InputError
from measure import accuracy, protocol
from measure.dataset import OTHER_THAN_ANNOTATED, UNREADABLE
from measure.detections import Detections, Malformed, split
from results.record import AveragePrecision


def read_batch(request: protocol.ReadBatch) -> dict[str, str]:
    """Reads images as the detector sees them, into a file.

    Returns:
        id -> why an image could not be read.
    """
    images, left_out = {}, {}
    for image in request.images:
        try:
            pixels = inputs.read_image(Path(image.path), None, least=1)
        except InputError:
            left_out[str(image.id)] = UNREADABLE
            continue
        if pixels.shape[-2:] != tuple(image.size):
            left_out[str(image.id)] = OTHER_THAN_ANNOTATED
            continue
        images[str(image.id)] = inputs.seen(pixels, request.view).astype(np.uint8)
    np.savez(request.file, **images)
    return left_out


def keep_batch(request: protocol.KeepBatch) -> None:
    """Appends what was found in images to a file, a line for each.

    Raises:
        errors.InputError: it is nothing that can be judged.
    """
    count = len(request.fields)
    lines = []
    with np.load(request.outputs, allow_pickle=False) as arrays:
        for image in request.images:
            flat = [arrays[f"{image.id}/{place}"] for place in range(count)]
            try:
                detections = split(flat, request.fields)[0]
            except Malformed as error:
                raise InputError(f"what it finds is malformed: {error}") from None
            found = list(results(detections, image.size, image.id, request.category_ids))
            lines.append(json.dumps([image.id, found]))
    with open(request.kept, "a") as file:
        file.writelines(line + "\n" for line in lines)


def results(
    detections: Detections, size: Sequence[int], image_id: int, category_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Detections of an image in COCO's format, in the image's own size.

    As Detectron2 does it: boxes are clipped to the image, and those that are empty then are left
    out.

    Args:
        size: height and width of the image.

    Raises:
        errors.InputError: they are rotated, or of classes that there are not.
    """
    boxes, classes = detections.boxes, detections.classes
    if boxes.shape[1] != 4:
        raise InputError("rotated boxes are not judged by COCO's measure")
    if len(classes) and not 0 <= classes.min() <= classes.max() < len(category_ids):
        odd = next(x for x in classes.tolist() if not 0 <= x < len(category_ids))
        raise InputError(f"it finds class {odd}, and there are {len(category_ids)} categories")
    scale = np.array([size[1], size[0]]) / np.array(detections.image_size[::-1])
    boxes = np.clip(boxes * np.tile(scale, 2), 0, np.tile([size[1], size[0]], 2))
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = np.flatnonzero((sides > 0).all(axis=1))
    masks = None
    if detections.masks is not None:
        masks = _encoded(detections.masks[kept], boxes[kept], size)
    for place, at in enumerate(kept.tolist()):
        result = {
            "image_id": image_id,
            "category_id": category_ids[classes[at]],
            "bbox": [*boxes[at, :2].tolist(), *sides[at].tolist()],
            "score": float(detections.scores[at]),
        }
        if masks is not None:
            result["segmentation"] = masks[place]
        if detections.keypoints is not None:
            points = detections.keypoints[at].copy()
            # COCO's are the corners of pixels that Detectron2's are the centers of.
            points[:, :2] = points[:, :2] * scale - 0.5
            result["keypoints"] = points.reshape(-1).tolist()
        yield result


def _encoded(masks: np.ndarray, boxes: np.ndarray, size: Sequence[int]) -> list[dict[str, Any]]:
    """Masks as run lengths in COCO's compressed form.

    Args:
        masks: N x 1 x M x M probabilities within the boxes, or N x H x W in an image of any size.
        boxes: N x 4.
        size: height and width of the image.
    """
    import torch
    import torch.nn.functional as F
    from pycocotools import mask as coco_masks

    from detectors.masks import paste_masks

    height, width = int(size[0]), int(size[1])
    if masks.ndim == 4:
        probabilities = torch.from_numpy(np.ascontiguousarray(masks[:, 0])).float()
        corners = torch.from_numpy(boxes).float()
        whole = paste_masks(probabilities, corners, torch.tensor([height, width])).numpy()
    elif masks.shape[1:] == (height, width):
        whole = masks.astype(bool)
    else:
        resized = F.interpolate(
            torch.from_numpy(masks.astype(np.float32))[None],
            size=[height, width],
            mode="bilinear",
            align_corners=False,
        )
        whole = (resized[0] >= 0.5).numpy()
    encoded = coco_masks.encode(np.asfortranarray(whole.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(x["size"]), "counts": x["counts"].decode()} for x in encoded]


def keep_copy(request: protocol.KeepCopy) -> None:
    """Writes a small copy of an image; one that lies there already is replaced.

    Raises:
        errors.InputError: the image cannot be read, or the copy not written.
    """
    pixels = inputs.read_image(Path(request.path), None, least=1)
    to = Path(request.to)
    try:
        inputs.write_image(pixels, to, request.longest)
    except OSError as error:
        to.unlink(missing_ok=True)  # Half of one would be drawn.
        reason = error.strerror or error
        raise InputError(f"{to.name} could not be kept: {reason}") from None


def kept_images(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """What `keep_batch` has kept, image by image; a line that was cut off is none."""
    with open(path) as file:
        for line in file:
            try:
                image_id, found = json.loads(line)
            except ValueError:
                return
            yield image_id, found


def judge(request: protocol.Judge) -> tuple[int, dict[str, AveragePrecision]]:
    """Average precision of what was kept, and what it differs by from the reference's.

    Returns:
        how many detections there are, and the figures of each task.
    """
    found = [x for _, each in kept_images(Path(request.kept)) for x in each]
    tasks, resamples = {}, {}
    reference = {} if request.is_reference else dict(np.load(request.resamples))
    figures = Path(request.resamples).with_suffix(".json")
    theirs = {} if request.is_reference else json.loads(figures.read_text())
    for task in request.tasks:
        sigmas = request.oks_sigmas or None
        evaluation = accuracy.evaluate(Path(request.truth), found, task, sigmas)
        own = accuracy.average_precision(evaluation, request.classes)
        values = accuracy.resampled(evaluation, request.seed)
        if request.is_reference:
            resamples[task] = values
            tasks[task] = own
            continue
        known = AveragePrecision(**theirs[task])
        both = values, reference[task]
        tasks[task] = accuracy.with_difference(
            own, known, both, evaluation.images, request.least_ratio
        )
    if request.is_reference:
        np.savez(request.resamples, **resamples)
        figures.write_text(json.dumps({task: asdict(own) for task, own in tasks.items()}))
    return len(found), tasks
