"""From configurations to networks: every part, beside Detectron2's, and what is refused."""

from __future__ import annotations

import functools
import json
from typing import Any, Dict

import golden
import numpy as np
import parts
import pytest
import torch
from golden import DATA, assert_same

from detectors.checkpoint import load_into
from detectors.config import build_detector
from detectors.config_file import read_configuration
from detectors.configuration import from_settings
from detectors.export import TraceableDetector, script
from detectors.instances import Instances, flatten
from detectors.zoo_configurations import ZOO, zoo_settings
from errors import InputError

BOXES = ("pred_boxes", "pred_classes", "scores", "image_size")
MASKS = ("pred_boxes", "pred_classes", "pred_masks", "scores", "image_size")
# Their architectures or heads are not built yet.
NOT_BUILT = {
    name
    for name in ZOO
    if any(word in name for word in ("keypoint", "Keypoint", "anoptic", "semantic", "/rpn_"))
    or name == "COCO-Detection/fast_rcnn_R_50_FPN_1x"
}


@functools.lru_cache(maxsize=1)
def detector_of(name: str) -> torch.nn.Module:
    detector = build_detector(parts.configuration_of(name), parts.PARTS[name][0] == parts.RETINANET)
    load_into(detector, parts.weights_of(detector.state_dict()), "seeded weights")
    return detector.requires_grad_(False)


@functools.lru_cache(maxsize=1)
def expected() -> Dict[str, Any]:
    return golden.load("parts")


def fields_of(found) -> Dict[str, np.ndarray]:
    return dict(zip(MASKS if len(found) == 5 else BOXES, (x.numpy() for x in found)))


# Beside Detectron2 -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", parts.PARTS)
def test_parameters_are_detectron2s(name):
    with np.load(DATA / "golden_parts.npz") as arrays:
        wanted = json.loads(str(arrays["about"]))["state_dict"][name]
    assert golden.shapes_of(detector_of(name)) == wanted


@pytest.mark.parametrize("name", parts.PARTS)
def test_outputs_are_detectron2s(name):
    (found,) = detector_of(name)(list(parts.images_of(name)))
    (wanted,) = expected()[name]
    assert len(wanted["scores"]) > 5
    assert_same(fields_of(flatten(found)), wanted)


@pytest.mark.parametrize("name", parts.PARTS)
def test_traced_at_another_size_it_finds_the_same(name):
    module = TraceableDetector(detector_of(name)).eval()
    example = tuple(image[:, :64, :96] for image in parts.images_of(name))
    traced = torch.jit.trace(module, example, check_trace=False)
    (wanted,) = expected()[name]
    assert_same(fields_of(traced(*parts.images_of(name))), wanted)


@pytest.mark.parametrize("name", ["faster_fpn", "retinanet_group_norm", "mask_c4_of_101"])
def test_scripting_leaves_the_module_as_it_is(name):
    detector = detector_of(name)
    before = {key: value.data_ptr() for key, value in detector.state_dict().items()}
    (found,) = script(detector)(list(parts.images_of(name)))
    (wanted,) = expected()[name]
    assert_same(fields_of(flatten(Instances(*found))), wanted)
    assert {key: value.data_ptr() for key, value in detector.state_dict().items()} == before


@pytest.mark.detectron2
@pytest.mark.parametrize("name", parts.PARTS)
def test_equals_the_installed_detectron2(name):
    pytest.importorskip("detectron2")
    import detectron2_reference

    config = parts.PARTS[name][0]
    theirs = detectron2_reference.build(config, parts.settings_of(name), parts.weights_of)
    images = parts.images_of(name)
    (wanted,) = detectron2_reference.outputs_of_part(theirs, images)
    (found,) = detector_of(name)(list(images))
    assert_same(fields_of(flatten(found)), {key: x.numpy() for key, x in wanted.items()})


# The model zoo ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ZOO) - NOT_BUILT))
def test_every_other_configuration_of_the_zoo_is_built(name):
    # What is built depends on no width, and narrow ones are quickly made.
    narrow = {key: value for key, value in parts.SMALL.items() if "NUM_C" not in key}
    if name.startswith("Base"):
        narrow.update({"MODEL.ROI_HEADS.NUM_CLASSES": 3})
    config = from_settings({**zoo_settings(name), **narrow})
    build_detector(config, True, initialize=False)


@pytest.mark.parametrize("name", sorted(NOT_BUILT))
def test_what_is_not_built_is_refused_by_name(name):
    with pytest.raises(InputError, match=r"^MODEL\.(META_ARCHITECTURE|KEYPOINT_ON|LOAD_PROPOSALS)"):
        build_detector(read_configuration(name), True)


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "settings", "said"),
    [
        ("fpn", {"MODEL.META_ARCHITECTURE": "CenterNet"}, "META_ARCHITECTURE is 'CenterNet'"),
        ("fpn", {"MODEL.BACKBONE.NAME": "build_vit"}, "MODEL.BACKBONE.NAME is 'build_vit'"),
        ("fpn", {"MODEL.RESNETS.DEPTH": 51}, "MODEL.RESNETS.DEPTH is 51, and the bundled"),
        ("fpn", {"MODEL.RESNETS.NORM": "XN"}, "MODEL.RESNETS.NORM is 'XN', and the bundled"),
        ("fpn", {"MODEL.RESNETS.NORM": "GN"}, None),
        (
            "fpn",
            {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 24},
            "24 channels are no multiple of 32",
        ),
        ("fpn", {"MODEL.RESNETS.OUT_FEATURES": ("res2", "res9")}, "OUT_FEATURES is 'res9'"),
        ("fpn", {"MODEL.RESNETS.OUT_FEATURES": ()}, "OUT_FEATURES is empty"),
        ("fpn", {"MODEL.RESNETS.RES5_DILATION": 2}, "each has to be twice the one before"),
        ("fpn", {"MODEL.RESNETS.RES5_DILATION": 3}, "RES5_DILATION is 3"),
        (
            "fpn",
            {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 128},
            "a ResNet of 18 layers has RES2_OUT_CHANNELS 64",
        ),
        ("fpn", {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": (True,)}, "each of 4 stages"),
        ("fpn", {"MODEL.FPN.IN_FEATURES": ("res2", "res4", "res5")}, "twice the one before"),
        ("fpn", {"MODEL.FPN.IN_FEATURES": ("res2", "res3")}, "IN_FEATURES, the last, is"),
        ("fpn", {"MODEL.FPN.FUSE_TYPE": "max"}, "MODEL.FPN.FUSE_TYPE is 'max'"),
        ("fpn", {"MODEL.RPN.IN_FEATURES": ("p2", "p9")}, "MODEL.RPN.IN_FEATURES is 'p9'"),
        ("fpn", {"MODEL.RPN.HEAD_NAME": "Other"}, "MODEL.RPN.HEAD_NAME is 'Other'"),
        ("fpn", {"MODEL.RPN.CONV_DIMS": (0,)}, "MODEL.RPN.CONV_DIMS is [0]"),
        ("fpn", {"MODEL.PROPOSAL_GENERATOR.NAME": "RRPN"}, "PROPOSAL_GENERATOR.NAME is 'RRPN'"),
        ("fpn", {"MODEL.ANCHOR_GENERATOR.NAME": "Rotated"}, "ANCHOR_GENERATOR.NAME is 'Rotated'"),
        ("fpn", {"MODEL.ANCHOR_GENERATOR.SIZES": ((8,), (16,))}, "2 entries for 5 feature maps"),
        (
            "fpn",
            {"MODEL.ANCHOR_GENERATOR.SIZES": ((8,), (16,), (32,), (64,), (64, 96))},
            "more anchors on one feature map than another",
        ),
        ("fpn", {"MODEL.ROI_HEADS.NAME": "Mine"}, "MODEL.ROI_HEADS.NAME is 'Mine'"),
        ("fpn", {"MODEL.ROI_HEADS.IN_FEATURES": ("p2", "p4")}, "and are no pyramid"),
        ("fpn", {"MODEL.ROI_BOX_HEAD.NAME": ""}, "MODEL.ROI_BOX_HEAD.NAME is ''"),
        ("fpn", {"MODEL.ROI_BOX_HEAD.NUM_FC": 0}, "neither convolutions"),
        ("fpn", {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "Best"}, "ROI_BOX_HEAD.POOLER_TYPE is 'Best'"),
        ("fpn", {"MODEL.KEYPOINT_ON": True}, "MODEL.KEYPOINT_ON"),
        ("fpn", {"MODEL.PIXEL_MEAN": (1.0,)}, "MODEL.PIXEL_MEAN has to have a number for each"),
        ("fpn", {"INPUT.FORMAT": "YUV-BT.601"}, "INPUT.FORMAT is 'YUV-BT.601'"),
        ("fpn", {"TEST.DETECTIONS_PER_IMAGE": 0}, "TEST.DETECTIONS_PER_IMAGE is 0"),
        (
            "c4",
            {
                "MODEL.RESNETS.OUT_FEATURES": ("res3", "res4"),
                "MODEL.ROI_HEADS.IN_FEATURES": ("res3", "res4"),
            },
            "differ in their channels",
        ),
        ("cascade", {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False}, "a cascade needs"),
        ("cascade", {"MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5,)}, "as many BBOX_REG_WEIGHTS"),
    ],
)
def test_what_there_is_no_network_for(base, settings, said):
    names = {"fpn": parts.FASTER_FPN, "c4": parts.FASTER_C4, "cascade": parts.CASCADE}
    config = from_settings({**zoo_settings(names[base]), **parts.SMALL, **settings})
    if said is None:
        build_detector(config, True, initialize=False)
        return
    with pytest.raises(InputError) as raised:
        build_detector(config, True, initialize=False)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
