"""The result file: what it was measured on, written whole or not at all, and read with care.

docs/results.md documents every key. The document is plain dicts and lists, so that other tools
need nothing but a JSON parser; `load` checks its structure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Collection, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import psutil

import schema
from errors import InputError

SCHEMA = 1
TOOL = "run_blade"

# Beside the result file: what the runs found, to draw it.
FOUND = "detections.json"

# No number of a file is larger, so that no product of two is beyond what a float can hold.
LARGEST = 1e100

# CPU features that decide which kernels an engine picks: x86, then ARM.
RELEVANT_FLAGS = (
    "sse4_1", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "sve", "sve2", "i8mm", "bf16",
)  # fmt: skip

# Environment variables that change how fast the libraries compute, by the beginning of the name.
RELEVANT_VARIABLES = (
    "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "ATEN_", "OV_",
    "TORCH", "PYTORCH_", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "MALLOC_",
)  # fmt: skip

_CGROUPS = Path("/sys/fs/cgroup")
_CPU0 = Path("/sys/devices/system/cpu/cpu0")


def _read_text(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cpuinfo() -> Dict[str, str]:
    """Fields of the first processor in Linux' /proc/cpuinfo; empty elsewhere."""
    first = (_read_text(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> List[str]:
    """Those of `RELEVANT_FLAGS` that this CPU has; empty where the system does not tell."""
    fields = _cpuinfo()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return [flag for flag in RELEVANT_FLAGS if flag in present]


def has_native_bf16(flags: Collection[str]) -> bool:
    """Whether a CPU with these flags has instructions that multiply bf16.

    Without them bf16 is emulated through fp32, and is slower than that.
    """
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _cgroup_settings(controller: str, *names: str) -> Iterator[List[str]]:
    """Words of a setting in this process's control group and in all above it (versions 1, 2)."""
    for line in (_read_text(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = _CGROUPS / controllers
        directory = mount / group.lstrip("/")
        for folder in (directory, *directory.parents):
            texts = [_read_text(folder / name) for name in names]
            if None not in texts:
                yield " ".join(texts).split()
            if folder == mount:
                break


def usable_cores() -> int:
    """Cores that this process may use: CPU affinity and a container's quota, rounded down.

    Threads above a quota do not wait in line, they are all stopped until its period is over,
    which is poison for timings.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    quotas = [
        *_cgroup_settings("cpu", "cpu.max"),
        *_cgroup_settings("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
    ]
    for quota, period in quotas:
        if quota not in ("max", "-1"):  # no limit, in version 2 and 1
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _memory_mb() -> int:
    """Memory that this process may use, in MiB: the machine's, or a container's limit."""
    limits = [
        *_cgroup_settings("memory", "memory.max"),
        *_cgroup_settings("memory", "memory.limit_in_bytes"),
    ]
    sizes = [int(words[0]) for words in limits if words[0] != "max"]
    return min([psutil.virtual_memory().total, *sizes]) >> 20


def _operating_system() -> str:
    release = re.search(
        r'^PRETTY_NAME="?([^"\n]+)', _read_text(Path("/etc/os-release")) or "", re.M
    )
    return release.group(1) if release else platform.system()


def _git(*arguments: str) -> Optional[str]:
    directory = Path(__file__).resolve().parent
    try:
        completed = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.decode(errors="replace").strip()


def commit() -> Optional[Dict[str, Any]]:
    """The commit of this repository and whether tracked files differ from it.

    Returns:
        `revision` (hexadecimal) and `dirty`; None outside a checkout, and without git.
    """
    top = _git("rev-parse", "--show-toplevel")
    # An unpacked copy may lie inside a checkout of something else.
    if not top or Path(top).resolve() != Path(__file__).resolve().parent:
        return None
    revision = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if not revision:
        return None
    return {
        "revision": revision,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _governor() -> Optional[str]:
    """How Linux chooses the CPU's frequency; None where it does not say, as on virtual machines."""
    return (_read_text(_CPU0 / "cpufreq/scaling_governor") or "").strip() or None


def _versions(names: Collection[str]) -> Dict[str, str]:
    """Versions of installed distributions, from their metadata: nothing is imported."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def readable(text: str) -> str:
    """The text with what cannot be encoded spelled out: `caf\\udce9`.

    Such are the bytes of file names and environment variables that are no UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_name(path: Union[str, Path]) -> str:
    """The last part of a path, the only one that is not private, for text that is printed."""
    return readable(Path(path).name)


def _variables() -> Dict[str, str]:
    """Environment variables that matter; a path is private and only said to be one."""
    return {
        readable(name): "(path)" if "/" in value or "\\" in value else readable(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(RELEVANT_VARIABLES)
    }


def environment(distributions: Dict[str, str], gpu: Optional[str] = None) -> Dict[str, Any]:
    """What a result was measured on, without host name, user name or paths.

    Args:
        distributions: distribution -> version of what the backends stand on, added to those that
            every run uses.
        gpu: name of the GPU that is measured on, if it is one.
    """
    fields = _cpuinfo()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": {
            "model": fields.get("model name") or platform.processor() or platform.machine(),
            "architecture": platform.machine(),
            "flags": cpu_flags(),
            "governor": _governor(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(logical=True),
            "usable_cores": usable_cores(),
        },
        "gpu": gpu,
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "memory_mb": _memory_mb(),
        "os": _operating_system(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {**_versions(("torch", "torchvision", "numpy", "scipy")), **distributions},
        "commit": commit(),
        "variables": _variables(),
    }


def _plain(value: Any) -> Any:
    """What json asks for a value that it does not know: NumPy scalars and arrays."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a result file cannot hold a {type(value).__name__}")


def save(document: Dict[str, Any], path: Union[str, Path]) -> None:
    """Writes a result file; whatever happens, `path` has the old content or the whole new one.

    Raises:
        InputError: the file system refuses.
        TypeError, ValueError: the document has something JSON cannot hold, NaN and infinity
            included; nothing has been written.
    """
    write_text(path, json.dumps(document, indent=1, allow_nan=False, default=_plain) + "\n")


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


# Settings that change what is measured, and how.
DECISIVE_SETTINGS = (
    *("model", "backend", "precision", "device", "source", "image", "image_size"),
    *("weights", "detections", "threads", "seed", "warmup", "iterations", "time_budget"),
    *("stages", "trace"),
)


# Objects that synthetic weights find unless something else is asked for.
OBJECTS = 100


Case = Tuple[str, int, Optional[str]]


def case(group: Dict[str, Any]) -> Case:
    """What a group measures: test model, objects that synthetic weights find, and which image.

    The image is None where there is but one, and for all of them together.
    """
    return group["model"], group.get("objects", OBJECTS), group.get("image")


def case_name(of: Case) -> str:
    """A case in words: `testRetinaNet`, `testRetinaNet with 5 objects on dog.jpg`."""
    name, objects, image = of
    counted = name if objects == OBJECTS else f"{name} with {objects} objects"
    return counted if image is None else f"{counted} on {image}"


def image_files(images: Sequence[Any]) -> List[str]:
    """Names of the files beside the result file that keep the images: `image.png`, then numbered.

    Args:
        images: as many as there are.
    """
    return [f"image{place if place > 1 else ''}.png" for place in range(1, len(images) + 1)]


def facts(document: Dict[str, Any]) -> Dict[str, Any]:
    """What was measured on and how, as in a result file, by name; what is not recorded is None."""
    environment, settings = document["environment"], document["settings"]
    commit = environment.get("commit")
    named = {f"cpu.{name}": value for name, value in environment.get("cpu", {}).items()}
    # Files from before the environment had it may have it from NVML.
    states = [state for group in document["groups"] for state in group.get("gpu", ())]
    named["gpu"] = environment.get("gpu") or (states[0].get("name") if states else None)
    named.update({name: environment.get(name) for name in ("memory_mb", "os", "kernel", "python")})
    named.update(environment.get("versions", {}))
    named.update(environment.get("variables", {}))
    named["commit"] = commit and commit["revision"][:10] + " with changes" * commit["dirty"]
    for name in DECISIVE_SETTINGS:
        # A flag that is not set is as good as one that did not exist yet.
        value = settings.get(name)
        named[f"--{name.replace('_', '-')}"] = None if value is False else value
    return named


def differing(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    """Names of the `facts` in which two result files differ."""
    old, new = facts(before), facts(after)
    names = dict.fromkeys([*old, *new])
    return [name for name in names if _differs(name, old.get(name), new.get(name))]


def _differs(name: str, old: Any, new: Any) -> bool:
    if name in ("cpu.flags", "gpu") and not (old and new):
        return False  # One of them was not told, which does not make it another.
    return _shown(old) != _shown(new)


def differences(
    before: Dict[str, Any], after: Dict[str, Any], ignored: Collection[str] = ()
) -> List[str]:
    """What differs between the `facts` of two result files, in words."""
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


def _parsed(text: str) -> Any:
    """The value of a JSON text, which can be computed with and printed.

    Raises:
        ValueError: it is no JSON, or has a number above `LARGEST`.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_int=lambda digits: _in_range(int(digits), digits),
        parse_float=lambda digits: _in_range(float(digits), digits),
    )
    return _printable(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _in_range(number: float, digits: str) -> float:
    if abs(number) > LARGEST:
        raise ValueError(f"{digits[:10]}... is too large a number")
    return number


def _printable(value: Any) -> Any:
    """The same with all texts `readable`: JSON can hold halves of characters."""
    if isinstance(value, dict):
        return {readable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return readable(value) if isinstance(value, str) else value


def load(path: Union[str, Path]) -> Dict[str, Any]:
    """Reads a result file and checks its structure.

    Raises:
        InputError: it is missing, empty, not JSON or cut short, not a result file, written by a
            newer version, or lacks something.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a result file: it is not text") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    try:
        document = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, or it is cut short: {error}") from error
    problem = _problem(document)
    if problem:
        raise InputError(f"{path} {problem}")
    return document


def _problem(document: Any) -> Optional[str]:
    """Why a JSON value is not a result file that this version reads; None if it is one."""
    if not isinstance(document, dict) or document.get("tool") != TOOL:
        return "is not a result file of run_blade"
    number = document.get("schema")
    if isinstance(number, int) and number > SCHEMA:
        return f"has schema {number} and this version reads up to {SCHEMA}: update run_blade"
    if number != SCHEMA:
        return f"is damaged: its schema is {number!r}"
    flaw = schema.document_flaw(document)
    return f"is damaged: {flaw}" if flaw else None


def read_found(folder: Path) -> Dict[str, Any]:
    """What the runs of a result file found, from the file beside it; empty where there is none.

    Raises:
        errors.InputError: it is damaged.
    """
    try:
        found = _parsed((folder / FOUND).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / FOUND} cannot be read: {error}") from error
    flaw = schema.found_flaw(found)
    if flaw:
        raise InputError(f"{folder / FOUND} is not what run_blade.py writes: {flaw}")
    return found


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
