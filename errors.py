"""The errors that a user sees: one or two sentences that name the thing and the way out."""

import argparse
from typing import NoReturn


class InputError(Exception):
    """What was asked for cannot be read, understood or had here: exit code 2."""


class Unsupported(Exception):
    """A backend cannot take an export; the message becomes the status of the row."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one sentence: the usage of many options would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def sentence(error: BaseException) -> str:
    """The line of an error that says most, with the error's kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    # TorchScript's interpreter puts a traceback of its own before what went wrong.
    if "Traceback of TorchScript" in str(error):
        return lines[-1]
    return f"{kind}: {lines[0]}"
