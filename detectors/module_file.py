"""What there is in a file that a detector was exported to, found out without running any of it.

TorchScript is read by PyTorch's own reader, and run by its interpreter. What `torch.export.save`
wrote has places where PyTorch runs what the file says: pickles, names of functions, expressions
that SymPy evaluates, conditions and names that it writes Python of. A `.pt2` is taken as data only
where none of these is used for more than it is for.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from detectors.inputs import SMALLEST_SIDE
from errors import InputError, first_cause
from models import Module
from results.environment import digest_of_files, file_name

Size = Tuple[int, int]

# What a side has at the most where only the other one has an end.
_MOST_SIDE = 1 << 16
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
# What PyTorch runs on graphs of their own.
_CONTROL_FLOW = re.compile(r"torch\.ops\.higher_order\.\w+")
# Names of tensors, arguments, weights and versions.
_NAME = re.compile(r"[\w.+-]*", re.ASCII)
# What conditions of sizes are made of, besides names and numbers.
_OF_GUARD = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Subscript, ast.Call),
    *(ast.operator, ast.cmpop, ast.boolop, ast.unaryop, ast.Load),
)
# What the images and the tensors of a call lie in; None: an image, or a tensor.
_COLLECTIONS = (
    None,
    *("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"),
)
# How an archive begins.
_ARCHIVE = b"PK\x03\x04"
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
        with path.open("rb") as file:
            start = file.read(len(_ARCHIVE))
        if not start:
            raise InputError(f"--module {name} is empty")
        if zipfile.is_zipfile(path):
            kind, smallest, largest = _read_archive(path, name, is_trusted)
            files = [path]
        elif path.suffix == ".onnx":  # It has no mark of its own.
            external, size = _read_onnx(path, name)
            kind, smallest, largest, files = "onnx", size, size, [path, *external]
        elif start == _ARCHIVE:
            raise InputError(f"--module {name} is damaged: the end of the archive is missing")
        else:
            raise InputError(
                f"--module {name} is neither TorchScript, nor of torch.export, nor .onnx"
            )
        digest = digest_of_files(files)
    except OSError as error:
        raise InputError(f"--module {name} cannot be read: {error.strerror or error}") from None
    return Module(str(path.absolute()), kind, digest, fields, smallest, largest)


# Archives --------------------------------------------------------------------------------------


class _Archive:
    """What is in an archive, by names without the folder that all of them are in.

    Attributes:
        names: of all entries, in their order; one that is there twice is twice in it.
    """

    def __init__(self, opened: zipfile.ZipFile) -> None:
        self._opened = opened
        entries = [(x.filename.partition("/")[2] or x.filename, x) for x in opened.infolist()]
        self.names = [name for name, _ in entries]
        self._entries = dict(entries)

    def read(self, name: str) -> bytes:
        """The content of an entry."""
        return self._opened.read(self._entries[name])


def _read_archive(
    path: Path, name: str, is_trusted: bool
) -> Tuple[str, Optional[Size], Optional[Size]]:
    """What an archive is, by what is in it; and the smallest and the largest images that it takes.

    Raises:
        errors.InputError: it is damaged, nothing that is known here, or a program and not trusted.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            archive = _Archive(opened)
            kind = _kind(archive, name)
            program = _why_program(archive, kind) if not is_trusted else None
            sizes = _exported_sizes(archive) if kind == "exported" else (None, None)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise InputError(f"--module {name} is damaged: {first_cause(error)}") from None
    if program is not None:
        raise InputError(
            f"--module {name} {program}, so that loading it could run anything: --trust-module "
            "takes it all the same"
        )
    return (kind, *sizes)


def _kind(archive: _Archive, name: str) -> str:
    """What an archive is.

    Raises:
        errors.InputError: nothing that is known here.
    """
    names = archive.names
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
    what = "an archive without a detector that is known here" if names else "an empty archive"
    raise InputError(f"--module {name} is {what}")


# torch.export ----------------------------------------------------------------------------------


def _why_program(archive: _Archive, kind: str) -> Optional[str]:
    """Why loading a file could run more than the operators of a graph; None where it could not.

    Written against PyTorch 2.14's `torch/_export/serde/serialize.py`, `torch/export/_unlift.py`,
    which writes Python from names, guards and the structure of inputs, and
    `torch/export/pt2_archive/_package.py`.
    """
    if kind == "torchscript":
        return None
    names = archive.names
    if kind == "compiled" or any(_NATIVE.search(name) for name in names):
        return "holds native code"
    # PyTorch may find the other one: it does not tell capitals, nor folders, apart as this does.
    lower = [name.lower() for name in names]
    often, count = Counter(lower).most_common(1)[0]
    if count > 1:
        return f"has {often[:60]!r} {count} times"
    for name, written in zip(lower, names):
        if name.startswith("models/") and written != _MODEL:
            return "holds several programs"
        if not name.endswith(".json"):
            continue
        try:
            document = json.loads(archive.read(written))
        except (ValueError, RecursionError):
            return "holds what is no JSON"
        for key, value in _walk(document):
            reason = _why_unsafe(key, value)
            if reason is not None:
                return reason
    inputs = next((written for name, written in zip(lower, names) if name == _INPUTS), None)
    return None if inputs is None or _is_data(archive.read(inputs)) else "holds pickles"


def _why_unsafe(key: str, value: Any) -> Optional[str]:
    """Why a key of a JSON document and its value could be more than data; None: they could not."""
    if not _NAME.fullmatch(key):
        return f"has {key[:60]!r} for a name"
    if key == "use_pickle" and value is not False:
        return "holds pickles"
    if key == "target":
        if isinstance(value, str) and _CONTROL_FLOW.fullmatch(value):
            return f"has conditions or loops ({value}), which are not looked into"
        if not (isinstance(value, str) and _OPERATOR.fullmatch(value)):
            return f"names {str(value)[:60]!r} for an operator"
    elif key == "expr_str":
        if not _is_expression(value):
            return f"has {str(value)[:60]!r} for a size"
    elif key == "guards_code":
        odd = [x for x in (value if isinstance(value, list) else [value]) if not _is_guard(x)]
        if odd:
            return f"has {str(odd[0])[:60]!r} for a condition"
    elif key in ("in_spec", "out_spec"):
        if not _is_structure(value):
            return f"has {str(value)[:60]!r} for the structure of what goes in or out"
    elif key not in ("as_string", "as_strings"):  # Which PyTorch quotes.
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _NAME.fullmatch(text):
                return f"has {text[:60]!r} for a name"
    return None


def _is_expression(text: Any) -> bool:
    """Whether something is arithmetic of sizes, and no more."""
    if not isinstance(text, str) or "__" in text:
        return False
    text = re.sub(r"'(\w+|-?\d+\.\d*(e[+-]?\d+)?)'", "name", text)
    if not _EXPRESSION.fullmatch(text) or _ATTRIBUTE.search(f" {text}"):
        return False
    return all(_FUNCTION.fullmatch(name) for name in _CALL.findall(text))


def _is_guard(text: Any) -> bool:
    """Whether something is a condition of sizes, such as `L['x'].size()[1] >= 2`, and no more.

    PyTorch runs it as Python.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_of_guard(node) for node in ast.walk(tree))


def _is_of_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("L", "math", "torch") or bool(_FUNCTION.fullmatch(node.id))
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in ("math", "torch"):
            return bool(_OPERATOR.fullmatch(f"{node.value.id}.{node.attr}"))
        return node.attr in ("size", "stride", "storage_offset")
    if isinstance(node, ast.Constant):
        # Of text only names: PyTorch puts it between quotes of its own.
        is_name = isinstance(node.value, str) and node.value.isidentifier()
        return is_name or isinstance(node.value, (int, float))
    return isinstance(node, _OF_GUARD)


def _is_structure(text: Any) -> bool:
    """Whether something tells how tuples, lists and dictionaries of names lie in one another."""
    try:
        for key, value in _walk(json.loads(text)):
            if key == "type" and value not in _COLLECTIONS:
                return False
            if key == "context" and not _are_names(None if value is None else json.loads(value)):
                return False
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _are_names(keys: Any) -> bool:
    return keys is None or (
        isinstance(keys, list) and all(isinstance(x, str) and x.isidentifier() for x in keys)
    )


def _is_data(content: bytes) -> bool:
    """Whether PyTorch reads a pickle without running it: else it would, and run it."""
    import torch

    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # A damaged one can raise any exception there is.
        return not content
    return True


def _walk(document: Any) -> Iterator[Tuple[str, Any]]:
    """All keys and values of a JSON document, but for remarks: texts that are not run."""
    pending = [document]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            for key, value in each.items():
                yield key, value
                is_remarks = key == "metadata" and isinstance(value, dict)
                if not (is_remarks and all(isinstance(x, str) for x in value.values())):
                    pending.append(value)
        elif isinstance(each, list):
            pending += each


def _exported_sizes(archive: _Archive) -> Tuple[Optional[Size], Optional[Size]]:
    """Height and width of the smallest and of the largest images that a program takes.

    None where they are free.
    """
    try:
        document = json.loads(archive.read(_MODEL))
        graph = document["graph_module"]
        inputs = [x["user_input"] for x in graph["signature"]["input_specs"] if "user_input" in x]
        values = graph["graph"]["tensor_values"]
        sides = values[inputs[0]["arg"]["as_tensor"]["name"]]["sizes"][-2:]
        (low, high), (left, right) = (_range(x, document["range_constraints"]) for x in sides)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return None, None  # Of another version.
    # No image has a smaller side, and PyTorch knows of each that it has more than one pixel.
    smallest = (low, left) if max(low, left) > SMALLEST_SIDE else None
    largest = (high or _MOST_SIDE, right or _MOST_SIDE) if high or right else None
    return smallest, largest


def _range(side: Dict[str, Any], ranges: Dict[str, Any]) -> Tuple[int, Optional[int]]:
    """The least and the most pixels of a side; None: there is no most."""
    if "as_int" in side:
        return int(side["as_int"]), int(side["as_int"])
    symbol = re.match(r"Symbol\('(\w+)',", side["as_expr"]["expr_str"])
    known = ranges.get(symbol.group(1), {}) if symbol else {}
    most = known.get("max_val")
    return int(known.get("min_val") or 0), None if most is None else int(most)


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
