"""Small detectors, each with another part than the test models have, as settings of Detectron2."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Tuple

from seeded_weights import seeded_image, seeded_weights
from torch import Tensor

from configuration import Configuration, from_settings
from detectors.zoo_configurations import zoo_settings

FASTER_FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x"
FASTER_C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x"
FASTER_DC5 = "COCO-Detection/faster_rcnn_R_50_DC5_1x"
MASK_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
MASK_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x"
MASK_DC5 = "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x"
KEYPOINTS = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x"
PROPOSALS = "COCO-Detection/rpn_R_50_FPN_1x"
PROPOSALS_C4 = "COCO-Detection/rpn_R_50_C4_1x"
SEMANTIC = "Misc/semantic_R_50_FPN_1x"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x"

# All parts are narrow, and list what they find whatever it scores.
SMALL: Dict[str, Any] = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.NUM_CONVS": 2,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 20,
}
# Few and small heatmaps: they are most of what is stored.
_SMALL_HEATMAPS = {
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (32, 24),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 5,
    "TEST.DETECTIONS_PER_IMAGE": 8,
}
_SMALL_ANCHORS = {
    "MODEL.ANCHOR_GENERATOR.SIZES": ((8, 24), (16, 40), (32, 64), (64, 96), (96, 128))
}


def _norms(norm: str) -> Dict[str, Any]:
    return {
        "MODEL.RESNETS.NORM": norm,
        "MODEL.FPN.NORM": norm,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 2,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_MASK_HEAD.NORM": norm,
    }


# Name -> configuration of the model zoo, and what is different.
PARTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "faster_fpn": (FASTER_FPN, {}),
    "faster_c4": (FASTER_C4, {}),
    "faster_dc5": (FASTER_DC5, {}),
    "mask_dc5": (MASK_DC5, {"MODEL.RESNETS.DEPTH": 101}),
    "mask_c4_of_101": (MASK_C4, {"MODEL.RESNETS.DEPTH": 101}),
    "resnext": (
        MASK_FPN,
        {
            "MODEL.RESNETS.NUM_GROUPS": 4,
            "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.PIXEL_STD": (57.375, 57.120, 58.395),
        },
    ),
    "depth_152": (FASTER_FPN, {"MODEL.RESNETS.DEPTH": 152}),
    "resnet_18": (
        FASTER_FPN,
        {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.STEM_OUT_CHANNELS": 64},
    ),
    "resnet_34": (RETINANET, {"MODEL.RESNETS.DEPTH": 34}),
    "group_norm": (MASK_FPN, _norms("GN")),
    "batch_norm_averaged": (MASK_FPN, {**_norms("BN"), "MODEL.FPN.FUSE_TYPE": "avg"}),
    "sync_batch_norm": (FASTER_FPN, _norms("SyncBN")),
    "no_norm": (FASTER_FPN, _norms("")),
    # With one group of offsets and not modulated, as Detectron2 refuses the others on a CPU.
    "deformable": (
        MASK_FPN,
        {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": (False, True, True, True)},
    ),
    "deformable_dilated": (
        FASTER_DC5,
        {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": (False, False, False, True)},
    ),
    "class_agnostic": (
        MASK_FPN,
        {
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
        },
    ),
    "cascade_of_two": (
        CASCADE,
        {
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.6),
            "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ((8.0, 8.0, 4.0, 4.0), (20.0,) * 4),
        },
    ),
    # What the first stage makes of a box is pooled, whatever its size, from one feature map.
    "cascade_dc5": (
        FASTER_DC5,
        {
            "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
            "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
            "MODEL.ROI_BOX_HEAD.NORM": "GN",
        },
    ),
    "keypoints": (KEYPOINTS, _SMALL_HEATMAPS),
    "cascade_with_keypoints": (
        CASCADE,
        {
            **_SMALL_HEATMAPS,
            "MODEL.KEYPOINT_ON": True,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (),
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 6,
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": 2,
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIAlign",
        },
    ),
    "proposal_network": (PROPOSALS, {}),
    "proposal_network_c4": (PROPOSALS_C4, {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 4}),
    "semantic": (SEMANTIC, {}),
    # At a stride that the finest has, and one is doubled to twice.
    "semantic_strides": (
        SEMANTIC,
        {
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": ("p5", "p3", "p4"),
            "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 8,
            "MODEL.SEM_SEG_HEAD.NORM": "",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 1,
        },
    ),
    "semantic_c4": (
        FASTER_C4,
        {
            "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": ("res4",),
            "MODEL.SEM_SEG_HEAD.NORM": "BN",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 1,
        },
    ),
    "panoptic": (PANOPTIC, {}),
    "sigmoid": (FASTER_FPN, {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}),
    "old_roi_align": (
        MASK_FPN,
        {
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 10,
        },
    ),
    "roi_pool": (FASTER_C4, {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}),
    "anchors": (
        FASTER_FPN,
        {
            **_SMALL_ANCHORS,
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ((0.3, 1.0),) * 4 + ((1.0, 3.0),),
            "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        },
    ),
    "proposals": (
        FASTER_FPN,
        {
            "MODEL.RPN.CONV_DIMS": (-1, 16),
            "MODEL.RPN.BBOX_REG_WEIGHTS": (2.0, 2.0, 1.5, 1.5),
            "MODEL.RPN.NMS_THRESH": 0.5,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
            "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 30,
        },
    ),
    "three_levels": (
        FASTER_FPN,
        {
            "MODEL.FPN.IN_FEATURES": ("res3", "res4", "res5"),
            "MODEL.RESNETS.OUT_FEATURES": ("res3", "res4", "res5"),
            "MODEL.RPN.IN_FEATURES": ("p3", "p4", "p5"),
            "MODEL.ROI_HEADS.IN_FEATURES": ("p3", "p4"),
            "MODEL.ANCHOR_GENERATOR.SIZES": ((32, 64, 128),),
        },
    ),
    "retinanet_group_norm": (
        RETINANET,
        {
            **_SMALL_ANCHORS,
            "MODEL.RETINANET.NORM": "GN",
            "MODEL.FPN.NORM": "GN",
            "MODEL.FPN.OUT_CHANNELS": 64,
            "MODEL.RETINANET.BBOX_REG_WEIGHTS": (1.0, 1.0, 2.0, 2.0),
        },
    ),
    "retinanet_batch_norm": (RETINANET, {"MODEL.RETINANET.NORM": "BN"}),
    "retinanet_four_levels": (
        RETINANET,
        {
            "MODEL.RETINANET.IN_FEATURES": ("p3", "p4", "p5", "p6"),
            "MODEL.ANCHOR_GENERATOR.SIZES": ((16, 32),),
            "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 30,
            "MODEL.RETINANET.NMS_THRESH_TEST": 0.3,
        },
    ),
}


def settings_of(name: str) -> Dict[str, Any]:
    """What is different from the configuration of the model zoo."""
    return {**SMALL, **PARTS[name][1]}


def configuration_of(name: str) -> Configuration:
    """The configuration of a part."""
    configuration: Configuration = from_settings(
        {**zoo_settings(PARTS[name][0]), **settings_of(name)}
    )
    return configuration


def weights_of(like: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Seeded weights, with scores that are spread out whatever the number of classes.

    What residual branches add is kept small in blocks of all kinds, so that rounding errors are.
    """
    state = seeded_weights(like)
    last = "conv3" if any(".conv3." in key for key in state) else "conv2"
    normalized = any(key.endswith(f"{last}.norm.weight") for key in state)
    for key, value in state.items():
        if "res" in key and key.endswith(f"{last}.norm.weight" if normalized else f"{last}.weight"):
            value *= 1.0 if normalized and last == "conv3" else 0.2  # Else it is small already.
    if "head.cls_score.bias" in state:
        state["head.cls_score.bias"] += 8
    return state


def images_of(name: str) -> Tuple[Tensor, ...]:
    """The images of its call."""
    return (seeded_image(1, 75, 101),)
