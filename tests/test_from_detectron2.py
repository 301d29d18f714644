"""Models of the user's own that the installed Detectron2 builds: the bundled ones, and others."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from importlib import import_module
from typing import Any, Dict, List, Sequence, Tuple

import pytest

pytest.importorskip("detectron2.model_zoo")

import parts
import torch
from conftest import arrays
from detectron2.config import get_cfg
from detectron2.structures import ImageList
from seeded_weights import seeded_image
from test_cli import assert_refused, main  # noqa: F401
from test_example import CONFIG, IMAGES, OWN, QUICK, WEIGHTS
from torch import Tensor

from backends import base
from configuration import Input
from detectors import detectron2_tracing, from_detectron2
from detectors.build import build
from detectors.checkpoint import read
from detectors.config import NO_DETECTIONS
from detectors.config_file import read_configuration, read_settings
from detectors.detectron2_configuration import _config, detector_of, input_of
from detectors.detectron2_tracing import REPLACEMENTS
from detectors.export import Export
from detectors.zoo_configurations import zoo_settings
from errors import InputError, Unsupported
from models import Detectron2Model, Model

pytestmark = [pytest.mark.detectron2, pytest.mark.filterwarnings("ignore")]
# Of `parts`, one for each kind of detector.
KINDS = (
    *("faster_fpn", "class_agnostic", "resnext", "group_norm", "batch_norm_averaged"),
    *("faster_c4", "mask_dc5", "cascade_of_two", "keypoints", "deformable", "panoptic"),
    *("proposal_network", "semantic"),
    *("anchors", "retinanet_group_norm", "retinanet_batch_norm"),
)
WITH_DETECTIONS = [
    name
    for name in parts.PARTS
    if parts.configuration_of(name).model.meta_architecture not in NO_DETECTIONS
]
# Only Detectron2 has these.
ROTATED = {
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.ANGLES": ((-45, 0, 45),),
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0, 1.0),
    "MODEL.ROI_HEADS.NAME": "RROIHeads",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0, 1.0),
}
# A LazyConfig: what Detectron2 calls FCOS, small, and what is done to images.
FCOS = """
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

model = L(FCOS)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=64,
        top_block=L(LastLevelP6P7)(in_channels=64, out_channels=64, in_feature="p5"),
    ),
    num_classes=3,
    head=L(FCOSHead)(
        input_shape=[L(ShapeSpec)(channels=64)] * 5,
        conv_dims=[64] * 2,
        num_classes="${..num_classes}",
        norm="GN",
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    pixel_mean=[100.0, 110.0, 120.0],
    pixel_std=[60.0, 60.0, 60.0],
    test_score_thresh=0.03,
    max_detections_per_image=15,
)
dataloader = dict(
    test=dict(
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=96, max_size=160)],
            image_format="RGB",
        )
    )
)
"""
# The same on a RegNet, as Detectron2's new baselines are built.
REGNET = """
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
""" + FCOS.replace(
    FCOS[FCOS.index("bottom_up=") : FCOS.index("        out_channels=64,")],
    """bottom_up=L(RegNet)(
            stem_class=SimpleStem,
            stem_width=16,
            block_class=ResBottleneckBlock,
            depth=22,
            w_a=24.48,
            w_0=24,
            w_m=2.54,
            group_width=16,
            norm="FrozenBN",
            out_features=["s2", "s3", "s4"],
        ),
        in_features=["s2", "s3", "s4"],
""",
).replace('"p5"', '"p4"').replace('"p3", "p4", "p5", "p6", "p7"', '"p2", "p3", "p4", "p5", "p6"')


def tuning_inputs() -> Dict[str, Tuple[Tensor, ...]]:
    """As a run has them, but small: no side is a multiple of 32."""
    sizes = {"min": (70, 90), "opt": (100, 125), "max": (130, 150)}
    return {name: (seeded_image(1, *size),) for name, size in sizes.items()}


def own_part(name: str) -> Detectron2Model:
    settings = {**zoo_settings(parts.PARTS[name][0]), **parts.settings_of(name)}
    return Detectron2Model(name, tuple(settings.items()))


def export_of(own: Detectron2Model) -> Export:
    state = parts.weights_of(detector_of(own).state_dict())
    return build(Model("own", own.name, detectron2=own), state, "the weights", tuning_inputs())


def bundled(name: str, export: Export) -> Export:
    """The export of the same configuration and weights by the bundled detectors."""
    configuration = parts.configuration_of(name)
    is_retinanet = configuration.model.meta_architecture == "RetinaNet"
    model = Model("own", name, postprocess=is_retinanet, configuration=configuration)
    return build(model, export._detector.state_dict(), "the weights", export.tuning_inputs)


def eager(export: Export, size: str) -> List[Tensor]:
    with torch.no_grad():
        return list(export.eager(*export.tuning_inputs[size]))


def assert_close(
    names: Sequence[str], wanted: Sequence[Tensor], found: Sequence[Tensor], atol: float = 1e-3
) -> None:
    assert len(found) == len(wanted) == len(names)
    for name, one, other in zip(names, arrays(wanted), arrays(found)):
        assert other.dtype == one.dtype, name
        assert other.shape == one.shape, name
        limit = 10 * atol if name == "pred_boxes" else atol
        assert one.size == 0 or abs(other - one).max() <= limit, name


def assert_engines_agree(export: Export) -> None:
    """TorchScript, ONNX Runtime and OpenVINO find what eager Detectron2 finds, at each size."""
    for engine in ("torchscript", "openvino", "onnxruntime"):
        if base.load(engine).unavailable("cpu") is not None:
            continue
        export._script_module = None  # The exporter to ONNX leaves another graph behind.
        call = base.load(engine).optimize(export, "fp32", "cpu").call
        for size, images in export.tuning_inputs.items():
            wanted = eager(export, size)
            assert wanted[0].numel() > 12
            assert_close(export.fields, wanted, call(*images))


# What the bundled detectors have, too -----------------------------------------------------------


@pytest.mark.parametrize("name", WITH_DETECTIONS)
def test_both_sources_give_the_same(name):
    export = export_of(own_part(name))
    other = bundled(name, export)
    about = (export.fields, export.score_threshold, export.limit)
    assert about == (other.fields, other.score_threshold, other.limit)
    for size in export.tuning_inputs:
        assert_close(export.fields, eager(other, size), eager(export, size), atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_engines_find_what_detectron2_finds(name):
    assert_engines_agree(export_of(own_part(name)))


@pytest.mark.parametrize("name", ["faster_fpn", "retinanet_batch_norm"])
def test_traced_under_autocast(name):
    export = export_of(own_part(name))
    call = base.load("torchscript").optimize(export, "bf16", "cpu").call
    for images in export.tuning_inputs.values():
        assert len(call(*images)[0]) > 3


def test_eager_is_detectron2_as_it_is(monkeypatch):
    """The baseline: nothing of it is replaced, and nothing stays replaced."""
    used = []
    for name in ("_from_tensors", "_keypoint_rcnn_inference", "_deform_conv"):
        original = getattr(detectron2_tracing, name)
        spy = lambda *x, of=original, name=name, **y: (used.append(name), of(*x, **y))[1]  # noqa: E731
        monkeypatch.setattr(detectron2_tracing, name, spy)
    own = own_part("keypoints")
    export = export_of(own)
    before = eager(export, "opt")
    with torch.no_grad():
        inputs = [{"image": export.inputs[0]}]
        (found,) = export._detector.inference(inputs, do_postprocess=False)
    assert torch.equal(found.pred_keypoints, before[export.fields.index("pred_keypoints")])
    assert used == []
    before_tracing = _current()
    export.script_module()
    assert all(one is other for one, other in zip(before_tracing, _current()))
    assert_close(export.fields, before, eager(export, "opt"), atol=0)


def _current() -> List[Any]:
    """What Detectron2 has now, where something may be replaced."""
    places = [(import_module(f"detectron2.{x}"), name) for x, name, _ in REPLACEMENTS]
    return [vars(owner)[name] for owner, name in [*places, (ImageList, "from_tensors")]]


def test_what_is_replaced_is_restored_after_an_error():
    before = _current()
    with contextlib.suppress(ZeroDivisionError), detectron2_tracing.replaced_while_tracing():
        assert not any(one is other for one, other in zip(before, _current()))
        1 / 0  # noqa: B018
    assert all(one is other for one, other in zip(before, _current()))


@pytest.mark.parametrize("size", [(32, 64), (33, 65), (100, 125)])
def test_padding_is_detectron2s(size):
    images = [torch.rand(3, *size), torch.rand(3, size[1], size[0])]
    for each in (images[:1], images):
        for arguments in ((0,), (32,), (32, 0.0, {"size_divisibility": 16})):
            wanted = ImageList.from_tensors(each, *arguments)
            found = detectron2_tracing._from_tensors(each, *arguments)
            assert torch.equal(found.tensor, wanted.tensor)
            assert [x.tolist() for x in found.image_sizes] == [list(x) for x in wanted.image_sizes]
    square = (32, 0.0, {"square_size": 256})
    found = detectron2_tracing._from_tensors(images, *square)
    assert torch.equal(found.tensor, ImageList.from_tensors(images, *square).tensor)


def test_the_example_is_the_same_from_both_sources():
    settings = read_settings(str(CONFIG))
    own = Detectron2Model("config.yaml", settings)
    calls, state = tuning_inputs(), read(WEIGHTS)
    theirs = build(Model("shapes", "config.yaml", detectron2=own), state, "weights", calls)
    configuration = read_configuration(str(CONFIG))
    ours = build(Model("shapes", "x", configuration=configuration), state, "weights", calls)
    assert input_of(own) == (configuration.input, None)
    for size in calls:
        assert_close(ours.fields, eager(ours, size), eager(theirs, size), atol=1e-4)


# What only Detectron2 has -----------------------------------------------------------------------


def test_rotated_boxes():
    settings = {**zoo_settings(parts.FASTER_FPN), **parts.SMALL, **ROTATED}
    export = export_of(Detectron2Model("rotated", tuple(settings.items())))
    assert export.fields == ("pred_boxes", "pred_classes", "scores", "image_size")
    wanted = eager(export, "min")
    assert wanted[0].shape == (20, 5)
    call = base.load("torchscript").optimize(export, "fp32", "cpu").call
    assert_close(export.fields, wanted, call(*export.tuning_inputs["min"]))
    for engine in ("openvino", "onnxruntime"):
        if base.load(engine).unavailable("cpu") is None:
            export._script_module = None
            with pytest.raises(Unsupported, match=r"detectron2::nms_rotated") as refusal:
                base.load(engine).optimize(export, "fp32", "cpu")
            assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("program", [FCOS, REGNET], ids=["resnet", "regnet"])
def test_a_lazy_configuration(tmp_path, program):
    path = tmp_path / "fcos.py"
    path.write_text(program)
    own = Detectron2Model(path.name, program=str(path))
    assert input_of(own) == (Input(96, 160, "RGB"), None)
    export = export_of(own)
    assert (export.score_threshold, export.limit) == (0.03, 15)
    assert export._detector.num_classes == 3
    assert_engines_agree(export)


def test_a_lazy_configuration_with_other_values(tmp_path):
    path = tmp_path / "fcos.py"
    path.write_text(FCOS)
    settings = (("model.num_classes", 7), ("model.test_score_thresh", 0.2))
    own = Detectron2Model(path.name, settings, str(path))
    detector = detector_of(own)
    assert (detector.num_classes, detector.head.cls_score.out_channels) == (7, 7)
    assert from_detectron2._limits(detector) == (0.2, 15)
    for key in ("modle.num_classes", "model.num_classes.x", "model.lost.x"):
        with pytest.raises(InputError, match=rf"^fcos\.py has no .*, in which {key} could be set"):
            detector_of(replace(own, settings=((key, 3),)))


@pytest.mark.parametrize(
    ("old", "new", "found", "assumed"),
    [
        ("max_size=160", "max_size=200", Input(96, 200, "RGB"), None),
        (", max_size=160", "", Input(96, 1 << 31, "RGB"), None),
        ("=96,", "=[96, 96],", Input(96, 160, "RGB"), None),
        ("=96,", "=[64, 96],", Input(800, 1333, "RGB"), "images are resized to 800 to 1333 pixels"),
        ('image_format="RGB",', "", Input(96, 160, "BGR"), "images are taken as BGR"),
        ('"RGB"', '"${model.format}"', Input(96, 160, "BGR"), "images are taken as BGR"),
        ("dataloader", "loader", Input(), "800 to 1333 pixels and taken as BGR"),
        (
            "    num_classes=3,",
            "    num_classes=3, input_format='RGB',",
            Input(96, 160, "RGB"),
            None,
        ),
    ],
)
def test_how_a_lazy_configuration_wants_its_images(tmp_path, old, new, found, assumed):
    path = tmp_path / "fcos.py"
    assert old in FCOS
    path.write_text(FCOS.replace(old, new))
    inputs, told = input_of(Detectron2Model(path.name, program=str(path)))
    assert inputs == found
    assert told is None if assumed is None else assumed in told


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
        ("a = (", "cannot be run: SyntaxError"),
        ("other = 1", "defines no model"),
        ("model = dict(_target_='builtins.dict')", "is no PyTorch module"),
        ("model = dict(_target_='nowhere.Net')", "Detectron2 cannot build x.py"),
    ],
)
def test_a_program_that_is_no_configuration(tmp_path, program, said):
    path = tmp_path / "x.py"
    path.write_text(program)
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        detector_of(Detectron2Model("x.py", program=str(path)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MODEL.POINT_HEAD.NUM_FC", 3, "MODEL.POINT_HEAD.NUM_FC is not known to the installed"),
        ("MODEL.MASK_ON.X", 3, "MODEL.MASK_ON.X is not known"),
        ("MODEL.RPN", 3, "MODEL.RPN has keys of its own"),
        ("MODEL.RPN.NMS_THRESH", "much", "MODEL.RPN.NMS_THRESH is 'much'"),
        ("MODEL.META_ARCHITECTURE", "DETR", "is 'DETR', and the installed Detectron2 has Gener"),
        ("MODEL.BACKBONE.NAME", "mine", "cannot build own: KeyError: \"No object named 'mine'"),
    ],
)
def test_settings_that_detectron2_refuses(key, value, said):
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        detector_of(Detectron2Model("own", ((key, value),)))
    assert said in str(error.value)


def test_whole_numbers_are_real_ones_where_those_are_wanted():
    config = _config(Detectron2Model("own", (("MODEL.RPN.NMS_THRESH", 1), ("MODEL.RPN", None))))
    assert isinstance(config.MODEL.RPN.NMS_THRESH, float)
    assert config.MODEL.RPN.keys() == get_cfg().MODEL.RPN.keys()


def test_what_detectron2_does_not_compute_on_a_cpu():
    own = own_part("deformable")
    own = replace(own, settings=(*own.settings, ("MODEL.RESNETS.DEFORM_MODULATED", True)))
    with pytest.raises(InputError, match=r"^deformable: Detectron2 cannot run it here: [^\n]+$"):
        export_of(own)


def test_an_image_format_that_cannot_be_made():
    with pytest.raises(InputError, match=r"format is 'L', and BGR or RGB can be made ready"):
        input_of(Detectron2Model("own", (("INPUT.FORMAT", "L"),)))


# From the command line --------------------------------------------------------------------------


def test_from_the_command_line(main):  # noqa: F811
    asked = [*OWN, "--image", IMAGES[0], "--backend", "torchscript", *QUICK]
    ours = main(*asked)
    theirs = main(*asked, "--source", "detectron2")
    assert ours.code == theirs.code == 0, theirs.err
    matches = [[x for x in run.out.split() if "/" in x][-1] for run in (ours, theirs)]
    assert "timed at 160x200" in theirs.out
    assert matches[0] == matches[1]


def test_a_lazy_configuration_from_the_command_line(main, tmp_path):  # noqa: F811
    config, weights = tmp_path / "fcos.py", tmp_path / "fcos.pth"
    config.write_text(FCOS.replace("image_format", "use_keypoint"))
    own = Detectron2Model(config.name, program=str(config))
    torch.save(parts.weights_of(detector_of(own).state_dict()), weights)
    asked = ["--config-file", config, "--weights", weights, "--source", "detectron2"]
    asked += ["--trust-config", "--image", IMAGES[0], "--backend", "torchscript", *QUICK]
    outcome = main(*asked)
    assert outcome.code == 0, outcome.err
    assert re.search(r" (\d+)/\1 (match|too few)", outcome.out), outcome.out
    assert "timed at 96x120" in outcome.out
    assert "fcos.py does not say it: images are taken as BGR" in outcome.err
    outcome = main(*asked, "--opts", "model.num_classes=4")
    assert_refused(outcome, "of 3 classes, not of 4")
    assert "MODEL." not in outcome.err
    outcome = main(*asked, "--opts", "model.num_classes=-3")
    assert_refused(outcome, "Detectron2 cannot build fcos.py with model.num_classes=-3: ")


@pytest.mark.parametrize("name", ["semantic", "proposal_network"])
def test_what_lists_no_scores(main, tmp_path, name):  # noqa: F811
    own = own_part(name)
    config, weights = tmp_path / f"{name}.yaml", tmp_path / f"{name}.pth"
    config.write_text(_config(own).dump())  # As Detectron2's trainer leaves it.
    torch.save(parts.weights_of(detector_of(own).state_dict()), weights)
    asked = ["--config-file", config, "--weights", weights, "--source", "detectron2"]
    asked += ["--image", IMAGES[0], "--image-size", "96x128", "--backend", "torchscript", *QUICK]
    outcome = main(*asked)
    assert outcome.code == 0, outcome.err
    found = r" (99|100)\.\d\d% match" if name == "semantic" else r" (\d+)/\1 match"
    assert re.search(found, outcome.out), outcome.out


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", "4"], ["of 3 classes, not of 4"]),
        (["MODEL.META_ARCHITECTURE", "DETR"], ["MODEL.META_ARCHITECTURE is 'DETR'"]),
        (["MODEL.POINT_HEAD.NUM_FC", "3"], ["MODEL.POINT_HEAD.NUM_FC is not known"]),
        (["MODEL.RPN.NMS_THRESH", "much"], ["MODEL.RPN.NMS_THRESH is 'much'"]),
        (["INPUT.FORMAT", "L"], ["format is 'L'"]),
    ],
)
def test_what_is_refused(main, tmp_path, keys, words):  # noqa: F811
    output = tmp_path / "output"
    asked = [*OWN, "--source", "detectron2", "--image", IMAGES[0], "--output", output]
    assert_refused(main(*asked, "--opts", *keys), *words)
    assert not output.exists()
