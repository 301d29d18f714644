"""The configurations of Detectron2's model zoo, as far as they say what a detector computes.

Figures and names from the zoo's files, without what is for training
(https://github.com/facebookresearch/detectron2/tree/main/configs).
"""

from typing import Any, Dict, Tuple

from configuration import Configuration, from_settings

# The key that names what a configuration is based on.
BASE = "_BASE_"
# Key -> value.
Settings = Dict[str, Any]

_OCTAVES = (1.0, 2 ** (1.0 / 3), 2 ** (2.0 / 3))
_BOX_HEAD = {
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
}
_MASK_HEAD = {
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
}
# ResNeXt came from Caffe2, with the stride in the 3x3 convolution and with pixels scaled.
_X101: Settings = {
    "MODEL.PIXEL_STD": (57.375, 57.120, 58.395),
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NUM_GROUPS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.DEPTH": 101,
}
_R101: Settings = {"MODEL.RESNETS.DEPTH": 101}
_MASK: Settings = {"MODEL.MASK_ON": True}
_DEFORMED: Settings = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": (False, True, True, True)}
_CASCADE: Settings = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}


def _lvis(classes: int) -> Settings:
    return {
        **_MASK,
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0001,
        "TEST.DETECTIONS_PER_IMAGE": 300,
    }


def _from_scratch(norm: str, stride_in_1x1: bool) -> Settings:
    return {
        **_MASK,
        "MODEL.RESNETS.NORM": norm,
        "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1,
        "MODEL.FPN.NORM": norm,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_MASK_HEAD.NORM": norm,
    }


def _derived(base: str, *settings: Settings) -> Settings:
    derived: Settings = {BASE: base}
    for some in settings:
        derived.update(some)
    return derived


_C4, _DC5, _FPN, _RETINANET = (
    "Base-RCNN-C4",
    "Base-RCNN-DilatedC5",
    "Base-RCNN-FPN",
    "Base-RetinaNet",
)
_KEYPOINTS = "COCO-Keypoints/Base-Keypoint-RCNN-FPN"
_PANOPTIC = "COCO-PanopticSegmentation/Base-Panoptic-FPN"
_GN = "Misc/mask_rcnn_R_50_FPN_3x_gn"
_SYNC_BN = "Misc/mask_rcnn_R_50_FPN_3x_syncbn"
_SCALED: Settings = {"MODEL.PIXEL_STD": (57.375, 57.12, 58.395)}
_PROPOSALS: Settings = {
    "MODEL.META_ARCHITECTURE": "ProposalNetwork",
    "MODEL.RPN.POST_NMS_TOPK_TEST": 2000,
}
_VOC: Settings = {"MODEL.ROI_HEADS.NUM_CLASSES": 20}

# Name of the file, without its ending -> settings. A comment holds for the line below it.
ZOO: Dict[str, Settings] = {
    _C4: {"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"},
    _DC5: {
        "MODEL.RESNETS.OUT_FEATURES": ("res5",),
        "MODEL.RESNETS.RES5_DILATION": 2,
        "MODEL.RPN.IN_FEATURES": ("res5",),
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ("res5",),
        **_BOX_HEAD,
        **_MASK_HEAD,
    },
    _FPN: {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ("res2", "res3", "res4", "res5"),
        "MODEL.FPN.IN_FEATURES": ("res2", "res3", "res4", "res5"),
        "MODEL.ANCHOR_GENERATOR.SIZES": ((32,), (64,), (128,), (256,), (512,)),
        "MODEL.RPN.IN_FEATURES": ("p2", "p3", "p4", "p5", "p6"),
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ("p2", "p3", "p4", "p5"),
        **_BOX_HEAD,
        **_MASK_HEAD,
    },
    _RETINANET: {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ("res3", "res4", "res5"),
        "MODEL.FPN.IN_FEATURES": ("res3", "res4", "res5"),
        "MODEL.ANCHOR_GENERATOR.SIZES": tuple(
            tuple(size * octave for octave in _OCTAVES) for size in (32, 64, 128, 256, 512)
        ),
    },
    _KEYPOINTS: _derived(_FPN, {"MODEL.KEYPOINT_ON": True, "MODEL.ROI_HEADS.NUM_CLASSES": 1}),
    _PANOPTIC: _derived(_FPN, _MASK, {"MODEL.META_ARCHITECTURE": "PanopticFPN"}),
    "COCO-Detection/fast_rcnn_R_50_FPN_1x": _derived(
        _FPN,
        {"MODEL.LOAD_PROPOSALS": True, "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"},
    ),
    "COCO-Detection/faster_rcnn_R_101_C4_3x": _derived(_C4, _R101),
    "COCO-Detection/faster_rcnn_R_101_DC5_3x": _derived(_DC5, _R101),
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": _derived(_FPN, _R101),
    "COCO-Detection/faster_rcnn_R_50_C4_1x": _derived(_C4),
    "COCO-Detection/faster_rcnn_R_50_C4_3x": _derived(_C4),
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": _derived(_DC5),
    "COCO-Detection/faster_rcnn_R_50_DC5_3x": _derived(_DC5),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": _derived(_FPN),
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": _derived(_FPN),
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": _derived(_FPN, _X101),
    "COCO-Detection/retinanet_R_101_FPN_3x": _derived(_RETINANET, _R101),
    "COCO-Detection/retinanet_R_50_FPN_1x": _derived(_RETINANET),
    "COCO-Detection/retinanet_R_50_FPN_3x": _derived(_RETINANET),
    "COCO-Detection/rpn_R_50_C4_1x": _derived(
        _C4, _PROPOSALS, {"MODEL.RPN.PRE_NMS_TOPK_TEST": 12000}
    ),
    "COCO-Detection/rpn_R_50_FPN_1x": _derived(_FPN, _PROPOSALS),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_C4_3x": _derived(_C4, _MASK, _R101),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x": _derived(_DC5, _MASK, _R101),
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x": _derived(_FPN, _MASK, _R101),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x": _derived(_C4, _MASK),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": _derived(_C4, _MASK),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x": _derived(_DC5, _MASK),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_3x": _derived(_DC5, _MASK),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": _derived(_FPN, _MASK),
    # Another loss in training, that is all.
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_giou": _derived(_FPN, _MASK),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": _derived(_FPN, _MASK),
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x": _derived(_FPN, _MASK, _X101),
    "COCO-Keypoints/keypoint_rcnn_R_101_FPN_3x": _derived(_KEYPOINTS, _R101),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": _derived(_KEYPOINTS),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x": _derived(_KEYPOINTS),
    "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x": _derived(_KEYPOINTS, _X101),
    "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x": _derived(_PANOPTIC, _R101),
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": _derived(_PANOPTIC),
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x": _derived(_PANOPTIC),
    "Cityscapes/mask_rcnn_R_50_FPN": _derived(
        _FPN,
        _MASK,
        {
            "MODEL.ROI_HEADS.NUM_CLASSES": 8,
            "INPUT.MIN_SIZE_TEST": 1024,
            "INPUT.MAX_SIZE_TEST": 2048,
        },
    ),
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_101_FPN_1x": _derived(_FPN, _lvis(1230), _R101),
    "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": _derived(_FPN, _lvis(1230)),
    "LVISv0.5-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_1x": _derived(
        _FPN, _lvis(1230), _X101
    ),
    "LVISv1-InstanceSegmentation/mask_rcnn_R_101_FPN_1x": _derived(_FPN, _lvis(1203), _R101),
    "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": _derived(_FPN, _lvis(1203)),
    "LVISv1-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_1x": _derived(_FPN, _lvis(1203), _X101),
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": _derived(_FPN, _MASK, _CASCADE),
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": _derived(_FPN, _MASK, _CASCADE),
    "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv": _derived(
        _FPN,
        _MASK,
        _CASCADE,
        _DEFORMED,
        {
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RESNETS.NUM_GROUPS": 32,
            "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
            "MODEL.RESNETS.DEPTH": 152,
            "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
            "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
            "MODEL.ROI_BOX_HEAD.NORM": "GN",
            "MODEL.ROI_MASK_HEAD.NUM_CONV": 8,
            "MODEL.ROI_MASK_HEAD.NORM": "GN",
        },
    ),
    "Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic": _derived(
        _FPN,
        _MASK,
        {
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
        },
    ),
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5": _derived(_FPN, _MASK, _DEFORMED),
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5": _derived(_FPN, _MASK, _DEFORMED),
    _GN: _derived(_FPN, _from_scratch("GN", False)),
    _SYNC_BN: _derived(_FPN, _from_scratch("SyncBN", True)),
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x": _derived(
        _PANOPTIC,
        _R101,
        _DEFORMED,
        _CASCADE,
        {
            "MODEL.RESNETS.NORM": "GN",
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.FPN.NORM": "GN",
            "MODEL.ROI_MASK_HEAD.NORM": "GN",
        },
    ),
    "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn": _derived(_GN),
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_gn": _derived(_GN, _SCALED),
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn": _derived(
        _SYNC_BN, _SCALED, {"MODEL.RESNETS.STRIDE_IN_1X1": False}
    ),
    "Misc/semantic_R_50_FPN_1x": _derived(_FPN, {"MODEL.META_ARCHITECTURE": "SemanticSegmentor"}),
    "PascalVOC-Detection/faster_rcnn_R_50_C4": _derived(_C4, _VOC),
    "PascalVOC-Detection/faster_rcnn_R_50_FPN": _derived(_FPN, _VOC),
}

# The one expression in the zoo's files, which Detectron2 runs as a program: RetinaNet's anchors.
# It is known by its text, and is not run.
KNOWN_EXPRESSIONS: Dict[str, Tuple[Tuple[float, ...], ...]] = {
    "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]": ZOO[_RETINANET][
        "MODEL.ANCHOR_GENERATOR.SIZES"
    ],
}


def zoo_settings(name: str) -> Settings:
    """All that a configuration of the zoo sets, with what it is based on."""
    own = dict(ZOO[name])
    base = own.pop(BASE, None)
    return own if base is None else {**zoo_settings(base), **own}


def zoo_configuration(name: str) -> Configuration:
    """The configuration of the model zoo of a name, such as `Misc/semantic_R_50_FPN_1x`."""
    configuration: Configuration = from_settings(zoo_settings(name))
    return configuration
