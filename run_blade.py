#!/usr/bin/env python3
"""TorchBlade Detectron2 Benchmark: how much faster each optimizer is, and whether it still sees.

Exit codes: 0, all runs that were asked for are measured and find what Torch fp32 finds, or their
row says why a backend cannot take the model; 1, a run failed, mismatched or (--fail-on) was slower
or lost average precision; 2, wrong usage, unavailable backend, unreadable input, or what was
measured could not be kept; 130, interrupted; 143, terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

from backends import base
from errors import InputError, Parser
from models import CALIBRATION_IMAGES, GENERATIONS, MODELS, RUN_BUDGET_S

# A time budget above a year is a slip, and may be too large a number for the result file.
LONGEST_S = 366 * 86400


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(description="TorchBlade Detectron2 Benchmark")
    add = parse.add_argument
    add("--model", nargs="+", choices=list(MODELS), help="test models to measure")
    add("--all", action="store_true", help="all seven test models")
    add(
        "--config-file",
        metavar="FILE",
        help="a model of your own: its Detectron2 configuration, a YAML file; needs --weights FILE",
    )
    add(
        "--opts",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY VALUE",
        help="keys of the configuration that have other values than in the file; of a LazyConfig "
        "file KEY=VALUE",
    )
    add(
        "--module",
        metavar="FILE",
        help="a detector that was exported elsewhere: TorchScript, .pt2 of torch.export, or .onnx",
    )
    add(
        "--fields",
        type=_names,
        default=(),
        metavar="NAME,NAME,...",
        help="what the tensors are that --module gives for an image, where that cannot be told",
    )
    add(
        "--trust-module",
        action="store_true",
        help="take a --module that is a program, and so could do anything",
    )
    add("--list", action="store_true", help="list test models and backends, and why one is missing")
    add("--backend", nargs="+", metavar="NAME", help="of " + ", ".join(base.names()))
    add(
        "--environment",
        action="append",
        default=[],
        metavar="BACKEND[@NAME]=COMMAND",
        help="run a backend by another Python: its path, or a command that ends in one; with "
        "@NAME it is one row more, beside the backend of this environment",
    )
    add(
        "--precision",
        nargs="+",
        choices=base.PRECISIONS,
        metavar="PRECISION",
        help="of "
        + ", ".join(base.PRECISIONS)
        + " (default: fp32 and what the device has natively)",
    )
    add("--device", choices=base.DEVICES, help="default: cuda where there is one, else cpu")
    add(
        "--source",
        choices=("auto", "bundled", "detectron2"),
        default="auto",
        help="where the detectors come from (default: detectron2 where it is installed; of a model "
        "of your own bundled)",
    )
    add(
        "--trust-config",
        action="store_true",
        help="run the LazyConfig file (.py) that --config-file names, which is a program; needs "
        "--source detectron2",
    )
    add(
        "--image",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="default: a photograph, cropped and resized to 480x640; several are measured in the "
        "same rounds, and reported one by one and together",
    )
    add(
        "--image-size",
        type=image_size,
        metavar="HxW",
        help="crop and resize images to this, in place of what the configuration says",
    )
    for end, what in (("min", "smallest"), ("max", "largest")):
        add(
            f"--{end}-size",
            type=image_size,
            metavar="HxW",
            help=f"the {what} images that engines are made for, with --config-file or --module "
            "(default: what the configuration resizes images of 1:2 to 2:1 to)",
        )
    add(
        "--weights",
        default="auto",
        metavar="auto|zoo|synthetic|FILE",
        help="from the model zoo, made up for the image, or a checkpoint; auto (default): "
        "from the zoo where that can be had, else synthetic",
    )
    add(
        "--detections",
        type=_counts,
        default=(100,),
        metavar="N[,N...]",
        help="objects that synthetic weights find, 0 to 100 (default: 100); several, as in "
        "0,5,30,100, are measured one after the other",
    )
    add(
        "--warmup", type=_at_least(0), metavar="N", help="warm-up calls (default: until they agree)"
    )
    add(
        "--iterations",
        type=_at_least(1),
        metavar="N",
        help="rounds of timed calls (default: until the speedups are known well enough)",
    )
    add(
        "--generations",
        type=_at_least(1),
        metavar="N",
        help="how often all processes are started, 1 or at least 3 times: two that do the same "
        f"differ (default: {GENERATIONS} or more, 3 where these do not fit in the time budget; 1 "
        "with --iterations)",
    )
    add(
        "--time-budget",
        type=_seconds,
        metavar="S",
        help="seconds of timed rounds, and of new processes, per model and precision "
        f"(default: {RUN_BUDGET_S:g} for each process that takes turns, and for each image)",
    )
    add(
        "--sizes",
        type=_at_least(0),
        metavar="N",
        help="calls of images that each have a size never seen before, after the rounds (default: "
        "20, or as many from 8 on as fit into a sixth of the time budget; none with --iterations)",
    )
    add(
        "--threads",
        type=_at_least(1),
        metavar="N",
        help="CPU threads (default: physical cores that can be used)",
    )
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="whether a GPU may round fp32 to TF32 in products and convolutions, in all engines "
        "alike (default: it may)",
    )
    add("--seed", type=_at_least(0), default=0, metavar="N", help="of weights, sizes and order")
    add(
        "--output",
        metavar="DIR",
        help="keep results.json, a page of it, and what the optimizers leave behind; "
        "where a run of the same settings was interrupted, it goes on",
    )
    add(
        "--dataset",
        metavar="FILE",
        help="annotations in COCO's format: every run is evaluated on their images, after the "
        "timing",
    )
    add(
        "--image-root",
        metavar="DIR",
        help="the folder of these images (default: that of the annotations)",
    )
    add(
        "--limit",
        type=_at_least(1),
        metavar="N",
        help="evaluate on so many of them, drawn by --seed (default: on all)",
    )
    add(
        "--min-ap-ratio",
        type=_ratio,
        default=0.99,
        metavar="R",
        help="the share of Torch fp32's average precision that a run has to keep (default: 0.99)",
    )
    for name, metavar, what in (
        ("latency-ms", "MS", "milliseconds of its median call"),
        ("memory-mb", "MB", "MiB of memory, on a GPU of the GPU's"),
        ("prepare-s", "S", "seconds to prepare it"),
    ):
        add(
            f"--max-{name}",
            type=_limit,
            metavar=metavar,
            help=f"recommend no run that takes more {what}",
        )
    add(
        "--json",
        action="store_true",
        help="print which run to ship as JSON; the tables go to standard error",
    )
    add(
        "--calibration",
        metavar="DIR",
        help="images that int8 takes its ranges from, which are never those of --dataset "
        "(default: crops of the timed image)",
    )
    add(
        "--calibration-annotations",
        metavar="FILE",
        help="the images of these annotations in COCO's format, in --calibration or beside them; "
        "layers that cost AP on them stay in fp32",
    )
    add(
        "--calibration-limit",
        type=_at_least(1),
        metavar="N",
        help=f"calibrate on so many of them, drawn by --seed (default: {CALIBRATION_IMAGES})",
    )
    add("--rerun", action="store_true", help="measure what --output has already, too")
    add("--cache", metavar="DIR", help="keep engines there, and take them from there next time")
    add(
        "--fail-on",
        choices=("slower", "loses-ap"),
        nargs="+",
        default=(),
        help="exit with 1 then, too",
    )
    add(
        "--coverage",
        action="store_true",
        help="print how much of each model the engines took",
    )
    add(
        "--costs",
        action="store_true",
        help="print what it took to prepare each run, and after how many images that has paid",
    )
    add("--stages", action="store_true", help="print where the time of the eager module goes")
    add(
        "--roofline",
        action="store_true",
        help="measure how fast this machine multiplies matrices, and print what part of that "
        "each run reaches",
    )
    add(
        "--trace",
        action="store_true",
        help="keep a Chrome trace of one call of each run that PyTorch can profile, in --output",
    )
    add(
        "--bisect",
        action="store_true",
        help="say in which part of the network (backbone, FPN, heads, decoding, NMS) each run that "
        "mismatches or loses average precision first leaves Torch fp32",
    )
    add(
        "--compare-published",
        action="store_true",
        help="print the speedups that TorchBlade published beside ours",
    )
    add("--debug", action="store_true", help="show tracebacks and what the workers printed")
    return parse


def _at_least(least: int, most: Optional[int] = None) -> Callable[[str], int]:
    upper = "" if most is None else f" and at most {most}"

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{value} is not at least {least}{upper}")
        return value

    return number


def _counts(text: str) -> Tuple[int, ...]:
    number = _at_least(0, most=100)
    return tuple(dict.fromkeys(number(part) for part in text.split(",")))


def _names(text: str) -> Tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"'{text}' are not different names with commas between")
    return names


def _positive(what: str, most: float) -> Callable[[str], float]:
    """What reads a number above 0.

    Args:
        what: the number is, for the message.
        most: that it may be.
    """

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}")
        return value

    return number


_seconds = _positive("a number of seconds above 0 and up to a year", LONGEST_S)
_ratio = _positive("a share above 0 and up to 1", 1.0)
_limit = _positive("a number above 0", 1e12)


def image_size(text: str) -> Tuple[int, int]:
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not HxW, like 480x640") from None
    if min(height, width) < 32:
        raise argparse.ArgumentTypeError(f"both sides of {text} must have at least 32 pixels")
    return height, width


class Terminated(KeyboardInterrupt):
    """The process was told to end by `timeout`, a container's stop, or a terminal that closed."""


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGHUP end the run as Ctrl-C does: see `Terminated`."""

    def end(number: int, frame: Any) -> None:
        for other in handlers:  # Once: cleaning up is to be finished.
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGHUP:
            for terminal in terminals:  # It may have closed, and takes no last words then.
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        raise Terminated

    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    # What `nohup` has set to be ignored stays ignored.
    known = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ignored = (signal.SIG_IGN, None)  # None: not ours to change.
    handlers = {number: old for number, old in known.items() if old not in ignored}
    for number in handlers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, old in handlers.items():
            signal.signal(number, old)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command line; returns the exit code."""
    parse = parser()
    options = parse.parse_args(arguments)
    try:
        with ending_in_order():
            return run(options, parse)
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        if options.debug:
            traceback.print_exc()
        print(f"{parse.prog}: error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, parse: Parser) -> int:
    """Does what the command line asks for; returns the exit code.

    Raises:
        errors.InputError: something that was asked for cannot be had.
    """
    own = options.config_file is not None or options.module is not None
    if not options.list and sum((bool(options.model), options.all, own)) != 1:
        parse.error(
            "say which models: --model NAME, --all (see --list), or, for your own, --config-file "
            "FILE or --module FILE"
        )
    if options.module is None and (options.fields or options.trust_module):
        parse.error("--fields and --trust-module go with --module")
    if options.trace and not options.output:
        parse.error("--trace needs --output DIR to keep the traces in")
    # Not before: SciPy takes a second to import, and --help should not.
    from measure import session

    if options.list:
        print(session.listing(options))
        return 0
    return session.measure(options)


if __name__ == "__main__":
    sys.exit(main())
