"""One process per run: prepare it, make one timed call when asked, hand over its detections.

The parent keeps a `Worker` for each process and talks to it in turns. Whatever happens to the
process (a crash in an engine, a hang, the system killing it for its memory) becomes a
`benchmark.RunFailed` in the parent, and costs that run only.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

from benchmark import RunFailed, WarmUp, warm_up
from errors import InputError, Unsupported, sentence

PREPARE_LIMIT_S = 1800.0
# A call of the slowest test model takes some ten seconds on two cores; at `max` ten times that.
CALL_LIMIT_S = 600.0
# Calls at other sizes than the one that is timed are repeated if they are shorter than this.
SHORT_CALL_S = 1.0


@dataclass(frozen=True)
class Job:
    """What a worker prepares.

    Attributes:
        model: name of the test model.
        backend, precision, device: as on the command line.
        source: `bundled` or `detectron2`.
        prepared: file with the weights and tuning inputs, written by `prepare_model`.
        threads: CPU threads that it may use.
        cache: directory in which engines are kept between invocations, or None.
    """

    model: str
    backend: str
    precision: str
    device: str
    source: str
    prepared: str
    threads: int
    cache: Optional[str] = None


@dataclass(frozen=True)
class ModelRequest:
    """What the worker that prepares a model needs: see `models`."""

    model: str
    source: str
    weights: str
    images: Tuple[str, ...]
    image_size: Optional[Tuple[int, int]]
    detections: int
    seed: int
    threads: int
    prepared: str


# In the worker's process ----------------------------------------------------------------------


def prepare_model(request: ModelRequest) -> Dict[str, Any]:
    """Makes weights and inputs, keeps them for the workers, and computes the reference.

    Returns:
        `reference`: for each input, of which `timed` names those that are timed, the flat tuple of
        eager fp32 as arrays; `sizes`: their image sizes; `flops`: of a call with each that is
        timed, or None where PyTorch does not count them; `image_digests` of these;
        `weights_digest`; `note`: where the weights come from.
    """
    import torch

    import models
    from backends.torch import count_flops
    from catalog import MODELS, timed

    model = MODELS[request.model]
    paths = [Path(path) for path in request.images]
    images = models.read_images(paths, request.image_size, request.seed)
    inputs = models.inputs(images, model.images_per_call, request.seed)
    names = timed(inputs)
    weights = models.find_weights(model, request.weights, inputs, request.detections, request.seed)
    torch.save({"state": weights.state, "name": weights.name, "inputs": inputs}, request.prepared)
    export = models.build(model, weights.state, weights.name, inputs, request.source)
    with torch.no_grad():
        reference = {name: _arrays(export.eager(*images)) for name, images in inputs.items()}
    return {
        "reference": reference,
        "sizes": models.describe_sizes(inputs),
        "timed": names,
        "flops": {name: count_flops(export.eager, inputs[name]) for name in names},
        "image_digests": {name: digest(inputs[name]) for name in names},
        "weights_digest": digest([weights.state[name] for name in sorted(weights.state)]),
        "fields": export.fields,
        "note": weights.note,
    }


class Run:
    """A prepared run: an optimized export that can be called, timed and asked for detections."""

    def __init__(self, job: Job) -> None:
        import torch

        import models
        from backends import base
        from catalog import MODELS, TUNING, timed

        start = time.perf_counter()
        kept = torch.load(job.prepared, **({"weights_only": True} if _has_weights_only() else {}))
        device = torch.device(job.device)
        self.inputs = {
            name: tuple(image.to(device) for image in images)
            for name, images in kept["inputs"].items()
        }
        self.timed = timed(self.inputs)
        self.device = job.device
        tuning = {name: self.inputs[name] for name in TUNING}
        self.export = models.build(
            MODELS[job.model], kept["state"], kept["name"], tuning, job.source
        )
        self.export.other_inputs = [self.inputs[name] for name in self.timed if name != "opt"]
        self.export.eager.to(device)
        backend = base.load(job.backend)
        run = (self.export, job.precision, job.device)
        cache = base.cache_folder(Path(job.cache), backend, *run) if job.cache else None
        built = time.perf_counter()
        self.optimized = backend.optimize(*run, cache)
        self.synchronize()
        self.seconds = {
            "build": built - start,
            **self.optimized.seconds,
            "total": time.perf_counter() - start,
        }
        self.versions = backend.versions()

    def describe(self) -> Dict[str, Any]:
        """What is known of it, in the words of the result file."""
        label = self.optimized.label
        return {
            **({} if label is None else {"label": label}),
            "effective_precision": self.optimized.precision,
            "provider": self.optimized.provider,
            "threads": self.optimized.threads,
            "coverage": self.optimized.coverage,
            "prepare": self.seconds,
            "cached": self.optimized.cached,
            "versions": self.versions,
            "artifacts": self.optimized.artifacts,
        }

    def synchronize(self) -> None:
        """Waits for the device, so that the clock does not stop before the work does."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def timed_call(self) -> float:
        """Seconds of one call at `opt`, images in, detections out."""
        return self._timed(self.export.inputs)[0]

    def timed_calls(self) -> List[float]:
        """The same for each of the inputs that are timed, one after the other."""
        return [self._timed(self.inputs[name])[0] for name in self.timed]

    def warm_up(self, rule: WarmUp) -> List[float]:
        """Seconds of calls until it is warm; with several inputs, means over them."""
        return warm_up(lambda: fmean(self.timed_calls()), rule)

    def _timed(self, images: Tuple[Any, ...]) -> Tuple[float, Any]:
        self.synchronize()
        start = time.perf_counter()
        outputs = self.optimized.call(*images)
        self.synchronize()
        return time.perf_counter() - start, outputs

    def detect(self, name: str) -> Dict[str, Any]:
        """What is found in an input, `min`, `opt`, `max` or another, and how long that takes.

        Returns:
            `outputs`: the flat tuple as arrays; `seconds`: of a few calls, without the first
            where calls are short, as engines pick their kernels when they first see a size.
        """
        images = self.inputs[name]
        first, outputs = self._timed(images)
        short = first < SHORT_CALL_S
        seconds = [self._timed(images)[0] for _ in range(2)] if short else [first]
        return {"outputs": _arrays(outputs), "seconds": seconds}

    def stages(self, calls: int) -> List[Dict[str, float]]:
        """Seconds of each stage of the eager module, for each of some calls of the baseline."""
        from stages import time_stages

        eager, images = self.export.eager, self.export.inputs
        return time_stages(eager, self.optimized.call, images, self.synchronize, calls)

    def trace(self, path: str) -> None:
        """Writes a Chrome trace of one call by PyTorch's profiler, which slows the process down."""
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self.timed_call()
        profile.export_chrome_trace(path)

    def precision(self) -> str:
        """The precision that it really computes in."""
        read = self.optimized.read_precision
        return self.optimized.precision if read is None else read()

    def coverage(self) -> Dict[str, Any]:
        """How much of the graph the engine took, with what showed in running."""
        read = self.optimized.read_coverage
        return {**self.optimized.coverage, **({} if read is None else read())}

    def artifact_mb(self) -> Optional[float]:
        """Size in MiB of what was compiled; None where there is no such file."""
        read = self.optimized.read_artifact_bytes
        size = None if read is None else read()
        return None if size is None else size / 2**20

    def gpu(self) -> Dict[str, Any]:
        """What the GPU is and how it is doing now; empty where that cannot be read."""
        import gpu

        return {**(gpu.describe() or {}), **(gpu.state() or {})}

    def peak_memory(self) -> Dict[str, float]:
        """Largest memory so far in MiB: resident, and allocated on the device."""
        import resource

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = {"peak_memory_mb": kib / 1024}
        if self.device == "cuda":
            import torch

            memory["peak_device_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        return memory


def digest(tensors: Iterable[Any]) -> str:
    """Tells one image, or one set of weights, from another: 16 hexadecimal digits."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(tensor.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]


def _arrays(outputs: Any) -> List[Any]:
    """Tensors as NumPy arrays; NumPy has no bfloat16, and float32 holds all of its values."""
    import torch

    if not isinstance(outputs, (tuple, list)):
        return [outputs]
    tensors = [x.float() if x.dtype == torch.bfloat16 else x for x in outputs]
    return [x.detach().cpu().numpy() for x in tensors]


def _has_weights_only() -> bool:
    import inspect

    import torch

    return "weights_only" in inspect.signature(torch.load).parameters


def _main(connection: Any, log: str, threads: int) -> None:
    """Answers the parent's requests until it says stop or is gone."""
    _isolate(log)
    run: Optional[Run] = None
    try:
        while True:
            name, argument = connection.recv()
            if name == "stop":
                return
            try:
                if name == "prepare_model":
                    _use_threads(threads)
                    answer: Any = prepare_model(argument)
                elif name == "prepare":
                    _use_threads(threads)
                    run = Run(argument)
                    answer = run.describe()
                elif name == "peak":
                    from roofline import measure_peak

                    _use_threads(threads)
                    answer = measure_peak(*argument)
                elif name == "gpu_name":
                    import gpu

                    answer = gpu.name()
                elif name == "warm_up":
                    answer = run.warm_up(argument)
                else:
                    answer = getattr(run, name)(*argument)
                connection.send(("ok", answer))
            except (InputError, Unsupported) as error:
                connection.send((type(error).__name__, str(error)))
            except Exception as error:
                traceback.print_exc()
                connection.send(("failed", sentence(error)))
    except (EOFError, BrokenPipeError):
        return  # The parent is gone.


def _isolate(log: str) -> None:
    """Keeps the process out of the parent's terminal and from outliving it."""
    # What engines leave in the directory for temporary files goes with the log, even if the process
    # is killed; and TorchInductor, which looks there for earlier code, finds none.
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path(log).parent)
    # Engines write to the file descriptors, past sys.stdout.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


# In the parent's process -----------------------------------------------------------------------


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C is for the parent: a process that is started with SIGINT blocked never sees it.

    Here it waits until the process has got all that it needs to start. Blocking alone does not do:
    the system may hand the signal to another thread, of a library, which does not block it.
    """
    held: List[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda *args: held.append(1)) if in_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


class Worker:
    """A process for one run.

    Args:
        log: file that takes what the process prints.
        threads: CPU threads that it may use.
    """

    def __init__(self, log: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.log = log
        self.process = context.Process(target=_main, args=(theirs, str(log), threads), daemon=True)
        try:
            with _interrupts_held():
                self.process.start()
        except KeyboardInterrupt:
            self.process.kill()
            raise
        theirs.close()

    def ask(self, name: str, argument: Any = (), limit_s: float = CALL_LIMIT_S) -> Any:
        """Sends a request and waits for its answer.

        Raises:
            benchmark.RunFailed: the process failed, died, or took longer than `limit_s`.
            errors.InputError, errors.Unsupported: as raised there.
        """
        try:
            self._connection.send((name, argument))
            if not self._connection.poll(limit_s):
                self.kill()
                raise RunFailed(f"no answer within {limit_s:g} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            raise RunFailed(self._cause_of_death()) from None
        if kind == "ok":
            return answer
        raise {"InputError": InputError, "Unsupported": Unsupported}.get(kind, RunFailed)(answer)

    def _cause_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"the process ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"

    def stop(self) -> None:
        """Ends the process, politely where it listens."""
        with contextlib.suppress(OSError):
            self._connection.send(("stop", None))
        self.process.join(2)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)
        self._connection.close()


def prepare(worker: Worker, job: Job) -> Dict[str, Any]:
    """Prepares a run; returns `Run.describe()`."""
    return worker.ask("prepare", job, PREPARE_LIMIT_S)


def warm(worker: Worker, rule: WarmUp) -> List[float]:
    """Warms a run up; returns the seconds of the calls."""
    return worker.ask("warm_up", rule, PREPARE_LIMIT_S)
