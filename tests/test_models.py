"""The test models: the table of the seven, and what an export of them gives."""

from __future__ import annotations

import torch

from detectors import zoo
from detectors.build import fields_of
from detectors.zoo_configurations import ZOO
from models import MODELS

RETINANET = MODELS["testRetinaNet"]
FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
BOXES = ("pred_boxes", "pred_classes", "scores", "image_size")
MASKS = ("pred_boxes", "pred_classes", "pred_masks", "scores", "image_size")


def test_the_seven_test_models():
    rows = [
        (m.name, m.config, m.kind, m.images_per_call, fields_of(m) == MASKS)
        for m in MODELS.values()
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
    assert fields_of(RETINANET) == BOXES


def test_every_test_model_can_be_built():
    assert {model.config for model in MODELS.values()} == set(zoo.ZOO) <= set(ZOO)


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
