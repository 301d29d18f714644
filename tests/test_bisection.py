"""Which part of a detector an engine goes wrong in: faults are planted in each, and looked for."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import parts as kinds
import pytest
import torch
from conftest import arrays, small_export
from PIL import Image
from seeded_weights import seeded_image
from test_cli import main, no_host  # noqa: F401
from test_evaluation import DATA, IMAGES, runs_of
from test_example import OWN
from test_example import QUICK as FEW
from torch import Tensor, nn

import run_blade
from backends import base
from backends.torch import autocast
from backends.torchscript import TorchScript
from detectors.build import build
from detectors.config import build_detector
from detectors.export import Export
from detectors.inputs import read_image, tuning_inputs
from detectors.taps import Part, TappedExport, parts_of
from errors import InputError, Unsupported
from measure import bisection as parent
from measure import evaluation, parts, protocol, verify
from measure import plan as plans
from measure import run as workers
from measure.coco_results import kept_images
from measure.group import Measurement, Running
from measure.plan import Choice
from measure.progress import Progress
from measure.tolerances import part_bound
from models import Model
from results import facts, tables
from results.record import Agreement, Bisection, PartDifference

SIZE = (192, 256)
SUITE = Path(run_blade.__file__).resolve().parent

Plant = Callable[[nn.Module], Any]


def export_of(name: str) -> Export:
    return small_export(name, "bundled", SIZE, 50)


class Faulty(TorchScript):
    """TorchScript of a detector with a fault.

    It is not frozen: PyTorch would keep the constants of each for good.
    """

    def __init__(self, plant: Plant) -> None:
        self.plant = plant

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> base.Optimized:
        broken = copy.copy(export)
        broken.eager = copy.deepcopy(export.eager)
        broken._script_module = None
        with torch.no_grad():
            self.plant(broken.eager.detector)
        call = autocast(self._export(broken, precision, device), precision, device)
        return base.Optimized(call=call, precision=precision, provider=device)


def record_of(
    watched: parts.Watched, precision: str = "fp32", share: float = 1.0
) -> Tuple[PartDifference, ...]:
    """The parts, held to a share of their bounds."""
    return tuple(
        PartDifference(
            x.name,
            x.kind,
            x.difference,
            share * part_bound(x.kind, precision),
            x.accumulated,
        )
        for x in watched.differences
    )


def beyond(watched: parts.Watched, share: float = 1.0) -> List[str]:
    """Names of the parts beyond a share of their bounds."""
    return [part.name for part in record_of(watched, share=share) if part.is_beyond]


def bisected(
    backend: base.Backend, export: Export, precision: str = "fp32", which: str = "opt"
) -> Bisection:
    """As a run does it, without its processes."""
    watched = parts.watch(backend, export, precision, "cpu", export.tuning_inputs[which])
    return Bisection(which, record_of(watched, precision))


def scale(place: str, by: float) -> Plant:
    """Makes the weights of a layer larger, by a share of them."""
    return lambda detector: detector.get_parameter(place).mul_(1 + by)


def shift(place: str, by: float) -> Plant:
    return lambda detector: detector.get_parameter(place).add_(by)


def setting(place: str, name: str, value: Any) -> Plant:
    """Another number in a place where there are no weights."""
    return lambda detector: setattr(detector.get_submodule(place), name, value)


def shorter(detector: nn.Module) -> None:
    """Lists forty detections of fifty."""
    heads = detector.roi_heads
    heads.selection = heads.selection._replace(limit=40)


WIDER = (1.05, 1.05, 1.05, 1.05)
# Model -> part -> a fault in it. Each is small, and leaves detections that could be true.
FAULTS: Dict[str, List[Tuple[str, Plant]]] = {
    "testRetinaNet": [
        ("backbone", scale("backbone.bottom_up.res4.3.conv2.weight", 0.05)),
        ("FPN", scale("backbone.fpn_lateral4.weight", 0.05)),
        ("head", shift("head.cls_score.bias", 0.1)),
        ("decoding", setting("", "weights", WIDER)),
        ("NMS", setting("", "detections_per_image", 40)),
    ],
    "testMaskRCNNFPN": [
        ("backbone", scale("backbone.bottom_up.res4.3.conv2.weight", 0.05)),
        ("FPN", scale("backbone.fpn_output3.weight", 0.05)),
        ("RPN head", scale("proposal_generator.rpn_head.anchor_deltas.weight", 0.05)),
        ("RPN decoding", setting("proposal_generator", "weights", WIDER)),
        ("RPN NMS", setting("proposal_generator", "nms_threshold", 0.9)),
        ("box head", scale("roi_heads.box_head.fc2.weight", 0.05)),
        ("decoding", setting("roi_heads.box_predictor", "weights", (9.5, 9.5, 5.0, 5.0))),
        ("NMS", shorter),
        ("mask head", scale("roi_heads.mask_head.mask_fcn3.weight", 0.05)),
    ],
}
PLANTED = [(model, *fault) for model, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(
    ("model", "part", "plant"), PLANTED, ids=[f"{model}-{part}" for model, part, _ in PLANTED]
)
def test_a_planted_fault_is_located(model, part, plant):
    found = bisected(Faulty(plant), export_of(model))
    assert [x.name for x in found.parts if x.is_beyond] == [part]
    assert found.first.name == part
    # What comes after the fault has it from there, and is not to blame.
    after = [x for x in found.parts[found.parts.index(found.first) :] if x.accumulated is not None]
    assert all(x.accumulated > 1e-4 for x in after)


def test_faults_are_planted_in_all_kinds_of_parts():
    for model, faults in FAULTS.items():
        known = {part.name: part.kind for part in parts_of(export_of(model).eager.detector)}
        assert {known[part] for part, _ in faults} == {
            *("backbone", "FPN", "heads", "decoding", "NMS")
        }


def test_the_first_of_two_faults_is_located():
    def plant(detector: nn.Module) -> None:
        for name in ("head", "FPN"):
            dict(FAULTS["testRetinaNet"])[name](detector)

    found = bisected(Faulty(plant), export_of("testRetinaNet"))
    assert [x.name for x in found.parts if x.is_beyond] == ["FPN", "head"]
    assert found.first.name == "FPN"


@pytest.mark.parametrize("part", ["FPN", "NMS"])
def test_a_fault_is_located_at_other_sizes(part):
    plant = dict(FAULTS["testRetinaNet"])[part]
    found = bisected(Faulty(plant), export_of("testRetinaNet"), which="max")
    assert found.first.name == part


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torchscript"])
@pytest.mark.parametrize(
    "model", ["testRetinaNet", pytest.param("testMaskRCNNFPN", marks=pytest.mark.slow)]
)
def test_in_healthy_engines_nothing_is_located(model, engine):
    backend, export = base.load(engine), export_of(model)
    if backend.unavailable("cpu") is not None:
        pytest.skip(f"there is no {engine} here")
    tapped = TappedExport(export)
    optimized = backend.optimize(tapped, "fp32", "cpu")
    for images in export.tuning_inputs.values():
        with torch.no_grad():
            state, wanted = tapped.state(optimized.call(*images), images), export.eager(*images)
        watched = parts.compare(tapped.parts, export.eager.detector, state)
        assert [part.name for part in watched.differences] == [part.name for part in tapped.parts]
        assert not beyond(watched, 0.25)
        assert all(map(torch.equal, watched.wanted, wanted))
        agreement = verify.verify(arrays(wanted), arrays(watched.found), export.fields, "fp32")
        assert agreement.verdict == "match"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["testMaskRCNNFPN_b2", "testMaskRCNNFPN_pproc", "testCascadeRCNN"]
)
def test_the_parts_of_other_test_models(model):
    export = export_of(model)
    images = export.tuning_inputs["opt"]
    watched = parts.watch(base.load("torch"), export, "fp32", "cpu", images)
    assert max(part.difference for part in watched.differences) == 0
    with torch.no_grad():
        wanted = export.eager(*images)
    for found in (watched.found, watched.wanted):
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted))


def test_a_scripted_model_is_traced_to_watch_it():
    export = export_of("testRetinaNet_scripted")
    plant = dict(FAULTS["testRetinaNet"])["head"]
    assert bisected(TorchScript(), export).first is None
    assert bisected(Faulty(plant), export).first.name == "head"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("keypoints", "panoptic", "semantic", "proposal_network", "cascade_of_two"),
        *("retinanet_batch_norm", "faster_dc5", "deformable", "mask_c4_of_101"),
    ],
)
def test_the_parts_of_detectors_of_ones_own(name):
    configuration = kinds.configuration_of(name)
    model = Model(name, name, postprocess=True, configuration=configuration)
    like = build_detector(configuration, True, initialize=False).state_dict()
    images = tuning_inputs(seeded_image(1, 96, 128), 1, 0)
    export = build(model, kinds.weights_of(like), "seeded weights", images)
    watched = parts.watch(TorchScript(), export, "fp32", "cpu", export.inputs)
    assert not beyond(watched)
    with torch.no_grad():
        wanted = export.eager(*export.inputs)
    assert [x.shape for x in watched.wanted] == [x.shape for x in wanted]
    assert all(map(torch.equal, watched.wanted, wanted))
    rules = export.fields, "fp32", export.score_threshold, export.limit
    assert not verify.verify(arrays(wanted), arrays(watched.found), *rules).is_wrong


# What cannot be compared -----------------------------------------------------------------------


def not_a_number(detector: nn.Module) -> None:
    detector.get_parameter("backbone.fpn_output4.bias")[0] = float("nan")


def test_what_is_no_number_ends_the_search():
    export = export_of("testMaskRCNNFPN")
    watched = parts.watch(Faulty(not_a_number), export, "fp32", "cpu", export.inputs)
    assert [part.name for part in watched.differences] == ["backbone", "FPN"]
    assert watched.differences[-1].difference is None
    assert watched.found == []
    assert bisected(Faulty(not_a_number), export).first.name == "FPN"


class OneLess(TorchScript):
    """An engine that forgets an output."""

    def optimize(self, *args: Any, **rest: Any) -> base.Optimized:
        optimized = super().optimize(*args, **rest)
        return base.Optimized(
            lambda *images: optimized.call(*images)[:-1], "fp32", optimized.provider
        )


def test_an_engine_that_gives_fewer_tensors_is_told():
    export = export_of("testRetinaNet")
    with pytest.raises(ValueError, match=r"\d+ tensors where \d+ were asked for"):
        parts.watch(OneLess(), export, "fp32", "cpu", export.inputs)


def test_other_exports_have_no_parts():
    export = copy.copy(export_of("testRetinaNet"))
    export.eager = nn.Identity()
    with pytest.raises(Unsupported, match="only the bundled detectors"):
        parts.watch(TorchScript(), export, "fp32", "cpu", export.inputs)


# Differences -----------------------------------------------------------------------------------

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60], [100, 0, 120, 20]])
SCORES = torch.tensor([0.9, 0.5, 0.2])
CLASSES = torch.tensor([1, 2, 1])


def listed(boxes: Tensor = BOXES, scores: Tensor = SCORES, classes: Tensor = CLASSES) -> List[Any]:
    return [boxes, scores, classes]


def test_lists_are_compared_in_any_order():
    turned = [x.flip(0) for x in listed()]
    assert parts.list_difference(listed(), turned, False) == 0


def test_how_far_lists_are():
    def difference(*found: Tensor) -> Optional[float]:
        return parts.list_difference(listed(), listed(*found), False)

    # Two pixels of sides of 10, 40 and 20.
    assert difference(BOXES + 2) == pytest.approx((2 / 10 + 2 / 40 + 2 / 20) / 3)
    assert difference(BOXES, SCORES + 0.03) == pytest.approx(0.03)
    # One of another class is as far as can be.
    assert difference(BOXES, SCORES, torch.tensor([1, 3, 1])) == pytest.approx(1 / 3)
    # One is lost; one is there twice.
    assert difference(BOXES[:2], SCORES[:2], CLASSES[:2]) == pytest.approx(1 / 3)
    twice = [torch.cat([x, x[:1]]) for x in listed()]
    assert difference(*twice) == pytest.approx(1 / 4)
    assert difference(BOXES[:0], SCORES[:0], CLASSES[:0]) == 1
    nothing = [x[:0] for x in listed()]
    assert parts.list_difference(nothing, nothing, False) == 0
    assert difference(BOXES * float("nan")) is None
    assert difference(BOXES, SCORES[:2]) is None


def test_logits_count_in_shares_of_their_range():
    logits = torch.tensor([-4.0, 0.0, 4.0])
    unit = float(logits.std(unbiased=False)) * 12**0.5
    pair = listed(BOXES, logits)[:2], listed(BOXES, logits + 1)[:2]
    assert parts.list_difference(*pair, True) == pytest.approx(1 / unit)


def test_more_than_a_handful_of_boxes_are_compared():
    generator = torch.Generator().manual_seed(0)
    count = 2 * parts.ROWS + 10
    corners = 100 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corners, corners + 10], dim=1)
    scores, classes = torch.rand(count, generator=generator), torch.arange(count)
    moved = boxes.clone()
    moved[-1] += 5
    found = parts.list_difference([boxes, scores, classes], [moved, scores, classes], False)
    assert found == pytest.approx(0.5 / count, rel=1e-3)


def test_tensors_differ_by_a_share_of_their_spread():
    one = torch.tensor([1.0, 3.0])
    assert parts.tensor_difference(one, one + 0.5) == pytest.approx(0.5)
    assert parts.tensor_difference(one, one[:1]) is None
    assert parts.tensor_difference(one, one * float("inf")) is None
    assert parts.tensor_difference(one[:0], one[:0]) == 0
    assert parts.tensor_difference(torch.zeros(3), torch.zeros(3)) == 0


def test_of_several_images_the_worst_counts():
    part = Part("decoding", "decoding", lambda *_: [], listed=3)
    both = [*listed(), *listed()]
    moved = [*listed(), *listed(BOXES, SCORES + 0.1)]
    assert parts.difference_of(part, both, moved, 2) == pytest.approx(0.1)


# What is said of it ----------------------------------------------------------------------------

FPN = PartDifference("FPN", "FPN", 0.34, 0.05, 0.4)
HEALTHY = PartDifference("backbone", "backbone", 1e-7, 0.05, 1e-7)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            Bisection("opt", (HEALTHY, FPN)),
            "X int8 first leaves Torch fp32 in the FPN (at opt), which is off by 34%, where "
            "5% is tolerated",
        ),
        (
            Bisection("a.jpg", (HEALTHY, PartDifference("NMS", "NMS", None, 0.05))),
            "X int8 first leaves Torch fp32 in the NMS (at a.jpg), which gives what cannot be "
            "compared: another shape, or values that are no numbers",
        ),
        (
            Bisection("opt", (HEALTHY,)),
            "X int8: no part of it alone is further from Torch fp32 than those of healthy engines "
            "(at opt): what each adds is handed on",
        ),
        (
            Bisection("opt", (HEALTHY,), vanished=True),
            "X int8: the fault is not there when its parts are watched (at opt)",
        ),
        (
            Bisection("opt", reason="it died"),
            "X int8: its parts could not be watched (at opt): it died",
        ),
    ],
)
def test_the_line_below_the_table(found, line):
    assert facts.bisection_note("X int8", found) == line


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0%"), (1e-7, "<0.001%"), (0.00034, "0.034%"), (0.085, "8.5%"), (1.4, "140%")],
)
def test_shares(value, text):
    assert facts.share(value) == text


def test_a_fault_that_vanishes(tmp_path):
    """The run finds nothing any more, and the engine finds all while it is watched."""
    found = arrays(export_of("testRetinaNet").eager(*export_of("testRetinaNet").inputs))
    known = protocol.ModelFacts(
        {}, ("opt",), {}, {}, None, export_of("testRetinaNet").fields, 0.05, 100
    )
    answer = protocol.Watched((protocol.WatchedPart("FPN", "FPN", 0.0, 0.0),))
    blind = [x[:0] if x.ndim and len(x) == len(found[0]) else x for x in found]
    for run, watched, vanished in (
        (blind, found, True),
        (blind, blind, False),
        (blind, [], False),
        (found, found, False),
    ):
        file = tmp_path / "parts.npz"
        sides = {"wanted": found, "run": run, "watched": watched}
        np.savez(file, **{f"{k}/{n}": x for k, side in sides.items() for n, x in enumerate(side)})
        record = parent.bisection(answer, file, "opt", "fp32", known)
        assert record.vanished == vanished
        assert record.parts[0].bound == part_bound("FPN", "fp32")


class Refusing:
    """A worker whose engine does not take the detector with its parts as outputs."""

    def __init__(self) -> None:
        self.asked: List[Any] = []

    def ask(self, request: Any, limit_s: float) -> Any:
        self.asked.append(request)
        raise Unsupported("too many outputs")


def test_an_engine_that_refuses_costs_the_answer_alone(tmp_path):
    measurement = object.__new__(Measurement)
    measurement.plan = SimpleNamespace(calibration=None, device="cpu", bisect=True)
    measurement.model, measurement.progress = SimpleNamespace(name="testRetinaNet"), Progress()
    run = Running("torchscript", Choice(TorchScript()), "fp32", status="mismatch")
    run.agreements = {"opt": Agreement("match"), "max": Agreement("mismatch", expected=3)}
    measurement.runs, measurement.precision = [run], "fp32"
    measurement.bisect(None, tmp_path)
    assert run.bisection == Bisection(reason="its process has ended")
    run.worker = Refusing()
    measurement.bisect(None, tmp_path)
    assert run.bisection == Bisection("max", reason="too many outputs")
    (request,) = run.worker.asked
    assert (request.name, request.file) == ("max", None)
    assert run.status == "mismatch"


# End to end ------------------------------------------------------------------------------------

BACKEND = """
import copy
import dataclasses
import torch
from backends.torchscript import TorchScript

class Faulty(TorchScript):
    name, label, default = "faulty", "Faulty", False

    def optimize(self, export, precision, device, cache=None):
        export = copy.copy(export)
        export.eager = copy.deepcopy(export.eager)
        with torch.no_grad():
            export.eager.detector.backbone.fpn_lateral4.weight.mul_(3.0)
        return super().optimize(export, precision, device, cache)
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """A copy of the suite with one more backend, which has a fault in its FPN."""
    folder = tmp_path_factory.mktemp("suite")
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".venv", "tests", "docs")
    shutil.copytree(SUITE, folder, ignore=ignored, dirs_exist_ok=True)
    (folder / "backends" / "faulty.py").write_text(BACKEND, encoding="utf-8")
    return folder


def run(suite: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(suite / "run_blade.py"), *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


QUICK = (
    *("--model", "testRetinaNet", "--precision", "fp32", "--image-size", "96x128"),
    *("--iterations", "2", "--warmup", "1", "--weights", "synthetic", "--threads", "1"),
    *("--source", "bundled", "--bisect"),
)


def test_a_run_that_goes_wrong_is_bisected(suite, tmp_path):
    output = tmp_path / "out"
    backends = ("torch", "torchscript", "faulty")
    done = run(suite, *QUICK, "--backend", *backends, "--output", str(output))
    assert done.returncode == 1, done.stderr
    assert "Faulty fp32 first leaves Torch fp32 in the FPN (at " in done.stdout
    assert "TorchScript fp32 first leaves" not in done.stdout
    (group,) = json.loads((output / "results.json").read_text())["groups"]
    wrong = {x["backend"]: x["bisection"] for x in group["runs"]}
    assert (wrong["torch"], wrong["torchscript"]) == (None, None)
    found = wrong["faulty"]
    assert found["reason"] is None
    assert not found["vanished"]
    names = ["backbone", "FPN", "head", "decoding", "NMS"]
    assert [x["name"] for x in found["parts"]] == names
    beyond = [x["name"] for x in found["parts"] if x["difference"] > x["bound"]]
    assert beyond == ["FPN"]
    (row,) = [line for line in done.stdout.splitlines() if " FIRST " in line]
    assert [cell.strip() for cell in row.split("|")[1:5]] == ["RetinaNet", "Faulty", "fp32", "FPN"]
    assert "first leaves" in (output / "report.html").read_text()


def test_a_run_that_loses_ap_is_bisected_on_its_worst_image(main, tmp_path, monkeypatch):  # noqa: F811
    """What OpenVINO finds is thrown away, so that the engine itself is healthy."""
    real = evaluation.Worker.ask
    watched: List[np.ndarray] = []

    def ask(self, request, *rest):
        if isinstance(request, protocol.Watch):
            with np.load(request.file) as images:
                watched.append(images[images.files[0]])
        answer = real(self, request, *rest)
        if isinstance(request, protocol.KeepBatch) and "openvino" in request.kept:
            kept = Path(request.kept)
            nothing = {image: [] for image in dict(kept_images(kept))}
            kept.write_text("".join(json.dumps(each) + "\n" for each in nothing.items()))
        return answer

    monkeypatch.setattr(evaluation.Worker, "ask", ask)
    asked = ("--backend", "openvino", "--bisect", "--output", tmp_path)
    outcome = main(*OWN, *DATA, *FEW, *asked)
    torch_run, openvino = runs_of(tmp_path)
    assert (outcome.code, openvino.status, openvino.accuracy.verdict) == (0, "ok", "loses")
    assert torch_run.bisection is None
    found = openvino.bisection
    worst = openvino.accuracy.worst[0].image
    assert (found.image, found.reason, found.vanished) == (worst, None, False)
    assert found.parts[-1].name == "mask head"
    assert found.first is None
    assert 0 < found.parts[0].accumulated < 1e-4
    assert f"than those of healthy engines (at {worst})" in outcome.out
    (image,) = watched
    with Image.open(IMAGES / worst) as picture:
        assert image.shape[1] / image.shape[2] == pytest.approx(picture.height / picture.width)
    raw = read_image(IMAGES / worst, None, least=1)
    assert image.mean() == pytest.approx(float(raw.mean()), rel=0.02)


def test_images_of_a_data_set_are_called_in_place_of_an_input(tmp_path):
    """As a worker does it, with a run that was not prepared by one."""
    export = export_of("testRetinaNet")
    run = object.__new__(workers.Run)
    run.backend, run.export, run.device, run.asked = base.load("torch"), export, "cpu", "fp32"
    run.inputs = export.tuning_inputs
    run.optimized = run.backend.optimize(export, "fp32", "cpu")
    image = export.tuning_inputs["min"][0]
    np.savez(tmp_path / "images.npz", **{"7": image.numpy()})
    outputs = str(tmp_path / "parts.npz")
    run.watch(protocol.Watch("opt", str(tmp_path / "images.npz"), outputs))
    with np.load(outputs) as found, torch.no_grad():
        wanted = arrays(export.eager(image))
        for side in ("wanted", "run", "watched"):
            for place, x in enumerate(wanted):
                assert np.array_equal(found[f"{side}/{place}"], x)


def test_where_nothing_goes_wrong_nothing_is_done(suite):
    done = run(suite, *QUICK, "--backend", "torch", "torchscript")
    assert done.returncode == 0, done.stderr
    assert "no run mismatches or loses AP, so that --bisect has nothing to look for" in done.stderr
    assert "leaves" not in done.stdout


def test_a_module_of_others_has_no_parts(tmp_path, capsys):
    assert run_blade.main(["--module", str(tmp_path / "model.ts"), "--bisect"]) == 2
    assert "--bisect watches the parts of the bundled detectors" in capsys.readouterr().err


def test_a_table_without_parts_is_a_sentence():
    assert tables.markdown(tables.parts_table([])) == tables.parts_table([]).nothing


def test_detectron2_has_no_parts(hosts, monkeypatch):
    known = plans.survey_of

    def survey_of(*args: Any) -> Any:
        return dataclasses.replace(known(*args), source="detectron2")

    monkeypatch.setattr(plans, "survey_of", survey_of)
    options = run_blade.parser().parse_args([*QUICK, "--backend", "torch"])
    with pytest.raises(InputError, match="--source bundled takes those"):
        plans.make_plan(options, {}, hosts)
