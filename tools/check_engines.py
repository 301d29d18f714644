#!/usr/bin/env python3
"""Does the suite find the engines as fast as their own tools do?

Runs of the suite, in its worker process, take turns with what an engine's user would time it by:
OpenVINO with `benchmark_app` on the same model, ONNX Runtime with a bare loop of `session.run` on
the same graph, in a process without PyTorch. Both sides get the same images, threads and precision
and make equally many calls a round, in random order, never two at once. Prints both medians and
their ratio with its interval over rounds. From the root of the repository:

    python3 tools/check_engines.py --model testRetinaNet --precision fp32
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import benchmark
import run_blade
from backends import base
from benchmark import RunFailed
from detectors.inputs import View
from errors import InputError, Unsupported
from measure import protocol
from measure.progress import Progress
from measure.run import load_prepared
from measure.worker import CALL_LIMIT_S, PREPARE_LIMIT_S, Command, Host, Worker
from models import MODELS
from results.environment import default_threads
from results.tables import Table, left, markdown, right

if TYPE_CHECKING:
    from detectors.export import Export

OTHERS = {"openvino": "benchmark_app", "onnxruntime": "bare session loop"}
COLUMNS = (
    *left("engine", "other"),
    *right("suite (ms)", "other (ms)"),
    *left("other/suite", "95% interval", "within 3%"),
)
ANSWERS = {"same": "yes", "faster": "no", "slower": "no", "inconclusive": "inconclusive"}


def main() -> int:
    """Prints one row for each engine; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="testRetinaNet")
    parser.add_argument("--engine", nargs="+", choices=list(OTHERS))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--image-size", type=run_blade.image_size, metavar="HxW")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=11, help="of each side in a round")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    if min(options.rounds, options.calls, options.threads) < 1:
        parser.error("--rounds, --calls and --threads must be at least 1")
    try:
        with tempfile.TemporaryDirectory(prefix="check_engines_") as folder:
            rows = compare_all(options, Path(folder))
    except (InputError, Unsupported, RunFailed) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    note = (
        f"{options.model} {options.precision}, threads: {options.threads}; medians of "
        f"{options.rounds} rounds, each the median of {options.calls} calls a side"
    )
    print(markdown(Table("The engines' own tools", COLUMNS, tuple(rows), (note,))))
    return 0


def compare_all(options: argparse.Namespace, folder: Path) -> List[Tuple[str, ...]]:
    """Rows of the table. An engine that was not asked for by name may be left out."""
    progress, engines = Progress(), []
    for engine in options.engine or OTHERS:
        backend = base.load(engine)
        reason = backend.unavailable("cpu")
        if reason is None and options.precision not in backend.precisions["cpu"]:
            reason = f"{backend.label} has no {options.precision} on a CPU"
        if reason is None:
            engines.append(engine)
        elif options.engine:
            raise InputError(reason)
        else:
            progress.say(f"{engine} is left out: {reason}")
    if not engines:
        raise InputError("no engine can be checked here; see --engine")
    progress.say(f"{options.model}: weights and inputs")
    with contextlib.closing(Host(Command.own(), folder / "host.log")) as host:
        prepare_model(host, options, folder)
        return [compare(engine, options, host, folder, progress) for engine in engines]


def prepare_model(host: Host, options: argparse.Namespace, folder: Path) -> None:
    """Leaves weights and inputs of a test model in a folder: synthetic, of the default image.

    Args:
        options: its `model`, `image_size` and `threads` count.
    """
    request = protocol.PrepareModel(
        model=MODELS[options.model],
        source="bundled",
        weights="synthetic",
        images=(),
        view=View(options.image_size),
        detections=100,
        seed=0,
        folder=str(folder),
    )
    with host.worker(folder / "model.log", options.threads) as worker:
        worker.ask(request, PREPARE_LIMIT_S)


def prepare_run(worker: Worker, job: protocol.PrepareRun) -> None:
    """Makes a worker ready to be called: prepared, and warm."""
    worker.ask(job, PREPARE_LIMIT_S)
    worker.ask(protocol.Warm.by(benchmark.WarmUp.on("cpu")), PREPARE_LIMIT_S)


def compare(
    engine: str, options: argparse.Namespace, host: Host, folder: Path, progress: Progress
) -> Tuple[str, ...]:
    """The row of one engine: both sides take turns."""
    job = protocol.PrepareRun(
        model=MODELS[options.model],
        backend=engine,
        precision=options.precision,
        device="cpu",
        source="bundled",
        folder=str(folder),
    )
    progress.say(f"{engine}: preparing both sides")
    with host.worker(folder / f"{engine}.log", options.threads) as worker:
        prepare_run(worker, job)
        model, images = write_model(job)
        with other_side(job, options.threads, model, images) as other:
            calls = {
                "other": lambda: other(options.calls),
                "suite": lambda: suite(worker, options.calls),
            }
            rule = benchmark.StopRule.fixed(options.rounds)
            with progress.rounds(engine, rule) as advance:
                rounds = benchmark.run_rounds(calls, "other", rule, seed=0, progress=advance)
    for side, reason in rounds.failures.items():
        raise RunFailed(f"{engine}, {side}: {reason}")
    ratio = benchmark.speedup(rounds.samples["other"], rounds.samples["suite"], seed=0)
    medians = [1000 * statistics.median(rounds.samples[side]) for side in ("suite", "other")]
    interval = "too few rounds" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
    return (
        engine,
        OTHERS[engine],
        *(f"{median:.2f}" for median in medians),
        f"{ratio.ratio:.3f}",
        interval,
        ANSWERS[ratio.verdict],
    )


def suite(worker: Worker, calls: int) -> float:
    """The median seconds of calls as the suite times them, after one that is not counted."""
    times = [worker.ask(protocol.TimedCalls()).seconds[0] for _ in range(1 + calls)]
    return statistics.median_low(times[1:])  # What benchmark_app calls a median.


def write_model(job: protocol.PrepareRun) -> Tuple[str, List[str]]:
    """Writes the model that the suite's worker compiles, and its images, to files.

    Returns:
        the path of the model, and those of the images, float32 3 x H x W, as `.npy`.
    """
    from backends import onnxruntime, openvino

    folder = Path(job.folder)
    export = export_of(job)
    images = [str(folder / f"image_{number}.npy") for number in range(len(export.inputs))]
    for path, image in zip(images, export.inputs):
        np.save(path, image.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Those of tracing go to the log of the suite's worker.
        if job.backend == "openvino":
            from openvino import save_model

            model = folder / "model.xml"
            converted = openvino.convert(export.script_module(), export)
            save_model(converted, model, compress_to_fp16=False)
        else:
            model = folder / "model.onnx"
            model.write_bytes(onnxruntime.convert(export.script_module(), export))
    return str(model), images


def export_of(job: protocol.PrepareRun) -> Export:
    """The export of the suite's worker, in this process: with the same weights and inputs."""
    from detectors.build import build

    state, inputs = load_prepared(Path(job.folder))
    return build(MODELS[job.model], state, "the weights", inputs, job.source)


@contextlib.contextmanager
def other_side(
    job: protocol.PrepareRun, threads: int, model: str, images: List[str]
) -> Iterator[Callable[[int], float]]:
    """A function that makes so many calls outside of the suite and returns the median seconds."""
    if job.backend == "openvino":
        yield lambda calls: benchmark_app(job, threads, model, images, calls)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:

        def call(calls: int) -> float:
            try:
                arguments = model, tuple(images), threads, calls
                return process.submit(session_loop, *arguments).result()
            except BrokenProcessPool:
                raise RunFailed("the process died") from None

        yield call


def benchmark_app(
    job: protocol.PrepareRun, threads: int, model: str, images: List[str], calls: int
) -> float:
    """The median seconds that OpenVINO's own benchmark reports, after one call uncounted.

    Raises:
        benchmark.RunFailed: it failed, took too long, or did not use the images.
    """
    from backends.openvino import HINTS

    folder = Path(model).parent
    settings: Dict[str, Any] = {
        "-m": model,
        "-i": ",".join(images),
        "-ip": "f32",  # Otherwise it takes an input with 3 channels for one of uint8.
        "-d": "CPU",
        "-api": "sync",
        # Threads are only taken without a hint; the plugin's own default is that of latency.
        "-hint": "none",
        "-nstreams": 1,
        "-nthreads": threads,
        "-infer_precision": HINTS[job.precision],
        "-niter": calls,
        "-report_type": "no_counters",
        "-report_folder": folder,
        "-json_stats": "true",
    }
    program = "import sys; from openvino.tools.benchmark.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program]
    command += [str(part) for setting in settings.items() for part in setting]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=CALL_LIMIT_S,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"benchmark_app took longer than {CALL_LIMIT_S:g} s") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0:
        reasons = [line for line in lines if not line.startswith("[ INFO ]")]
        raise RunFailed(f"benchmark_app failed: {(reasons or ['it does not say why'])[-1].strip()}")
    if any("random values" in line for line in lines):
        raise RunFailed("benchmark_app filled an input with random values")
    report = json.loads((folder / "benchmark_report.json").read_text())
    return float(report["execution_results"]["latency (ms)"]) / 1000


@functools.lru_cache(maxsize=None)
def open_session(graph: str, images: Tuple[str, ...], threads: int) -> Tuple[Any, Dict[str, Any]]:
    """A plain inference session and what to feed it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return session, dict(zip(names, map(np.load, images)))


def session_loop(graph: str, images: Tuple[str, ...], threads: int, calls: int) -> float:
    """The median seconds of `session.run` in a loop, after one call that is not counted."""
    session, feeds = open_session(graph, images, threads)
    session.run(None, feeds)
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    return statistics.median_low(times)


if __name__ == "__main__":
    sys.exit(main())
