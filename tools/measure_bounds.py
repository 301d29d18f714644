#!/usr/bin/env python3
"""How far are healthy engines from eager fp32? `measure.verify` tolerates about twice that.

Every test model, made to find 100 objects, is run by every engine that there is here, at every
precision, at `min`, `opt` and `max`, with several seeds. Prints a row for each precision and test
model: what the worst engine, seed and size would have needed to match, but for `Tolerance.share`.
From the root of the repository:

    python3 tools/measure_bounds.py
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import run_blade
from backends import base
from detectors.build import build, find_weights, on_device
from detectors.export import Export
from detectors.inputs import inputs, read_image
from errors import Unsupported
from measure import verify
from measure.progress import Progress
from measure.verify import TOLERANCES, Detections
from models import MODELS
from results.tables import Table, left, markdown, right

ENGINES = ("torch", "torchscript", "openvino", "onnxruntime")


@dataclass(frozen=True)
class Need:
    """What a call would have needed to be a match.

    Attributes:
        alone: the share of the detections without a partner, those at the cut not counted.
        cut: how far from the cut the scores of those are that have no partner and lie within 0.1.
        box, score, mask: of the worst pair: 1 - IoU of the boxes, difference of the scores, 1 - IoU
            of the masks.
        box_median, score_median, mask_median: their medians.
        shift_px, shift_share, score_shift: see `Tolerance`.
        order: by how much a score exceeds that of one before.
        excused: the share of the detections within the margin of the cut without a partner.
    """

    alone: float
    cut: float
    box: float
    score: float
    mask: float
    box_median: float
    score_median: float
    mask_median: float
    shift_px: float
    shift_share: float
    score_shift: float
    order: float
    excused: float

    def worst(self, other: Need) -> Need:
        """The larger of each."""
        return Need(*(max(getattr(x, f.name) for x in (self, other)) for f in fields(self)))


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    add_options(parser)
    parser.add_argument("--image-size", type=run_blade.image_size, default=(240, 320))
    options = parser.parse_args()
    progress = Progress()
    # Precision and model -> what was needed at most, and where.
    worst: Dict[Tuple[str, str], Dict[str, Tuple[float, str]]] = defaultdict(dict)
    for name in options.model:
        for seed in range(options.seeds):
            export = export_of(name, options.image_size, seed)
            with torch.no_grad():
                wanted = {size: export.eager(*x) for size, x in export.tuning_inputs.items()}
            moved = on_device(export, MODELS[name], options.device)
            for engine, precision, size, found in calls(moved, options, progress):
                need = need_of(wanted[size], found, export, precision)
                told = " ".join(f"{each}={value:.5f}" for each, value in vars(need).items())
                progress.say(f"{name} {seed} {engine} {precision} {size}: {told}")
                key = (precision, name)
                for each, value in vars(need).items():
                    if value >= worst[key].get(each, (0.0, ""))[0]:
                        worst[key][each] = (value, f"{engine} {size} {seed}")
            gc.collect()
    columns = (*left("precision", "model"), *right(*(each.name for each in fields(Need))))
    rows = [
        (*key, *(f"{value:.4f}" for value, _ in needed.values()))
        for key, needed in sorted(worst.items())
    ]
    notes = [
        f"{' '.join(key)}: " + ", ".join(f"{k} {v:.4f} ({w})" for k, (v, w) in found.items())
        for key, found in worst.items()
    ]
    print(markdown(Table("Needs", columns, tuple(rows), tuple(notes))))
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that `calls` reads, and the number of seeds."""
    parser.add_argument("--engine", nargs="+", default=list(ENGINES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--device", choices=base.DEVICES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)


def arrays(outputs: Sequence[torch.Tensor]) -> List[np.ndarray]:
    """Tensors as NumPy arrays, which have no bfloat16."""
    return [(x.float() if x.is_floating_point() else x).cpu().numpy() for x in outputs]


def export_of(name: str, size: Tuple[int, int], seed: int) -> Export:
    """A test model with synthetic weights on the default photograph."""
    model = MODELS[name]
    images = inputs([read_image(None, size)], model.images_per_call, seed)
    weights = find_weights(model, "synthetic", images, 100, seed)
    return build(model, weights.state, weights.name, images)


def calls(
    export: Export, options: argparse.Namespace, progress: Progress
) -> Iterator[Tuple[str, str, str, Sequence[torch.Tensor]]]:
    """What engines find: engine, precision, size, flat tuple."""
    for engine in options.engine:
        backend = base.load(engine)
        for precision in options.precision:
            is_reference = (engine, precision, options.device) == ("torch", "fp32", "cpu")
            if is_reference or precision not in backend.precisions.get(options.device, ()):
                continue
            if backend.unavailable(options.device) is not None:
                continue
            progress.say(f"{export.name}: {engine} {precision}")
            try:
                optimized = backend.optimize(export, precision, options.device)
            except Unsupported as error:
                progress.say(str(error))
                continue
            for size, images in export.tuning_inputs.items():
                with torch.no_grad():
                    found = optimized.call(*images)
                yield engine, precision, size, [tensor.cpu() for tensor in found]


def need_of(
    wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], export: Export, precision: str
) -> Need:
    """The worst of the images of a call."""
    sides = [verify.split(arrays(side), export.fields) for side in (wanted, found)]
    return reduce(Need.worst, (of_image(one, other, precision) for one, other in zip(*sides)))


def of_image(one: Detections, other: Detections, precision: str) -> Need:
    """What it would take for two sets of detections to match."""
    tolerance = TOLERANCES[precision]
    pairs = verify._pair(one, other, tolerance)
    cut = verify._cut(one, verify.SCORE_THRESHOLD, verify.LIMIT)
    alone = np.concatenate(
        [
            np.abs(np.delete(side.scores, index) - cut)
            for side, index in ((one, pairs.reference), (other, pairs.candidate))
        ]
    )
    near = alone[alone <= 0.1]
    count = max(1, len(one.scores))
    boxes = one.boxes[pairs.reference]
    sides = np.tile((boxes[:, 2:] - boxes[:, :2]).mean(axis=0), 2)
    shift = np.abs(np.median(pairs.boxes, axis=0))
    box, score = 1 - pairs.box_iou, np.abs(pairs.scores)
    mask = np.zeros(1) if pairs.mask_iou is None else 1 - pairs.mask_iou
    rises = other.scores - np.minimum.accumulate(other.scores)
    return Need(
        alone=float((alone > tolerance.cut_margin).sum() / count),
        cut=float(near.max(initial=0)),
        box=float(box.max(initial=0)),
        score=float(score.max(initial=0)),
        mask=float(mask.max(initial=0)),
        box_median=float(np.median(box)),
        score_median=float(np.median(score)),
        mask_median=float(np.median(mask)),
        shift_px=float(shift.max(initial=0)),
        shift_share=float((shift / sides).max(initial=0)),
        score_shift=float(abs(np.median(pairs.scores))),
        order=float(max(0, rises.max(initial=0))),
        excused=float((alone <= tolerance.cut_margin).sum() / count),
    )


if __name__ == "__main__":
    sys.exit(main())
