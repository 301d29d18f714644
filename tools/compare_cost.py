#!/usr/bin/env python3
"""Do the bundled detectors cost what Detectron2's own cost?

Times both in eager mode, with the same synthetic weights and image, in turns in one process, and
prints the ratio with its interval. Needs an installed Detectron2. From the root of the repository:

    python3 tools/compare_cost.py --model testRetinaNet testMaskRCNNFPN
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import benchmark
from detectors.build import build, find_weights
from detectors.inputs import read_image, tuning_inputs
from models import MODELS
from results.environment import default_threads


def main() -> None:
    """Prints one line for each test model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["testRetinaNet"])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(default_threads())
    for name in options.model:
        speedup = compare(name, options.rounds)
        interval = "too few rounds for an interval"
        if speedup.low is not None:
            interval = f"{speedup.low:.3f} to {speedup.high:.3f}"
        print(f"{name}: Detectron2 / bundled {speedup.ratio:.3f}, {interval}", flush=True)


def compare(name: str, rounds: int) -> benchmark.Speedup:
    """The time of Detectron2's eager module over that of the bundled one."""
    model = MODELS[name]
    inputs = tuning_inputs(read_image(None, None), model.images_per_call, seed=0)
    weights = find_weights(model, "synthetic", inputs, detections=100, seed=0)
    calls = {}
    for source in ("detectron2", "bundled"):
        export = build(model, weights.state, weights.name, inputs, source)
        calls[source] = timed(export.eager, inputs["opt"])
        benchmark.warm_up(calls[source], benchmark.WarmUp.on("cpu"))
    rule = benchmark.StopRule.fixed(rounds)
    samples = benchmark.run_rounds(calls, "detectron2", rule, seed=0).samples
    return benchmark.speedup(samples["detectron2"], samples["bundled"], seed=0)


def timed(module: torch.nn.Module, images: tuple) -> Callable[[], float]:
    """A function that calls the module once and returns the seconds."""

    def call() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            module(*images)
        return time.perf_counter() - start

    return call


if __name__ == "__main__":
    main()
