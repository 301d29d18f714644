"""The contract between the suite and a backend, and the registry that finds backends.

A backend is one file in this package with one subclass of `Backend`; nothing else in the suite
knows its name. A backend's file must import quickly and everywhere, so it imports its engine
inside the methods that need it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    Optional,
    Sequence,
    Tuple,
)

from errors import InputError

if TYPE_CHECKING:
    from detectors.export import Export
    from results.record import AccuracyControl, Coverage

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEVICES = ("cpu", "cuda")
# What NVIDIA's libraries read as they start: 0 forbids TF32, whatever a program says.
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
# The first compute capability that has TF32: Ampere's.
TF32_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Phases:
    """Seconds that a backend took to prepare an export; None for a phase that it does not have.

    Attributes:
        export: tracing or scripting.
        convert: to the engine's own format.
        compile: all that makes it fast.
    """

    export: Optional[float] = None
    convert: Optional[float] = None
    compile: Optional[float] = None


def _nothing_known() -> Coverage:
    # Imported here, because it brings NumPy, and `run_blade.py --help` imports this file.
    from results.record import Coverage

    return Coverage()


@dataclass(frozen=True)
class Optimized:
    """An export made fast, and what is known of it.

    Attributes:
        call: takes the images (float tensors, 3 x H x W, on the run's device) and returns the
            export's flat tuple of tensors on the device the images came from.
        precision: the precision that it really computes in, read back from the engine where the
            engine tells (the *effective* precision). Whether a GPU rounds fp32 to TF32 is not said
            here: `computed_in` says it of all backends.
        read_precision: reads it back from a call, for engines that do not tell and where watching
            them would disturb the timing: it is called after that.
        label: what the table calls the row, where that depends on what executes it; None: the
            backend's own.
        provider: what executes it, as the engine names it.
        threads: CPU threads that the engine uses; None where there is no such number.
        coverage: what is known of how much of the graph the engine took.
        read_coverage: more of that, for what shows only in running: it is called after the timing.
        seconds: time spent preparing.
        artifacts: files that `--output` should keep, by file name.
        cached: whether the compiled engine came from the cache, so that `seconds` are no measure
            of what it takes to build.
        read_artifact_bytes: the size of what was compiled, as one would deploy it, or None where
            there is no such file. It may take long, and is called after the timing.
        control: at int8, which layers stay in fp32, where `Export.validation` has judged that.
        context: what a worker enters once, for all of its calls, as a program that serves would.
        save: writes the engine into an empty folder, from which `Backend.load` has it back; None:
            it cannot be saved, or there is nothing to save.
    """

    call: Callable[..., Tuple[Any, ...]]
    precision: str
    provider: str
    threads: Optional[int] = None
    coverage: Coverage = field(default_factory=_nothing_known)
    seconds: Phases = field(default_factory=Phases)
    artifacts: Dict[str, str] = field(default_factory=dict)
    read_precision: Optional[Callable[[], str]] = None
    read_coverage: Optional[Callable[[], Coverage]] = None
    label: Optional[str] = None
    cached: bool = False
    read_artifact_bytes: Optional[Callable[[], Optional[int]]] = None
    control: Optional[AccuracyControl] = None
    context: Optional[Callable[[], ContextManager[Any]]] = None
    save: Optional[Callable[[Path], None]] = None


class Backend:
    """An optimizer.

    Attributes:
        name: what the command line calls it.
        label: what the table calls it.
        rank: where its rows stand in the table; the baseline has 0.
        devices: of `cpu` and `cuda`, where it runs.
        precisions: device -> the precisions it can compute in there.
        default: whether it is part of a run that names no backend, if it is available.
        in_pytorch: whether PyTorch's profiler sees what it does.
    """

    name: str
    label: str
    rank: int
    devices: Tuple[str, ...]
    precisions: Dict[str, Tuple[str, ...]]
    default: bool = True
    in_pytorch: bool = False

    def unavailable(self, device: str) -> Optional[str]:
        """Says in one sentence why the backend cannot run on `device` here and what to install.

        Returns:
            None where it can run.
        """
        raise NotImplementedError

    def versions(self) -> Dict[str, str]:
        """Versions of the libraries that this backend stands on, by distribution name."""
        raise NotImplementedError

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        """Makes an export fast.

        Args:
            export: the test model, its exported module, inputs and tuning inputs.
            precision: one of `precisions[device]`.
            device: one of `devices`.
            cache: a directory of this run's own for what the engine keeps from one invocation to
                the next, see `cache_folder`; None: everything is built anew.

        Raises:
            errors.Unsupported: the backend cannot take this export; the message says why.
        """
        raise NotImplementedError

    def load(self, export: Export, precision: str, device: str, folder: Path) -> Optimized:
        """What `optimize` has made of the same export, as `Optimized.save` has left it.

        Args:
            folder: with what was saved; it may be used as long as the process lives.
        """
        raise NotImplementedError


def allow_tf32(is_allowed: bool) -> None:
    """Says whether products and convolutions of fp32 may be rounded to TF32 on a GPU.

    For the whole process, before CUDA starts. PyTorch has a switch for each. A variable of NVIDIA's
    forbids it to engines that have none, too (TorchBlade, TensorRT in ONNX Runtime).
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed
    if not is_allowed:
        os.environ[TF32_OVERRIDE] = "0"


def allows_tf32() -> bool:
    """Whether this process may round fp32 to TF32: see `allow_tf32`."""
    import torch

    return bool(torch.backends.cudnn.allow_tf32) and os.environ.get(TF32_OVERRIDE) != "0"


def computed_in(precision: str, device: str) -> str:
    """The effective precision, given what an engine says of itself: fp32 may be `tf32` on a GPU."""
    if precision != "fp32" or device != "cuda" or not allows_tf32():
        return precision
    import torch

    return "tf32" if torch.cuda.get_device_capability() >= TF32_CAPABILITY else precision


def module_name(operator: str) -> str:
    """The module that an operator of a converted graph comes from, as Detectron2 names it.

    Args:
        operator: as OpenVINO or PyTorch's exporter to ONNX names it:
            `__module.detector.backbone.fpn_lateral3/aten::_convolution/Convolution`,
            `/detector/backbone/fpn_lateral3/Conv`.
    """
    name = operator.strip("/")
    if name.startswith("__module."):
        name = name[len("__module.") :].split("/")[0]
    else:
        name = ".".join(name.split("/")[:-1]) or name
    return name[len("detector.") :] if name.startswith("detector.") else name


def names() -> List[str]:
    """Names of all backends, without importing any: the files of this package."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(module.name for module in modules if module.name != "base")


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        errors.InputError: there is none; the message lists those there are.
    """
    if name not in names():
        raise InputError(f"unknown backend '{name}'; there are {', '.join(names())}")
    module = importlib.import_module(f"backends.{name}")
    classes = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Backend) and cls.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise TypeError(f"backends/{name}.py must define exactly one Backend, not {len(classes)}")
    return classes[0]()


def load_all() -> List[Backend]:
    """All backends, in the order in which the table lists them."""
    return sorted(map(load, names()), key=lambda backend: (backend.rank, backend.name))


def cache_folder(root: Path, backend: Backend, export: Export, precision: str, device: str) -> Path:
    """The directory in a cache for one run, created where there is none.

    Not all engines' own caches notice another version, other weights or other sizes, so what they
    would have to notice is in the directory's name.

    Args:
        root: of the cache, `--cache`.

    Raises:
        errors.InputError: it cannot be created.
    """
    digest = hashlib.sha256()
    facts = [
        backend.name,
        sorted(backend.versions().items()),
        type(export).__name__,
        export.model,  # Its anchors and thresholds are in no weights.
        precision,
        device,
        _machine(device),
        [
            (which, [tuple(x.shape) for x in images])
            for which, images in sorted(export.tuning_inputs.items())
        ],
    ]
    digest.update(repr(facts).encode())
    for name, value in sorted(export.eager.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy())
    folder = root / backend.name / f"{export.name}-{precision}-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache {folder} cannot be written: {error.strerror or error}") from error
    return folder


def _machine(device: str) -> List[Any]:
    """What engines are compiled for, besides the model."""
    import torch

    from results.environment import cpu_flags

    if device == "cuda":
        return [torch.cuda.get_device_name(), torch.version.cuda, allows_tf32()]
    return [platform.machine(), cpu_flags(), torch.get_num_threads()]


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Size of the files in a directory and below whose names match."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def check_sizes(images: Sequence[Any], export: Export, engine: str) -> None:
    """Refuses images that an engine with bounded shapes was not built for.

    Args:
        images: of a call, 3 x H x W each.
        export: its tuning inputs are the bounds.
        engine: what the message calls it.

    Raises:
        errors.InputError: another number of images, or one smaller than `min` or larger than `max`.
    """
    smallest, largest = export.tuning_inputs["min"], export.tuning_inputs["max"]
    if len(images) != len(smallest):
        raise InputError(f"{export.name} takes {len(smallest)} image(s) a call, not {len(images)}")
    for number, (image, low, high) in enumerate(zip(images, smallest, largest), 1):
        bounds = zip(low.shape, image.shape, high.shape)
        if len(image.shape) != 3 or not all(a <= b <= c for a, b, c in bounds):
            raise InputError(
                f"image {number} is {_shape(image)}, and {engine} was built for {export.name} with "
                f"{_shape(low)} to {_shape(high)}; scale it, or tune with another --image-size"
            )


def _shape(image: Any) -> str:
    return " x ".join(str(int(side)) for side in image.shape)
