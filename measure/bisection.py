"""Which part of a detector an engine first goes wrong in: the parent's side of `measure.parts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from measure import protocol, verify
from measure.tolerances import part_bound
from results.record import Bisection, PartDifference


def bisection(
    answer: protocol.Watched,
    outputs: Path,
    image: str,
    precision: str,
    known: protocol.ModelFacts,
) -> Bisection:
    """The record of what a worker has seen.

    Args:
        outputs: file that it has left, see `protocol.Watch`.
        image: see `results.record.Bisection`.
        precision: that the run computes in.
        known: of the model.
    """
    parts = tuple(
        PartDifference(x.name, x.kind, x.difference, part_bound(x.kind, precision), x.accumulated)
        for x in answer.parts
    )
    with np.load(outputs, allow_pickle=False) as arrays:
        wanted, run, watched = (_side(arrays, x) for x in ("wanted", "run", "watched"))
    rules = known.fields, precision, known.score_threshold, known.limit
    is_wrong, is_watched_wrong = (
        verify.verify(wanted, found, *rules).is_wrong for found in (run, watched)
    )
    return Bisection(image, parts, vanished=is_wrong and not is_watched_wrong)


def _side(arrays: np.lib.npyio.NpzFile, name: str) -> Sequence[np.ndarray]:
    """A flat tuple of the file; empty where it is malformed or there is none."""
    places = [each for each in arrays.files if each.partition("/")[0] == name]
    return [arrays[each] for each in places]
