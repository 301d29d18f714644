"""Reading checkpoints as data, not as programs, and loading them into a detector.

A pickle is a program: loading one with `pickle.load` runs whatever it imports. Nothing here does.
What `torch.save` wrote goes through `torch.load(weights_only=True)`, any other pickle through an
unpickler that knows a fixed list of harmless constructors.
"""

import _codecs
import collections
import contextlib
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from errors import InputError


class _ImportRefused(pickle.UnpicklingError):
    """A checkpoint names something to import that is not on the list."""


def _numpy_constructors() -> Dict[Tuple[str, str], Any]:
    # Asked from NumPy itself: the functions moved from numpy.core to numpy._core in 2.0.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float32(0).__reduce__()[0]
    from_buffer = np.empty(1).__reduce_ex__(5)[0]
    admitted: Dict[Tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    for core in ("numpy.core", "numpy._core"):
        admitted[f"{core}.multiarray", "_reconstruct"] = reconstruct
        admitted[f"{core}.multiarray", "scalar"] = scalar
        admitted[f"{core}.numeric", "_frombuffer"] = from_buffer
    return admitted


# What a pickle may name. Nothing is ever imported by name: it is looked up here or refused.
_ADMITTED: Dict[Tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    # How protocols up to 2 spell the bytes of an array.
    ("_codecs", "encode"): _codecs.encode,
    **{
        (module, container.__name__): container
        for module in ("builtins", "__builtin__")
        for container in (set, frozenset, bytearray)
    },
    **_numpy_constructors(),
}


class _DataUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers; refuses to import anything else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise _ImportRefused(f"{module_name}.{global_name}") from None


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


def _admitted_to_torch() -> ContextManager[Any]:
    """While it lasts, `torch.load(weights_only=True)` takes NumPy's scalars and arrays.

    Trainers keep such beside the weights, in the state of a scheduler for example.
    """
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < (2, 6):  # It takes no names of other modules, as other NumPys have them.
        return contextlib.nullcontext()
    named = [(value, ".".join(name)) for name, value in _numpy_constructors().items()]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    return torch.serialization.safe_globals([*named, *kinds])


def _read_torch(path: Path) -> Any:
    # Before 2.6 PyTorch read these two without regard to weights_only (CVE-2025-32434): its tar
    # archives of 2017, and TorchScript, which it hands on to torch.jit.load.
    if tarfile.is_tarfile(path) or _is_torchscript(path):
        raise pickle.UnpicklingError("not a state dict")
    try:
        with _admitted_to_torch():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # "Unsupported class x.y" (PyTorch 2.0), "Unsupported global: GLOBAL x.y" (later).
        refused = re.search(r"(?:GLOBAL|Unsupported class) (\w[\w.]*\w)", str(error))
        if refused:
            raise _ImportRefused(refused.group(1)) from error
        raise


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        # latin1: the zoo has files that Python 2 wrote.
        return _DataUnpickler(file, encoding="latin1").load()


def _tensors(document: Any) -> Dict[str, Tensor]:
    """The tensors of a state dict, bare or below `model` or `state_dict`."""
    for key in ("model", "state_dict"):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
    if not isinstance(document, dict):
        return {}
    state: Dict[str, Tensor] = {}
    for key, value in document.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "bif":
            # astype copies, because an array over a pickle's bytes is read-only.
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if isinstance(key, str) and isinstance(value, Tensor):
            state[key] = value.detach()
    if all(key.startswith("module.") for key in state):  # saved from DistributedDataParallel
        state = {key[len("module.") :]: value for key, value in state.items()}
    return state


def read(path: Union[str, Path]) -> Dict[str, Tensor]:
    """Reads a checkpoint: what `torch.save` wrote, or a pickle as the model zoo has them.

    Entries that are no tensors (`__author__`, `matching_heuristics`) are left out, and the prefix
    `module.` if all keys have it.

    Returns:
        Parameter name -> tensor on the CPU.

    Raises:
        InputError: the file does not exist, is truncated, is no checkpoint, tries to import
            something other than arrays and containers (it does not run), or has no tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"checkpoint {path} is a directory, not a file")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        document = _read_torch(path) if _is_torch(path) else _read_pickle(path)
    except _ImportRefused as error:
        raise InputError(
            f"checkpoint {path} was not loaded: it tries to import {str(error)[:80]!r}, "
            "and a checkpoint may hold arrays and plain containers only"
        ) from error
    except PermissionError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise any exception there is
        raise InputError(f"checkpoint {path} is truncated or is not a checkpoint") from error
    state = _tensors(document)
    if not state:
        raise InputError(f"checkpoint {path} has no tensors in it")
    return state


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


# The layers whose size depends on the number of classes.
_BY_CLASS = re.compile(r"(cls_score|bbox_pred|mask_head\.predictor)\.(weight|bias)$")


def _other_classes(
    own: Dict[str, Tensor], state: Dict[str, Tensor], reshaped: Sequence[str]
) -> Optional[Tuple[int, int]]:
    """Numbers of classes, of a checkpoint and of the model, where they alone make the difference.

    Args:
        reshaped: keys whose shapes differ.
    """
    scores = [key for key in reshaped if key.endswith("cls_score.bias")]
    if not scores or not all(_BY_CLASS.search(key) for key in reshaped):
        return None
    found, wanted = state[scores[0]].numel(), own[scores[0]].numel()
    if "box_predictor" in scores[0]:
        return found - 1, wanted - 1  # One is for what is no object.
    anchors = len(own["head.bbox_pred.bias"]) // 4  # RetinaNet has a score for each anchor.
    if any(key.startswith("head.bbox_pred") for key in reshaped) or found % anchors:
        return None  # It has others.
    return found // anchors, wanted // anchors


def load_into(model: nn.Module, state: Dict[str, Tensor], source: str) -> None:
    """Loads a state dict into a model: every key and every shape has to fit.

    Exempt are the keys that Detectron2 ignores or fills in (`_is_ignored`, `_frozen_statistics`).
    The model is changed only if everything fits.

    Args:
        model: any Detectron2-compatible module, bundled or Detectron2's own.
        state: parameter name -> tensor, from `read`.
        source: what the error message calls the checkpoint.

    Raises:
        InputError: the checkpoint belongs to another architecture, or has other classes.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not _is_ignored(key)}
    state = {**_frozen_statistics(model, state), **state}
    missing = [key for key in own if key not in state and not _is_ignored(key)]
    unexpected = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]

    differences: List[str] = []
    if missing:
        differences.append(f"keys missing: {len(missing)}, such as {missing[0]}")
    if unexpected:
        differences.append(f"keys unexpected: {len(unexpected)}, such as {unexpected[0]}")
    if reshaped:
        key = reshaped[0]
        differences.append(
            f"shapes that differ: {len(reshaped)}, such as {key}, "
            f"{_size(state[key])} instead of {_size(own[key])}"
        )
    classes = None if missing or unexpected else _other_classes(own, state, reshaped)
    if classes is not None:
        raise InputError(f"checkpoint {source} is of {classes[0]} classes, not of {classes[1]}")
    if differences:
        raise InputError(
            f"checkpoint {source} belongs to another architecture ({'; '.join(differences)})"
        )
    model.load_state_dict(state, strict=False)
