"""The bundled detectors compute what Detectron2 computes: eager, traced and scripted.

`golden.py` describes the stored outputs that they are held against. Where Detectron2 is installed,
they are compared with it directly, at the sizes that people use:

    python -m pytest tests/test_detectors.py -m detectron2

which takes some minutes; `DETECTRON2_PARITY=all` runs Mask R-CNN C4 at all sizes, too.
"""

import contextlib
import functools
import io
import json
import os
import warnings

import golden
import numpy as np
import pytest
import torch
from conftest import CONFIGS
from seeded_weights import seeded_image, seeded_weights
from torch import nn

from detectors import boxes as box_ops
from detectors import images, keypoints, masks
from detectors.backbone import LastLevelP6P7
from detectors.config import build_detector
from detectors.export import TraceableDetector, script
from detectors.instances import Instances, flatten
from detectors.zoo_configurations import zoo_configuration
from models import MODELS

PARAMETERS = json.loads((golden.DATA / "parameters.json").read_text(encoding="utf-8"))
MODES = ("eager", "traced", "scripted")
FULL_SIZES = ((480, 640), (288, 384), (427, 611))


class Subject:
    """A test model with seeded weights in the three ways to run it.

    Each takes the images of a call and returns the flat tuple. It is traced with the images of the
    golden call `trace`. Warnings of tracing and scripting are kept in `warned`.
    """

    def __init__(self, model):
        self.model = model
        self.detector = build_detector(zoo_configuration(model.config), model.postprocess)
        self.detector.load_state_dict(seeded_weights(self.detector.state_dict()))
        self.eager = TraceableDetector(self.detector).eval()
        self.warned = {}

    @functools.cached_property
    def traced(self):
        example = golden.calls(self.model)["trace"]
        return self._recording("traced", lambda: trace(self.eager, example))

    @functools.cached_property
    def scripted(self):
        scripted = self._recording("scripted", lambda: script(self.detector))

        def call(*images):
            return tuple(x for found in scripted(list(images)) for x in flatten(Instances(*found)))

        return call

    def run(self, mode, images):
        """The fields of each image of a call."""
        with torch.no_grad():
            return golden.fields_of(getattr(self, mode)(*images), self.model)

    def _recording(self, mode, make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = make()
        self.warned[mode] = caught
        return module


def trace(module, example):
    with torch.no_grad():
        return torch.jit.trace(module, example, check_trace=False)


# pytest runs all tests of one model before those of the next, so that one is in memory at a time.
@pytest.fixture(scope="module", params=list(MODELS))
def subject(request):
    return Subject(MODELS[request.param])


@pytest.fixture(scope="module")
def reference(subject):
    """Images of a call -> the fields that the installed Detectron2 finds in each."""
    pytest.importorskip("detectron2")
    import detectron2_reference

    detector = detectron2_reference.build(subject.model.config)
    if subject.model.kind == "scripted":
        detector = detectron2_reference.script(detector)

    @functools.lru_cache(maxsize=1)
    def fields(images):
        found = detectron2_reference.outputs(subject.model, detector, images)
        return [{name: x.numpy() for name, x in fields.items()} for fields in found]

    return fields


@functools.lru_cache(maxsize=1)
def full_size_images(count, size):
    return tuple(seeded_image(seed, *size) for seed in range(count))


def assert_all_same(found, expected):
    assert len(found) == len(expected)
    for fields, expected_fields in zip(found, expected):
        golden.assert_same(fields, expected_fields)


@pytest.mark.parametrize(
    ("mode", "call"),
    # A traced and a scripted module are not asked what made them, but what they were not made for.
    [("eager", "trace"), *((mode, call) for mode in MODES for call in ("odd", "tiny"))],
)
def test_golden_outputs(subject, mode, call):
    expected = golden.load(subject.model.name)[call]
    assert_all_same(subject.run(mode, golden.calls(subject.model)[call]), expected)


@pytest.mark.parametrize("name", MODELS)
def test_golden_outputs_are_worth_comparing_with(name):
    model = MODELS[name]
    outputs = golden.load(name)
    assert list(outputs) == list(golden.calls(model))
    for call in ("trace", "odd"):
        for fields in outputs[call]:
            scores = fields["scores"]
            # Fewer than the 100 that a detector lists at most: none is there or not by rounding.
            assert 10 <= len(scores) < 100
            assert scores.max() < 0.99
            assert np.median(-np.diff(scores)) > 20 * golden.TIE
            assert len(np.unique(fields["pred_classes"])) > 1
    assert outputs["trace"][0]["image_size"].dtype == np.int64


@pytest.mark.detectron2
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", FULL_SIZES, ids="{0[0]}x{0[1]}".format)
def test_equals_the_installed_detectron2(subject, reference, size, mode):
    everything = os.environ.get("DETECTRON2_PARITY") == "all"
    if "_C4_" in subject.model.config and size != FULL_SIZES[0] and not everything:
        pytest.skip("Mask R-CNN C4 takes minutes: set DETECTRON2_PARITY=all")
    images = full_size_images(subject.model.images_per_call, size)
    expected = reference(images)
    assert all(len(fields["scores"]) > 0 for fields in expected)
    assert_all_same(subject.run(mode, images), expected)


@pytest.mark.parametrize("mode", ["traced", "scripted"])
def test_exports_without_a_warning(subject, mode):
    getattr(subject, mode)
    own = [
        str(warning.message)
        for warning in subject.warned[mode]
        # PyTorch's notices that jit.trace and jit.script are deprecated, and that what it calls for
        # torch.meshgrid itself will want an argument.
        if not issubclass(warning.category, (DeprecationWarning, FutureWarning))
        and "torch.meshgrid" not in str(warning.message)
    ]
    assert own == []


def test_smallest_image(subject):
    images = tuple(seeded_image(n, 32, 32) for n in range(subject.model.images_per_call))
    expected = subject.run("eager", images)
    assert_all_same(subject.run("traced", images), expected)
    assert_all_same(subject.run("scripted", images), expected)


@contextlib.contextmanager
def blinded(detector):
    """Within, the scores of all objects are far below the threshold."""
    biases = [x for name, x in detector.named_parameters() if name.endswith("cls_score.bias")]
    assert biases
    # Of 81 classes the last is the background; RetinaNet has none.
    parts = [x.data[80:] if len(x) == 81 else x.data for x in biases]
    for part in parts:
        part += 50 if len(part) == 1 else -50
    try:
        yield
    finally:
        for part in parts:
            part -= 50 if len(part) == 1 else -50


@pytest.mark.parametrize("mode", MODES)
def test_no_objects(subject, mode):
    images = golden.calls(subject.model)["tiny"]
    getattr(subject, mode)  # Traced and scripted while there are some.
    with blinded(subject.detector):
        found = subject.run(mode, images)
    for image, fields in zip(images, found):
        height, width = image.shape[-2:]
        shapes = {"pred_boxes": (0, 4), "pred_classes": (0,), "scores": (0,), "image_size": (2,)}
        if "pred_masks" in fields:
            side = 14 if "_C4_" in subject.model.config else 28
            pasted = subject.model.postprocess
            shapes["pred_masks"] = (0, height, width) if pasted else (0, 1, side, side)
        assert {name: x.shape for name, x in fields.items()} == shapes
        np.testing.assert_array_equal(fields["image_size"], [height, width])


def test_traced_without_objects(subject):
    outputs = golden.load(subject.model.name)
    # The smallest images in which there are some.
    call = next(x for x in ("tiny", "odd") if all(len(image["scores"]) for image in outputs[x]))
    with blinded(subject.detector):
        traced = trace(subject.eager, golden.calls(subject.model)["tiny"])
    with torch.no_grad():
        found = traced(*golden.calls(subject.model)[call])
    assert_all_same(golden.fields_of(found, subject.model), outputs[call])


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_detectron2s(config):
    detector = build_detector(zoo_configuration(config), False)
    assert golden.shapes_of(detector) == PARAMETERS[config]["state_dict"]


@pytest.mark.parametrize("config", CONFIGS)
def test_anchors_are_detectron2s(config):
    detector = build_detector(zoo_configuration(config), False)
    owner = detector if "retinanet" in config else detector.proposal_generator
    expected = [json.loads(level) for level in PARAMETERS[config]["cell_anchors"]]
    np.testing.assert_array_equal(owner.anchor_generator.cell_anchors.numpy(), np.float32(expected))


def test_anchors_of_feature_maps():
    generator = box_ops.AnchorGenerator([[8, 16], [32, 64]], [[1.0]], (4, 16))
    levels = generator([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)])
    squares = [[-4, -4, 4, 4], [-8, -8, 8, 8]]
    expected = [
        np.add(square, [x, y, x, y]) for y in (0, 4) for x in (0, 4, 8) for square in squares
    ]
    np.testing.assert_array_equal(levels[0].numpy(), expected)
    np.testing.assert_array_equal(levels[1].numpy(), np.multiply(4, squares))


class Batch(nn.Module):
    """Normalises by 2 and 4, pads and stacks."""

    def __init__(self, size_divisibility):
        super().__init__()
        self.size_divisibility = size_divisibility

    def forward(self, *arguments):
        mean, std = torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 4.0)
        return images.batch_images(list(arguments), mean, std, self.size_divisibility)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    ("size_divisibility", "sizes", "padded"),
    [
        (32, [(64, 96)], (64, 96)),
        (32, [(65, 95)], (96, 96)),
        (32, [(64, 33), (31, 97)], (64, 128)),
        (32, [(64, 96), (64, 96)], (64, 96)),
        (0, [(65, 95)], (65, 95)),
        (0, [(64, 33), (31, 97)], (64, 97)),
    ],
)
def test_padding(size_divisibility, sizes, padded, traced):
    batch = Batch(size_divisibility)
    if traced:
        batch = trace(batch, tuple(torch.rand(3, 50, 70) for _ in sizes))
    given = [seeded_image(n, *size) for n, size in enumerate(sizes)]
    found = batch(*given)
    expected = np.zeros((len(sizes), 3, *padded), dtype=np.float32)
    for n, (image, (height, width)) in enumerate(zip(given, sizes)):
        expected[n, :, :height, :width] = (image.numpy() - 2) / 4
    np.testing.assert_array_equal(found.numpy(), expected)


def pasted_probabilities(mask, box, size):
    """Each pixel center's place in the mask, interpolated from its four neighbours by hand."""
    side = len(mask)
    padded = np.pad(mask, 1)
    probabilities = np.zeros(size)
    for row, column in np.ndindex(*size):
        y = (row + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
        x = (column + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
        if not (-1 < y < side and -1 < x < side):
            continue
        top, left = int(np.floor(y)), int(np.floor(x))
        down, right = y - top, x - left
        corners = padded[top + 1 : top + 3, left + 1 : left + 3]
        probabilities[row, column] = [1 - down, down] @ corners @ [1 - right, right]
    return probabilities


PASTES = (masks.paste_masks, masks._paste_in_chunks, masks._paste_by_rows)


@pytest.mark.parametrize("paste", PASTES)
def test_paste_masks(paste):
    size = (40, 50)
    boxes = [
        [3.2, 5.7, 17.9, 30.1],
        [0, 0, 50, 40],  # the whole image
        [44.5, 33.3, 50, 40],  # into a corner
        [10.4, 10.6, 10.9, 11.3],  # smaller than a pixel
        [20, 8, 48, 36],  # pixels as large as the mask's
        [0, 12.25, 50, 12.75],
    ]
    probabilities = np.random.default_rng(0).random((len(boxes), 28, 28))
    probabilities[-3:] = 0.9
    found = paste(
        torch.tensor(probabilities, dtype=torch.float32), torch.tensor(boxes), torch.tensor(size)
    )
    assert found.dtype == torch.bool
    expected = np.stack(
        [pasted_probabilities(mask, box, size) for mask, box in zip(probabilities, boxes)]
    )
    decided = np.abs(expected - 0.5) > 1e-4
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(found.numpy()[decided], (expected >= 0.5)[decided])
    assert all(mask.any() for mask in found[[0, 1, 2, 4, 5]])


class Pasting(nn.Module):
    """What is traced of it."""

    def forward(self, probabilities, boxes, size):
        return masks.paste_masks(probabilities, boxes, size)


def test_pasting_scripts():
    given = (
        torch.rand(2, 28, 28),
        torch.tensor([[1, 2, 9, 8], [0, 0, 4, 4.5]]),
        torch.tensor([9, 9]),
    )
    assert torch.equal(torch.jit.script(masks.paste_masks)(*given), masks.paste_masks(*given))


def test_engines_get_pasting_without_a_loop():
    """At any number of masks and any size of the image, with the pixels of the loop."""
    generator = torch.Generator().manual_seed(0)

    def given(count, height, width):
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
        ends = corners + 0.1 + torch.rand(count, 2, generator=generator) * 40
        boxes = torch.cat([corners, ends], dim=1)
        probabilities = torch.rand(count, 28, 28, generator=generator)
        return probabilities, boxes, torch.tensor([height, width])

    example = given(3, 30, 40)
    with masks.for_engine():
        traced = torch.jit.trace(Pasting(), example, check_trace=False)
    loop = torch.jit.trace(Pasting(), example, check_trace=False)
    assert "prim::Loop" not in str(traced.inlined_graph)
    assert "prim::Loop" in str(loop.inlined_graph)
    for count, height, width in ((100, 60, 47), (1, 31, 90), (0, 30, 40)):
        call = given(count, height, width)
        found = traced(*call)
        assert found.shape == (count, height, width)
        assert torch.equal(found, masks.paste_masks(*call))
        assert torch.equal(found, loop(*call))


def cubic(count, side):
    """What each of `count` pixels takes of each of `side`, which the outermost are repeated for."""
    taken = np.zeros((count, side))
    for pixel in range(count):
        place = (pixel + 0.5) * side / count - 0.5
        for near in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x = abs(place - near)
            inner, outer = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
            taken[pixel, min(max(near, 0), side - 1)] += inner if x <= 1 else outer
    return taken


def keypoint(heatmap, box):
    """Where a heatmap is highest, stretched over a box, and its share of the exponentials."""
    width, height = (max(box[n + 2] - box[n], 1) for n in (0, 1))
    rows, columns = int(np.ceil(height)), int(np.ceil(width))
    stretched = cubic(rows, len(heatmap)) @ heatmap @ cubic(columns, len(heatmap)).T
    row, column = np.unravel_index(stretched.argmax(), stretched.shape)
    x, y = box[0] + (column + 0.5) / columns * width, box[1] + (row + 0.5) / rows * height
    return x, y, np.exp(stretched.max()) / np.exp(heatmap).sum()


def keypoint_arguments(sides):
    generator = np.random.default_rng(0)
    heatmaps = generator.normal(size=(len(sides), 3, 12, 12))
    corners = generator.uniform(0, 50, size=(len(sides), 2))
    boxes = np.concatenate([corners, corners + np.reshape(sides, (-1, 2))], axis=1)
    return torch.tensor(heatmaps, dtype=torch.float32), torch.tensor(boxes, dtype=torch.float32)


# Thinner than a pixel; smaller than the heatmap, as large, larger.
SIDES = [(0.3, 0.6), (0.5, 30.2), (5.4, 7.7), (12.0, 12.0), (40.1, 25.9)]


def test_keypoints():
    heatmaps, boxes = keypoint_arguments(SIDES)
    found = keypoints.keypoints(heatmaps, boxes)
    expected = [
        [keypoint(heatmap, box) for heatmap in of_box]
        for of_box, box in zip(heatmaps.numpy().astype(float), boxes.numpy().astype(float))
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("package", ["openvino", "onnxruntime"])
def test_keypoints_are_converted(package):
    runtime = pytest.importorskip(package)
    traced = trace(keypoints.keypoints, keypoint_arguments(SIDES[2:]))
    convert = {"openvino": in_openvino, "onnxruntime": in_onnx}[package]
    call = convert(runtime, traced, keypoint_arguments(SIDES[2:]))
    # OpenVINO stretches a heatmap over a single row of pixels as nobody else does.
    for sides in (SIDES[2:], SIDES[:1:-1] * 2, [], *([SIDES] if package == "onnxruntime" else [])):
        arguments = keypoint_arguments(sides)
        expected = keypoints.keypoints(*arguments).numpy()
        np.testing.assert_allclose(call(*arguments), expected, rtol=1e-5, atol=1e-5)


def in_openvino(openvino, traced, example):
    shapes = [openvino.PartialShape([-1, *x.shape[1:]]) for x in example]
    model = openvino.convert_model(traced, example_input=example, input=shapes)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *arguments: compiled([x.numpy() for x in arguments])[0]


def in_onnx(onnxruntime, traced, example):
    file, names = io.BytesIO(), ["heatmaps", "boxes"]
    axes = {name: [0] for name in names}
    torch.onnx.export(
        traced, example, file, input_names=names, dynamic_axes=axes, opset_version=18, dynamo=False
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda *arguments: session.run(
        None, {name: x.numpy() for name, x in zip(names, arguments)}
    )[0]


def greedy_nms(boxes, scores, groups, threshold):
    kept = []
    for n in np.argsort(-scores):
        rivals = [m for m in kept if groups[m] == groups[n]]
        if all(iou(boxes[n], boxes[m]) <= threshold for m in rivals):
            kept.append(n)
    return kept


def iou(first, second):
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    intersection = np.prod(np.maximum(sides, 0))
    areas = [np.prod(box[2:] - box[:2]) for box in (first, second)]
    return intersection / (sum(areas) - intersection)


@pytest.mark.parametrize("count", [0, 1, 300, 1500])  # from 1000 on torchvision loops over groups
def test_batched_nms(count):
    traced = trace(
        lambda *arguments: box_ops.batched_nms(*arguments, 0.5), nms_arguments(7, seed=1)
    )
    arguments = nms_arguments(count, seed=0)
    eager = box_ops.batched_nms(*arguments, 0.5)
    torch.testing.assert_close(traced(*arguments), eager, rtol=0, atol=0)
    if count <= 300:
        assert eager.tolist() == greedy_nms(*(x.numpy() for x in arguments), 0.5)
    assert len(eager) < count or count < 2


def nms_arguments(count, seed):
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 200, size=(count, 2))
    sides = generator.uniform(20, 100, size=(count, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    scores = generator.permutation(count).astype(np.float32)
    groups = generator.integers(4, size=count)
    return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(groups)


def test_no_box_grows_without_bound():
    deltas = torch.tensor([[0.0, 0.0, 100.0, -100.0], [1.0, -0.5, 0.0, 0.0]])
    found = box_ops.apply_deltas(deltas, torch.tensor([[0.0, 0.0, 16.0, 32.0]] * 2), (1, 1, 1, 1))
    np.testing.assert_allclose(
        found.numpy(), [[8 - 500, 16, 8 + 500, 16], [16, -16, 32, 16]], rtol=1e-5
    )


def test_the_last_level_is_computed_from_what_is_positive():
    block = LastLevelP6P7(2048, 256)
    with torch.no_grad():
        p6, p7 = block(torch.randn(1, 2048, 8, 8), torch.randn(1, 256, 8, 8))
        assert (p6 < 0).any()
        assert torch.equal(p7, block.p7(p6.clamp(min=0)))
        assert not torch.equal(p7, block.p7(p6))


@pytest.mark.parametrize("limit", [3, 100])
def test_retinanet_lists_no_more_than_its_limit(limit):
    detector = build_detector(zoo_configuration("COCO-Detection/retinanet_R_50_FPN_3x"), True)
    detector.load_state_dict(seeded_weights(detector.state_dict()))
    detector.score_threshold, detector.detections_per_image = 0.0, limit
    with torch.no_grad():
        (found,) = detector([seeded_image(0, 64, 96)])
    assert 0 < len(found.scores) <= limit
    if limit == 3:
        assert len(found.scores) == 3
