#!/usr/bin/env python3
"""The worker's side: the only part of the suite that runs in another environment.

The parent starts it as a command, `<interpreter> measure/run.py`. It says hello, imports PyTorch,
torchvision and NumPy, and computes nothing: it is the host of its environment. For every run it
forks a worker, which so starts at once; it hands lines on between parent and workers, tells how a
worker died, and ends them all when its input closes. Standard output belongs to the protocol; what
engines print goes to the log of their worker.

Valid on Python 3.8 and PyTorch 2.0.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import selectors
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Callable, Dict, Iterable, Iterator, NoReturn, Optional, Tuple, Type

# Python puts a script's folder first: its `profile` would stand in for the standard library's.
_HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)

from benchmark import warm_up
from errors import InputError, Unsupported, first_cause
from measure import protocol
from measure.copies import Copier, pinned
from measure.protocol import CHUNK, HOST, PROTOCOL, STOP_S
from results.record import Copies, Coverage, GpuState, Preparation

# That this process may use. Found out here, as PyTorch has not been imported yet.
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
# Calls at other sizes than the one that is timed are repeated if they are shorter than this.
SHORT_CALL_S = 1.0
# A longer one is repeated if, for its pixels, it took this many times what a timed call takes.
MOST_EXPECTED = 2.0
# A turn begins with calls that are not counted, of so long together. A worker has stood still while
# the others had their turns, and its caches and clocks with it: on a GPU calls of 10 to 20 ms took
# 1.2 to 1.5 times as long in the rounds as one after the other. A longer call wakes by itself.
AWAKE_S = 0.05
MOST_WAKING_CALLS = 10


# Preparing a model -----------------------------------------------------------------------------


def survey(request: protocol.Survey) -> protocol.Surveyed:
    """What there is in this environment.

    Raises:
        errors.InputError: a device or a source was asked for that cannot be had.
    """
    import torch

    from backends import base
    from detectors.build import resolve_source

    has_cuda = torch.cuda.is_available()
    if request.device == "cuda" and not has_cuda:
        raise InputError("CUDA was asked for, and PyTorch sees no CUDA device here")
    device = request.device or ("cuda" if has_cuda else "cpu")
    available = {}
    for name in request.backends:
        backend = base.load(name)
        reason = backend.unavailable(device)
        if reason is None and device not in backend.devices:
            reason = f"{backend.label} does not run on {device}"
        versions = backend.versions() if reason is None else {}
        available[name] = protocol.Availability(reason, versions)
    return protocol.Surveyed(
        device=device,
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        source=resolve_source(request.source),
        python=platform.python_version(),
        backends=available,
        cudnn_benchmark=torch.backends.cudnn.benchmark if device == "cuda" else None,
    )


def inspect_module(request: protocol.InspectModule) -> protocol.Inspected:
    """What there is in a file that a detector was exported to.

    Raises:
        errors.InputError: nothing that can be taken.
    """
    from detectors.module_file import inspect

    return protocol.Inspected(inspect(Path(request.path), request.fields, request.is_trusted))


def read_input(request: protocol.ReadInput) -> protocol.InputOf:
    """How a model that Detectron2 builds wants its images.

    Raises:
        errors.InputError: Detectron2 is not usable, or does not know what its configuration says.
    """
    from detectors.build import detectron2_input

    return protocol.InputOf(*detectron2_input(request.model))


def check_weights(request: protocol.CheckWeights) -> protocol.Done:
    """Reads a checkpoint, and loads it into each architecture.

    Raises:
        errors.InputError: it cannot be read, or is of another architecture.
    """
    from detectors.build import check_weights

    check_weights(request.models, request.weights)
    return protocol.Done()


def prepare_model(request: protocol.PrepareModel) -> protocol.ModelFacts:
    """Makes weights and inputs, keeps them for the workers, and computes the reference.

    Raises:
        errors.InputError: image or weights cannot be had.
    """
    import torch

    from backends.torch import count_flops
    from detectors import build, inputs
    from models import BLANK, DRAWN, timed

    _keep_freed_memory()
    model, folder = request.model, Path(request.folder)
    paths = [Path(path) for path in request.images]
    images = inputs.read_images(paths, request.view, request.seed)
    of = (images, model.images_per_call, request.seed, request.view)
    calls = inputs.inputs(*of, request.drawn)
    names = timed(calls)
    weights = build.find_weights(model, request.weights, calls, request.detections, request.seed)
    _save_arrays(folder / "state.npz", _arrays(weights.state))
    export = build.build(model, weights.state, weights.name, calls, request.source)
    drawn_failure = None
    for name, call in list(calls.items()):
        try:
            with _told(export, call), torch.no_grad():
                found = export.eager(*call)
                _check_detections(export, found, call)
                if name == "opt":
                    _check_repeats(export, found, call)
                found = export.completed(found, call)
        except InputError as error:
            if name not in DRAWN:
                raise
            # It need not take every size between those that were asked for.
            drawn_failure = str(error)
            del calls[name]
            continue
        _save_outputs(folder / f"reference-{name}.npz", found)
    blank_failure = None
    try:
        with torch.no_grad():
            blank = _blank(export, inputs.plain(calls["min"]))
        if blank is not None:
            calls[BLANK], found = blank
            found = export.completed(found, calls[BLANK])
            _save_outputs(folder / f"reference-{BLANK}.npz", found)
    except Exception as error:
        if model.module is None:
            raise
        blank_failure = first_cause(error)
    flat = {f"{name}/{i}": x for name, call in calls.items() for i, x in enumerate(call)}
    _save_arrays(folder / "inputs.npz", _arrays(flat))
    return protocol.ModelFacts(
        sizes=inputs.describe_sizes(calls),
        timed=tuple(names),
        flops={name: count_flops(export.eager, calls[name]) for name in names},
        image_digests={name: inputs.digest(x.numpy() for x in calls[name]) for name in names},
        weights=weights.record,
        fields=export.compared_fields,
        given=export.fields,
        score_threshold=export.score_threshold,
        limit=export.limit,
        blank_failure=blank_failure,
        drawn_failure=drawn_failure,
    )


def _blank(export: Any, plain: Iterable[Tuple[Any, ...]]) -> Optional[Tuple[Any, Any]]:
    """The first of some calls in which nothing is found, and what it gives; None: there is none."""
    # A proposal network always proposes something, and a map labels each pixel of any picture.
    if "scores" not in export.fields:
        return None
    for call in plain:
        found = export.eager(*call)
        if not any(len(found[at]) for at in _places("scores", export.fields, found)):
            return call, found
    return None


@contextlib.contextmanager
def _told(export: Any, call: Tuple[Any, ...]) -> Iterator[None]:
    """While it lasts, what fails in a file of the user's is an error of the input."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if export.model.module is None:
            raise
        raise InputError(export.failure(call[0], error)) from None


def _check_detections(export: Any, found: Any, call: Tuple[Any, ...]) -> None:
    """Makes sure that what the suite has not built itself gives detections.

    Raises:
        errors.InputError: it does not.
    """
    from measure import verify

    model = export.model
    if model.module is None and model.detectron2 is None:
        return
    if model.module is not None and len(found) != len(export.fields):
        raise InputError(
            f"{export.name_of_file} gives {len(found)} tensors, and --fields names "
            f"{len(export.fields)}"
        )
    found = export.completed(found, call)
    try:
        arrays = _arrays({str(place): x for place, x in enumerate(found)})
        verify.split(list(arrays.values()), export.compared_fields)
    except verify.Malformed as error:
        fields = ",".join(export.fields)
        if model.module is None:
            raise InputError(
                f"{model.config} gives {fields}, which are no detections to compare: {error}"
            ) from None
        raise InputError(
            f"{export.name_of_file} gives no detections, taken for {fields}: {error} (--fields "
            "says what they are)"
        ) from None


def _check_repeats(export: Any, found: Any, call: Tuple[Any, ...]) -> None:
    """Makes sure that what the suite has not built itself finds the same once more.

    Else whatever differs would be put down to an engine.

    Raises:
        errors.InputError: it does not.
    """
    from measure import verify

    model = export.model
    if model.module is None and model.detectron2 is None:
        return
    both = [
        list(_arrays({str(place): x for place, x in enumerate(each)}).values())
        for each in (export.completed(x, call) for x in (found, export.eager(*call)))
    ]
    # What a list may hold at all is another question.
    agreement = verify.verify(*both, export.compared_fields, "fp32", None, None)
    if agreement.is_wrong:
        name = model.config if model.module is None else export.name_of_file
        raise InputError(
            f"{name} does not reproduce itself, so that no engine can be held against it: called "
            f"with the same image again, it finds something else ({agreement.reason})"
        )


def _places(field: str, fields: Tuple[str, ...], outputs: Any) -> range:
    """Where a flat tuple has a field of each of its images."""
    return range(fields.index(field), len(outputs), len(fields))


def _keep_freed_memory() -> None:
    """Lets this process reuse what it has freed, which saves a third of the time at large sizes.

    By default glibc hands large blocks back to the system, and every layer asks for new ones. What
    is timed leaves that to glibc, as its users do: see `_raise_mmap_threshold`.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        mmap_max, trim_threshold = -4, -1  # Of malloc.h.
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap_max, 0)
            libc.mallopt(trim_threshold, 2**31 - 1)


def _arrays(tensors: Dict[str, Any]) -> Dict[str, Any]:
    """Tensors as NumPy arrays: float32 holds all values of types that NumPy does not have."""
    import torch

    known = (torch.float16, torch.float32, torch.float64)
    return {
        name: (x.float() if x.is_floating_point() and x.dtype not in known else x)
        .detach()
        .cpu()
        .numpy()
        for name, x in tensors.items()
    }


def _save_arrays(path: Path, arrays: Dict[str, Any]) -> None:
    import numpy

    numpy.savez(str(path), **arrays)


def _save_outputs(path: Path, outputs: Any) -> None:
    _save_arrays(path, _arrays({str(i): x for i, x in enumerate(outputs)}))


def load_prepared(folder: Path) -> Tuple[Dict[str, Any], Dict[str, Tuple[Any, ...]]]:
    """What `prepare_model` has left in a folder.

    Returns:
        parameters by Detectron2's names; and input -> the images of the call. All are tensors.
    """
    inputs: Dict[str, Tuple[Any, ...]] = {}
    for place, image in _load_tensors(folder / "inputs.npz").items():  # `opt/0`
        name = place.rsplit("/", 1)[0]
        inputs[name] = (*inputs.get(name, ()), image)
    return _load_tensors(folder / "state.npz"), inputs


def _load_tensors(path: Path) -> Dict[str, Any]:
    import numpy
    import torch

    with numpy.load(str(path), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


# A run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """A call that was timed.

    Attributes:
        outputs: in host memory, on whatever device they were computed.
        copies: seconds of it that a GPU copied; None on a CPU.
    """

    seconds: float
    outputs: Any
    copies: Optional[Copies] = None


def waking_calls(last_s: Optional[float]) -> int:
    """How many calls are made before one that is counted.

    Args:
        last_s: seconds of the one before; None: there was none.
    """
    if not last_s:
        return 0
    return min(MOST_WAKING_CALLS, int(AWAKE_S / last_s))


class Run:
    """A prepared run: an optimized export that can be called, timed and asked for detections."""

    def __init__(self, request: protocol.PrepareRun) -> None:
        import torch

        from backends import base
        from detectors import build
        from detectors.inputs import Calls
        from models import TUNING, timed

        start = time.perf_counter()
        self.backend = base.load(request.backend)
        if not self.backend.in_pytorch:
            _free_from_binding()
        device = torch.device(request.device)
        state, inputs = load_prepared(Path(request.folder))
        self.inputs = {name: tuple(x.to(device) for x in call) for name, call in inputs.items()}
        self.timed = timed(self.inputs)
        # What a call begins with.
        self.given = self.inputs
        self.copier: Optional[Copier] = None
        if request.device == "cuda":
            self.given = {name: pinned(call) for name, call in inputs.items()}
            self.copier = Copier()
        self.last_s: Dict[str, float] = {}
        self.device, self.asked = request.device, request.precision
        tuning = {name: self.inputs[name] for name in TUNING}
        self.export = build.build(request.model, state, "the weights", tuning, request.source)
        self.export.other_inputs = [self.inputs[name] for name in self.timed if name != "opt"]
        if request.calibration is not None:
            count = request.model.images_per_call
            self.export.calibration = Calls(Path(request.calibration), count)
        if request.validation is not None:
            self.export.validation = _validation(request.validation, self.export)
        self.export.eager.to(device)
        run = (self.export, request.precision, request.device)
        cache = request.cache and base.cache_folder(Path(request.cache), self.backend, *run)
        built = time.perf_counter()
        if request.saved is not None and Path(request.saved).is_dir():
            self.optimized = self.backend.load(*run, Path(request.saved))
        else:
            self.optimized = self.backend.optimize(*run, cache or None)
        if self.optimized.context is not None:
            self.optimized.context().__enter__()  # For life.
        self.synchronize()
        self.seconds = Preparation(
            build=built - start,
            total=time.perf_counter() - start,
            **asdict(self.optimized.seconds),
        )
        _raise_mmap_threshold()
        self.resident_warm_mb: Optional[float] = None

    def facts(self) -> protocol.RunFacts:
        """What is known of it."""
        from backends.base import computed_in

        return protocol.RunFacts(
            label=self.optimized.label,
            precision=computed_in(self.optimized.precision, self.device),
            provider=self.optimized.provider,
            threads=self.optimized.threads,
            coverage=self.optimized.coverage,
            prepare=self.seconds,
            cached=self.optimized.cached,
            python=platform.python_version(),
            versions=self.backend.versions(),
            artifacts=self.optimized.artifacts,
            control=self.optimized.control,
        )

    def save(self, request: protocol.Save) -> protocol.Done:
        """Saves the engine, if it can be."""
        if self.optimized.save is not None:
            # There is no folder of which a part is missing.
            unfinished = Path(f"{request.folder}.new")
            unfinished.mkdir()
            self.optimized.save(unfinished)
            unfinished.rename(request.folder)
        return protocol.Done()

    def synchronize(self) -> None:
        """Waits for the device, so that the clock does not stop before the work does."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def timed_calls(self, request: Optional[protocol.TimedCalls] = None) -> protocol.Seconds:
        """Seconds of a call for each timed input, images in, detections out.

        Short ones come after others that are not counted, see `AWAKE_S`.
        """
        calls = []
        for name in self.timed:
            self._wake(name)
            calls.append(self._counted(name))
        copies = tuple(call.copies for call in calls if call.copies is not None)
        return protocol.Seconds(tuple(call.seconds for call in calls), copies)

    def warm(self, request: protocol.Warm) -> protocol.Seconds:
        """Seconds of calls until it is warm; with several inputs, means over them."""
        times = warm_up(
            lambda: fmean(self._counted(name).seconds for name in self.timed), request.rule
        )
        self.resident_warm_mb = resident_mb()
        return protocol.Seconds(tuple(times))

    def _expected_s(self, images: Tuple[Any, ...]) -> Optional[float]:
        """Seconds for so many pixels, by the last call that was timed; None: there was none."""
        name = self.timed[0]
        if name not in self.last_s:
            return None
        return self.last_s[name] / _pixels(self.inputs[name]) * _pixels(images)

    def _wake(self, name: str) -> None:
        """Makes the calls that come before a short one which counts."""
        for _ in range(waking_calls(self.last_s.get(name))):
            self._timed(self.given[name])

    def _counted(self, name: str) -> Timed:
        """A call for a timed input, whose seconds are kept for the next turn."""
        call = self._timed(self.given[name])
        self.last_s[name] = call.seconds
        return call

    def _timed(self, images: Tuple[Any, ...]) -> Timed:
        """A call, from images in host memory to detections there.

        Args:
            images: on a GPU in pinned memory.
        """
        self.synchronize()
        start = time.perf_counter()
        if self.copier is None:
            outputs = self.optimized.call(*images)
        else:
            # An engine's own memory may be reused when nobody has it: not before it was copied.
            found = self.optimized.call(*self.copier.upload(images))
            outputs = self.copier.download(found)
        self.synchronize()
        seconds = time.perf_counter() - start
        return Timed(seconds, outputs, self.copier and self.copier.seconds())

    def call_new_size(self, request: protocol.CallNewSize) -> protocol.CalledNewSize:
        """Calls the images of a timed input at a new size; each is made for this call alone."""
        from detectors.inputs import mirrored

        name = self.timed[request.place % len(self.timed)]
        images = tuple(mirrored(image, request.size) for image in self.given[name])
        if self.copier is not None:
            images = pinned(images)
        self._wake(name)
        seconds = self._timed(images).seconds
        del images
        return protocol.CalledNewSize(seconds, resident_mb())

    def detect(self, request: protocol.Detect) -> protocol.Detected:
        """Calls an input, and keeps what is found; short calls are repeated for their time.

        Engines pick their kernels when they first see a size, so that the first call is told apart
        from the later ones, if there are any.
        """
        images = self.given[request.name]
        first = self._timed(images)
        seconds = (first.seconds,)
        count = 2
        if first.seconds >= SHORT_CALL_S:
            expected = self._expected_s(images)
            count = int(expected is not None and first.seconds > MOST_EXPECTED * expected)
        if request.repeat and count:
            seconds = tuple(self._timed(images).seconds for _ in range(count))
        flaw = _flaw(first.outputs)
        if flaw is None:
            _save_outputs(Path(request.outputs), self.export.completed(first.outputs, images))
        return protocol.Detected(first.seconds, seconds, flaw)

    def detect_batch(self, request: protocol.DetectBatch) -> protocol.Done:
        """Calls images of a data set, and keeps what is found in each.

        Raises:
            ValueError: what came out is malformed.
        """
        images = _load_tensors(Path(request.file))
        names, count = list(images), self.export.model.images_per_call
        fields, found = len(self.export.compared_fields), {}
        for start in range(0, len(names), count):
            own = names[start : start + count]
            tensors = self._call_of([images[name] for name in own])
            outputs = self.optimized.call(*tensors)
            flaw = _flaw(outputs)
            if flaw is not None:
                raise ValueError(f"the output is malformed: {flaw}")
            outputs = self.export.completed(outputs, tensors)
            for place, name in enumerate(own):
                each = outputs[place * fields : (place + 1) * fields]
                found.update({f"{name}/{at}": x.cpu() for at, x in enumerate(each)})
        _save_arrays(Path(request.outputs), _arrays(found))
        return protocol.Done()

    def _call_of(self, images: Any) -> Tuple[Any, ...]:
        """A call with images of a data set; one that is not full has its last several times."""
        import torch

        missing = self.export.model.images_per_call - len(images)
        full = [*images, *images[-1:] * missing]
        return tuple(x.to(self.device, torch.float32) for x in full)

    def watch(self, request: protocol.Watch) -> protocol.Watched:
        """Optimizes the detector once more, with what leaves each part, and compares the parts.

        Raises:
            errors.Unsupported: it has no such parts, or the engine cannot take it with them.
        """
        from measure.parts import watch

        images = self.inputs[request.name]
        if request.file is not None:
            images = self._call_of(list(_load_tensors(Path(request.file)).values())[:1])
        watched = watch(self.backend, self.export, self.asked, self.device, images)
        found = self.optimized.call(*images)
        sides = {"wanted": watched.wanted, "run": found, "watched": watched.found}
        flat = {
            f"{side}/{place}": x
            for side, outputs in sides.items()
            if _flaw(outputs) is None
            for place, x in enumerate(outputs)
        }
        _save_arrays(Path(request.outputs), _arrays(flat))
        return protocol.Watched(watched.differences)

    def time_stages(self, request: protocol.TimeStages) -> protocol.StageTimes:
        """Seconds of each stage of the eager module, in calls of the baseline."""
        from measure.profile import time_stages

        eager, images = self.export.eager, self.export.inputs
        call = self.optimized.call
        return protocol.StageTimes(
            tuple(time_stages(eager, call, images, self.synchronize, request.calls))
        )

    def trace(self, request: protocol.Trace) -> protocol.Done:
        """Writes a Chrome trace of one call."""
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            self._timed(self.given["opt"])
        profile.export_chrome_trace(request.path)
        return protocol.Done()

    def precision(self, request: protocol.ReadPrecision) -> protocol.EffectivePrecision:
        """The precision that it really computes in."""
        from backends.base import computed_in

        read = self.optimized.read_precision
        precision = self.optimized.precision if read is None else read()
        return protocol.EffectivePrecision(computed_in(precision, self.device))

    def coverage(self, request: protocol.ReadCoverage) -> Coverage:
        """How much of the graph the engine took, with what showed in running."""
        read = self.optimized.read_coverage
        resident = Coverage(resident_warm_mb=self.resident_warm_mb, resident_end_mb=resident_mb())
        known = self.optimized.coverage.merged(resident)
        return known if read is None else known.merged(read())

    def artifact(self, request: protocol.ReadArtifact) -> protocol.Artifact:
        """Size of what was compiled."""
        read = self.optimized.read_artifact_bytes
        size = None if read is None else read()
        return protocol.Artifact(None if size is None else size / 2**20)

    def memory(self, request: protocol.ReadMemory) -> protocol.Memory:
        """Largest memory so far."""
        import resource

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        on_device = None
        if self.device == "cuda":
            import torch

            on_device = torch.cuda.max_memory_allocated() / 2**20
        return protocol.Memory(kib / 1024, on_device)


def resident_mb() -> Optional[float]:
    """Memory of this process that is in use now, in MiB; None where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _free_from_binding() -> None:
    """Lets this process, and the threads that it starts from here on, run on all usable cores.

    Under OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY, importing PyTorch binds its thread to one
    core, and the threads that an engine starts would inherit that, all of them the same core.
    """
    if CORES:
        os.sched_setaffinity(0, CORES)


def _raise_mmap_threshold() -> None:
    """Brings glibc's allocator where it is in a process that has seen larger images.

    It asks the system for every block above a threshold, which costs a page fault for each 4 KiB of
    it, and raises the threshold to the size of such a block when that is freed, up to 32 MiB. In a
    process that has just started it depends on chance where it stands: the same calls took 387 and
    443 ms.
    """
    import torch

    limit = 32 << 20
    torch.empty(limit - 4096, dtype=torch.uint8)


def _validation(request: protocol.Validate, export: Any) -> Any:
    """What judges int8 while it is made.

    Raises:
        errors.Unsupported: what it takes is not installed here.
    """
    try:
        import pycocotools  # noqa: F401
        import scipy  # noqa: F401

        from measure.validation import Validation
    except ImportError as error:
        raise Unsupported(
            f"int8 is judged on --calibration-annotations, which needs {error.name}: pip install "
            f"{error.name}"
        ) from None
    return Validation(request, export)


def _pixels(images: Iterable[Any]) -> int:
    """Pixels of the images of a call."""
    return sum(image.shape[-2] * image.shape[-1] for image in images)


def _flaw(outputs: Any) -> Optional[str]:
    """Why a call's result is no flat tuple of tensors."""
    import torch

    if not isinstance(outputs, (tuple, list)):
        return f"a {type(outputs).__name__} instead of a tuple of tensors"
    others = [type(x).__name__ for x in outputs if not isinstance(x, torch.Tensor)]
    return f"a {others[0]} where a tensor should be" if others else None


# A worker --------------------------------------------------------------------------------------


def read_gpu(request: protocol.ReadGpu) -> GpuState:
    """What the GPU is and how it is doing now."""
    from measure import gpu

    return gpu.read()


def measure_peak(request: protocol.MeasurePeak) -> protocol.Peak:
    """Operations per second of PyTorch's matrix products."""
    from backends.base import computed_in
    from measure.profile import measure_peak

    known = request.precision, request.device
    return protocol.Peak(measure_peak(*known), computed_in(*known))


def read_batch(request: protocol.ReadBatch) -> protocol.BatchRead:
    """Reads images of a data set."""
    from measure.coco_results import read_batch

    return protocol.BatchRead(read_batch(request))


def keep_batch(request: protocol.KeepBatch) -> protocol.Done:
    """Keeps what was found in them.

    Raises:
        errors.InputError: it is nothing that can be judged.
    """
    from measure.coco_results import keep_batch

    keep_batch(request)
    return protocol.Done()


def judge(request: protocol.Judge) -> protocol.Judged:
    """Average precision of what was found."""
    from measure.coco_results import judge

    return protocol.Judged(*judge(request))


def find_worst(request: protocol.FindWorst) -> protocol.WorstFound:
    """The images in which a run differs most from the reference."""
    from measure.worst import find_worst

    return protocol.WorstFound(find_worst(request))


def keep_copy(request: protocol.KeepCopy) -> protocol.Done:
    """Writes a small copy of an image.

    Raises:
        errors.InputError: it cannot be read, or written.
    """
    from measure.coco_results import keep_copy

    keep_copy(request)
    return protocol.Done()


def cpu_time(request: protocol.ReadCpuTime) -> protocol.CpuTime:
    """Seconds of CPU so far, of this process and its children that have ended."""
    spent = os.times()
    own = time.process_time()  # To the microsecond, which the others are not.
    return protocol.CpuTime(own + spent.children_user + spent.children_system)


class Worker:
    """Answers requests: about the environment, about a test model, about one run.

    Args:
        number: its own, for its messages.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.answers: Dict[Type[Any], Callable[[Any], Any]] = {
            protocol.Survey: survey,
            protocol.InspectModule: inspect_module,
            protocol.CheckWeights: check_weights,
            protocol.ReadInput: read_input,
            protocol.PrepareModel: prepare_model,
            protocol.PrepareRun: self.prepare,
            protocol.ReadGpu: read_gpu,
            protocol.MeasurePeak: measure_peak,
            protocol.ReadCpuTime: cpu_time,
            protocol.ReadBatch: read_batch,
            protocol.KeepBatch: keep_batch,
            protocol.Judge: judge,
            protocol.FindWorst: find_worst,
            protocol.KeepCopy: keep_copy,
        }

    def prepare(self, request: protocol.PrepareRun) -> protocol.RunFacts:
        """Prepares the run; from then on, it can be asked."""
        run = Run(request)
        self.answers.update(
            {
                protocol.Save: run.save,
                protocol.Warm: run.warm,
                protocol.TimedCalls: run.timed_calls,
                protocol.CallNewSize: run.call_new_size,
                protocol.Detect: run.detect,
                protocol.DetectBatch: run.detect_batch,
                protocol.TimeStages: run.time_stages,
                protocol.Watch: run.watch,
                protocol.Trace: run.trace,
                protocol.ReadMemory: run.memory,
                protocol.ReadCoverage: run.coverage,
                protocol.ReadArtifact: run.artifact,
                protocol.ReadPrecision: run.precision,
            }
        )
        return run.facts()

    def reply(self, line: bytes) -> Optional[bytes]:
        """The line that replies to one; None where that says to stop."""
        message = json.loads(line.decode())
        names = {"from": self.number, "id": message["id"]}
        try:
            request = protocol.request(message)
            if isinstance(request, protocol.Stop):
                return None
            # An engine may have put something into it that is no JSON.
            return _line({**names, "answer": asdict(self.answers[type(request)](request))})
        except (InputError, Unsupported) as error:
            return _line({**names, "error": type(error).__name__, "message": str(error)})
        except Exception as error:
            with contextlib.suppress(OSError):  # The log may lie on a disk that is full.
                traceback.print_exc()
            return _line({**names, "error": "RunFailed", "message": first_cause(error)})


@dataclass
class Child:
    """A worker, as its host sees it.

    Attributes:
        source, sink: file descriptors: from it, and to it.
        buffer: what came from it and is no complete line yet.
    """

    number: int
    pid: int
    source: int
    sink: int
    buffer: bytearray = field(default_factory=bytearray)


def work(request: protocol.Start, source: int, sink: int) -> None:
    """A worker's life: answers until it is told to stop, or its input closes."""
    import torch

    from backends.base import allow_tf32

    _isolate(request.log)
    torch.set_num_threads(request.threads)
    if request.tf32 is not None:
        allow_tf32(request.tf32)
    worker = Worker(request.number)
    with open(source, "rb") as requests:
        for line in requests:
            reply = worker.reply(line)
            if reply is None:
                return
            try:
                _write_all(sink, reply)
            except BrokenPipeError:
                return  # The host is gone.


def _isolate(log: str) -> None:
    """Keeps a worker to its log and its folder, and from outliving its host."""
    host = os.getppid()
    os.setpgid(0, 0)
    # What engines leave in the directory for temporary files goes with the log, even if the worker
    # is killed; and TorchInductor, which looks there for earlier code, finds none.
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path(log).parent)
    # Engines write to the file descriptors, past sys.stdout.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != host:
            os._exit(1)


# The host --------------------------------------------------------------------------------------


class Host:
    """Forks workers, and hands lines on between them and the parent.

    Args:
        source, sink: file descriptors: from the parent, and to it.
    """

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.buffer = bytearray()
        self.children: Dict[int, Child] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(source, selectors.EVENT_READ)
        # A worker that dies may leave its pipe open in processes that it has started.
        self.wakeup, self.tell = os.pipe()
        for end in (self.wakeup, self.tell):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.tell, warn_on_full_buffer=False)
        self.selector.register(self.wakeup, selectors.EVENT_READ)

    def say(self, message: Any) -> None:
        """A line of the host's own to the parent."""
        _write_all(self.sink, _line({"from": HOST, **message}))

    def serve(self) -> Optional[Callable[[], None]]:
        """Does its work until its input closes.

        Returns:
            in a forked worker, what that has to do; None in the host, at its end.
        """
        while True:
            for key, _ in self.selector.select():
                if key.fd == self.source:
                    read = os.read(self.source, CHUNK)
                    if not read:
                        self.end()
                        return None
                    self.buffer += read
                    for line in protocol.lines(self.buffer):
                        task = self.obey(line)
                        if task is not None:
                            return task
                elif key.fd == self.wakeup:
                    os.read(self.wakeup, CHUNK)
                    self.bury()
                elif self.children.get(key.data.number) is key.data:
                    self.hand_on(key.data)  # Else it was buried since `select`.

    def obey(self, line: bytes) -> Optional[Callable[[], None]]:
        """Does what a line says, or hands it on to the worker that it is for."""
        message = json.loads(line.decode())
        if message["to"] != HOST:
            child = self.children.get(message["to"])
            if child is not None:  # Else it has died, and the parent has been told.
                with contextlib.suppress(BrokenPipeError):
                    _write_all(child.sink, line + b"\n")
            return None
        request = protocol.request(message)
        if isinstance(request, protocol.Start):
            return self.start(request, message["id"])
        if isinstance(request, protocol.Kill):
            child = self.children.get(request.number)
            if child is not None:
                _kill(child.pid)
            self.say({"id": message["id"], "answer": asdict(protocol.Done())})
        return None

    def start(self, request: protocol.Start, message_id: int) -> Optional[Callable[[], None]]:
        """Forks a worker; in there, returns what it has to do."""
        folder = Path(request.log).parent
        if not folder.is_dir():
            message = f"there is no {folder} in there: mount it under the same name"
            self.say({"id": message_id, "error": "InputError", "message": message})
            return None
        from_worker, its_sink = os.pipe()
        its_source, to_worker = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.leave(from_worker, to_worker)
            return lambda: work(request, its_source, its_sink)
        os.close(its_source)
        os.close(its_sink)
        child = Child(request.number, pid, from_worker, to_worker)
        self.children[child.number] = child
        self.selector.register(from_worker, selectors.EVENT_READ, child)
        self.say({"id": message_id, "answer": asdict(protocol.Started(pid))})
        return None

    def leave(self, *others: int) -> None:
        """In a worker: closes what belongs to the host, so that each sees the end of its input."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        pipes = [end for child in self.children.values() for end in (child.source, child.sink)]
        for end in (self.source, self.sink, self.wakeup, self.tell, *pipes, *others):
            os.close(end)

    def hand_on(self, child: Child) -> None:
        """Hands complete lines of a worker on to the parent."""
        read = os.read(child.source, CHUNK)
        if not read:  # It has closed its side, and so is ending or has ended.
            self.selector.unregister(child.source)
            return
        child.buffer += read
        for line in protocol.lines(child.buffer):
            _write_all(self.sink, line + b"\n")

    def bury(self) -> None:
        """Tells of the workers that have ended."""
        for child in list(self.children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            os.set_blocking(child.source, False)
            with contextlib.suppress(BlockingIOError, KeyError):
                while child.source in self.selector.get_map():
                    self.hand_on(child)
            with contextlib.suppress(KeyError):
                self.selector.unregister(child.source)
            os.close(child.source)
            os.close(child.sink)
            del self.children[child.number]
            _kill_group(child.pid)
            self.say({"number": child.number, "died": _exit_code(status)})

    def end(self) -> None:
        """Ends all workers; one that listens has a moment, as its input closes."""
        for child in self.children.values():
            os.close(child.sink)
        deadline = time.monotonic() + STOP_S
        while self.children and time.monotonic() < deadline:
            for child in list(self.children.values()):
                if os.waitpid(child.pid, os.WNOHANG)[0]:
                    _kill_group(child.pid)
                    del self.children[child.number]
            time.sleep(0.02)
        for child in self.children.values():
            _kill(child.pid)


def _kill(pid: int) -> None:
    """Ends a worker, and all that it has started."""
    _kill_group(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # It may not lead its group yet.


def _kill_group(pid: int) -> None:
    """Ends what a worker has started, compilers for example: it leads a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _exit_code(status: int) -> int:
    """As `subprocess` has it: of a process that a signal has ended, the signal's number below 0."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _line(message: Dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _write_all(sink: int, content: bytes) -> None:
    while content:
        content = content[os.write(sink, content) :]


def _import_engines() -> Optional[str]:
    """Imports what every worker needs; returns why that cannot be had."""
    try:
        import numpy  # noqa: F401
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    except Exception as error:  # A library that is missing is an OSError, for example.
        traceback.print_exc()
        return first_cause(error)
    # Collecting garbage would write to, and so copy, all that workers share.
    gc.collect()
    gc.freeze()
    return None


def main() -> NoReturn:
    """Serves the parent; a worker that was forked comes through here, too."""
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    host = Host(source, sink)
    host.say({"hello": asdict(protocol.Hello(PROTOCOL, platform.python_version(), os.getpid()))})
    host.say({"ready": asdict(protocol.Ready(_import_engines()))})
    try:
        task = host.serve()
    except BrokenPipeError:  # The parent is gone.
        task = host.end
    if task is not None:
        task()
    sys.exit(0)


if __name__ == "__main__":
    main()
