"""From weights to an export: where weights come from, how they get in, Detectron2 as a source."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGS

from detectors import build as building
from detectors.build import build, check_weights, find_weights, resolve_source
from detectors.config import build_detector
from detectors.inputs import digest, read_image, tuning_inputs
from detectors.zoo_configurations import zoo_configuration
from errors import InputError
from models import MODELS, Model
from results.facts import weights_note
from results.record import Weights

RETINANET = MODELS["testRetinaNet"]


# Building --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_no_trace_of_the_memory_is_left_where_nothing_is_initialized(config):
    """What is not loaded has the same values as in a detector that is initialized."""
    whole = build_detector(zoo_configuration(config), True)
    bare = build_detector(zoo_configuration(config), True, initialize=False)
    bare.load_state_dict(whole.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        wanted, found = (dict(getattr(x, kind)()) for x in (whole, bare))
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].requires_grad == tensor.requires_grad
            assert found[name].device == tensor.device
    assert not bare.training


def test_layers_are_initialized_again_after_that():
    build_detector(zoo_configuration(RETINANET.config), True, initialize=False)
    torch.manual_seed(0)
    first = torch.nn.Linear(3, 3).weight
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Linear(3, 3).weight, first)
    assert 0 < first.detach().abs().max() < 1
    assert torch.nn.Conv2d(3, 3, 3).weight.detach().abs().max() > 0


def test_an_export_has_the_weights_and_shares_no_memory_with_them(inputs):
    state = state_of(RETINANET)
    export = build(RETINANET, state, "weights", inputs)
    found = export.eager.detector.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not {x.data_ptr() for x in found.values()} & {x.data_ptr() for x in state.values()}


# Weights ---------------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    return tuning_inputs(read_image(None, (64, 96)), 1, 0)


def state_of(model: Model) -> dict:
    torch.manual_seed(0)
    return build_detector(zoo_configuration(model.config), model.postprocess).state_dict()


def test_auto_falls_back_to_synthetic_weights_and_says_so(offline, inputs):
    check_weights([RETINANET], "auto")
    weights = find_weights(RETINANET, "auto", inputs, 5, 0)
    assert weights.record.no_zoo.startswith("cannot download")
    note = weights_note(weights.record)
    assert note.startswith("weights: synthetic, made to find 5 objects (cannot download")
    assert "retinanet_R_50_FPN_3x" in note
    assert set(weights.state) == set(state_of(RETINANET))


def test_zoo_does_not_fall_back(offline, inputs):
    with pytest.raises(InputError, match=r"^cannot download https://.*model_final_5bd44e.pkl"):
        find_weights(RETINANET, "zoo", inputs, 5, 0)


def test_synthetic_weights_do_not_ask_the_network(offline, inputs, tmp_path):
    weights = find_weights(RETINANET, "synthetic", inputs, 30, 0)
    assert weights.record == Weights("synthetic", objects=30, digest=weights.record.digest)
    assert weights_note(weights.record) == "weights: synthetic, made to find 30 objects"
    assert not (tmp_path / "cache").exists()


def test_synthetic_weights_find_as_many_objects_as_asked_for():
    inputs = tuning_inputs(read_image(None, (128, 160)), 1, 0)
    for count in (0, 5, 30):
        state = find_weights(RETINANET, "synthetic", inputs, count, 0).state
        export = build(RETINANET, state, "synthetic", inputs)
        for images in inputs.values():
            with torch.no_grad():
                assert len(export.eager(*images)[0]) == count


def test_weights_from_a_path(tmp_path, inputs):
    path = tmp_path / "mine.pth"
    state = state_of(RETINANET)
    torch.save({"model": state}, path)
    check_weights([RETINANET, MODELS["testRetinaNet_scripted"]], str(path))
    weights = find_weights(RETINANET, str(path), inputs, 100, 0)
    assert weights.record == Weights("file", "mine.pth", digest=weights.record.digest)
    assert weights_note(weights.record) == "weights: mine.pth"
    assert weights.name == str(path)
    export = build(RETINANET, weights.state, weights.name, inputs)
    assert torch.equal(export.eager.detector.head.cls_score.weight, state["head.cls_score.weight"])


def test_a_path_does_not_fall_back(tmp_path, inputs):
    path = tmp_path / "missing.pth"
    with pytest.raises(InputError, match=r"checkpoint .*missing\.pth does not exist"):
        find_weights(RETINANET, str(path), inputs, 100, 0)


def test_a_checkpoint_has_to_fit_all_models_before_any_is_measured(tmp_path):
    path = tmp_path / "retinanet.pth"
    torch.save(state_of(RETINANET), path)
    with pytest.raises(InputError, match=r"retinanet\.pth belongs to another architecture"):
        check_weights([RETINANET, MODELS["testMaskRCNNFPN"]], str(path))


def test_weights_of_the_model_zoo(monkeypatch, tmp_path, inputs):
    path = tmp_path / "model_final_123456.pth"
    torch.save(state_of(RETINANET), path)
    monkeypatch.setattr(building, "zoo_checkpoint", lambda config: path)
    for named in ("auto", "zoo"):
        weights = find_weights(RETINANET, named, inputs, 100, 0)
        assert weights.record == Weights("zoo", path.name, digest=weights.record.digest)
        assert weights_note(weights.record) == "weights: model_final_123456.pth of the model zoo"


def test_the_digest_is_that_of_the_parameters_by_name(tmp_path, inputs):
    path = tmp_path / "mine.pth"
    state = state_of(RETINANET)
    torch.save(state, path)
    found = find_weights(RETINANET, str(path), inputs, 100, 0).record.digest
    assert found == digest(state[name].numpy() for name in sorted(state))
    state["head.cls_score.bias"][7] += 1
    torch.save(state, path)
    assert find_weights(RETINANET, str(path), inputs, 100, 0).record.digest != found


def test_a_checkpoint_may_hold_bfloat16(tmp_path, inputs):
    path = tmp_path / "mine.pth"
    state = {name: value.bfloat16() for name, value in state_of(RETINANET).items()}
    torch.save(state, path)
    found = find_weights(RETINANET, str(path), inputs, 100, 0)
    assert found.record.digest == digest(
        state[name].view(torch.int16).numpy() for name in sorted(state)
    )


# Detectron2 as the source ----------------------------------------------------------------------


def test_without_detectron2_auto_is_bundled(monkeypatch):
    monkeypatch.setattr(building, "detectron2_unavailable", lambda: "detectron2 is not usable here")
    assert resolve_source("auto") == "bundled"
    assert resolve_source("bundled") == "bundled"
    with pytest.raises(InputError, match="detectron2 is not usable here"):
        resolve_source("detectron2")


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")  # Detectron2 is not written for a quiet trace.
@pytest.mark.parametrize(
    "name",
    ["testMaskRCNNFPN_b2", "testMaskRCNNFPN_pproc", "testRetinaNet", "testRetinaNet_scripted"],
)
def test_both_sources_give_the_same_flat_tuple(exports, name):
    pytest.importorskip("detectron2.model_zoo")
    ours, theirs = exports(name), exports(name, "detectron2")
    assert resolve_source("auto") == "detectron2"
    assert (theirs.fields, theirs.kind) == (ours.fields, ours.kind)
    # Exported at `opt`, called at `min`.
    for module, size in ((theirs.eager, "opt"), (theirs.script_module(), "min")):
        images = ours.tuning_inputs[size]
        with torch.no_grad():
            wanted, found = ours.eager(*images), module(*images)
        fields = ours.fields * len(images)
        assert len(found) == len(wanted) == len(fields)
        for field, one, other in zip(fields, wanted, found):
            assert len(one) > 1
            assert_close(field, one, other)


def assert_close(name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype, name
    assert found.shape == wanted.shape, name
    if wanted.is_floating_point():
        atol = 1e-2 if name == "pred_boxes" else 1e-4
        assert torch.allclose(found, wanted, rtol=0, atol=atol), name
    elif wanted.dtype == torch.bool:
        # A mask's probability may lie within rounding of the threshold.
        assert (found != wanted).float().mean() < 1e-3, name
    else:
        assert torch.equal(found, wanted), name
