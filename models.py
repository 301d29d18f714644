"""The seven test models: how each is built, weighted, exported and fed."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detectors
from catalog import TUNING, TestModel
from detectors.checkpoint import CheckpointUnavailable, load_into, read, zoo_checkpoint
from detectors.instances import Instances, flatten
from errors import InputError
from results import file_name

# The images that TorchBlade's benchmark tunes for are smaller and larger by factors from here.
MIN_SCALE = (0.5, 0.7)
MAX_SCALE = (2.0, 3.0)
DEFAULT_SIZE = (480, 640)
# Two halvings less than the stride of the coarsest feature map: below, nothing is left of it.
SMALLEST_SIDE = 32


class TraceableDetector(nn.Module):
    """A detector with the flat signature of an export: images in, tuple of tensors out."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, *images: Tensor) -> Tuple[Tensor, ...]:
        found = self.detector(list(images))
        return tuple(tensor for instances in found for tensor in flatten(instances))


class ScriptableBoxDetector(nn.Module):
    """The same for TorchScript, which knows no variable number of images: one, without masks."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        found: Instances = self.detector([image])[0]
        return found.pred_boxes, found.pred_classes, found.scores, found.image_size


class Export:
    """A test model made ready.

    Attributes:
        name: of the test model.
        kind: `traced` or `scripted`.
        eager: module in eval mode; takes the images of a call and gives the flat tuple.
        tuning_inputs: `min`, `opt`, `max` -> the images of a call, float tensors 3 x H x W.
        other_inputs: images of calls that are timed besides `opt`, for backends that compile when
            they first see a size.
        fields: names of the tensors that the flat tuple has for each image.
    """

    other_inputs: Sequence[Tuple[Tensor, ...]] = ()

    def __init__(
        self, model: TestModel, eager: nn.Module, tuning_inputs: Dict[str, Tuple[Tensor, ...]]
    ) -> None:
        self.name = model.name
        self.kind = model.kind
        self.fields = model.fields
        self.eager = eager
        self.tuning_inputs = tuning_inputs
        self._script_module: Optional[torch.jit.ScriptModule] = None

    @property
    def inputs(self) -> Tuple[Tensor, ...]:
        """The images that are timed: those of `opt`."""
        return self.tuning_inputs["opt"]

    def script_module(self) -> torch.jit.ScriptModule:
        """The traced or scripted module, called like `eager`; made the first time it is needed."""
        if self._script_module is None:
            self._script_module = self._script() if self.kind == "scripted" else self.trace()
        return self._script_module

    def trace(self) -> torch.jit.ScriptModule:
        """Traces the eager module as it would run now: under autocast, the casts are traced too."""
        with torch.no_grad():
            return torch.jit.trace(self.eager, self.inputs, check_trace=False)

    def _script(self) -> torch.jit.ScriptModule:
        return torch.jit.script(self.eager)


def build(
    model: TestModel,
    state: Dict[str, Tensor],
    weights_name: str,
    tuning_inputs: Dict[str, Tuple[Tensor, ...]],
    source: str = "bundled",
) -> Export:
    """Builds a test model with the given weights.

    Args:
        state: parameters by Detectron2's names.
        weights_name: what errors call them.
        source: `bundled`, or `detectron2` where it is installed.

    Raises:
        errors.InputError: the weights are of another architecture.
    """
    if source == "detectron2":
        from detectors.from_detectron2 import Detectron2Export

        return Detectron2Export(model, state, weights_name, tuning_inputs)
    detector = detectors.build(model.config, model.postprocess)
    load_into(detector, state, weights_name)
    wrapper = ScriptableBoxDetector if model.kind == "scripted" else TraceableDetector
    return Export(model, wrapper(detector).eval(), tuning_inputs)


def detectron2_unavailable() -> Optional[str]:
    """Why `--source detectron2` cannot be had here, in a sentence; None where it can."""
    try:
        with warnings.catch_warnings():
            # It uses what recent PyTorch calls deprecated.
            warnings.simplefilter("ignore")
            import detectron2.model_zoo  # noqa: F401
    except ImportError as error:
        return f"detectron2 is not usable here ({error}); install it or use --source bundled"
    return None


def resolve_source(source: str) -> str:
    """`detectron2` or `bundled` for `auto`, `detectron2` or `bundled`.

    Raises:
        errors.InputError: detectron2 was asked for and cannot be had.
    """
    if source == "bundled":
        return source
    reason = detectron2_unavailable()
    if reason is None:
        return "detectron2"
    if source == "detectron2":
        raise InputError(reason)
    return "bundled"


def default_image() -> Path:
    """A photograph that a dependency brings along: Grace Hopper, from matplotlib's sample data.

    Raises:
        errors.InputError: matplotlib is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder) / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if path.exists():
            return path
    raise InputError(
        "the default image comes with matplotlib, which is not installed here: "
        "pip install matplotlib, or give an --image"
    )


def read_image(path: Optional[Path], size: Optional[Tuple[int, int]]) -> Tensor:
    """Reads an image as Detectron2 wants it: BGR, 0 to 255, float32, 3 x H x W.

    Args:
        path: any format that Pillow reads; None for the default image.
        size: height and width to crop (around the center) and resize it to; None for the image's
            own, or 480 x 640 for the default image.

    Raises:
        errors.InputError: it is no image, is broken, or has a side below 32 pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path is None:
        path, size = default_image(), size or DEFAULT_SIZE
    try:
        with Image.open(path) as image:
            # Cameras store photographs lying on the side and say so in a tag.
            image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from None
    if size is not None:
        height, width = size
        image = ImageOps.fit(image, (width, height), Image.BICUBIC)
    if min(image.size) < SMALLEST_SIDE:
        raise InputError(
            f"image {path} has {image.width} x {image.height} pixels; "
            f"both sides must have at least {SMALLEST_SIDE}"
        )
    bgr = np.asarray(image)[:, :, ::-1].transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(bgr, dtype=np.float32))


def read_images(paths: Sequence[Path], size: Optional[Tuple[int, int]], seed: int) -> List[Tensor]:
    """Reads images as `read_image` does; none are the default image.

    Args:
        seed: of `tuning_inputs`.

    Raises:
        errors.InputError: one cannot be read, or has a size that engines for the first one are not
            made for.
    """
    images = [read_image(path, size) for path in paths or (None,)]
    ranges = tuning_inputs(images[0], 1, seed)
    smallest, largest = (tuple(ranges[which][0].shape[-2:]) for which in ("min", "max"))
    for path, image in zip(paths, images):
        own = tuple(image.shape[-2:])
        if not all(a <= b <= c for a, b, c in zip(smallest, own, largest)):
            raise InputError(
                f"image {path} has {own[0]}x{own[1]} pixels, and the engines are made for "
                f"{smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]}, after the first image: "
                "give an --image-size, or measure it alone"
            )
    return images


def write_image(image: Tensor, path: Path) -> None:
    """Writes an image as a file of the format of its name.

    Args:
        image: 3 x H x W, BGR, 0 to 255, as `read_image` gives it.
    """
    from PIL import Image

    rgb = image.flip(0).permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(rgb.numpy()).save(path)


def tuning_inputs(image: Tensor, images_per_call: int, seed: int) -> Dict[str, Tuple[Tensor, ...]]:
    """The images of a call in three sizes: `opt` as it is, `min` and `max` scaled both ways.

    Args:
        image: 3 x H x W.
        seed: of the scales, uniform in 0.5 to 0.7 and 2 to 3. No side gets below 32 pixels.
    """
    generator = np.random.default_rng(seed)
    scaled = {
        "min": _scale(image, generator.uniform(*MIN_SCALE)),
        "opt": image,
        "max": _scale(image, generator.uniform(*MAX_SCALE)),
    }
    return {name: tuple(x.clone() for _ in range(images_per_call)) for name, x in scaled.items()}


def inputs(
    images: Sequence[Tensor], images_per_call: int, seed: int
) -> Dict[str, Tuple[Tensor, ...]]:
    """All that a test model is called with: `tuning_inputs` of the first image, and the others.

    These are named by their place, `image 2` and so on.
    """
    others = {
        f"image {place}": tuple(image.clone() for _ in range(images_per_call))
        for place, image in enumerate(images[1:], start=2)
    }
    return {**tuning_inputs(images[0], images_per_call, seed), **others}


def _scale(image: Tensor, factor: float) -> Tensor:
    size = [max(SMALLEST_SIDE, int(side * factor)) for side in image.shape[-2:]]
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]


# What `--weights` knows besides files.
NAMED_WEIGHTS = ("auto", "zoo", "synthetic")


@dataclass(frozen=True)
class Weights:
    """Parameters of a test model.

    Attributes:
        state: parameters by Detectron2's names.
        name: of where they come from, for errors.
        note: one sentence for the reader of the table.
    """

    state: Dict[str, Tensor]
    name: str
    note: str


def find_weights(
    model: TestModel,
    weights: str,
    inputs: Dict[str, Tuple[Tensor, ...]],
    detections: int,
    seed: int,
) -> Weights:
    """Finds the weights that `--weights` asks for.

    Args:
        inputs: whose first images synthetic weights are made for, see `inputs`.
        weights: `auto`, `zoo`, `synthetic` or the path of a checkpoint.
        detections: how many objects synthetic weights find.
        seed: of synthetic weights.

    Raises:
        errors.InputError: the checkpoint cannot be had or read.
    """
    if weights in ("auto", "zoo"):
        try:
            path = zoo_checkpoint(model.config)
            return Weights(read(path), str(path), f"weights: {file_name(path)} of the model zoo")
        except CheckpointUnavailable as error:
            if weights == "zoo":
                raise
            reason = f" ({error})"
    elif weights != "synthetic":
        return Weights(read(Path(weights)), weights, f"weights: {file_name(weights)}")
    else:
        reason = ""
    from detectors.synthetic import synthesize

    others = [name for name in inputs if name not in TUNING]
    images = [inputs[name][0] for name in (*TUNING, *others)]
    state = synthesize(model.config, images, detections, seed)
    note = f"weights: synthetic, made to find {detections} objects{reason}"
    return Weights(state, "synthetic weights", note)


def checkpoint_digest(weights: str) -> Optional[str]:
    """Tells a checkpoint from another of the same name: 16 hexadecimal digits, or None.

    Args:
        weights: as for `find_weights`; what has no file of the user's has no digest.
    """
    if weights in NAMED_WEIGHTS:
        return None
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16]


def check_weights(models: Sequence[TestModel], weights: str) -> None:
    """Makes sure that `find_weights` will find what was asked for, for all of these models.

    Model-zoo checkpoints are downloaded here, where their progress can be seen.

    Raises:
        errors.InputError: a checkpoint cannot be had or read, or is of another architecture.
    """
    configs = dict.fromkeys(model.config for model in models)
    if weights in ("auto", "zoo"):
        try:
            for config in configs:
                zoo_checkpoint(config)
        except CheckpointUnavailable:
            if weights == "zoo":
                raise
    elif weights != "synthetic":
        state = read(Path(weights))
        for config in configs:
            load_into(detectors.build(config, False), state, weights)


def describe_sizes(tuning_inputs: Dict[str, Tuple[Tensor, ...]]) -> Dict[str, List[List[int]]]:
    """`min`, `opt`, `max` -> height and width of each image of the call."""
    return {
        name: [[int(x) for x in image.shape[-2:]] for image in images]
        for name, images in tuning_inputs.items()
    }
