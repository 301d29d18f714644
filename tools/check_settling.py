#!/usr/bin/env python3
"""Does an engine whose threads spin on after its calls slow down what has its turn next?

Three workers of the suite take turns: Torch, Torch again, and a stand-in for such an engine, which
computes on for a while after each call. In every round, in random order, Torch is called right
after the other Torch and right after the stand-in; once with the pause in which the suite waits for
the worker before to stand still, and once without. Prints the ratio of Torch's medians with its
interval over rounds: with the pause it is 1, within 2%. From the root of the repository:

    python3 tools/check_settling.py
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import benchmark
import run_blade
from backends.base import Backend
from errors import InputError, Unsupported
from measure import protocol
from measure import worker as workers
from measure.progress import Progress
from measure.worker import Command, Host
from models import MODELS
from results.environment import default_threads
from results.tables import Table, left, markdown, right
from tools.check_engines import prepare_model, prepare_run

HERE = Path(__file__).resolve().parent.parent
# As ONNX Runtime's threads do, which spin for 50 ms.
STAND_IN = '''
"""Torch, with a thread that computes on after each call."""

import dataclasses
import threading
import time

from backends.torch import Torch


class StandIn(Torch):
    name, label, rank, default = "spinning", "Spinning", 9, False

    def optimize(self, *run):
        optimized = super().optimize(*run)

        def call(*images):
            outputs = optimized.call(*images)
            threading.Thread(target=spin).start()
            return outputs

        return dataclasses.replace(optimized, call=call)


def spin():
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        pass
'''
# How far Torch may be slowed down.
MOST = 0.02
COLUMNS = (
    *left("the worker before"),
    *right("after Torch (ms)", "after the stand-in (ms)"),
    *left("ratio", "95% interval"),
)


def suite_with_stand_in(
    folder: Path, seconds: float = 0.0, stand_in: str = STAND_IN
) -> Tuple[Path, Backend]:
    """A copy of the suite that has one more backend: its worker's side, and the backend.

    Args:
        folder: takes the copy.
        seconds: that it computes on after a call.
        stand_in: the file of the backend, of which `StandIn` is the class.
    """
    for room in ("backends", "detectors", "measure", "results"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HERE / room, folder / room, ignore=ignored, dirs_exist_ok=True)
    for name in ("benchmark.py", "configuration.py", "errors.py", "models.py"):
        shutil.copy(HERE / name, folder)
    path = folder / "backends" / "spinning.py"
    path.write_text(stand_in.replace("SECONDS", str(seconds)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("backends.spinning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return folder / "measure" / "run.py", module.StandIn()


def main() -> int:
    """Prints the two ratios; returns 1 where the pause does not help."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="testRetinaNet")
    parser.add_argument("--image-size", type=run_blade.image_size, metavar="HxW")
    parser.add_argument(
        "--spin-ms", type=float, default=200.0, help="after each call (default: 200)"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    try:
        with tempfile.TemporaryDirectory(prefix="check_settling_") as folder:
            seconds = measure(options, Path(folder))
    except (InputError, Unsupported, benchmark.RunFailed) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    ratios = {
        pause: benchmark.speedup(seconds[pause, "spinning"], seconds[pause, "torch"], seed=0)
        for pause in (True, False)
    }
    rows = []
    for pause, ratio in ratios.items():
        medians = [1000 * np.median(seconds[pause, name]) for name in ("torch", "spinning")]
        interval = "-" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
        name = "settled" if pause else "not settled"
        rows.append((name, *(f"{x:.1f}" for x in medians), f"{ratio.ratio:.3f}", interval))
    note = (
        f"{options.model} fp32, threads: {options.threads}, {options.rounds} rounds; the stand-in "
        f"computes on for {options.spin_ms:g} ms"
    )
    print(markdown(Table("Settling", COLUMNS, tuple(rows), (note,))))
    return 0 if abs(ratios[True].ratio - 1) <= MOST else 1


def measure(options: argparse.Namespace, folder: Path) -> Dict[Tuple[bool, str], List[float]]:
    """Seconds of Torch's calls, by whether there was a pause, and by what was called before."""
    progress = Progress()
    workers.RUN, _ = suite_with_stand_in(folder / "suite", options.spin_ms / 1000)
    seconds: Dict[Tuple[bool, str], List[float]] = {
        (pause, name): [] for pause in (True, False) for name in ("torch", "spinning")
    }
    with contextlib.closing(Host(Command.own(), folder / "host.log")) as host:
        progress.say(f"{options.model}: weights and inputs")
        prepare_model(host, options, folder)
        with contextlib.ExitStack() as stack:
            started = {
                name: stack.enter_context(host.worker(folder / f"{name}.log", options.threads))
                for name in ("torch", "torch again", "spinning")
            }
            for name, worker in started.items():
                job = protocol.PrepareRun(
                    model=MODELS[options.model],
                    backend=name.split()[0],
                    precision="fp32",
                    device="cpu",
                    source="bundled",
                    folder=str(folder),
                )
                prepare_run(worker, job)
                worker.settle()
            torch = started["torch"]
            before = {"torch": started["torch again"], "spinning": started["spinning"]}
            conditions, order = list(seconds), np.random.default_rng(0)
            for _ in range(options.rounds):
                for place in order.permutation(len(conditions)):
                    pause, name = conditions[place]
                    before[name].ask(protocol.TimedCalls())
                    if pause:
                        before[name].settle()
                    seconds[pause, name].append(torch.ask(protocol.TimedCalls()).seconds[0])
                    for worker in (before[name], torch):
                        worker.settle()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
