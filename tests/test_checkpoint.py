"""Checkpoints are read as data: formats, refusals, strict loading, and why one does not fit."""

import collections
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)

from configuration import from_settings
from detectors import checkpoint, unpickling
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


@pytest.mark.parametrize("protocol", [2, 4, 5])  # 5 keeps byte order, and arrays read-only
def test_pickle_of_unusual_arrays(tmp_path, protocol):
    document = collections.OrderedDict(
        big_endian=np.arange(3, dtype=">f4"),
        fortran=np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        turned=np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        empty=np.zeros((0, 4), dtype=np.float32),
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
            "turned": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
            "empty": torch.zeros(0, 4),
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


def trainer_document(model):
    """What Detectron2's trainer saves, in the middle of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hooks = {"BestCheckpointer": {"best_metric": np.float64(41.5), "best_iter": np.int64(80)}}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {
            "last_epoch": 99,
            "_last_lr": [np.float64(0.1)],
            "milestones": collections.Counter([60, 80]),
        },
        "iteration": 99,
        "trainer": {"iteration": np.int32(99), "hooks": hooks, "_trainer": {}},
    }


@pytest.mark.parametrize("can_admit", [True, False], ids=["now", "before PyTorch 2.6"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_layout_of_a_trainer(tmp_path, monkeypatch, can_admit, zipped):
    if can_admit and not checkpoint._CAN_ADMIT:
        pytest.skip("this PyTorch cannot")
    monkeypatch.setattr(checkpoint, "_CAN_ADMIT", can_admit)
    path, model = tmp_path / "model_0000099.pth", randomize(Net())
    torch.save(trainer_document(model), str(path), _use_new_zipfile_serialization=zipped)
    assert_equal(checkpoint.read(path), model.state_dict())
    torch.save(dict(model.named_parameters()), str(path), _use_new_zipfile_serialization=zipped)
    assert_equal(checkpoint.read(path), dict(model.named_parameters()))


@pytest.mark.parametrize("name", ["model_ema", "ema_state", "state_dict_ema"])
def test_averaged_weights_are_taken_where_there_are_no_others(tmp_path, state, name):
    path = tmp_path / "model.pth"
    averaged = {key: value + 1 for key, value in state.items()}
    torch.save({name: averaged, "iteration": 9}, str(path))
    assert_equal(checkpoint.read(path), averaged)
    torch.save({name: averaged, "model": state}, str(path))
    assert_equal(checkpoint.read(path), state)


def test_averaged_weights_as_pytorch_wraps_them(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(randomize(Net()))
    torch.save({"model": averaged.state_dict()}, str(tmp_path / "model.pth"))
    assert_equal(checkpoint.read(tmp_path / "model.pth"), averaged.module.state_dict())


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]
)
def test_prefixes_of_other_wrappers(tmp_path, state, prefix):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, str(path))
    assert_equal(checkpoint.read(path), state)


def write_safetensors(path, state):
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, str(path))
    return path


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_safetensors(tmp_path, state, name, kind):
    lower = {f"module.{key}": value.to(kind) for key, value in state.items()}
    path = write_safetensors(tmp_path / name, lower)
    read = checkpoint.read(path)
    assert_equal(read, {key: value.to(kind) for key, value in state.items()})
    checkpoint.load_into(Net(), read, "x.safetensors")


def test_safetensors_that_are_not_installed(tmp_path, state, monkeypatch):
    path = write_safetensors(tmp_path / "model.safetensors", state)
    torch.save(state, str(tmp_path / "model.pth"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert_equal(checkpoint.read(tmp_path / "model.pth"), state)
    with pytest.raises(InputError, match="is of safetensors, which is not installed here"):
        checkpoint.read(path)


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
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match="CUDA"):
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


@pytest.mark.parametrize("can_admit", [True, False], ids=["now", "before PyTorch 2.6"])
@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "old.pth"])
@pytest.mark.parametrize("attack", range(3))
def test_pickle_that_imports_does_not_run(tmp_path, state, monkeypatch, name, attack, can_admit):
    if can_admit and not checkpoint._CAN_ADMIT:
        pytest.skip("this PyTorch cannot")
    monkeypatch.setattr(checkpoint, "_CAN_ADMIT", can_admit)
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


# Damage that a library in C may not survive: in processes of their own.

READING = """
import pathlib, re, sys
from detectors import checkpoint
from errors import InputError
checkpoint._CAN_ADMIT &= sys.argv[1] == "now"
for path in sys.argv[2:]:
    try:
        print(sorted(checkpoint.read(path)))
    except InputError as error:
        print("refused:", error)
# Not that of getrusage(), in which the process that started this one counts, too.
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024)
"""


def read_apart(paths, which="now"):
    """What comes of reading files in another process, line by line, and the MiB that it took."""
    command = [sys.executable, "-c", READING, which, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, peak = done.stdout.splitlines()
    return lines, int(peak)


class Stated:
    """An array whose type has a state of the attacker's."""

    def __init__(self, code, state):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


class Filled:
    """An array of some type, over bytes that count up."""

    def __init__(self, kind, shape):
        self.kind, self.shape = kind, shape

    def __reduce__(self):
        begin = np.empty(0).__reduce__()
        return (*begin[:2], (1, self.shape, self.kind, False, bytes(range(64))))


STATES = {
    # NumPy 2.4 reads places that are not there, and the process ends.
    "short": Stated("f4", (3, "<", None, -1, -1, 0)),
    # Their numbers are addresses of objects then.
    "objects": Stated("f8", (3, "<", None, None, None, -1, -1, 63)),
    "fields": Stated("V8", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 0)}, 8, 1, 16)),
    "long": Stated("S8", (3, "|", None, None, None, 2**31 - 1, 1, 0)),
    "nothing": Stated("f4", None),
    "no type": "f4",
}


@pytest.mark.parametrize("which", ["now", "before PyTorch 2.6"])
def test_no_state_of_an_array_reaches_numpy(tmp_path, state, which):
    paths = []
    for name, kind in STATES.items():
        bad = {"bad": Filled(kind, (8,)), "huge": Filled(np.dtype("f4"), (2**40, 2**40))}
        paths.append(write_pickle(tmp_path / f"{name}.pkl", {"good": np.ones(2), **bad}))
        paths.append(tmp_path / f"{name}.pth")
        torch.save({"model": state, "scheduler": {"a": bad["bad"]}}, str(paths[-1]))
    lines, peak = read_apart(paths, which)
    assert len(lines) == 2 * len(STATES)
    # Nobody asks what a scheduler keeps.
    assert lines[1::2] == [str(sorted(state))] * len(STATES)
    assert all("is truncated or is not a checkpoint" in line for line in lines[::2])
    assert peak < 2000


def test_no_pickle_changes_how_the_next_one_is_read(tmp_path):
    """Functions have a state, too."""
    path = tmp_path / "model.pkl"
    state = b"N}X\x0c\x00\x00\x00__defaults__X\x01\x00\x00\x00x\x85s\x86"
    for line in (b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n"):
        path.write_bytes(b"\x80\x02" + line + state + b"b.")
        with pytest.raises(InputError, match="is truncated or is not a checkpoint"):
            checkpoint.read(path)
    assert unpickling._scalar.__defaults__ == (None, None)
    assert unpickling._encode.__defaults__ == ("latin1",)


def test_sizes_that_are_claimed_make_no_room(tmp_path):
    claims = {
        # An array of bytes: by its length, and by a function of a number.
        "bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.",
        "call": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        # The place of an object among those that are remembered.
        "place": b"\x80\x04Nr\xff\xff\xff\x3f.",
        "text": b"\x80\x04X\xff\xff\xff\x7fabc.",
    }
    for name, content in claims.items():
        (tmp_path / name).write_bytes(content)
    lines, peak = read_apart([tmp_path / name for name in claims])
    assert [line.startswith("refused: checkpoint") for line in lines] == [True] * len(claims)
    assert peak < 1000


def mutated(content, generator):
    """Bytes that were changed, taken out, put in or moved in a few places."""
    changed = bytearray(content)
    for place in generator.integers(len(content), size=generator.integers(1, 5)):
        other = int(generator.integers(len(content)))
        noise = generator.integers(256, size=3, dtype=np.uint8).tobytes()
        kind = generator.integers(4)
        end = place + (0, 2, 1, 4)[kind]
        changed[place:end] = (noise, b"", noise[:1], content[other : other + 4])[kind]
    return bytes(changed)


def test_mutated_files_are_read_or_refused(tmp_path):
    generator = np.random.default_rng(0)
    known = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "step": np.float64(2.5),
        "names": np.array(["x", "yy"]),
    }
    contents = [pickle.dumps({"model": known, "seen": {1}}, protocol) for protocol in (0, 2, 4, 5)]
    buffer = io.BytesIO()
    document = {"model": {"weight": torch.ones(2, 3)}, "scheduler": known}
    torch.save(document, buffer, _use_new_zipfile_serialization=False)
    contents.append(buffer.getvalue())
    paths = [tmp_path / f"{number}" for number in range(300)]
    for number, path in enumerate(paths):
        path.write_bytes(mutated(contents[number % len(contents)], generator))
    lines, _ = read_apart(paths)
    assert len(lines) == len(paths)
    refused = [line for line in lines if line.startswith("refused: checkpoint ")]
    assert len(refused) > 100
    assert all(line.startswith("['") for line in set(lines) - set(refused))


FORMATS = ["model.pkl", "model.pth", "old.pth", "model.safetensors"]


def write(path, state):
    """One of `FORMATS`."""
    if path.suffix == ".pkl":
        write_pickle(path, zoo_document(state))
    elif path.suffix == ".safetensors":
        write_safetensors(path, state)
    else:
        torch.save({"model": state}, str(path), _use_new_zipfile_serialization=path.stem != "old")


@pytest.mark.parametrize("name", FORMATS)
def test_truncated(tmp_path, state, name):
    path = tmp_path / name
    write(path, state)
    # Cut within a name, PyTorch's unpickler of old files takes what is left for another name.
    refused = "is truncated or is not a checkpoint" + ("|to import" if name == "old.pth" else "")
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=refused):
            checkpoint.read(path)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged(tmp_path, state, name):
    """A file whose bytes are not what they were is read, or refused in one sentence."""
    path = tmp_path / name
    write(path, state)
    whole, generator, refusals = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(100):
        damaged = bytearray(whole)
        for place in generator.integers(len(whole), size=3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            checkpoint.load_into(Net(), checkpoint.read(path), "x.pth")
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    assert all("\n" not in each for each in refusals)


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.safetensors"])
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
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match=r"pipe\.pth is not a file"):
        checkpoint.read(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        checkpoint.read(tmp_path / f"{'x' * 300}.pth")


@pytest.mark.parametrize(
    "weight",
    [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.ones(3, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
def test_tensors_that_are_no_plain_arrays(tmp_path, weight):
    torch.save({"weight": weight}, str(tmp_path / "model.pth"))
    with pytest.raises(InputError, match=r"quantized, sparse or without values|to import"):
        checkpoint.read(tmp_path / "model.pth")


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_are_no_weights(state, kind):
    state["conv.weight"] = state["conv.weight"].to(kind)
    with pytest.raises(InputError, match=rf"has {kind} in conv\.weight, where real numbers belong"):
        checkpoint.load_into(Net(), state, "x.pth")


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has none")
def test_numbers_of_4_bits_are_no_weights(state):
    state["conv.weight"] = torch.zeros(4, 2, 3, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(
        InputError, match=r"has torch\.float4_e2m1fn_x2 in conv\.weight, where real"
    ):
        checkpoint.load_into(Net(), state, "x.pth")


def test_a_dictionary_in_itself(tmp_path):
    document = {}
    document["model"] = document
    with pytest.raises(InputError, match="has no tensors in it"):
        checkpoint.read(write_pickle(tmp_path / "model.pkl", document))


def test_a_name_of_several_lines(state):
    with pytest.raises(InputError) as caught:
        checkpoint.load_into(Net(), {**state, "a\nb" * 999: torch.ones(1)}, "x.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


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
        "head.weight, 5 x 4 instead of 3 x 4); a model of your own needs the --config-file that it "
        "was trained with"
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
    section = "RETINANET" if "retinanet" in config else "ROI_HEADS"
    assert str(caught.value) == (
        f"checkpoint x.pth is of 3 classes, not of 80: is MODEL.{section}.NUM_CLASSES 3? "
        "(a model of your own needs the --config-file that it was trained with)"
    )


# Why one does not fit

PYRAMID = ("res2", "res3", "res4", "res5")
# A Mask R-CNN of few channels.
SMALL = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": PYRAMID,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.FPN.IN_FEATURES": PYRAMID,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.IN_FEATURES": ("p2", "p3", "p4", "p5", "p6"),
    "MODEL.ANCHOR_GENERATOR.SIZES": ((32,), (64,), (128,), (256,), (512,)),
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.NUM_CLASSES": 4,
    "MODEL.ROI_HEADS.IN_FEATURES": ("p2", "p3", "p4", "p5"),
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
}
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": PYRAMID[1:],
    "MODEL.FPN.IN_FEATURES": PYRAMID[1:],
    "MODEL.RETINANET.NUM_CLASSES": 4,
}
C4 = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ("res4",),
    "MODEL.RPN.IN_FEATURES": ("res4",),
    "MODEL.ROI_HEADS.IN_FEATURES": ("res4",),
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ANCHOR_GENERATOR.SIZES": ((32, 64),),
}
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
ONE_RATIO = {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ((1.0,),)}
AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
BASIC = {"MODEL.RESNETS.DEPTH": 34, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}


def detector(settings):
    return build_detector(from_settings({**SMALL, **settings}), False, initialize=False)


def only(key, value):
    return {f"MODEL.{key}": value}


DEEP = only("RESNETS.DEPTH", 101)
MASKLESS = only("MASK_ON", False)
PYRAMID_GN = only("FPN.NORM", "GN")

# What a checkpoint and a model have other than `SMALL`; what is told of it, and what is asked.
MISFITS = [
    (only("ROI_HEADS.NUM_CLASSES", 3), {}, "is of 3 classes, not of 4", "ROI_HEADS.NUM_CLASSES 3"),
    (DEEP, {}, "res4 has 23 blocks in the checkpoint, not 6", "RESNETS.DEPTH 101"),
    ({}, DEEP, "res4 has 6 blocks in the checkpoint, not 23", "RESNETS.DEPTH 50"),
    ({}, BASIC, "its blocks have 3 convolutions, not 2", "RESNETS.DEPTH 50"),
    (BASIC, {}, "its blocks have 2 convolutions, not 3", "RESNETS.DEPTH 34"),
    (MASKLESS, {}, "it has no mask_head", "MASK_ON False"),
    ({}, MASKLESS, "it has a mask_head", "MASK_ON True"),
    (ONE_RATIO, {}, "its rpn_head has 1 anchor", "ANCHOR_GENERATOR of 1 anchor"),
    (PYRAMID_GN, {}, "its feature pyramid has norm layers", "FPN.NORM GN"),
    ({}, PYRAMID_GN, "its feature pyramid has no norm layers", "FPN.NORM empty"),
    ({}, only("RESNETS.NORM", "GN"), "its backbone has batch norms", "RESNETS.NORM BN"),
    (only("ROI_MASK_HEAD.NORM", "GN"), {}, "its mask_head has norm", "ROI_MASK_HEAD.NORM GN"),
    (AGNOSTIC, {}, "its boxes are the same", "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"),
    ({}, AGNOSTIC, "its boxes are of each", "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG False"),
    (only("ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True), {}, "its masks are", "CLS_AGNOSTIC_MASK True"),
    (CASCADE, {}, "it has a cascade of heads", "ROI_HEADS.NAME CascadeROIHeads"),
    ({}, CASCADE, "it has one head for boxes", "ROI_HEADS.NAME StandardROIHeads"),
    ({}, C4, "it has a feature pyramid", "BACKBONE.NAME build_resnet_fpn_backbone"),
    (C4, {}, "it has the res5 of each region", "ROI_HEADS.NAME Res5ROIHeads"),
    (RETINANET, {}, "it is a RetinaNet", "META_ARCHITECTURE RetinaNet"),
    ({}, RETINANET, "it is a GeneralizedRCNN", "META_ARCHITECTURE GeneralizedRCNN"),
    (only("ROI_MASK_HEAD.NUM_CONV", 4), {}, "in its mask_head are 4, not 2", "NUM_CONV 4"),
    (only("ROI_BOX_HEAD.NUM_FC", 1), {}, "in its box_head are 1, not 2", "NUM_FC 1"),
    (only("RPN.CONV_DIMS", (-1, -1)), {}, "in its rpn_head are 2, not 1", "CONV_DIMS a list of 2"),
    (only("FPN.OUT_CHANNELS", 64), {}, "feature pyramid are 64, not 32", "FPN.OUT_CHANNELS 64"),
    (only("RESNETS.NUM_GROUPS", 2), {}, "its res2 has 2 groups of 32", "RESNETS.NUM_GROUPS 2"),
]
# The same of RetinaNets.
RETINANET_MISFITS = [
    (only("RETINANET.NUM_CLASSES", 3), {}, "is of 3 classes, not of 4", "RETINANET.NUM_CLASSES 3"),
    (ONE_RATIO, {}, "its head has 1 anchor", "ANCHOR_GENERATOR of 1 anchor"),
    (only("RETINANET.NORM", "BN"), {}, "its head has batch norms", "RETINANET.NORM BN"),
    ({}, only("RETINANET.NORM", "GN"), "its head has no norm layers", "RETINANET.NORM empty"),
    (only("RETINANET.NUM_CONVS", 2), {}, "in its head are 2, not 4", "RETINANET.NUM_CONVS 2"),
]


def misfit(theirs, ours):
    with pytest.raises(InputError) as caught:
        checkpoint.load_into(detector(ours), detector(theirs).state_dict(), "x.pth")
    return str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "told", "asked"),
    [
        *MISFITS,
        *(
            ({**RETINANET, **one}, {**RETINANET, **other}, *rest)
            for one, other, *rest in RETINANET_MISFITS
        ),
    ],
)
def test_why_a_checkpoint_does_not_fit(theirs, ours, told, asked):
    message = misfit(theirs, ours)
    before, after = message.split(": is MODEL.")
    assert told in before
    assert asked in f"MODEL.{after}"
    assert after.endswith(
        "? (a model of your own needs the --config-file that it was trained with)"
    )
    assert ("belongs to another architecture: " in before) == ("classes, not of" not in before)


def test_keypoints():
    plain, other = detector({}), detector({})
    other.roi_heads.keypoint_head = nn.Conv2d(2, 2, 1)
    for model, state, present, article in ((plain, other, True, "a"), (other, plain, False, "no")):
        with pytest.raises(InputError, match=f"it has {article} keypoint_head") as caught:
            checkpoint.load_into(model, state.state_dict(), "x.pth")
        assert f": is MODEL.KEYPOINT_ON {present}? (" in str(caught.value)


def test_several_reasons():
    theirs = {**RETINANET, **ONE_RATIO, "MODEL.RETINANET.NUM_CLASSES": 3}
    assert misfit(theirs, RETINANET) == (
        "checkpoint x.pth belongs to another architecture: it is of 3 classes, not of 4; its head "
        "has 1 anchor in each place, not 3 (shapes that differ: 4, such as head.cls_score.weight, "
        "3 x 32 x 3 x 3 instead of 12 x 32 x 3 x 3): is MODEL.RETINANET.NUM_CLASSES 3 and "
        "MODEL.ANCHOR_GENERATOR of 1 anchor (SIZES times ASPECT_RATIOS)? "
        "(a model of your own needs the --config-file that it was trained with)"
    )


def test_shapes_that_no_detector_has(state):
    """Rules look at tensors of any shape."""
    model = detector({})
    odd = {key: torch.ones(()) for key in model.state_dict()}
    empty = {key: torch.ones(0) for key in model.state_dict()}
    for each in (odd, empty, state):
        with pytest.raises(InputError, match="belongs to another architecture"):
            checkpoint.load_into(model, each, "x.pth")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (maskrcnn_resnet50_fpn, "a Mask R-CNN of torchvision"),
        (keypointrcnn_resnet50_fpn, "a Keypoint R-CNN of torchvision"),
        (fasterrcnn_resnet50_fpn, "a Faster R-CNN of torchvision"),
        (retinanet_resnet50_fpn, "a RetinaNet of torchvision"),
        (resnet18, "a ResNet of torchvision"),
    ],
)
def test_checkpoints_of_torchvision(tmp_path, make, name):
    parts = {} if make is resnet18 else {"weights_backbone": None}
    with torch.device("meta"):
        names = list(make(weights=None, **parts).state_dict())
    torch.save({key: torch.ones(1) for key in names}, str(tmp_path / "model.pth"))
    with pytest.raises(InputError) as caught:
        checkpoint.load_into(detector({}), checkpoint.read(tmp_path / "model.pth"), "x.pth")
    assert str(caught.value).startswith(f"checkpoint x.pth is {name}: it")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["conv1_w", "res2_0_branch2a_w", "res_conv1_bn_s"], "a backbone of Caffe2, such as MSRA"),
        (["res2_0_branch2a_w", "cls_score_w", "conv_rpn_w"], "a detector of Detectron in Caffe2"),
        (["stem.conv1.weight", "res2.0.conv1.weight"], "a backbone alone: it is what training"),
        (["backbone.layer1.0.conv1.weight", "rpn_head.rpn_conv.weight"], "MMDetection"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, lambda x: {"blobs": x}, lambda x: {"model": x}])
def test_checkpoints_of_others(tmp_path, names, told, wrap):
    document = wrap({name: np.ones(3, np.float32) for name in names})
    path = write_pickle(tmp_path / "R-50.pkl", document)
    with pytest.raises(InputError, match=told):
        checkpoint.load_into(detector({}), checkpoint.read(path), "x.pth")
