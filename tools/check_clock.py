#!/usr/bin/env python3
"""Does the suite's clock agree with PyTorch's own?

Times the same callable with the suite's timed call and with
`torch.utils.benchmark.Timer.blocked_autorange`, in turns, and prints both medians and their ratio
with its interval. From the root of the repository:

    python3 tools/check_clock.py --model testRetinaNet --backend torch
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.benchmark import Timer

import benchmark
from detectors.inputs import View
from measure import protocol
from measure.run import Run, prepare_model
from models import MODELS
from results.environment import default_threads


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="testRetinaNet")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    threads = default_threads()
    torch.set_num_threads(threads)
    run = prepare(options)

    def ours() -> float:
        """Seconds of a call as the suite times it."""
        return run.timed_calls().seconds[0]

    benchmark.warm_up(ours, benchmark.WarmUp.on("cpu"))
    timer = Timer(
        "call(*images)",
        globals={"call": run.optimized.call, "images": run.export.inputs},
        num_threads=threads,
    )
    calls = {
        "ours": ours,
        # Two calls a block at least: one is what ours makes.
        "theirs": lambda: timer.blocked_autorange(min_run_time=2 * typical).median,
    }
    typical = statistics.median(ours() for _ in range(3))
    rounds = benchmark.run_rounds(calls, "theirs", benchmark.StopRule.fixed(options.rounds), seed=0)
    for name, samples in rounds.samples.items():
        print(f"{name:8}{1000 * statistics.median(samples):10.2f} ms, {len(samples)} rounds")
    ratio = benchmark.speedup(rounds.samples["theirs"], rounds.samples["ours"], seed=0)
    print(f"theirs / ours {ratio.ratio:.3f}, {ratio.low:.3f} to {ratio.high:.3f}")


def prepare(options: argparse.Namespace) -> Run:
    """The run of a test model with synthetic weights, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_model(
            protocol.PrepareModel(
                model=MODELS[options.model],
                source="bundled",
                weights="synthetic",
                images=(),
                view=View(),
                detections=100,
                seed=0,
                folder=folder,
            )
        )
        return Run(
            protocol.PrepareRun(
                model=MODELS[options.model],
                backend=options.backend,
                precision=options.precision,
                device="cpu",
                source="bundled",
                folder=folder,
            )
        )


if __name__ == "__main__":
    main()
