"""What several test files share. Made once a session: real models, at sizes that are quick."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Sequence, Tuple

import numpy as np
import pytest
import torch

from detectors.build import build, find_weights
from detectors.export import Export
from detectors.inputs import default_image, read_image, tuning_inputs
from models import MODELS
from results.environment import cpu_flags, has_native_bf16

if TYPE_CHECKING:
    from measure.worker import Hosts

# At these sizes a second thread gains nothing, and on a busy machine two wait for each other.
torch.set_num_threads(1)

# What a shell starts in the background has Ctrl-C ignored, and so have its children; it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So has what `nohup` starts SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The configurations of the test models, by their names in the model zoo.
CONFIGS = sorted({model.config for model in MODELS.values()})
# Height and width of `opt`. Neither is a multiple of 32, and none of the sizes scaled from them.
SMALL = (100, 130)

needs_bf16 = pytest.mark.skipif(
    not has_native_bf16(cpu_flags()), reason="this CPU has no native bf16"
)


@pytest.fixture(scope="module", autouse=True)
def given_back():
    """What a file of tests has freed goes back to the system: other processes need it."""
    yield
    gc.collect()
    with contextlib.suppress(AttributeError):  # There is no glibc.
        ctypes.CDLL(None).malloc_trim(0)


# Each has weights and perhaps a traced module: all together they would take gigabytes.
@functools.lru_cache(maxsize=4)
def small_export(
    name: str,
    source: str = "bundled",
    size: Tuple[int, int] = SMALL,
    detections: int = 100,
    seed: int = 0,
) -> Export:
    """A test model with synthetic weights on the default photograph, at a small size."""
    model = MODELS[name]
    inputs = tuning_inputs(read_image(None, size), model.images_per_call, seed)
    weights = find_weights(model, "synthetic", inputs, detections, seed)
    return build(model, weights.state, weights.name, inputs, source)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module gives, called in a process of its own.

    PyTorch keeps the constants of a frozen module for good: hundreds of megabytes of each. With the
    process they are gone.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def arrays(outputs: Sequence[torch.Tensor]) -> List[np.ndarray]:
    """Tensors as NumPy arrays, as a worker hands them over: bfloat16 is float32 then."""
    tensors = [x.float() if x.dtype == torch.bfloat16 else x for x in outputs]
    return [x.detach().cpu().numpy() for x in tensors]


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """While it lasts, no file of this process, or of one that it starts, grows beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def exports() -> Callable[..., Export]:
    """Name of a test model, and perhaps a source -> its small export, made once."""
    return small_export


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file of 96 x 128 pixels."""
    from PIL import Image

    path = tmp_path_factory.mktemp("images") / "photograph.jpg"
    Image.open(default_image()).crop((0, 0, 256, 192)).resize((128, 96)).save(path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache of checkpoints, and a network where nothing answers."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Hosts of the suite's own environment: importing PyTorch takes most of a short run."""
    # Imported here, as the parent's side does not run on the oldest Python of a worker.
    from measure.worker import Command, Hosts

    hosts = Hosts((Command.own(),), tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def prepared(exports, tmp_path_factory) -> Path:
    """Weights and inputs of a small RetinaNet, as the request `PrepareModel` leaves them."""
    export = exports("testRetinaNet")
    folder = tmp_path_factory.mktemp("prepared")
    state = {name: x.numpy() for name, x in export.eager.detector.state_dict().items()}
    np.savez(folder / "state.npz", **state)
    images = {f"{name}/0": call[0].numpy() for name, call in export.tuning_inputs.items()}
    np.savez(folder / "inputs.npz", **images)
    return folder
