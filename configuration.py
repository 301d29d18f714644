"""A Detectron2 configuration: what of it says what a detector computes, with Detectron2's defaults.

The names are those of its keys in lower case: `MODEL.RPN.NMS_THRESH` is `model.rpn.nms_thresh`. The
meaning of each key is told in Detectron2's documentation
(https://detectron2.readthedocs.io/en/latest/modules/config.html); what a detector makes of it is in
`detectors.config`.

Valid on Python 3.8; it imports no PyTorch.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Dict, Iterator, Tuple, get_type_hints

Floats = Tuple[float, ...]
Names = Tuple[str, ...]


@dataclass(frozen=True)
class Backbone:
    """MODEL.BACKBONE."""

    name: str = "build_resnet_backbone"


@dataclass(frozen=True)
class ResNets:
    """MODEL.RESNETS."""

    depth: int = 50
    out_features: Names = ("res4",)
    num_groups: int = 1
    norm: str = "FrozenBN"
    width_per_group: int = 64
    stride_in_1x1: bool = True
    res5_dilation: int = 1
    res2_out_channels: int = 256
    stem_out_channels: int = 64
    deform_on_per_stage: Tuple[bool, ...] = (False, False, False, False)
    deform_modulated: bool = False
    deform_num_groups: int = 1


@dataclass(frozen=True)
class FPN:
    """MODEL.FPN."""

    in_features: Names = ()
    out_channels: int = 256
    norm: str = ""
    fuse_type: str = "sum"


@dataclass(frozen=True)
class ProposalGenerator:
    """MODEL.PROPOSAL_GENERATOR."""

    name: str = "RPN"
    min_size: float = 0


@dataclass(frozen=True)
class AnchorGenerator:
    """MODEL.ANCHOR_GENERATOR; sizes in pixels, aspect ratios are height over width."""

    name: str = "DefaultAnchorGenerator"
    sizes: Tuple[Floats, ...] = ((32, 64, 128, 256, 512),)
    aspect_ratios: Tuple[Floats, ...] = ((0.5, 1.0, 2.0),)
    offset: float = 0.0


@dataclass(frozen=True)
class RPN:
    """MODEL.RPN."""

    head_name: str = "StandardRPNHead"
    in_features: Names = ("res4",)
    bbox_reg_weights: Floats = (1.0, 1.0, 1.0, 1.0)
    pre_nms_topk_test: int = 6000
    post_nms_topk_test: int = 1000
    nms_thresh: float = 0.7
    conv_dims: Tuple[int, ...] = (-1,)


@dataclass(frozen=True)
class ROIHeads:
    """MODEL.ROI_HEADS."""

    name: str = "Res5ROIHeads"
    num_classes: int = 80
    in_features: Names = ("res4",)
    score_thresh_test: float = 0.05
    nms_thresh_test: float = 0.5


@dataclass(frozen=True)
class ROIBoxHead:
    """MODEL.ROI_BOX_HEAD."""

    name: str = ""
    bbox_reg_weights: Floats = (10.0, 10.0, 5.0, 5.0)
    pooler_resolution: int = 14
    pooler_sampling_ratio: int = 0
    pooler_type: str = "ROIAlignV2"
    num_fc: int = 0
    fc_dim: int = 1024
    num_conv: int = 0
    conv_dim: int = 256
    norm: str = ""
    cls_agnostic_bbox_reg: bool = False
    use_sigmoid_ce: bool = False


@dataclass(frozen=True)
class ROIBoxCascadeHead:
    """MODEL.ROI_BOX_CASCADE_HEAD; a head for each of `ious`."""

    bbox_reg_weights: Tuple[Floats, ...] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    ious: Floats = (0.5, 0.6, 0.7)


@dataclass(frozen=True)
class ROIMaskHead:
    """MODEL.ROI_MASK_HEAD."""

    name: str = "MaskRCNNConvUpsampleHead"
    pooler_resolution: int = 14
    pooler_sampling_ratio: int = 0
    pooler_type: str = "ROIAlignV2"
    num_conv: int = 0
    conv_dim: int = 256
    norm: str = ""
    cls_agnostic_mask: bool = False


@dataclass(frozen=True)
class ROIKeypointHead:
    """MODEL.ROI_KEYPOINT_HEAD."""

    name: str = "KRCNNConvDeconvUpsampleHead"
    pooler_resolution: int = 14
    pooler_sampling_ratio: int = 0
    pooler_type: str = "ROIAlignV2"
    conv_dims: Tuple[int, ...] = (512,) * 8
    num_keypoints: int = 17


@dataclass(frozen=True)
class SemSegHead:
    """MODEL.SEM_SEG_HEAD."""

    name: str = "SemSegFPNHead"
    in_features: Names = ("p2", "p3", "p4", "p5")
    num_classes: int = 54
    convs_dim: int = 128
    common_stride: int = 4
    norm: str = "GN"


@dataclass(frozen=True)
class Combine:
    """MODEL.PANOPTIC_FPN.COMBINE; areas in pixels."""

    overlap_thresh: float = 0.5
    stuff_area_limit: float = 4096
    instances_confidence_thresh: float = 0.5


@dataclass(frozen=True)
class PanopticFPN:
    """MODEL.PANOPTIC_FPN."""

    combine: Combine = field(default_factory=Combine)


@dataclass(frozen=True)
class RetinaNet:
    """MODEL.RETINANET."""

    num_classes: int = 80
    in_features: Names = ("p3", "p4", "p5", "p6", "p7")
    num_convs: int = 4
    score_thresh_test: float = 0.05
    topk_candidates_test: int = 1000
    nms_thresh_test: float = 0.5
    bbox_reg_weights: Floats = (1.0, 1.0, 1.0, 1.0)
    norm: str = ""


@dataclass(frozen=True)
class Model:
    """MODEL; the mean and the standard deviation of each channel, in the order of the format."""

    meta_architecture: str = "GeneralizedRCNN"
    load_proposals: bool = False
    mask_on: bool = False
    keypoint_on: bool = False
    pixel_mean: Floats = (103.530, 116.280, 123.675)
    pixel_std: Floats = (1.0, 1.0, 1.0)
    backbone: Backbone = field(default_factory=Backbone)
    resnets: ResNets = field(default_factory=ResNets)
    fpn: FPN = field(default_factory=FPN)
    proposal_generator: ProposalGenerator = field(default_factory=ProposalGenerator)
    anchor_generator: AnchorGenerator = field(default_factory=AnchorGenerator)
    rpn: RPN = field(default_factory=RPN)
    roi_heads: ROIHeads = field(default_factory=ROIHeads)
    roi_box_head: ROIBoxHead = field(default_factory=ROIBoxHead)
    roi_box_cascade_head: ROIBoxCascadeHead = field(default_factory=ROIBoxCascadeHead)
    roi_mask_head: ROIMaskHead = field(default_factory=ROIMaskHead)
    roi_keypoint_head: ROIKeypointHead = field(default_factory=ROIKeypointHead)
    sem_seg_head: SemSegHead = field(default_factory=SemSegHead)
    panoptic_fpn: PanopticFPN = field(default_factory=PanopticFPN)
    retinanet: RetinaNet = field(default_factory=RetinaNet)


@dataclass(frozen=True)
class Input:
    """INPUT; lengths of the shorter and the longer edge in pixels, 0 leaves images as they are."""

    min_size_test: int = 800
    max_size_test: int = 1333
    format: str = "BGR"


@dataclass(frozen=True)
class Test:
    """TEST."""

    __test__ = False  # pytest: this is no test

    detections_per_image: int = 100
    keypoint_oks_sigmas: Floats = ()


@dataclass(frozen=True)
class Configuration:
    """All of it."""

    model: Model = field(default_factory=Model)
    input: Input = field(default_factory=Input)
    test: Test = field(default_factory=Test)


def keys(kind: type = Configuration, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The keys that a record has fields for, and their types."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        key, hint = prefix + each.name.upper(), hints[each.name]
        if is_dataclass(hint):
            yield from keys(hint, f"{key}.")
        else:
            yield key, hint


def from_settings(settings: Dict[str, Any], kind: type = Configuration, prefix: str = "") -> Any:
    """The configuration that has these values, and Detectron2's defaults for the rest.

    Args:
        settings: key -> value of the field's type; other keys are not looked at.
    """
    hints = get_type_hints(kind)
    values = {}
    for each in fields(kind):
        key, hint = prefix + each.name.upper(), hints[each.name]
        if is_dataclass(hint):
            values[each.name] = from_settings(settings, hint, f"{key}.")
        elif key in settings:
            values[each.name] = settings[key]
    return kind(**values)


# Keys, and nodes with all keys below them, that change nothing of what is computed for an image:
# they are for training, for data sets, and for Detectron2's own programs.
IGNORED = frozenset(
    {
        "CUDNN_BENCHMARK",
        "DATALOADER",
        "DATASETS",
        "FLOAT32_PRECISION",
        "GLOBAL",
        "INPUT.CROP",
        "INPUT.MASK_FORMAT",
        "INPUT.MAX_SIZE_TRAIN",
        "INPUT.MIN_SIZE_TRAIN",
        "INPUT.MIN_SIZE_TRAIN_SAMPLING",
        "INPUT.RANDOM_FLIP",
        # Angles are for rotated anchors, which have a generator of another name.
        "MODEL.ANCHOR_GENERATOR.ANGLES",
        "MODEL.BACKBONE.FREEZE_AT",
        "MODEL.DEVICE",
        # Detectron2 warns that it does not use this one any more; the next one scales losses.
        "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
        "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE",
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA",
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
        "MODEL.RETINANET.IOU_LABELS",
        "MODEL.RETINANET.IOU_THRESHOLDS",
        "MODEL.RETINANET.PRIOR_PROB",
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
        "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
        "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
        "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES",
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
        "MODEL.ROI_HEADS.IOU_LABELS",
        "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION",
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT",
        "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT",
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE",
        "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        "MODEL.RPN.BBOX_REG_LOSS_TYPE",
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
        "MODEL.RPN.BOUNDARY_THRESH",
        "MODEL.RPN.IOU_LABELS",
        "MODEL.RPN.IOU_THRESHOLDS",
        "MODEL.RPN.LOSS_WEIGHT",
        "MODEL.RPN.POSITIVE_FRACTION",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        "MODEL.RPN.SMOOTH_L1_BETA",
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
        "MODEL.WEIGHTS",
        "OUTPUT_DIR",
        "SEED",
        "SOLVER",
        # Test-time augmentation is no part of the model: Detectron2 wraps one in another for it.
        "TEST.AUG",
        "TEST.EVAL_PERIOD",
        "TEST.EXPECTED_RESULTS",
        "TEST.PRECISE_BN",
        "VIS_PERIOD",
    }
)
