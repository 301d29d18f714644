"""What follows from a result file: what was measured on what, what differs, what to be wary of."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple

from benchmark import Speedup, verdict
from models import BLANK, timed
from results.record import (
    AccuracyControl,
    Agreement,
    Bisection,
    Calibrated,
    Cpu,
    Environment,
    Group,
    Results,
    Settings,
    Stages,
    Task,
    Weights,
)

# Objects that synthetic weights find unless something else is asked for.
OBJECTS = 100
# Settings that change what is measured, and how.
DECISIVE_SETTINGS = (
    *(
        "model",
        "config_file",
        "opts",
        "module",
        "fields",
        "backend",
        "environment",
        "precision",
        "device",
        "source",
    ),
    *("image", "image_size", "min_size", "max_size", "weights", "detections", "threads", "seed"),
    *("warmup", "iterations", "generations", "time_budget", "sizes"),
    *("stages", "trace", "bisect"),
    *("dataset", "limit", "min_ap_ratio"),
    *("calibration", "calibration_annotations", "calibration_limit"),
)
# Beyond these a reader should know. A quarter of a core on two of them is an eighth.
MOST_IQR = 0.10
MOST_STEAL = 0.02
MOST_OTHERS = 0.10
MOST_STOPS = 0.02
# Memory keeps growing if with three quarters of the calls it grows by this many MiB, and by this
# share of what it grows by in the mean; with fewer readings than these there is no telling. In many
# readings, it does as well if it grows by the last share in the second half. See `growth_mb`.
LEAST_GROWTH_MB = 1.0
STEADY_SHARE = 0.5
LEAST_READINGS, MANY_READINGS = 20, 40
MOST_GROWTH = 0.1
# What average precision is of, in words.
TASKS: Dict[Task, str] = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
# An AP of less than this, in percent, speaks of a mistake.
LEAST_AP = 5.0
WHOSE_ANNOTATIONS = "are classes, boxes (x, y, width, height) and images those of the annotations?"
# Layers that a sentence names; all are in the result file.
NAMED_LAYERS = 6

# Test model, objects that synthetic weights find, and which image: None where there is but one,
# and for all of them together.
Case = Tuple[str, int, Optional[str]]


def case(group: Group) -> Case:
    """What a group measures."""
    return group.model, group.objects, group.image


def case_name(of: Case) -> str:
    """What a case is called: `testRetinaNet`, `testRetinaNet with 5 objects on dog.jpg`."""
    name, objects, image = of
    counted = name if objects == OBJECTS else f"{name} with {objects} objects"
    return counted if image is None else f"{counted} on {image}"


# What follows from what was measured ---------------------------------------------------------


def rank(agreement: Agreement) -> Tuple[int, float]:
    """How well detections agree: the verdict counts before the share that matches."""
    share = agreement.matched / max(1, agreement.expected, agreement.matched + agreement.spurious)
    if agreement.expected == 0 and agreement.spurious == 0:
        share = 1.0  # Nothing was asked.
    if agreement.labels is not None:
        share = min(share, agreement.labels)
    return ("error", "mismatch", "match", "too few").index(agreement.verdict), share


def worst(agreements: Mapping[str, Agreement]) -> Agreement:
    """The one that agrees least of several, say at `min`, `opt` and `max`.

    One with too few detections to tell counts only where there is no other. Its reason begins with
    its key, where it has one, and where there are several sizes.
    """
    name = worst_input(agreements)
    agreement = agreements[name]
    if not agreement.reason or (name == "opt" and set(agreements) <= {"opt", BLANK}):
        return agreement
    if name == BLANK:
        return replace(agreement, reason=f"on a plain picture: {agreement.reason}")
    return replace(agreement, reason=f"at {name}: {agreement.reason}")


def worst_input(agreements: Mapping[str, Agreement]) -> str:
    """The key of the one that agrees least; of several that agree as well, what was timed."""
    name, _ = min(agreements.items(), key=lambda item: (rank(item[1]), not timed([item[0]])))
    return name


def ceiling(stages: Stages, taken: Sequence[str] = ("backbone",)) -> float:
    """The largest speedup of an engine that takes some stages, and takes no time for them.

    G. M. Amdahl, Validity of the single processor approach to achieving large scale computing
    capabilities, AFIPS 1967.
    """
    total = sum(astuple(stages))
    return total / (total - sum(getattr(stages, name) for name in taken))


# What was measured on what ---------------------------------------------------------------------


def facts(results: Results) -> Dict[str, Any]:
    """What was measured on and how, by name; what is not recorded is None."""
    environment, settings = results.environment, results.settings
    named = {f"cpu.{x.name}": getattr(environment.cpu, x.name) or None for x in fields(Cpu)}
    named["gpu"] = environment.gpu
    for name in ("memory_mb", "os", "kernel", "python"):
        named[name] = getattr(environment, name) or None
    named.update(environment.versions)
    named.update(environment.variables)
    commit = environment.commit
    named["configuration"] = settings.config_digest
    named["commit"] = commit and commit.revision[:10] + " with changes" * commit.dirty
    for name in DECISIVE_SETTINGS:
        value = getattr(settings, name)
        # A flag that is not set is as good as one that did not exist yet.
        named[f"--{name.replace('_', '-')}"] = None if value is False or value == () else value
    # Here "off" is not as good as not known: before there was the flag, half of it was on.
    named["--tf32"] = {None: None, True: "on", False: "off"}[settings.tf32]
    named["cudnn.benchmark"] = settings.cudnn_benchmark or None  # It was off before, too.
    return named


def differing(before: Results, after: Results) -> List[str]:
    """Names of the `facts` in which two result files differ."""
    old, new = facts(before), facts(after)
    names = dict.fromkeys([*old, *new])
    return [name for name in names if _differs(name, old.get(name), new.get(name))]


def other_files(before: Settings, after: Settings) -> List[str]:
    """Which files are others, though they are called the same, a line each."""
    found = []
    for name, digest in (
        ("weights", "weights_digest"),
        ("config_file", "config_digest"),
        ("module", "module_digest"),
        ("dataset", "dataset_digest"),
        ("calibration", "calibration_digest"),
    ):
        digests = {getattr(before, digest), getattr(after, digest)}
        same_name = getattr(before, name) == getattr(after, name)
        if same_name and None not in digests and len(digests) == 2:
            what = "other images" if name == "calibration" else "another file"
            found.append(f"--{name.replace('_', '-')}: {what} of the same name")
    return found


def _differs(name: str, old: Any, new: Any) -> bool:
    if name in ("cpu.flags", "gpu") and not (old and new):
        return False  # One of them was not told, which does not make it another.
    return _shown(old) != _shown(new)


def differences(before: Results, after: Results, ignored: Collection[str] = ()) -> List[str]:
    """What differs between the `facts` of two result files, a line each."""
    old, new = facts(before), facts(after)
    return [
        f"{name}: {_difference(name, old.get(name), new.get(name))}"
        for name in differing(before, after)
        if name not in ignored
    ]


def _difference(name: str, old: Any, new: Any) -> str:
    if name != "cpu.flags":
        return f"{_shown(old)} before, {_shown(new)} now"
    # There are many, and they are mostly the same.
    before, after = _shown(old).split(), _shown(new).split()
    only = (
        ("before", [flag for flag in before if flag not in after]),
        ("now", [flag for flag in after if flag not in before]),
    )
    return ", ".join(f"{' '.join(flags)} only {when}" for when, flags in only if flags)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def with_margin(of: Sequence[Group], margin: float) -> Tuple[Group, ...]:
    """Groups of which the speedups have the verdicts that a margin gives, as a share."""

    def judged(speedup: Optional[Speedup]) -> Optional[Speedup]:
        if speedup is None:
            return None
        return replace(speedup, verdict=verdict(speedup.low, speedup.high, margin))

    names = ("speedup", "speedup_over_fp32", "speedup_over_own_torch")
    return tuple(
        replace(
            group,
            runs=tuple(
                replace(run, **{name: judged(getattr(run, name)) for name in names})
                for run in group.runs
            ),
        )
        for group in of
    )


# What a reader has to know ---------------------------------------------------------------------


def weights_note(weights: Weights) -> str:
    """Where the weights come from, in a line."""
    if weights.source == "file":
        return f"weights: {weights.file}"
    if weights.source == "zoo":
        return f"weights: {weights.file} of the model zoo"
    reason = f" ({weights.no_zoo})" if weights.no_zoo else ""
    return f"weights: synthetic, made to find {weights.objects} objects{reason}"


def calibration_note(calibrated: Calibrated) -> str:
    """Which images int8 took its ranges from, in a line."""
    if calibrated.source is None:
        which = "the timed image, which is evaluated, too" * calibrated.is_evaluated
        return (
            f"int8: calibrated on crops of {which or 'the timed image'}: --calibration DIR takes "
            "images of yours"
        )
    parts = [f"int8: calibrated on {calibrated.images} images of {calibrated.source}"]
    if calibrated.left_out:
        parts.append(f"left out: {left_out_note(calibrated.left_out)}")
    if calibrated.not_judged:
        parts.append(f"AP was not judged on them: {calibrated.not_judged}")
    return "; ".join(parts)


def control_note(control: AccuracyControl) -> str:
    """Which layers of an int8 run stay in fp32, and what that is good for, in a line."""
    known = ", ".join(f"{TASKS[task]} {ap:.2f}" for task, ap in control.reference.items())
    where = f"of fp32's AP ({known}) on the images that it is calibrated on"
    if not control.kept:
        kept = f"keeps {control.before:.4f} {where}"
        if control.before >= control.least_ratio:
            return f"{kept}, with all layers in int8"
        return f"{kept}, and no layer in fp32 helps"
    names = ", ".join(control.kept[:NAMED_LAYERS]) + ", ..." * (len(control.kept) > NAMED_LAYERS)
    return (
        f"{len(control.kept)} of {control.layers} layers stay in fp32, with which it keeps "
        f"{control.after:.4f} instead of {control.before:.4f} {where}: {names}"
    )


def left_out_note(left_out: Mapping[str, Tuple[int, Tuple[str, ...]]]) -> str:
    """Which images were left out: `2 unreadable (a.jpg, b.jpg)`.

    Args:
        left_out: what they are -> how many, and the names of the first three.
    """
    return "; ".join(
        f"{count} {what} ({', '.join(names)}{', ...' * (count > len(names))})"
        for what, (count, names) in left_out.items()
    )


def bisection_note(run: str, found: Bisection, reference: str = "Torch fp32") -> str:
    """In which part a run that went wrong first leaves the reference, in a line.

    Args:
        run: what the line calls it: `OpenVINO int8`.
    """
    where = f" (at {found.image})" if found.image else ""
    if found.reason is not None:
        return f"{run}: its parts could not be watched{where}: {found.reason}"
    if found.vanished:
        return f"{run}: the fault is not there when its parts are watched{where}"
    first = found.first
    if first is None:
        return (
            f"{run}: no part of it alone is further from {reference} than those of healthy engines"
            f"{where}: what each adds is handed on"
        )
    if first.difference is None:
        how = "gives what cannot be compared: another shape, or values that are no numbers"
    else:
        most = share(first.bound)
        how = f"is off by {share(first.difference)}, where {most} is tolerated"
    return f"{run} first leaves {reference} in the {first.name}{where}, which {how}"


def share(value: float) -> str:
    """A share with two significant digits: `0.034%`, `8.5%`, `140%`."""
    percent = 100 * value
    if 0 < percent < 0.001:
        return "<0.001%"
    return f"{percent:.0f}%" if percent >= 99.5 else f"{percent:.2g}%"


def missing_notes(results: Results) -> List[str]:
    """Which backends were left out, and which do not compute in a precision."""
    left_out = [f"{label} left out: {reason}" for label, reason in results.left_out.items()]
    device = results.settings.device
    return left_out + [
        f"not at {precision} on {device}: {', '.join(labels)}"
        for precision, labels in results.without.items()
    ]


def growth_mb(resident_mb: Sequence[float]) -> Optional[float]:
    """MiB that memory grows by with each call, if it keeps growing; else None.

    What leaks grows with every call, and by about the same; what an allocator keeps comes in blocks
    of any size, now and then. So what counts is the lower quartile of the steps from call to call,
    in the second half of them, beside their mean. What has not levelled off after many calls is
    told of whatever the steps are.

    RetinaNet in 60 calls of new sizes, on 2 cores, in MiB when it was warm, after 30 calls and
    after 60; only Torch at 480x640 is told of, and only after 60:

        192x256: Torch 1042, 1122, 1122; TorchScript 1395, 1420, 1420; OpenVINO 1367, 1419, 1420;
            ONNX Runtime 1654, 1654, 1654
        480x640: Torch 1108, 1786, 2172; TorchScript 1492, 1635, 1664; OpenVINO 1466, 1699, 1702;
            ONNX Runtime 1970, 1979, 1980

    Torch needs more calls to level off: at 320x416 1085, after 30 calls 1243, after 150 calls 1327.

    Of the ten steps from the 10th to the 20th call, the quartile and the mean of Torch at 480x640
    are 6.6 and 26 MiB, of OpenVINO 0 and 10. What keeps 16 MiB for every size has about 16 and 17.

    Args:
        resident_mb: memory of a process in use after each call, in MiB.
    """
    if len(resident_mb) < LEAST_READINGS:
        return None
    half = resident_mb[len(resident_mb) // 2 - 1 :]
    steps = sorted(after - before for before, after in zip(half, half[1:]))
    mean, quartile = (half[-1] - half[0]) / len(steps), steps[len(steps) // 4]
    is_steady = quartile >= max(LEAST_GROWTH_MB, STEADY_SHARE * mean)
    has_grown = len(resident_mb) >= MANY_READINGS and half[-1] > (1 + MOST_GROWTH) * half[0]
    return mean if is_steady or has_grown else None


def general_warnings(environment: Environment) -> List[str]:
    """Why a reader should be careful with all that was measured."""
    governor = environment.cpu.governor
    if governor in (None, "performance"):
        return []
    return [f"the CPU's frequency may change or be held low (governor {governor})"]


def warnings(group: Group, least_rounds: int) -> List[str]:
    """Why a reader should be careful with a group.

    Args:
        least_rounds: that were wanted in any case.
    """
    where = f"{case_name(case(group))} {group.precision}"
    found = []
    for run in group.runs:
        if run.statistics and run.statistics.relative_iqr > MOST_IQR:
            share = f"{100 * run.statistics.relative_iqr:.0f}% of the median"
            found.append(f"{where}, {run.label}: the middle half of its calls spans {share}")
        if not run.settled and not group.image:
            found.append(
                f"{where}, {run.label}: its process computes on after its calls, which slows down "
                "whatever runs beside it"
            )
        growth = growth_mb(run.new_size_resident_mb)
        if growth is not None:
            found.append(
                f"{where}, {run.label}: its memory keeps growing, by {growth:.2g} MiB with each "
                "call of a new size"
            )
    if group.image:
        return found  # All else is said of the group of all images, whose rounds are the same.
    machine = group.machine
    if machine and machine.steal_share > MOST_STEAL:
        share = f"{100 * machine.steal_share:.0f}%"
        found.append(f"{where}: other virtual machines took {share} of the cores")
    if machine and machine.others_share > MOST_OTHERS:
        share = f"{100 * machine.others_share:.0f}%"
        found.append(f"{where}: other processes took {share} of the cores")
    if machine and machine.thermal_throttles:
        found.append(f"{where}: the CPU was slowed down for its temperature")
    if machine and machine.quota_stops > MOST_STOPS * machine.quota_periods:
        found.append(
            f"{where}: the container's CPU quota stopped the processes in {machine.quota_stops} of "
            f"{machine.quota_periods} periods: give it whole cores, or use fewer --threads"
        )
    reasons = [reason for state in group.gpu for reason in state.throttled]
    if reasons:
        why = ", ".join(dict.fromkeys(reasons))
        found.append(f"{where}: the GPU was throttled ({why})")
    if group.stopped == "time budget" and group.rounds < least_rounds:
        found.append(
            f"{where}: {group.rounds} rounds fit in the time budget, {least_rounds} were wanted"
        )
    return found
