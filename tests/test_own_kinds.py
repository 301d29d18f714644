"""Configurations of detectors that give other things than boxes and masks, measured end to end."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from typing import Any, Dict

import numpy as np
import parts
import pytest
import torch
import yaml
from PIL import Image
from seeded_weights import seeded_image
from test_cli import main  # noqa: F401
from test_group import make_plan

import report
from benchmark import StopRule
from detectors.build import build
from detectors.config import build_detector
from detectors.zoo_configurations import zoo_settings
from measure import drawing
from measure import group as groups
from measure.progress import Progress
from models import Model
from results.file import load, load_found

QUICK = ["--precision", "fp32", "--iterations", "3", "--warmup", "1", "--threads", "1"]
ENGINES = ["torchscript", "openvino", "onnxruntime"]
RESIZING = {"INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 160}
# Part -> what the table says of an engine that agrees, and what was found.
KINDS = {
    "keypoints": ("8/8 match", 8),
    "proposal_network": ("50/50 match", 50),
    "semantic": (r"(100\.00|99\.9\d)% match", None),
    "panoptic": (r"20/20, (100\.00|99\.9\d)% match", 20),
}


def nested(settings: Dict[str, Any]) -> Dict[str, Any]:
    """`MODEL.RPN.NMS_THRESH` and so on as sections within each other."""
    sections: Dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        section = sections
        for name in path:
            section = section.setdefault(name, {})
        section[last] = json.loads(json.dumps(value))
    return sections


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name of a part -> the options that name its configuration, weights and a picture."""
    folder = tmp_path_factory.mktemp("kinds")
    picture = seeded_image(1, 120, 160).numpy()[::-1].transpose(1, 2, 0).astype(np.uint8)
    Image.fromarray(picture).save(folder / "picture.png")

    def of(name: str):
        settings = {**zoo_settings(parts.PARTS[name][0]), **parts.settings_of(name), **RESIZING}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(nested(settings)))
        like = build_detector(parts.configuration_of(name), False, initialize=False).state_dict()
        torch.save(parts.weights_of(like), folder / f"{name}.pth")
        return [
            *("--config-file", folder / f"{name}.yaml", "--weights", folder / f"{name}.pth"),
            *("--image", folder / "picture.png"),
        ]

    return of


@pytest.mark.parametrize("name", KINDS)
def test_it_is_measured_from_its_configuration(name, files, main, tmp_path):  # noqa: F811
    said, count = KINDS[name]
    outcome = main(*files(name), "--backend", *ENGINES, *QUICK, "--output", tmp_path, "--stages")
    assert outcome.code == 0, outcome.err
    rows = [line.split("|") for line in outcome.out.splitlines() if line.startswith(f"| {name}")]
    cells = [row[11].strip() for row in rows[:4]]
    assert cells[0] == "-"
    assert all(re.fullmatch(said, cell) for cell in cells[1:]), cells
    results = load(tmp_path / "results.json")
    (group,) = results.groups
    assert (group.found, group.not_compared) == (count, ())
    assert (group.stages.proposals > 0) == (name != "semantic")
    assert (group.stages.head > 0) == (name in ("semantic", "panoptic"))
    assert "blank" not in group.image_sizes
    found = load_found(tmp_path)[name]
    check_drawn(name, found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    poses = page.count('stroke-linecap="round"')
    assert poses == (4 * 8 if name == "keypoints" else 0)
    maps = page.count('opacity=".55"')
    assert maps == (4 if name in ("semantic", "panoptic") else 0)
    assert ("Torch fp32, the reference: a map of labels" in page) == (name == "semantic")
    assert ("the reference: the best 50 proposals" in page) == (name == "proposal_network")


def check_drawn(name: str, found) -> None:
    """What lies in `detections.json` is of the picture, of 120 x 160 pixels, and all is there."""
    (reference,) = found.reference
    assert found.size == (120, 160)
    if name == "semantic":
        assert reference.boxes == ()
    else:
        boxes = np.array(reference.boxes)
        assert 140 < boxes[:, 2].max() <= 160.05
    if name == "keypoints":
        points = np.array(reference.keypoints)
        assert points.shape == (8, 3, 2)
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        assert ((points > low - 2) & (points < high + 2)).all()
    if name == "proposal_network":
        assert set(reference.classes) == {-1}
        assert len(reference.scores) == 50
    if name in ("semantic", "panoptic"):
        picture = Image.open(io.BytesIO(base64.b64decode(reference.labels)))
        assert picture.size == (128, 96)
        assert set(np.unique(np.asarray(picture))) == {0, 1}
    (runs,) = found.runs.values()
    assert len(runs) == 3
    for (own,) in runs.values():
        assert all(own.agrees)
        assert own.lost == ()


def test_a_map_that_is_upside_down_costs_its_row(files, hosts, tmp_path):
    """The reference is changed, which to the comparison is the same as a wrong engine."""
    weights = str(files("semantic")[3])
    configuration = parts.configuration_of("semantic")
    model = Model("semantic", "semantic.yaml", configuration=configuration)
    plan = make_plan(models=(model,), weights=weights, rule=StopRule.fixed(1))
    prepared = groups.prepare_model(model, 100, plan, hosts, tmp_path, Progress())
    assert set(prepared.facts.sizes) == {"min", "opt", "max"}
    assert (prepared.facts.score_threshold, prepared.facts.limit) == (None, None)
    wrong = dict(prepared.reference)
    wrong["max"] = [wrong["max"][0][:, ::-1]]
    wrong_model = dataclasses.replace(prepared, reference=wrong)
    measured = groups.measure_group(wrong_model, "fp32", plan, hosts, Progress())
    _, torchscript = measured.groups[0].runs
    assert torchscript.status == "mismatch"
    assert re.match(r"at max: \d\d\.\d\d% of the labels agree", torchscript.reason)
    verdicts = {size: found.verdict for size, found in torchscript.detections.items()}
    assert verdicts == {"min": "match", "opt": "match", "max": "mismatch"}


@pytest.mark.parametrize(
    ("name", "threshold", "limit"),
    [("keypoints", 0.0, 8), ("proposal_network", None, 50), ("semantic", None, None)],
)
def test_what_is_listed_comes_from_the_configuration(name, threshold, limit):
    configuration = parts.configuration_of(name)
    model = Model(name, name, configuration=configuration)
    state = build_detector(configuration, False).state_dict()
    export = build(model, state, "seeded weights", {"opt": parts.images_of(name)})
    assert (export.score_threshold, export.limit) == (threshold, limit)


# Drawings that no bundled detector makes -------------------------------------------------------


def test_many_proposals_are_not_all_drawn():
    from test_kinds import proposals

    found = proposals(0, 300)
    shown = drawing.drawn(found, found.image_size)
    assert len(shown.boxes) == len(shown.scores) == len(shown.classes) == 100
    others = drawing.drawn(proposals(0, 30), found.image_size)
    assert len(others.boxes) == len(others.classes) == 30


def test_rotated_boxes_are_drawn_with_their_corners():
    from test_kinds import Detections

    found = Detections(
        boxes=np.array([[50.0, 40, 20, 10, 90]]),
        scores=np.array([0.9]),
        classes=np.array([3]),
        image_size=(100, 200),
    )
    # On a picture that is twice as high, and as wide.
    shown = drawing.drawn(found, (200, 200))
    assert shown.boxes == ((45, 60, 55, 100),)
    assert sorted(zip(shown.corners[0][::2], shown.corners[0][1::2])) == [
        *((45, 60), (45, 100), (55, 60), (55, 100))
    ]
    (box,) = report._boxes(shown, ["matched"])
    assert box.corners == " ".join(map(str, shown.corners[0]))
    assert box.title == "class 3, score 0.90, matched"
    assert report._boxes(report._picked(shown, [0]), ["lost"])[0].corners == box.corners


def test_a_map_is_stored_small():
    labels = np.repeat(np.arange(300), 20)[None].repeat(400, axis=0)
    stored = base64.b64decode(drawing._png(labels))
    picture = Image.open(io.BytesIO(stored))
    assert max(picture.size) <= 320
    assert len(stored) < 5000
    colors = np.asarray(picture.convert("RGB"))[0]
    assert len(np.unique(colors, axis=0)) > 200
