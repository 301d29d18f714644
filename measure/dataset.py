"""A data set in COCO's format: read and checked before anything is measured."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detectors.inputs import Size
from errors import InputError
from results.environment import file_name, readable

# Larger annotations are a slip; those of all that COCO has are a tenth of it.
MOST_BYTES = 4 << 30
# pycocotools draws polygons step by step, and crashes where they leave the image by too much.
MOST_COORDINATE = 1e5
# What a character of compressed run lengths can be: 48 and six bits.
RUN_CHARACTERS = range(48, 48 + 64)

# Why images are left out.
UNREADABLE = "unreadable"
OTHER_THAN_ANNOTATED = "of another size than the annotations say"
OTHER_SIZE = "of a size that the engines are not made for"


class _Image(msgspec.Struct):
    id: int
    file_name: str
    height: int
    width: int


class _Category(msgspec.Struct):
    id: int
    name: str


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | None = None
    area: float | None = None
    iscrowd: int | bool | None = 0
    segmentation: Any = None
    keypoints: list[float] | None = None
    num_keypoints: int | None = None


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


@dataclass(frozen=True)
class Picture:
    """An image of a data set.

    Attributes:
        name: of the file, without its folders.
        size: height and width, as the annotations say.
    """

    id: int
    path: Path
    name: str
    size: Size


@dataclass(frozen=True)
class Dataset:
    """Images and what is in them.

    Attributes:
        name: of the file of annotations.
        digest: tells it from others: the annotations, and names and bytes of the images.
        classes: names of the categories in the order of their ids, which is that of the classes.
        category_ids: in the same order.
        images: those that are taken, in the order of their ids.
        total: how many there are.
        annotations: of the images, in COCO's format; complete, and with ids from 1 on.
        keypoints: how many an object has; 0: none are annotated.
        has_masks: whether all objects have a mask.
    """

    name: str
    digest: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[Picture, ...]
    total: int
    annotations: tuple[dict[str, Any], ...]
    keypoints: int
    has_masks: bool

    def write(self, images: Iterable[int], path: Path) -> None:
        """Writes annotations in COCO's format, of some of its images."""
        wanted = set(images)
        content = {
            "images": [
                {"id": x.id, "file_name": x.name, "height": x.size[0], "width": x.size[1]}
                for x in self.images
                if x.id in wanted
            ],
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.classes, strict=True)
            ],
            "annotations": [x for x in self.annotations if x["image_id"] in wanted],
        }
        path.write_text(json.dumps(content))


def read(
    annotations: Path,
    root: Path,
    limit: int | None,
    seed: int,
    options: tuple[str, str] = ("--dataset", "--image-root"),
) -> Dataset:
    """Reads annotations and looks for their images.

    Args:
        root: folder that the names of the images start from.
        limit: how many images are taken, drawn by `seed`; None: all.
        options: that name the two on the command line.

    Raises:
        errors.InputError: they cannot be read, are of another format, contradict themselves, name
            images that are not there, or have no object.
    """
    name = file_name(annotations)
    try:
        if annotations.stat().st_size > MOST_BYTES:
            raise InputError(f"{name} has more than {MOST_BYTES >> 30} GiB")
        content = annotations.read_bytes()
    except OSError as error:
        raise InputError(f"{options[0]} {annotations}: {error.strerror or error}") from None
    try:
        file = msgspec.json.decode(content.removeprefix(codecs.BOM_UTF8), type=_File)
    except msgspec.ValidationError as error:
        raise InputError(f"{name} is not in COCO's format: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{name} is no JSON: {error}") from None
    _check(file, name)
    images = _sample(sorted(file.images, key=lambda image: image.id), limit, seed)
    categories = sorted(file.categories, key=lambda category: category.id)
    pictures = tuple(
        Picture(x.id, root / x.file_name, file_name(x.file_name), (x.height, x.width))
        for x in images
    )
    _check_files(pictures, name, root, options[1])
    sizes = {picture.id: picture.size for picture in pictures}
    taken = [x for x in file.annotations if x.image_id in sizes]
    if not any(not x.iscrowd for x in taken):
        of = "" if limit is None else f" in the {len(pictures)} images that were taken"
        raise InputError(f"{name} has no objects{of}: there is nothing to be found")
    complete = tuple(
        _complete(x, number, sizes[x.image_id], name) for number, x in enumerate(taken, start=1)
    )
    counts = {len(x["keypoints"]) // 3 for x in complete if "keypoints" in x}
    if len(counts) > 1:
        raise InputError(f"{name} has objects of {min(counts)} and of {max(counts)} keypoints")
    keypoints = max(counts, default=0)
    if keypoints:
        for x in complete:  # What has none is ignored, where keypoints are judged.
            x.setdefault("keypoints", [0.0] * 3 * keypoints)
            x.setdefault("num_keypoints", 0)
    return Dataset(
        name=name,
        digest=_digest(content, pictures),
        classes=_names(categories),
        category_ids=tuple(category.id for category in categories),
        images=pictures,
        total=len(file.images),
        annotations=complete,
        keypoints=keypoints,
        has_masks=all("segmentation" in x for x in complete),
    )


def _digest(content: bytes, pictures: Sequence[Picture]) -> str:
    """Of annotations and, as far as their sizes tell, of the images: there may be many."""
    hasher = hashlib.sha256(content)
    for picture in pictures:
        hasher.update(repr((picture.name, picture.path.stat().st_size)).encode())
    return hasher.hexdigest()[:16]


def _names(categories: Sequence[_Category]) -> tuple[str, ...]:
    """Names of categories; of two that are called the same, with their ids."""
    count = Counter(category.name for category in categories)
    return tuple(x.name if count[x.name] == 1 else f"{x.name} ({x.id})" for x in categories)


def _sample(images: list[_Image], limit: int | None, seed: int) -> list[_Image]:
    if limit is None or limit >= len(images):
        return images
    drawn = np.random.default_rng(seed).choice(len(images), limit, replace=False)
    return [images[place] for place in sorted(drawn)]


def _check(file: _File, name: str) -> None:
    """Makes sure that a data set does not contradict itself.

    Raises:
        errors.InputError: it does.
    """
    if not file.images:
        raise InputError(f"{name} has no images")
    if not file.categories:
        raise InputError(f"{name} has no categories")
    known = [x.id for x in file.annotations if x.id is not None]
    for what, ids in (
        ("image", [x.id for x in file.images]),
        ("category", [x.id for x in file.categories]),
        ("annotation", known),
    ):
        twice = [number for number, count in Counter(ids).items() if count > 1]
        if twice:
            raise InputError(
                f"{name}: {len(twice)} {what} id(s) are used more than once, such as {twice[0]}"
            )
    images, categories = {x.id for x in file.images}, {x.id for x in file.categories}
    for image in file.images:
        if min(image.height, image.width) < 1:
            raise InputError(f"{name}: image {image.id} is {image.height} x {image.width}")
    for place, x in enumerate(file.annotations):
        where = f"{name}: annotation {place if x.id is None else x.id}"
        if x.image_id not in images:
            raise InputError(f"{where} is of image {x.image_id}, which is not there")
        if x.category_id not in categories:
            raise InputError(f"{where} is of category {x.category_id}, which is not there")
        if x.area is not None and x.area < 0:
            raise InputError(f"{where} has the area {x.area:g}")
        if not all(map(math.isfinite, x.bbox)) or min(x.bbox[2:]) < 0:
            raise InputError(f"{where} has the box {list(x.bbox)}: x, y, width, height were wanted")


def _check_files(pictures: Sequence[Picture], name: str, root: Path, option: str) -> None:
    """Makes sure that the files of images are there.

    Raises:
        errors.InputError: some are not.
    """
    if not root.is_dir():
        raise InputError(f"{option} {root} is no folder")
    missing = [picture.path for picture in pictures if not os.path.isfile(picture.path)]
    if missing:
        # As the annotations have them: a folder may be there twice.
        names = [readable(os.path.relpath(path, root))[:80] for path in missing[:3]]
        more = ", ..." if len(missing) > 3 else ""
        count = f"{len(missing)} of {len(pictures)} images"
        raise InputError(f"{name}: {count} are not in {root}: {', '.join(names)}{more}")


def _complete(x: _Annotation, number: int, size: Size, name: str) -> dict[str, Any]:
    """An annotation with what may be left out, and a number that is not 0.

    Raises:
        errors.InputError: its mask or its keypoints are none.
    """
    where = f"{name}: annotation {number - 1 if x.id is None else x.id}"
    area = x.bbox[2] * x.bbox[3] if x.area is None else x.area
    out: dict[str, Any] = {
        "id": number,
        "image_id": x.image_id,
        "category_id": x.category_id,
        "bbox": list(x.bbox),
        "area": area,
        "iscrowd": int(bool(x.iscrowd)),
    }
    if x.segmentation:
        flaw = mask_flaw(x.segmentation, size)
        if flaw is not None:
            raise InputError(f"{where} has a broken mask: {flaw}")
        out["segmentation"] = x.segmentation
    if x.keypoints is not None:
        if len(x.keypoints) % 3 or not all(map(math.isfinite, x.keypoints)):
            raise InputError(f"{where} has keypoints that are not x, y and visibility each")
        out["keypoints"] = x.keypoints
        visible = sum(1 for value in x.keypoints[2::3] if value > 0)
        out["num_keypoints"] = visible if x.num_keypoints is None else x.num_keypoints
    return out


def mask_flaw(mask: Any, size: Size) -> str | None:
    """Why something is no mask in COCO's format: polygons or run lengths; None: it is one.

    Checked here, as pycocotools decodes run lengths into memory that it does not have.

    Args:
        size: height and width of the image.
    """
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return "a polygon has three points or more, x and y each"
            if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in polygon):
                return "a polygon has coordinates that are no numbers"
            if max(map(abs, polygon)) > MOST_COORDINATE:
                return f"a polygon has the coordinate {max(polygon, key=abs):g}"
        return None
    if not isinstance(mask, dict) or "counts" not in mask:
        return "it is neither polygons nor run lengths"
    if mask.get("size") != list(size):
        return f"it is of size {mask.get('size')} in an image of {list(size)}"
    counts = mask["counts"]
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(x, int) and x >= 0 for x in runs):
        return "its run lengths are no whole numbers"
    if sum(runs) != size[0] * size[1]:
        return f"its run lengths add up to {sum(runs)} pixels instead of {size[0] * size[1]}"
    return None


def _run_lengths(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed form; None where it is broken.

    A number has five bits a character, the lowest first, and a sixth for whether it goes on. The
    last bit of the last is its sign. From the fourth number on it is the difference from the number
    two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        if ord(character) not in RUN_CHARACTERS or shift > 30:
            return None
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs
