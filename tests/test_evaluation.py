"""Runs evaluated on a data set, from the command line to the file: with the example's detector."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from conftest import full_disk
from test_cli import assert_refused, main, no_host  # noqa: F401
from test_example import EXAMPLE, OWN, QUICK

from detectors.inputs import View, read_image, seen
from errors import InputError
from measure import coco_results, evaluation, protocol, session
from measure.coco_results import kept_images
from results.file import load
from results.record import Results, Run

ANNOTATIONS, IMAGES = EXAMPLE / "annotations.json", EXAMPLE / "images"
DATA = ["--dataset", ANNOTATIONS, "--image-root", IMAGES]
# Detectron2's predictor on these twelve images, judged by pycocotools.
AP = {"bbox": 65.8650114, "segm": 69.9880677}


def runs_of(path: Path) -> List[Run]:
    results: Results = load(path / "results.json")
    return [run for group in results.groups for run in group.runs]


def data_with(folder: Path, **changes: Any) -> Path:
    """The example's annotations with something else in them, beside its images."""
    shutil.copytree(IMAGES, folder, dirs_exist_ok=True)
    content = json.loads(ANNOTATIONS.read_text())
    for name, change in changes.items():
        content[name] = change(content[name])
    (folder / "own.json").write_text(json.dumps(content))
    return folder / "own.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dict[str, Any]:
    """Where `measured` keeps what it has made."""
    return {"output": tmp_path_factory.mktemp("measured") / "out"}


@pytest.fixture
def measured(main, made) -> Path:  # noqa: F811
    """What a run with a data set leaves, made once."""
    if "outcome" not in made:
        asked = ("--backend", "torchscript", "openvino", "onnxruntime")
        made["outcome"] = main(*OWN, *DATA, *QUICK, *asked, "--output", made["output"])
    return made["output"]


def test_ap_is_that_of_detectron2_and_its_evaluator(measured, made):
    outcome = made["outcome"]
    assert outcome.code == 0, outcome.err
    torch, *others = runs_of(measured)
    for task, ap in AP.items():
        assert torch.accuracy.tasks[task].ap == pytest.approx(ap, abs=1e-4)
        assert torch.accuracy.tasks[task].difference is None
        for run in others:
            own = run.accuracy.tasks[task]
            assert own.ap == pytest.approx(ap, abs=1e-4)
            assert own.difference.verdict == "keeps"
    assert torch.accuracy.images == 12
    assert torch.accuracy.detections == 95
    # The tables say it.
    first, second = outcome.out.split("\n\n\n")
    assert "| Detections" in first
    assert re.search(r"\| +AP \| dAP +\| mask AP \| mask dAP +\|", first)
    assert "65.87 | +0.00 ±0.00 keeps AP |   69.99 | +0.00 ±0.00 keeps AP" in first
    assert "on 12 images of annotations.json with 38 objects" in first
    assert second.count("| box ") == second.count("| mask ") == 4


def test_what_was_found_is_there_for_other_tools(measured):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for run in runs_of(measured):
        truth = COCO(str(ANNOTATIONS))
        for task, ap in AP.items():
            found = json.loads((measured / run.accuracy.file).read_text())
            if task == "segm":
                for each in found:
                    del each["bbox"]
            judge = COCOeval(truth, truth.loadRes(found), task)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            assert 100 * judge.stats[0] == pytest.approx(ap, abs=1e-4)
    assert not (measured / "evaluated").exists()


def test_the_first_image_of_the_data_set_is_timed(measured):
    group = load(measured / "results.json").groups[0]
    assert group.image_sizes["opt"] == ((160, 200),)
    # Engines are made for what there is.
    assert group.image_sizes["min"] == group.image_sizes["max"] == ((160, 200),)
    assert group.evaluated.images == 12


def test_engines_are_made_for_the_images_that_are_timed_too(main, tmp_path):  # noqa: F811
    from PIL import Image

    tall = tmp_path / "tall.png"
    with Image.open(IMAGES / "000003.png") as image:
        image.resize((100, 200)).save(tall)
    asked = (*OWN, *DATA, *QUICK, "--backend", "torch", "--image", IMAGES / "000010.png", tall)
    outcome = main(*asked, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    group = load(tmp_path / "out" / "results.json").groups[0]
    assert group.image_sizes["image 2"] == ((240, 120),)
    assert group.image_sizes["min"] == ((160, 120),)
    assert group.image_sizes["max"] == ((240, 200),)
    assert group.evaluated.images == 12


def test_images_that_do_not_fit_or_cannot_be_read_are_left_out_on_all_sides(main, tmp_path):  # noqa: F811
    data = data_with(tmp_path / "data")
    (tmp_path / "data" / "000010.png").write_bytes(b"no image")
    from PIL import Image

    with Image.open(IMAGES / "000012.png") as image:
        image.crop((0, 0, 100, 100)).save(tmp_path / "data" / "000012.png")
    asked = (*OWN, "--dataset", data, *QUICK, "--backend", "torchscript")
    outcome = main(*asked, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    group = load(tmp_path / "out" / "results.json").groups[0]
    assert group.evaluated.images == 10
    assert group.evaluated.left_out == {
        "unreadable": (1, ("000010.png",)),
        "of another size than the annotations say": (1, ("000012.png",)),
    }
    assert [run.accuracy.images for run in group.runs] == [10, 10]
    assert group.runs[1].accuracy.tasks["bbox"].difference.value == 0
    assert (
        "images of own.json that were left out: 1 unreadable (000010.png); "
        "1 of another size than the annotations say (000012.png)" in outcome.out
    )


def test_sizes_that_the_engines_are_not_made_for_are_counted(main, tmp_path):  # noqa: F811
    def taller(images):
        return [{**x, "height": 160, "width": 128} if n == 11 else x for n, x in enumerate(images)]

    data = data_with(tmp_path / "data", images=taller)
    sizes = ("--min-size", "160x200", "--max-size", "160x200")
    asked = (*OWN, "--dataset", data, *QUICK, *sizes, "--backend", "torch")
    outcome = main(*asked, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    (count, names) = (
        load(tmp_path / "out" / "results.json").groups[0].evaluated.left_out[evaluation.OTHER_SIZE]
    )
    assert (count, names) == (1, ("000017.png",))


def test_an_evaluation_that_was_interrupted_goes_on(main, measured, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluation, "BATCH_IMAGES", 1)
    asked = (*OWN, *DATA, *QUICK, "--backend", "openvino", "--output", tmp_path / "out")
    asks, limit = [], 14  # The second image of the second run is under way.
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if isinstance(request, protocol.DetectBatch):
            asks.append(request)
            if len(asks) == limit:
                raise KeyboardInterrupt
        return real(self, request, *rest)

    monkeypatch.setattr(evaluation.Worker, "ask", ask)
    assert main(*asked).code == 130
    kept = tmp_path / "out" / "evaluated"
    assert len(list(kept_images(kept / "shapes.torch.fp32.jsonl"))) == 12
    assert len(list(kept_images(kept / "shapes.openvino.fp32.jsonl"))) == 1
    # A line that was cut off is none.
    with open(kept / "shapes.openvino.fp32.jsonl", "a") as file:
        file.write('[1010, [{"image_id": 10')
    limit = 0
    asks.clear()
    outcome = main(*asked)
    assert outcome.code == 0, outcome.err
    assert len(asks) == 11
    assert "shapes.openvino.fp32: evaluating, after 1 from before" in outcome.err
    before = {run.label: run.accuracy.tasks for run in runs_of(measured)}
    for run in runs_of(tmp_path / "out"):
        assert run.accuracy.tasks == before[run.label]


def test_images_that_were_replaced_in_between_are_seen_again(main, tmp_path, monkeypatch):  # noqa: F811
    data = data_with(tmp_path / "data")
    asked = (*OWN, "--dataset", data, *QUICK, "--backend", "torch", "--output", tmp_path / "out")
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if isinstance(request, protocol.Judge):
            raise KeyboardInterrupt
        return real(self, request, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Worker, "ask", ask)
        assert main(*asked).code == 130
    shutil.copy(tmp_path / "data" / "000000.png", tmp_path / "data" / "000001.png")
    outcome = main(*asked)
    assert "from before" not in outcome.err
    if outcome.code == 2:  # The file has another size: it is another data set.
        assert "--dataset: another file of the same name" in outcome.err


def test_what_could_not_be_judged_is_judged_the_next_time(main, tmp_path, monkeypatch):  # noqa: F811
    asked = (*OWN, *DATA, *QUICK, "--backend", "torch", "--output", tmp_path)
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if isinstance(request, protocol.Judge):
            os.kill(self.pid, signal.SIGKILL)
        return real(self, request, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Worker, "ask", ask)
        outcome = main(*asked, "--fail-on", "loses-ap")
    # Nothing vouches for it.
    assert outcome.code == 1
    assert "AP was not looked at" in outcome.out
    outcome = main(*asked)
    assert outcome.code == 0
    assert "kept from before" not in outcome.err
    assert runs_of(tmp_path)[0].accuracy.tasks["bbox"].ap == pytest.approx(AP["bbox"], abs=1e-4)


def test_an_ap_near_nothing_is_remarked_on(main, tmp_path):  # noqa: F811
    def corners(annotations):
        for each in annotations:
            x, y, width, height = each["bbox"]
            each["bbox"] = [x, y, x + width, y + height]
            del each["segmentation"]
        return annotations

    data = data_with(tmp_path / "data", annotations=corners)
    outcome = main(*OWN, "--dataset", data, *QUICK, "--backend", "torch")
    assert "are classes, boxes (x, y, width, height) and images those of" in outcome.out
    assert "no AP of masks: own.json has objects without masks" in outcome.out


def test_an_image_with_objects_is_timed(main, tmp_path):  # noqa: F811
    def without_first(annotations):
        first = {1000, 1001}
        return [each for each in annotations if each["image_id"] not in first]

    data = data_with(tmp_path / "data", annotations=without_first)
    outcome = main(*OWN, "--dataset", data, *QUICK, "--backend", "torch", "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert load(tmp_path / "results.json").settings.image == ("000002.png",)


def test_what_was_kept_of_other_weights_is_not_taken(main, tmp_path, monkeypatch):  # noqa: F811
    asked = (*OWN, *DATA, *QUICK, "--backend", "torch", "--output", tmp_path / "out")
    folder = tmp_path / "out" / "evaluated"
    folder.mkdir(parents=True)
    (folder / "shapes.torch.fp32.jsonl").write_text("[1003, []]\n[1010, []]\n")
    (folder / "shapes.torch.fp32.stamp").write_text("of other weights")
    outcome = main(*asked)
    assert outcome.code == 0, outcome.err
    assert "from before" not in outcome.err
    (run,) = runs_of(tmp_path / "out")
    assert run.accuracy.tasks["bbox"].ap == pytest.approx(AP["bbox"], abs=1e-4)


def test_what_loses_ap_makes_the_exit_code_where_that_is_asked(main, measured, tmp_path):  # noqa: F811
    results = load(measured / "results.json")
    group = results.groups[0]
    *others, last = group.runs
    box = last.accuracy.tasks["bbox"]
    lost = dataclasses.replace(box.difference, verdict="loses")
    tasks = {**last.accuracy.tasks, "bbox": dataclasses.replace(box, difference=lost)}
    losing = dataclasses.replace(last, accuracy=dataclasses.replace(last.accuracy, tasks=tasks))
    of = [dataclasses.replace(group, runs=(*others, losing))]
    assert session.exit_code(of, ()) == 0
    assert session.exit_code(of, ("slower",)) == 0
    assert session.exit_code(of, ("loses-ap",)) == 1
    assert session.exit_code([group], ("loses-ap",)) == 0


def test_a_crash_while_it_is_judged_costs_a_sentence(main, tmp_path, monkeypatch):  # noqa: F811
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if isinstance(request, protocol.Judge):
            Path(request.truth).write_text("[]")
        return real(self, request, *rest)

    monkeypatch.setattr(evaluation.Worker, "ask", ask)
    outcome = main(*OWN, *DATA, *QUICK, "--backend", "torchscript", "--output", tmp_path)
    torch, script = runs_of(tmp_path)
    assert torch.statistics is not None
    assert "could not be judged" in torch.accuracy.reason
    assert script.accuracy.reason is not None
    assert "no AP: what was found could not be judged" in outcome.out
    assert outcome.code == 0


def test_the_images_where_a_run_goes_wrong_are_kept(main, tmp_path, monkeypatch):  # noqa: F811
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        """OpenVINO finds all of one image in another class, and nothing in the others."""
        answer = real(self, request, *rest)
        if isinstance(request, protocol.KeepBatch) and "openvino" in request.kept:
            kept = Path(request.kept)
            before = dict(kept_images(kept))
            images = {image: [] for image in before} | {1003: before[1003]}
            for each in images[1003]:
                each["category_id"] = 9 if each["category_id"] == 2 else 2
            kept.write_text("".join(json.dumps(each) + "\n" for each in images.items()))
        return answer

    monkeypatch.setattr(evaluation.Worker, "ask", ask)
    outcome = main(*OWN, *DATA, *QUICK, "--backend", "openvino", "--output", tmp_path)
    torch, openvino = runs_of(tmp_path)
    assert outcome.code == 0
    assert torch.accuracy.worst == ()
    assert openvino.accuracy.verdict == "loses"
    assert "LOSES AP" in outcome.out
    by_image = {each.image: each for each in openvino.accuracy.worst}
    # In one nobody finds anything.
    assert len(by_image) == 11
    assert by_image["000010.png"].spurious == 0
    assert by_image["000010.png"].score_difference is None
    changed = by_image["000003.png"]
    assert changed.lost == changed.spurious == changed.classes > 0
    assert 0.5 < changed.iou <= 1
    assert (tmp_path / "dataset-1003.jpg").exists()
    page = (tmp_path / "report.html").read_text()
    assert "Where OpenVINO fp32 differs most" in page
    assert main(*OWN, *DATA, *QUICK, "--backend", "openvino", "--fail-on", "loses-ap").code == 1


def test_an_evaluator_that_is_killed_costs_a_sentence(main, tmp_path, monkeypatch):  # noqa: F811
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if isinstance(request, protocol.KeepBatch):
            os.kill(self.pid, signal.SIGKILL)
        return real(self, request, *rest)

    monkeypatch.setattr(evaluation.Worker, "ask", ask)
    outcome = main(*OWN, *DATA, *QUICK, "--backend", "torch", "--output", tmp_path)
    (torch,) = runs_of(tmp_path)
    assert outcome.code == 0, outcome.err
    assert torch.status == "ok"
    assert "killed by SIGKILL" in torch.accuracy.reason


def test_a_run_that_fails_with_an_image_has_failed(main, tmp_path, monkeypatch):  # noqa: F811
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if isinstance(request, protocol.DetectBatch) and "openvino" in str(self.log):
            os.kill(self.pid, signal.SIGKILL)
        return real(self, request, *rest)

    monkeypatch.setattr(evaluation.Worker, "ask", ask)
    outcome = main(*OWN, *DATA, *QUICK, "--backend", "openvino", "--output", tmp_path)
    torch, openvino = runs_of(tmp_path)
    assert outcome.code == 1
    assert torch.accuracy.tasks["bbox"].ap is not None
    assert openvino.status == "failed"
    assert openvino.reason.startswith("on the data set: the process was killed by SIGKILL")
    # What was timed stays.
    assert openvino.statistics is not None
    assert outcome.out.count("killed by SIGKILL") == 1


def test_a_disk_that_is_full_costs_the_ap(main, tmp_path, monkeypatch):  # noqa: F811
    asked = (*OWN, *DATA, *QUICK, "--backend", "torch")
    with full_disk(3_000):
        outcome = main(*asked, "--output", tmp_path)
    assert "no AP" in outcome.err
    assert "shapes" in outcome.out
    assert "Traceback" not in outcome.err
    assert outcome.code == 2


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dataset", EXAMPLE / "none.json"], "No such file"),
        (["--dataset", EXAMPLE / "model.pth"], "is no JSON"),
        ([*DATA, "--image-size", "160x200"], "--image-size crops images"),
        ([*DATA, "--opts", "MODEL.ROI_HEADS.NUM_CLASSES", "4"], "tells 4 classes apart"),
        (["--image-root", IMAGES], "--image-root goes with --dataset"),
        (["--limit", "3"], "--limit goes with --dataset"),
        (["--fail-on", "loses-ap"], "--fail-on loses-ap goes with --dataset"),
        ([*DATA, "--min-ap-ratio", "1.5"], "share above 0 and up to 1"),
        ([*DATA, "--min-ap-ratio", "nan"], "share above 0 and up to 1"),
        ([*DATA, "--limit", "0"], "is not at least 1"),
    ],
)
def test_what_is_refused_before_anything_is_measured(main, no_host, more, words):  # noqa: F811
    assert_refused(main(*OWN, *more), words)


def test_synthetic_weights_are_refused(main, no_host):  # noqa: F811
    asked = ("--model", "testRetinaNet", "--weights", "synthetic", *DATA)
    assert_refused(main(*asked), "synthetic weights find nothing")


def test_what_lists_nothing_is_refused():
    from measure.dataset import read
    from models import MODELS

    data = read(ANNOTATIONS, IMAGES, None, 0)
    model = MODELS["testRetinaNet"]
    with pytest.raises(InputError, match="judges detections, and testRetinaNet gives sem_seg"):
        evaluation.check_model(data, model, ("sem_seg",), "file")
    with pytest.raises(InputError, match="has synthetic weights"):
        evaluation.check_model(data, model, ("pred_boxes", "scores"), "synthetic")


def test_keypoints_want_sigmas():
    from measure.dataset import read

    data = read(ANNOTATIONS, IMAGES, None, 0)
    fields = ("pred_boxes", "pred_classes", "pred_keypoints", "scores", "image_size")
    tasks, reasons = evaluation.tasks_of(data, fields, ())
    assert tasks == ("bbox",)
    assert "has no keypoints" in reasons["keypoints"]
    three = dataclasses.replace(data, keypoints=3)
    assert "TEST.KEYPOINT_OKS_SIGMAS" in evaluation.tasks_of(three, fields, ())[1]["keypoints"]
    assert evaluation.tasks_of(three, fields, (0.1, 0.1, 0.1)) == (("bbox", "keypoints"), {})
    assert evaluation.tasks_of(dataclasses.replace(data, keypoints=17), fields, ())[1] == {}


# Into COCO's format ------------------------------------------------------------------------------


def kept(tmp_path: Path, **arrays: np.ndarray) -> List[Any]:
    """What is kept of detections in an image of 100 x 50 that the detector saw as 200 x 100."""
    fields = (*arrays, "image_size")
    flat = [*arrays.values(), np.array([200, 100])]
    np.savez(tmp_path / "found.npz", **{f"7/{place}": x for place, x in enumerate(flat)})
    image = protocol.DatasetImage(7, "", (100, 50))
    request = protocol.KeepBatch(
        str(tmp_path / "found.npz"), (image,), fields, (3, 8), str(tmp_path / "kept.jsonl")
    )
    coco_results.keep_batch(request)
    ((image_id, found),) = kept_images(tmp_path / "kept.jsonl")
    assert image_id == 7
    return found


BOXES = np.array([[10, 20, 50, 60], [90, 190, 120, 240], [120, 10, 130, 20]], dtype=np.float32)
SCORES, CLASSES = np.array([0.9, 0.5, 0.25], dtype=np.float32), np.array([1, 0, 1])


def test_boxes_come_back_in_the_size_of_the_image(tmp_path):
    found = kept(tmp_path, pred_boxes=BOXES, pred_classes=CLASSES, scores=SCORES)
    # The third lies outside of the image.
    assert [x["bbox"] for x in found] == [[5, 10, 20, 20], [45, 95, 5, 5]]
    assert [x["category_id"] for x in found] == [8, 3]
    assert [x["score"] for x in found] == [pytest.approx(0.9), 0.5]


def test_keypoints_come_back_as_indices_of_pixels(tmp_path):
    points = np.tile(np.array([20.0, 31.0, 0.7]), (3, 2, 1))
    found = kept(
        tmp_path, pred_boxes=BOXES, pred_classes=CLASSES, pred_keypoints=points, scores=SCORES
    )
    assert found[0]["keypoints"] == [9.5, 15.0, 0.7, 9.5, 15.0, 0.7]


def test_masks_come_back_pasted(tmp_path):
    from pycocotools import mask as coco_masks

    inside = np.ones((3, 1, 28, 28), dtype=np.float32)
    pasted = np.zeros((3, 200, 100), dtype=bool)
    pasted[:, 20:60, 10:50] = True
    for masks in (inside, pasted):
        (tmp_path / "kept.jsonl").unlink(missing_ok=True)
        found = kept(
            tmp_path, pred_boxes=BOXES, pred_classes=CLASSES, pred_masks=masks, scores=SCORES
        )
        mask = coco_masks.decode(found[0]["segmentation"])
        assert mask.shape == (100, 50)
        assert mask.sum() == 400
        assert mask[10:30, 5:25].all()


def test_what_is_no_detection_of_the_data_set(tmp_path):
    with pytest.raises(InputError, match="finds class 2, and there are 2 categories"):
        kept(tmp_path, pred_boxes=BOXES, pred_classes=CLASSES + 1, scores=SCORES)
    rotated = np.ones((3, 5), dtype=np.float32)
    with pytest.raises(InputError, match="rotated boxes are not judged"):
        kept(tmp_path, pred_boxes=rotated, pred_classes=CLASSES, scores=SCORES)
    with pytest.raises(InputError, match="what it finds is malformed: scores"):
        kept(tmp_path, pred_boxes=BOXES, pred_classes=CLASSES, scores=SCORES[:, None])
    assert not (tmp_path / "kept.jsonl").exists()


def test_images_are_seen_as_when_they_are_timed(tmp_path):
    view = View(None, 160, 320, "RGB")
    path = IMAGES / "000003.png"
    image = protocol.DatasetImage(3, str(path), (128, 160))
    request = protocol.ReadBatch((image,), view, str(tmp_path / "images.npz"))
    assert coco_results.read_batch(request) == {}
    with np.load(tmp_path / "images.npz") as images:
        expected = seen(read_image(path, None), view)
        assert images["3"].dtype == np.uint8
        assert (images["3"] == expected).all()
