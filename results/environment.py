"""What is measured on: CPU, cores, memory, versions, without anything that is private."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Collection, Dict, Iterable, Iterator, List, Optional, Tuple, Union

from results.record import Commit, Cpu, Environment

# The root of the suite.
_HOME = Path(__file__).resolve().parent.parent

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
_CPUS = Path("/sys/devices/system/cpu")


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


def cpu_flags() -> Tuple[str, ...]:
    """Those of `RELEVANT_FLAGS` that this CPU has; empty where the system does not tell."""
    fields = _cpuinfo()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(flag for flag in RELEVANT_FLAGS if flag in present)


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


def default_threads() -> int:
    """Physical cores that this process may use, and never more than `usable_cores`.

    As many threads as PyTorch takes by itself: two on one core share its arithmetic units, and the
    slower of the two holds up the others.
    """
    usable = usable_cores()
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        import psutil

        return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
    return max(1, min(usable, len(set(map(_siblings, allowed)))))


def _siblings(number: int) -> str:
    """The logical cores on the physical core of one, as Linux lists them; else it is alone."""
    topology = _CPUS / f"cpu{number}/topology"
    known = (_read_text(topology / name) for name in ("core_cpus_list", "thread_siblings_list"))
    return next((text.strip() for text in known if text), str(number))


def quota_periods() -> Tuple[int, int]:
    """Periods of a container's CPU quota so far, and in how many of them it stopped the processes.

    Of this process's control group or one above it, whichever was stopped most often; 0 and 0
    where there is no quota.
    """
    counts = [(0, 0)]
    for words in _cgroup_settings("cpu", "cpu.stat"):
        known = dict(zip(words[::2], words[1::2]))
        counts.append((int(known.get("nr_periods", 0)), int(known.get("nr_throttled", 0))))
    return max(counts, key=lambda count: (count[1], count[0]))


def _memory_mb() -> int:
    """Memory that this process may use, in MiB: the machine's, or a container's limit."""
    limits = [
        *_cgroup_settings("memory", "memory.max"),
        *_cgroup_settings("memory", "memory.limit_in_bytes"),
    ]
    sizes = [int(words[0]) for words in limits if words[0] != "max"]
    import psutil  # What a worker of another environment imports from here does without.

    return min([psutil.virtual_memory().total, *sizes]) >> 20


def free_memory_mb() -> int:
    """Memory that this process could have now, in MiB."""
    import psutil

    return min(psutil.virtual_memory().available >> 20, _memory_mb())


def _operating_system() -> str:
    release = re.search(
        r'^PRETTY_NAME="?([^"\n]+)', _read_text(Path("/etc/os-release")) or "", re.M
    )
    return release.group(1) if release else platform.system()


def _git(*arguments: str) -> Optional[str]:
    try:
        completed = subprocess.run(
            ["git", "-C", str(_HOME), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.decode(errors="replace").strip()


def commit() -> Optional[Commit]:
    """The commit of this repository; None outside a checkout, and without git."""
    top = _git("rev-parse", "--show-toplevel")
    # An unpacked copy may lie inside a checkout of something else.
    if not top or Path(top).resolve() != _HOME:
        return None
    revision = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if not revision:
        return None
    return Commit(revision, bool(_git("status", "--porcelain", "--untracked-files=no")))


def _governor() -> Optional[str]:
    """How Linux chooses the CPU's frequency; None where it does not say, as on virtual machines."""
    return (_read_text(_CPUS / "cpu0/cpufreq/scaling_governor") or "").strip() or None


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


def digest_of_files(paths: Iterable[Union[str, Path]]) -> str:
    """Tells files from others by what is in them: 16 hexadecimal digits."""
    hasher = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                hasher.update(chunk)
    return hasher.hexdigest()[:16]


def _variables() -> Dict[str, str]:
    """Environment variables that matter; a path is private and only said to be one."""
    return {
        readable(name): "(path)" if "/" in value or "\\" in value else readable(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(RELEVANT_VARIABLES)
    }


def environment(distributions: Dict[str, str], gpu: Optional[str] = None) -> Environment:
    """What a result was measured on, without host name, user name or paths.

    Args:
        distributions: distribution -> version of what the backends stand on, added to the
            libraries that every run uses.
        gpu: name of the GPU that is measured on, if it is one.
    """
    import psutil

    fields = _cpuinfo()
    return Environment(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cpu=Cpu(
            model=fields.get("model name") or platform.processor() or platform.machine(),
            architecture=platform.machine(),
            flags=cpu_flags(),
            governor=_governor(),
            physical_cores=psutil.cpu_count(logical=False),
            logical_cores=psutil.cpu_count(logical=True),
            usable_cores=usable_cores(),
        ),
        gpu=gpu,
        load_average=tuple(round(load, 2) for load in psutil.getloadavg()),
        memory_mb=_memory_mb(),
        os=_operating_system(),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={**_versions(("torch", "torchvision", "numpy", "scipy")), **distributions},
        commit=commit(),
        variables=_variables(),
    )
