"""From a Detectron2 configuration to a network.

What is set to something that there is no network for is refused here, by the name of its key.
"""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Collection, Dict, Iterator, List, Sequence, Tuple, Union

from torch import nn

from configuration import Configuration, ResNets, ROIKeypointHead, SemSegHead
from detectors.backbone import (
    FPN,
    NUM_BLOCKS,
    STAGES,
    LastLevelMaxPool,
    LastLevelP6P7,
    ResNet,
    make_stage,
    stage_channels,
    stage_width,
)
from detectors.boxes import AnchorGenerator
from detectors.keypoints import KeypointHead
from detectors.layers import NORMS
from detectors.limits import check_numbers
from detectors.rcnn import GeneralizedRCNN, ProposalNetwork
from detectors.retinanet import RetinaNet
from detectors.roi_heads import (
    BoxHead,
    BoxPredictor,
    CascadeROIHeads,
    MaskHead,
    Res5ROIHeads,
    ROIPooler,
    Selection,
    StandardROIHeads,
)
from detectors.rpn import RPN
from detectors.semantic import PanopticFPN, SemanticSegmentor, SemSegFPNHead
from errors import InputError

Backbone = Union[ResNet, FPN]
POOLERS = ("ROIAlignV2", "ROIAlign", "ROIPool")


def build_detector(
    config: Configuration,
    postprocess: bool,
    initialize: bool = True,
) -> nn.Module:
    """The detector of a configuration, in eval mode, with untrained weights.

    Args:
        config: see `detectors.config_file`.
        postprocess: clip the boxes to the image and paste the masks into it.
        initialize: give the parameters PyTorch's random values. Where all of them are overwritten
            anyway, False saves nine tenths of the time: they hold whatever the memory holds.

    Raises:
        errors.InputError: it asks for what there is no network for, or contradicts itself.
    """
    if initialize:
        return _built(config, postprocess).eval()
    with _uninitialized():
        return _built(config, postprocess).eval()


@contextmanager
def _uninitialized() -> Iterator[None]:
    """While it lasts, new layers leave their parameters as the memory was."""
    # Not the device "meta": the anchors and the mean pixel, which no checkpoint has, would be lost.
    kept = {kind: kind.reset_parameters for kind in (nn.modules.conv._ConvNd, nn.Linear)}
    try:
        for kind in kept:
            kind.reset_parameters = lambda layer: None
        yield
    finally:
        for kind, initialize in kept.items():
            kind.reset_parameters = initialize


def _built(config: Configuration, postprocess: bool) -> nn.Module:
    architecture = config.model.meta_architecture
    one_of("MODEL.META_ARCHITECTURE", architecture, ARCHITECTURES)
    for name in ("pixel_mean", "pixel_std"):
        if len(getattr(config.model, name)) != 3:
            raise InputError(f"MODEL.{name.upper()} has to have a number for each of 3 channels")
    for section in ("model", "input", "test"):
        check_numbers(section.upper(), getattr(config, section))
    one_of("INPUT.FORMAT", config.input.format, ("BGR", "RGB"))
    return ARCHITECTURES[architecture](config, postprocess)


def fields(config: Configuration, postprocess: bool) -> Tuple[str, ...]:
    """Names of the tensors of one image, in their order in the flat tuple of an export.

    That is the order of Detectron2's `TracingAdapter`: by name, and the size of the image last. Of
    a panoptic detector the instances come first. What each is, `detectors.instances` tells.

    Args:
        config, postprocess: as for `build_detector`, which refuses what has no fields.
    """
    model = config.model
    if model.meta_architecture in NO_DETECTIONS:
        return NO_DETECTIONS[model.meta_architecture]
    others = ("sem_seg",) if model.meta_architecture == "PanopticFPN" else ()
    has_heads = model.meta_architecture != "RetinaNet"
    names = ["pred_boxes", "pred_classes", "scores"]
    if has_heads and model.mask_on:
        names.append("pred_masks")
    if has_heads and model.keypoint_on:
        names += ["pred_keypoint_heatmaps", "pred_keypoints"]
    return (*sorted(names), "image_size", *others)


def one_of(key: str, value: Any, known: Collection[Any]) -> None:
    """Makes sure that there is a network for a value.

    Raises:
        errors.InputError: there is none.
    """
    if value not in known:
        raise InputError(
            f"{key} is {value!r}, and the bundled detectors know "
            f"{', '.join(str(each) or 'none' for each in known)} (--source detectron2 takes what "
            "an installed Detectron2 can build)"
        )


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """While it lasts, the layers that refuse something do it in the name of a key."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key} {error}") from None


def _check_norm(key: str, norm: str) -> None:
    one_of(key, norm, ("", *NORMS))


# Backbones -------------------------------------------------------------------------------------


def _backbone(config: Configuration) -> Backbone:
    name = config.model.backbone.name
    one_of("MODEL.BACKBONE.NAME", name, BACKBONES)
    return BACKBONES[name](config)


def _resnet(config: Configuration) -> ResNet:
    _check_resnets(config.model.resnets)
    with _naming("MODEL.RESNETS.NORM"):
        return ResNet(config.model.resnets)


def _check_resnets(resnets: ResNets) -> None:
    check_numbers("MODEL.RESNETS", resnets)
    one_of("MODEL.RESNETS.DEPTH", resnets.depth, NUM_BLOCKS)
    one_of("MODEL.RESNETS.RES5_DILATION", resnets.res5_dilation, (1, 2))
    if not resnets.out_features:
        raise InputError("MODEL.RESNETS.OUT_FEATURES is empty")
    for name in resnets.out_features:
        one_of("MODEL.RESNETS.OUT_FEATURES", name, ("stem", *STAGES))
    if len(resnets.deform_on_per_stage) != len(STAGES):
        raise InputError("MODEL.RESNETS.DEFORM_ON_PER_STAGE has to say it of each of 4 stages")
    _check_norm("MODEL.RESNETS.NORM", resnets.norm)
    _check_offsets(resnets)
    if resnets.depth in (18, 34):
        plain = replace(
            resnets,
            res2_out_channels=64,
            num_groups=1,
            res5_dilation=1,
            deform_on_per_stage=(False,) * len(STAGES),
        )
        if resnets != plain:
            raise InputError(
                f"a ResNet of {resnets.depth} layers has RES2_OUT_CHANNELS 64, and neither groups, "
                "nor dilation, nor deformable convolutions"
            )


def _check_offsets(resnets: ResNets) -> None:
    for place, deformed in enumerate(resnets.deform_on_per_stage):
        channels = stage_width(resnets, STAGES[place])
        if deformed and channels % resnets.deform_num_groups:
            raise InputError(
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS is {resnets.deform_num_groups}, which does not "
                f"divide the {channels} channels of {STAGES[place]}"
            )


def _pyramid(config: Configuration, top_block: Callable[[ResNet], nn.Module]) -> FPN:
    fpn = config.model.fpn
    check_numbers("MODEL.FPN", fpn)
    bottom_up = _resnet(config)
    one_of("MODEL.FPN.FUSE_TYPE", fpn.fuse_type, ("sum", "avg"))
    _check_norm("MODEL.FPN.NORM", fpn.norm)
    if not fpn.in_features:
        raise InputError("MODEL.FPN.IN_FEATURES is empty")
    # p6 is made of p5, or of res5.
    one_of("MODEL.RESNETS.OUT_FEATURES, the last,", bottom_up.names[-1], ("res5",))
    places = _places("MODEL.FPN.IN_FEATURES", bottom_up, fpn.in_features)
    strides = [bottom_up.strides[n] for n in places]
    if not _are_pyramid(strides):
        raise InputError(
            f"MODEL.FPN.IN_FEATURES have strides {strides}, and each has to be twice the one before"
        )
    average, top = fpn.fuse_type == "avg", top_block(bottom_up)
    with _naming("MODEL.FPN.NORM"):
        return FPN(bottom_up, places, fpn.out_channels, fpn.norm, average, top)


def _are_pyramid(strides: Sequence[int]) -> bool:
    return all(2 * fine == coarse for fine, coarse in zip(strides, strides[1:]))


def _fpn(config: Configuration) -> FPN:
    one_of("MODEL.FPN.IN_FEATURES, the last,", config.model.fpn.in_features[-1:], (("res5",),))
    pyramid = _pyramid(config, lambda bottom_up: LastLevelMaxPool())
    # p6 is made of p5, and a dilated res5 would be p4.
    one_of("MODEL.RESNETS.RES5_DILATION, with p6,", config.model.resnets.res5_dilation, (1,))
    return pyramid


def _retinanet_fpn(config: Configuration) -> FPN:
    channels = config.model.fpn.out_channels
    return _pyramid(config, lambda bottom_up: LastLevelP6P7(bottom_up.channels[-1], channels))


BACKBONES: Dict[str, Callable[[Configuration], Backbone]] = {
    "build_resnet_backbone": _resnet,
    "build_resnet_fpn_backbone": _fpn,
    "build_retinanet_resnet_fpn_backbone": _retinanet_fpn,
}


def _places(key: str, backbone: Backbone, names: Sequence[str]) -> List[int]:
    """The places of features among those of the backbone."""
    if not names:
        raise InputError(f"{key} is empty")
    for name in names:
        one_of(key, name, backbone.names)
    return [backbone.names.index(name) for name in names]


def _channels(key: str, backbone: Backbone, places: Sequence[int]) -> int:
    """The channels of some features, which have the same number of them."""
    channels = {backbone.channels[n] for n in places}
    if len(channels) > 1:
        raise InputError(f"{key} differ in their channels: {sorted(channels)}")
    return channels.pop()


# Anchors and proposals -------------------------------------------------------------------------


def _anchors(config: Configuration, strides: Sequence[int]) -> AnchorGenerator:
    settings = config.model.anchor_generator
    check_numbers("MODEL.ANCHOR_GENERATOR", settings)
    one_of("MODEL.ANCHOR_GENERATOR.NAME", settings.name, ("DefaultAnchorGenerator",))
    counts = {}
    for name in ("sizes", "aspect_ratios"):
        values = getattr(settings, name)
        if len(values) not in (1, len(strides)) or not all(values):
            raise InputError(
                f"MODEL.ANCHOR_GENERATOR.{name.upper()} has {len(values)} entries for "
                f"{len(strides)} feature maps"
            )
        counts[name] = [len(values[min(n, len(values) - 1)]) for n in range(len(strides))]
    numbers = {sizes * ratios for sizes, ratios in zip(*counts.values())}
    if len(numbers) > 1:
        raise InputError("MODEL.ANCHOR_GENERATOR has more anchors on one feature map than another")
    return AnchorGenerator(settings.sizes, settings.aspect_ratios, strides, settings.offset)


def _rpn(config: Configuration, backbone: Backbone) -> RPN:
    model = config.model
    one_of("MODEL.PROPOSAL_GENERATOR.NAME", model.proposal_generator.name, ("RPN",))
    one_of("MODEL.RPN.HEAD_NAME", model.rpn.head_name, ("StandardRPNHead",))
    check_numbers("MODEL.PROPOSAL_GENERATOR", model.proposal_generator)
    check_numbers("MODEL.RPN", model.rpn)
    if not model.rpn.conv_dims or 0 in model.rpn.conv_dims:
        raise InputError(f"MODEL.RPN.CONV_DIMS is {list(model.rpn.conv_dims)}: -1 or more than 0")
    key = "MODEL.RPN.IN_FEATURES"
    places = _places(key, backbone, model.rpn.in_features)
    return RPN(
        places,
        _channels(key, backbone, places),
        _anchors(config, [backbone.strides[n] for n in places]),
        model.rpn,
        model.proposal_generator.min_size,
    )


# Heads of regions ------------------------------------------------------------------------------


def _selection(config: Configuration) -> Selection:
    heads = config.model.roi_heads
    return Selection(
        float(heads.score_thresh_test),
        float(heads.nms_thresh_test),
        config.test.detections_per_image,
    )


def _pooler(key: str, head: Any, strides: Sequence[int]) -> ROIPooler:
    one_of(f"{key}.POOLER_TYPE", head.pooler_type, POOLERS)
    if not _are_pyramid(strides):
        raise InputError(
            f"MODEL.ROI_HEADS.IN_FEATURES have strides {list(strides)}, and are no pyramid"
        )
    return ROIPooler(head.pooler_resolution, strides, head.pooler_type, head.pooler_sampling_ratio)


def _predictor(config: Configuration, features: int, weights: Sequence[float]) -> BoxPredictor:
    head = config.model.roi_box_head
    return BoxPredictor(
        features,
        config.model.roi_heads.num_classes,
        head.cls_agnostic_bbox_reg,
        weights,
        head.use_sigmoid_ce,
    )


def _mask_head(config: Configuration, in_channels: int) -> MaskHead:
    head = config.model.roi_mask_head
    one_of("MODEL.ROI_MASK_HEAD.NAME", head.name, ("MaskRCNNConvUpsampleHead",))
    check_numbers("MODEL.ROI_MASK_HEAD", head)
    _check_norm("MODEL.ROI_MASK_HEAD.NORM", head.norm)
    num_classes = 1 if head.cls_agnostic_mask else config.model.roi_heads.num_classes
    with _naming("MODEL.ROI_MASK_HEAD.NORM"):
        return MaskHead(in_channels, num_classes, head)


def _pooled_features(config: Configuration, backbone: Backbone) -> Tuple[List[int], int]:
    """The places of what regions are pooled from, and its channels."""
    key = "MODEL.ROI_HEADS.IN_FEATURES"
    places = _places(key, backbone, config.model.roi_heads.in_features)
    return places, _channels(key, backbone, places)


def _standard_heads(config: Configuration, backbone: Backbone) -> StandardROIHeads:
    _, channels = _pooled_features(config, backbone)
    head = _box_head(config, channels)
    predictor = _predictor(config, head.features, config.model.roi_box_head.bbox_reg_weights)
    return _heads(StandardROIHeads, config, backbone, head, predictor)


def _cascade_heads(config: Configuration, backbone: Backbone) -> CascadeROIHeads:
    cascade = config.model.roi_box_cascade_head
    check_numbers("MODEL.ROI_BOX_CASCADE_HEAD", cascade)
    if len(cascade.bbox_reg_weights) != len(cascade.ious) or not cascade.ious:
        raise InputError("MODEL.ROI_BOX_CASCADE_HEAD needs as many BBOX_REG_WEIGHTS as IOUS")
    if not config.model.roi_box_head.cls_agnostic_bbox_reg:
        raise InputError("a cascade needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: True")
    _, channels = _pooled_features(config, backbone)
    heads = nn.ModuleList(_box_head(config, channels) for _ in cascade.ious)
    predictors = nn.ModuleList(
        _predictor(config, head.features, weights)
        for head, weights in zip(heads, cascade.bbox_reg_weights)
    )
    return _heads(CascadeROIHeads, config, backbone, heads, predictors)


def _box_head(config: Configuration, channels: int) -> BoxHead:
    head = config.model.roi_box_head
    one_of("MODEL.ROI_BOX_HEAD.NAME", head.name, ("FastRCNNConvFCHead",))
    check_numbers("MODEL.ROI_BOX_HEAD", head)
    _check_norm("MODEL.ROI_BOX_HEAD.NORM", head.norm)
    if head.num_conv + head.num_fc == 0:
        raise InputError("MODEL.ROI_BOX_HEAD has neither convolutions (NUM_CONV) nor NUM_FC")
    with _naming("MODEL.ROI_BOX_HEAD.NORM"):
        return BoxHead(channels, head)


def _heads(
    kind: Callable[..., StandardROIHeads],
    config: Configuration,
    backbone: Backbone,
    head: nn.Module,
    predictor: nn.Module,
) -> StandardROIHeads:
    """Heads with a pooler of each one's own."""
    model = config.model
    places, channels = _pooled_features(config, backbone)
    strides = [backbone.strides[n] for n in places]
    others: Dict[str, nn.Module] = {}
    if model.mask_on:
        others["mask_pooler"] = _pooler("MODEL.ROI_MASK_HEAD", model.roi_mask_head, strides)
        others["mask_head"] = _mask_head(config, channels)
    if model.keypoint_on:
        key, settings = "MODEL.ROI_KEYPOINT_HEAD", model.roi_keypoint_head
        others["keypoint_pooler"] = _pooler(key, settings, strides)
        others["keypoint_head"] = _keypoint_head(key, settings, channels)
    return kind(
        places,
        _pooler("MODEL.ROI_BOX_HEAD", model.roi_box_head, strides),
        head,
        predictor,
        _selection(config),
        **others,
    )


def _keypoint_head(key: str, head: ROIKeypointHead, in_channels: int) -> KeypointHead:
    one_of(f"{key}.NAME", head.name, ("KRCNNConvDeconvUpsampleHead",))
    check_numbers(key, head)
    if any(each < 1 for each in head.conv_dims):
        raise InputError(f"{key}.CONV_DIMS is {list(head.conv_dims)}: they have to be more than 0")
    return KeypointHead(in_channels, head)


def _res5_heads(config: Configuration, backbone: Backbone) -> Res5ROIHeads:
    model = config.model
    resnets = model.resnets
    places, channels = _pooled_features(config, backbone)
    if model.keypoint_on:
        raise InputError("MODEL.KEYPOINT_ON: Res5ROIHeads have no keypoints, StandardROIHeads have")
    if len(places) > 1:
        raise InputError("Res5ROIHeads take one feature in MODEL.ROI_HEADS.IN_FEATURES")
    if resnets.depth in (18, 34) or resnets.deform_on_per_stage[-1]:
        raise InputError(
            "Res5ROIHeads have no stage of basic blocks or deformable convolutions "
            "(MODEL.RESNETS.DEPTH, DEFORM_ON_PER_STAGE)"
        )
    check_numbers("MODEL.ROI_BOX_HEAD", model.roi_box_head)
    wanted = stage_channels(resnets, "res4")
    if channels != wanted:
        raise InputError(
            f"MODEL.ROI_HEADS.IN_FEATURES have {channels} channels, and the res5 of Res5ROIHeads "
            f"takes {wanted}, as res4 has them"
        )
    # Detectron2 makes this stage of three blocks, whatever the depth, and never dilates it.
    with _naming("MODEL.RESNETS.NORM"):
        res5 = make_stage(replace(resnets, depth=50, res5_dilation=1), "res5", channels, stride=2)
    out_channels = stage_channels(resnets, "res5")
    return Res5ROIHeads(
        places,
        _pooler("MODEL.ROI_BOX_HEAD", model.roi_box_head, [backbone.strides[places[0]]]),
        res5,
        _predictor(config, out_channels, model.roi_box_head.bbox_reg_weights),
        _selection(config),
        _mask_head(config, out_channels) if model.mask_on else None,
    )


ROI_HEADS: Dict[str, Callable[[Configuration, Backbone], nn.Module]] = {
    "StandardROIHeads": _standard_heads,
    "CascadeROIHeads": _cascade_heads,
    "Res5ROIHeads": _res5_heads,
}


# Detectors -------------------------------------------------------------------------------------


def _retinanet(config: Configuration, postprocess: bool) -> RetinaNet:
    model = config.model
    backbone = _backbone(config)
    key = "MODEL.RETINANET.IN_FEATURES"
    places = _places(key, backbone, model.retinanet.in_features)
    _channels(key, backbone, places)
    check_numbers("MODEL.RETINANET", model.retinanet)
    _check_norm("MODEL.RETINANET.NORM", model.retinanet.norm)
    anchors = _anchors(config, [backbone.strides[n] for n in places])
    with _naming("MODEL.RETINANET.NORM"):
        return RetinaNet(
            backbone,
            places,
            anchors,
            model.retinanet,
            model.pixel_mean,
            model.pixel_std,
            config.test.detections_per_image,
            postprocess,
        )


def _generalized_rcnn(config: Configuration, postprocess: bool) -> GeneralizedRCNN:
    return GeneralizedRCNN(**_parts_of_rcnn(config), postprocess=postprocess)


def _parts_of_rcnn(config: Configuration) -> Dict[str, Any]:
    model = config.model
    if model.load_proposals:
        raise InputError(
            "MODEL.LOAD_PROPOSALS: Fast R-CNN takes proposals that were computed before, of which "
            "there are none for an image of one's own"
        )
    one_of("MODEL.ROI_HEADS.NAME", model.roi_heads.name, ROI_HEADS)
    check_numbers("MODEL.ROI_HEADS", model.roi_heads)
    backbone = _backbone(config)
    return {
        "backbone": backbone,
        "proposal_generator": _rpn(config, backbone),
        "roi_heads": ROI_HEADS[model.roi_heads.name](config, backbone),
        "pixel_mean": model.pixel_mean,
        "pixel_std": model.pixel_std,
    }


def _proposal_network(config: Configuration, postprocess: bool) -> ProposalNetwork:
    backbone, model = _backbone(config), config.model
    return ProposalNetwork(backbone, _rpn(config, backbone), model.pixel_mean, model.pixel_std)


def _semantic_segmentor(config: Configuration, postprocess: bool) -> SemanticSegmentor:
    backbone, model = _backbone(config), config.model
    head = _sem_seg_head(model.sem_seg_head, backbone)
    return SemanticSegmentor(backbone, head, model.pixel_mean, model.pixel_std)


def _panoptic_fpn(config: Configuration, postprocess: bool) -> PanopticFPN:
    parts = _parts_of_rcnn(config)
    head = _sem_seg_head(config.model.sem_seg_head, parts["backbone"])
    return PanopticFPN(head, **parts, postprocess=postprocess)


def _sem_seg_head(settings: SemSegHead, backbone: Backbone) -> SemSegFPNHead:
    one_of("MODEL.SEM_SEG_HEAD.NAME", settings.name, ("SemSegFPNHead",))
    check_numbers("MODEL.SEM_SEG_HEAD", settings)
    _check_norm("MODEL.SEM_SEG_HEAD.NORM", settings.norm)
    key = "MODEL.SEM_SEG_HEAD.IN_FEATURES"
    places = sorted(set(_places(key, backbone, settings.in_features)))
    strides = [backbone.strides[n] for n in places]
    # Doubled from another number of cells, feature maps would not meet.
    if len(places) > 1 and (
        not backbone.size_divisibility or strides[-1] > backbone.size_divisibility
    ):
        raise InputError(
            f"{key} go up to a stride of {strides[-1]}, and images are padded to multiples of "
            f"{backbone.size_divisibility or 1} only"
        )
    finest = [2**n for n in range(strides[0].bit_length())]
    one_of("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", settings.common_stride, finest)
    names = [backbone.names[n] for n in places]
    channels = [backbone.channels[n] for n in places]
    with _naming("MODEL.SEM_SEG_HEAD.NORM"):
        return SemSegFPNHead(names, places, channels, strides, settings)


ARCHITECTURES: Dict[str, Callable[[Configuration, bool], nn.Module]] = {
    "RetinaNet": _retinanet,
    "GeneralizedRCNN": _generalized_rcnn,
    "PanopticFPN": _panoptic_fpn,
    "ProposalNetwork": _proposal_network,
    "SemanticSegmentor": _semantic_segmentor,
}
# Architectures that have no classes of objects -> what the flat tuple has.
NO_DETECTIONS = {
    "ProposalNetwork": ("objectness_logits", "proposal_boxes", "image_size"),
    "SemanticSegmentor": ("sem_seg",),
}
