"""From a configuration of the user's own to a detector of the installed Detectron2.

Detectron2 reads YAML with a loader that runs what a file contains. So it is never given a file, but
the settings that `detectors.config_file` has read. A LazyConfig file is a program: it is run here,
and gets here only where the user has said that it may.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Optional, Tuple

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from configuration import Input
from errors import InputError, first_cause
from models import Detectron2Model

FORMATS = ("BGR", "RGB")
# Where a LazyConfig has what happens to the images of a test.
MAPPER = "dataloader.test.mapper"
# The longest edge, where Detectron2's resizing sets none.
NO_LIMIT = 1 << 31


def detector_of(own: Detectron2Model) -> nn.Module:
    """The detector, in eval mode on the CPU, with weights of no meaning.

    Raises:
        errors.InputError: Detectron2 has no such key or part, or fails to build it.
    """
    if own.program is not None:
        return _of_program(own)
    config = _config(own)
    architecture = config.MODEL.META_ARCHITECTURE
    if architecture not in META_ARCH_REGISTRY:
        raise InputError(
            f"MODEL.META_ARCHITECTURE is {architecture!r}, and the installed Detectron2 has "
            f"{', '.join(sorted(name for name, _ in META_ARCH_REGISTRY))}"
        )
    with _told(f"Detectron2 cannot build {own.name}"):
        return build_model(config).eval()


def input_of(own: Detectron2Model) -> Tuple[Input, Optional[str]]:
    """How a detector wants its images; and what was assumed of it, in a sentence, or None.

    Raises:
        errors.InputError: as for `detector_of`; or no image can be made ready for it.
    """
    if own.program is None:
        images = _config(own).INPUT
        found = Input(images.MIN_SIZE_TEST, images.MAX_SIZE_TEST, images.FORMAT), None
    else:
        found = _input_of_program(own)
    if found[0].format not in FORMATS:
        raise InputError(
            f"{own.name}: the images' format is {found[0].format!r}, and {' or '.join(FORMATS)} "
            "can be made ready"
        )
    return found


@contextmanager
def _told(what: str) -> Iterator[None]:
    """While it lasts, whatever Detectron2 or a program says of a configuration is of the input."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {first_cause(error)}") from error


# Settings --------------------------------------------------------------------------------------


def _config(own: Detectron2Model) -> CfgNode:
    config = get_cfg()
    for key, value in own.settings:
        _set(config, key, value, own.name)
    config.MODEL.DEVICE = "cpu"
    config.MODEL.WEIGHTS = ""
    return config


def _set(config: CfgNode, key: str, value: Any, name: str) -> None:
    if key == "VERSION":
        return
    node, known = config, True
    *parents, last = key.split(".")
    for parent in parents:
        known = known and isinstance(node, CfgNode) and parent in node
        node = node[parent] if known else None
    if not known or not isinstance(node, CfgNode) or last not in node:
        raise InputError(f"{name}: {key} is not known to the installed Detectron2")
    if isinstance(node[last], CfgNode):
        if value is None:  # A node without keys.
            return
        raise InputError(f"{name}: {key} has keys of its own, and no value")
    if isinstance(node[last], float) and type(value) is int:
        value = float(value)
    with _told(f"{name}: {key} is {value!r}"):
        config.merge_from_list([key, value])


# Programs --------------------------------------------------------------------------------------


def _run(own: Detectron2Model) -> DictConfig:
    """What a LazyConfig file comes to, with the values that override it."""
    with _told(f"{own.name} cannot be run"):
        config = LazyConfig.load(own.program)
    if not isinstance(config, DictConfig) or "model" not in config:
        raise InputError(f"{own.name} defines no model")
    for key, value in own.settings:
        parent = key.rpartition(".")[0]
        if not isinstance(_selected(config, parent) if parent else config, DictConfig):
            raise InputError(f"{own.name} has no {parent}, in which {key} could be set")
        with _told(f"{own.name}: {key} cannot be set to {value!r}"):
            OmegaConf.update(config, key, value)
    return config


def _of_program(own: Detectron2Model) -> nn.Module:
    config = _run(own)
    overrides = " ".join(f"{key}={value}" for key, value in own.settings)
    with _told(f"Detectron2 cannot build {own.name}" + f" with {overrides}" * bool(overrides)):
        detector = instantiate(config.model)
    if not isinstance(detector, nn.Module):
        raise InputError(f"the model of {own.name} is no PyTorch module")
    return detector.cpu().eval()


def _input_of_program(own: Detectron2Model) -> Tuple[Input, Optional[str]]:
    config, default, assumed = _run(own), Input(), []
    lengths = _lengths(config)
    if lengths is None:
        lengths = default.min_size_test, default.max_size_test
        assumed.append(f"resized to {lengths[0]} to {lengths[1]} pixels")
    order = _selected(config, f"{MAPPER}.image_format") or _selected(config, "model.input_format")
    if order is None:
        order = default.format
        assumed.append(f"taken as {order}")
    told = f"{own.name} does not say it: images are {' and '.join(assumed)}, Detectron2's default"
    return Input(*lengths, order), told if assumed else None


def _selected(config: DictConfig, key: str) -> Any:
    """A value, or None where there is none."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:  # It refers to another key, which is not there.
        return None


def _lengths(config: DictConfig) -> Optional[Tuple[int, int]]:
    """The lengths of the edges that images are resized to for tests."""
    for each in _selected(config, f"{MAPPER}.augmentations") or ():
        if not isinstance(each, DictConfig) or "short_edge_length" not in each:
            continue
        shortest = each.short_edge_length
        choices = {shortest} if isinstance(shortest, int) else set(shortest)
        if len(choices) == 1:
            return choices.pop(), each.get("max_size", NO_LIMIT)
    return None
