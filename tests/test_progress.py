"""What the user sees while something long is done."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from measure import progress
from measure.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def counted(monkeypatch: Any, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress().counting("evaluating", 5, 1, "image") as advance:
        for _ in range(4):
            advance(1)
    return stream.getvalue()


@pytest.mark.parametrize(("every", "lines"), [(60.0, 1), (-1.0, 4)])
def test_without_a_terminal_a_line_tells_once_in_a_while(monkeypatch, every, lines):
    monkeypatch.setattr(progress, "SAID_EVERY_S", every)
    said = counted(monkeypatch, io.StringIO()).splitlines()
    assert len(said) == lines
    assert said[0].endswith("s] evaluating")
    # The last one is said by what follows.
    assert [line.rsplit(": ", 1)[1] for line in said[1:]] == [
        f"{n} of 5 images" for n in range(2, 2 + len(said) - 1)
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    said = counted(monkeypatch, Terminal())
    assert "evaluating" in said
    assert "/5 " in said
