"""From configurations to networks: every part, beside Detectron2's, and what is refused."""

from __future__ import annotations

import functools
import io
import json
import warnings
from typing import Any, Dict

import golden
import numpy as np
import parts
import pytest
import torch
from golden import DATA, assert_same
from seeded_weights import seeded_image

from configuration import from_settings, keys
from detectors.checkpoint import load_into
from detectors.config import build_detector, fields
from detectors.config_file import read_configuration
from detectors.export import TraceableDetector, script
from detectors.instances import Instances, flatten
from detectors.limits import RANGES, check_numbers
from detectors.zoo_configurations import ZOO, zoo_settings
from errors import InputError

NOT_BUILT = "COCO-Detection/fast_rcnn_R_50_FPN_1x"

BASES = {
    "fpn": parts.FASTER_FPN,
    "c4": parts.FASTER_C4,
    "mask": parts.MASK_FPN,
    "cascade": parts.CASCADE,
    "keypoints": parts.KEYPOINTS,
    "retinanet": parts.RETINANET,
    "semantic": parts.SEMANTIC,
}
_GN = {"MODEL.RESNETS.NORM": "GN"}
NAN = float("nan")


@functools.lru_cache(maxsize=1)
def detector_of(name: str) -> torch.nn.Module:
    postprocess = parts.PARTS[name][0] == parts.RETINANET
    detector = build_detector(parts.configuration_of(name), postprocess)
    load_into(detector, parts.weights_of(detector.state_dict()), "seeded weights")
    return detector.requires_grad_(False)


@functools.lru_cache(maxsize=1)
def expected() -> Dict[str, Any]:
    return golden.load("parts")


def fields_of(name: str, found) -> Dict[str, np.ndarray]:
    return dict(zip(fields(parts.configuration_of(name), False), (x.numpy() for x in found)))


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
    assert next(iter(wanted.values())).size > 20
    assert_same(fields_of(name, flatten(found)), wanted)


@pytest.mark.parametrize("name", parts.PARTS)
def test_traced_at_another_size_it_finds_the_same(name):
    module = TraceableDetector(detector_of(name)).eval()
    example = tuple(image[:, :64, :96] for image in parts.images_of(name))
    traced = torch.jit.trace(module, example, check_trace=False)
    (wanted,) = expected()[name]
    assert_same(fields_of(name, traced(*parts.images_of(name))), wanted)


@pytest.mark.parametrize(
    "name",
    ["keypoints", "cascade_with_keypoints", "proposal_network", "semantic_strides", "panoptic"],
)
def test_is_traced_without_a_warning_and_without_a_detection(name):
    module = TraceableDetector(detector_of(name)).eval()
    # Nothing is proposed in an image of no numbers.
    example = tuple(torch.full_like(image, NAN) for image in parts.images_of(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, example, check_trace=False)
    (wanted,) = expected()[name]
    assert_same(fields_of(name, traced(*parts.images_of(name))), wanted)


@pytest.mark.parametrize(
    "name", ["faster_fpn", "retinanet_group_norm", "mask_c4_of_101", "keypoints"]
)
def test_scripting_leaves_the_module_as_it_is(name):
    detector = detector_of(name)
    before = {key: value.data_ptr() for key, value in detector.state_dict().items()}
    (found,) = script(detector)(list(parts.images_of(name)))
    (wanted,) = expected()[name]
    assert_same(fields_of(name, flatten(Instances(*found))), wanted)
    assert {key: value.data_ptr() for key, value in detector.state_dict().items()} == before


@pytest.mark.parametrize("mode", ["eager", "traced", "scripted"])
@pytest.mark.parametrize(
    "name",
    ["mask_c4_of_101", "group_norm", "roi_pool", "cascade_of_two", "cascade_dc5", "keypoints"],
)
def test_nothing_is_found_where_nothing_is_proposed(name, mode):
    detector = detector_of(name)
    flat = TraceableDetector(detector).eval()
    images = parts.images_of(name)
    if mode == "traced":
        flat = torch.jit.trace(flat, tuple(x[:, :64, :96] for x in images), check_trace=False)
    if mode == "scripted":
        scripted = script(detector)
        flat = lambda *images: flatten(Instances(*scripted(list(images))[0]))  # noqa: E731
    some = flat(*images)
    # Nothing that is computed from such an image is a number, and so no proposal is left.
    none = flat(*(torch.full_like(x, float("nan")) for x in images))
    assert len(some[0]) > 5
    assert [x.dtype for x in none] == [x.dtype for x in some]
    assert [x.shape for x in none[:-1]] == [(0, *x.shape[1:]) for x in some[:-1]]
    assert torch.equal(none[-1], some[-1])


@pytest.mark.parametrize("mode", ["eager", "traced"])
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("proposal_network", [(0,), (0, 4), (2,)]),
        ("panoptic", [(0, 4), (0,), (0, 1, 28, 28), (0,), (2,), (2, 75, 101)]),
    ],
)
def test_without_proposals(name, shapes, mode):
    flat = TraceableDetector(detector_of(name)).eval()
    images = parts.images_of(name)
    if mode == "traced":
        flat = torch.jit.trace(flat, tuple(x[:, :64, :96] for x in images), check_trace=False)
    assert [x.shape for x in flat(*(torch.full_like(x, NAN) for x in images))] == shapes


@pytest.mark.parametrize("name", ["proposal_network", "semantic", "semantic_c4", "panoptic"])
def test_images_of_two_sizes(name):
    (image,) = parts.images_of(name)
    small = seeded_image(2, 40, 60)
    flat = TraceableDetector(detector_of(name)).eval()
    with_small, of_small = flat(image, small), flat(small)
    count = len(with_small) // 2
    # The larger one gets no other padding than alone.
    (wanted,) = expected()[name]
    assert_same(fields_of(name, with_small[:count]), wanted)
    assert [x.shape for x in with_small[count:]] == [x.shape for x in of_small]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("name", ["proposal_network", "semantic", "panoptic"])
def test_converted_it_finds_the_same(name, package):
    runtime = pytest.importorskip(package)
    (image,) = parts.images_of(name)
    example = image[:, :64, :96]
    module = TraceableDetector(detector_of(name)).eval()
    traced = torch.jit.trace(module, (example,), check_trace=False)
    if package == "openvino":
        shape = runtime.PartialShape([3, -1, -1])
        model = runtime.convert_model(traced, example_input=(example,), input=[shape])
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        found = runtime.compile_model(model, "CPU", exact)([image.numpy()]).to_tuple()
    else:
        file, axes = io.BytesIO(), {"image": [1, 2]}
        names = {"input_names": ["image"], "dynamic_axes": axes}
        torch.onnx.export(traced, (example,), file, **names, opset_version=18, dynamo=False)
        session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        found = session.run(None, {"image": image.numpy()})
    (wanted,) = expected()[name]
    assert_same(dict(zip(wanted, found)), wanted)


@pytest.mark.parametrize("where", ["box_predictor.0.bbox_pred", "box_predictor.1.bbox_pred"])
@pytest.mark.parametrize("name", ["cascade_of_two", "cascade_dc5"])
def test_a_cascade_of_boxes_that_are_no_numbers(name, where):
    detector = detector_of(name)
    bias = detector.roi_heads.get_submodule(where).bias
    try:
        bias[0] = float("nan")
        (found,) = detector(list(parts.images_of(name)))
    finally:
        detector_of.cache_clear()
    assert len(found.scores) == 0


@pytest.mark.parametrize("name", parts.PARTS)
def test_fields_are_named(name):
    config = parts.configuration_of(name)
    found = flatten(detector_of(name)(list(parts.images_of(name)))[0])
    named = dict(zip(fields(config, False), found))
    assert list(named) == list(expected()[name][0])
    assert len(named) == len(found)


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
    assert_same(fields_of(name, flatten(found)), {key: x.numpy() for key, x in wanted.items()})


# The model zoo ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ZOO) - {NOT_BUILT}))
def test_every_other_configuration_of_the_zoo_is_built(name):
    # What is built depends on no width, and narrow ones are quickly made.
    narrow = {key: value for key, value in parts.SMALL.items() if "NUM_C" not in key}
    if name.startswith("Base"):
        narrow.update({"MODEL.ROI_HEADS.NUM_CLASSES": 3})
    config = from_settings({**zoo_settings(name), **narrow})
    build_detector(config, True, initialize=False)


def test_what_is_not_built_is_refused_by_name():
    with pytest.raises(InputError, match=r"^MODEL\.LOAD_PROPOSALS"):
        build_detector(read_configuration(NOT_BUILT), True)


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
        ("fpn", {"MODEL.KEYPOINT_ON": True}, None),
        ("c4", {"MODEL.KEYPOINT_ON": True}, "MODEL.KEYPOINT_ON: Res5ROIHeads have no keypoints"),
        ("keypoints", {"MODEL.ROI_KEYPOINT_HEAD.NAME": "Mine"}, "KEYPOINT_HEAD.NAME is 'Mine'"),
        ("keypoints", {"MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ""}, "HEAD.POOLER_TYPE is ''"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.NAME": "Mine"}, "SEM_SEG_HEAD.NAME is 'Mine'"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ("p9",)}, "IN_FEATURES is 'p9'"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ()}, "SEM_SEG_HEAD.IN_FEATURES is empty"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ("p5", "p6")}, "up to a stride of 64"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ("p6",)}, None),
        ("semantic", {"MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 8}, "COMMON_STRIDE is 8, and the"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 3}, "COMMON_STRIDE is 3, and the"),
        ("semantic", {"MODEL.SEM_SEG_HEAD.NORM": "XN"}, "MODEL.SEM_SEG_HEAD.NORM is 'XN'"),
        (
            "semantic",
            {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 40},
            "MODEL.SEM_SEG_HEAD.NORM is GN, and 40 channels",
        ),
        (
            "c4",
            {
                "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
                "MODEL.RESNETS.OUT_FEATURES": ("res3", "res4"),
                "MODEL.SEM_SEG_HEAD.IN_FEATURES": ("res3", "res4"),
            },
            "images are padded to multiples of 1 only",
        ),
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
        (
            "c4",
            {
                "MODEL.RESNETS.OUT_FEATURES": ("res3",),
                "MODEL.RPN.IN_FEATURES": ("res3",),
                "MODEL.ROI_HEADS.IN_FEATURES": ("res3",),
            },
            "have 128 channels, and the res5 of Res5ROIHeads takes 256",
        ),
        (
            "fpn",
            {
                "MODEL.RESNETS.OUT_FEATURES": ("res5",),
                "MODEL.RESNETS.RES5_DILATION": 2,
                "MODEL.FPN.IN_FEATURES": ("res5",),
                "MODEL.RPN.IN_FEATURES": ("p4", "p5"),
                "MODEL.ROI_HEADS.IN_FEATURES": ("p4",),
                "MODEL.ANCHOR_GENERATOR.SIZES": ((32,),),
            },
            "MODEL.RESNETS.RES5_DILATION, with p6, is 2",
        ),
        (
            "fpn",
            {
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE": (False, False, False, True),
                "MODEL.RESNETS.DEFORM_NUM_GROUPS": 3,
            },
            "DEFORM_NUM_GROUPS is 3, which does not divide the 256 channels of res5",
        ),
        # Group norms of layers that there are, and of some that there are not.
        ("fpn", {**_GN, "MODEL.RESNETS.WIDTH_PER_GROUP": 8}, "NORM is GN, and 8 channels"),
        ("fpn", {**_GN, "MODEL.RESNETS.RES2_OUT_CHANNELS": 48}, "NORM is GN, and 48 channels"),
        ("c4", {**_GN, "MODEL.RESNETS.WIDTH_PER_GROUP": 4}, "MODEL.RESNETS.NORM is GN, and 4"),
        (
            "fpn",
            {"MODEL.FPN.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 40},
            "MODEL.FPN.NORM is GN, and 40 channels are no multiple of 32",
        ),
        (
            "retinanet",
            {"MODEL.RETINANET.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 40},
            "MODEL.RETINANET.NORM is GN, and 40 channels",
        ),
        ("fpn", {"MODEL.ROI_BOX_HEAD.NORM": "GN", "MODEL.ROI_BOX_HEAD.CONV_DIM": 20}, None),
        (
            "fpn",
            {
                "MODEL.ROI_BOX_HEAD.NORM": "GN",
                "MODEL.ROI_BOX_HEAD.CONV_DIM": 20,
                "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
            },
            "MODEL.ROI_BOX_HEAD.NORM is GN, and 20 channels",
        ),
        (
            "mask",
            {"MODEL.ROI_MASK_HEAD.NORM": "GN", "MODEL.ROI_MASK_HEAD.CONV_DIM": 20},
            "MODEL.ROI_MASK_HEAD.NORM is GN, and 20 channels",
        ),
    ],
)
def test_what_there_is_no_network_for(base, settings, said):
    if said is None:
        build(base, settings)
    else:
        assert said in refusal(base, settings)


def build(base: str, settings: Dict[str, Any]) -> None:
    config = from_settings({**zoo_settings(BASES[base]), **parts.SMALL, **settings})
    build_detector(config, True, initialize=False)


def refusal(base: str, settings: Dict[str, Any]) -> str:
    with pytest.raises(InputError) as raised:
        build(base, settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("base", "key", "values"),
    [
        ("fpn", "MODEL.PIXEL_MEAN", [(0.0, 0.0, NAN), (float("inf"), 0.0, 0.0)]),
        ("fpn", "MODEL.PIXEL_STD", [(1.0, 0.0, 1.0), (1.0, 1.0, NAN)]),
        ("fpn", "MODEL.RESNETS.NUM_GROUPS", [0, -1]),
        ("fpn", "MODEL.RESNETS.WIDTH_PER_GROUP", [0, 10**9]),
        ("fpn", "MODEL.RESNETS.RES2_OUT_CHANNELS", [0, -64]),
        ("fpn", "MODEL.RESNETS.STEM_OUT_CHANNELS", [0, -64]),
        ("fpn", "MODEL.RESNETS.DEFORM_NUM_GROUPS", [0]),
        ("fpn", "MODEL.FPN.OUT_CHANNELS", [0, -1]),
        ("fpn", "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", [-1.0, NAN]),
        ("fpn", "MODEL.ANCHOR_GENERATOR.SIZES", [((0.0,),), ((-8.0,),), ((NAN,),), ((1e300,),)]),
        ("fpn", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [((0.0,),), ((1.0, -1.0),), ((NAN,),)]),
        ("fpn", "MODEL.ANCHOR_GENERATOR.OFFSET", [1.0, -0.5, NAN]),
        ("fpn", "MODEL.RPN.CONV_DIMS", [(-2,), (10**9,)]),
        ("fpn", "MODEL.RPN.BBOX_REG_WEIGHTS", [(1.0,) * 3, (1.0,) * 5, (0.0,) * 4, (NAN,) * 4]),
        ("fpn", "MODEL.RPN.PRE_NMS_TOPK_TEST", [0, 2**63]),
        ("fpn", "MODEL.RPN.POST_NMS_TOPK_TEST", [0, -1]),
        ("fpn", "MODEL.RPN.NMS_THRESH", [NAN]),
        ("fpn", "MODEL.ROI_HEADS.NUM_CLASSES", [0, -1]),
        ("fpn", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", [NAN, 1, 50]),
        ("fpn", "MODEL.ROI_HEADS.NMS_THRESH_TEST", [NAN]),
        ("fpn", "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", [(), (1.0,) * 3, (1.0,) * 5]),
        ("fpn", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", [0, -7]),
        ("c4", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", [0, -7]),
        ("fpn", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", [-1]),
        ("fpn", "MODEL.ROI_BOX_HEAD.NUM_FC", [-1]),
        ("fpn", "MODEL.ROI_BOX_HEAD.FC_DIM", [0]),
        ("fpn", "MODEL.ROI_BOX_HEAD.NUM_CONV", [-1]),
        ("fpn", "MODEL.ROI_BOX_HEAD.CONV_DIM", [0]),
        (
            "cascade",
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
            [((1.0,) * 4, (1.0,) * 3, (1.0,) * 4), ((1.0,) * 4, (1.0,) * 4, (1.0,) * 5)],
        ),
        ("mask", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", [0]),
        ("mask", "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", [-1]),
        ("mask", "MODEL.ROI_MASK_HEAD.NUM_CONV", [-1]),
        ("mask", "MODEL.ROI_MASK_HEAD.CONV_DIM", [0]),
        ("keypoints", "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", [0]),
        ("keypoints", "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", [-1]),
        ("keypoints", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [(0,), (32, -1)]),
        ("keypoints", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", [0, -1]),
        ("retinanet", "MODEL.RETINANET.NUM_CLASSES", [0, -1]),
        ("retinanet", "MODEL.RETINANET.NUM_CONVS", [0, -1]),
        ("retinanet", "MODEL.RETINANET.SCORE_THRESH_TEST", [NAN, 5]),
        ("retinanet", "MODEL.RETINANET.NMS_THRESH_TEST", [NAN]),
        ("retinanet", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", [0]),
        ("retinanet", "MODEL.RETINANET.BBOX_REG_WEIGHTS", [(1.0,) * 3, (0.0,) * 4]),
        ("semantic", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", [0]),
        ("semantic", "MODEL.SEM_SEG_HEAD.CONVS_DIM", [0]),
        ("semantic", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", [0, -4]),
        ("retinanet", "TEST.DETECTIONS_PER_IMAGE", [0, -1]),
        ("fpn", "INPUT.MIN_SIZE_TEST", [-1]),
    ],
)
def test_numbers_out_of_range(base, key, values):
    for value in values:
        assert refusal(base, {key: value}).startswith(f"{key} ")


def test_every_number_has_a_range():
    numbers = {
        key.rsplit(".", 1)[-1].lower()
        for key, hint in keys()
        if any(word in str(hint) for word in ("int", "float"))
    }
    assert numbers == set(RANGES)


def test_the_defaults_and_the_zoo_are_in_range():
    # All sections, whether the architecture looks at them or not.
    sections = {key.rsplit(".", 1)[0] for key, _ in keys()}
    for name in ZOO:
        config = from_settings(zoo_settings(name))
        for prefix in sections:
            section = functools.reduce(getattr, prefix.lower().split("."), config)
            check_numbers(prefix, section)
