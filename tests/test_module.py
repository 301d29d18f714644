"""A file that a detector was exported to elsewhere: what it is, what runs it, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import arrays
from test_cli import assert_refused, main  # noqa: F401
from test_example import CONFIG, IMAGES, QUICK, detector  # noqa: F401
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

import run_blade
from backends import base
from backends.torch import count_flops
from detectors import module_file
from detectors.build import build
from detectors.exported import guess
from detectors.inputs import View, inputs, read_image
from detectors.module_file import inspect
from errors import InputError, Unsupported
from measure import plan
from models import TUNING, Model, Module
from results.file import load

SIZE = (96, 128)


class Spots(nn.Module):
    """Finds where a picture has contrast: a detector that can be exported every way there is."""

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        gray = image.mean(0)[None, None]
        contrast = (F.max_pool2d(gray, 9, stride=8) - F.avg_pool2d(gray, 9, stride=8))[0, 0] / 255
        scores, places = contrast.flatten().topk(20)
        columns = contrast.shape[1]
        x, y = places % columns * 8, places // columns * 8
        boxes = torch.stack([x, y, x + 9, y + 9], 1).float()
        keep = scores > 0.05
        return boxes[keep], (places % 3)[keep], scores[keep]


class Sized(Spots):
    """The same, as Detectron2's tracing leaves it: with the image's size."""

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes, classes, scores = super().forward(image)
        return boxes, classes, scores, torch._shape_as_tensor(image)[1:]


class Scripted(nn.Module):
    """The same, as Detectron2's scripting leaves it: dictionaries in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Spots()

    def forward(self, inputs: Tuple[Dict[str, Tensor]]) -> List[Dict[str, Tensor]]:
        boxes, classes, scores = self.model(inputs[0]["image"])
        return [{"scores": scores, "pred_boxes": boxes, "pred_classes": classes}]


class Renamed(Scripted):
    """The same by other names, and in another order."""

    def forward(self, inputs: Tuple[Dict[str, Tensor]]) -> List[Dict[str, Tensor]]:
        boxes, classes, scores = self.model(inputs[0]["image"])
        return [{"confidence": scores, "xyxy": boxes, "labels": classes}]


class Casting(Scripted):
    """The same of an image of any type. OpenVINO knows it only where the module is called self."""

    def forward(this, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        return this.model(image.float())


class Listed(Scripted):
    """The same, of a list of dictionaries."""

    def forward(self, inputs: List[Dict[str, Tensor]]) -> List[Dict[str, Tensor]]:
        boxes, classes, scores = self.model(inputs[0]["image"])
        return [{"scores": scores, "pred_boxes": boxes, "pred_classes": classes}]


class Keyed(Scripted):
    """The same of an image, by names."""

    def forward(self, image: Tensor) -> Dict[str, Tensor]:
        boxes, classes, scores = self.model(image)
        return {"scores": scores, "boxes": boxes, "labels": classes}


class Map(nn.Module):
    """A semantic map of two labels: a tensor, and no tuple."""

    def forward(self, image: Tensor) -> Tensor:
        gray = image.mean(0)
        return torch.stack([gray, 255 - gray])


class Fragile(Sized):
    """Fails where nothing is found."""

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes, classes, scores, size = super().forward(image)
        return boxes + 0 * scores.max(), classes, scores, size


class Conditional(Spots):
    """Takes the second branch of a condition; the first finds spots elsewhere."""

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        image = torch.cond(image.mean() > 300, lambda x: x.flip(-1), lambda x: x.clone(), (image,))
        return super().forward(image)


class Looped(Spots):
    """Has a loop."""

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        _, image = while_loop(
            lambda n, x: n < 2, lambda n, x: (n + 1, x.clone()), (torch.tensor(0), image)
        )
        return super().forward(image)


class Random(Sized):
    """Draws random numbers, as with a dropout that was left in the mode of training."""

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes, classes, scores, size = super().forward(image)
        return boxes + 20 * torch.rand_like(boxes), classes, scores, size


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return torch.from_numpy(read_image(None, SIZE))


@pytest.fixture(scope="module")
def calls(picture) -> Dict[str, Tuple[Tensor, ...]]:
    return inputs([picture.numpy()], 1, 0, View())


@pytest.fixture(scope="module")
def files(picture, tmp_path_factory) -> Path:
    """Files of every kind, and some that are none."""
    folder = tmp_path_factory.mktemp("files")
    for name, module in (("traced", Sized()), ("fragile", Fragile())):
        torch.jit.trace(module, picture, check_trace=False).save(str(folder / f"{name}.ts"))
    traced = torch.jit.trace(Sized(), picture, check_trace=False).eval()
    torch.jit.freeze(traced).save(str(folder / "frozen.ts"))
    for name, module in (
        ("scripted", Scripted()),
        ("renamed", Renamed()),
        ("casting", Casting()),
        ("keyed", Keyed()),
        ("map", Map()),
        ("listed", Listed()),
    ):
        torch.jit.script(module).save(str(folder / f"{name}.ts"))
    free = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    some = {1: torch.export.Dim("h", min=90, max=200), 2: torch.export.Dim("w", min=50, max=150)}
    for name, module, shapes in (
        ("exported", Spots(), (free,)),
        ("ranged", Spots(), (some,)),
        ("keyed", Keyed(), (free,)),
        ("fixed", Spots(), None),
    ):
        program = torch.export.export(module, (picture,), dynamic_shapes=shapes)
        torch.export.save(program, folder / f"{name}.pt2")
    for name, axes in (("graph", {"image": {1: "height", 2: "width"}}), ("fixed", {})):
        torch.onnx.export(
            Sized(),
            (picture,),
            str(folder / f"{name}.onnx"),
            input_names=["image"],
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )
    torch.save(Spots().state_dict(), folder / "checkpoint.pth")
    (folder / "text.ts").write_text("no module")
    (folder / "text.onnx").write_text("no graph")
    return folder


def built(path: Path, calls: Dict[str, Tuple[Tensor, ...]], fields: Tuple[str, ...] = ()):
    module = inspect(path, fields)
    model = Model("spots", path.name, kind=module.kind, module=module)
    return build(model, {}, "", {name: calls[name] for name in TUNING})


# What a file is --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("traced.ts", "torchscript", None),
        ("frozen.ts", "torchscript", None),
        ("scripted.ts", "torchscript", None),
        ("exported.pt2", "exported", None),
        ("fixed.pt2", "exported", SIZE),
        ("ranged.pt2", "exported", None),
        ("graph.onnx", "onnx", None),
        ("fixed.onnx", "onnx", SIZE),
    ],
)
def test_what_a_file_is(files, tmp_path, name, kind, size):
    module = inspect(files / name)
    assert (module.kind, module.size, module.path) == (kind, size, str(files / name))
    # Its name tells of nothing but ONNX.
    renamed = tmp_path / ("model.onnx" if kind == "onnx" else "model.bin")
    shutil.copy(files / name, renamed)
    again = inspect(renamed)
    assert (again.kind, again.digest) == (kind, module.digest)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.ts", "--module missing.ts does not exist"),
        ("", "is not a file"),
        ("text.ts", "text.ts is neither TorchScript, nor of torch.export, nor .onnx"),
        ("text.onnx", "text.onnx is no ONNX file"),
        ("checkpoint.pth", "checkpoint.pth is a checkpoint, which has weights and no detector"),
    ],
)
def test_what_is_no_module(files, name, message):
    with pytest.raises(InputError, match=message):
        inspect(files / name)


def changed(path: Path, to: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive with other contents; those that do not change stay."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry, change(entry.filename.partition("/")[2], content))
    return to


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def with_target(name: str, content: bytes) -> bytes:
    return content.replace(b"torch.ops.aten.max_pool2d.default", b"torch.hub.load")


def with_size(name: str, content: bytes) -> bytes:
    if name != "models/model.json":
        return content
    document = json.loads(content)
    values = document["graph_module"]["graph"]["tensor_values"].values()
    sides = [side for value in values for side in value["sizes"] if "as_expr" in side]
    sides[0]["as_expr"]["expr_str"] = "open('x', 'w')"
    return json.dumps(document).encode()


def with_condition(name: str, content: bytes) -> bytes:
    if name != "models/model.json":
        return content
    document = json.loads(content)
    document["guards_code"].append("open('x', 'w') is not None")
    return json.dumps(document).encode()


def with_argument(name: str, content: bytes) -> bytes:
    return content.replace(b'"forward_arg_names": ["image"]', b'"forward_arg_names": ["a(b)"]')


def with_structure(name: str, content: bytes) -> bytes:
    return content.replace(b'\\"type\\": \\"builtins.dict\\"', b'\\"type\\": \\"os.dict\\"')


def with_loop(name: str, content: bytes) -> bytes:
    return content.replace(
        b"torch.ops.aten.max_pool2d.default", b"torch.ops.higher_order.while_loop"
    )


def with_pickle(name: str, content: bytes) -> bytes:
    return content.replace(b'{"config": {}}', b'{"config": {"a": {"use_pickle": true}}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_target, "names 'torch.hub.load' for an operator"),
        (with_size, "has \"open\\('x', 'w'\\)\" for a size"),
        (with_pickle, "holds pickles"),
        (with_condition, 'has "open\\(.x., .w.\\) is not None" for a condition'),
        (with_argument, r"has 'a\(b\)' for a name"),
        (with_structure, "for the structure of what goes in or out"),
        (
            with_loop,
            r"has conditions or loops \(torch.ops.higher_order.while_loop\), "
            "which are not looked into",
        ),
    ],
)
def test_a_program_of_torch_export_is_taken_as_data_only(files, tmp_path, change, message):
    path = changed(files / "exported.pt2", tmp_path / "changed.pt2", change)
    with pytest.raises(InputError, match=f"{message}, so that loading it could run anything"):
        inspect(path)
    assert inspect(path, is_trusted=True).kind == "exported"


def test_nothing_of_a_program_is_run(files, tmp_path):
    planted = tmp_path / "planted"
    bomb = io.BytesIO()
    torch.save((Bomb(planted),), bomb)
    inside = changed(
        files / "exported.pt2",
        tmp_path / "bomb.pt2",
        lambda name, content: bomb.getvalue() if "sample_inputs" in name else content,
    )
    with pytest.raises(InputError, match="holds pickles, so that loading it could run anything"):
        inspect(inside)
    for place in ("data/aotinductor/model/code.so", "extra/code.so"):
        native = tmp_path / "native.pt2"
        shutil.copy(files / "exported.pt2", native)
        with zipfile.ZipFile(native, "a") as archive:
            archive.writestr(f"exported/{place}", pickle.dumps(Bomb(planted)))
        with pytest.raises(InputError, match="holds native code, so that loading"):
            inspect(native)
    assert not planted.exists()
    # PyTorch itself does run it.
    with contextlib.suppress(Exception):
        torch.export.load(inside)
    assert planted.exists()


@pytest.mark.parametrize(
    ("text", "is_guard"),
    [
        ("((1 + (((-1) + L['x'].size()[1]) // 16))) != 1 and L['a'][0].size()[2] >= 2", True),
        ("math.trunc(0.5*torch.sym_float(L['x'].size()[1])) >= 2", True),
        ("Mod(L['x'].size()[1], 32) == 0", True),
        ("torch.load('x')", False),
        ("torch.ops.load_library('x')", False),
        ("L['x'].size.__globals__", False),
        ("L['\\', open(1)']", False),
        ("(lambda: 1)()", False),
        ("[x for x in L]", False),
        ("1); open(1", False),
        (1, False),
    ],
)
def test_conditions_of_sizes(text, is_guard):
    assert module_file._is_guard(text) == is_guard


@pytest.mark.parametrize(
    ("text", "is_expression"),
    [
        ("Add(TruncToInt(Mul(Float('0.5', precision=53), Symbol('s1', integer=True))), 1)", True),
        ("Add(Float('1.0e-5', precision=53), Integer(-1))", True),
        ("Add('os.path')", False),
        ("Add('open(1)')", False),
        ("Symbol('x').__class__", False),
    ],
)
def test_arithmetic_of_sizes(text, is_expression):
    assert module_file._is_expression(text) == is_expression


def test_no_condition_of_a_program_is_run(files, tmp_path):
    """PyTorch writes Python of what a program says of its sizes, and runs it."""
    planted = tmp_path / "planted"

    def plant(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        document = json.loads(content)
        document["guards_code"] = [f"open({str(planted)!r}, 'w') is not None"]
        return json.dumps(document).encode()

    path = changed(files / "exported.pt2", tmp_path / "bomb.pt2", plant)
    with pytest.raises(InputError, match="for a condition, so that loading it could run anything"):
        inspect(path)
    assert not planted.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(torch.zeros(3, *SIZE))
    assert planted.exists()


@pytest.mark.parametrize("name", ["other/models/model.json", "exported/models/MODEL.json"])
def test_nothing_is_looked_up_twice_in_a_program(files, tmp_path, name):
    """PyTorch may read the other one than was looked into."""
    path = tmp_path / "twice.pt2"
    shutil.copy(files / "exported.pt2", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(InputError, match=r"has .models/model.json. 2 times, so that loading it"):
        inspect(path)


def test_damaged_files_are_called_so(files, tmp_path):
    for name in ("traced.ts", "exported.pt2"):
        content = (files / name).read_bytes()
        half, flipped, empty = (tmp_path / f"{kind}-{name}" for kind in ("half", "flip", "empty"))
        half.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="is damaged: the end of the archive is missing"):
            inspect(half)
        empty.touch()
        with pytest.raises(InputError, match=f"--module {empty.name} is empty$"):
            inspect(empty)
    place = content.index(b"max_pool2d")
    flipped.write_bytes(content[:place] + b"min" + content[place + 3 :])
    with pytest.raises(InputError, match=r"is damaged: .*CRC"):
        inspect(flipped)
    nothing = tmp_path / "nothing.onnx"
    nothing.touch()
    with pytest.raises(InputError, match=r"nothing\.onnx is empty$"):
        inspect(nothing)
    with zipfile.ZipFile(tmp_path / "void.ts", "w"):
        pass
    with pytest.raises(InputError, match=r"void\.ts is an empty archive"):
        inspect(tmp_path / "void.ts")


def external(files: Path, to: Path, location: str) -> Path:
    """An ONNX file whose largest constant lies in a file beside it."""
    model = onnx.load(files / "graph.onnx")
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    model.graph.initializer.append(weight)
    onnx.save(model, to)
    return to


def test_weights_beside_an_onnx_file_stay_in_its_folder(files, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    (inner / "weights").write_bytes(bytes(8))
    module = inspect(external(files, inner / "a.onnx", "weights"))
    (inner / "weights").write_bytes(b"other123")
    assert inspect(inner / "a.onnx").digest != module.digest
    (inner / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", str(tmp_path / "secret"), "link"):
        with pytest.raises(InputError, match="has weights outside its folder"):
            inspect(external(files, inner / "b.onnx", location))
    with pytest.raises(InputError, match="has weights in 'nowhere', which is missing"):
        inspect(external(files, inner / "c.onnx", "nowhere"))


# What runs it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("traced.ts", Sized),
        ("frozen.ts", Sized),
        ("scripted.ts", Spots),
        ("exported.pt2", Spots),
        ("graph.onnx", Sized),
    ],
)
def test_a_file_finds_what_its_module_found(files, calls, name, of):
    export = built(files / name, calls)
    assert (
        export.fields
        == ("pred_boxes", "pred_classes", "scores", "image_size")[: len(export.fields)]
    )
    assert len(export.fields) == (4 if of is Sized else 3)
    assert export.compared_fields[-1] == "image_size"
    for images in calls.values():
        wanted = [*of()(*images), torch.tensor(images[0].shape[1:])][:4]
        found = export.completed(export.eager(*images), images)
        assert len(found) == len(wanted)
        assert len(found[0]) > 5
        for ours, theirs in zip(arrays(found), arrays(wanted)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_dictionaries_of_other_names(files, calls):
    export = built(files / "renamed.ts", calls)
    assert export.fields == ("scores", "pred_classes", "pred_boxes")
    module = export.script_module()
    for found in (export.eager(*calls["opt"]), module(*calls["opt"])):
        boxes, classes, scores = Spots()(*calls["opt"])
        assert all(torch.equal(*pair) for pair in zip(found, (scores, classes, boxes)))


@pytest.mark.parametrize("name", ["keyed.ts", "keyed.pt2"])
def test_one_dictionary(files, calls, name):
    """Its keys are names: where they are not known, types and shapes tell what they are."""
    export = built(files / name, calls)
    boxes, classes, scores = Spots()(*calls["min"])
    wanted = {"pred_boxes": boxes, "pred_classes": classes, "scores": scores}
    assert set(export.fields) == set(wanted)
    optimized = base.load("openvino").optimize(export, "fp32", "cpu")
    for found in (export.eager(*calls["min"]), optimized.call(*calls["min"])):
        for field, ours in zip(export.fields, found):
            assert torch.allclose(ours, wanted[field], atol=1e-4)


def test_a_list_of_dictionaries_is_run_and_not_traced(files, calls):
    """Tracing would take the image for a constant, which one size alone does not show."""
    export = built(files / "listed.ts", calls)
    for images in calls.values():
        for ours, theirs in zip(export.eager(*images), Spots()(*images)):
            assert torch.equal(ours, theirs)
    for backend in ("torchscript", "openvino", "onnxruntime"):
        with pytest.raises(Unsupported, match="takes a list of dictionaries, which is not traced"):
            base.load(backend).optimize(export, "fp32", "cpu")


def test_a_map_alone(files, calls):
    export = built(files / "map.ts", calls)
    assert export.fields == export.compared_fields == ("sem_seg",)
    for backend in ("torchscript", "openvino"):
        optimized = base.load(backend).optimize(export, "fp32", "cpu")
        (found,) = optimized.call(*calls["min"])
        assert torch.allclose(found, Map()(*calls["min"]), atol=1e-3)


@pytest.mark.parametrize("name", ["fixed.pt2", "fixed.onnx"])
def test_a_file_that_takes_one_size(files, picture, name):
    export = built(files / name, dict.fromkeys(TUNING, (picture,)))
    for ours, theirs in zip(arrays(export.eager(picture)), arrays(Spots()(picture))):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


NO_TORCHSCRIPT, NO_PYTHON = "it takes TorchScript, and", "it takes a Python module, and"
NO_WEIGHTS = "it has no weights of convolutions to lay out: a frozen file has them as constants"


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        ("traced.ts", "torchscript", None),
        ("traced.ts", "openvino", None),
        ("traced.ts", "onnxruntime", None),
        ("traced.ts", "inductor", f"{NO_PYTHON} the file is TorchScript"),
        ("traced.ts", "torch_channels_last", NO_WEIGHTS),
        ("frozen.ts", "torchscript", None),
        ("frozen.ts", "openvino", None),
        ("frozen.ts", "torch_channels_last", NO_WEIGHTS),
        ("scripted.ts", "torchscript", None),
        ("scripted.ts", "openvino", None),
        ("scripted.ts", "onnxruntime", None),
        ("casting.ts", "openvino", None),
        ("exported.pt2", "torchscript", f"{NO_TORCHSCRIPT} the file is a program of torch.export"),
        ("exported.pt2", "onnxruntime", f"{NO_TORCHSCRIPT} the file is a program of torch.export"),
        ("exported.pt2", "openvino", None),
        ("exported.pt2", "torch_channels_last", NO_WEIGHTS),
        ("graph.onnx", "openvino", None),
        ("graph.onnx", "torch_channels_last", "ONNXRuntime runs the file, and lays out its .*"),
        ("graph.onnx", "torchscript", f"{NO_TORCHSCRIPT} the file is an ONNX graph"),
        ("graph.onnx", "inductor", f"{NO_PYTHON} the file is an ONNX graph"),
        ("graph.onnx", "onnxruntime", "ONNX Runtime is the baseline of an ONNX file"),
    ],
)
def test_an_engine_takes_a_file_or_says_why_not(files, calls, name, backend, reason):
    export = built(files / name, calls)
    engine = base.load(backend)
    if reason is not None:
        with pytest.raises(Unsupported, match=f"^{reason}$"):
            engine.optimize(export, "fp32", "cpu")
        return
    optimized = engine.optimize(export, "fp32", "cpu")
    for images in (calls[name] for name in TUNING):
        for ours, theirs in zip(arrays(optimized.call(*images)), arrays(Sized()(*images))):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "label"), [("traced.ts", None), ("exported.pt2", None), ("graph.onnx", "ONNXRuntime")]
)
def test_what_runs_the_file_is_the_baseline(files, calls, name, label):
    for precision in ("fp32", "bf16"):
        optimized = base.load("torch").optimize(built(files / name, calls), precision, "cpu")
        assert optimized.label == label
        # ONNX Runtime knows nothing of autocast.
        assert optimized.precision == (precision if label is None else "fp32")
        assert len(optimized.call(*calls["opt"])[0]) > 5


@pytest.mark.slow
def test_a_package_of_aotinductor(files, picture, calls, tmp_path):
    free = {1: torch.export.Dim("h", min=32, max=1024), 2: torch.export.Dim("w", min=32, max=1024)}
    program = torch.export.export(Spots(), (picture,), dynamic_shapes=(free,))
    path = tmp_path / "package.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    with pytest.raises(InputError, match="holds native code"):
        inspect(path)
    module = inspect(path, is_trusted=True)
    model = Model("spots", path.name, kind=module.kind, module=module)
    export = build(model, {}, "", {name: calls[name] for name in TUNING})
    assert (export.kind, export.own_runner) == ("compiled", "AOTInductor")
    for images in calls.values():
        for ours, theirs in zip(arrays(export.eager(*images)), arrays(Spots()(*images))):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(Unsupported, match="the file is a package of AOTInductor"):
        base.load("openvino").optimize(export, "fp32", "cpu")


# Fields ----------------------------------------------------------------------------------------

IMAGE = torch.zeros(3, 40, 50)
BOXES, SCORES, CLASSES = torch.zeros(7, 4), torch.zeros(7), torch.zeros(7, dtype=torch.int64)
HW = torch.tensor([40, 50])


@pytest.mark.parametrize(
    ("outputs", "fields"),
    [
        ((BOXES, CLASSES, SCORES, HW), "pred_boxes pred_classes scores image_size"),
        ((SCORES, CLASSES.int(), BOXES), "scores pred_classes pred_boxes"),
        # Two detections: their classes look like a size.
        ((BOXES[:2], CLASSES[:2], SCORES[:2], HW), "pred_boxes pred_classes scores image_size"),
        ((BOXES[:2], CLASSES[:2], SCORES[:2]), "pred_boxes pred_classes scores"),
        ((BOXES[:0], CLASSES[:0], SCORES[:0], HW), "pred_boxes pred_classes scores image_size"),
        (
            (BOXES, CLASSES, torch.zeros(7, 1, 28, 28), SCORES, HW),
            "pred_boxes pred_classes pred_masks scores image_size",
        ),
        (
            (BOXES, CLASSES, torch.zeros(7, 40, 50, dtype=torch.bool), SCORES, HW),
            "pred_boxes pred_classes pred_masks scores image_size",
        ),
        (
            (BOXES, CLASSES, torch.zeros(7, 17, 56, 56), torch.zeros(7, 17, 3), SCORES, HW),
            "pred_boxes pred_classes pred_keypoint_heatmaps pred_keypoints scores image_size",
        ),
        ((torch.zeros(7, 5), CLASSES, SCORES, HW), "pred_boxes pred_classes scores image_size"),
        ((SCORES, BOXES, HW), "objectness_logits proposal_boxes image_size"),
        (torch.zeros(54, 40, 50), "sem_seg"),
        (
            (BOXES, CLASSES, SCORES, HW, torch.zeros(54, 40, 50)),
            "pred_boxes pred_classes scores image_size sem_seg",
        ),
    ],
)
def test_fields_are_told_by_types_and_shapes(outputs, fields):
    assert guess(outputs, IMAGE, "it") == tuple(fields.split())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        # Which are the scores?
        ((BOXES, CLASSES, SCORES, SCORES), r"\? \(float32 7\), \? \(float32 7\); --fields NAME"),
        ((BOXES, CLASSES), r"proposal_boxes|pred_boxes \(float32 7x4\), pred_classes \(int64 7\);"),
        ((torch.zeros(1, 7, 4), torch.zeros(1, 7)), r"\? \(float32 1x7x4\), \? \(float32 1x7\);"),
        (torch.zeros(1000), r"\? \(float32 1000\);"),
        ((), "types and shapes: none;"),
        ({"boxes": {"first": BOXES}}, "it gives a dict, where a tensor of detections is expected"),
        ((BOXES, [SCORES]), "it gives a list, where"),
    ],
)
def test_what_cannot_be_told_is_asked_for(outputs, message):
    with pytest.raises(InputError, match=message):
        guess(outputs, IMAGE, "it")


# The command line ------------------------------------------------------------------------------


def assert_refused_late(outcome, *words: str) -> None:
    """The same as `assert_refused` where the file is run, before anything is measured."""
    said = [line for line in outcome.err.splitlines() if not line.startswith("[")]
    assert_refused(outcome._replace(err="\n".join(said) + "\n"), *words)


def test_a_traced_detector_as_a_user_has_it(main, detector, tmp_path):  # noqa: F811
    """Masks, resized images: the configuration says how they are seen."""
    export, _ = detector
    path, output = tmp_path / "model.ts", tmp_path / "output"
    export.script_module().save(str(path))
    asked = ["--module", path, "--config-file", CONFIG, "--image", IMAGES[0], *QUICK]
    asked += ["--backend", "torchscript", "openvino", "--output", output]
    outcome = main(*asked)
    assert outcome.code == 0, outcome.err
    assert "| Model(torchscript) " in outcome.out
    results = load(output / "results.json")
    (group,) = results.groups
    assert [run.status for run in group.runs] == ["ok"] * 3
    assert group.found > 5
    assert group.model == tmp_path.name
    assert set(group.image_sizes) == {"min", "opt", "max", "turned", "blank"}
    assert (results.settings.module, results.settings.config_file) == ("model.ts", "config.yaml")
    assert (group.weights.source, group.weights.file) == ("file", "model.ts")
    assert (output / "report.html").exists()
    # It is the file that counts, not its name.
    torch.jit.freeze(export.script_module().eval()).save(str(path))
    outcome = main(*asked)
    assert_refused(outcome, "has results of another run (--module: another file of the same name)")


def test_an_onnx_file_that_takes_one_size(main, files, tmp_path):  # noqa: F811
    asked = ["--module", files / "fixed.onnx", *QUICK, "--backend", "openvino"]
    outcome = main(*asked)
    assert outcome.code == 0, outcome.err
    assert "| Model(onnx) | Backend     |" in outcome.out
    assert "| fixed       | ONNXRuntime | fp32 " in outcome.out
    assert "timed at 96x128; Detections: against ONNXRuntime fp32 at 96x128; where" in outcome.out
    outcome = main(*asked, "--max-size", "200x200")
    assert_refused(outcome, "--max-size: fixed.onnx was made for images of 96x128 and no others")


def test_one_size_is_checked_once(main, files, tmp_path):  # noqa: F811
    output = tmp_path / "output"
    outcome = main("--module", files / "fixed.onnx", *QUICK, "--output", output)
    assert outcome.code == 0, outcome.err
    (group,) = load(output / "results.json").groups
    checked = [set(run.detections) for run in group.runs if run.detections]
    assert checked == [{"opt", "blank"}]


def test_a_file_that_fails_where_nothing_is_found(main, files):  # noqa: F811
    outcome = main(
        *("--module", files / "fragile.ts", *QUICK, "--backend", "torchscript"),
        *("--image-size", "96x128"),
    )
    assert outcome.code == 1
    assert "Torch fp32: while its detections were computed where nothing is to be found:" in (
        outcome.out
    )
    row = next(line for line in outcome.out.splitlines() if "| TorchScript |" in line)
    assert "match" in row


def test_a_condition_is_held_against_the_branch_that_it_takes(main, picture, tmp_path):  # noqa: F811
    """To count its operations, PyTorch runs both branches, and gives what the first one gave."""
    path = tmp_path / "conditional.pt2"
    torch.export.save(torch.export.export(Conditional(), (picture,)), path)
    outcome = main("--module", path, "--trust-module", *QUICK, "--backend", "openvino")
    assert outcome.code == 0, outcome.err


def test_a_loop_whose_operations_cannot_be_counted(picture, tmp_path):
    path = tmp_path / "looped.pt2"
    torch.export.save(torch.export.export(Looped(), (picture,)), path)
    module = inspect(path, is_trusted=True)
    model = Model("spots", path.name, kind=module.kind, module=module)
    export = build(model, {}, "", dict.fromkeys(TUNING, (picture,)))
    assert count_flops(export.eager, (picture,)) is None
    for ours, theirs in zip(export.eager(picture), Spots()(picture)):
        assert torch.equal(ours, theirs)


def test_a_file_that_does_not_reproduce_itself(main, picture, tmp_path):  # noqa: F811
    path = tmp_path / "random.ts"
    torch.jit.trace(Random(), picture, check_trace=False).save(str(path))
    outcome = main("--module", path, *QUICK, "--image-size", "96x128")
    assert_refused_late(
        outcome, "--module random.ts does not reproduce itself", "detections", "are lost"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "x.pth"], "--weights does not go with --module"),
        (["--detections", "5"], "--detections does not go with --module"),
        (["--source", "detectron2"], "--source does not go with --module"),
        (["--opts", "A", "1"], "--opts goes with --config-file"),
        (["--model", "testRetinaNet"], "say which models"),
        (["--fields", "pred_boxes,,scores"], "'pred_boxes,,scores' are not different names"),
        (["--fields", "a,a"], "'a,a' are not different names"),
        (
            ["--fields", "scores,pred_classes,pred_boxes,image_size"],
            "gives no detections, taken for",
        ),
        (["--fields", "pred_boxes,scores"], "gives 4 tensors, and --fields names 2"),
    ],
)
def test_what_does_not_go_with_a_file(main, files, tmp_path, options, message):  # noqa: F811
    output = tmp_path / "output"
    outcome = main("--module", files / "traced.ts", *QUICK, "--output", output, *options)
    assert_refused_late(outcome, message)
    assert not (output / "results.json").exists()


def test_options_that_go_with_a_file_only(main):  # noqa: F811
    for option in (["--fields", "scores"], ["--trust-module"]):
        assert_refused(main("--model", "testRetinaNet", *option), "go with --module")


def test_a_module_that_takes_no_image(main, tmp_path):  # noqa: F811
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    torch.jit.script(Two()).save(str(tmp_path / "two.ts"))
    outcome = main("--module", tmp_path / "two.ts", *QUICK)
    assert_refused_late(
        outcome, "two.ts takes first: Tensor, second: Tensor: it is to take an image"
    )


def test_a_module_of_another_size_than_it_is_called_with(main, picture, tmp_path):  # noqa: F811
    class Rigid(Sized):
        def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
            return super().forward(image + torch.zeros(3, *SIZE))

    path = tmp_path / "rigid.ts"
    torch.jit.trace(Rigid(), picture, check_trace=False).save(str(path))
    outcome = main("--module", path, *QUICK, "--image-size", "96x128")
    assert_refused_late(
        outcome, "rigid.ts cannot be run on an image of", "--max-size are to be that one"
    )
    sizes = [f"--{name}-size=96x128" for name in ("image", "min", "max")]
    outcome = main("--module", path, *QUICK, "--backend", "torchscript", *sizes)
    assert outcome.code == 0, outcome.err


def test_a_program_that_takes_a_range_of_sizes(main, files, tmp_path):  # noqa: F811
    module = inspect(files / "ranged.pt2")
    assert (module.smallest, module.largest) == ((90, 50), (200, 150))
    output = tmp_path / "output"
    asked = ["--module", files / "ranged.pt2", *QUICK, "--backend", "openvino"]
    outcome = main(*asked, "--image-size", "96x128", "--output", output)
    assert outcome.code == 0, outcome.err
    (group,) = load(output / "results.json").groups
    assert group.image_sizes["min"][0][0] == 90
    assert group.image_sizes["max"] == ((200, 150),)
    outcome = main(*asked, "--image-size", "64x64")
    assert_refused(outcome, "--image-size: ranged.pt2 takes images from 90x50 up to 200x150")
    assert_refused(
        main(*asked), "480x640 pixels, and the file takes images from 90x50 up to 200x150"
    )


class Batch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Spots()

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        assert images.dim() == 4
        return self.model(images[0])


class Bytes(Batch):
    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        assert image.dtype == torch.uint8
        return self.model(image.float())


class Never(Batch):
    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        assert image.dim() == 7
        return self.model(image)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Batch(), "an image of 96x128: it takes a batch of images, 1 x 3 x H x W, where one of"),
        (Bytes(), "an image of 96x128: it takes an image of uint8, where one of float32 is given"),
        (Never(), "an image of 96x128: AssertionError, without a word of why (if it was made for"),
    ],
)
def test_what_a_module_takes_is_found_out(calls, picture, tmp_path, module, message):
    path = tmp_path / "model.ts"
    torch.jit.script(module).save(str(path))
    with pytest.raises(InputError, match=re.escape(message)):
        built(path, dict.fromkeys(TUNING, (picture,)))


def test_a_program_that_takes_no_image(picture, tmp_path):
    class Two(Spots):
        def forward(self, first: Tensor, second: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
            return super().forward(first + second)

    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Two(), (picture, picture)), path)
    with pytest.raises(InputError, match=r"two\.pt2 takes first, second: it is to take an image"):
        built(path, dict.fromkeys(TUNING, (picture,)))


def test_the_plan_knows_what_a_file_is(files, hosts, monkeypatch):
    options = run_blade.parser().parse_args(["--module", str(files / "exported.pt2")])
    model = plan.module_of(options, 1, hosts)
    assert (model.name, model.kind, model.module.fields) == ("exported", "exported", ())
    assert dataclasses.replace(model.module, path="") == Module(
        "", "exported", inspect(files / "exported.pt2").digest
    )
