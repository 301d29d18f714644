"""The detector of `examples/shapes`, as a user has one: configuration, weights, pictures."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conftest import arrays
from test_cli import assert_refused, main, no_host  # noqa: F401

import run_blade
from detectors.build import build, detectron2_unavailable
from detectors.checkpoint import read
from detectors.config_file import read_configuration
from detectors.inputs import View, inputs, read_image
from measure import plan
from measure.verify import split, verify
from models import TUNING, Model, timed

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapes"
CONFIG, WEIGHTS = EXAMPLE / "config.yaml", EXAMPLE / "model.pth"
# Of those that are there, what Detectron2's predictor finds in these is known.
IMAGES = [EXAMPLE / "images" / f"{name}.png" for name in ("000003", "000010", "000012", "000017")]
OWN = ["--config-file", CONFIG, "--weights", WEIGHTS]
QUICK = ["--precision", "fp32", "--iterations", "5", "--warmup", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def detector():
    """The export, and the calls with the pictures: `opt`, `image 2` and so on."""
    configuration = read_configuration(str(CONFIG))
    seen = configuration.input
    view = View(None, seen.min_size_test, seen.max_size_test, seen.format)
    model = Model("shapes", CONFIG.name, configuration=configuration)
    calls = inputs([read_image(path, None) for path in IMAGES], 1, 0, view)
    tuning = {name: calls[name] for name in TUNING}
    return build(model, read(WEIGHTS), "the weights", tuning), calls


@pytest.fixture(scope="module")
def found(detector):
    """Picture -> what is found in it, with boxes in pixels of the picture as it is."""
    export, calls = detector
    detections = {}
    for path, name in zip(IMAGES, timed(calls)):
        with torch.no_grad():
            (each,) = split(arrays(export.eager(*calls[name])), export.fields)
        sides = read_image(path, None).shape[-2:]
        height, width = (a / b for a, b in zip(sides, each.image_size))
        scaled = each.boxes * [width, height, width, height]
        detections[path.stem] = dataclasses.replace(each, boxes=scaled)
    return detections


@pytest.mark.parametrize("name", [path.stem for path in IMAGES])
def test_it_finds_what_detectron2s_predictor_finds(found, name):
    (expected,) = golden.load("example")[name]
    assert found[name].image_size == (160, 200)
    assert found[name].classes.tolist() == expected["pred_classes"].tolist()
    assert np.allclose(found[name].boxes, expected["pred_boxes"], atol=golden.BOX)
    assert np.allclose(found[name].scores, expected["scores"], atol=golden.SCORE)


def test_one_picture_has_nothing_in_it(found):
    assert sorted(len(each.scores) > 5 for each in found.values()) == [False, True, True, True]
    assert min(len(each.scores) for each in found.values()) == 0


def test_the_command_of_the_readme(main, tmp_path):  # noqa: F811
    asked = [*OWN, "--image", IMAGES[0], "--backend", "torchscript", "openvino", "onnxruntime"]
    outcome = main(*asked, *QUICK, "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if line.startswith("| shapes")]
    assert [row.split("|")[2].strip() for row in rows] == [
        *("Torch", "TorchScript", "OpenVINO", "ONNXRuntime")
    ]
    assert rows[0].split("|")[11].strip() == "-"
    assert all(re.search(r"\b(\d+)/\1 match", row) for row in rows[1:])
    assert "timed at 160x200" in outcome.out
    assert "at 120x120, 160x200, 200x160 and 240x240" in outcome.out
    record = json.loads((tmp_path / "results.json").read_text())
    settings = record["settings"]
    assert (settings["config_file"], settings["weights"]) == ("config.yaml", "model.pth")
    assert len(settings["config_digest"]) == 16
    assert record["groups"][0]["found"] == 18
    # What is drawn is drawn on the picture as it is, of 128 x 160 pixels.
    drawn = json.loads((tmp_path / "detections.json").read_text())
    boxes = np.array(drawn["shapes"]["reference"][0]["boxes"])
    (expected,) = golden.load("example")[IMAGES[0].stem]
    assert np.allclose(boxes, expected["pred_boxes"], atol=0.06)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'viewBox="0 0 160 128"' in page
    assert 'width="160" height="128"' in page
    again = main(*asked, *QUICK, "--output", tmp_path)
    assert again.code == 0
    assert "kept from before" in again.err
    # Another configuration of the same name is another model.
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / CONFIG.name
    other.write_text(
        CONFIG.read_text().replace("SCORE_THRESH_TEST: 0.05", "SCORE_THRESH_TEST: 0.1")
    )
    (tmp_path / "shapes").mkdir()
    other = other.rename(tmp_path / "shapes" / CONFIG.name)
    asked[1] = other
    outcome = main(*asked, *QUICK, "--output", tmp_path)
    assert_refused(outcome, "results of another run", "--config-file: another file of the same")


@pytest.mark.parametrize(
    "keys",
    [
        ["TEST.DETECTIONS_PER_IMAGE", "10"],
        # By the default, scores below 0.05 would be an error.
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.005"],
    ],
)
def test_threshold_and_number_come_from_the_model(main, keys):  # noqa: F811
    asked = [*OWN, "--image", IMAGES[0], "--backend", "torchscript", *QUICK]
    outcome = main(*asked, "--opts", *keys)
    assert outcome.code == 0, outcome.err
    (expected,) = re.findall(r"(\d+)/\1 match", outcome.out)
    assert int(expected) == 10 if "DETECTIONS" in keys[0] else int(expected) > 20


def test_sizes_of_ones_own(main):  # noqa: F811
    asked = [*OWN, "--image", IMAGES[0], "--backend", "torch", *QUICK]
    outcome = main(*asked, "--min-size", "96x128", "--max-size", "200x300")
    assert outcome.code == 0, outcome.err
    assert "at 96x128, 160x200, 200x160 and 200x300" in outcome.out
    outcome = main(*asked, "--image-size", "96x96")
    assert outcome.code == 0, outcome.err
    assert "timed at 96x96" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-file", CONFIG], ["needs the model's --weights FILE"]),
        ([*OWN, "--all"], ["--model NAME, --all", "--config-file FILE"]),
        ([*OWN, "--model", "testRetinaNet"], ["say which models"]),
        ([*OWN, "--opts", "MODEL.RPN.NMS_TRESH", "0.7"], ["NMS_TRESH is not known", "NMS_THRESH"]),
        ([*OWN, "--opts", "MODEL.MASK_ON"], ["MODEL.MASK_ON has no value"]),
        ([*OWN, "--opts", "INPUT.MAX_SIZE_TEST", "0"], ["INPUT.MIN_SIZE_TEST is 160", "at least"]),
        ([*OWN, "--min-size", "200x200"], ["resized to 160x200", "--min-size and --max-size"]),
        ([*OWN, "--max-size", "64x64"], ["no image fits between 120x120 and 64x64"]),
        ([*OWN, "--detections", "5"], ["--detections makes synthetic weights"]),
        ([*OWN, "--trust-config"], ["--trust-config goes with --source detectron2 and a Lazy"]),
        (["--all", "--source", "detectron2", "--trust-config"], ["--trust-config goes with"]),
        ([*OWN, "--source", "detectron2", "--trust-config"], ["nothing else is run"]),
        (["--model", "testRetinaNet", "--max-size", "64x64"], ["--max-size goes with --config"]),
        (["--all", "--opts", "MODEL.MASK_ON", "True"], ["--opts goes with --config-file"]),
    ],
)
def test_what_is_refused(main, tmp_path, arguments, words):  # noqa: F811
    output = tmp_path / "output"
    image = [] if "--image" in arguments else ["--image", IMAGES[0]]
    outcome = main(*arguments, *image, "--output", output)
    assert_refused(outcome, *words)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["is a program", "is not run", "take --source detectron2 --trust-config"]),
        (["--source", "bundled"], ["is a program", "is not run"]),
        (["--source", "detectron2"], ["is a program", "would be run: --trust-config says"]),
        (["--trust-config"], ["--trust-config goes with --source detectron2"]),
        (
            ["--source", "detectron2", "--trust-config", "--opts", "model.depth", "3"],
            ["--opts model.depth: a LazyConfig file takes texts like"],
        ),
    ],
)
def test_a_program_is_run_only_where_that_is_said(main, tmp_path, no_host, arguments, words):  # noqa: F811
    marker, program = tmp_path / "marker", tmp_path / "config.py"
    program.write_text(f"open({str(marker)!r}, 'w')")
    outcome = main("--config-file", program, "--weights", WEIGHTS, *arguments)
    assert_refused(outcome, *words)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.mkdir"])
def test_unsafe_yaml_is_refused_for_detectron2_too(main, tmp_path, no_host, tag):  # noqa: F811
    marker, config = tmp_path / "marker", tmp_path / "config.yaml"
    config.write_text(f"MODEL:\n  WEIGHTS: {tag} ['mkdir {marker}']\n")
    asked = ["--config-file", config, "--weights", WEIGHTS, "--source", "detectron2"]
    assert_refused(main(*asked), "asks to run Python code in line 2", "which is not done")
    assert not marker.exists()


@pytest.mark.skipif(detectron2_unavailable() is None, reason="Detectron2 is installed here")
@pytest.mark.parametrize("is_program", [False, True])
def test_without_detectron2(main, tmp_path, is_program):  # noqa: F811
    asked = ["--config-file", CONFIG, "--weights", WEIGHTS, "--source", "detectron2"]
    if is_program:
        program = tmp_path / "config.py"
        program.write_text("model = None")
        asked = [asked[0], program, *asked[2:], "--trust-config"]
    outcome = main(*asked, "--output", tmp_path / "output")
    assert_refused(outcome, "detectron2 is not usable here", "--source bundled")
    assert not (tmp_path / "output").exists()


def test_a_key_that_is_not_known_names_the_way_out(main):  # noqa: F811
    outcome = main(*OWN, "--opts", "MODEL.POINT_HEAD.NUM_FC", "3")
    assert_refused(outcome, "MODEL.POINT_HEAD.NUM_FC is not known", "--source detectron2 takes")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", "4"], ["of 3 classes, not of 4"]),
        (["MODEL.RESNETS.DEPTH", "101"], ["res4"]),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]"], ["rpn_head"]),
        (
            ["MODEL.META_ARCHITECTURE", "FCOS"],
            ["META_ARCHITECTURE is 'FCOS'", "--source detectron2"],
        ),
        (["MODEL.MASK_ON", "False"], ["mask_head"]),
    ],
)
def test_a_configuration_that_the_weights_do_not_fit(main, tmp_path, keys, words):  # noqa: F811
    outcome = main(*OWN, "--image", IMAGES[0], "--opts", *keys, "--output", tmp_path / "output")
    assert_refused(outcome, *words)
    assert not (tmp_path / "output").exists()


# Where nothing is to be found ------------------------------------------------------------------


def test_every_engine_sees_a_picture_in_which_nothing_is_found(main, tmp_path):  # noqa: F811
    asked = [*OWN, "--image", IMAGES[0], "--backend", "torchscript", "openvino", "onnxruntime"]
    outcome = main(*asked, *QUICK, "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "where it finds nothing, on a plain picture, too" in outcome.out
    (group,) = json.loads((tmp_path / "results.json").read_text())["groups"]
    assert group["image_sizes"]["blank"] == [[120, 120]]
    for run in group["runs"][1:]:
        assert run["detections"]["blank"]["expected"] == 0
        assert run["detections"]["blank"]["spurious"] == 0


def test_overrides_add_up():
    words = ["--opts", "A", "1", "--all", "--opts", "B", "-2"]
    assert run_blade.parser().parse_args(words).opts == ["A", "1", "B", "-2"]


@pytest.mark.parametrize("name", [path.stem for path in IMAGES])
def test_what_bf16_costs_a_trained_detector_is_no_mismatch(detector, name):
    export, calls = detector
    images = dict(zip([path.stem for path in IMAGES], map(calls.get, timed(calls))))[name]
    with torch.no_grad():
        expected = arrays(export.eager(*images))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = arrays(export.eager(*images))
    listed = (export.score_threshold, export.limit)
    assert not verify(expected, rounded, export.fields, "bf16", *listed).is_wrong


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("street/config.yaml", "street"),
        ("a/b c|d.yaml", "b_c_d"),
        ("testing.yml", "testing"),
        ("testRetinaNet.yaml", "testRetinaNet_own"),
    ],
)
def test_what_a_model_of_ones_own_is_called(tmp_path, file, name):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG.read_text())
    options = run_blade.parser().parse_args(["--config-file", str(path), "--weights", "w.pth"])
    assert [model.name for model in plan.models_of(options)] == [name]
