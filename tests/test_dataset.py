"""Data sets in COCO's format: what is taken, and what is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from errors import InputError
from measure import dataset
from measure.dataset import mask_flaw, read

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapes"
Content = Dict[str, Any]


@pytest.fixture
def content() -> Content:
    return json.loads((EXAMPLE / "annotations.json").read_text())


@pytest.fixture
def taken(tmp_path) -> Callable[..., dataset.Dataset]:
    """Writes annotations, and reads them with the images of the example."""

    def take(content: Any, limit: Any = None, seed: int = 0) -> dataset.Dataset:
        path = tmp_path / "own.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read(path, EXAMPLE / "images", limit, seed)

    return take


@pytest.fixture
def refused(taken) -> Callable[[Any], str]:
    def refuse(content: Any) -> str:
        with pytest.raises(InputError) as caught:
            taken(content)
        text = str(caught.value)
        assert "\n" not in text
        assert "own.json" in text or "images" in text
        return text

    return refuse


def test_classes_are_in_the_order_of_the_ids_of_categories(taken, content):
    content["categories"].reverse()
    content["images"].reverse()
    own = taken(content)
    assert own.category_ids == (2, 5, 9)
    assert own.classes == ("circle", "square", "triangle")
    names = [x.name for x in own.images]
    assert names == sorted(names)
    assert (len(names), names[0]) == (12, "000000.png")
    assert own.images[0].size == (128, 160)
    assert (own.total, own.keypoints, own.has_masks) == (12, 0, True)


def test_what_other_programs_write_is_taken(taken, content):
    content["annotations"][0]["iscrowd"] = False
    content["annotations"][1]["iscrowd"] = None
    own = taken(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert {x["iscrowd"] for x in own.annotations} == {0}
    assert len(own.annotations) == 38


def test_another_image_of_the_same_name_is_another_data_set(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(EXAMPLE / "images", folder)
    before = read(EXAMPLE / "annotations.json", folder, None, 0).digest
    assert before == read(EXAMPLE / "annotations.json", EXAMPLE / "images", None, 0).digest
    shutil.copy(folder / "000003.png", folder / "000004.png")
    assert read(EXAMPLE / "annotations.json", folder, None, 0).digest != before


def test_two_categories_of_one_name_are_told_apart(taken, content):
    content["categories"][0]["name"] = "square"
    assert taken(content).classes == ("square (2)", "square (5)", "triangle")


def test_ids_start_at_one(taken, content):
    # pycocotools takes an object of id 0 for one that was not found.
    for place, each in enumerate(content["annotations"]):
        each["id"] = place
    assert [x["id"] for x in taken(content).annotations] == list(range(1, 39))
    for each in content["annotations"]:
        del each["id"]
    assert [x["id"] for x in taken(content).annotations] == list(range(1, 39))


def test_what_may_be_left_out_is_filled_in(taken, content):
    first = content["annotations"][0]
    for name in ("area", "iscrowd", "segmentation"):
        del first[name]
    own = taken(content)
    assert own.annotations[0]["area"] == pytest.approx(first["bbox"][2] * first["bbox"][3])
    assert own.annotations[0]["iscrowd"] == 0
    assert not own.has_masks


def test_an_object_without_keypoints_has_none_that_are_visible(taken, content):
    content["annotations"][2]["keypoints"] = [1, 2, 2, 3, 4, 1, 0, 0, 0]
    own = taken(content)
    assert own.keypoints == 3
    assert [x["num_keypoints"] for x in own.annotations] == [0, 0, 2] + 35 * [0]
    assert {len(x["keypoints"]) for x in own.annotations} == {9}


def test_objects_with_other_numbers_of_keypoints(refused, content):
    content["annotations"][2]["keypoints"] = [1, 2, 2]
    content["annotations"][3]["keypoints"] = [1, 2, 2, 3, 4, 1]
    assert "objects of 1 and of 2 keypoints" in refused(content)


def test_a_sample_is_drawn_by_the_seed(taken, content):
    drawn = {tuple(x.id for x in taken(content, 2, seed).images) for seed in range(8)}
    assert len(drawn) > 1
    assert all(len(ids) == 2 for ids in drawn)
    own = taken(content, 2, 3)
    assert own == taken(content, 2, 3)
    assert {x["image_id"] for x in own.annotations} <= {x.id for x in own.images}
    assert own.total == 12
    assert taken(content, 100) == taken(content)


def test_some_images_are_written_for_the_evaluator(taken, content, tmp_path):
    own = taken(content)
    own.write([own.images[1].id], tmp_path / "truth.json")
    written = json.loads((tmp_path / "truth.json").read_text())
    assert [x["id"] for x in written["images"]] == [own.images[1].id]
    assert {x["image_id"] for x in written["annotations"]} == {own.images[1].id}
    assert [x["id"] for x in written["categories"]] == [2, 5, 9]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b"", "is no JSON"),
        (b'{"images": [', "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b'{"images": [{"x": ' + b"[" * 100_000, "is no JSON"),
        (b"[]", "Expected `object`"),
        (b"{}", "required field `images`"),
        (b'{"images": [], "categories": [], "annotations": []}', "has no images"),
        (b'{"images": [{"id": 1, "file_name": "x"}]}', "`height` - at `$.images[0]`"),
    ],
)
def test_what_is_no_data_set_is_refused(refused, broken, words):
    assert words in refused(broken)


def test_files_that_are_not_there(tmp_path, content):
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "none.json", tmp_path, None, 0)
    with pytest.raises(InputError, match="nowhere is no folder"):
        read(EXAMPLE / "annotations.json", tmp_path / "nowhere", None, 0)
    with pytest.raises(InputError, match=r"12 of 12 images are not in .*: 000000.png, 000001.png"):
        read(EXAMPLE / "annotations.json", tmp_path, None, 0)
    content["images"][1]["file_name"] = "../secret.png"
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1 of 12 images are not in .*: ../secret.png$"):
        read(tmp_path / "own.json", EXAMPLE / "images", None, 0)
    # The folder may be in the names already.
    content["images"][1]["file_name"] = "images/000001.png"
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1 of 12 images are not in .*: images/000001.png$"):
        read(tmp_path / "own.json", EXAMPLE / "images", None, 0)
    content["images"][1]["file_name"] = "x" * 5000
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"1 of 12 images are not in .*: x{80}$"):
        read(tmp_path / "own.json", EXAMPLE / "images", None, 0)


def change(**changes: Any) -> Callable[[Dict[str, Any]], None]:
    return lambda each: each.update(changes)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change(bbox=[1, 2, 3]), "Expected `array` of length 4"),
        (change(bbox=[1, 2, -3, 4]), "x, y, width, height"),
        (change(bbox="box"), "Expected `array`"),
        (change(bbox=[1, 2, 1e999, 4]), ""),
        (change(image_id=7), "is of image 7, which is not there"),
        (change(category_id=3), "is of category 3, which is not there"),
        (change(segmentation=[[1, 2, 3, 4]]), "three points or more"),
        (change(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "three points or more"),
        (change(segmentation=[[1, 2, 3, 4, 5, "x"]]), "coordinates that are no numbers"),
        (change(segmentation=[1, 2]), "three points or more"),
        (change(segmentation=[[1, 2, 3, 4, 5, 1e9]]), "the coordinate 1e+09"),
        (change(segmentation=[[1, 2, -1e300, 4, 5, 6]]), "the coordinate -1e+300"),
        (change(area=-1), "has the area -1"),
        (change(segmentation="mask"), "neither polygons nor run lengths"),
        (change(segmentation={"size": [128, 160], "counts": [1, 2]}), "add up to 3 pixels"),
        (change(segmentation={"size": [160, 128], "counts": [20480]}), "size [160, 128]"),
        (change(segmentation={"size": [128, 160], "counts": "zzzz"}), "broken mask"),
        (change(segmentation={"size": [128, 160], "counts": "\x00"}), "no whole numbers"),
        (change(segmentation={"size": [128, 160], "counts": [-1, 20481]}), "no whole numbers"),
        (change(keypoints=[1.0, 2.0]), "x, y and visibility"),
    ],
)
def test_annotations_that_are_broken(refused, content, changed, words):
    changed(content["annotations"][3])
    assert words in refused(content)


def test_ids_that_are_used_twice(refused, content):
    for kind, name in (
        ("images", "image"),
        ("categories", "category"),
        ("annotations", "annotation"),
    ):
        broken = json.loads(json.dumps(content))
        broken[kind].append(broken[kind][0])
        assert f"1 {name} id(s) are used more than once" in refused(broken)


def test_a_data_set_without_objects(refused, content):
    for each in content["annotations"]:
        each["iscrowd"] = 1
        each["segmentation"] = {"size": [128, 160], "counts": [20480]}
    assert "has no objects" in refused(content)
    content["annotations"] = []
    assert "has no objects" in refused(content)


def test_masks_that_pycocotools_has_written():
    generator = np.random.default_rng(0)
    for _ in range(200):
        height, width = generator.integers(1, 70, 2).tolist()
        pixels = generator.random((height, width)) < generator.random() ** 3
        written = coco_masks.encode(np.asfortranarray(pixels, dtype=np.uint8))
        mask = {"size": [height, width], "counts": written["counts"].decode()}
        assert mask_flaw(mask, (height, width)) is None
        assert mask_flaw(mask, (height, width + 1)) is not None
        cut = {**mask, "counts": mask["counts"][:-1]}
        assert mask_flaw(cut, (height, width)) is not None
