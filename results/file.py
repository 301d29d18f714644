"""Reading and writing result files: whole or not at all, and with care.

`msgspec` checks a file against the records, so that a reader needs no doubt: its messages name the
place, as in "Expected `int`, got `str` - at `$.groups[0].rounds`". Keys that it does not know are
ignored, so that a newer minor version may add some.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import inspect
import json
import os
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, TypeVar, Union

import msgspec
import numpy as np

from errors import InputError
from models import timed
from results.environment import readable
from results.record import SCHEMA, TOOL, Group, Picture, Results, Run

# In a folder of results: what was measured, and beside it what the runs found, to draw it.
RESULTS, FOUND = "results.json", "detections.json"
# No number of a file is larger, so that no product of two is beyond what a float can hold.
LARGEST = 1e100

Found = Dict[str, Picture]
T = TypeVar("T")


def result_file(path: Union[str, Path]) -> Path:
    """The result file that is meant: a file, or the one in a folder that `--output` has filled."""
    path = Path(path)
    return path / RESULTS if path.is_dir() else path


def load(path: Union[str, Path]) -> Results:
    """Reads a result file.

    Raises:
        InputError: it is missing, empty, not JSON or cut short, not a result file, of another
            schema, or damaged.
    """
    path = Path(path)
    document = _parsed(path, "a result file")
    if not isinstance(document, dict) or document.get("tool") != TOOL:
        raise InputError(f"{path} is not a result file of run_blade")
    schema = document.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise InputError(
            f"{path} has schema {schema} and this version reads {SCHEMA}: update run_blade"
        )
    if isinstance(schema, int) and 0 < schema < SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, of an older version, and this one reads {SCHEMA}: "
            "measure again"
        )
    if schema != SCHEMA:
        raise InputError(f"{path} is damaged: its schema is {schema!r}")
    results = _converted(document, Results, path)
    for place, group in enumerate(results.groups):
        flaw = _group_flaw(group)
        if flaw:
            raise InputError(f"{path} is damaged: {flaw} - at `$.groups[{place}]`")
    return _with_percentiles(results)


def save(results: Results, path: Union[str, Path]) -> None:
    """Writes a result file; whatever happens, `path` has the old content or the whole new one.

    Raises:
        InputError: the file system refuses.
        ValueError: a number is NaN or infinite; nothing has been written.
    """
    write_text(path, _text(results, indent=1) + "\n")


def as_json(records: Any) -> str:
    """Records as they stand in a result file, indented."""
    return _text(records, indent=1)


def load_found(folder: Path) -> Found:
    """What the runs of a result file found, from the file beside it; empty where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / FOUND
    if not path.exists():
        return {}
    found = _converted(_parsed(path, "what run_blade.py writes"), Found, path)
    for name, picture in found.items():
        flaw = _picture_flaw(picture)
        if flaw:
            raise InputError(f"{path} is damaged: {flaw} - at `$[{name!r}]`")
    return found


def save_found(found: Found, folder: Path) -> None:
    """Writes `detections.json` into a folder, as `save` does."""
    write_text(folder / FOUND, _text(found))


def image_files(images: Sequence[Any]) -> List[str]:
    """Names of the files beside the result file that keep the images: `image.png`, then numbered.

    Args:
        images: as many as there are.
    """
    return [f"image{place if place > 1 else ''}.png" for place in range(1, len(images) + 1)]


def write_text(path: Union[str, Path], text: str) -> None:
    """Writes a file; whatever happens, `path` has the old content or the whole new one.

    What cannot be encoded is spelled out, as `readable` does: no measurement is lost for a name.

    Raises:
        InputError: the file system refuses.
    """
    path = Path(path)
    # In the same directory, so that the last step is a rename.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if temporary.exists():
                temporary.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other invocations out of a folder; a lock ends with the process that has it.

    Raises:
        InputError: another process has it.
    """
    path = folder / f".{TOOL}.lock"
    try:
        descriptor = _lock(path)
    except BlockingIOError as error:
        owner = f" by process {error.strerror}" if error.strerror else ""
        raise InputError(
            f"output directory {folder} is in use{owner}: choose another --output, or wait"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor of a locked file, which says by what process.

    Raises:
        BlockingIOError: another process has the lock; its number is the error's text.
        OSError: the file cannot be created.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(error.errno, owner) from None
        except OSError:  # Not all file systems have locks.
            return descriptor
        if _is_at(descriptor, path):
            with contextlib.suppress(OSError):  # It is for the message only; the disk may be full.
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # The one that had it has just removed it.


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def prepare_directory(path: Union[str, Path], what: str = "output") -> Path:
    """Creates a directory, with its parents, and makes sure it can be written.

    Args:
        what: it is for, in the words of the error.

    Raises:
        InputError: it cannot be created or written.
    """
    path = Path(path)
    probe = path / f".{TOOL}.{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise InputError(f"{what} directory {path} is a file") from error
    except OSError as error:
        raise InputError(
            f"{what} directory {path} cannot be written: {error.strerror or error}"
        ) from error
    return path


def schema() -> Dict[str, Any]:
    """The JSON Schema of a result file, from the records, with their docstrings."""
    made = msgspec.json.schema(Results)
    for record in made["$defs"].values():
        # From Python 3.13 on docstrings have lost their indentation already.
        record["description"] = inspect.cleandoc(record["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


# Between texts and records ---------------------------------------------------------------------


def _text(records: Any, indent: Optional[int] = None) -> str:
    plain = _printable(msgspec.to_builtins(records, enc_hook=_plain))
    return json.dumps(plain, indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """What msgspec asks for a value that it does not know: NumPy scalars and arrays."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result file cannot hold a {type(value).__name__}")


def _printable(value: Any) -> Any:
    """The same with all texts `readable`: names of files may have bytes that are no UTF-8."""
    if isinstance(value, dict):
        return {readable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    return readable(value) if isinstance(value, str) else value


def _parsed(path: Path, what: str) -> Any:
    """The JSON value of a file.

    Raises:
        InputError: it cannot be read, is empty, or not JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not {what}: it is not text") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    try:
        document = msgspec.json.decode(text)
        flaw = _number_flaw(document, "$")
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, or it is cut short: {error}") from error
    if flaw:
        raise InputError(f"{path} is damaged: {flaw}")
    return document


def _with_percentiles(results: Results) -> Results:
    """Earlier versions left out the 99th percentile of fewer than 299 calls."""
    groups = (
        replace(group, runs=tuple(map(_with_percentile, group.runs))) for group in results.groups
    )
    return replace(results, groups=tuple(groups))


def _with_percentile(run: Run) -> Run:
    known = run.statistics
    if known is None or known.p99_ms is not None or not run.samples_s:
        return run
    p99_ms = 1000 * float(np.percentile(run.samples_s, 99))
    return replace(run, statistics=replace(known, p99_ms=p99_ms))


def _converted(document: Any, kind: Any, path: Path) -> Any:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{path} is damaged: {error}") from error


# What the types of the records do not say ------------------------------------------------------


def _number_flaw(value: Any, place: str) -> Optional[str]:
    if isinstance(value, dict):
        items = [(f"{place}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    else:
        too_large = isinstance(value, (int, float)) and abs(value) > LARGEST
        return f"too large a number - at `{place}`" if too_large else None
    flaws = (_number_flaw(item, where) for where, item in items)
    return next((flaw for flaw in flaws if flaw), None)


def _group_flaw(group: Group) -> Optional[str]:
    sides = [side for sizes in group.image_sizes.values() for size in sizes for side in size]
    if not any(run.baseline for run in group.runs):
        return "no run is the baseline"
    if group.image_sizes and not timed(group.image_sizes):
        return "none of `image_sizes` is timed"
    if not all(group.image_sizes.values()) or any(side <= 0 for side in sides):
        return "`image_sizes` has no images, or sides without pixels"
    if group.stages is not None and group.stages.rest <= 0:
        return "`stages` has no rest"
    if group.stages is not None and min(astuple(group.stages)) < 0:
        return "`stages` has less than no time"
    if group.generations and sum(group.generations) != group.rounds:
        return f"`generations` have {sum(group.generations)} rounds, and `rounds` is {group.rounds}"
    if any(side <= 0 for size in group.new_sizes for side in size):
        return "`new_sizes` has sides without pixels"
    if any(len(run.new_size_s) > len(group.new_sizes) for run in group.runs):
        return "a run has more calls than there are `new_sizes`"
    flaws = (_run_flaw(run) for run in group.runs)
    return next((flaw for flaw in flaws if flaw), None)


def _run_flaw(run: Run) -> Optional[str]:
    timings = [run.samples_s, *run.size_seconds.values(), run.new_size_s]
    timings.append(tuple(run.first_call_s.values()))
    if any(seconds <= 0 for timing in timings for seconds in timing):
        return f"a call of {run.name} took no time"
    if not all(run.size_seconds.values()):
        return f"`size_seconds` of {run.name} has an input without calls"
    if run.statistics is not None and run.statistics.median_ms <= 0:
        return f"the median of {run.name} is not positive"
    if run.detections is not None and not run.detections:
        return f"`detections` of {run.name} is empty"
    return None


def _picture_flaw(picture: Picture) -> Optional[str]:
    """Whether what belongs together does not."""
    found = [images for runs in picture.runs.values() for images in runs.values()]
    if not all(found):
        return "a run has no images"
    for image in (*picture.reference, *(image for images in found for image in images)):
        lists = [image.boxes, image.scores, image.classes, *_agrees(image)]
        lists += [each for each in (image.corners, image.keypoints, image.masks) if each]
        if len(set(map(len, lists))) > 1:
            return "lists of one image differ in length"
        if any(len(each) != 8 for each in image.corners):
            return "a rotated box has not four corners"
        if any(len(each) % 2 for mask in image.masks for each in mask):
            return "an outline of a mask has half a corner"
        if image.labels is not None and not _is_png(image.labels):
            return "`labels` is no PNG file"
    pairs = (pair for images in found for pair in zip(images, picture.reference))
    for image, reference in pairs:
        if not all(0 <= index < len(reference.scores) for index in image.lost):
            return "`lost` names a detection that the reference does not have"
    return None


def _is_png(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    except ValueError:
        return False


def _agrees(image: Any) -> List[Sequence[bool]]:
    return [image.agrees] if hasattr(image, "agrees") else []
