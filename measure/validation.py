"""What int8 costs in average precision while it is made: on the images that it is calibrated on.

It runs in the worker of a run, which may be of another environment. Valid on Python 3.8.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple

import numpy as np

from backends.torch import autocast
from errors import Unsupported
from measure import accuracy, coco_results, protocol
from measure.detections import Malformed, split
from results.facts import LEAST_AP, TASKS, WHOSE_ANNOTATIONS
from results.record import AccuracyControl

if TYPE_CHECKING:
    from detectors.export import Export

# Calls that layers are ranked by: those in which int8 loses most.
RANKING_CALLS = 20

Call = Callable[..., Sequence[Any]]


class Validation:
    """Average precision of a call on the images that it is calibrated on, judged as a share.

    The share is that of what the eager module reaches, of the task that keeps the least.

    Args:
        request: the annotations, and how they are judged.
        export: whose calibration calls have these images.

    Raises:
        errors.Unsupported: the eager module finds next to nothing in them.
    """

    def __init__(self, request: protocol.Validate, export: Export) -> None:
        self.least_ratio = request.least_ratio
        self.ranking_calls = RANKING_CALLS
        self._request, self._export = request, export
        self._place = {x: at for at, x in enumerate(sorted(x.id for x in request.images))}
        eager = autocast(export.eager, "fp32", "cpu")
        self._reference = self._evaluations(eager, range(len(self)))
        once = self._weights(range(len(self)))[None]
        self.reference = {
            task: float(np.nan_to_num(accuracy.weighted(each, once)[0]))
            for task, each in zip(request.tasks, self._reference)
        }
        for task, ap in self.reference.items():
            if ap < LEAST_AP:  # Whichever layers stay in fp32, that is noise.
                raise Unsupported(
                    f"int8 cannot be judged on the images that it is calibrated on: the "
                    f"{TASKS[task]} AP of Torch fp32 is {ap:.2f} there: {WHOSE_ANNOTATIONS}"
                )

    def __len__(self) -> int:
        """How many calls there are."""
        return len(self._export.calibration)

    def judged(
        self, call: Call, places: Optional[Sequence[int]] = None
    ) -> Tuple[float, List[float]]:
        """How much of the AP is kept, and the AP of each call, which tells where it is lost.

        Args:
            call: takes images, and gives the export's flat tuple.
            places: of the calibration calls that are judged; None: all.

        Returns:
            a share, 1 where there is nothing to keep; and AP in percent, a mean over the tasks.
        """
        places = list(range(len(self))) if places is None else list(places)
        evaluations = self._evaluations(call, places)
        together = self._weights(places)[None]
        shares = []
        for own, reference in zip(evaluations, self._reference):
            ap, known = (accuracy.weighted(x, together)[0] for x in (own, reference))
            if known > 0:
                shares.append(float(ap / known))
        return min(shares, default=1.0), self._of_calls(evaluations, places).tolist()

    def layers_to_keep(
        self, layers: Sequence[str], quantized: Callable[[Sequence[str]], Call], most: int
    ) -> AccuracyControl:
        """The fewest of the costliest layers without which int8 keeps AP.

        A layer costs what AP gains without it, on the calls in which int8 loses most.

        Args:
            layers: names of layers, or of groups of them.
            quantized: makes a call of which these are not in int8.
            most: that may be kept.
        """
        before, own = self.judged(quantized(()))
        if before >= self.least_ratio:
            return self.control(before, before, (), len(layers))
        places = self._lossy(own)
        gains = {name: self.judged(quantized((name,)), places)[0] for name in layers}
        ranked = sorted(layers, key=lambda name: -gains[name])
        kept = {0: before}

        def keeps(count: int) -> bool:
            kept[count] = self.judged(quantized(ranked[:count]))[0]
            return kept[count] >= self.least_ratio

        # Twice as many until it is enough; then as few as that takes.
        few, count = 0, min(1, most)
        while not keeps(count) and count < most:
            few, count = count, min(2 * count, most)
        if kept[count] < self.least_ratio:
            count = max(kept, key=lambda each: kept[each])
        else:
            while count - few > 1:
                middle = (few + count) // 2
                few, count = (few, middle) if keeps(middle) else (middle, count)
        found = tuple(ranked[:count])
        return self.control(before, kept[count], found, len(layers))

    def control(
        self, before: float, after: float, kept: Tuple[str, ...], layers: int
    ) -> AccuracyControl:
        """The record; arguments as there."""
        return AccuracyControl(self.reference, self.least_ratio, before, after, kept, layers)

    def _lossy(self, own: Sequence[float]) -> List[int]:
        """The calls that lose the most AP."""
        losses = self._of_calls(self._reference, range(len(self))) - np.array(own)
        return sorted(np.argsort(-losses, kind="stable")[:RANKING_CALLS].tolist())

    def _of_calls(
        self, evaluations: Sequence[accuracy.Evaluation], places: Sequence[int]
    ) -> np.ndarray:
        """AP in percent of each call, a mean over the tasks; 0 where nothing is to be found."""
        weights = np.stack([self._weights([place]) for place in places])
        each = [np.nan_to_num(accuracy.weighted(x, weights)) for x in evaluations]
        mean: np.ndarray = np.mean(each, axis=0)
        return mean

    def _images(self, place: int) -> List[protocol.DatasetImage]:
        """The images of a call; a last one that is there several times counts once."""
        count = self._export.model.images_per_call
        return list(self._request.images[place * count : (place + 1) * count])

    def _weights(self, places: Sequence[int]) -> np.ndarray:
        """Which images count, in the order of the evaluator, where these calls do."""
        weights = np.zeros(len(self._place))
        weights[[self._place[x.id] for place in places for x in self._images(place)]] = 1
        return weights

    def _evaluations(self, call: Call, places: Sequence[int]) -> List[accuracy.Evaluation]:
        """What calls find, matched with the truth, for each task."""
        request, fields = self._request, self._export.fields
        found: List[Any] = []
        for place in places:
            outputs = call(*self._export.calibration[place])
            try:
                listed = split([x.detach().numpy() for x in outputs], fields)
            except Malformed:
                continue  # It has found nothing that counts.
            for image, detections in zip(self._images(place), listed):
                found += coco_results.results(
                    detections, image.size, image.id, request.category_ids
                )
        sigmas = request.oks_sigmas or None
        truth = Path(request.truth)
        return [accuracy.evaluate(truth, found, task, sigmas) for task in request.tasks]
