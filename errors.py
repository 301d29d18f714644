"""The errors that a user sees: one or two sentences that name the thing and the way out."""

import argparse
import re
import traceback
from typing import Any, NoReturn, Sequence

# Lines in which OpenVINO tells where something went wrong, not what.
_PLACE = re.compile(r"Exception from|Check '")
_FRONT_END = "[PyTorch Frontend]"
# A line longer than this says no more.
_LONGEST = 300
# In front of what it has no rule for.
_ITEM = "-- "


class InputError(Exception):
    """What was asked for cannot be read, understood or had here: exit code 2."""


class Unsupported(Exception):
    """A backend cannot take an export; the message becomes the status of the row."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one sentence: the usage of many options would bury it."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # Before Python 3.14 `-1e-3` is an option to it, and no number.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def first_cause(error: BaseException) -> str:
    """What went wrong first, in one line without a traceback.

    TorchScript's interpreter wraps an operator's message in its own traceback, of which the last
    line is the message. PyTorch's C++ errors append a stack to theirs, after the first line.
    OpenVINO's begin with places in its source. An assertion without a message is named by the
    function it stands in.
    """
    while error.__cause__ is not None or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
    kind = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        frames = traceback.extract_tb(error.__traceback__)
        return f"{kind} in {frames[-1].name}()" if frames else kind
    if "TorchScript interpreter" in lines[0] or "Traceback of TorchScript" in str(error):
        # Of what was raised without a text, only the kind is known.
        return re.sub(r"^.*?(\w+):$", r"\1, without a word of why", lines[-1])
    for number, line in enumerate(lines):
        if line.startswith(_FRONT_END):
            return _told(lines, number)[len(_FRONT_END) :].strip()
        if line.startswith(_ITEM):
            return f"{kind}: {line[len(_ITEM) :]}"
    told = [line for line in lines if not _PLACE.match(line)]
    return f"{kind}: {_told(told or lines, 0)}"


def _told(lines: Sequence[str], number: int) -> str:
    """A line; of one that announces something, what it announces, too."""
    told = lines[number]
    for line in lines[number + 1 :]:
        if not told.endswith(":") or len(told) > _LONGEST:
            break
        told += f" {line}"
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."
