"""Synthetic weights: a detector that behaves like a trained one on a given image.

A network of raw random weights finds nothing, or noise whose scores lie so close together that
rounding decides what is listed. Trained checkpoints cannot always be had. The weights made here
are random but for two things. Every layer is scaled on the image, so that activations keep their
size and rounding errors stay small from the first layer to the last. And the last layer of the
classifier is solved for: chosen regions of the image get chosen scores, and all others get none.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from configuration import Configuration
from detectors import boxes as box_ops
from detectors.config import build_detector
from detectors.images import batch_images, image_size
from detectors.layers import Bottleneck, FrozenBatchNorm2d
from detectors.rcnn import GeneralizedRCNN
from detectors.retinanet import RetinaNet
from detectors.roi_heads import BoxPredictor, CascadeROIHeads, Res5ROIHeads
from detectors.rpn import RPN, _per_anchor

NUM_CLASSES = 80
# Scores of the objects, evenly spaced: 100 of them are 0.0066 apart, more than bfloat16's 0.0039.
SCORES = (0.3, 0.95)
# Logit that the class of an object does not exceed anywhere else: a score of 0.007. Far from the
# threshold of 0.05, at -2.9.
BACKGROUND_LOGIT = -5.0
# Of what a residual block computes, the share that is added to its input. Small, rounding errors
# stay small: bfloat16 leaves noise of 4% of RetinaNet's last features. Unscaled, and without the
# means of 1 below, it was half of them.
RESIDUAL_SCALE = 0.2
# The same for the stage that C4 runs on each region. It has but three blocks for errors to grow in,
# and more of them tell regions apart.
REGION_RESIDUAL_SCALE = 0.5
# Added to the covariance of the features, as a share of their mean variance. Without it, the
# classifier would stand on directions that are all rounding error.
RIDGE = 0.01
# How much the errors of bfloat16 count beside the features of other regions: the more, the steadier
# the scores, and the fewer the regions that can be told apart.
ERROR_WEIGHT = 10.0
# A region is worth choosing only if no other one has more than this share of its response.
LARGEST_RIVAL = 0.7
# The proposal network is asked again with this much noise, as a share of what its outputs vary by,
# far more than the 4% that bfloat16 adds, and this often: objects are put where it says the same
# every time and, where that is not enough, where it said something else this often at most.
PROPOSAL_NOISE = 0.3
PROPOSAL_TRIALS = 16
MOST_UNSTEADY = 6
SAME_PROPOSAL_IOU = 0.95
# The shorter side of a proposal for an object, at least: in pixels, as a sliver at the border of
# the image has features that change fast, and in cells of the finest feature map, over which the
# errors of a region average.
SHORTEST_SIDE = 20
SHORTEST_SIDE_CELLS = 2
# Octaves that the side of an object's box is from where the pyramid's levels meet, at least: 5%.
LEVEL_MARGIN = 0.07
# Proposals that the mask head is scaled on.
MASK_SAMPLE = 32
# Classifiers whose responses to all regions are in memory together.
FILTERS_AT_ONCE = 64
# Objects of one class overlap less than this, well below the 0.5 of non-maximum suppression.
SAME_CLASS_IOU = 0.1

# RetinaNet's anchors of a cell, by image: every size and every shape once. Each class of an anchor
# has weights of its own, which only a fourth image has to share.
IMAGE_ANCHORS = ((0, 4, 8), (1, 5, 6), (2, 3, 7))
MIDDLE_ANCHOR = 4


def synthesize(
    config: Configuration, images: Sequence[Tensor], detections: int, seed: int
) -> Dict[str, Tensor]:
    """Weights with which a detector finds a set number of objects in an image.

    Args:
        config: of a test model.
        images: the image at the sizes `min`, `opt` and `max`, and any others, each 3 x H x W, BGR,
            0 to 255. The network is scaled on `opt`; objects are chosen in all.
        detections: how many objects are found in each, up to 100. Where an image has too few
            regions that can be told apart (it is tiny, or of one colour), it is fewer.
        seed: of the weights and of the choice.

    Returns:
        A state dict by Detectron2's names. The same on every call on one machine.
    """
    smallest, middle, largest, *others = images
    views = [middle]
    for image in (smallest, largest, *others):
        # Two that are alike (tiny images are not made smaller) would be rivals in everything.
        if not any(torch.equal(image, view) for view in views):
            views.append(image)
    generator = torch.Generator().manual_seed(seed)
    # Every parameter is set below.
    detector = build_detector(config, False, initialize=False).requires_grad_(False)
    with torch.no_grad():
        _initialize(detector, generator)
        if isinstance(detector, RetinaNet):
            _fit_retinanet(detector, views, detections, generator)
        else:
            _fit_rcnn(detector, views, detections, generator)
    return {name: value.clone() for name, value in detector.state_dict().items()}


def _initialize(detector: nn.Module, generator: torch.Generator) -> None:
    """Normal weights of variance 2 / fan-in (He et al. 2015, https://arxiv.org/abs/1502.01852)."""
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, FrozenBatchNorm2d):
            residual = name.endswith("conv3.norm")
            in_region = name.startswith("roi_heads.")
            scale = REGION_RESIDUAL_SCALE if in_region else RESIDUAL_SCALE
            module.weight.fill_(scale if residual else 1.0)
            module.bias.fill_(0.0 if residual else 1.0)


def _output_scale(name: str) -> Tuple[float, float]:
    """Mean and standard deviation that a layer's output shall have, by the layer's name.

    What enters a ReLU has mean 1: with most values positive the network is closer to a linear one,
    and rounding errors grow less. Boxes move by some hundredths of their size, as what is pooled
    from them later moves along with their errors.
    """
    if "fpn_" in name or "top_block" in name or "objectness_logits" in name:
        return 0.0, 1.0
    if "anchor_deltas" in name:
        return 0.0, 0.03
    if name == "head.bbox_pred":
        return 0.0, 0.1
    if "bbox_pred" in name:
        return 0.0, 0.25  # Divided by weights between 5 and 30.
    if name.endswith("mask_head.predictor"):
        return 1.0, 2.0
    return 1.0, 1.0


@contextmanager
def _scaling(detector: nn.Module) -> Iterator[None]:
    """While it lasts, every layer that runs is scaled on what comes out of it, the first time.

    But for the last layer of the classifier, which is solved for.

    Data-dependent initialisation (Krahenbuhl et al. 2016, https://arxiv.org/abs/1511.06856): batch
    norms take the statistics of their input, other layers are given `_output_scale`.
    """
    done = set()

    def scale_norm(norm: FrozenBatchNorm2d, inputs: Tuple[Tensor]) -> None:
        if norm not in done:
            done.add(norm)
            mean, std = _statistics(inputs[0])
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(std**2)

    def scale_layer(name: str, layer: nn.Module, inputs: Tuple[Tensor], output: Tensor) -> Tensor:
        if layer in done:
            return output
        done.add(layer)
        wanted_mean, wanted_std = _output_scale(name)
        mean, std = _statistics(output)
        scale = wanted_std / std
        shift = wanted_mean - mean * scale
        layer.weight.mul_(_along(scale, layer.weight, isinstance(layer, nn.ConvTranspose2d)))
        layer.bias.mul_(scale).add_(shift)
        return output * _along(scale, output, True) + _along(shift, output, True)

    handles = []
    for name, module in detector.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            handles.append(module.register_forward_pre_hook(scale_norm))
        elif getattr(module, "bias", None) is not None and not name.endswith("cls_score"):
            handles.append(module.register_forward_hook(partial(scale_layer, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _statistics(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel (dimension 1), the latter away from zero.

    An image of one colour has next to no deviation, which must not be blown up to 1.
    """
    channels = x.transpose(0, 1).flatten(1)
    mean = channels.mean(dim=1)
    variance = (channels - mean[:, None]).square().mean(dim=1)
    floor = max(1e-3, 1e-2 * float(variance.mean()))
    return mean, variance.clamp(min=floor).sqrt()


def _along(values: Tensor, like: Tensor, second: bool) -> Tensor:
    """A value for each channel, shaped to multiply `like`, whose channels come first or second."""
    shape = [1] * like.dim()
    shape[1 if second else 0] = -1
    return values.view(shape)


@dataclass(frozen=True)
class _Regions:
    """What the classifier sees of one image, R regions.

    Attributes:
        features: R x D, input of the last layer.
        boxes: R x 4, about where an object found there would be.
        levels: R, of the pyramid.
        eligible: R, whether an object may be put there.
        unsteady: R, how likely noise moves them; objects go to the least first.
    """

    features: Tensor
    boxes: Tensor
    levels: Tensor
    eligible: Tensor
    unsteady: Tensor


class _Discriminant:
    """Linear discriminants (Fisher 1936) of single regions against all others.

    The direction A^-1 (f - mean), with A the covariance of all N features, responds to f and, for
    that, as little as can be to the others.

    Args:
        features: N x D.
        errors: N x D, what rounding adds to them. They count as features of others do, so that
            logits move little with them.
    """

    def __init__(self, features: Tensor, errors: Tensor) -> None:
        self.mean = features.mean(dim=0)
        self.centered = features - self.mean
        covariance = self.centered.T @ self.centered / len(features)
        covariance += ERROR_WEIGHT * errors.T @ errors / max(1, len(errors))
        ridge = RIDGE * covariance.diagonal().mean() + 1e-6
        covariance.diagonal().add_(ridge)
        self.factor = torch.linalg.cholesky(covariance)

    def rivals(self, rows: Tensor) -> Tensor:
        """For each of T regions, the largest response of any other to its discriminant alone."""
        targets = self.centered[rows].T
        directions = torch.cholesky_solve(targets, self.factor)
        strength = (directions * targets).sum(dim=0).clamp(min=1e-6)
        responses = self.centered @ (directions / strength)
        responses[rows, torch.arange(len(rows))] = -math.inf
        return responses.max(dim=0).values

    def fit(self, groups: Sequence[Tensor], logits: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
        """Classifiers that give regions their logits and all others at most `BACKGROUND_LOGIT`.

        With filters that respond with 1 to one region of a group and with 0 to its others, and
        their responses r to some region, its logit is base + sum(r (logits - base)), where base is
        the logit of a mean region. The highest base that keeps the background low is taken.

        Args:
            groups, logits: for each of C classifiers, T rows and their logits.

        Returns:
            C x D weights and C biases.
        """
        filters = [self._filters(rows) for rows in groups]
        weights, biases = [], []
        for rows, wanted, own, heard in zip(groups, logits, filters, self._responses(filters)):
            slack = 1 - heard.sum(dim=0)
            bases = (BACKGROUND_LOGIT - wanted @ heard) / slack
            bases[slack < 1 - LARGEST_RIVAL] = BACKGROUND_LOGIT
            bases[rows] = BACKGROUND_LOGIT
            base = bases.min().clamp(max=BACKGROUND_LOGIT)
            weights.append((wanted - base) @ own)
            biases.append(base - weights[-1] @ self.mean)
        return torch.stack(weights), torch.stack(biases)

    def _responses(self, filters: Sequence[Tensor]) -> Iterator[Tensor]:
        """What each of some filters, T x D, hears of all regions, T x N; not all at once."""
        for first in range(0, len(filters), FILTERS_AT_ONCE):
            some = filters[first : first + FILTERS_AT_ONCE]
            heard = torch.cat(some) @ self.centered.T
            yield from heard.split([len(x) for x in some])

    def _filters(self, rows: Tensor) -> Tensor:
        """T x D filters for T regions: each responds with 1 to its own and 0 to the others."""
        targets = self.centered[rows].T
        directions = torch.cholesky_solve(targets, self.factor)
        return torch.linalg.solve(directions.T @ targets, directions.T)


@dataclass(frozen=True)
class _Objects:
    """The objects to be found in one image, T of them.

    Attributes:
        rows: T, their regions among those of all images.
        classes: T.
        logits: T.
    """

    rows: Tensor
    classes: List[int]
    logits: Tensor


def _choose_objects(
    regions: Sequence[_Regions],
    discriminant: _Discriminant,
    detections: int,
    generator: torch.Generator,
) -> List[_Objects]:
    """Chooses objects in every image."""
    objects: List[_Objects] = []
    first = 0
    for image_regions in regions:
        rows = _choose_regions(image_regions, discriminant, first, detections, generator)
        classes = _assign_classes(image_regions.boxes[rows - first], generator)
        scores = torch.linspace(SCORES[1], SCORES[0], max(detections, 2))[: len(rows)]
        scores = scores[torch.randperm(len(rows), generator=generator)]
        objects.append(_Objects(rows, classes, torch.logit(scores)))
        first += len(image_regions.features)
    return objects


def _choose_regions(
    regions: _Regions,
    discriminant: _Discriminant,
    first: int,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """Rows (offset by `first`) of regions that nothing else resembles, from each level in turn."""
    ranked: List[Tuple[int, int, float, int]] = []
    for level in regions.levels.unique():
        rows = (regions.eligible & (regions.levels == level)).nonzero()[:, 0]
        # A sample: the best of all would lie side by side.
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[regions.unsteady[rows].sort(stable=True).indices[: count + 8]]
        rivals, order = discriminant.rivals(rows + first).sort()
        order = order[rivals < LARGEST_RIVAL]
        for place, (row, rival) in enumerate(zip(rows[order].tolist(), rivals.tolist())):
            ranked.append((int(regions.unsteady[row]), place, rival, row + first))
    return torch.tensor([row for *_, row in sorted(ranked)[:count]], dtype=torch.int64)


def _assign_classes(boxes: Tensor, generator: torch.Generator) -> List[int]:
    """A class for each of T boxes: the least used one that has nothing where the box is."""
    overlaps = box_iou(boxes, boxes)
    shuffled = torch.randperm(NUM_CLASSES, generator=generator).tolist()
    members: Dict[int, List[int]] = {label: [] for label in shuffled}
    classes: List[int] = []
    for n in range(len(boxes)):
        free = [
            label
            for label in shuffled
            if all(float(overlaps[n, other]) < SAME_CLASS_IOU for other in members[label])
        ]
        label = min(free or shuffled, key=lambda label: len(members[label]))
        members[label].append(n)
        classes.append(label)
    return classes


def _fit_retinanet(
    detector: RetinaNet, images: Sequence[Tensor], detections: int, generator: torch.Generator
) -> None:
    with _scaling(detector):
        detector([images[0]])
    regions = [_retinanet_regions(detector, image) for image in images]
    features = torch.cat([x.features for x in regions])
    discriminant = _Discriminant(features, features[:0])
    layer = detector.head.cls_score
    layer.weight.zero_()
    layer.bias.fill_(2 * BACKGROUND_LOGIT)
    objects = _choose_objects(regions, discriminant, detections, generator)
    channels = _channels(objects)
    if len(channels):
        used, weights, biases = _fit_objects(discriminant, objects, channels)
        layer.weight[used, :, 1, 1] = weights
        layer.bias[used] = biases


def _fit_objects(
    discriminant: _Discriminant, objects: Sequence[_Objects], outputs: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Classifiers for the objects of all images.

    Args:
        outputs: for each object, which output of the layer tells it.

    Returns:
        the C outputs that tell any, and their C x D weights and C biases.
    """
    rows = torch.cat([found.rows for found in objects])
    logits = torch.cat([found.logits for found in objects])
    used = outputs.unique()
    members = [outputs == output for output in used]
    fitted = discriminant.fit([rows[x] for x in members], [logits[x] for x in members])
    return (used, *fitted)


def _channels(objects: Sequence[_Objects]) -> Tensor:
    """For each object of each image an output channel, of one of the image's anchors."""
    channels: List[int] = []
    for anchors, found in zip(cycle(IMAGE_ANCHORS), objects):
        uses = [0] * NUM_CLASSES
        for label in found.classes:
            channels.append(anchors[uses[label] % len(anchors)] * NUM_CLASSES + label)
            uses[label] += 1
    return torch.tensor(channels, dtype=torch.int64)


def _retinanet_regions(detector: RetinaNet, image: Tensor) -> _Regions:
    """The cells of all levels, with the features that the classifier gets."""
    batch = batch_images([image], detector.pixel_mean, detector.pixel_std, 32)
    features = detector.backbone(batch)
    hidden = [detector.head.cls_subnet(x)[0].flatten(1).T for x in features]
    per_cell = detector.anchor_generator.num_anchors
    boxes = [x[MIDDLE_ANCHOR::per_cell] for x in detector.anchor_generator(features)]
    levels = [torch.full((len(x),), level) for level, x in enumerate(hidden)]
    boxes = torch.cat(boxes)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = (centers > 0) & (centers < image_size(image).flip(0))
    steady = torch.zeros(len(boxes), dtype=torch.int64)
    return _Regions(torch.cat(hidden), boxes, torch.cat(levels), inside.all(dim=1), steady)


@dataclass(frozen=True)
class _View:
    """What the box heads get to see of one image.

    Attributes:
        size: height and width, int64.
        features: of the backbone.
        rounded: the same computed in bfloat16.
        proposals: R x 4.
        unsteady: R, how often noise did not leave the proposal what it is.
    """

    size: Tensor
    features: List[Tensor]
    rounded: List[Tensor]
    proposals: Tensor
    unsteady: Tensor


# Pooled and embedded regions, R x D, from the features and the boxes, and what predicts from them.
_BoxStage = Tuple[Callable[[List[Tensor], Tensor], Tensor], BoxPredictor]


def _fit_rcnn(
    detector: GeneralizedRCNN,
    images: Sequence[Tensor],
    detections: int,
    generator: torch.Generator,
) -> None:
    heads = detector.roi_heads
    with _scaling(detector):
        views = [_view(detector, image, generator) for image in images]
        boxes = [view.proposals for view in views]
        objects: List[_Objects] = []
        for embed, predictor in _box_stages(heads):
            hidden = [embed(view.features, regions) for view, regions in zip(views, boxes)]
            with _rounding(detector):
                errors = [
                    embed(view.rounded, regions) - x
                    for view, regions, x in zip(views, boxes, hidden)
                ]
            discriminant = _Discriminant(torch.cat(hidden), torch.cat(errors))
            if not objects:
                stride = detector.proposal_generator.anchor_generator.strides[0]
                shortest = max(SHORTEST_SIDE, SHORTEST_SIDE_CELLS * stride)
                regions = [_proposal_regions(*pair, shortest) for pair in zip(views, hidden)]
                objects = _choose_objects(regions, discriminant, detections, generator)
            _fit_classes(predictor, discriminant, objects)
            if isinstance(heads, CascadeROIHeads):
                boxes = [
                    box_ops.clip(predictor(x, regions)[1], view.size)
                    for view, x, regions in zip(views, hidden, boxes)
                ]
            else:
                predictor.bbox_pred(hidden[0])
        heads.mask_head(_pool_masks(heads, views[0]))


def _view(detector: GeneralizedRCNN, image: Tensor, generator: torch.Generator) -> _View:
    batch = batch_images(
        [image], detector.pixel_mean, detector.pixel_std, detector.size_divisibility
    )
    features = detector.backbone(batch)
    size = image_size(image)
    with _rounding(detector.backbone):
        rounded = detector.backbone(batch)
    proposals, unsteady = _propose(detector.proposal_generator, features, size, generator)
    return _View(size, features, rounded, proposals, unsteady)


@contextmanager
def _rounding(detector: nn.Module) -> Iterator[None]:
    """While it lasts, the layers compute what they do under autocast to bfloat16.

    As a CPU with instructions for it does: products of rounded numbers, summed in float32. On any
    other PyTorch's own kernels for bfloat16 take up to 160 times as long as those for float32.
    """
    handles = []
    weights = []
    for module in detector.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            weights += [(weight, weight.clone()) for weight in module.parameters(recurse=False)]
        elif not isinstance(module, (FrozenBatchNorm2d, Bottleneck)):
            continue
        handles.append(module.register_forward_pre_hook(lambda _, inputs: _round(inputs[0])))
        handles.append(module.register_forward_hook(lambda _, inputs, output: _round(output)))
    try:
        for weight, _ in weights:
            weight.copy_(_round(weight))
        yield
    finally:
        for weight, exact in weights:
            weight.copy_(exact)
        for handle in handles:
            handle.remove()


def _round(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _propose(
    rpn: RPN, features: List[Tensor], size: Tensor, generator: torch.Generator
) -> Tuple[Tensor, Tensor]:
    """Proposals, R x 4, and how often each was gone when the network's outputs were noisy, R."""
    anchors = rpn.anchor_generator(features)
    logits, deltas = rpn.rpn_head(features)
    logits = [x[0].permute(1, 2, 0).flatten() for x in logits]
    deltas = [_per_anchor(x)[0] for x in deltas]
    proposals = rpn.proposals_of_image(anchors, logits, deltas, size)
    unsteady = torch.zeros(len(proposals), dtype=torch.int64)
    for _ in range(PROPOSAL_TRIALS):
        noisy_logits = [_with_noise(x, generator) for x in logits]
        noisy_deltas = [_with_noise(x, generator) for x in deltas]
        others = rpn.proposals_of_image(anchors, noisy_logits, noisy_deltas, size)
        unsteady += (box_iou(proposals, others) < SAME_PROPOSAL_IOU).all(dim=1)
    return proposals, unsteady


def _with_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.empty_like(x).normal_(generator=generator)
    return x + PROPOSAL_NOISE * x.std(unbiased=False) * noise


def _box_stages(heads: nn.Module) -> List[_BoxStage]:
    """The box heads one after the other: three in a cascade, else one."""

    def embed_c4(features: List[Tensor], boxes: Tensor) -> Tensor:
        return _res5(heads, features, boxes).mean(dim=[2, 3])

    def embed_pyramid(head: nn.Module, features: List[Tensor], boxes: Tensor) -> Tensor:
        return head(heads.box_pooler(_pooled(heads, features), [boxes]))

    if isinstance(heads, Res5ROIHeads):
        return [(embed_c4, heads.box_predictor)]
    if isinstance(heads, CascadeROIHeads):
        pairs = zip(heads.box_head, heads.box_predictor)
        return [(partial(embed_pyramid, head), predictor) for head, predictor in pairs]
    return [(partial(embed_pyramid, heads.box_head), heads.box_predictor)]


def _res5(heads: Res5ROIHeads, features: List[Tensor], boxes: Tensor) -> Tensor:
    return heads.res5(heads.pooler(_pooled(heads, features), [boxes]))


def _pooled(heads: nn.Module, features: List[Tensor]) -> List[Tensor]:
    """Of the backbone's features, those that regions are pooled from."""
    return [features[n] for n in heads.in_features]


def _pool_masks(heads: nn.Module, view: _View) -> Tensor:
    boxes = view.proposals[:MASK_SAMPLE]
    if isinstance(heads, Res5ROIHeads):
        return _res5(heads, view.features, boxes)
    return heads.mask_pooler(_pooled(heads, view.features), [boxes])


def _proposal_regions(view: _View, hidden: Tensor, shortest: int) -> _Regions:
    """Proposals, their levels by size: octaves of the side.

    Those of sides near a power of two times 7 are pooled from one level of the pyramid or from the
    next (equation 1 of the FPN paper), as rounding decides: no place for an object.
    """
    sides = view.proposals[:, 2:] - view.proposals[:, :2]
    octaves = (sides.prod(dim=1).sqrt() / 7).log2()
    eligible = (view.unsteady <= MOST_UNSTEADY) & (sides.min(dim=1).values > shortest)
    eligible &= (octaves - octaves.round()).abs() > LEVEL_MARGIN
    return _Regions(hidden, view.proposals, octaves.floor().long(), eligible, view.unsteady)


def _fit_classes(
    predictor: BoxPredictor, discriminant: _Discriminant, objects: Sequence[_Objects]
) -> None:
    """Logits relative to the background's, which is 0 everywhere."""
    layer = predictor.cls_score
    layer.weight.zero_()
    layer.bias.fill_(2 * BACKGROUND_LOGIT)
    layer.bias[-1] = 0
    classes = torch.tensor([label for found in objects for label in found.classes])
    if len(classes):
        used, weights, biases = _fit_objects(discriminant, objects, classes)
        layer.weight[used] = weights
        layer.bias[used] = biases
