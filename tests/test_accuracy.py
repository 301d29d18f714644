"""Average precision under weights of the images, and what its difference says.

`data/shapes` has a data set of coloured shapes (60 images, their annotations alone) and what two
trained detectors found in it: a RetinaNet and a Mask R-CNN, of which Detectron2's own predictor and
pycocotools have AP 44.35, and 75.94 for boxes and 79.72 for masks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from measure import accuracy
from measure.accuracy import average_precision, evaluate, resampled, with_difference
from results.record import AveragePrecision, Difference

DATA = Path(__file__).resolve().parent / "data" / "shapes"
TRUTH = DATA / "val.json"
NAMES = ("circle", "square", "triangle")
FIGURES = ("ap", "ap50", "ap75", "small", "medium", "large")
Found = List[Dict[str, Any]]


def stored(name: str) -> Found:
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


def of_coco(truth: Path, found: Found, task: str, sigmas: Sequence[float] = ()) -> List[float]:
    """pycocotools' own figures, in the order of `FIGURES`."""
    if task == "segm":
        found = [{name: x for name, x in each.items() if name != "bbox"} for each in found]
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(truth))
        judge = COCOeval(objects, objects.loadRes(found), task)
        if sigmas:
            judge.params.kpt_oks_sigmas = np.array(sigmas)
        judge.evaluate()
        judge.accumulate()
        if task != "keypoints":
            judge.summarize()
            return (100 * judge.stats[:6]).tolist()
    precision = judge.eval["precision"][..., -1]  # IoU x recall x class x area
    parts = [precision[:, :, :, 0], precision[0, :, :, 0], precision[5, :, :, 0]]
    parts += [np.array([-1.0]), precision[:, :, :, 1], precision[:, :, :, 2]]
    return [100 * x[x > -1].mean() if (x > -1).any() else -1 for x in parts]


def assert_same(own: AveragePrecision, expected: Sequence[float]) -> None:
    for name, value in zip(FIGURES, expected):
        figure = getattr(own, name)
        assert (value < 0) == (figure is None), name
        assert figure is None or figure == pytest.approx(value, abs=1e-6), name


def verdict_of(
    found: Found, reference: Found, task: str = "bbox", ratio: float = 0.99
) -> Difference:
    values, figures = [], []
    for each in (found, reference):
        evaluation = evaluate(TRUTH, each, task)
        figures.append(average_precision(evaluation, NAMES))
        values.append(resampled(evaluation, 0))
    own = with_difference(*figures, tuple(values), 60, ratio)
    return own.difference


@pytest.mark.parametrize(
    ("name", "task", "ap"),
    [("retinanet", "bbox", 44.35), ("mask_rcnn", "bbox", 75.94), ("mask_rcnn", "segm", 79.72)],
)
def test_the_figures_are_those_of_detectron2_and_pycocotools(name, task, ap):
    found = stored(name)
    own = average_precision(evaluate(TRUTH, found, task), NAMES)
    assert own.ap == pytest.approx(ap, abs=0.01)
    assert_same(own, of_coco(TRUTH, found, task))
    assert list(own.classes) == list(NAMES)
    assert np.mean(list(own.classes.values())) == pytest.approx(own.ap)


def random_data(path: Path, seed: int, keypoints: int = 0, steps: int = 10) -> Found:
    """A data set with crowds, empty images and a class without objects; detections of it.

    Args:
        steps: of the scores; with few of them, many are equal.
    """
    generator = np.random.default_rng(seed)
    images = [{"id": n, "width": 300, "height": 300, "file_name": f"{n}.png"} for n in range(1, 25)]
    objects, found = [], []
    for image in images[3:]:
        for _ in range(generator.integers(0, 7)):
            corner, sides = generator.uniform(0, 150, 2), generator.uniform(5, 140, 2)
            box = [*corner.tolist(), *sides.tolist()]
            points = np.column_stack(
                [generator.uniform(0, 300, (keypoints, 2)), generator.integers(0, 3, keypoints)]
            )
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image["id"],
                    "category_id": int(generator.choice([3, 7])),
                    "bbox": box,
                    "area": box[2] * box[3] * generator.uniform(0.3, 1),
                    "iscrowd": int(generator.random() < 0.1 and not keypoints),
                    **(
                        {
                            "keypoints": points.reshape(-1).tolist(),
                            "num_keypoints": int((points[:, 2] > 0).sum()),
                        }
                        if keypoints
                        else {}
                    ),
                }
            )
            for _ in range(generator.integers(0, 4)):
                moved = np.array(box) + generator.normal(0, 6, 4)
                seen = points + generator.normal(0, 6, points.shape)
                found.append(
                    {
                        "image_id": image["id"],
                        "category_id": int(generator.choice([3, 7, 9], p=[0.45, 0.45, 0.1])),
                        "bbox": [*moved[:2].tolist(), *np.maximum(moved[2:], 1).tolist()],
                        "score": float(generator.integers(1, steps) / steps),
                        **({"keypoints": seen.reshape(-1).tolist()} if keypoints else {}),
                    }
                )
    categories = [{"id": number, "name": f"class {number}"} for number in (3, 7, 9)]
    path.write_text(
        json.dumps({"images": images, "annotations": objects, "categories": categories})
    )
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_figures_with_crowds_equal_scores_and_classes_without_objects(tmp_path, seed):
    truth = tmp_path / "truth.json"
    found = random_data(truth, seed)
    own = average_precision(evaluate(truth, found, "bbox"), ("three", "seven", "nine"))
    assert_same(own, of_coco(truth, found, "bbox"))
    assert own.classes["nine"] is None


@pytest.mark.parametrize("sigmas", [(), (0.05, 0.1, 0.2)])
def test_the_figures_of_keypoints(tmp_path, sigmas):
    truth = tmp_path / "truth.json"
    found = random_data(truth, 3, keypoints=len(sigmas) or 17)
    own = average_precision(evaluate(truth, found, "keypoints", sigmas or None), "abc")
    assert_same(own, of_coco(truth, found, "keypoints", sigmas))
    assert own.ap is not None
    assert 0 < own.ap < 100
    assert own.small is None


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_is_as_good_as_so_many_copies_of_an_image(tmp_path, seed):
    truth = tmp_path / "truth.json"
    found = random_data(truth, seed, steps=10**9)  # Copies of equals would stand in another order.
    content = json.loads(truth.read_text())
    counts = np.random.default_rng(seed).integers(0, 4, len(content["images"]))
    copies = {"images": [], "annotations": [], "categories": content["categories"]}
    copied = []
    for image, count in zip(content["images"], counts.tolist()):
        for copy in range(count):
            number = 1000 * (copy + 1) + image["id"]
            copies["images"].append({**image, "id": number})
            copies["annotations"] += [
                {**x, "image_id": number, "id": 10_000 * (copy + 1) + x["id"]}
                for x in content["annotations"]
                if x["image_id"] == image["id"]
            ]
            copied += [{**x, "image_id": number} for x in found if x["image_id"] == image["id"]]
    other = tmp_path / "copies.json"
    other.write_text(json.dumps(copies))
    expected = of_coco(other, copied, "bbox")[0]
    evaluation = evaluate(truth, found, "bbox")
    weights = counts[None].astype(float)
    parts = [accuracy.precisions(x[0], weights).mean() for x in evaluation.classes]
    assert 100 * np.nanmean(parts) == pytest.approx(expected, abs=1e-6)


def test_nothing_found_and_nothing_there(tmp_path):
    own = average_precision(evaluate(TRUTH, [], "bbox"), NAMES)
    assert own.ap == 0
    assert own.large is None
    nothing = with_difference(own, AveragePrecision(0.0), (np.zeros(10), np.zeros(10)), 60, 0.99)
    assert nothing.difference is None
    assert not np.isnan(resampled(evaluate(TRUTH, [], "bbox"), 0)).any()


def test_resamples_are_drawn_by_the_seed():
    evaluation = evaluate(TRUTH, stored("mask_rcnn"), "bbox")
    first = resampled(evaluation, 1, 120)
    assert (first == resampled(evaluation, 1, 120)).all()
    assert (first != resampled(evaluation, 2, 120)).any()
    assert first.std() > 1


def test_what_finds_the_same_keeps_its_ap():
    for name in ("retinanet", "mask_rcnn"):
        found = stored(name)
        told = verdict_of(found, found)
        assert (told.verdict, told.value, told.low, told.high) == ("keeps", 0, 0, 0)


def test_one_that_sees_the_channels_swapped_loses_ap():
    swapped = stored("retinanet_swapped")
    own = average_precision(evaluate(TRUTH, swapped, "bbox"), NAMES)
    assert own.ap == pytest.approx(19.64, abs=0.01)
    assert verdict_of(swapped, stored("retinanet")).verdict == "loses"


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_int8_that_was_calibrated_on_one_picture_loses_ap(task):
    told = verdict_of(stored("mask_rcnn_int8"), stored("mask_rcnn"), task)
    assert told.verdict == "loses"
    assert -6 < told.low < told.value < told.high < -1
    assert told.ratio == pytest.approx(
        1 + told.value / (75.94 if task == "bbox" else 79.72), abs=0.001
    )


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_one_that_drops_every_tenth_detection_loses_ap(name):
    found = stored(name)
    told = verdict_of([x for place, x in enumerate(found) if place % 10], found)
    assert told.verdict == "loses"
    assert told.high < 0


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_lose_ap(seed):
    # A tenth of a pixel and a hundredth of a score are more than a healthy engine needs at bf16.
    generator = np.random.default_rng(seed)
    found = stored("retinanet")
    rounded = [
        {
            **x,
            "bbox": (np.array(x["bbox"]) + generator.normal(0, 0.1, 4)).tolist(),
            "score": x["score"] + generator.normal(0, 0.002),
        }
        for x in found
    ]
    told = verdict_of(rounded, found)
    assert told.verdict != "loses"
    assert told.low < 0.2
    assert told.high > -0.2


def test_too_few_images_say_how_many_it_takes():
    found = stored("retinanet")
    generator = np.random.default_rng(0)
    kept = [x for x in found if generator.random() > 0.03]
    told = verdict_of(kept, found)
    assert told.verdict == "too few"
    assert told.images_needed > 60
    # With so many, the interval would just not reach the limit.
    edge = told.ratio_high if told.ratio < 0.99 else told.ratio_low
    shrink = (60 / told.images_needed) ** 0.5
    assert told.ratio + (edge - told.ratio) * shrink == pytest.approx(0.99, abs=0.0005)
    assert verdict_of(kept, found, ratio=0.9).verdict == "keeps"


def test_the_limit_itself_cannot_be_told():
    own = AveragePrecision(ap=50.0)
    values = np.linspace(45, 55, 101)
    told = with_difference(
        own, AveragePrecision(50.0), (values, np.full(101, 50.0)), 60, 1.0
    ).difference
    assert told.verdict == "too few"
    assert told.images_needed is None


@pytest.mark.parametrize(("images", "verdict"), [(9, "too few"), (10, "keeps")])
def test_a_few_images_tell_nothing(images, verdict):
    values = np.full(50, 40.0)
    own = with_difference(
        AveragePrecision(40.0), AveragePrecision(40.0), (values, values), images, 0.99
    )
    assert own.difference.verdict == verdict
    assert own.difference.images_needed == (10 if verdict == "too few" else None)


def test_the_verdict_of_several_tasks_is_the_worst():
    from results.record import Accuracy

    def figures(verdict: str, ratio: float) -> AveragePrecision:
        return AveragePrecision(1.0, difference=Difference(0, 0, 0, ratio, 0, 0, verdict))

    both = Accuracy(1, 1, {"bbox": figures("keeps", 1.0), "segm": figures("loses", 0.9)})
    assert (both.verdict, both.ratio) == ("loses", 0.9)
    one = dataclasses.replace(both, tasks={"bbox": figures("too few", 0.97)})
    assert (one.verdict, one.ratio) == ("too few", 0.97)
    assert Accuracy().verdict is None
    assert Accuracy().ratio is None
