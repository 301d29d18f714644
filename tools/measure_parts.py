#!/usr/bin/env python3
"""How far are the parts of healthy engines from eager fp32? `--bisect` tolerates twice that.

Test models, made to find 100 objects, and the trained detector in examples/ are compiled by every
engine that there is here, at every precision, with what leaves each part as outputs, and called at
`min`, `opt` and `max`. Prints, for each precision and kind of part, the largest difference, and
where it was: see `measure.parts`, `measure.tolerances.part_bound`. From the root of the
repository:

    python3 tools/measure_parts.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, Iterator, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import run_blade
from backends import base
from detectors.build import build, on_device
from detectors.checkpoint import read
from detectors.config_file import read_configuration
from detectors.export import Export
from detectors.inputs import inputs, read_image
from detectors.taps import TappedExport
from errors import Unsupported
from measure import parts as own_parts
from measure.progress import Progress
from models import MODELS, Model
from results.tables import Table, left, markdown, right
from tools.measure_bounds import add_options, export_of

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapes"


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [*MODELS, EXAMPLE.name]
    parser.add_argument("--model", nargs="+", choices=models, default=models)
    add_options(parser)
    parser.add_argument("--image-size", type=run_blade.image_size, default=(240, 320))
    options = parser.parse_args()
    progress = Progress()
    worst: Dict[Tuple[str, str], Tuple[float, str]] = {}
    for name in options.model:
        for seed in range(1 if name == EXAMPLE.name else options.seeds):
            export = (
                example() if name == EXAMPLE.name else export_of(name, options.image_size, seed)
            )
            for engine, precision, size, watched in watch(export, options, progress):
                for part in watched.differences:
                    where = f"{part.name} of {name}, {engine} {size} {seed}"
                    value = float("inf") if part.difference is None else part.difference
                    progress.say(f"{precision} {where}: {value:.2g}")
                    key = precision, part.kind
                    worst[key] = max(worst.get(key, (0.0, where)), (value, where))
    rows = [(*key, f"{value:.2g}", where) for key, (value, where) in sorted(worst.items())]
    columns = (*left("precision", "parts"), *right("largest difference"), *left("where"))
    print(markdown(Table("Differences", columns, tuple(rows))))
    return 0


def example() -> Export:
    """The trained Mask R-CNN, on an image of its own."""
    configuration = read_configuration(str(EXAMPLE / "config.yaml"))
    model = Model("shapes", "shapes", configuration=configuration)
    image = read_image(EXAMPLE / "images" / "000003.png", None)
    return build(model, read(str(EXAMPLE / "model.pth")), "model.pth", inputs([image], 1, 0))


def watch(
    export: Export, options: argparse.Namespace, progress: Progress
) -> Iterator[Tuple[str, str, str, own_parts.Watched]]:
    """What came of watching each engine: engine, precision, size, differences."""
    detector = export.eager.detector
    moved = TappedExport(on_device(export, export.model, options.device))
    for engine in options.engine:
        backend = base.load(engine)
        for precision in options.precision:
            if precision not in backend.precisions.get(options.device, ()):
                continue
            if backend.unavailable(options.device) is not None:
                continue
            progress.say(f"{export.name}: {engine} {precision}")
            try:
                optimized = backend.optimize(moved, precision, options.device)
            except Unsupported as error:
                progress.say(str(error))
                continue
            for size, images in moved.tuning_inputs.items():
                with torch.no_grad():
                    state = moved.state(optimized.call(*images), images)
                yield engine, precision, size, own_parts.compare(moved.parts, detector, state)


if __name__ == "__main__":
    sys.exit(main())
