"""What int8 is calibrated on, and what it then finds."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
import torch
from conftest import arrays, full_disk, small_export
from PIL import Image
from test_cli import assert_refused, main  # noqa: F401
from test_example import CONFIG, IMAGES, OWN, WEIGHTS
from torch import Tensor

from backends import base
from detectors import inputs
from detectors.build import build
from detectors.checkpoint import read as read_weights
from detectors.config_file import read_configuration
from detectors.export import Export
from detectors.inputs import Calls, View
from errors import InputError
from measure import calibration
from measure.calibration import Calibration
from measure.dataset import Dataset
from measure.dataset import read as read_dataset
from measure.verify import split, verify
from models import TUNING, Model, timed
from results import facts
from results.file import load
from results.record import Calibrated

INT8 = ["--precision", "int8", "--iterations", "2", "--warmup", "1", "--threads", "1"]
BACKEND = ["--backend", "openvino"]
# What engines of the tests are made for.
SIZES = ((48, 64), (96, 128))
PLAIN = View()


def picture(seed: int, height: int = 64, width: int = 80) -> Image.Image:
    """Noise that is no other's."""
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(folder: Path, seeds: Sequence[int], **size: int) -> List[Path]:
    """A folder with images, `0.png` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        picture(seed, **size).save(folder / f"{seed}.png")
    return [folder / f"{seed}.png" for seed in seeds]


def annotate(file: Path, names: Sequence[str], size: Sequence[int] = (64, 80)) -> Path:
    """Annotations with an object in each of some images."""
    numbered = list(enumerate(names, start=1))
    content = {
        "images": [
            {"id": n, "file_name": name, "height": size[0], "width": size[1]}
            for n, name in numbered
        ],
        "categories": [{"id": n, "name": f"kind {n}"} for n in (1, 2, 3)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [8, 8, 20, 20], "area": 400}
            for n, _ in numbered
        ],
    }
    file.write_text(json.dumps(content))
    return file


def read(
    folder: Optional[Path],
    into: Path,
    annotations: Optional[Path] = None,
    limit: int = 300,
    seed: int = 0,
    view: View = PLAIN,
    dataset: Optional[Dataset] = None,
) -> Calibration:
    return calibration.read(folder, annotations, limit, seed, view, SIZES, dataset, into / "c.npz")


def images_of(read_ones: Calibration) -> List[np.ndarray]:
    with np.load(read_ones.path) as arrays:
        return [arrays[name] for name in arrays.files]


# Which images ----------------------------------------------------------------------------------


def test_images_are_those_of_a_folder_and_below_as_the_detector_sees_them(tmp_path):
    files = [*fill(tmp_path / "images", range(3)), *fill(tmp_path / "images" / "more", [3])]
    (tmp_path / "images" / "notes.txt").write_text("no image")
    view = View(None, 60, 90, "RGB")
    found = read(tmp_path / "images", tmp_path, view=view)
    assert found.record == Calibrated(images=4, source="images")
    expected = {
        inputs.seen(inputs.read_image(path, None), view).astype(np.uint8).tobytes()
        for path in files
    }
    assert {image.tobytes() for image in images_of(found)} == expected
    assert {image.shape for image in images_of(found)} == {(3, 60, 75)}


def test_a_view_that_crops_crops_these_too(tmp_path):
    fill(tmp_path / "images", range(2), height=200, width=300)
    found = read(tmp_path / "images", tmp_path, view=View((64, 80)))
    assert [image.shape for image in images_of(found)] == [(3, 64, 80)] * 2


def test_so_many_are_drawn_by_the_seed(tmp_path):
    fill(tmp_path / "images", range(8))
    one, again, other = (
        read(tmp_path / "images", tmp_path, limit=3, seed=seed).digest for seed in (0, 0, 1)
    )
    assert one == again != other
    found = read(tmp_path / "images", tmp_path, limit=3)
    assert (found.record.images, len(images_of(found))) == (3, 3)


def test_the_digest_is_that_of_the_images_and_not_of_their_names(tmp_path):
    (file,) = fill(tmp_path / "images", [0])
    before = read(tmp_path / "images", tmp_path).digest
    file.rename(file.with_name("other.png"))
    assert read(tmp_path / "images", tmp_path).digest == before
    picture(1).save(file.with_name("other.png"))
    assert read(tmp_path / "images", tmp_path).digest != before


def test_images_that_cannot_be_taken_are_named_and_counted(tmp_path):
    folder = tmp_path / "images"
    fill(folder, range(2))
    fill(folder / "large", range(5), height=100, width=200)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:600])
    (folder / "empty.jpg").touch()
    record = read(folder, tmp_path).record
    assert record.images == 2
    assert record.left_out == {
        "unreadable": (2, ("broken.png", "empty.jpg")),
        "of a size that the engines are not made for": (5, ("0.png", "1.png", "2.png")),
    }
    assert facts.calibration_note(record) == (
        "int8: calibrated on 2 images of images; left out: 5 of a size that the engines are not "
        "made for (0.png, 1.png, 2.png, ...); 2 unreadable (broken.png, empty.jpg)"
    )


@pytest.fixture
def evaluated(tmp_path) -> Dataset:
    """A data set of two images."""
    fill(tmp_path / "evaluated", [0, 1])
    return read_dataset(
        annotate(tmp_path / "evaluated.json", ["0.png", "1.png"]), tmp_path / "evaluated", None, 0
    )


def test_images_that_are_evaluated_are_not_taken(tmp_path, evaluated):
    """The same file by any path, and a copy by any name; another image of the same name is not."""
    folder = tmp_path / "images"
    fill(folder, [2, 3])
    picture(4).save(folder / "1.png")
    shutil.copy(tmp_path / "evaluated" / "0.png", folder / "copy.png")
    (folder / "link.png").symlink_to(tmp_path / "evaluated" / "1.png")
    os.link(tmp_path / "evaluated" / "0.png", folder / "hard.png")
    found = read(folder, tmp_path, dataset=evaluated)
    assert found.record.images == 3
    assert found.record.left_out == {"evaluated, too": (3, ("copy.png", "hard.png", "link.png"))}
    # The folder that has them all is as good.
    found = read(tmp_path, tmp_path, dataset=evaluated)
    assert (found.record.images, found.record.left_out["evaluated, too"][0]) == (3, 5)
    assert read(folder, tmp_path).record.images == 6


def test_where_none_is_left_that_is_an_error(tmp_path, evaluated):
    with pytest.raises(InputError) as caught:
        read(tmp_path / "evaluated", tmp_path, dataset=evaluated)
    assert str(caught.value) == "evaluated has no image to calibrate on: 2 evaluated, too"


def test_annotations_say_which_images(tmp_path, evaluated):
    fill(tmp_path / "images", range(4))
    file = annotate(tmp_path / "train.json", ["2.png", "images/3.png", "evaluated/0.png"])
    shutil.copy(tmp_path / "images" / "2.png", tmp_path / "2.png")
    # Beside the annotations, or in a folder that is named.
    found = read(None, tmp_path, file, dataset=evaluated)
    assert found.record == Calibrated(
        images=2, source="train.json", left_out={"evaluated, too": (1, ("0.png",))}
    )
    file = annotate(tmp_path / "train.json", ["0.png", "3.png"])
    assert read(tmp_path / "images", tmp_path, file).record.images == 2
    with pytest.raises(InputError, match=r"train.json: 1 of 2 images are not in .*evaluated: 3.p"):
        read(tmp_path / "evaluated", tmp_path, file)


def test_an_image_of_another_size_than_annotated_is_not_taken(tmp_path):
    fill(tmp_path / "images", [0])
    fill(tmp_path / "images", [1], height=80, width=64)
    file = annotate(tmp_path / "train.json", ["0.png", "1.png"])
    assert read(tmp_path / "images", tmp_path, file).record.left_out == {
        "of another size than the annotations say": (1, ("1.png",))
    }


def test_a_full_disk_is_one_sentence(tmp_path):
    fill(tmp_path / "images", range(3))
    with full_disk(20_000), pytest.raises(InputError, match=r"no room for .*--calibration-limit"):
        read(tmp_path / "images", tmp_path)


def test_made_of_the_timed_image_which_may_be_evaluated(tmp_path, evaluated):
    record = calibration.of_timed([evaluated.images[0].path], evaluated).record
    assert record.is_evaluated
    assert "crops of the timed image, which is evaluated, too: --calibration DIR" in (
        facts.calibration_note(record)
    )
    (other,) = fill(tmp_path / "other", [7])
    for images, dataset in (([other], evaluated), ([], evaluated), ([other], None)):
        record = calibration.of_timed(images, dataset).record
        assert record == Calibrated(images=1)
    assert "evaluated" not in facts.calibration_note(record)


# What backends get -----------------------------------------------------------------------------


def test_calls_are_read_from_the_file(tmp_path):
    fill(tmp_path / "images", range(3))
    found = read(tmp_path / "images", tmp_path)
    images = [torch.from_numpy(image.astype(np.float32)) for image in images_of(found)]
    ones = Calls(Path(found.path), 1)
    assert len(ones) == len(list(ones)) == 3
    assert all(torch.equal(call[0], image) for call, image in zip(ones, images))
    assert ones[0][0].dtype == torch.float32
    # The last call is filled up.
    twos = list(Calls(Path(found.path), 2))
    places = [(0, 1), (2, 2)]
    assert len(twos) == 2
    assert all(
        torch.equal(image, images[place])
        for call, own in zip(twos, places)
        for image, place in zip(call, own)
    )


def test_crops_are_different_images_of_one_size():
    image = small_export("testRetinaNet").inputs[0]
    images = inputs.crops(image, count=6)
    assert len(images) == 6
    assert all(x.shape == image.shape for x in images)
    assert torch.equal(images[0], image)
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(images, 2))
    again = inputs.crops(image, count=6)
    assert all(torch.equal(x, y) for x, y in zip(images, again))


# The command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibration", "."], ["--calibration goes with --precision int8"]),
        (["--calibration-annotations", "x.json"], ["--calibration-annotations goes with --prec"]),
        ([*INT8, "--calibration-limit", "5"], ["--calibration-limit goes with --calibration DIR"]),
        ([*INT8, "--calibration", "nowhere"], ["--calibration nowhere is no folder"]),
        ([*INT8, "--calibration", "empty"], ["--calibration empty has no images"]),
        ([*INT8, "--calibration-annotations", "x.json"], ["--calibration-annotations x.json: No"]),
        ([*INT8, "--calibration", "few", "--calibration-limit", "0"], ["0 is not at least 1"]),
        (
            [*INT8, "--calibration", "nowhere", "--calibration-annotations", "few/a.json"],
            ["--calibration nowhere is no folder"],
        ),
    ],
)
def test_what_is_refused(main, tmp_path, monkeypatch, arguments, words):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    annotate(fill(Path("few"), [0])[0].with_name("a.json"), ["0.png"])
    outcome = main(*OWN, "--image", IMAGES[0], *BACKEND, *arguments)
    assert_refused(outcome, *words)


# Real engines ----------------------------------------------------------------------------------


def needs(backend: str) -> Any:
    reason = base.load(backend).unavailable("cpu")
    return pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


ENGINES = [needs("openvino"), needs("onnxruntime")]


@pytest.fixture(scope="module")
def example() -> Tuple[Export, List[Tuple[Tensor, ...]], List[Tuple[Tensor, ...]]]:
    """The detector of the example; calls with its pictures, and with others like them."""
    configuration = read_configuration(str(CONFIG))
    seen = configuration.input
    view = View(None, seen.min_size_test, seen.max_size_test, seen.format)
    pictures = [inputs.read_image(path, None) for path in IMAGES]
    calls = inputs.inputs(pictures, 1, 0, view)
    model = Model("shapes", CONFIG.name, configuration=configuration)
    tuning = {name: calls[name] for name in TUNING}
    export = build(model, read_weights(WEIGHTS), "the weights", tuning)
    images = [calls[name][0] for name in timed(calls)]
    others = [(image.flip(side).contiguous(),) for image in images for side in (-1, -2)]
    return export, [calls[name] for name in timed(calls)], others


@pytest.fixture(scope="module")
def quantized(example) -> Callable[..., Any]:
    """Backend, and perhaps how bright the images are that it is calibrated on -> its engine."""
    pytest.importorskip("nncf")

    @functools.lru_cache(maxsize=None)
    def of(backend: str, brightness: float = 1.0) -> Any:
        export = copy.copy(example[0])
        export.calibration = [(image * brightness,) for (image,) in example[2]]
        return base.load(backend).optimize(export, "int8", "cpu")

    return of


def matched(example: Any, call: Callable[..., Any]) -> Tuple[int, int]:
    """How many detections in all pictures are those of fp32, and how many there are to be found."""
    export, calls, _ = example
    found = []
    for images in calls:
        with torch.no_grad():
            expected = arrays(export.eager(*images))
        known = (export.fields, "int8", export.score_threshold, export.limit)
        found.append(verify(expected, arrays(call(*images)), *known))
    return sum(x.matched for x in found), sum(x.expected for x in found)


@pytest.mark.parametrize("backend", ENGINES)
def test_int8_computes_in_int8_and_finds_the_objects(example, quantized, backend):
    optimized = quantized(backend)
    layers = optimized.coverage.heavy_layers
    assert optimized.precision == "int8"
    assert layers.get("u8", 0) + layers.get("i8", 0) > 0.9 * sum(layers.values()) > 70
    right, expected = matched(example, optimized.call)
    assert right >= 0.85 * expected > 20
    # Nor is it fp32 under another name.
    export, calls, _ = example
    with torch.no_grad():
        exact = export.eager(*calls[0])
    assert not torch.allclose(exact[2][:3], optimized.call(*calls[0])[2][:3], atol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
def test_ranges_are_those_of_the_images(example, quantized, backend):
    """Calibrated on pictures that are nearly black, an engine sees next to nothing."""
    right, expected = matched(example, quantized(backend, 0.02).call)
    assert right < 0.5 * expected


@pytest.mark.parametrize("backend", ENGINES)
def test_int8_runs_where_nothing_is_found(example, quantized, backend):
    export, calls, _ = example
    with torch.no_grad():
        plain = [(images, export.eager(*images)) for images in inputs.plain(calls[0])]
    empty = [(images, found) for images, found in plain if len(found[0]) == 0]
    assert empty
    for images, expected in empty:
        assert [x.shape for x in quantized(backend).call(*images)] == [x.shape for x in expected]


@pytest.mark.parametrize(
    ("name", "kinds"), [("testRetinaNet", {"Conv"}), ("testMaskRCNNFPN", {"Conv", "Gemm"})]
)
def test_onnxruntime_quantizes_what_layers_take_and_give_and_nothing_else(name, kinds):
    onnx = pytest.importorskip("onnx")
    from backends import onnxruntime

    export = copy.copy(small_export(name))
    export.calibration = [export.inputs]
    graph = onnxruntime.quantize(onnxruntime.convert(export.script_module(), export), export)
    nodes = onnx.load_from_string(graph).graph.node
    made = {output: node for node in nodes for output in node.output}
    taken: Dict[str, List[Any]] = {}
    for node in nodes:
        for each in node.input:
            taken.setdefault(each, []).append(node)
    producers = set()
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            (restored,) = taken[node.output[0]]
            before, after = made.get(node.input[0]), taken.get(restored.output[0], [])
            own = {x.op_type for x in (before, *after) if x is not None}
            assert own & {"Conv", "Gemm", "Relu"}, (node.name, own)
            producers.add(before.op_type)
    assert kinds <= producers
    assert not producers & {"Exp", "Clip", "NonMaxSuppression", "TopK", "Sigmoid", "Softmax"}
    # A feature level of RetinaNet without candidates failed.
    call = onnxruntime.caller(onnxruntime.quantized_session(graph, 1)[0], export)
    for images in (export.inputs, *inputs.plain(export.inputs)):
        assert len(call(*images)) == len(export.fields)


def test_cpus_that_saturate_get_weights_of_seven_bits(monkeypatch):
    from backends import onnxruntime

    for flags, saturates in (
        (("avx2",), True),
        (("avx2", "avx512f"), True),
        (("avx2", "avx512f", "avx512_vnni"), False),
        (("avx2", "avx_vnni"), False),
        ((), False),
    ):
        monkeypatch.setattr(onnxruntime, "cpu_flags", lambda flags=flags: flags)
        assert onnxruntime._saturates() is saturates


@pytest.fixture(scope="module")
def shapes(example, tmp_path_factory) -> Path:
    """A data set of the example's pictures, with what the detector finds as the truth.

    Beside it is a folder of others like them.
    """
    folder = tmp_path_factory.mktemp("shapes")
    export, calls, _ = example
    images, objects = [], []
    (folder / "train").mkdir()
    for number, (path, call) in enumerate(zip(IMAGES, calls), start=1):
        shutil.copy(path, folder / path.name)
        picture = Image.open(path)
        picture.transpose(Image.FLIP_LEFT_RIGHT).save(folder / "train" / path.name)
        picture.transpose(Image.FLIP_TOP_BOTTOM).save(folder / "train" / f"turned-{path.name}")
        with torch.no_grad():
            (found,) = split(arrays(export.eager(*call)), export.fields)
        images.append(
            {"id": number, "file_name": path.name, "height": picture.height, "width": picture.width}
        )
        scale = picture.width / call[0].shape[-1]
        for box, kind, score in zip(found.boxes * scale, found.classes, found.scores):
            if score > 0.5:
                sides = [*box[:2], *(box[2:] - box[:2])]
                objects.append(
                    {
                        "image_id": number,
                        "category_id": int(kind) + 1,
                        "bbox": [float(x) for x in sides],
                    }
                )
    assert len(objects) > 10
    content = {
        "images": images,
        "categories": [{"id": n, "name": f"kind {n}"} for n in (1, 2, 3)],
        "annotations": objects,
    }
    (folder / "val.json").write_text(json.dumps(content))
    return folder


def test_int8_on_images_of_ones_own_keeps_ap(main, shapes, tmp_path):  # noqa: F811
    pytest.importorskip("nncf")
    asked = [*OWN, "--dataset", shapes / "val.json", *INT8, "--output", tmp_path]
    asked += ["--backend", "openvino", "onnxruntime", "--calibration", shapes]
    outcome = main(*asked)
    assert outcome.code in (0, 1), outcome.err
    assert f"int8: calibrated on 8 images of {shapes.name}" in outcome.out
    assert "left out: 4 evaluated, too (000003.png, 000010.png, 000012.png, ...)" in (outcome.out)
    results = load(tmp_path / "results.json")
    assert results.settings.calibration == shapes.name
    assert len(results.settings.calibration_digest) == 16
    (group,) = results.groups
    assert (group.calibrated.images, group.calibrated.source) == (8, shapes.name)
    engines = group.runs[1:]
    assert [run.effective_precision for run in engines] == ["int8", "int8"]
    ap = {run.backend: run.accuracy.tasks["bbox"].ap for run in group.runs}
    assert ap["torch"] > 80
    assert all(ap[run.backend] > 0.9 * ap["torch"] for run in engines)
    again = main(*asked)
    assert "kept from before: int8" in again.err
    # Another image in the folder, and it is another run.
    picture(0, 128, 160).save(shapes / "train" / "new.png")
    assert_refused(main(*asked), "--calibration: other images of the same name")
    (shapes / "train" / "new.png").unlink()
    assert_refused(main(*asked, "--calibration-limit", "7"), "--calibration-limit: none before, 7")
