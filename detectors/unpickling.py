"""Unpickling without running what a pickle says: arrays, tensors and plain containers only.

A pickle is a program, and NumPy is no safe place for what one says: its own types take a damaged
state as it is, and a process that then looks at such an array reads and frees memory that is not
its own. So NumPy's names stand here for types that take notes. An array is made of these notes when
it is asked for, from bytes whose number and kind were checked.
"""

from __future__ import annotations

import collections
import pickle
import re
from types import SimpleNamespace
from typing import Any, BinaryIO, Dict, Optional, Tuple

import numpy as np
import torch

# Types of numbers and of text, as `numpy.dtype` names them: NumPy knows no other sizes.
_CODE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|\?|[SU]\d{1,6})")


class ImportRefused(pickle.UnpicklingError):
    """A pickle names something to import that is not on the list."""


# Stand-ins for NumPy ---------------------------------------------------------------------------


class DType:
    """Stands for `numpy.dtype`: what a pickle says of a type."""

    __slots__ = ("code", "state")

    def __init__(self, code: Any = None, *others: Any) -> None:
        self.code, self.state = code, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def known(self) -> Optional[np.dtype]:
        """The type; None where it is none of numbers or of text."""
        code, state = _text(getattr(self, "code", None)), getattr(self, "state", None)
        if code is None or not _CODE.fullmatch(code):
            return None
        kind = np.dtype(code)
        if state is None:
            return kind
        # (version, byte order, subdtype, names, fields, and so on); what it says of sizes and flags
        # follows from the code, and is not looked at.
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            return None
        order = _text(state[1])
        return kind.newbyteorder(order) if order in ("<", ">", "=", "|") else None


class Array:
    """Stands for `numpy.ndarray`: what a pickle says of an array."""

    __slots__ = ("axes", "state")

    def __init__(self, *arguments: Any) -> None:
        self.state = self.axes = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def known(self) -> Optional[np.ndarray]:
        """The array, a copy; None where it has no numbers or text.

        Raises:
            pickle.UnpicklingError, ValueError: it has no shape, or its bytes do not fit that.
        """
        state = getattr(self, "state", None)
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise pickle.UnpicklingError("an array without a state")
        shape, dtype, is_fortran, content = state[-4:]  # Before them, a version.
        kind = dtype.known() if isinstance(dtype, DType) else None
        content = content.encode("latin1") if isinstance(content, str) else content  # Python 2.
        if kind is None or not isinstance(content, (bytes, bytearray)):
            return None
        if not isinstance(shape, tuple) or not all(type(x) is int and x >= 0 for x in shape):
            raise pickle.UnpicklingError("an array of no shape")
        order = "F" if is_fortran else "C"
        array = np.frombuffer(bytearray(content), kind).reshape(shape, order=order)
        return array if self.axes is None else array.transpose(self.axes)


def _text(value: Any) -> Optional[str]:
    if isinstance(value, bytes):
        return value.decode("latin1")
    return value if isinstance(value, str) else None


def _reconstruct(*arguments: Any) -> Array:
    """Stands for the function that begins an array, whose state follows."""
    return Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *axes: Any) -> Array:
    """Stands for the function that protocol 5 has instead."""
    array = Array()
    if order == "K" and axes and isinstance(shape, tuple) and isinstance(axes[0], (tuple, list)):
        # Its bytes are those of the array before it was transposed, whose shape is given.
        array.axes = tuple(axes[0])
    array.state = (shape, dtype, order == "F", content)
    return array


def _scalar(dtype: Any = None, content: Any = None) -> Any:
    """Stands for the function that makes NumPy's scalars: a number or a text of Python's."""
    array = Array()
    array.state = ((), dtype, False, content)
    known = array.known()
    return None if known is None else known.item()


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    """Not of a number, which would be a length."""
    return bytearray(_encode(content, encoding) if isinstance(content, str) else bytes(content[:]))


def _bytes(*arguments: Any) -> bytes:
    """How protocol 2 spells none."""
    return b""


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocols up to 2 spell bytes: a text, of which each character is one."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes that are spelled in another way")
    return text.encode("latin1")


# What a pickle may name, by NumPy 1 and 2. Nothing is imported by name: it is looked up here.
NUMPY: Dict[Tuple[str, str], Any] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
}
for _core in ("numpy.core", "numpy._core"):
    NUMPY[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    NUMPY[f"{_core}.multiarray", "scalar"] = _scalar
    NUMPY[f"{_core}.numeric", "_frombuffer"] = _from_buffer

_PLAIN: Dict[Tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): collections.Counter,  # A scheduler's milestones.
    ("_codecs", "encode"): _encode,
    **{
        (module, name): container
        for module in ("builtins", "__builtin__")
        for name, container in (
            *(("set", set), ("frozenset", frozenset)),
            *(("bytearray", _bytearray), ("bytes", _bytes)),
        )
    },
    **NUMPY,
}

# What names the tensors in a file of `torch.save`. Its storages PyTorch looks up itself.
_TENSORS: Dict[Tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}


# Unpicklers ------------------------------------------------------------------------------------


class DataUnpickler(pickle._Unpickler):
    """Unpickles arrays, as `Array`, and plain containers; refuses to import anything else.

    Python's own, as the one in C makes room for whatever number of objects a damaged file names.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _PLAIN[module_name, global_name]
        except (KeyError, TypeError):
            raise ImportRefused(f"{module_name}.{global_name}") from None

    def load_global(self) -> None:
        """Two lines, of which a file that is cut off may have a part."""
        lines = self.readline(), self.readline()
        if not all(line.endswith(b"\n") for line in lines):
            raise pickle.UnpicklingError("a name is cut off")
        self.append(self.find_class(*(line[:-1].decode("utf-8") for line in lines)))

    def load_build(self) -> None:
        """Only of what is made for it: the state of a function would outlive the file."""
        kinds = (DType, Array, collections.OrderedDict, torch.Tensor, torch.nn.Parameter)
        if type(self.stack[-2]) not in kinds:
            raise pickle.UnpicklingError("a state of what has none")
        super().load_build()

    def load_bytearray8(self) -> None:
        """Reads before it makes room."""
        length = int.from_bytes(self.read(8), "little")
        content = self.read(length)
        if len(content) != length:
            raise pickle.UnpicklingError("bytes are missing")
        self.append(bytearray(content))

    dispatch[pickle.GLOBAL[0]] = load_global
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class TensorUnpickler(DataUnpickler):
    """Takes tensors, too: for a PyTorch that cannot be told to take the scalars of NumPy."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _TENSORS[module_name, global_name]
        except (KeyError, TypeError):
            return super().find_class(module_name, global_name)


# What `torch.load` asks of a pickle module.
OF_TENSORS = SimpleNamespace(
    __name__="tensors",
    Unpickler=TensorUnpickler,
    load=lambda file, **rest: TensorUnpickler(file, **rest).load(),
)


def load(file: BinaryIO) -> Any:
    """What a pickle without tensors holds.

    Raises:
        ImportRefused: it names something else.
        Exception: it is damaged.
    """
    # latin1: the zoo has files that Python 2 wrote.
    return DataUnpickler(file, encoding="latin1").load()
