"""Why a checkpoint does not fit a detector: the likely reasons, from names and shapes alone.

`explain` looks at the tensors of both. A rule compares one thing, and tells what it has found with
the key of a configuration that would set it as the checkpoint has it.
"""

import re
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from torch import Tensor

from detectors.backbone import NUM_BLOCKS, STAGES

State = Dict[str, Tensor]
# More reasons than these do not make a sentence that anyone reads.
MOST = 4
HINT = "a model of your own needs the --config-file that it was trained with"


class Finding(NamedTuple):
    """What differs, and what the configuration of the checkpoint may have."""

    what: str
    setting: str


Rule = Callable[[State, State], Iterator[Finding]]


# Checkpoints of other programs ------------------------------------------------------------------

_TORCHVISION = (
    "its layers have other names (backbone.body.*) and its class 0 is the background, so that no "
    "Detectron2 detector can take it"
)
_CAFFE2 = "only Detectron2's own loader translates its names (res2_0_branch2a_w)"
_NO_HEADS = "is what training starts from, without a detector's heads, and --weights takes its end"
_CAFFE2_KEY = r"res\w*_branch2a_w$"

# What it is; patterns of which each has to begin some key; why it is refused. The first one holds.
FOREIGN: Tuple[Tuple[str, Tuple[str, ...], str], ...] = (
    (
        "a Mask R-CNN of torchvision",
        (r"backbone\.body\.", r"roi_heads\.mask_predictor\."),
        _TORCHVISION,
    ),
    (
        "a Keypoint R-CNN of torchvision",
        (r"backbone\.body\.", r"roi_heads\.keypoint_predictor\."),
        _TORCHVISION,
    ),
    ("a Faster R-CNN of torchvision", (r"backbone\.body\.", r"rpn\.head\."), _TORCHVISION),
    (
        "a RetinaNet of torchvision",
        (r"backbone\.body\.", r"head\.classification_head\.cls_logits", r"head\.regression_head\."),
        _TORCHVISION,
    ),
    (
        "a detector of Detectron in Caffe2",
        (_CAFFE2_KEY, r"cls_score_w$|retnet_|conv_rpn"),
        _CAFFE2,
    ),
    ("a backbone of Caffe2, such as MSRA's ResNets", (_CAFFE2_KEY,), f"it {_NO_HEADS}"),
    ("a backbone alone", (r"stem\.conv1\.weight$", r"res2\.0\."), f"it {_NO_HEADS}"),
    ("a ResNet of torchvision", (r"layer1\.0\.conv1\.weight$", r"fc\."), f"it {_NO_HEADS}"),
    (
        "a detector of MMDetection",
        (r"backbone\.layer1\.0\.", r"neck\.|rpn_head\.|bbox_head\.|roi_head\."),
        "its layers have other names (backbone.layer1.*) than those of Detectron2",
    ),
)


def foreign(state: State) -> Optional[str]:
    """What the checkpoint of another program is, and why it cannot be loaded; None for others."""
    for name, patterns, reason in FOREIGN:
        if all(any(re.match(pattern, key) for key in state) for pattern in patterns):
            return f"is {name}: {reason}"
    return None


# What rules look at -----------------------------------------------------------------------------


def _length(state: State, pattern: str, axis: int = 0) -> Optional[int]:
    """The length of the first tensor with such a name."""
    for key, value in state.items():
        if re.match(pattern, key) and value.dim() > axis:
            return int(value.shape[axis])
    return None


def _has(state: State, pattern: str) -> bool:
    return any(re.match(pattern, key) for key in state)


def _numbered(state: State, pattern: str) -> int:
    """How many layers have such a name, by the number in it. Norms, of one axis, are no layers."""
    numbers: Set[Optional[str]] = set()
    for key, value in state.items():
        found = re.match(pattern, key)
        if found and value.dim() > 1:
            numbers.add(found.group(1))
    return len(numbers)


# Rules ------------------------------------------------------------------------------------------

_RCNN = r"roi_heads\."
# Kinds of detectors, and a pattern that tells them; the first one holds.
ARCHITECTURES = (
    ("PanopticFPN", r"sem_seg_head\."),
    ("GeneralizedRCNN", _RCNN),
    ("RetinaNet", r"head\.(cls_score|bbox_pred)\."),
)
BACKBONES = (
    ("build_resnet_fpn_backbone", "a feature pyramid", r"backbone\.bottom_up\.res2\."),
    ("build_resnet_backbone", "no feature pyramid", r"backbone\.res2\."),
)
HEADS = (
    ("Res5ROIHeads", "the res5 of each region", r"roi_heads\.res5\."),
    ("CascadeROIHeads", "a cascade of heads", r"roi_heads\.box_predictor\.\d"),
    ("StandardROIHeads", "one head for boxes", r"roi_heads\.box_predictor\."),
)


def _architecture(own: State, state: State) -> Iterator[Finding]:
    kinds = [
        next((name for name, pattern in ARCHITECTURES if _has(each, pattern)), None)
        for each in (state, own)
    ]
    if None not in kinds and kinds[0] != kinds[1]:
        yield Finding(
            f"it is a {kinds[0]}, not a {kinds[1]}", f"MODEL.META_ARCHITECTURE {kinds[0]}"
        )


def _named(key: str, table: Tuple[Tuple[str, str, str], ...]) -> Rule:
    """A rule for a key that names what is built."""

    def rule(own: State, state: State) -> Iterator[Finding]:
        found, wanted = (
            next((row for row in table if _has(each, row[2])), None) for each in (state, own)
        )
        if found and wanted and found != wanted:
            yield Finding(f"it has {found[1]}", f"{key} {found[0]}")

    return rule


def _blocks(state: State) -> Dict[str, int]:
    """Stage of the backbone -> its number of blocks, for the stages that are there."""
    counts = {
        stage: _numbered(state, rf"backbone\.(?:bottom_up\.)?{stage}\.(\d+)\.conv1\.weight")
        for stage in STAGES
    }
    return {stage: count for stage, count in counts.items() if count}


def _layers_of_blocks(state: State) -> int:
    return _numbered(state, r"backbone\.(?:bottom_up\.)?res2\.0\.conv(\d)\.weight")


def _depth(own: State, state: State) -> Iterator[Finding]:
    found, wanted = _blocks(state), _blocks(own)
    layers, wanted_layers = _layers_of_blocks(state), _layers_of_blocks(own)
    depths = [
        str(depth)
        for depth, counts in NUM_BLOCKS.items()
        if all(counts[STAGES.index(stage)] == count for stage, count in found.items())
        and (depth < 50) == (layers < 3)
    ]
    setting = f"MODEL.RESNETS.DEPTH {' or '.join(depths) or 'another'}"
    # The deepest stage tells most: that of 101 layers has 23 blocks.
    differing = [
        stage
        for stage in ("res4", *STAGES)
        if stage in found and stage in wanted and found[stage] != wanted[stage]
    ]
    if differing:
        stage = differing[0]
        what = f"{stage} has {found[stage]} blocks in the checkpoint, not {wanted[stage]}"
        yield Finding(what, setting)
    elif layers and wanted_layers and layers != wanted_layers:
        yield Finding(f"its blocks have {layers} convolutions, not {wanted_layers}", setting)


def _widths(own: State, state: State) -> Iterator[Finding]:
    pattern = r"backbone\.(bottom_up\.)?res2\.0\.conv2\.weight$"
    sizes = [(_length(each, pattern), _length(each, pattern, 1)) for each in (state, own)]
    (channels, width), _ = sizes
    if _layers_of_blocks(own) == _layers_of_blocks(state) and sizes[0] != sizes[1]:
        if not channels or not width:
            return
        yield Finding(
            f"its res2 has {channels // width} groups of {width} channels",
            f"MODEL.RESNETS.NUM_GROUPS {channels // width} (WIDTH_PER_GROUP {width})",
        )


# Parts that a detector may have: what it has to be a detector with, a pattern of their keys, what
# they are called, and the key that is True with them.
PARTS = (
    (_RCNN, r"roi_heads\.mask_head\.", "mask_head", "MODEL.MASK_ON"),
    (_RCNN, r"roi_heads\.keypoint_head\.", "keypoint_head", "MODEL.KEYPOINT_ON"),
    (
        r"backbone\.",
        r"backbone\..*\.conv2_offset\.",
        "conv2_offset of deformable convolutions",
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
    ),
)


def _parts(own: State, state: State) -> Iterator[Finding]:
    for whole, pattern, name, key in PARTS:
        present = _has(state, pattern)
        if present != _has(own, pattern) and _has(own, whole) and _has(state, whole):
            yield Finding(f"it has {'a' if present else 'no'} {name}", f"{key} {present}")


_SCORES = r"roi_heads\.box_predictor\.(0\.)?cls_score\.bias$"
_BOXES = r"roi_heads\.box_predictor\.(0\.)?bbox_pred\.bias$"
_MASKS = r"roi_heads\.mask_head\.predictor\.bias$"


def _region_classes(state: State) -> Optional[int]:
    scores = _length(state, _SCORES)
    return scores - 1 if scores else None  # One is for what is no object.


def _anchors_of_retinanet(state: State) -> Optional[int]:
    return (_length(state, r"head\.bbox_pred\.bias$") or 0) // 4 or None


def _retinanet_classes(state: State) -> Optional[int]:
    scores, anchors = _length(state, r"head\.cls_score\.bias$"), _anchors_of_retinanet(state)
    # It has a score for each anchor.
    return scores // anchors if scores and anchors and scores % anchors == 0 else None


def _classes(own: State, state: State) -> Iterator[Finding]:
    for count, key in (
        (_region_classes, "MODEL.ROI_HEADS.NUM_CLASSES"),
        (_retinanet_classes, "MODEL.RETINANET.NUM_CLASSES"),
    ):
        found, wanted = count(state), count(own)
        if found and wanted and found != wanted:
            yield Finding(f"it is of {found} classes, not of {wanted}", f"{key} {found}")


def _is_agnostic(state: State, pattern: str, each: int) -> Optional[bool]:
    """Whether a layer is the same for all classes; None where it cannot be told."""
    classes, rows = _region_classes(state), _length(state, pattern)
    if not classes or classes == 1 or rows not in (each, each * classes):
        return None
    return rows == each


def _agnostic(own: State, state: State) -> Iterator[Finding]:
    for pattern, each, name, key in (
        (_BOXES, 4, "boxes", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
        (_MASKS, 1, "masks", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK"),
    ):
        found, wanted = (_is_agnostic(x, pattern, each) for x in (state, own))
        if None not in (found, wanted) and found != wanted:
            whose = "the same for all classes" if found else "of each class"
            yield Finding(f"its {name} are {whose}", f"{key} {found}")


def _anchors(own: State, state: State) -> Iterator[Finding]:
    for name, count in (
        ("rpn_head", lambda x: _length(x, r"proposal_generator\.rpn_head\.objectness_logits\.b")),
        ("head", _anchors_of_retinanet),
    ):
        found, wanted = count(state), count(own)
        if found and wanted and found != wanted:
            anchors = f"{found} anchor{'s' if found > 1 else ''}"
            yield Finding(
                f"its {name} has {anchors} in each place, not {wanted}",
                f"MODEL.ANCHOR_GENERATOR of {anchors} (SIZES times ASPECT_RATIOS)",
            )


# Places of norm layers: a pattern of the place, one of the norms in it, their name and key.
NORMS = (
    (
        r"backbone\.(bottom_up\.)?(stem|res\d)\.",
        r"backbone\.(bottom_up\.)?(stem|res\d)\..*\bnorm\.",
        "backbone",
        "MODEL.RESNETS.NORM",
    ),
    (r"backbone\.fpn_", r"backbone\.fpn_.*\.norm\.", "feature pyramid", "MODEL.FPN.NORM"),
    (
        r"roi_heads\.box_head\..*conv",
        r"roi_heads\.box_head\..*\.norm\.",
        "box_head",
        "MODEL.ROI_BOX_HEAD.NORM",
    ),
    (
        r"roi_heads\.mask_head\.mask_fcn",
        r"roi_heads\.mask_head\..*\.norm\.",
        "mask_head",
        "MODEL.ROI_MASK_HEAD.NORM",
    ),
    # A norm comes between a convolution and its ReLU.
    (r"head\.cls_subnet\.", r"head\.cls_subnet\.1\.", "head", "MODEL.RETINANET.NORM"),
    (r"sem_seg_head\.", r"sem_seg_head\..*\.norm\.", "sem_seg_head", "MODEL.SEM_SEG_HEAD.NORM"),
)
_NO_NORMS = ("no norm layers", "empty")
_BATCH_NORMS = ("batch norms", "BN, SyncBN or FrozenBN")
_GROUP_NORMS = ("norm layers without statistics", "GN")


def _norm(state: State, place: str, norms: str) -> Optional[Tuple[str, str]]:
    """The norm layers of a place; None where there is no such place."""
    if not _has(state, place):
        return None
    if not _has(state, norms):
        return _NO_NORMS
    return _BATCH_NORMS if _has(state, norms + r".*\brunning_var$") else _GROUP_NORMS


def _norms(own: State, state: State) -> Iterator[Finding]:
    for place, norms, name, key in NORMS:
        found, wanted = _norm(state, place, norms), _norm(own, place, norms)
        if found and wanted and found != wanted:
            rather = "" if _NO_NORMS in (found, wanted) else f", not {wanted[0]}"
            yield Finding(f"its {name} has {found[0]}{rather}", f"{key} {found[1]}")


# Repeated layers: a pattern of the part they are in, one with their number, their name and key.
REPEATED = (
    (
        r"proposal_generator\.rpn_head\.",
        r"proposal_generator\.rpn_head\.conv\.(?:conv(\d+)\.)?weight$",
        "hidden convolutions in its rpn_head",
        "MODEL.RPN.CONV_DIMS a list of",
    ),
    (
        r"roi_heads\.box_predictor\.\d",
        r"roi_heads\.box_predictor\.(\d+)\.cls_score\.weight$",
        "stages in its cascade",
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS a list of",
    ),
    (
        r"roi_heads\.box_head\.",
        r"roi_heads\.box_head\.(?:\d+\.)?fc(\d+)\.weight$",
        "linear layers in its box_head",
        "MODEL.ROI_BOX_HEAD.NUM_FC",
    ),
    (
        r"roi_heads\.box_head\.",
        r"roi_heads\.box_head\.(?:\d+\.)?conv(\d+)\.weight$",
        "convolutions in its box_head",
        "MODEL.ROI_BOX_HEAD.NUM_CONV",
    ),
    (
        r"roi_heads\.mask_head\.",
        r"roi_heads\.mask_head\.mask_fcn(\d+)\.weight$",
        "convolutions in its mask_head",
        "MODEL.ROI_MASK_HEAD.NUM_CONV",
    ),
    (
        r"roi_heads\.keypoint_head\.",
        r"roi_heads\.keypoint_head\.conv_fcn(\d+)\.weight$",
        "convolutions in its keypoint_head",
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS a list of",
    ),
    (
        r"head\.cls_subnet\.",
        r"head\.cls_subnet\.(\d+)\.weight$",
        "convolutions in its head",
        "MODEL.RETINANET.NUM_CONVS",
    ),
)


def _repeated(own: State, state: State) -> Iterator[Finding]:
    for part, pattern, name, key in REPEATED:
        found, wanted = _numbered(state, pattern), _numbered(own, pattern)
        if found != wanted and _has(state, part) and _has(own, part):
            yield Finding(f"the {name} are {found}, not {wanted}", f"{key} {found}")


# Lengths of tensors: a pattern of the name, the axis, what is counted, and the key that sets it.
LENGTHS = (
    (
        r"backbone\.(bottom_up\.)?stem\.conv1\.weight$",
        0,
        "channels in its stem",
        "MODEL.RESNETS.STEM_OUT_CHANNELS",
    ),
    (
        r"backbone\.(bottom_up\.)?res2\.0\.conv3\.weight$",
        0,
        "channels in its res2",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
    ),
    (
        r"backbone\.fpn_output\d\.weight$",
        0,
        "channels in its feature pyramid",
        "MODEL.FPN.OUT_CHANNELS",
    ),
    (
        r"roi_heads\.box_head\.(0\.)?fc1\.weight$",
        0,
        "features in its box_head",
        "MODEL.ROI_BOX_HEAD.FC_DIM",
    ),
    (
        r"roi_heads\.mask_head\.deconv\.weight$",
        1,
        "channels in its mask_head",
        "MODEL.ROI_MASK_HEAD.CONV_DIM",
    ),
    (
        r"roi_heads\.keypoint_head\.score_lowres\.weight$",
        1,
        "keypoints of its keypoint_head",
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    ),
)


def _lengths(own: State, state: State) -> Iterator[Finding]:
    for pattern, axis, name, key in LENGTHS:
        found, wanted = _length(state, pattern, axis), _length(own, pattern, axis)
        if found and wanted and found != wanted:
            yield Finding(f"the {name} are {found}, not {wanted}", f"{key} {found}")


# In the order in which they are told. What is of another kind has no parts to compare.
RULES: Tuple[Rule, ...] = (
    _named("MODEL.BACKBONE.NAME", BACKBONES),
    _depth,
    _widths,
    _named("MODEL.ROI_HEADS.NAME", HEADS),
    _classes,
    _parts,
    _agnostic,
    _anchors,
    _norms,
    _repeated,
    _lengths,
)


def _findings(own: State, state: State) -> List[Finding]:
    kinds = list(_architecture(own, state))
    return kinds or [finding for rule in RULES for finding in rule(own, state)]


# The layers whose size depends on the number of classes.
_BY_CLASS = re.compile(r"(cls_score|bbox_pred|mask_head\.predictor)\.(weight|bias)$")


def _only_classes(own: State, state: State) -> bool:
    """Whether all that differs is as long as there are classes."""
    if own.keys() != state.keys():
        return False
    reshaped = [key for key in own if own[key].shape != state[key].shape]
    return all(
        _BY_CLASS.search(key) and own[key].shape[1:] == state[key].shape[1:] for key in reshaped
    )


def explain(own: State, state: State, differences: str, has_keys: bool = True) -> str:
    """What a checkpoint that does not fit is, and which keys would make it fit.

    Args:
        own: of the detector.
        state: of the checkpoint.
        differences: the same in numbers of keys.
        has_keys: whether the detector is made of a configuration with such keys.

    Returns:
        What comes after the name of the checkpoint in a sentence.
    """
    other = foreign(state)
    if other is not None:
        return other
    findings = _findings(own, state)[:MOST]
    if not findings:
        hint = f"; {HINT}" if has_keys else ""
        return f"belongs to another architecture ({differences}){hint}"
    *first, last = (finding.setting for finding in findings)
    settings = f"{', '.join(first)} and {last}" if first else last
    if len(findings) == 1 and list(_classes(own, state)) and _only_classes(own, state):
        told = findings[0].what.replace("it is", "is", 1)
    else:
        told = "; ".join(finding.what for finding in findings)
        told = f"belongs to another architecture: {told} ({differences})"
    return f"{told}: is {settings}? ({HINT})" if has_keys else told
