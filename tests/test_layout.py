"""The house: a room imports only from the rooms below it, and nothing heavy where that matters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the top floor down. The files of a room may import each other, but not in a circle.
FLOORS = [
    {"run_blade"},
    {"measure"},
    {"backends"},
    {"detectors"},
    {"compare", "report"},
    {"results"},
    {"models", "benchmark"},
    {"errors", "configuration"},
]
# The session makes a page, and is the only one to look up.
UPWARD = {("measure.session", "report")}


def modules() -> Dict[str, Path]:
    """Modules of the suite by name."""
    paths = [*ROOT.glob("*.py")]
    for room in ("measure", "backends", "detectors", "results"):
        paths += (ROOT / room).glob("*.py")
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.replace(".__init__", ""): path for name, path in named.items()}


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST) -> Iterator[ast.AST]:
    """All import statements, but for those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not for_types_only(node):
            yield from imports(node)


def imported(name: str, known: Set[str]) -> Set[str]:
    """Modules of the suite that one imports, wherever in it."""
    found: List[str] = []
    for node in imports(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [x if x in known else str(node.module) for x in inner]
    return {x for x in found if x in known and x != name}


def graph() -> Dict[str, Set[str]]:
    known = set(modules())
    return {name: imported(name, known) for name in known}


def floor(name: str) -> int:
    (place,) = (i for i, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)
    return place


def test_every_module_has_a_floor():
    assert all(floor(name) >= 0 for name in modules())
    assert len(modules()) > 40


def test_a_room_imports_only_from_below():
    upward = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if name.split(".")[0] != other.split(".")[0] and floor(other) <= floor(name)
    }
    assert upward - UPWARD == set()


def test_there_is_no_circle():
    known = graph()
    while known:
        leaves = {name for name, others in known.items() if not others & set(known)}
        assert leaves, f"a circle among {sorted(known)}"
        known = {name: others for name, others in known.items() if name not in leaves}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("run_blade", {"torch", "numpy", "scipy", "psutil", "msgspec"}),
        ("compare", {"torch", "torchvision", "scipy", "psutil", "matplotlib"}),
        ("report", {"torch", "torchvision", "scipy", "psutil"}),
        # The parent: it takes no memory and no time of PyTorch's for itself.
        ("measure.session", {"torch", "torchvision", "openvino"}),
        # What a worker of another environment imports before it has a run.
        ("measure.run", {"torch", "scipy", "psutil", "msgspec", "tabulate", "tqdm", "PIL"}),
    ],
)
def test_what_is_not_imported(module, unwanted):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not unwanted & set(done.stdout.split())
