"""What several test files share. Made once a session: real models, at sizes that are quick."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Callable, Tuple

import pytest
import torch

import models
import results
from catalog import MODELS
from models import Export

# At these sizes a second thread gains nothing, and on a busy machine two wait for each other.
torch.set_num_threads(1)

# What a shell starts in the background has Ctrl-C ignored, and so have its children; it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Height and width of `opt`. Neither is a multiple of 32, and none of the sizes scaled from them.
SMALL = (100, 130)

needs_bf16 = pytest.mark.skipif(
    not results.has_native_bf16(results.cpu_flags()), reason="this CPU has no native bf16"
)


@functools.lru_cache(maxsize=None)
def small_export(
    name: str, source: str = "bundled", size: Tuple[int, int] = SMALL, detections: int = 100
) -> Export:
    """A test model with synthetic weights on the default photograph, at a small size."""
    model = MODELS[name]
    image = models.read_image(None, size)
    inputs = models.tuning_inputs(image, model.images_per_call, seed=0)
    weights = models.find_weights(model, "synthetic", inputs, detections, seed=0)
    return models.build(model, weights.state, weights.name, inputs, source)


@pytest.fixture(scope="session")
def exports() -> Callable[..., Export]:
    """Name of a test model, and perhaps a source -> its small export, made once."""
    return small_export


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file of 96 x 128 pixels."""
    from PIL import Image

    path = tmp_path_factory.mktemp("images") / "photograph.jpg"
    Image.open(models.default_image()).crop((0, 0, 256, 192)).resize((128, 96)).save(path)
    return path
