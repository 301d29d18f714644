"""Checkpoints are read as data: formats, refusals, strict loading."""

import collections
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from detectors import checkpoint
from detectors.build import _from_file
from detectors.config import build_detector
from detectors.layers import FrozenBatchNorm2d
from detectors.zoo_configurations import zoo_configuration
from errors import InputError
from models import MODELS


class Net(nn.Module):
    """One parameter of every kind that the detectors have."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = FrozenBatchNorm2d(4)
        self.head = nn.Linear(4, classes)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


@pytest.fixture
def state():
    return randomize(Net()).state_dict()


def arrays(state):
    return {key: value.numpy() for key, value in state.items()}


def zoo_document(state):
    return {"model": arrays(state), "__author__": "someone", "matching_heuristics": True}


def write_pickle(path, document, protocol=2):
    with open(path, "wb") as file:
        pickle.dump(document, file, protocol=protocol)
    return path


def assert_equal(read, state):
    assert set(read) == set(state)
    assert all(torch.equal(read[key], state[key]) for key in state)


# Formats


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_arrays(tmp_path, state, protocol):
    path = write_pickle(tmp_path / "model_final.pkl", zoo_document(state), protocol)
    assert_equal(checkpoint.read(path), state)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_pickle_of_either_numpy(tmp_path, core):
    # Protocol 0 spells module names out, so one NumPy's file can be turned into the other's.
    text = pickle.dumps({"weight": np.arange(6.0).reshape(2, 3)}, protocol=0)
    ours = np.empty(0).__reduce__()[0].__module__.rsplit(".", 1)[0].encode()
    assert ours in text
    path = tmp_path / "model.pkl"
    path.write_bytes(text.replace(ours + b".multiarray", core.encode() + b".multiarray"))
    assert_equal(checkpoint.read(path), {"weight": torch.arange(6.0).double().reshape(2, 3)})


def test_pickle_written_by_python_2(tmp_path):
    # {'weight': numpy.arange(3, dtype='float32')} as pickle.dumps of Python 2.7 has it.
    data = (
        b"\x80\x02}q\x00U\x06weightq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\n"
        b"ndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04(K\x01K\x03\x85cnumpy\ndtype\nq\x05U\x02f4"
        b"K\x00K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x0c"
        b"\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x00@tbs."
    )
    path = tmp_path / "model.pkl"
    path.write_bytes(data)
    assert_equal(checkpoint.read(path), {"weight": torch.tensor([0.0, 1.0, 2.0])})


@pytest.mark.parametrize("protocol", [4, 5])  # 5 keeps byte order, and arrays read-only
def test_pickle_of_unusual_arrays(tmp_path, protocol):
    document = collections.OrderedDict(
        big_endian=np.arange(3, dtype=">f4"),
        fortran=np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        scalar_array=np.array(2.0, dtype=np.float32),
        half=np.arange(3, dtype=np.float16),
        step=np.int64(7),
        names=np.array(["a", "b"]),
        objects=np.array([None, {}], dtype=object),
        classes={1, 2},
    )
    path = write_pickle(tmp_path / "model.pkl", document, protocol)
    assert_equal(
        checkpoint.read(path),
        {
            "big_endian": torch.arange(3.0),
            "fortran": torch.arange(6.0).reshape(2, 3),
            "scalar_array": torch.tensor(2.0),
            "half": torch.arange(3.0).half(),
        },
    )


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model"])
@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_saved_by_torch(tmp_path, state, name, wrap):
    torch.save(wrap(state), str(tmp_path / name))
    assert_equal(checkpoint.read(tmp_path / name), state)


def test_saved_by_torch_before_1_6(tmp_path, state):
    path = tmp_path / "model.pth"
    torch.save({"model": state}, str(path), _use_new_zipfile_serialization=False)
    assert_equal(checkpoint.read(path), state)


def test_training_checkpoint(tmp_path):
    """With what Detectron2's trainer keeps beside the weights: only these are taken."""
    model = randomize(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    document = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 9}
    torch.save(document, str(tmp_path / "model_final.pth"))
    assert_equal(checkpoint.read(tmp_path / "model_final.pth"), model.state_dict())


def test_a_trainer_may_keep_numbers_of_numpy(tmp_path, state):
    """Such as the best metric so far, and the state of a scheduler."""
    path = tmp_path / "model_final.pth"
    best = {
        "best": np.float64(41.5),
        "step": np.int64(9),
        "rates": np.ones(3),
        "name": np.str_("x"),
    }
    torch.save({"model": state, "scheduler": best, "iteration": np.int32(9)}, str(path))
    assert_equal(checkpoint.read(path), state)
    with pytest.raises(pickle.UnpicklingError):  # It is no habit of this process.
        torch.load(str(path), weights_only=True)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types(tmp_path, state, kind):
    path = tmp_path / "model.pth"
    lower = {key: value.to(kind) for key, value in state.items()}
    torch.save({"model": lower}, str(path))
    assert_equal(checkpoint.read(path), lower)
    model = Net()
    checkpoint.load_into(model, checkpoint.read(path), "x.pth")
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, lower[key].float())
    one, other = (_from_file(path, "file").record.digest for _ in range(2))
    assert one == other
    torch.save({"model": {**lower, "conv.bias": -lower["conv.bias"]}}, str(path))
    assert _from_file(path, "file").record.digest != one


def test_weights_that_lay_on_a_gpu(tmp_path, state, monkeypatch):
    """The file says so, and is read where there is none."""
    path = tmp_path / "model.pth"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"model": state}, str(path))
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(str(path), weights_only=True)
    assert_equal(checkpoint.read(path), state)


def test_the_content_tells_the_format_and_not_the_name(tmp_path, state):
    torch.save({"model": state}, str(tmp_path / "new.pkl"))
    old = tmp_path / "old.pkl"
    torch.save({"model": state}, str(old), _use_new_zipfile_serialization=False)
    write_pickle(tmp_path / "zoo.pth", zoo_document(state))
    for name in ("new.pkl", "old.pkl", "zoo.pth"):
        assert_equal(checkpoint.read(tmp_path / name), state)


def test_parameters_lose_their_gradient(tmp_path):
    torch.save({"weight": nn.Parameter(torch.ones(2))}, str(tmp_path / "model.pth"))
    assert not checkpoint.read(tmp_path / "model.pth")["weight"].requires_grad


def test_prefix_of_distributed_training(tmp_path, state):
    prefixed = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": prefixed}, str(tmp_path / "model.pth"))
    assert_equal(checkpoint.read(tmp_path / "model.pth"), state)
    some = {"module.weight": torch.ones(1), "bias": torch.ones(1)}
    torch.save(some, str(tmp_path / "model.pth"))
    assert_equal(checkpoint.read(tmp_path / "model.pth"), some)


# Refusals


class Runs:
    """What an attacker puts into a pickle: calling a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker):
    yield Runs(os.system, f"touch {marker}"), f"{os.name}.system"
    yield Runs(eval, f"open({str(marker)!r}, 'w')"), "eval"
    yield Runs(os.mkdir, str(marker)), f"{os.name}.mkdir"


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "old.pth"])
@pytest.mark.parametrize("attack", range(3))
def test_pickle_that_imports_does_not_run(tmp_path, state, name, attack):
    marker, path = tmp_path / "marker", tmp_path / name
    payload, imported = list(attacks(marker))[attack]
    document = {"model": state, "payload": payload}
    if name == "model.pkl":
        write_pickle(path, {"model": arrays(state), "payload": payload})
    else:
        torch.save(document, str(path), _use_new_zipfile_serialization=name == "model.pth")
    with pytest.raises(InputError, match="tries to import") as caught:
        checkpoint.read(path)
    assert imported in str(caught.value)
    assert str(path) in str(caught.value)
    assert not marker.exists()
    # The attack is a real one: without protection it succeeds.
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        b"cos\nsystem\n",
        b"cposix\nsystem\n",
        b"csubprocess\nPopen\n",
        b"cbuiltins\ngetattr\n",
        b"cnumpy\nload\n",
        b"ctorch\nload\n",
        b"ctorch.storage\n_load_from_bytes\n",
        b"c_codecs\ndecode\n",
        b"\x8c\x05numpy\x8c\x0ef2py.os.system\x93",
        b"\x8c\x05numpy\x8c\x0cndarray.dump\x93",
    ],
)
def test_nothing_off_the_list_is_found(tmp_path, line):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04" + line + b".")
    with pytest.raises(InputError, match="tries to import"):
        checkpoint.read(path)


def test_object_arrays_bring_nothing_in(tmp_path):
    marker = tmp_path / "marker"
    payload = Runs(os.mkdir, str(marker))
    path = write_pickle(tmp_path / "model.pkl", {"weight": np.array([payload], dtype=object)})
    with pytest.raises(InputError, match="tries to import"):
        checkpoint.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "old.pth"])
def test_truncated(tmp_path, state, name):
    path = tmp_path / name
    if name == "model.pkl":
        write_pickle(path, zoo_document(state))
    else:
        torch.save({"model": state}, str(path), _use_new_zipfile_serialization=name[0] == "m")
    # Cut within a name, PyTorch's unpickler of old files takes what is left for another name.
    refused = "is truncated or is not a checkpoint" + ("|to import" if name == "old.pth" else "")
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=refused):
            checkpoint.read(path)


@pytest.mark.parametrize("name", ["model.pkl", "model.pth"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>\n<title>Not found</title>\n", b"\x89PNG\r\n\x1a\n", bytes(512)]
)
def test_another_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is truncated or is not a checkpoint"):
        checkpoint.read(tmp_path / name)


def test_archives_of_other_kinds(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "text")
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    torch.jit.save(torch.jit.trace(Net().conv, torch.ones(1, 2, 5, 5)), str(tmp_path / "script.pt"))
    for name in ("zip.pth", "tar.pth", "script.pt"):
        with pytest.raises(InputError, match="is truncated or is not a checkpoint"):
            checkpoint.read(tmp_path / name)


def test_missing_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        checkpoint.read(tmp_path / "none.pth")
    with pytest.raises(InputError, match="is a directory"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("document", [{}, [], 3, {"model": {}}, {"model": {"weight": [1.0]}}])
@pytest.mark.parametrize("name", ["model.pkl", "model.pth"])
def test_no_tensors(tmp_path, name, document):
    if name == "model.pkl":
        write_pickle(tmp_path / name, document)
    else:
        torch.save(document, str(tmp_path / name))
    with pytest.raises(InputError, match="has no tensors in it"):
        checkpoint.read(tmp_path / name)


# Loading into a model


def test_load_into(state):
    model = Net()
    checkpoint.load_into(model, state, "x.pth")
    assert_equal(model.state_dict(), state)


def test_keys_that_detectron2_ignores(state):
    old = {
        **state,
        "pixel_mean": torch.ones(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4),
        "norm.num_batches_tracked": torch.tensor(9),
        "roi_heads.box_predictor.fed_loss_cls_weights": torch.ones(3),
    }
    model = Net()
    checkpoint.load_into(model, old, "x.pth")
    assert_equal(model.state_dict(), state)


def test_pixel_mean_that_is_missing_keeps_its_value(state):
    model = Net()
    model.register_buffer("pixel_mean", torch.full((3, 1, 1), 7.0))
    checkpoint.load_into(model, state, "x.pth")
    assert torch.equal(model.pixel_mean, torch.full((3, 1, 1), 7.0))


def test_frozen_statistics_are_filled_in(state):
    """Old checkpoints have them folded into weight and bias: mean 0 and variance 1."""
    del state["norm.running_mean"], state["norm.running_var"]
    model = randomize(Net())
    checkpoint.load_into(model, state, "x.pth")
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert torch.equal(model.norm.running_var, torch.ones(4))


def test_statistics_of_a_batch_norm_that_is_not_frozen_have_to_be_there():
    model = nn.Sequential(nn.BatchNorm2d(4))
    state = {key: value for key, value in model.state_dict().items() if "running" not in key}
    with pytest.raises(InputError, match=r"keys missing: 2, such as 0\.running_mean"):
        checkpoint.load_into(model, state, "x.pth")


def test_another_architecture_is_refused_and_changes_nothing(state):
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = randomize(Net(classes=5)).state_dict()
    del other["conv.bias"]
    other["mask_head.weight"] = torch.ones(1)
    other["mask_head.bias"] = torch.ones(1)
    with pytest.raises(InputError) as caught:
        checkpoint.load_into(model, other, "x.pth")
    assert str(caught.value) == (
        "checkpoint x.pth belongs to another architecture (keys missing: 1, such as conv.bias; "
        "keys unexpected: 2, such as mask_head.weight; shapes that differ: 2, such as "
        "head.weight, 5 x 4 instead of 3 x 4)"
    )
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    "config", sorted({model.config for model in MODELS.values()}), ids=lambda x: x.split("/")[1]
)
def test_other_classes_are_no_other_architecture(config):
    """As in a checkpoint of someone's own: 3 classes in place of 80."""
    model = build_detector(zoo_configuration(config), False, initialize=False)
    state = model.state_dict()
    for key, value in state.items():
        if "cls_score" in key:
            plain = "box_predictor" in key
            count = 4 if plain else len(value) // 80 * 3
            state[key] = value[:count]
        elif key.endswith(("bbox_pred.weight", "bbox_pred.bias")) and len(value) == 320:
            state[key] = value[:12]
        elif "mask_head.predictor" in key:
            state[key] = value[:3]
    with pytest.raises(InputError) as caught:
        checkpoint.load_into(model, state, "x.pth")
    assert str(caught.value) == "checkpoint x.pth is of 3 classes, not of 80"
