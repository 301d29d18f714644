#!/usr/bin/env python3
"""Do the tests notice what they are for? Breaks the code in one place at a time, and looks.

`mutations.json` beside this file has the places: what is wrong then, the file, the old text and the
new one, and the tests that have to fail. The checkout is copied and left alone.

    python tools/check_tests.py [WORDS]    only mutations whose description has these words

Exit code: 1 if one was not noticed, or its place is gone.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A mutation may make something endless.
LIMIT_S = 600


def outcome(tree: Path, mutation: dict[str, str]) -> str:
    """What became of a mutation: `caught`, `not caught`, or why it could not be tried."""
    path = tree / mutation["file"]
    text = path.read_text(encoding="utf-8")
    if text.count(mutation["old"]) != 1:
        return f"its text occurs {text.count(mutation['old'])} times in {mutation['file']}"
    path.write_text(text.replace(mutation["old"], mutation["new"]), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *shlex.split(mutation["tests"])],
            cwd=tree,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return "caught (it did not end)"
    finally:
        path.write_text(text, encoding="utf-8")
    # Pytest ends with 1 where a test failed; with 5 where it found none.
    return {0: "not caught", 1: "caught"}.get(done.returncode, f"pytest's code {done.returncode}")


def main() -> int:
    """Tries them one by one; returns the exit code."""
    mutations = json.loads(Path(__file__).with_name("mutations.json").read_text(encoding="utf-8"))
    words = " ".join(sys.argv[1:])
    missed = 0
    with tempfile.TemporaryDirectory(prefix="run_blade_") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__"))
        for mutation in mutations:
            if words not in mutation["what"]:
                continue
            start = time.monotonic()
            found = outcome(tree, mutation)
            missed += not found.startswith("caught")
            seconds = time.monotonic() - start
            print(f"{found:12}{seconds:6.0f} s  {mutation['what']}", flush=True)
    print(f"{missed} were not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
