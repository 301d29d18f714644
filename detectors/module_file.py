"""What there is in a file that a detector was exported to, found out without running any of it.

TorchScript is read by PyTorch's own reader, and run by its interpreter. What `torch.export.save`
wrote has places where PyTorch runs what the file says: pickles, names of functions, expressions
that SymPy evaluates. A `.pt2` is taken as data only where none of these is used for more than it is
for.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from errors import InputError, first_cause
from models import Module
from results.environment import digest_of_files, file_name

# Compiled code, as AOTInductor packs it, and what could be loaded as such.
_NATIVE = re.compile(r"(^|/)data/aotinductor/|\.(so|o|a|dll|dylib|cubin|hsaco|cpp|cu|py|pyc)$")
# What the graph of a `.pt2` may name: operators, and arithmetic of sizes. PyTorch 2.14 looks up any
# name below `torch`, and calls it.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+"
    r"|torch\.(_sym_|sym_)\w+"
)
# Expressions of sizes, as SymPy writes them, which has Python evaluate them: numbers, names, and
# calls of these.
_EXPRESSION = re.compile(r"[\w\s()+\-*/%<>=!&|~,.]*", re.ASCII)
_ATTRIBUTE = re.compile(r"\D\.|\.\s*[^\W\d]")
_CALL = re.compile(r"(\w+)\s*\(")
_FUNCTION = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv"
    "|IntTrueDiv|FloatTrueDiv|ModularIndexing|Where|CeilToInt|FloorToInt|TruncToInt|TruncToFloat"
    "|RoundToInt|ToFloat|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|StrictLessThan|LessThan"
    "|StrictGreaterThan|GreaterThan|floor|ceiling"
)
_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"


def inspect(path: Path, fields: Tuple[str, ...] = (), is_trusted: bool = False) -> Module:
    """What there is in a file.

    Args:
        fields: names of the tensors that it gives for an image; none: they are to be guessed.
        is_trusted: whether it may be a program.

    Raises:
        errors.InputError: it cannot be read, is nothing that is known here, or is a program and not
            trusted.
    """
    name = file_name(str(path))
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"--module {name} {problem}")
    try:
        kind = _kind(path, name)
        files, size = [path], None
        if kind == "onnx":
            external, size = _read_onnx(path, name)
            files += external
        elif kind == "exported":
            size = _exported_size(path)
        if kind in ("exported", "compiled") and not is_trusted:
            program = _why_program(path, kind)
            if program is not None:
                raise InputError(
                    f"--module {name} {program}, so that loading it could run anything: "
                    "--trust-module takes it all the same"
                )
        digest = digest_of_files(files)
    except OSError as error:
        raise InputError(f"--module {name} cannot be read: {error.strerror or error}") from None
    return Module(str(path.absolute()), kind, digest, fields, size)


def _kind(path: Path, name: str) -> str:
    """What a file is, by what is in it: its name tells only of ONNX, which has no mark of its own.

    Raises:
        errors.InputError: nothing that is known here.
    """
    if not zipfile.is_zipfile(path):
        if path.suffix == ".onnx":
            return "onnx"
        raise InputError(f"--module {name} is neither TorchScript, nor of torch.export, nor .onnx")
    names = _names(path)
    for kind, is_in in (
        ("compiled", any(each.startswith("data/aotinductor/") for each in names)),
        ("exported", _MODEL in names),
        ("torchscript", "constants.pkl" in names),
    ):
        if is_in:
            return kind
    if "data.pkl" in names:
        raise InputError(
            f"--module {name} is a checkpoint, which has weights and no detector: "
            "--config-file FILE --weights FILE takes it"
        )
    raise InputError(f"--module {name} is an archive without a detector that is known here")


def _names(path: Path) -> List[str]:
    """Names in an archive, without the folder that all of them are in."""
    with zipfile.ZipFile(path) as archive:
        return [name.partition("/")[2] or name for name in archive.namelist()]


def _entry(path: Path, name: str) -> bytes:
    """What is in an archive under a name, without the folder that all of them are in."""
    with zipfile.ZipFile(path) as archive:
        inside = next(x for x in archive.namelist() if (x.partition("/")[2] or x) == name)
        return archive.read(inside)


# torch.export ----------------------------------------------------------------------------------


def _why_program(path: Path, kind: str) -> Optional[str]:
    """Why loading a `.pt2` could run more than the operators of a graph; None where it could not.

    Written against PyTorch 2.14's `torch/_export/serde/serialize.py` and
    `torch/export/pt2_archive/_package.py`.
    """
    names = _names(path)
    if kind == "compiled" or any(_NATIVE.search(name) for name in names):
        return "holds native code"
    for name in names:
        if name.startswith("models/") and name != _MODEL:
            return "holds several programs"
        if not name.endswith(".json"):
            continue
        try:
            document = json.loads(_entry(path, name))
        except (ValueError, RecursionError):
            return "holds what is no JSON"
        for key, value in _walk(document):
            if key == "use_pickle" and value is not False:
                return "holds pickles"
            if key == "target" and not (isinstance(value, str) and _OPERATOR.fullmatch(value)):
                return f"names {str(value)[:60]!r} for an operator"
            if key == "expr_str" and not _is_expression(value):
                return f"has {str(value)[:60]!r} for a size"
    return None if _INPUTS not in names or _is_data(_entry(path, _INPUTS)) else "holds pickles"


def _is_expression(text: Any) -> bool:
    """Whether something is arithmetic of sizes, and no more."""
    if not isinstance(text, str) or "__" in text:
        return False
    text = re.sub(r"'\w+'", "name", text)
    if not _EXPRESSION.fullmatch(text) or _ATTRIBUTE.search(f" {text}"):
        return False
    return all(_FUNCTION.fullmatch(name) for name in _CALL.findall(text))


def _is_data(content: bytes) -> bool:
    """Whether PyTorch reads a pickle without running it: else it would, and run it."""
    import torch

    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # A damaged one can raise any exception there is.
        return not content
    return True


def _walk(document: Any) -> Iterator[Tuple[str, Any]]:
    """All keys and values of a JSON document."""
    pending = [document]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield from each.items()
            pending += each.values()
        elif isinstance(each, list):
            pending += each


def _exported_size(path: Path) -> Optional[Tuple[int, int]]:
    """Height and width of the only images that a program takes; None where they are free."""
    try:
        graph = json.loads(_entry(path, _MODEL))["graph_module"]
        inputs = [x["user_input"] for x in graph["signature"]["input_specs"] if "user_input" in x]
        values = graph["graph"]["tensor_values"]
        sides = values[inputs[0]["arg"]["as_tensor"]["name"]]["sizes"]
        return int(sides[-2]["as_int"]), int(sides[-1]["as_int"])
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return None  # Of another version, or of sizes that are expressions.


# ONNX ------------------------------------------------------------------------------------------


def _read_onnx(path: Path, name: str) -> Tuple[List[Path], Optional[Tuple[int, int]]]:
    """Files beside an ONNX file that have its weights; and height and width, where they are fixed.

    Raises:
        errors.InputError: it is damaged, its weights lie elsewhere, or it takes no image 3 x H x W.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--module {name} takes ONNX Runtime ({error}): pip install onnx onnxruntime"
        ) from None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"--module {name} is no ONNX file: {first_cause(error)}") from None
    weights = {x.name for x in model.graph.initializer}
    images = [x for x in model.graph.input if x.name not in weights]
    shapes = [[x.dim_value for x in image.type.tensor_type.shape.dim] for image in images]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] not in (0, 3):
        found = ", ".join("x".join(str(side or "?") for side in x) for x in shapes) or "nothing"
        raise InputError(f"--module {name} takes {found}, where one image of 3xHxW is given")
    _, height, width = shapes[0]
    return _external_files(model, path, name), (height, width) if height and width else None


def _external_files(model: Any, path: Path, name: str) -> List[Path]:
    """Files that have weights of an ONNX model.

    Raises:
        errors.InputError: one is not there, or not below the folder of the model.
    """
    folder = path.absolute().parent.resolve()
    places: Dict[str, Path] = {}
    for tensor in _tensors(model.graph):
        for location in (x.value for x in tensor.external_data if x.key == "location"):
            places[location] = (folder / location).resolve()
    for location, place in places.items():
        if folder not in place.parents:
            raise InputError(f"--module {name} has weights outside its folder: {location[:120]!r}")
        if not place.is_file():
            raise InputError(f"--module {name} has weights in {location[:120]!r}, which is missing")
    return sorted(set(places.values()))


def _tensors(graph: Any) -> Iterator[Any]:
    """All tensors of an ONNX graph, those of attributes and subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)
