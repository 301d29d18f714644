#!/usr/bin/env python3
"""How far are healthy engines from eager fp32 in keypoints, maps of labels and proposals?

As `tools/measure_bounds.py`, for what the test models do not have. The detectors are those of the
model zoo's configurations, small or as they are, with the seeded weights of the tests, on several
seeded images at three sizes. From the root of the repository:

    python3 tools/measure_kinds.py
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import parts
import torch
from measure_bounds import add_options, arrays, calls
from seeded_weights import seeded_image

from configuration import from_settings
from detectors.build import build
from detectors.config import build_detector
from detectors.export import Export
from detectors.inputs import tuning_inputs
from detectors.zoo_configurations import zoo_settings
from measure import geometry, verify
from measure.detections import Detections
from measure.progress import Progress
from measure.tolerances import TOLERANCES, Tolerance
from models import Model

_MORE = {"MODEL.RPN.POST_NMS_TOPK_TEST": 300, "TEST.DETECTIONS_PER_IMAGE": 100}
_SEGMENTS = {**_MORE, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 9, "MODEL.ROI_HEADS.NUM_CLASSES": 9}
# Kind -> configuration of the model zoo, and what is different in its small form.
KINDS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "keypoints": (parts.KEYPOINTS, {**_MORE, "MODEL.ROI_HEADS.NUM_CLASSES": 1}),
    "proposals": (parts.PROPOSALS, {"MODEL.RPN.POST_NMS_TOPK_TEST": 300}),
    "semantic": (parts.SEMANTIC, _SEGMENTS),
    "panoptic": (parts.PANOPTIC, _SEGMENTS),
}


def main() -> int:
    """Prints what each call needed, and the worst for each precision and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--full", action="store_true", help="as wide as the model zoo has them")
    add_options(parser)
    parser.add_argument("--image-size", nargs=2, type=int, default=(240, 320))
    options = parser.parse_args()
    progress = Progress()
    worst: Dict[Tuple[str, str], Dict[str, Tuple[float, str]]] = defaultdict(dict)
    for kind in options.kind:
        for seed in range(options.seeds):
            export = export_of(kind, options.full, tuple(options.image_size), seed)
            with torch.no_grad():
                wanted = {size: export.eager(*x) for size, x in export.tuning_inputs.items()}
            for engine, precision, size, found in calls(export, options, progress):
                sides = [verify.split(arrays(x), export.fields)[0] for x in (wanted[size], found)]
                needs = dict(needed(*sides, TOLERANCES[precision], export))
                told = " ".join(f"{name}={value:.4f}" for name, value in needs.items())
                progress.say(f"{kind} {seed} {engine} {precision} {size}: {told}")
                for name, value in needs.items():
                    if value >= worst[precision, kind].get(name, (0.0, ""))[0]:
                        worst[precision, kind][name] = (value, f"{engine} {size} {seed}")
    for key, found in sorted(worst.items()):
        print(f"{' '.join(key)}: " + ", ".join(f"{k} {v:.4f} ({w})" for k, (v, w) in found.items()))
    return 0


def export_of(kind: str, full: bool, size: Tuple[int, int], seed: int) -> Export:
    """A detector of a kind with seeded weights, on a seeded image."""
    config, small = KINDS[kind]
    settings = zoo_settings(config) if full else {**zoo_settings(config), **parts.SMALL, **small}
    configuration = from_settings(settings)
    like = build_detector(configuration, False, initialize=False).state_dict()
    model = Model(kind, config, configuration=configuration)
    images = tuning_inputs(seeded_image(seed + 1, *size), 1, seed)
    return build(model, parts.weights_of(like), "seeded weights", images)


def needed(
    one: Detections, other: Detections, tolerance: Tolerance, export: Export
) -> Iterator[Tuple[str, float]]:
    """What it would take for two sides to match: names as of `Tolerance`."""
    if one.has_objects:
        yield from of_objects(one, other, tolerance, export)
    if one.sem_seg is not None:
        labels = one.sem_seg.argmax(axis=0)
        other_labels = other.sem_seg.argmax(axis=0)
        borders = geometry.near_borders(labels, verify.BORDER_PX)
        yield "labels off", float((labels != other_labels).mean())
        yield "border labels off", float((labels != other_labels)[borders].mean())
        yield "border share", float(borders.mean())


def of_objects(
    one: Detections, other: Detections, tolerance: Tolerance, export: Export
) -> Iterator[Tuple[str, float]]:
    """What lists of objects need."""
    one, other = verify._in_units(one, other)
    pairs = verify._pair(one, other, tolerance)
    cut = verify._cut(one, export.score_threshold, export.limit)
    found = verify._compare_objects(one, other, tolerance, cut)
    yield "detections", float(len(one.scores))
    yield "alone", 1 - found.matched / max(1, found.matched + max(found.lost, found.spurious))
    yield "box", float(np.quantile(1 - pairs.box_iou, 0.9))
    yield "median box", float(np.median(1 - pairs.box_iou))
    yield "score", float(np.quantile(np.abs(pairs.scores), 0.9))
    yield "median score", float(np.median(np.abs(pairs.scores)))
    yield "score shift", float(abs(np.median(pairs.scores)))
    yield "order", float(verify._rises(other.scores).max(initial=0))
    yield "shift px", float(np.abs(np.median(pairs.boxes, axis=0)).max())
    if pairs.oks is not None:
        off = 1 - pairs.oks
        yield "oks: 90%", float(np.quantile(off, 0.9))
        yield "oks: worst", float(off.max())
        yield "oks: median", float(np.median(off))
        moved = np.median(pairs.keypoints.reshape(-1, 2), axis=0)
        yield "keypoint shift px", float(np.abs(moved).max())
    for name, values in pairs.others.items():
        yield f"{name}: median", float(np.median(values))


if __name__ == "__main__":
    sys.exit(main())
