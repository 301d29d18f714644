"""Where the time of an eager detector goes, and how fast the machine multiplies: in a worker.

Times of stages are exclusive: non-maximum suppression within the ROI heads counts as suppression.
They are taken by hooks around the detector's parts, by the names that Detectron2 gives them. What
comes after the last part is postprocessing: the decoding of RetinaNet's predictions, fitting boxes
to the image, pasting masks into it. What comes before is the rest: normalising and padding.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from results.record import Stages

# Parts of a detector, by the names of its attributes -> stages (fields of `Stages`), in the order
# in which a detector calls what it has of them.
PARTS = {
    "backbone": "backbone",
    "sem_seg_head": "head",
    "proposal_generator": "proposals",
    "head": "head",
    "roi_heads": "roi_heads",
}
STAGES = tuple(stage.name for stage in fields(Stages))

# Sides of the matrices, and of the image that is convolved: large enough to keep all cores busy.
MATRIX_SIDES = {"cpu": 2048, "cuda": 8192}
IMAGE_SIDES = {"cpu": 64, "cuda": 256}
CHANNELS = 256

# A function to call, and its operations: two for each multiply-add.
Product = Tuple[Callable[[], Any], int]


class Stopwatch:
    """Charges every moment to the innermost stage that it lies in.

    Args:
        clock: seconds; it must not run ahead of the device.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stack: List[str] = ["rest"]
        self._last = clock()

    def enter(self, stage: str) -> None:
        self._charge()
        self._stack.append(stage)

    def leave(self) -> None:
        self._charge()
        self._stack.pop()

    def end_of_parts(self) -> None:
        """From here on, what lies in no other stage is postprocessing."""
        self._charge()
        self._stack[0] = "postprocessing"

    def _charge(self) -> None:
        now = self.clock()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def total(self) -> Stages:
        """Seconds of each stage so far."""
        self._charge()
        return Stages(**self.seconds)


def time_stages(
    eager: Any,
    call: Callable[..., Any],
    images: Tuple[Any, ...],
    synchronize: Callable[[], None],
    calls: int,
) -> List[Stages]:
    """Seconds of each stage, for each of some calls.

    Args:
        eager: the module of an export, whose parts have Detectron2's names.
        call: calls it, perhaps under autocast.
        images: of a call.
        synchronize: waits for the device.
    """
    import torch

    def clock() -> float:
        synchronize()
        return time.perf_counter()

    times = []
    for _ in range(calls):
        with torch.no_grad(), _watched(eager, Stopwatch(clock)) as watch:
            call(*images)
            times.append(watch.total())
    return times


@contextmanager
def _watched(eager: Any, watch: Stopwatch) -> Iterator[Stopwatch]:
    """While it lasts, the parts of a module and non-maximum suppression tell the stopwatch."""
    handles = []
    parts = _parts(eager)
    for attribute, part in parts.items():
        stage = PARTS[attribute]
        handles.append(part.register_forward_pre_hook(lambda *args, s=stage: watch.enter(s)))
        handles.append(part.register_forward_hook(lambda *args: watch.leave()))
    for last in sorted(parts, key=list(PARTS).index)[-1:]:
        handles.append(parts[last].register_forward_hook(lambda *args: watch.end_of_parts()))
    try:
        with _suppression(watch):
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _parts(eager: Any) -> Dict[str, Any]:
    """The outermost module of each name."""
    found: Dict[str, Any] = {}
    for name, module in sorted(eager.named_modules(), key=lambda item: item[0].count(".")):
        attribute = name.rsplit(".", 1)[-1]
        if attribute in PARTS:
            found.setdefault(attribute, module)
    return found


@contextmanager
def _suppression(watch: Stopwatch) -> Iterator[None]:
    """Watches torchvision's non-maximum suppression, which both kinds of detectors call."""
    from torchvision import ops

    original = ops.boxes.batched_nms

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.enter("nms")
        try:
            return original(*args, **kwargs)
        finally:
            watch.leave()

    ops.batched_nms = ops.boxes.batched_nms = watched
    try:
        yield
    finally:
        ops.batched_nms = ops.boxes.batched_nms = original


def measure_peak(precision: str, device: str, seconds: float = 0.5) -> Optional[float]:
    """Operations per second of PyTorch's matrix products, the fastest of some calls.

    A product of matrices, and a convolution as in the heads of detectors: on some CPUs the library
    behind one of them is twice as fast as that behind the other.

    Args:
        precision: `fp32`, `fp16`, `bf16` or `int8`; the product of int8 is int32.
        seconds: that each takes, about.

    Returns:
        None where PyTorch has no such product on this device.
    """
    rates: List[float] = []
    for make in (_matrix_product, _convolution):
        try:
            product, operations = make(precision, device)
            rates.append(operations / _fastest(product, device, seconds))
        except RuntimeError:  # PyTorch has no kernel for it.
            continue
    return max(rates, default=None)


def _ones(precision: str, device: str, *shape: int) -> Any:
    import torch

    types = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "int8": torch.int8,
    }
    return torch.ones(*shape, device=device).to(types[precision])


def _matrix_product(precision: str, device: str) -> Product:
    import torch

    side = MATRIX_SIDES[device]
    left, right = (_ones(precision, device, side, side) for _ in range(2))
    multiply = torch._int_mm if precision == "int8" else torch.mm
    return lambda: multiply(left, right), 2 * side**3


def _convolution(precision: str, device: str) -> Product:
    import torch

    side = IMAGE_SIDES[device]
    image = _ones(precision, device, 1, CHANNELS, side, side)
    weight = _ones(precision, device, CHANNELS, CHANNELS, 3, 3)
    return lambda: torch.conv2d(image, weight, padding=1), 2 * 9 * (CHANNELS * side) ** 2


def _fastest(product: Callable[[], Any], device: str, seconds: float) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    times = [timed()]
    while sum(times) < seconds:
        times.append(timed())
    return min(times)
