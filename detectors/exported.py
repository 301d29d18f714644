"""A detector from a file that it was exported to elsewhere, see `detectors.module_file`.

The file is its own reference, run by PyTorch or ONNX Runtime. An engine that needs what the file
does not have says so in its row.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
import torchvision  # noqa: F401  A file may name its operators.
from torch import Tensor, nn

from detectors.export import Export, Outcome, limit, score_threshold
from errors import InputError, Unsupported, first_cause
from models import OTHER_RUNNERS, Model, Module
from results.environment import file_name

# What a file is, for messages.
KINDS = {
    "torchscript": "TorchScript",
    "exported": "a program of torch.export",
    "compiled": "a package of AOTInductor",
    "onnx": "an ONNX graph",
}
# Whatever else a file gives, these have to be among it.
DETECTIONS = (
    {"pred_boxes", "pred_classes", "scores"},
    {"proposal_boxes", "objectness_logits"},
    {"sem_seg"},
)


class ExportedElsewhere(Export):
    """An export that is a file.

    Raises:
        errors.InputError: the file cannot be loaded, takes no image, or gives no detections.
    """

    def __init__(self, model: Model, tuning_inputs: Dict[str, Tuple[Tensor, ...]]) -> None:
        if model.module is None:
            raise TypeError("a model without a file")
        self.module = model.module
        own = model.configuration
        known = (None, None) if own is None else (score_threshold(own), limit(own))
        outcome = Outcome(self.module.fields, *known)
        super().__init__(model, outcome, _load(self.module), tuning_inputs)
        self.own_runner = OTHER_RUNNERS.get(self.kind)
        self.onnx_file = self.module.path if self.kind == "onnx" else None
        self.program = self.eager.program if isinstance(self.eager, _Program) else None
        self.fields = self.fields or self._fields()

    def _fields(self) -> Tuple[str, ...]:
        image = self.inputs[0]
        try:
            with torch.no_grad():
                found = self.eager(image)
        except Exception as error:
            raise InputError(self.failure(image, error)) from None
        # Of dictionaries they are known when the first was seen.
        named: Tuple[str, ...] = getattr(self.eager, "names", ())
        are_known = any(names <= set(named) for names in DETECTIONS)
        return named if are_known else guess(found, image, self.name_of_file)

    @property
    def name_of_file(self) -> str:
        """What messages call it."""
        return f"--module {file_name(self.module.path)}"

    def failure(self, image: Tensor, error: BaseException) -> str:
        """What to say where the file cannot be run on an image."""
        height, width = image.shape[-2:]
        problem = f"{self.name_of_file} cannot be run on an image of {height}x{width}"
        for what, other in (
            ("a batch of images, 1 x 3 x H x W, where one of 3 x H x W is given", image[None]),
            ("an image of uint8, where one of float32 is given", image.to(torch.uint8)),
        ):
            with contextlib.suppress(Exception), torch.no_grad():
                self.eager(other)
                return f"{problem}: it takes {what}"
        hint = ""
        if self.kind in ("torchscript", "compiled"):  # Of others the sizes are known.
            hint = (
                " (if it was made for one size, --image-size, --min-size and --max-size are to be "
                "that one)"
            )
        return f"{problem}: {first_cause(error)}{hint}"

    @property
    def compared_fields(self) -> Tuple[str, ...]:
        """With the image's size, to which boxes refer, where the file does not give it."""
        is_complete = "image_size" in self.fields or set(self.fields) == {"sem_seg"}
        return self.fields if is_complete else (*self.fields, "image_size")

    def graph_module(self) -> torch.jit.ScriptModule:
        """The TorchScript of the file, of which there is but one."""
        return self.script_module()

    def completed(self, outputs: Sequence[Tensor], images: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors that an image gave, and its size, see `compared_fields`."""
        if len(self.compared_fields) == len(self.fields):
            return outputs
        (image,) = images
        return (*outputs, torch.tensor(image.shape[-2:]))

    def script_module(self) -> torch.jit.ScriptModule:
        """The TorchScript of the file.

        Raises:
            errors.Unsupported: there is none.
        """
        if self.kind != "torchscript":
            raise Unsupported(f"it takes TorchScript, and the file is {KINDS[self.kind]}")
        if isinstance(self.eager, torch.jit.ScriptModule):
            return self.eager
        if isinstance(self.eager, _OfDictionaries) and self.eager.call is _in_list:
            # Tracing a call with a list of them takes the image for a constant.
            raise Unsupported(
                "it takes an image, and the file takes a list of dictionaries, which is not traced"
            )
        if self._script_module is None:
            frozen = torch.jit.freeze(self.trace().eval())
            # What goes into a dictionary comes out again: engines take none.
            torch._C._jit_pass_inline(frozen.graph)
            torch._C._jit_pass_peephole(frozen.graph)
            torch._C._jit_pass_dce(frozen.graph)
            self._script_module = frozen
        return self._script_module

    def python_module(self) -> nn.Module:
        """The module as Python code: that of a program's graph.

        Raises:
            errors.Unsupported: there is none.
        """
        if self.kind != "exported":
            raise Unsupported(f"it takes a Python module, and the file is {KINDS[self.kind]}")
        return self.eager


# Loading ---------------------------------------------------------------------------------------


def _load(module: Module) -> nn.Module:
    """The module of a file: it takes an image, and gives a flat tuple.

    Raises:
        errors.InputError: PyTorch or ONNX Runtime cannot load it.
    """
    load = {
        "torchscript": _load_torchscript,
        "exported": _Program,
        "compiled": _Compiled,
        "onnx": _Onnx,
    }[module.kind]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated.
            return load(module.path)
    except InputError:
        raise
    except Exception as error:
        name = file_name(module.path)
        raise InputError(f"--module {name} cannot be loaded: {first_cause(error)}") from None


def _load_torchscript(path: str) -> nn.Module:
    module = torch.jit.load(path, map_location="cpu")
    arguments = module.forward.schema.arguments[1:]
    required = [x for x in arguments if not x.has_default_value()]
    kind = str(required[0].type) if len(required) == 1 else ""
    gives = str(module.forward.schema.returns[0].type)
    if kind == "Tensor" and getattr(module, "training", False):
        module = module.eval()
    if kind == "Tensor" and gives == "Tensor":
        return _OfOne(module)
    if kind == "Tensor" and _DICTIONARY.search(gives):
        return _OfDictionaries(module, lambda image: image)
    if kind == "Tensor":
        return module
    if _DICTIONARY.search(kind):
        return _OfDictionaries(module, _in_tuple if kind.startswith("Tuple") else _in_list)
    takes = ", ".join(f"{x.name}: {x.type}" for x in arguments) or "nothing"
    raise InputError(
        f"--module {file_name(path)} takes {takes}: it is to take an image, or a list of "
        "Detectron2's dictionaries with an image"
    )


# As TorchScript and Python write the type.
_DICTIONARY = re.compile(r"Dict[\[(]str, Tensor[\])]")


def _in_tuple(image: Tensor) -> Tuple[Dict[str, Tensor], ...]:
    return ({"image": image},)


def _in_list(image: Tensor) -> List[Dict[str, Tensor]]:
    return [{"image": image}]


class _AsExported(nn.Module):
    """Runs a file, which is in the mode that it was exported in: some refuse to be told another."""

    def train(self, mode: bool = True) -> _AsExported:
        """Nothing changes."""
        return self


class _OfOne(_AsExported):
    """A module that gives a tensor, and no tuple: a semantic map."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        return (self.module(image),)


class _OfDictionaries(_AsExported):
    """A scripted module that gives a dictionary of fields, or, as Detectron2 has it, a list of one.

    Attributes:
        call: makes of an image what the module takes.
        names: of the fields, in the order of Detectron2's tracing.
    """

    def __init__(self, module: torch.jit.ScriptModule, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.names: Tuple[str, ...] = ()

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        found = self.module(self.call(image))
        found = found if isinstance(found, dict) else found[0]
        self.names = self.names or tuple(sorted(found))
        return tuple(found[name] for name in self.names)


class _OfExport(_AsExported):
    """What was made by `torch.export`: gives a tensor, several, or a dictionary of them.

    Attributes:
        names: of the fields, where it gives a dictionary.
    """

    call: Callable[[Tensor], Any]
    names: Tuple[str, ...] = ()

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        found = self.call(image)
        if isinstance(found, dict):
            self.names = tuple(found)
        return _flat(found)


class _Program(_OfExport):
    """A program of torch.export."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.program = torch.export.load(path)
        takes = self.program.graph_signature.user_inputs
        if len(takes) != 1:
            raise InputError(
                f"--module {file_name(path)} takes {', '.join(map(str, takes)) or 'nothing'}: it "
                "is to take an image"
            )
        self.call = self.program.module()


class _Compiled(_OfExport):
    """A package of AOTInductor."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.call = torch._inductor.aoti_load_package(path)


class _Onnx(_AsExported):
    """An ONNX graph on ONNX Runtime's own kernels for a CPU, with as many threads as PyTorch."""

    def __init__(self, path: str) -> None:
        super().__init__()
        import onnxruntime

        options = session_options(torch.get_num_threads())
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        (self.input,) = self.session.get_inputs()
        self.names = tuple(output.name for output in self.session.get_outputs())

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        given = {self.input.name: image.numpy().astype(onnx_type(self.input), copy=False)}
        return tuple(torch.from_numpy(np.asarray(x)) for x in self.session.run(None, given))


def session_options(threads: int) -> Any:
    """What all sessions of ONNX Runtime have in common: threads, and no warnings.

    Those of detectors fill screens.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # Errors.
    return options


def onnx_type(port: Any) -> Any:
    """The NumPy type of the images that a session takes."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    if port.type not in kinds:
        raise InputError(f"the ONNX graph takes {port.type}, where an image is given")
    return kinds[port.type]


def _flat(found: Any) -> Tuple[Tensor, ...]:
    if isinstance(found, dict):
        return tuple(found.values())
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


# Fields ----------------------------------------------------------------------------------------


def guess(outputs: Any, image: Tensor, name: str) -> Tuple[str, ...]:
    """Names of the tensors of a flat tuple, by their types and shapes.

    Args:
        outputs: what an image gave.
        name: what messages call the file.

    Raises:
        errors.InputError: what it gives is no flat tuple, or cannot be told.
    """
    others = [x for x in _flat(outputs) if not isinstance(x, Tensor)]
    if others:
        raise InputError(
            f"{name} gives a {type(others[0]).__name__}, where a tensor of detections is expected"
        )
    tensors = _flat(outputs)
    named: Dict[int, str] = {}
    for field, places in _candidates(tensors, image).items():
        free = [place for place in places if place not in named]
        if len(free) == 1:
            named[free[0]] = field
    if len(named) == len(tensors) and any(x <= set(named.values()) for x in DETECTIONS):
        return tuple(named[place] for place in range(len(tensors)))
    listed = ", ".join(
        f"{named.get(place, '?')} ({_described(x)})" for place, x in enumerate(tensors)
    )
    raise InputError(
        f"{name} gives tensors that are no detections by their types and shapes: "
        f"{listed or 'none'}; --fields NAME,NAME,... names them all, as in "
        "pred_boxes,pred_classes,scores,image_size"
    )


def _described(tensor: Tensor) -> str:
    kind = str(tensor.dtype).replace("torch.", "")
    return f"{kind} {'x'.join(map(str, tensor.shape)) or 'number'}"


def _candidates(tensors: Sequence[Tensor], image: Tensor) -> Dict[str, List[int]]:
    """Field -> the places that it may have; what is surest comes first."""

    def where(is_one: Callable[[Tensor], bool]) -> List[int]:
        return [place for place, tensor in enumerate(tensors) if is_one(tensor)]

    boxes = where(lambda x: x.dim() == 2 and x.shape[1] in (4, 5) and x.is_floating_point())
    count = len(tensors[boxes[0]]) if len(boxes) == 1 else -1

    def of_each(*shape: int) -> Callable[[Tensor], bool]:
        """Whether each detection has something of this shape; -1: of any length."""
        return lambda x: (
            x.dim() == 1 + len(shape)
            and len(x) == count
            and all(wanted in (-1, side) for wanted, side in zip(shape, x.shape[1:]))
        )

    is_listed = of_each()
    sizes = where(lambda x: x.shape == (2,) and not x.is_floating_point())
    sizes = sizes[-1:] if len(sizes) > 1 or count != 2 else []
    classes = where(lambda x: is_listed(x) and not x.is_floating_point())
    scores = where(lambda x: is_listed(x) and x.is_floating_point())
    masks = where(lambda x: of_each(1, -1, -1)(x) or (of_each(-1, -1)(x) and x.dtype == torch.bool))
    labels = where(
        lambda x: x.dim() == 3 and x.shape[1:] == image.shape[1:] and x.is_floating_point()
    )
    classes = [place for place in classes if place not in sizes]
    own = ("pred_boxes", "scores") if classes else ("proposal_boxes", "objectness_logits")
    return {
        "image_size": sizes,
        own[0]: boxes,
        own[1]: scores,
        "pred_classes": classes,
        "pred_masks": masks,
        "pred_keypoints": where(of_each(-1, 3)),
        "pred_keypoint_heatmaps": where(of_each(-1, -1, -1)),
        "sem_seg": labels,
    }
