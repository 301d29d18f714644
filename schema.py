"""What the readers of a result file take for granted, and what is wrong with one that lacks it.

Less than docs/results.md says: what no reader needs is not asked for, keys that are not known are
left alone, and those that older files do not have may be missing.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence

from catalog import timed
from stages import POSTPROCESSING, REST, STAGES

# What became of a run.
STATUSES = ("ok", "failed", "unsupported", "mismatch")
# What ends the rounds of a group.
STOPPED = ("interval", "max rounds", "fixed", "time budget", "all failed", "interrupted")


# Tells what is wrong with a value, given that and the name of its place; None if nothing.
Check = Callable[[Any, str], Optional[str]]


def _flaw(value: Any, asked: Any, where: str) -> Optional[str]:
    """What is wrong with a value; None if it is what was asked for.

    Args:
        asked: a type, or several; an object with these keys, of which those with a question mark
            may be missing; or a `Check`.
        where: the value stands, in words.
    """
    if isinstance(asked, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        for name, inner in asked.items():
            key = name.rstrip("?")
            if key in value:
                flaw = _flaw(value[key], inner, f"'{key}' of {where}")
            else:
                flaw = f"{where} has no '{key}'" if key == name else None
            if flaw:
                return flaw
        return None
    if isinstance(asked, (type, tuple)):
        return None if isinstance(value, asked) else f"{where} is of the wrong type"
    return asked(value, where)


def _positive(value: Any, where: str) -> Optional[str]:
    is_positive = isinstance(value, _NUMBER) and value > 0
    return None if is_positive else f"{where} is not a positive number"


def _one_of(names: Sequence[str]) -> Check:
    return lambda value, where: None if value in names else f"{where} is none of {', '.join(names)}"


def _either(nothing: Any, asked: Any) -> Check:
    """For a value that may be `nothing`."""
    return lambda value, where: None if value == nothing else _flaw(value, asked, where)


def _each(kind: type, asked: Any, empty: bool = True, count: Optional[int] = None) -> Check:
    """For a list, or an object, whose values are all alike.

    Args:
        empty: whether it may be.
        count: of its values, where that is fixed.
    """

    def check(value: Any, where: str) -> Optional[str]:
        if not isinstance(value, kind):
            return f"{where} is of the wrong type"
        if not (value or empty):
            return f"{where} is empty"
        if count not in (None, len(value)):
            return f"{where} has {len(value)} values, not {count}"
        named = value.items() if kind is dict else enumerate(value)
        flaws = (
            _flaw(item, asked, f"{key!r} of {where}" if kind is dict else f"item {key} of {where}")
            for key, item in named
        )
        return next((flaw for flaw in flaws if flaw), None)

    return check


_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))
_OPTIONAL_TEXT = (str, type(None))

_DOCUMENT = {
    "schema": int,
    "tool": str,
    "version": str,
    "environment": {
        "cpu?": dict,
        "versions?": dict,
        "variables?": dict,
        "commit?": _either(None, {"revision": str, "dirty": bool}),
    },
    "settings": {"time_budget?": _OPTIONAL_NUMBER},
    "groups": list,
    "aa": _either(
        None,
        {
            "model": str,
            "precision": str,
            "ratio": _NUMBER,
            "low": _OPTIONAL_NUMBER,
            "high": _OPTIONAL_NUMBER,
            "resolution": _OPTIONAL_NUMBER,
        },
    ),
    "peaks?": _each(dict, _NUMBER),
    "notes": _each(list, str),
    "warnings?": _each(list, str),
    "complete": bool,
}
# They are added up: none is to be all that there is. Older files have no postprocessing.
_STAGES = {name + "?" * (name == POSTPROCESSING): _NUMBER for name in STAGES}
_STAGES[REST] = _positive
_GROUP = {
    "model": str,
    "image?": _OPTIONAL_TEXT,
    "objects?": int,
    "found?": (int, type(None)),
    "export": str,
    "precision": str,
    "images_per_call": int,
    "image_sizes": _each(dict, _each(list, _each(list, _positive, count=2), empty=False)),
    "flops?": _OPTIONAL_NUMBER,
    "image_digest?": str,
    "weights_digest?": str,
    "weights?": str,
    "rounds": int,
    "stopped": _one_of(STOPPED),
    "half_width?": _NUMBER,
    "budget_s?": _OPTIONAL_NUMBER,
    "stages?": _either(None, _STAGES),
    "machine?": _either(
        None,
        {"steal_share?": _NUMBER, "others_share?": _NUMBER, "thermal_throttles?": int},
    ),
    "gpu?": _each(list, {"throttled?": _each(list, str)}),
    "runs": _each(list, dict, empty=False),
}
_STATISTICS = {
    "samples": int,
    "median_ms": _positive,
    "mean_ms": _NUMBER,
    "std_dev_ms": _NUMBER,
    "max_ms": _NUMBER,
    "p99_ms": _OPTIONAL_NUMBER,
    "median_fps": _NUMBER,
    "mean_fps": _NUMBER,
    "relative_iqr": _NUMBER,
}
_SPEEDUP = {
    "ratio": _NUMBER,
    "low": _OPTIONAL_NUMBER,
    "high": _OPTIONAL_NUMBER,
    "verdict": str,
}
_BREAK_EVEN = dict.fromkeys(("images", "low", "high"), _OPTIONAL_NUMBER)
_AGREEMENT = {
    "verdict": _one_of(("match", "mismatch", "error")),
    "reason": str,
    "expected": int,
    "matched": int,
    "lost?": int,
    "spurious?": int,
}
_PREPARE = {
    "build": _NUMBER,
    "export?": _NUMBER,
    "convert?": _NUMBER,
    "compile?": _NUMBER,
    "total": _NUMBER,
}
_RUN = {
    "backend": str,
    "label": str,
    "baseline": bool,
    "requested_precision": str,
    "effective_precision": _OPTIONAL_TEXT,
    "provider": _OPTIONAL_TEXT,
    "status": _one_of(STATUSES),
    "reason": _OPTIONAL_TEXT,
    "samples_s": _each(list, _positive),
    "size_seconds?": _each(dict, _each(list, _positive, empty=False)),
    # What never came to run was not prepared.
    "prepare": _either({}, _PREPARE),
    "artifact_mb?": _OPTIONAL_NUMBER,
    "peak_memory_mb": _OPTIONAL_NUMBER,
    "peak_device_memory_mb?": _OPTIONAL_NUMBER,
    "statistics": _either(None, _STATISTICS),
    "speedup": _either(None, _SPEEDUP),
    "speedup_over_fp32?": _either(None, _SPEEDUP),
    "break_even?": _either(None, _BREAK_EVEN),
    "detections": _either(None, _each(dict, _AGREEMENT, empty=False)),
    "coverage": {"share_of_flops?": _OPTIONAL_NUMBER},
}

_DRAWN = {
    "boxes": _each(list, _each(list, _NUMBER, count=4)),
    "scores": _each(list, _NUMBER),
    "classes": list,
}
_DRAWN_RUN = {**_DRAWN, "agrees": list, "lost": _each(list, int)}
_FOUND = _each(
    dict,
    {
        "image?": str,
        "reference": _each(list, _DRAWN),
        "runs": _each(dict, _each(dict, _each(list, _DRAWN_RUN, empty=False))),
    },
)


def document_flaw(document: Any) -> Optional[str]:
    """What is wrong with a result file, in words; None if nothing."""
    flaw = _flaw(document, _DOCUMENT, "the document")
    for i, group in enumerate(document["groups"] if not flaw else ()):
        flaw = flaw or _group_flaw(group, f"group {i}")
    return flaw


def _group_flaw(group: Any, where: str) -> Optional[str]:
    flaw = _flaw(group, _GROUP, where)
    for i, run in enumerate(group["runs"] if not flaw else ()):
        flaw = flaw or _flaw(run, _RUN, f"{where}, run {i}")
    if flaw:
        return flaw
    if not any(run["baseline"] for run in group["runs"]):
        return f"no run of {where} is the baseline"
    sizes = group["image_sizes"]
    return (
        f"'image_sizes' of {where} has none that is timed" if sizes and not timed(sizes) else None
    )


def found_flaw(found: Any) -> Optional[str]:
    """What is wrong with a `detections.json`, in words; None if nothing."""
    flaw = _flaw(found, _FOUND, "the file")
    for name, case in found.items() if not flaw else ():
        flaw = flaw or _drawn_flaw(case, f"'{name}'")
    return flaw


def _drawn_flaw(case: Dict[str, Any], where: str) -> Optional[str]:
    """Whether what belongs together in an entry of `detections.json` does not, in words."""
    found = [images for runs in case["runs"].values() for images in runs.values()]
    for image in (image for images in (case["reference"], *found) for image in images):
        lists = [image[key] for key in (*_DRAWN, "agrees") if key in image]
        if len(set(map(len, lists))) > 1:
            return f"{where} has lists of one image that differ in length"
    pairs = (pair for images in found for pair in zip(images, case["reference"]))
    for image, reference in pairs:
        if not all(0 <= n < len(reference["scores"]) for n in image["lost"]):
            return f"'lost' of {where} names a detection that the reference does not have"
    return None
