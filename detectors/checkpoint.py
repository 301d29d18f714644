"""Reading checkpoints as data, not as programs, and loading them into a detector.

A pickle is a program: loading one with `pickle.load` runs whatever it imports. Nothing here does.
What `torch.save` wrote goes through `torch.load(weights_only=True)`, any other pickle through an
unpickler that knows a fixed list of names: see `detectors.unpickling`.
"""

import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Union

import torch
from torch import Tensor, nn

from detectors import unpickling
from detectors.mismatch import explain
from detectors.unpickling import ImportRefused
from errors import InputError


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# How `torch.save` begins a file that is no zip archive: a number of its own, as a pickle.
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _is_torch(path: Path) -> bool:
    """Whether `torch.save` wrote a file; its name does not tell."""
    with open(path, "rb") as file:
        begins = file.read(len(_TORCH_MAGIC)) == _TORCH_MAGIC
    return begins or zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


# PyTorch's weights_only can be told what else to take. Before 2.6 it cannot, or not by the names
# that other NumPys have.
_CAN_ADMIT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


def _admitted_to_torch() -> ContextManager[Any]:
    """While it lasts, `torch.load(weights_only=True)` takes NumPy's scalars and arrays.

    Trainers keep such beside the weights, in the state of a scheduler for example.
    """
    named = [(value, ".".join(name)) for name, value in unpickling.NUMPY.items()]
    return torch.serialization.safe_globals(named)


def _read_torch(path: Path) -> Any:
    # Before 2.6 PyTorch read these two without regard to weights_only (CVE-2025-32434): its tar
    # archives of 2017, and TorchScript, which it hands on to torch.jit.load.
    if tarfile.is_tarfile(path) or _is_torchscript(path):
        raise pickle.UnpicklingError("not a state dict")
    try:
        if not _CAN_ADMIT:
            return torch.load(path, map_location="cpu", pickle_module=unpickling.OF_TENSORS)
        with _admitted_to_torch():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # "Unsupported class x.y" (PyTorch 2.0), "Unsupported global: GLOBAL x.y" (later).
        refused = re.search(r"(?:GLOBAL|Unsupported class) (\w[\w.]*\w)", str(error))
        if refused:
            raise ImportRefused(refused.group(1)) from error
        raise


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        return unpickling.load(file)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a header, and then the header, which is JSON."""
    with open(path, "rb") as file:
        begin = file.read(9)
    length = int.from_bytes(begin[:8], "little")
    begins = begin[8:] == b"{" and length <= path.stat().st_size
    return begins or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load
    except ImportError:
        raise InputError(
            f"checkpoint {path} is of safetensors, which is not installed here: "
            "pip install safetensors"
        ) from None
    # Not load_file: its tensors are of the file, which may be written anew while they are used.
    return load(path.read_bytes())


# Where the weights are in what programs save, the ones to take first: beside `model` there may be
# averages of its weights over the training (EMA), under one of the names in the third line.
_PLACES = (
    *("model", "state_dict"),
    "blobs",  # Caffe2
    *("model_ema", "ema_state", "ema_state_dict", "state_dict_ema", "ema_model", "ema"),
)
# What wrappers put before every name: of several GPUs and of averages, of torch.compile, of
# Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")


def _unwrapped(document: Any) -> Dict[Any, Any]:
    """The state dict in a document; a dictionary without tensors where there is none."""
    for _ in range(3):  # A damaged file may have a dictionary in itself.
        if not isinstance(document, dict):
            return {}
        inner = [document[name] for name in _PLACES if isinstance(document.get(name), dict)]
        if not inner:
            break
        document = inner[0]
    return document if isinstance(document, dict) else {}


def _tensors(document: Any) -> Dict[str, Tensor]:
    """The tensors of a state dict, bare or in one of `_PLACES`, without `_PREFIXES`."""
    state: Dict[str, Tensor] = {}
    for key, value in _unwrapped(document).items():
        array = value.known() if isinstance(value, unpickling.Array) else None
        if array is not None and array.dtype.kind in "bif":
            value = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        if isinstance(key, str) and isinstance(value, Tensor):
            state[key] = value.detach()
    if any(key.startswith("module.") for key in state):
        state.pop("n_averaged", None)  # PyTorch's AveragedModel counts beside its module.
    return _without_prefixes(state)


def _without_prefixes(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Takes away what all names begin with, in whatever order the wrappers are."""
    for prefix in 3 * _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _check_plain(path: Path, state: Dict[str, Tensor]) -> None:
    """Makes sure that tensors are arrays of numbers in memory, as weights are."""
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise InputError(
                f"checkpoint {path} has a {_shown(key)} that is quantized, sparse or without values"
            )


def read(path: Union[str, Path]) -> Dict[str, Tensor]:
    """Reads a checkpoint: what `torch.save` wrote, a pickle as the model zoo has them, safetensors.

    Of a trainer's file the weights under `model` are taken, also where there are averaged ones
    (EMA) beside them; these where there are no others. Entries that are no tensors (`__author__`,
    `matching_heuristics`) are left out, and prefixes such as `module.` if all keys have them.

    Returns:
        Parameter name -> tensor on the CPU.

    Raises:
        InputError: the file does not exist, is truncated, is no checkpoint, tries to import
            something other than arrays and containers (it does not run), or has no tensors; or
            it is of safetensors, and that is not installed.
    """
    path = Path(path)
    try:
        state = _tensors(_document(path))
    except InputError:
        raise
    except ImportRefused as error:
        raise InputError(
            f"checkpoint {path} was not loaded: it tries to import {str(error)[:80]!r}, "
            "and a checkpoint may hold arrays and plain containers only"
        ) from error
    except OSError as error:  # no permission, a name that is too long
        if error.strerror is None:  # not of the system: a damaged archive's
            raise InputError(f"checkpoint {path} is truncated or is not a checkpoint") from error
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise any exception there is
        raise InputError(f"checkpoint {path} is truncated or is not a checkpoint") from error
    if not state:
        raise InputError(f"checkpoint {path} has no tensors in it")
    _check_plain(path, state)
    return state


def _document(path: Path) -> Any:
    """What is in a file, whose content tells its format, and not its name."""
    if path.is_dir():
        raise InputError(f"checkpoint {path} is a directory, not a file")
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist")
    if not path.is_file():  # Of a pipe nothing may ever come.
        raise InputError(f"checkpoint {path} is not a file")
    if _is_safetensors(path):
        return _read_safetensors(path)
    return _read_torch(path) if _is_torch(path) else _read_pickle(path)


def _is_ignored(key: str) -> bool:
    """Whether a key plays no part in inference: its presence or absence says nothing.

    Detectron2 computes cell anchors and takes `pixel_mean` and `pixel_std` from the configuration,
    while old checkpoints still have them; `num_batches_tracked` counts training steps, and
    `fed_loss_cls_weights` are the weights of a loss.
    """
    name = key.rsplit(".", 1)[-1]
    return (
        name in ("num_batches_tracked", "pixel_mean", "pixel_std", "fed_loss_cls_weights")
        or "anchor_generator.cell_anchors" in key
    )


def _frozen_statistics(model: nn.Module, state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Statistics that a checkpoint may lack, because they are folded into weight and bias.

    Detectron2's FrozenBatchNorm2d takes mean 0 and variance 1 for them. A batch norm that is not
    frozen has to have its own.
    """
    statistics: Dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            buffer = getattr(module, name, None)
            if isinstance(buffer, Tensor) and f"{prefix}.weight" in state:
                statistics[f"{prefix}.{name}"] = torch.full_like(buffer, value)
    return statistics


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _differences(own: Dict[str, Tensor], state: Dict[str, Tensor]) -> List[str]:
    """How many keys and shapes differ, each with an example."""
    missing = [key for key in own if key not in state and not _is_ignored(key)]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
    differences: List[str] = []
    if missing:
        differences.append(f"keys missing: {len(missing)}, such as {missing[0]}")
    if unexpected:
        differences.append(f"keys unexpected: {len(unexpected)}, such as {_shown(unexpected[0])}")
    if reshaped:
        key = reshaped[0]
        differences.append(
            f"shapes that differ: {len(reshaped)}, such as {key}, "
            f"{_size(state[key])} instead of {_size(own[key])}"
        )
    return differences


def _shown(key: str) -> str:
    """A name from a file: it may be long, and of several lines."""
    return key if key.isprintable() and len(key) <= 120 else ascii(key)[:120]


def _is_real(tensor: Tensor) -> bool:
    """Whether there are real numbers in it. Of those of 4 bits PyTorch only keeps the bits."""
    try:
        tensor.reshape(-1)[:1].float()
    except RuntimeError:
        return False
    return tensor.is_floating_point()


def load_into(
    model: nn.Module, state: Dict[str, Tensor], source: str, has_keys: bool = True
) -> None:
    """Loads a state dict into a model: every key and every shape has to fit.

    Exempt are the keys that Detectron2 ignores or fills in (`_is_ignored`, `_frozen_statistics`).
    Other precisions, such as half, become the model's. The model is changed only if everything
    fits.

    Args:
        model: any Detectron2-compatible module, bundled or Detectron2's own.
        state: parameter name -> tensor, from `read`.
        source: what the error message calls the checkpoint.
        has_keys: whether a configuration with Detectron2's keys could make it fit.

    Raises:
        InputError: the checkpoint belongs to another architecture, has other classes, or has whole
            numbers for weights; with the likely reason.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not _is_ignored(key)}
    state = {**_frozen_statistics(model, state), **state}
    differences = _differences(own, state)
    if differences:
        compared = {
            key: value for key, value in own.items() if not _is_ignored(key) or key in state
        }
        told = explain(compared, state, "; ".join(differences), has_keys)
        raise InputError(f"checkpoint {source} {told}")
    for key, value in state.items():
        if own[key].is_floating_point() and not _is_real(value):
            raise InputError(
                f"checkpoint {source} has {value.dtype} in {key}, where real numbers belong: "
                "quantized weights are not known here"
            )
    model.load_state_dict(state, strict=False)
