"""What leaves each part of a bundled detector, taken from an engine beside the detections.

A detector is a chain of parts: backbone, FPN, heads, decoding, non-maximum suppression. Each is a
function of the images and of what parts before it gave. The same chain makes the module that an
engine compiles, with what leaves each part as outputs, and computes with eager fp32 what one part
alone should have made of what the engine gave it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectors import boxes as box_ops
from detectors.backbone import FPN
from detectors.export import Export, Outcome, ScriptableBoxDetector, TraceableDetector
from detectors.images import batch_images, image_size
from detectors.instances import Instances, Panorama, Proposals, Segmentation, flatten
from detectors.keypoints import keypoints
from detectors.rcnn import ProposalNetwork, postprocess
from detectors.retinanet import RetinaNet
from detectors.roi_heads import (
    CascadeROIHeads,
    Res5ROIHeads,
    candidates_of_images,
    split_like,
    suppressed,
)
from detectors.semantic import PanopticFPN, SemanticSegmentor
from results.record import PartKind

# The images of a call, and what leaves each part, by its name.
State = Dict[str, List[Tensor]]
IMAGES = "images"


@dataclass(frozen=True)
class Part:
    """A part of a detector.

    Attributes:
        name: what messages call it.
        kind: of what kind it is.
        compute: what leaves it, from the detector and what came before.
        listed: how many tensors a list has that it gives for each image: boxes, scores, and perhaps
            classes; 0 where it gives no lists. They come first.
        are_logits: whether the scores are logits.
        of_regions: whether its rows are of boxes that a part before it gave, so that those of two
            detectors are in no common order.
    """

    name: str
    kind: PartKind
    compute: Callable[[nn.Module, State], List[Tensor]]
    listed: int = 0
    are_logits: bool = False
    of_regions: bool = False


def parts_of(detector: nn.Module) -> List[Part]:
    """The parts of a detector, in an order in which they can be computed."""
    parts = [Part("backbone", "backbone", _backbone)]
    if isinstance(detector.backbone, FPN):
        parts.append(Part("FPN", "FPN", _pyramid))
    if isinstance(detector, RetinaNet):
        return [
            *parts,
            Part("head", "heads", _retinanet_head),
            Part("decoding", "decoding", _retinanet_decoding, listed=3),
            Part("NMS", "NMS", _retinanet_nms, listed=3),
        ]
    if isinstance(detector, (SemanticSegmentor, PanopticFPN)):
        parts.append(Part("semantic head", "heads", _semantic_head))
    if isinstance(detector, SemanticSegmentor):
        return parts
    parts += [
        Part("RPN head", "heads", _rpn_head),
        Part("RPN decoding", "decoding", _rpn_decoding, listed=3, are_logits=True),
        Part("RPN NMS", "NMS", _rpn_nms, listed=2, are_logits=True),
    ]
    if isinstance(detector, ProposalNetwork):
        return parts
    heads = detector.roi_heads
    if isinstance(heads, CascadeROIHeads):
        for stage in range(len(heads.box_head)):
            parts += _cascade_stage(stage)
        parts.append(Part("decoding", "decoding", _cascade_decoding, listed=3))
    else:
        parts.append(Part("box head", "heads", _box_head, of_regions=True))
        parts.append(Part("decoding", "decoding", _box_decoding, listed=3))
    parts.append(Part("NMS", "NMS", _box_nms, listed=3))
    if heads.mask_head is not None:
        parts.append(Part("mask head", "heads", _mask_head, of_regions=True))
    if getattr(heads, "keypoint_head", None) is not None:
        parts.append(Part("keypoint head", "heads", _keypoint_head, of_regions=True))
        parts.append(Part("keypoint decoding", "decoding", _keypoint_decoding, of_regions=True))
    if detector.postprocess:
        parts.append(Part("postprocessing", "postprocessing", _postprocessing, listed=3))
    return parts


class TappedDetector(nn.Module):
    """A detector with the flat signature of an export that gives what leaves each part.

    Args:
        detector: a bundled one.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.parts = parts_of(detector)

    def forward(self, *images: Tensor) -> Tuple[Tensor, ...]:
        state: State = {IMAGES: list(images)}
        flat: List[Tensor] = []
        for part in self.parts:
            state[part.name] = part.compute(self.detector, state)
            flat += state[part.name]
        return tuple(flat)


class TappedExport(Export):
    """The export of a bundled detector, which gives what leaves each part.

    It is traced, also where the model is scripted: TorchScript knows no tuple of any length.

    Args:
        export: of the detector alone.

    Attributes:
        parts: of the detector.
        counts: tensors that leave each part.
    """

    def __init__(self, export: Export) -> None:
        detector = export.eager.detector
        outcome = Outcome(export.fields, export.score_threshold, export.limit)
        eager = TappedDetector(detector).eval()
        super().__init__(export.model, outcome, eager, export.tuning_inputs)
        self.kind = "traced"
        self.calibration, self.other_inputs = export.calibration, export.other_inputs
        self.parts = eager.parts
        # Of `min`, which is the quickest: how many there are depends on the detector alone.
        state = computed(self.parts, detector, export.tuning_inputs["min"])
        self.counts = [len(state[part.name]) for part in self.parts]

    @property
    def outputs(self) -> int:
        return sum(self.counts)

    def state(self, outputs: Sequence[Tensor], images: Sequence[Tensor]) -> State:
        """What left each part, on the CPU, numbers as float32, from what a call gave.

        Raises:
            ValueError: there are more or fewer tensors than asked for.
        """
        if len(outputs) != self.outputs:
            raise ValueError(f"{len(outputs)} tensors where {self.outputs} were asked for")
        plain = [x.detach().cpu() for x in outputs]
        plain = [x.float() if x.is_floating_point() else x for x in plain]
        state: State = {IMAGES: [x.detach().cpu().float() for x in images]}
        start = 0
        for part, count in zip(self.parts, self.counts):
            state[part.name] = plain[start : start + count]
            start += count
        return state


def can_be_tapped(export: Export) -> bool:
    """Whether it is an export of a bundled detector."""
    return isinstance(export.eager, (TraceableDetector, ScriptableBoxDetector))


def computed(parts: Sequence[Part], detector: nn.Module, images: Sequence[Tensor]) -> State:
    """What eager fp32 gives, part by part; on the CPU, whatever autocast is on."""
    state: State = {IMAGES: list(images)}
    for part in parts:
        state[part.name] = computed_part(part, detector, state)
    return state


def computed_part(part: Part, detector: nn.Module, state: State) -> List[Tensor]:
    """What eager fp32 makes of what came before a part; arguments as for `computed`."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return part.compute(detector, state)


def detections(detector: nn.Module, state: State) -> List[Tensor]:
    """The flat tuple that the export of the detector alone would have given."""
    sizes = _sizes(state)
    if isinstance(detector, SemanticSegmentor):
        found = [Segmentation(x) for x in state["semantic head"]]
    elif isinstance(detector, ProposalNetwork):
        found = [Proposals(size, *x) for size, x in zip(sizes, _lists(state["RPN NMS"], 2))]
    else:
        found = _instances(state, sizes)
        if "postprocessing" in state:
            found = _postprocessed(state, found)
        if isinstance(detector, PanopticFPN):
            found = [Panorama(*both) for both in zip(found, state["semantic head"])]
    return [tensor for each in found for tensor in flatten(each)]


# What leaves each part -------------------------------------------------------------------------


def _sizes(state: State) -> List[Tensor]:
    return [image_size(image) for image in state[IMAGES]]


def _lists(tensors: Sequence[Tensor], listed: int) -> List[List[Tensor]]:
    """For each image, the tensors of its list."""
    return [list(tensors[n : n + listed]) for n in range(0, len(tensors), listed)]


def _flat(lists: Sequence[Sequence[Tensor]]) -> List[Tensor]:
    return [tensor for each in lists for tensor in each]


def _boxes(state: State, name: str, listed: int) -> List[Tensor]:
    return [each[0] for each in _lists(state[name], listed)]


def _backbone(detector: nn.Module, state: State) -> List[Tensor]:
    mean, std = detector.pixel_mean, detector.pixel_std
    batch = batch_images(state[IMAGES], mean, std, detector.size_divisibility)
    backbone = detector.backbone
    features: List[Tensor] = (backbone.bottom_up if isinstance(backbone, FPN) else backbone)(batch)
    return features


def _pyramid(detector: nn.Module, state: State) -> List[Tensor]:
    levels: List[Tensor] = detector.backbone.pyramid(state["backbone"])
    return levels


def _features(state: State, places: Sequence[int]) -> List[Tensor]:
    features = state.get("FPN", state["backbone"])
    return [features[n] for n in places]


def _half(tensors: Sequence[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
    """Logits and deltas of all levels."""
    middle = len(tensors) // 2
    return list(tensors[:middle]), list(tensors[middle:])


def _retinanet_head(detector: nn.Module, state: State) -> List[Tensor]:
    logits, deltas = detector.head(_features(state, detector.in_features))
    return [*logits, *deltas]


def _retinanet_decoding(detector: nn.Module, state: State) -> List[Tensor]:
    logits, deltas = _half(state["head"])
    features = _features(state, detector.in_features)
    logits = [x.clone() for x in logits]  # They become probabilities, where they are.
    return _flat(detector.candidates(features, logits, deltas, len(state[IMAGES])))


def _retinanet_nms(detector: nn.Module, state: State) -> List[Tensor]:
    lists = zip(_lists(state["decoding"], 3), _sizes(state))
    return _as_lists([detector.suppressed(*own, size) for own, size in lists])


def _as_lists(found: Sequence[Instances]) -> List[Tensor]:
    return _flat([[x.pred_boxes, x.scores, x.pred_classes] for x in found])


def _semantic_head(detector: nn.Module, state: State) -> List[Tensor]:
    features = state.get("FPN", state["backbone"])
    logits: List[Tensor] = detector.sem_seg_head(features, state[IMAGES])
    return logits


def _rpn_head(detector: nn.Module, state: State) -> List[Tensor]:
    rpn = detector.proposal_generator
    logits, deltas = rpn.rpn_head(_features(state, rpn.in_features))
    return [*logits, *deltas]


def _rpn_decoding(detector: nn.Module, state: State) -> List[Tensor]:
    rpn = detector.proposal_generator
    features = _features(state, rpn.in_features)
    return _flat(rpn.candidates(features, *_half(state["RPN head"]), _sizes(state)))


def _rpn_nms(detector: nn.Module, state: State) -> List[Tensor]:
    rpn = detector.proposal_generator
    return _flat([rpn.suppressed(*own) for own in _lists(state["RPN decoding"], 3)])


def _pooled(detector: nn.Module, state: State, pooler: nn.Module, boxes: List[Tensor]) -> Tensor:
    pooled: Tensor = pooler(_features(state, detector.roi_heads.in_features), boxes)
    return pooled


def _box_head(detector: nn.Module, state: State) -> List[Tensor]:
    heads, proposals = detector.roi_heads, _boxes(state, "RPN NMS", 2)
    if isinstance(heads, Res5ROIHeads):
        hidden = heads.res5(_pooled(detector, state, heads.pooler, proposals)).mean(dim=[2, 3])
    else:
        hidden = heads.box_head(_pooled(detector, state, heads.box_pooler, proposals))
    return list(heads.box_predictor.predictions(hidden))


def _box_decoding(detector: nn.Module, state: State) -> List[Tensor]:
    heads, proposals = detector.roi_heads, _boxes(state, "RPN NMS", 2)
    predictor = heads.box_predictor
    scores, boxes = predictor.decoded(*state["box head"], torch.cat(proposals))
    rules = predictor.class_agnostic, heads.selection
    return _flat(candidates_of_images(boxes, scores, proposals, _sizes(state), *rules))


def _box_nms(detector: nn.Module, state: State) -> List[Tensor]:
    selection = detector.roi_heads.selection
    lists = zip(_lists(state["decoding"], 3), _sizes(state))
    return _as_lists([suppressed(*own, size, selection) for own, size in lists])


def _cascade_stage(stage: int) -> List[Part]:
    """A head of a cascade, and the boxes that the next one refines, with their scores.

    As `detectors.roi_heads.CascadeROIHeads.boxes` has them.
    """
    name, before = f"box head {stage + 1}", f"box decoding {stage}"

    def regions(state: State) -> List[Tensor]:
        return _boxes(state, "RPN NMS", 2) if stage == 0 else state[before][: len(state[IMAGES])]

    def head(detector: nn.Module, state: State) -> List[Tensor]:
        heads = detector.roi_heads
        finite = [torch.where(torch.isfinite(x), x, torch.zeros_like(x)) for x in regions(state)]
        hidden = heads.box_head[stage](_pooled(detector, state, heads.box_pooler, finite))
        return list(heads.box_predictor[stage].predictions(hidden))

    def decoding(detector: nn.Module, state: State) -> List[Tensor]:
        own, predictor = regions(state), detector.roi_heads.box_predictor[stage]
        scores, boxes = predictor.decoded(*state[name], torch.cat(own))
        moved = split_like(boxes, own)
        if stage + 1 < len(detector.roi_heads.box_head):  # The last are clipped when listed.
            moved = [box_ops.clip(x, size) for x, size in zip(moved, _sizes(state))]
        return [*moved, scores]

    return [
        Part(name, "heads", head, of_regions=True),
        Part(f"box decoding {stage + 1}", "decoding", decoding, of_regions=True),
    ]


def _cascade_decoding(detector: nn.Module, state: State) -> List[Tensor]:
    heads, images = detector.roi_heads, len(state[IMAGES])
    stages = [state[f"box decoding {n + 1}"] for n in range(len(heads.box_head))]
    total = stages[0][images]
    for each in stages[1:]:
        total = total + each[images]
    scores, boxes = total * (1.0 / len(stages)), stages[-1][:images]
    rules = True, heads.selection
    return _flat(candidates_of_images(torch.cat(boxes), scores, list(boxes), _sizes(state), *rules))


def _mask_head(detector: nn.Module, state: State) -> List[Tensor]:
    heads, found = detector.roi_heads, _lists(state["NMS"], 3)
    boxes, classes = [each[0] for each in found], torch.cat([each[2] for each in found])
    if isinstance(heads, Res5ROIHeads):
        pooled = heads.res5(_pooled(detector, state, heads.pooler, boxes))
    else:
        pooled = _pooled(detector, state, heads.mask_pooler, boxes)
    return split_like(heads.mask_head.probabilities(pooled, classes), boxes)


def _keypoint_head(detector: nn.Module, state: State) -> List[Tensor]:
    heads, boxes = detector.roi_heads, _boxes(state, "NMS", 3)
    pooled = _pooled(detector, state, heads.keypoint_pooler, boxes)
    return split_like(heads.keypoint_head(pooled), boxes)


def _keypoint_decoding(detector: nn.Module, state: State) -> List[Tensor]:
    both = zip(state["keypoint head"], _boxes(state, "NMS", 3))
    return [keypoints(heatmaps, boxes) for heatmaps, boxes in both]


def _instances(state: State, sizes: Sequence[Tensor]) -> List[Instances]:
    """What is found, before it is postprocessed."""
    found = []
    for n, (size, own) in enumerate(zip(sizes, _lists(state["NMS"], 3))):
        rest = [
            state[name][n] if name in state else None
            for name in ("mask head", "keypoint decoding", "keypoint head")
        ]
        found.append(Instances(size, *own, *rest))
    return found


# What postprocessing changes of each image besides its list, as far as there is any.
_POSTPROCESSED = ("pred_masks", "pred_keypoints", "pred_keypoint_heatmaps")


def _postprocessing(detector: nn.Module, state: State) -> List[Tensor]:
    found = [postprocess(x) for x in _instances(state, _sizes(state))]
    rest = [getattr(x, name) for x in found for name in _POSTPROCESSED]
    return _as_lists(found) + [x for x in rest if x is not None]


def _postprocessed(state: State, before: Sequence[Instances]) -> List[Instances]:
    tensors = state["postprocessing"]
    lists, rest = _lists(tensors[: 3 * len(before)], 3), list(tensors[3 * len(before) :])
    found = []
    for own, x in zip(lists, before):
        others = [None if getattr(x, name) is None else rest.pop(0) for name in _POSTPROCESSED]
        found.append(Instances(x.image_size, *own, *others))
    return found
