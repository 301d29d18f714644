"""Where the time of an eager detector goes, and what that leaves an engine to gain.

Times are exclusive: non-maximum suppression inside of the ROI heads counts as suppression. They are
taken by hooks around the detector's parts, by the names that Detectron2 gives them. What comes
after the last part is postprocessing: the decoding of RetinaNet's predictions, fitting boxes to the
image, pasting masks into it. What comes before is the rest: normalising and padding the image.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

# Names of the parts, as attributes of a detector -> what tables call them; in the order in which a
# detector calls those that it has.
PARTS = {
    "backbone": "backbone + FPN",
    "proposal_generator": "proposals",
    "head": "head",
    "roi_heads": "ROI heads",
}
NMS, POSTPROCESSING, REST = "NMS", "postprocessing", "rest"
STAGES = (*PARTS.values(), NMS, POSTPROCESSING, REST)


class Stopwatch:
    """Charges every moment to the innermost stage that it lies in.

    Args:
        clock: seconds; it must not run ahead of the device.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stack: List[str] = [REST]
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
        self._stack[0] = POSTPROCESSING

    def _charge(self) -> None:
        now = self.clock()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    def total(self) -> Dict[str, float]:
        """Seconds of each stage so far."""
        self._charge()
        return self.seconds


def time_stages(
    eager: Any,
    call: Callable[..., Any],
    images: Tuple[Any, ...],
    synchronize: Callable[[], None],
    calls: int,
) -> List[Dict[str, float]]:
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
        watch.enter(NMS)
        try:
            return original(*args, **kwargs)
        finally:
            watch.leave()

    ops.batched_nms = ops.boxes.batched_nms = watched
    try:
        yield
    finally:
        ops.batched_nms = ops.boxes.batched_nms = original


def ceiling(seconds: Dict[str, float], stages: Sequence[str] = ("backbone + FPN",)) -> float:
    """The largest speedup of an engine that takes these stages, and takes no time for them.

    G. M. Amdahl, Validity of the single processor approach to achieving large scale computing
    capabilities, AFIPS 1967.
    """
    others = sum(taken for stage, taken in seconds.items() if stage not in stages)
    return sum(seconds.values()) / others
