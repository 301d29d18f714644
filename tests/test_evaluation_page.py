"""What the page shows of a data set, from the command line on: an engine that goes wrong."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
from PIL import Image
from test_cli import main  # noqa: F401
from test_evaluation import AP, DATA, data_with, runs_of
from test_example import OWN, QUICK

from measure import evaluation, protocol
from results.file import load, load_found
from results.record import Run
from results.tables import class_tables

# So many times as large as they are, images are larger than what is kept of them.
TIMES = 4


def enlarged(folder: Path) -> Path:
    """The example's data set, with pictures and annotations that many times as large."""

    def objects(annotations):
        return [
            {
                **each,
                "bbox": [TIMES * x for x in each["bbox"]],
                "area": TIMES**2 * each["area"],
                "segmentation": [[TIMES * x for x in line] for line in each["segmentation"]],
            }
            for each in annotations
        ]

    def images(records):
        return [{**x, **{side: TIMES * x[side] for side in ("height", "width")}} for x in records]

    data = data_with(folder, annotations=objects, images=images)
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.resize([TIMES * side for side in image.size], Image.BILINEAR).save(path)
    return data


def break_masks(monkeypatch: Any, **more: Any) -> None:
    """OpenVINO loses the left half of all masks, and nothing else.

    Args:
        more: kind of a request -> what is done with the evaluator before it is asked that.
    """
    real = evaluation.Worker.ask

    def ask(self, request, *rest):
        if type(request).__name__ in more:
            more[type(request).__name__](self)
        answer = real(self, request, *rest)
        if isinstance(request, protocol.DetectBatch) and "openvino" in str(self.log):
            with np.load(request.outputs) as found:
                arrays = dict(found)
            for name, each in arrays.items():
                if each.ndim == 4:
                    each[..., : each.shape[-1] // 2] = 0
                    arrays[name] = each
            np.savez(request.outputs, **arrays)
        return answer

    monkeypatch.setattr(evaluation.Worker, "ask", ask)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dict[str, Any]:
    """Where `broken` keeps what it has made."""
    return {"folder": tmp_path_factory.mktemp("broken")}


@pytest.fixture
def broken(main, made, monkeypatch) -> Path:  # noqa: F811
    """What a run leaves whose engine is broken, on pictures that are large; made once."""
    output = made["folder"] / "out"
    if "outcome" not in made:
        break_masks(monkeypatch)
        asked = ("--dataset", enlarged(made["folder"] / "data"), "--backend", "openvino")
        made["outcome"] = main(*OWN, *asked, *QUICK, "--output", output)
    assert made["outcome"].code == 0, made["outcome"].err
    return output


def test_images_with_broken_masks_are_the_worst(broken):
    torch, openvino = runs_of(broken)
    tasks = openvino.accuracy.tasks
    assert tasks["bbox"].difference.verdict == "keeps"
    assert tasks["segm"].difference.verdict == "loses"
    assert torch.accuracy.worst == ()
    assert len(openvino.accuracy.worst) == 11  # In the twelfth nothing is found.
    assert openvino.accuracy.not_drawn is None
    for each in openvino.accuracy.worst:
        assert (each.lost, each.spurious, each.classes) == (0, 0, 0)
        assert each.iou > 0.99
        assert 0.2 < each.mask_iou < 0.7
        assert each.oks is None
    losses = [each.loss for each in openvino.accuracy.worst]
    assert losses == sorted(losses, reverse=True)


def test_masks_are_drawn_where_the_objects_are(broken):
    found = load_found(broken)
    run = runs_of(broken)[1]
    for each in run.accuracy.worst:
        picture = found[each.picture]
        assert picture.size == (TIMES * 128, TIMES * 160)
        (reference,) = picture.reference
        (own,) = picture.runs["fp32"]["OpenVINO"]
        assert all(own.agrees)
        assert len(reference.masks) == len(reference.boxes) > 0
        for masks, kind in ((reference.masks, "whole"), (own.masks, "half")):
            shares = []
            for lines, (x1, y1, x2, y2) in zip(masks, reference.boxes):
                xs = [x for line in lines for x in line[::2]]
                ys = [y for line in lines for y in line[1::2]]
                # A mask of a few cells within the box, which it may miss by one.
                slack = 0.1 * max(x2 - x1, y2 - y1) + 4
                assert x1 - slack <= min(xs) <= max(xs) <= x2 + slack
                assert y1 - slack <= min(ys) <= max(ys) <= y2 + slack
                shares.append((max(xs) - min(xs)) / (x2 - x1))
            assert (np.median(shares) > 0.8) == (kind == "whole")


def test_copies_of_images_are_small_jpegs(broken):
    run = runs_of(broken)[1]
    found = load_found(broken)
    names = {found[each.picture].image for each in run.accuracy.worst}
    assert len(names) == 11
    assert {path.name for path in broken.glob("dataset-*")} == names
    for name in names:
        with Image.open(broken / name) as image, Image.open(_original(broken, name)) as whole:
            assert image.format == "JPEG"
            assert image.size == (480, 384)
            assert whole.size == (640, 512)
            # It is that image, and its colors are in order.
            small = np.asarray(whole.convert("RGB").resize(image.size), dtype=float)
            assert np.abs(np.asarray(image, dtype=float) - small).mean() < 6


def _original(output: Path, copy: str) -> Path:
    number = int(re.search(r"\d+", copy)[0]) - 1000
    return output.parent / "data" / f"{number:06d}.png"


def test_the_page_has_them_beside_the_reference(broken):
    page = (broken / "report.html").read_text()
    assert "Where OpenVINO fp32 differs most" in page
    kinds = re.findall(r'href="data:(image/\w+);base64,([^"]{20})', page)
    heads = [(kind, base64.b64decode(data)[:4]) for kind, data in kinds]
    assert heads.count(("image/jpeg", b"\xff\xd8\xff\xe0")) == 11
    assert heads.count(("image/png", b"\x89PNG")) == 1
    worst = page.split("Where OpenVINO fp32 differs most")[1].split("</section>")[0]
    # Of the reference and of the run: all agree.
    shown = load_found(broken)
    keys = [each.picture for each in runs_of(broken)[1].accuracy.worst]
    assert worst.count('fill-rule="evenodd"') == 2 * sum(
        len(shown[key].reference[0].masks) for key in keys
    )
    assert re.search(r"IoU 0\.99\d|IoU 1\.000", worst)
    assert re.search(r"masks&#39; IoU 0\.[2-6]\d\d", worst)
    # Boxes are in the pixels of the image, whatever the copy has.
    assert worst.count('viewBox="0 0 640 512"') == 22


def test_timed_images_are_drawn_with_masks_too(broken):
    (picture,) = (each for name, each in load_found(broken).items() if "image" not in name)
    for each in (*picture.reference, *picture.runs["fp32"]["OpenVINO"]):
        assert len(each.masks) == len(each.boxes) > 0
        for lines, (x1, y1, x2, y2) in zip(each.masks, each.boxes):
            for line in lines:
                assert x1 - 0.1 <= min(line[::2]) <= max(line[::2]) <= x2 + 0.1
                assert y1 - 0.1 <= min(line[1::2]) <= max(line[1::2]) <= y2 + 0.1


# What is not so plain ----------------------------------------------------------------------------


def openvino(output: Path) -> Run:
    return runs_of(output)[1]


def test_too_few_images_for_a_verdict_have_their_worst(main, tmp_path, monkeypatch):  # noqa: F811
    break_masks(monkeypatch)
    asked = (*OWN, *DATA, *QUICK, "--backend", "openvino", "--limit", "6")
    outcome = main(*asked, "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    accuracy = openvino(tmp_path).accuracy
    assert accuracy.verdict == "too few"
    assert accuracy.tasks["segm"].difference.high < 0
    assert 3 < len(accuracy.worst) <= 6
    assert "Where OpenVINO fp32 differs most" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("moment", ["FindWorst", "KeepCopy"])
def test_an_evaluator_that_dies_of_it_costs_a_sentence(main, tmp_path, monkeypatch, moment):  # noqa: F811
    def kill(worker):
        os.kill(worker.pid, signal.SIGKILL)

    break_masks(monkeypatch, **{moment: kill})
    asked = (*OWN, *DATA, *QUICK, "--backend", "openvino")
    outcome = main(*asked, "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    run = openvino(tmp_path)
    assert run.status == "ok"
    assert run.accuracy.verdict == "loses"
    assert run.accuracy.reason is None
    assert run.accuracy.worst == ()
    assert "killed by SIGKILL" in run.accuracy.not_drawn
    said = "OpenVINO fp32: images in which it differs are missing: the process was killed"
    assert said in outcome.out
    assert said in (tmp_path / "report.html").read_text()


def test_an_image_that_is_gone_costs_itself(main, tmp_path, monkeypatch):  # noqa: F811
    data = data_with(tmp_path / "data")

    def lose(worker):
        (tmp_path / "data" / "000003.png").unlink(missing_ok=True)

    break_masks(monkeypatch, FindWorst=lose)
    asked = (*OWN, "--dataset", data, *QUICK, "--backend", "openvino")
    outcome = main(*asked, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    accuracy = openvino(tmp_path / "out").accuracy
    assert len(accuracy.worst) == 10
    assert "000003.png does not exist" in accuracy.not_drawn
    assert not (tmp_path / "out" / "dataset-1003.jpg").exists()


def test_ap_by_class_does_without_a_row_of_torch_fp32(main, tmp_path):  # noqa: F811
    quick = ["bf16" if each == "fp32" else each for each in QUICK]
    outcome = main(*OWN, *DATA, *quick, "--backend", "torch", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    results = load(tmp_path / "out" / "results.json")
    (run,) = runs_of(tmp_path / "out")
    assert run.requested_precision == "bf16"
    tables: List[Any] = class_tables(results.groups)
    titles = [table.title.split(": ")[1] for table in tables]
    assert titles == ["box AP by class", "mask AP by class"]
    headings = [column.heading for column in tables[0].columns]
    assert headings == ["class", "Torch fp32", f"{run.label} bf16"]
    for task, table in zip(("bbox", "segm"), tables):
        known = run.accuracy.tasks[task]
        assert set(known.difference.classes) == {"circle", "square", "triangle"}
        # Their mean is the difference itself.
        mean = np.mean(list(known.difference.classes.values()))
        assert mean == pytest.approx(known.difference.value)
        assert np.mean([float(row[1]) for row in table.rows]) == pytest.approx(AP[task], abs=0.01)
        for kind, theirs, differs in table.rows:
            assert float(theirs) + float(differs) == pytest.approx(known.classes[kind], abs=0.011)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "box AP by class" in page
    # It is told once: what is said to be shipped does not repeat it.
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    for answer in document["recommendations"]:
        assert "circle" not in json.dumps(answer)


def test_an_evaluation_is_kept_where_what_follows_is_interrupted(main, tmp_path, monkeypatch):  # noqa: F811
    def interrupt(worker: Any) -> None:
        raise KeyboardInterrupt

    break_masks(monkeypatch, FindWorst=interrupt)
    asked = ("--dataset", data_with(tmp_path / "data"), "--backend", "openvino")
    assert main(*OWN, *asked, *QUICK, "--output", tmp_path / "out").code == 130
    _, openvino = runs_of(tmp_path / "out")
    assert openvino.accuracy.tasks["segm"].difference.verdict == "loses"
