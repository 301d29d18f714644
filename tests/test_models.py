"""The test models: the table, images, inputs, weights, and Detectron2 as another source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detectors
import models
from catalog import MODELS, TestModel
from detectors import checkpoint
from errors import InputError
from models import find_weights, read_image, tuning_inputs

RETINANET = MODELS["testRetinaNet"]
FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
BOXES = ("pred_boxes", "pred_classes", "scores", "image_size")
MASKS = ("pred_boxes", "pred_classes", "pred_masks", "scores", "image_size")


# The table -------------------------------------------------------------------------------------


def test_the_seven_test_models():
    rows = [
        (m.name, m.config, m.kind, m.images_per_call, m.fields == MASKS) for m in MODELS.values()
    ]
    assert rows == [
        ("testCascadeRCNN", "Misc/cascade_mask_rcnn_R_50_FPN_3x", "traced", 1, True),
        ("testMaskRCNNC4", "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x", "traced", 1, True),
        ("testMaskRCNNFPN", FPN, "traced", 1, True),
        ("testMaskRCNNFPN_b2", FPN, "traced", 2, True),
        ("testMaskRCNNFPN_pproc", FPN, "traced", 1, True),
        ("testRetinaNet", "COCO-Detection/retinanet_R_50_FPN_3x", "traced", 1, False),
        ("testRetinaNet_scripted", "COCO-Detection/retinanet_R_50_FPN_3x", "scripted", 1, False),
    ]
    assert RETINANET.fields == BOXES


def test_every_test_model_can_be_built():
    assert {model.config for model in MODELS.values()} == set(detectors.ARCHITECTURES)
    assert set(checkpoint.ZOO) == set(detectors.ARCHITECTURES)


def test_the_flat_tuple_has_the_fields_of_every_image_in_turn(exports):
    export = exports("testMaskRCNNFPN_b2")
    with torch.no_grad():
        outputs = export.eager(*export.inputs)
    assert len(export.inputs) == 2
    assert len(outputs) == 2 * len(export.fields)
    for at in (0, len(export.fields)):
        image = dict(zip(export.fields, outputs[at:]))
        count = len(image["scores"])
        assert count > 10
        assert image["pred_boxes"].shape == (count, 4)
        assert image["pred_classes"].dtype == torch.int64
        assert image["pred_masks"].shape == (count, 1, 28, 28)
        assert image["image_size"].tolist() == list(export.inputs[0].shape[-2:])


def test_postprocessing_pastes_masks_into_the_image(exports):
    export = exports("testMaskRCNNFPN_pproc")
    with torch.no_grad():
        found = dict(zip(export.fields, export.eager(*export.inputs)))
    assert found["pred_masks"].dtype == torch.bool
    assert found["pred_masks"].shape[1:] == export.inputs[0].shape[1:]


def test_the_exported_module_is_made_once_and_called_like_the_eager_one(exports):
    for name in ("testRetinaNet", "testRetinaNet_scripted"):
        export = exports(name)
        module = export.script_module()
        assert module is export.script_module()
        assert isinstance(module, torch.jit.ScriptModule)
        assert isinstance(module, torch.jit.TopLevelTracedModule) == (export.kind == "traced")
        for images in export.tuning_inputs.values():
            with torch.no_grad():
                wanted, found = export.eager(*images), module(*images)
            assert len(wanted[0]) > 10
            for one, other in zip(wanted, found):
                assert torch.allclose(one, other, atol=1e-3)


# Images ----------------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def quarters(height: int = 64, width: int = 96) -> np.ndarray:
    """Red left of green, both above blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, :, 2] = 255
    return pixels


def test_an_image_is_bgr_and_keeps_its_size(tmp_path):
    image = read_image(save(tmp_path / "image.png", quarters()), None)
    assert image.dtype == torch.float32
    assert image.shape == (3, 64, 96)
    assert image.is_contiguous()
    assert image[:, 10, 10].tolist() == [0, 0, 255]  # red
    assert image[:, 10, 90].tolist() == [0, 255, 0]  # green
    assert image[:, 60, 50].tolist() == [255, 0, 0]  # blue


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_an_image_may_have_other_channels(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(quarters()).convert(mode).save(path)
    assert read_image(path, None).shape == (3, 64, 96)


def test_an_image_that_lies_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees clockwise
    image = read_image(save(tmp_path / "image.png", quarters(), exif=exif), None)
    assert image.shape == (3, 96, 64)
    assert image[:, 10, 60].tolist() == [0, 0, 255]  # red: top left became top right


def test_an_image_is_cropped_around_its_center_and_resized(tmp_path):
    pixels = np.full((50, 300, 3), 255, np.uint8)
    pixels[:, 100:200] = 0
    image = read_image(save(tmp_path / "image.png", pixels), (100, 200))
    assert image.shape == (3, 100, 200)
    # But for the border, where the resizing mixes in what was cut away.
    assert image[:, :, 5:-5].max() == 0


def test_a_small_image_can_be_enlarged(tmp_path):
    path = save(tmp_path / "image.png", quarters(16, 24))
    assert read_image(path, (32, 48)).shape == (3, 32, 48)
    with pytest.raises(InputError, match="has 24 x 16 pixels; both sides must have at least 32"):
        read_image(path, None)


def test_the_default_image_is_a_photograph_of_480_by_640():
    image = read_image(None, None)
    assert image.shape == (3, 480, 640)
    assert image.min() < 20
    assert image.max() > 235
    assert image.std() > 30
    assert read_image(None, (64, 96)).shape == (3, 64, 96)


def test_the_default_image_needs_matplotlib(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install matplotlib, or give an --image"):
        read_image(None, None)


# Tuning inputs ---------------------------------------------------------------------------------


def test_tuning_inputs_are_the_image_scaled_in_both_directions():
    image = read_image(None, (240, 400))
    ratios = []
    for seed in range(20):
        inputs = tuning_inputs(image, 1, seed)
        assert list(inputs) == ["min", "opt", "max"]
        assert torch.equal(inputs["opt"][0], image)
        for name, (low, high) in (("min", (0.5, 0.7)), ("max", (2.0, 3.0))):
            height, width = inputs[name][0].shape[-2:]
            # Sides are rounded down.
            assert low * 240 - 1 <= height <= high * 240
            assert abs(height / 240 - width / 400) < 1 / 240
        ratios.append([inputs[name][0].shape[-1] for name in ("min", "max")])
    assert len({small for small, _ in ratios}) > 5
    assert len({large for _, large in ratios}) > 5


def test_tuning_inputs_can_be_repeated():
    image = read_image(None, (64, 96))
    first, again, other = (tuning_inputs(image, 1, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name][0], again[name][0]) for name in first)
    assert first["max"][0].shape != other["max"][0].shape


def test_tuning_inputs_show_the_same_picture():
    image = read_image(None, (120, 160))
    for (scaled,) in tuning_inputs(image, 1, 0).values():
        restored = torch.nn.functional.interpolate(scaled[None], size=(120, 160))[0]
        both = torch.stack([restored.flatten(), image.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9


def test_a_call_takes_as_many_images_as_the_model_asks_for():
    inputs = tuning_inputs(read_image(None, (64, 96)), 2, 0)
    assert [len(images) for images in inputs.values()] == [2, 2, 2]
    first, second = inputs["opt"]
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_no_tuning_input_is_smaller_than_32_pixels():
    smallest = tuning_inputs(read_image(None, (32, 100)), 1, 0)["min"][0]
    assert smallest.shape[-2] == 32
    assert 50 <= smallest.shape[-1] <= 70


# Weights ---------------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    return tuning_inputs(read_image(None, (64, 96)), 1, 0)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, and a network where nothing answers."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def state_of(model: TestModel) -> dict:
    torch.manual_seed(0)
    return detectors.build(model.config, model.postprocess).state_dict()


def test_auto_falls_back_to_synthetic_weights_and_says_so(offline, inputs):
    models.check_weights([RETINANET], "auto")
    weights = find_weights(RETINANET, "auto", inputs, 5, 0)
    assert weights.note.startswith("weights: synthetic, made to find 5 objects (cannot download")
    assert "retinanet_R_50_FPN_3x" in weights.note
    assert set(weights.state) == set(state_of(RETINANET))


def test_zoo_does_not_fall_back(offline, inputs):
    for call in (
        lambda: find_weights(RETINANET, "zoo", inputs, 5, 0),
        lambda: models.check_weights([RETINANET], "zoo"),
    ):
        with pytest.raises(InputError, match=r"^cannot download https://.*model_final_5bd44e.pkl"):
            call()


def test_synthetic_weights_do_not_ask_the_network(offline, inputs, tmp_path):
    weights = find_weights(RETINANET, "synthetic", inputs, 30, 0)
    assert weights.note == "weights: synthetic, made to find 30 objects"
    assert not (tmp_path / "cache").exists()


def test_synthetic_weights_find_as_many_objects_as_asked_for():
    inputs = tuning_inputs(read_image(None, (128, 160)), 1, 0)
    for count in (0, 5, 30):
        state = find_weights(RETINANET, "synthetic", inputs, count, 0).state
        export = models.build(RETINANET, state, "synthetic", inputs)
        for images in inputs.values():
            with torch.no_grad():
                assert len(export.eager(*images)[0]) == count


def test_weights_from_a_path(tmp_path, inputs):
    path = tmp_path / "mine.pth"
    state = state_of(RETINANET)
    torch.save({"model": state}, path)
    models.check_weights([RETINANET, MODELS["testRetinaNet_scripted"]], str(path))
    weights = find_weights(RETINANET, str(path), inputs, 100, 0)
    assert weights.note == "weights: mine.pth"
    export = models.build(RETINANET, weights.state, weights.name, inputs)
    assert torch.equal(export.eager.detector.head.cls_score.weight, state["head.cls_score.weight"])


def test_a_path_does_not_fall_back(tmp_path, inputs):
    path = tmp_path / "missing.pth"
    with pytest.raises(InputError, match=r"checkpoint .*missing\.pth does not exist"):
        find_weights(RETINANET, str(path), inputs, 100, 0)


def test_a_checkpoint_has_to_fit_all_models_before_any_is_measured(tmp_path):
    path = tmp_path / "retinanet.pth"
    torch.save(state_of(RETINANET), path)
    with pytest.raises(InputError, match=r"retinanet\.pth belongs to another architecture"):
        models.check_weights([RETINANET, MODELS["testMaskRCNNFPN"]], str(path))


# Detectron2 as the source ----------------------------------------------------------------------


def test_without_detectron2_auto_is_bundled(monkeypatch):
    monkeypatch.setattr(models, "detectron2_unavailable", lambda: "detectron2 is not usable here")
    assert models.resolve_source("auto") == "bundled"
    assert models.resolve_source("bundled") == "bundled"
    with pytest.raises(InputError, match="detectron2 is not usable here"):
        models.resolve_source("detectron2")


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")  # Detectron2 is not written for a quiet trace.
@pytest.mark.parametrize(
    "name",
    ["testMaskRCNNFPN_b2", "testMaskRCNNFPN_pproc", "testRetinaNet", "testRetinaNet_scripted"],
)
def test_both_sources_give_the_same_flat_tuple(exports, name):
    pytest.importorskip("detectron2.model_zoo")
    ours, theirs = exports(name), exports(name, "detectron2")
    assert models.resolve_source("auto") == "detectron2"
    assert (theirs.fields, theirs.kind) == (ours.fields, ours.kind)
    # Exported at `opt`, called at `min`.
    for module, size in ((theirs.eager, "opt"), (theirs.script_module(), "min")):
        images = ours.tuning_inputs[size]
        with torch.no_grad():
            wanted, found = ours.eager(*images), module(*images)
        fields = ours.fields * len(images)
        assert len(found) == len(wanted) == len(fields)
        for field, one, other in zip(fields, wanted, found):
            assert len(one) > 1
            assert_close(field, one, other)


def assert_close(name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype, name
    assert found.shape == wanted.shape, name
    if wanted.is_floating_point():
        atol = 1e-2 if name == "pred_boxes" else 1e-4
        assert torch.allclose(found, wanted, rtol=0, atol=atol), name
    elif wanted.dtype == torch.bool:
        # A mask's probability may lie within rounding of the threshold.
        assert (found != wanted).float().mean() < 1e-3, name
    else:
        assert torch.equal(found, wanted), name
