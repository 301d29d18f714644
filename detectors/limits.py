"""Which numbers of a configuration there is a network for."""

from dataclasses import fields, is_dataclass
from typing import Any, Dict, Iterator, Tuple

from errors import InputError

Range = Tuple[float, float]

# Layers of more channels than this fit into no memory; an image has fewer anchors than MANY.
COUNT: Range = (1, 1 << 20)
MANY: Range = (1, (1 << 31) - 1)
REPEATS: Range = (0, 1000)
# What is squared, or divided by, stays far from the ends of float32.
POSITIVE: Range = (1e-6, 1e6)
ANY: Range = (-1e6, 1e6)

# The last part of a key, in lower case -> the least and the largest number. Those of `ANY` are to
# be numbers at all, and no more.
RANGES: Dict[str, Range] = {
    "pixel_mean": ANY,
    "pixel_std": POSITIVE,
    "depth": COUNT,
    "num_groups": COUNT,
    "width_per_group": COUNT,
    "res5_dilation": COUNT,
    "res2_out_channels": COUNT,
    "stem_out_channels": COUNT,
    "deform_num_groups": COUNT,
    "out_channels": COUNT,
    "min_size": (0, 1e6),
    "sizes": (1e-3, 1e6),
    "aspect_ratios": (1e-3, 1e3),
    "offset": (0, 1 - 1e-9),
    "bbox_reg_weights": POSITIVE,
    "pre_nms_topk_test": MANY,
    "post_nms_topk_test": MANY,
    "nms_thresh": ANY,
    "conv_dims": (-1, COUNT[1]),
    "num_classes": COUNT,
    # Below 0 everything is listed, and from 1 on nothing.
    "score_thresh_test": (ANY[0], 1 - 1e-9),
    "nms_thresh_test": ANY,
    "pooler_resolution": (1, 1000),
    "pooler_sampling_ratio": REPEATS,
    "num_fc": REPEATS,
    "fc_dim": COUNT,
    "num_conv": REPEATS,
    "conv_dim": COUNT,
    "ious": ANY,
    "num_keypoints": COUNT,
    "convs_dim": COUNT,
    "common_stride": COUNT,
    "overlap_thresh": ANY,
    "stuff_area_limit": (0, MANY[1]),
    "instances_confidence_thresh": ANY,
    # Detectron2's RetinaNet has no head without any.
    "num_convs": (1, REPEATS[1]),
    "topk_candidates_test": MANY,
    "min_size_test": (0, COUNT[1]),
    "max_size_test": (0, COUNT[1]),
    "detections_per_image": MANY,
    "keypoint_oks_sigmas": POSITIVE,
}


def check_numbers(prefix: str, section: Any) -> None:
    """Makes sure that the numbers of one section, not of those below it, are in their ranges.

    Args:
        prefix: of its keys, such as `MODEL.RPN`.
        section: the record.

    Raises:
        errors.InputError: one is not, or is not a number; or boxes have not four weights.
    """
    for each in fields(section):
        value = getattr(section, each.name)
        key = f"{prefix}.{each.name.upper()}"
        if is_dataclass(value):
            continue
        for number in _numbers(value):
            least, most = RANGES[each.name]
            if not least <= number <= most:
                verb = "has" if isinstance(value, (tuple, list)) else "is"
                raise InputError(
                    f"{key} {verb} {number!r}, and takes what is from {least:.12g} to {most:.12g}"
                )
        if each.name == "bbox_reg_weights":
            _check_four(key, value)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a value, at any depth."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _check_four(key: str, weights: Any) -> None:
    """One list of weights, or several in a list."""
    several = bool(weights) and isinstance(weights[0], (tuple, list))
    for each in weights if several else [weights]:
        if len(each) != 4:
            raise InputError(f"{key} has {len(each)} numbers, and a box takes 4: x, y, w, h")
