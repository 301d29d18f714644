#!/usr/bin/env python3
"""Checks that all that is told of the stored result files reads as it did at an earlier commit.

    python3 tools/check_tables.py COMMIT

It checks COMMIT out into a temporary folder, and takes from there and from here, of every stored
result file: the table of each test model, the other tables, the page with its drawings, and the
comparison of every two files of tests/data/compare with its exit code. Each commit reads its own
copy of the files, as their format differs.

Differences that are known, and that it says when it meets them:

- A file from before its groups told where their weights come from had the lines of all test models
  below each table. Now each table has its own.
- The settings on a page are those of the records: options that only one of the two keeps are left
  out of account, where they are not set or say no more than another.

Exit codes: 0; 1: something else differs; 2: COMMIT cannot be had.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Collection, Dict, Iterator, List, Tuple

HERE = Path(__file__).resolve().parent.parent
# Where the files that docs/ quotes are, and where they were.
MEASURED = ("docs/measured", "results")
COMPARED = "tests/data/compare"
# Settings that are not kept any more: what they say is in `settings.model`.
GONE = ("settings.all", "settings.list")
MOST_LINES = 20

# Kind and what it is of, as in `page: same-01 RetinaNet` -> text.
Texts = Dict[str, str]


# What one commit says --------------------------------------------------------------------------


def texts(tree: Path, names: Collection[str]) -> Texts:
    """All that a checkout says of its stored result files; its modules are imported.

    Args:
        names: of the files, see `stored`; others are passed over.
    """
    sys.path.insert(0, str(tree))
    tables = _tables if (tree / "results" / "tables.py").exists() else _tables_of_old_layout
    said: Texts = {}
    files = {name: path for name, path in stored(tree).items() if name in names}
    for name, path in files.items():
        for kind, of, text in (*tables(path), *_page(path)):
            said[f"{kind}: {name}{of}"] = text
    compared = [path for path in files.values() if path.parent == tree / COMPARED]
    for before, after in itertools.product(compared, repeat=2):
        said[f"comparison: {before.stem} {after.stem}"] = _comparison(before, after)
    return said


def stored(tree: Path) -> Dict[str, Path]:
    """Name -> result file."""
    measured = [path for folder in MEASURED for path in (tree / folder).glob("*/results.json")]
    named = {path.parent.name: path for path in sorted(measured)}
    return {**named, **{path.stem: path for path in sorted((tree / COMPARED).glob("*.json"))}}


def _tables(path: Path) -> Iterator[Tuple[str, str, str]]:
    """Kind, test model and text of each table."""
    from results import facts, file, tables

    results = file.load(path)
    for model in dict.fromkeys(map(facts.case, results.groups)):
        groups = [group for group in results.groups if facts.case(group) == model]
        table = tables.model_table(results, groups, results.settings.roofline)
        yield "model table", f" {facts.case_name(model)}", tables.markdown(table)
    for kind in ("cases", "coverage", "stages", "costs", "published"):
        table = getattr(tables, f"{kind}_table")(results.groups)
        yield f"{kind} table", "", tables.markdown(table)


def _tables_of_old_layout(path: Path) -> Iterator[Tuple[str, str, str]]:
    """The same at a commit from before records had types."""
    benchmark, results, tables = map(import_module, ("benchmark", "results", "tables"))
    document = results.load(path)
    rule = benchmark.StopRule(budget_s=document["settings"].get("time_budget"))
    peaks = document.get("peaks") if document["settings"].get("roofline") else None
    weights = {group.get("weights") for group in document["groups"]}
    general = [note for note in document["notes"] if note not in weights]
    for model in dict.fromkeys(map(results.case, document["groups"])):
        groups = [group for group in document["groups"] if results.case(group) == model]
        notes = [*tables.aa_note(document["aa"]), *general]
        text = tables.model_table(groups, rule, notes, peaks)
        yield "model table", f" {results.case_name(model)}", text
    for kind in ("cases", "coverage", "stages", "costs", "published"):
        yield f"{kind} table", "", getattr(tables, f"{kind}_table")(document["groups"])


def _page(path: Path) -> Iterator[Tuple[str, str, str]]:
    """Kind, heading and HTML of each section of the page."""
    import matplotlib

    import report

    matplotlib.rcParams["svg.hashsalt"] = "the same names in all drawings"
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "report.html"
        with contextlib.redirect_stderr(io.StringIO()):
            report.main([str(path), "--output", str(to)])
        html = to.read_text(encoding="utf-8")
    for section in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).split("<section>"):
        heading = re.search(r"<h2[^>]*>(.*?)</h2>", section)
        yield "page", f" {heading[1]}" if heading else "", section


def _comparison(before: Path, after: Path) -> str:
    import compare

    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = compare.main([str(before), str(after), "--fail-on", "slower,wrong,broken"])
    return f"{printed.getvalue()}{errors.getvalue()}exit code {code}"


# What differs ----------------------------------------------------------------------------------


def as_lines(text: str) -> List[str]:
    """The lines of a text. Those of HTML are its elements, without the whitespace between them.

    The settings of a page are in the order of their names.
    """
    if "</" not in text:
        return text.splitlines()
    facts = sorted(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    text = re.sub(r"<d[td]>.*?</d[td]>", "", text)
    elements = re.split(r"\s*(?=<(?!/)|</ul>)", re.sub(r"\s+", " ", text))
    shown = [re.sub(r"\s+(?=<)|(?<=>)\s+", "", element).strip() for element in elements]
    return [x for x in shown if x] + [f"{name}: {value}" for name, value in facts]


def excused(old: List[str], new: List[str]) -> Tuple[List[str], List[str], List[str]]:
    """Both without the differences that are known, and what these are called."""
    weights = [x for x in old if re.match("(- |<li>)weights: ", x) and x not in new]
    names = {x.partition(":")[0] for x in old}
    settings = [x for x in old if x.startswith(GONE)]
    added = [
        x
        for x in new
        for name, _, value in [x.partition(": ")]
        if name.startswith("settings.") and name not in names and value == "False"
    ]
    vouched = [x for x in new if re.match("(- |<li>)synthetic weights survive", x)]
    known = ["weights of other test models"] if weights else []
    known += ["settings that only one commit keeps"] if settings or added else []
    if vouched and vouched[0] not in old:
        known += ["what synthetic weights vouch for"]
        added += vouched
    left = [x for x in old if x not in weights and x not in settings]
    return left, [x for x in new if x not in added], known


def check(before: Texts, after: Texts) -> bool:
    """Prints what is the same and what is not; returns whether all is."""
    same: Counter = Counter()
    total: Counter = Counter()
    met: Dict[str, Counter] = {}
    for name in dict.fromkeys([*before, *after]):
        kind = name.partition(":")[0]
        old, new = (as_lines(side.get(name, "there is no such text")) for side in (before, after))
        old, new, known = excused(old, new)
        total[kind] += 1
        same[kind] += old == new
        met.setdefault(kind, Counter()).update(known)
        if old != new:
            print(f"\n{name} differs:")
            difference = difflib.unified_diff(old, new, "before", "now", n=0, lineterm="")
            print("\n".join(line[:300] for line in itertools.islice(difference, MOST_LINES)))
    print()
    for kind, count in total.items():
        known = "".join(f"; known: {what} ({times})" for what, times in met[kind].items())
        print(f"{kind}: {same[kind]} of {count} the same{known}")
    return same == total


# The command -----------------------------------------------------------------------------------


def texts_of(tree: Path, names: Collection[str]) -> Texts:
    """What a checkout says, from a process of its own, as modules have the same names in each."""
    command = [sys.executable, str(Path(__file__).resolve()), "--texts", str(tree), *names]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A commit in a folder of its own, which goes again.

    Raises:
        subprocess.CalledProcessError: git cannot do that.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ("git", "-C", str(HERE), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", help="to compare with")
    parser.add_argument("--texts", nargs="+", help=argparse.SUPPRESS)  # A folder, and names.
    options = parser.parse_args()
    if options.texts:
        folder, *names = options.texts
        json.dump(texts(Path(folder), names), sys.stdout)
        return 0
    if not options.commit:
        parser.error("which COMMIT?")
    try:
        with checked_out(options.commit) as tree:
            # A file that the commit does not have has nothing to be compared with.
            names = list(stored(tree))
            before = texts_of(tree, names)
        return 0 if check(before, texts_of(HERE, names)) else 1
    except subprocess.CalledProcessError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
