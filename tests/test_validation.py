"""int8 that is judged while it is made, and layers that stay in fp32 as they cost too much."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import pytest
import torch
from test_calibration import BACKEND, ENGINES, INT8
from test_cli import main  # noqa: F401
from test_example import CONFIG, OWN, WEIGHTS

from backends import base
from detectors import inputs
from detectors.build import build
from detectors.checkpoint import read as read_weights
from detectors.config_file import read_configuration
from detectors.export import Export
from detectors.inputs import Calls, View
from errors import Unsupported
from measure import calibration, protocol
from measure.evaluation import validation_of
from measure.validation import Validation
from models import TUNING, Model
from results import facts
from results.file import load
from results.record import AccuracyControl, Calibrated

EXAMPLE = CONFIG.parent
ANNOTATIONS = EXAMPLE / "annotations.json"
SIZES = ((100, 100), (400, 400))


def exported(tmp_path: Path, images_per_call: int = 1) -> Export:
    """The example's detector, with its annotated pictures to calibrate on."""
    configuration = read_configuration(str(CONFIG))
    seen = configuration.input
    view = View(None, seen.min_size_test, seen.max_size_test, seen.format)
    found = calibration.read(
        EXAMPLE / "images", ANNOTATIONS, 300, 0, view, SIZES, None, tmp_path / "c.npz"
    )
    assert len(found.annotated.images) == found.record.images == 12
    model = Model(
        "shapes", CONFIG.name, configuration=configuration, images_per_call=images_per_call
    )
    pictures = [inputs.read_image(found.annotated.images[0].path, None)]
    calls = inputs.inputs(pictures, images_per_call, 0, view)
    tuning = {name: calls[name] for name in TUNING}
    export = build(model, read_weights(WEIGHTS), "the weights", tuning)
    export.calibration = Calls(Path(found.path), images_per_call)
    request = validation_of(found, model, export.fields, "file", 0.99)
    assert isinstance(request, protocol.Validate)
    assert request.tasks == ("bbox", "segm")
    export.validation = Validation(request, export)
    return export


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Export:
    return exported(tmp_path_factory.mktemp("calibration"))


def eager(export: Export, change: Callable[[List[Any]], Any] = lambda found: found) -> Any:
    """The eager module, with what it gives changed."""

    def call(*images: Any) -> Any:
        with torch.no_grad():
            return change(list(export.eager(*images)))

    return call


def without(export: Export, share: float) -> Any:
    """The eager module without every so many detections."""

    def change(found: List[Any]) -> List[Any]:
        kept = torch.arange(len(found[0])) % round(1 / share) != 0 if share else slice(None)
        return [x if name == "image_size" else x[kept] for name, x in zip(export.fields, found)]

    return eager(export, change)


# How it is judged -------------------------------------------------------------------------------


def test_the_reference_keeps_all(export):
    share, each = export.validation.judged(eager(export))
    assert share == 1
    assert len(each) == len(export.validation) == 12
    assert np.mean(each) > 50


def test_the_task_that_keeps_least_decides(export):
    at = export.fields.index("pred_masks")

    def blind(found: List[Any]) -> List[Any]:
        return [x[:0] if name != "image_size" else x for name, x in zip(export.fields, found)]

    def without_masks(found: List[Any]) -> List[Any]:
        return [torch.zeros_like(x) if place == at else x for place, x in enumerate(found)]

    assert export.validation.judged(eager(export, blind))[0] == 0
    share, each = export.validation.judged(eager(export, without_masks))
    assert share < 0.05
    # Of the boxes nothing is lost.
    assert 0.4 < np.mean(each) / np.mean(export.validation.judged(eager(export))[1]) < 0.6
    assert export.validation.judged(without(export, 0.25))[0] < 0.95


def test_what_is_malformed_finds_nothing(export):
    assert export.validation.judged(lambda *images: (torch.zeros(1),))[0] == 0


def test_some_of_the_calls_are_judged_by_themselves(export):
    """What is lost in others does not count."""
    _, whole = export.validation.judged(eager(export))
    bad = max(range(len(whole)), key=lambda place: whole[place])
    broken = export.calibration[bad]

    def call(*images: Any) -> Any:
        found = eager(export)(*images)
        if not torch.equal(images[0], broken[0]):
            return found
        return [x[:0] if name != "image_size" else x for name, x in zip(export.fields, found)]

    share, each = export.validation.judged(call)
    assert share < 1
    assert [place for place in range(12) if each[place] < whole[place]] == [bad]
    others = [place for place in range(12) if place != bad]
    assert export.validation.judged(call, others) == (1, [whole[place] for place in others])
    assert export.validation.judged(call, [bad])[0] == 0


def test_calls_of_several_images(tmp_path):
    """The last is filled up with an image that counts once."""
    export = exported(tmp_path, images_per_call=5)
    assert len(export.validation) == 3
    share, each = export.validation.judged(eager(export))
    assert (share, len(each)) == (1, 3)


def test_the_truth_is_that_of_the_images_that_were_taken(tmp_path):
    whole, some = (
        calibration.read(
            EXAMPLE / "images", ANNOTATIONS, limit, 0, View(), SIZES, None, tmp_path / "c.npz"
        )
        for limit in (300, 5)
    )
    assert len(some.annotated.images) == 5
    assert some.digest != whole.digest
    with np.load(some.path) as arrays:
        for name, picture in zip(arrays.files, some.annotated.images):
            expected = inputs.read_image(picture.path, None, least=1).astype(np.uint8)
            assert np.array_equal(arrays[name], expected)


def test_annotations_of_something_else_are_noticed(export):
    """Else a search among layers would judge noise, for hours."""
    asked = export.validation._request
    assert Validation(asked, export).reference == export.validation.reference
    assert all(ap > 50 for ap in export.validation.reference.values())
    shuffled = replace(asked, images=tuple(reversed(asked.images)))
    with pytest.raises(Unsupported, match=r"^int8 cannot be judged .* Torch fp32 is \d\.\d\d "):
        Validation(shuffled, export)


# Which layers -----------------------------------------------------------------------------------


def quantized(export: Export, costs: Sequence[float]) -> Tuple[List[str], Callable[..., Any]]:
    """Layers, and what makes a call that loses so large a share of its detections for each."""
    names = [f"layer {place}" for place in range(len(costs))]

    def make(kept: Sequence[str]) -> Any:
        return without(export, max([0, *(c for x, c in zip(names, costs) if x not in kept)]))

    return names, make


def test_where_int8_keeps_ap_no_layer_is_sought(export):
    names, make = quantized(export, [0, 0, 0])
    made = []
    control = export.validation.layers_to_keep(
        names, lambda kept: made.append(kept) or make(kept), 2
    )
    assert control == AccuracyControl(export.validation.reference, 0.99, 1, 1, (), 3)
    assert made == [()]


@pytest.mark.parametrize("costly", [1, 3, 5])
def test_the_fewest_of_the_costliest_stay_in_fp32(export, costly):
    """Of several that cost, each shows only without those that cost more."""
    names = [f"layer {place}" for place in range(12)]
    costs = dict(zip(names, [0.0] * 12))
    bad = [names[place] for place in (7, 2, 11, 4, 9)[:costly]]
    costs.update(dict.fromkeys(bad, 1.0))

    def make(kept: Sequence[str]) -> Any:
        lost = sum(costs[name] for name in names if name not in kept)

        # Each takes a twelfth of the detections.
        def change(found: List[Any]) -> List[Any]:
            whole = torch.arange(len(found[0])) % 12 >= lost
            return [x if n == "image_size" else x[whole] for n, x in zip(export.fields, found)]

        return eager(export, change)

    control = export.validation.layers_to_keep(names, make, 8)
    assert sorted(control.kept) == sorted(bad)
    assert control.before < 0.99
    assert (control.after, control.layers) == (1, 12)


def test_where_nothing_is_enough_the_best_is_taken(export):
    names, make = quantized(export, [0.5, 0, 0, 0.25, 0, 0.25])
    control = export.validation.layers_to_keep(names, make, 1)
    assert control.kept == ("layer 0",)
    assert control.before < control.after < 0.99
    names, make = quantized(export, [0.5, 0.5, 0.5])
    control = export.validation.layers_to_keep(names, make, 1)
    assert control.before == control.after


def test_what_cannot_be_judged_is_said(export, tmp_path):
    found = calibration.read(
        EXAMPLE / "images", ANNOTATIONS, 300, 0, View(), SIZES, None, tmp_path / "c.npz"
    )
    model = export.model

    def reason(**changes: Any) -> Any:
        asked = {"fields": export.fields, "weights": "file", "found": found, **changes}
        return validation_of(asked["found"], model, asked["fields"], asked["weights"], 0.99)

    assert isinstance(reason(), protocol.Validate)
    assert reason(weights="synthetic") == "synthetic weights find nothing"
    assert reason(fields=("sem_seg",)) == "shapes gives sem_seg"
    few = replace(found.annotated, images=found.annotated.images[:9])
    assert reason(found=replace(found, annotated=few)) == "9 images are too few"
    other = replace(found.annotated, classes=("a", "b"), category_ids=(1, 2))
    assert reason(found=replace(found, annotated=other)) == (
        "2 categories, and shapes tells 3 apart"
    )
    assert reason(found=replace(found, annotated=None)) is None


def test_sentences():
    of = "of fp32's AP (box 40.00, mask 35.50) on the images that it is calibrated on"
    kept = AccuracyControl({"bbox": 40.0, "segm": 35.5}, 0.99, 0.9, 0.995, tuple("abcdefg"), 60)
    assert facts.control_note(kept) == (
        f"7 of 60 layers stay in fp32, with which it keeps 0.9950 instead of 0.9000 {of}: "
        "a, b, c, d, e, f, ..."
    )
    assert facts.control_note(replace(kept, before=0.995, kept=())) == (
        f"keeps 0.9950 {of}, with all layers in int8"
    )
    assert facts.control_note(replace(kept, after=0.9, kept=())) == (
        f"keeps 0.9000 {of}, and no layer in fp32 helps"
    )
    note = facts.calibration_note(Calibrated(3, "train.json", not_judged="3 images are too few"))
    assert note == (
        "int8: calibrated on 3 images of train.json; AP was not judged on them: 3 images are too "
        "few"
    )


@pytest.mark.parametrize(
    ("operator", "module"),
    [
        (
            "__module.detector.backbone.fpn_lateral3/aten::_convolution/Convolution",
            "backbone.fpn_lateral3",
        ),
        ("/detector/backbone/fpn_lateral3/Conv", "backbone.fpn_lateral3"),
        ("Conv_12", "Conv_12"),
    ],
)
def test_layers_are_called_as_detectron2_calls_their_modules(operator, module):
    assert base.module_name(operator) == module


# Real engines -----------------------------------------------------------------------------------


def with_outlier(tmp_path: Path) -> Export:
    """The example, in which one activation dwarfs all others that go into a layer.

    In fp32 that is the same detector.
    """
    export = copy.copy(exported(tmp_path))
    images = export.calibration[0]
    before = eager(export)(*images)
    head = export.eager.detector.roi_heads.box_head
    with torch.no_grad():
        head.fc1.weight[0] *= 3000
        head.fc1.bias[0] *= 3000
        head.fc2.weight[:, 0] /= 3000
    after = eager(export)(*images)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(before, after))
    return export


@pytest.mark.slow
@pytest.mark.parametrize("backend", ENGINES)
def test_a_layer_that_int8_ruins_is_found_and_left_in_fp32(tmp_path, backend):
    pytest.importorskip("nncf")
    export = with_outlier(tmp_path)
    optimized = base.load(backend).optimize(export, "int8", "cpu")
    control = optimized.control
    assert control.before < 0.5
    assert control.after >= 0.99
    assert "roi_heads.box_head.fc2" in control.kept
    assert len(control.kept) <= 2 < 60 < control.layers
    assert export.validation.judged(optimized.call)[0] >= 0.98
    layers = optimized.coverage.heavy_layers
    assert layers.get("u8", 0) + layers.get("i8", 0) > 0.9 * sum(layers.values())


def test_int8_is_judged_on_annotated_images(main, tmp_path):  # noqa: F811
    """From the command line: the record, the sentence, and what is not evaluated twice."""
    pytest.importorskip("nncf")
    asked = [*OWN, *INT8, *BACKEND, "--output", tmp_path, "--calibration", EXAMPLE / "images"]
    asked += ["--image", EXAMPLE / "images" / "000003.png", "--min-ap-ratio", "0.5"]
    outcome = main(*asked, "--calibration-annotations", ANNOTATIONS)
    assert outcome.code in (0, 1), outcome.err
    (group,) = load(tmp_path / "results.json").groups
    torch_run, engine = group.runs
    assert torch_run.control is None
    assert engine.control.kept == ()
    assert 0.9 < engine.control.before == engine.control.after < 1.1
    assert engine.control.least_ratio == 0.5
    assert engine.control.layers > 60
    assert f"OpenVINO int8: {facts.control_note(engine.control)}" in outcome.out


def test_a_folder_alone_is_not_judged(tmp_path):
    folder = EXAMPLE / "images"
    found = calibration.read(folder, None, 300, 0, View(), SIZES, None, tmp_path / "c.npz")
    assert (found.record.images, found.annotated, found.truth) == (12, None, None)
