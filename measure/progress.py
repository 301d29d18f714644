"""What the user sees while waiting, on standard error: a bar on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Callable, Iterator

from benchmark import Rounds, StopRule

# Seconds between two lines on how far something is.
SAID_EVERY_S = 60.0


class Progress:
    """Says what is being done."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """One line, with the seconds since the start."""
        print(f"[{time.monotonic() - self._start:5.0f} s] {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def rounds(self, title: str, rule: StopRule) -> Iterator[Callable[[Rounds], None]]:
        """Shows rounds going by; yields what is to be called after each."""
        if not sys.stderr.isatty():
            self.say(f"{title}: timing")
            yield lambda rounds: None
            return
        from tqdm import tqdm

        with tqdm(total=rule.max_rounds, desc=title, unit="round", leave=False) as bar:
            yield lambda rounds: bar.update(1) and None

    def _now_and_then(self, title: str, total: int, done: int, unit: str) -> Callable[[int], None]:
        """Says how far something is, once in a while."""
        said = time.monotonic()

        def advance(more: int) -> None:
            nonlocal done, said
            done += more
            if time.monotonic() - said > SAID_EVERY_S and done < total:
                said = time.monotonic()
                self.say(f"{title}: {done} of {total} {unit}s")

        return advance

    @contextlib.contextmanager
    def counting(
        self, title: str, total: int, done: int, unit: str
    ) -> Iterator[Callable[[int], None]]:
        """Shows how many of something are done; yields what is to be called with how many more."""
        if not sys.stderr.isatty():
            self.say(title)
            yield self._now_and_then(title, total, done, unit)
            return
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=title, unit=unit, leave=False) as bar:
            yield lambda more: bar.update(more) and None
