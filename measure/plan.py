"""What is to be measured: the command line with all defaults filled in, and checked."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from backends import base
from backends.base import Backend
from benchmark import LEAST_GENERATIONS, LEAST_ROUNDS_OF_GENERATION, RunFailed, StopRule, WarmUp
from configuration import Input
from detectors import inputs, zoo
from detectors.config_file import is_program, read_configuration, read_program, read_settings
from detectors.inputs import View
from errors import InputError
from measure import calibration, protocol
from measure.calibration import Calibration
from measure.dataset import Dataset, Picture
from measure.dataset import read as read_dataset
from measure.sizes import Sizes, draw
from measure.worker import READY_LIMIT_S, Command, Hosts, Worker
from models import CALIBRATION_IMAGES, GENERATIONS, MODELS, Detectron2Model, Model
from results.environment import (
    cpu_flags,
    default_threads,
    file_name,
    free_memory_mb,
    has_native_bf16,
    usable_cores,
)
from results.facts import OBJECTS
from results.file import prepare_directory

# What the reference takes at `max`, eager fp32 of PyTorch 2.14 on a CPU: MiB without an image, and
# bytes and floating-point operations for a pixel. Measured from 0.7 to 2.8 megapixels; of the seven
# models the largest, but for C4, whose 2 GiB more do not depend on the image.
BASE_MB, BYTES_PER_PIXEL, OPERATIONS_PER_PIXEL = 2048, 700, 0.6e6
# Operations per second of a core, about: what it does with AVX2.
CORE_OPERATIONS_PER_S = 50e9
# A call at `max` that takes longer is worth a word.
LONG_CALL_S = 60.0
# Half the width, as a share, that the interval of every speedup is to have.
HALF_WIDTH = {"cpu": 0.03, "cuda": 0.01}


@dataclass(frozen=True)
class Choice:
    """A backend, and the environment that its workers run in."""

    backend: Backend
    command: Command = field(default_factory=Command.own)

    @property
    def environment(self) -> str | None:
        """The name after the `@`, by which a backend is measured in several environments."""
        _, _, name = (self.command.name or "").partition("@")
        return name or None

    @property
    def name(self) -> str:
        """As the command line has it: `openvino`, `openvino@old`."""
        own = self.backend.name
        return own if self.environment is None else f"{own}@{self.environment}"

    def labelled(self, label: str | None = None) -> str:
        """What the table calls it, given what its backend does: `OpenVINO@old`."""
        label = label or self.backend.label
        return label if self.environment is None else f"{label}@{self.environment}"

    @property
    def is_baseline(self) -> bool:
        """Whether the others' speedups are relative to it: Torch of the suite's environment."""
        return self.backend.rank == 0 and self.command.name is None


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        models: in the order in which they are measured.
        choices: what is measured, the baseline first.
        precisions: requested, each a group of its own.
        source: `bundled` or `detectron2`.
        images: paths; empty for the default image.
        view: how the models see them.
        pictures: the images that were read, 3 x H x W, to be kept beside the results.
        detections: how many objects synthetic weights find; with several, each is measured.
        warm_up, rule: of the timing; later_warm_up: of workers that are started anew.
        output: folder for results and the files that backends want kept, or None.
        cache: folder in which engines are kept between invocations, or None.
        costs: whether someone will read what it costs to prepare a run.
        stages: whether the stages of the eager module are timed.
        bisect: whether the part is looked for in which a run that goes wrong does.
        trace: whether a profile of a call is kept in `output`, where PyTorch can make one.
        debug: whether to show what the worker of a failed run printed.
        gpu: name of the GPU that is measured on, if it is one.
        versions: distribution -> version, of the suite's own environment.
        environments: name of a choice -> the same of its environment, with `python`.
        left_out: label -> why a backend that is measured by default cannot be had.
        without: precision -> labels of the backends that do not compute in it.
        note: what to say before it begins, or None.
        dataset: that runs are evaluated on, or None.
        calibration: images that int8 takes its ranges from; None: nothing is measured at int8.
        sizes: that were drawn, for calls of sizes never seen before.
        min_ap_ratio: share of Torch fp32's AP that a run is to keep.
        tf32, cudnn_benchmark: see `results.record.Settings`.
    """

    models: tuple[Model, ...]
    choices: tuple[Choice, ...]
    precisions: tuple[str, ...]
    device: str
    source: str
    images: tuple[str, ...]
    view: View
    weights: str
    detections: tuple[int, ...]
    warm_up: WarmUp
    later_warm_up: WarmUp
    rule: StopRule
    threads: int
    seed: int
    output: Path | None = None
    debug: bool = False
    cache: Path | None = None
    pictures: Sequence[np.ndarray] = ()
    costs: bool = False
    stages: bool = False
    bisect: bool = False
    trace: bool = False
    gpu: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    without: dict[str, tuple[str, ...]] = field(default_factory=dict)
    note: str | None = None
    dataset: Dataset | None = None
    min_ap_ratio: float = 0.99
    calibration: Calibration | None = None
    tf32: bool | None = None
    cudnn_benchmark: bool | None = None
    sizes: Sizes = field(default_factory=Sizes)


# From options ----------------------------------------------------------------------------------


def environments(texts: Sequence[str]) -> dict[str, Command]:
    """What `--environment` says: name of a row -> what its workers are started by.

    Args:
        texts: `BACKEND=COMMAND` or `BACKEND@NAME=COMMAND` each.

    Raises:
        errors.InputError: one is not of that form, of an unknown backend, twice there, or has no
            program.
    """
    commands: dict[str, Command] = {}
    for text in texts:
        name, separator, command = text.partition("=")
        backend, at, alias = name.partition("@")
        if not separator or not re.fullmatch(r"[\w.-]+", alias if at else backend):
            raise InputError(
                f"--environment {text}: it is not BACKEND=COMMAND or BACKEND@NAME=COMMAND"
            )
        if base.load(backend).rank == 0 and not at:
            raise InputError(
                f"--environment {name}: the baseline runs in the suite's own environment; "
                f"{name}@NAME=COMMAND measures another one beside it"
            )
        if name in commands:
            raise InputError(f"--environment {name} is given twice")
        commands[name] = Command.of(name, command)
    return commands


def make_plan(options: argparse.Namespace, commands: dict[str, Command], hosts: Hosts) -> Plan:
    """Fills in the defaults, and checks all that can be checked before anything is measured.

    Args:
        options: see `run_blade.parser`.
        commands: see `environments`.
        hosts: that are asked what there is.

    Raises:
        errors.InputError: something that was asked for cannot be had.
    """
    cores = usable_cores()
    if options.threads is not None and options.threads > cores:
        raise InputError(f"--threads {options.threads}: only {cores} cores can be used here")
    threads = options.threads or default_threads()
    if options.opts and options.config_file is None:
        raise InputError("--opts goes with --config-file")
    if options.bisect and options.module is not None:
        raise InputError(
            "--bisect watches the parts of the bundled detectors, and of a --module it knows none: "
            "--config-file and --weights build one"
        )
    assumed = None
    if options.module is None:
        models, assumed = _with_input(models_of(options), threads, hosts)
    else:
        hosts.start()
        models = (module_of(options, threads, hosts),)
    view = _view(options, models[0])
    images = tuple(dict.fromkeys(options.image or ()))
    dataset = _dataset(options, models)
    if dataset is not None:
        images = images or (str(_typical(dataset, view).path),)
        view = _view_of(dataset, view, [Path(x) for x in images])
    pictures = inputs.read_images([Path(x) for x in images], view, options.seed)
    weights = _weights(options)
    asked = _asked_backends(options.backend, commands)
    sizes = inputs.view_sizes(pictures, view, options.seed)
    note = check_room(sizes, models, threads, view)
    others = [view.resized(x.shape[-2:]) for x in pictures[1:]]
    new_sizes = draw(options.sizes, options.iterations is not None, sizes, others, options.seed)
    hosts.start()
    request = protocol.Survey(asked or default_backends(), options.device, _source(options))
    survey = survey_of(Command.own(), request, threads, hosts)
    if options.bisect and survey.source == "detectron2":
        raise InputError(
            "--bisect watches the parts of the bundled detectors, and not Detectron2's own: "
            "--source bundled takes those"
        )
    device = survey.device
    choices, left_out = _choices(asked, commands, survey, options.backend is not None)
    in_others = {
        choice.name: _check_environment(choice, device, threads, hosts)
        for choice in choices
        if choice.command.name is not None
    }
    precisions, without = _precisions(options.precision, device, choices)
    if options.module is None:
        _check_weights(models, weights, threads, hosts)
    calibrated = _calibration(options, precisions, images, view, sizes, dataset, hosts)
    versions: dict[str, str] = {}
    for choice in choices:
        if choice.command.name is None:
            versions.update(survey.backends[choice.backend.name].versions)
    return Plan(
        models=models,
        choices=choices,
        precisions=precisions,
        device=device,
        source=survey.source,
        images=images,
        view=view,
        pictures=pictures,
        weights=weights,
        detections=options.detections,
        warm_up=_warm_up(options.warmup, WarmUp.on(device)),
        later_warm_up=_warm_up(options.warmup, WarmUp.again(device)),
        rule=_stop_rule(options, device),
        threads=threads,
        seed=options.seed,
        output=prepare_directory(options.output).resolve() if options.output else None,
        debug=options.debug,
        costs=options.costs or options.output is not None,
        stages=options.stages,
        bisect=options.bisect,
        trace=options.trace,
        # A worker in a container may have another working folder.
        cache=prepare_directory(options.cache, "cache").resolve() if options.cache else None,
        gpu=survey.gpu,
        versions=versions,
        environments=in_others,
        left_out=left_out,
        without=without,
        note="; ".join(filter(None, (assumed, note))) or None,
        dataset=dataset,
        min_ap_ratio=options.min_ap_ratio,
        calibration=calibrated,
        tf32=_tf32(options, device),
        cudnn_benchmark=survey.cudnn_benchmark,
        sizes=new_sizes,
    )


def _dataset(options: argparse.Namespace, models: Sequence[Model]) -> Dataset | None:
    """The data set that runs are evaluated on.

    Raises:
        errors.InputError: it cannot be read, or does not go with the models.
    """
    if options.dataset is None:
        for name in ("image_root", "limit"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} goes with --dataset")
        if "loses-ap" in options.fail_on:
            raise InputError("--fail-on loses-ap goes with --dataset")
        return None
    if options.weights == "synthetic" or options.detections != (OBJECTS,):
        raise InputError("--dataset needs a trained model: synthetic weights find nothing in it")
    if options.image_size is not None:
        raise InputError(
            "--image-size crops images, and with them the objects of --dataset: --opts "
            "INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST say what they are resized to"
        )
    annotations = Path(options.dataset)
    root = annotations.parent if options.image_root is None else Path(options.image_root)
    dataset = read_dataset(annotations, root, options.limit, options.seed)
    for model in models:
        if model.classes not in (None, len(dataset.classes)):
            raise InputError(
                f"{model.name} tells {model.classes} classes apart, and {dataset.name} has "
                f"{len(dataset.classes)} categories: {_some(dataset.classes)}{_unused(dataset)}"
            )
    return dataset


def _calibration(
    options: argparse.Namespace,
    precisions: Sequence[str],
    images: Sequence[str],
    view: View,
    sizes: dict[str, inputs.Size],
    dataset: Dataset | None,
    hosts: Hosts,
) -> Calibration | None:
    """The images that int8 is calibrated on; None where nothing is measured at int8.

    Args:
        images: that are timed.
        sizes: of the tuning inputs.

    Raises:
        errors.InputError: there are none, or none that are not evaluated, too.
    """
    folder, annotations = options.calibration, options.calibration_annotations
    for name in ("calibration", "calibration_annotations"):
        if getattr(options, name) is not None and "int8" not in precisions:
            raise InputError(f"--{name.replace('_', '-')} goes with --precision int8")
    if folder is None and annotations is None:
        if options.calibration_limit is not None:
            raise InputError("--calibration-limit goes with --calibration DIR")
        if "int8" not in precisions:
            return None
        return calibration.of_timed([Path(x) for x in images], dataset)
    return calibration.read(
        folder and Path(folder),
        annotations and Path(annotations),
        options.calibration_limit or CALIBRATION_IMAGES,
        options.seed,
        view,
        (sizes["min"], sizes["max"]),
        dataset,
        hosts.folder / "calibration.npz",
    )


def _unused(dataset: Dataset) -> str:
    """Which categories are there for nothing, as some programs write them."""
    used = {x["category_id"] for x in dataset.annotations}
    names = [
        name
        for number, name in zip(dataset.category_ids, dataset.classes, strict=True)
        if number not in used
    ]
    return f" (without objects: {_some(names)})" if names else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _typical(dataset: Dataset, view: View) -> Picture:
    """The first image of the most frequent size, of those with objects in them."""
    with_objects = {x["image_id"] for x in dataset.annotations if not x["iscrowd"]}
    images = [picture for picture in dataset.images if picture.id in with_objects]
    sizes = [view.resized(picture.size) for picture in images]
    return images[sizes.index(Counter(sizes).most_common(1)[0][0])]


def _view_of(dataset: Dataset, view: View, images: Sequence[Path]) -> View:
    """The view with the sizes that a data set has, unless others were asked for.

    Args:
        images: that are timed, of which engines have to take the sizes, too.

    Raises:
        errors.InputError: one of them cannot be read.
    """
    sizes = [picture.size for picture in dataset.images]
    # Whether these lie in the range is seen when that is known.
    sizes += [inputs.read_image(path, view.size, least=1).shape[-2:] for path in images]
    resized = np.array([view.resized(size) for size in sizes])
    smallest, largest = resized.min(axis=0).tolist(), resized.max(axis=0).tolist()
    least = inputs.SMALLEST_SIDE
    return replace(
        view,
        smallest=view.smallest or (max(least, smallest[0]), max(least, smallest[1])),
        largest=view.largest or (max(least, largest[0]), max(least, largest[1])),
    )


def models_of(options: argparse.Namespace) -> tuple[Model, ...]:
    """The test models that are asked for, or the model of the user's own, if it is no file.

    Raises:
        errors.InputError: its configuration cannot be had, or there are no weights for it.
    """
    if options.trust_config and (
        options.source != "detectron2" or not is_program(options.config_file or "")
    ):
        raise InputError(
            "--trust-config goes with --source detectron2 and a LazyConfig file (.py): "
            "nothing else is run"
        )
    if options.config_file is None:
        for name in ("min_size", "max_size"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} goes with --config-file or --module")
        return tuple(
            MODELS[name] for name in (MODELS if options.all else dict.fromkeys(options.model))
        )
    configuration = own = None
    if options.source == "detectron2":
        own = _of_detectron2(options)
    else:
        configuration = read_configuration(options.config_file, options.opts)
    if options.weights in zoo.NAMED_WEIGHTS:
        raise InputError("--config-file needs the model's --weights FILE")
    return (
        Model(
            # Detectron2's trainer leaves `config.yaml` in a folder that someone has given a name.
            name=_own_name(Path(options.config_file), "config"),
            config=file_name(options.config_file),
            postprocess=configuration is not None
            and configuration.model.meta_architecture == "RetinaNet",
            configuration=configuration,
            detectron2=own,
        ),
    )


def _own_name(path: Path, nameless: str) -> str:
    """What a model of the user's own is called, which stands in tables, and in names of files.

    Args:
        nameless: if the file is called so, its folder has the name.
    """
    name = path.absolute().parent.name if path.stem == nameless else path.stem
    name = re.sub(r"[^\w.+-]+", "_", file_name(name)) or "model"
    return f"{name}_own" if name in MODELS else name


def module_of(options: argparse.Namespace, threads: int, hosts: Hosts) -> Model:
    """The model that is a file. With a configuration, that tells how images are seen.

    Raises:
        errors.InputError: the file is nothing that can be taken, or options do not go with it.
    """
    for name, is_named in (
        ("--weights", options.weights != "auto"),
        ("--detections", options.detections != (OBJECTS,)),
        ("--source", options.source == "detectron2"),
        ("--trust-config", options.trust_config),
    ):
        if is_named:
            raise InputError(f"{name} does not go with --module, which has its weights in it")
    configuration = None
    if options.config_file is not None:
        configuration = read_configuration(options.config_file, options.opts)
    request = protocol.InspectModule(options.module, options.fields, options.trust_module)
    with worker_for(hosts, Command.own(), threads) as worker:
        module = worker.ask(request, READY_LIMIT_S).module
    if module.kind in ("onnx", "compiled") and options.device == "cuda":
        raise InputError("--module: what is no PyTorch module is run on a CPU only: --device cpu")
    return Model(
        # As Detectron2's export leaves it.
        name=_own_name(Path(options.module), "model"),
        config=file_name(options.module),
        kind=module.kind,
        configuration=configuration,
        module=module,
    )


def _of_detectron2(options: argparse.Namespace) -> Detectron2Model:
    """The model of the user's own that Detectron2 builds.

    Raises:
        errors.InputError: its configuration cannot be read, or is a program that is not trusted.
    """
    path, name = options.config_file, file_name(options.config_file)
    if not is_program(path):
        return Detectron2Model(name, read_settings(path, options.opts))
    settings = read_program(path, options.opts)
    if not options.trust_config:
        raise InputError(
            f"{name} is a program, as LazyConfig files are, and would be run: --trust-config says "
            "that you know what it does"
        )
    return Detectron2Model(name, settings, str(Path(path).resolve()))


def _with_input(
    models: tuple[Model, ...], threads: int, hosts: Hosts
) -> tuple[tuple[Model, ...], str | None]:
    """The models, of which Detectron2 tells how it wants images; and what was assumed of that.

    Raises:
        errors.InputError: Detectron2 is not usable, or does not know what a configuration says.
    """
    own = models[0].detectron2
    if own is None:
        return models, None
    with worker_for(hosts, Command.own(), threads) as worker:
        answer = worker.ask(protocol.ReadInput(own), READY_LIMIT_S)
    return (replace(models[0], detectron2=replace(own, input=answer.input)),), answer.assumed


def _view(options: argparse.Namespace, model: Model) -> View:
    """How images are made ready for a model.

    Raises:
        errors.InputError: it resizes them to nothing, or takes no images of the size asked for.
    """
    module = model.module
    if module is not None and module.size is not None:
        return _fixed_view(options, model, module.size)
    ends = View() if module is None else View(least=module.smallest, most=module.largest)
    for name in ("image_size", "min_size", "max_size"):
        asked = getattr(options, name)
        if asked is not None and not ends.takes(asked):
            raise InputError(
                f"--{name.replace('_', '-')}: {model.config} takes images {ends.taken}"
            )
    images = model.input
    if images is None and options.dataset is not None and model.module is None:
        images = Input()  # Of the model zoo, whose test models see images as they are else.
    if images is None:
        return replace(
            ends, size=options.image_size, smallest=options.min_size, largest=options.max_size
        )
    view = replace(
        ends,
        size=options.image_size,
        shortest=0 if options.image_size else images.min_size_test,
        longest=images.max_size_test,
        format=images.format,
        smallest=options.min_size,
        largest=options.max_size,
    )
    if view.shortest and min(view.shortest, view.longest) < inputs.SMALLEST_SIDE:
        raise InputError(
            f"INPUT.MIN_SIZE_TEST is {view.shortest} and MAX_SIZE_TEST {view.longest}: both have "
            f"to be at least {inputs.SMALLEST_SIDE}"
        )
    return view


def _fixed_view(options: argparse.Namespace, model: Model, size: inputs.Size) -> View:
    """The same for a file that was made for images of one size.

    Raises:
        errors.InputError: another one was asked for.
    """
    for name in ("image_size", "min_size", "max_size"):
        if getattr(options, name) not in (None, size):
            raise InputError(
                f"--{name.replace('_', '-')}: {model.config} was made for images of "
                f"{size[0]}x{size[1]} and no others"
            )
    channels = "BGR" if model.configuration is None else model.configuration.input.format
    return View(size, format=channels, smallest=size, largest=size)


def _source(options: argparse.Namespace) -> str:
    """Where detectors come from: those of the user's own from Detectron2 only where it is asked."""
    if options.config_file is not None and options.source == "auto":
        return "bundled"
    return "bundled" if options.module is not None else str(options.source)


def check_room(
    sizes: dict[str, inputs.Size], models: Sequence[Model], threads: int, view: View
) -> str | None:
    """What to say of images so large that a call takes minutes; None of smaller ones.

    Args:
        sizes: of the tuning inputs.
        view: that they are of.

    Raises:
        errors.InputError: the memory that is free will not do.
    """
    (height, width), largest = sizes["opt"], sizes["max"]
    pixels = largest[0] * largest[1] * max(model.images_per_call for model in models)
    needed_mb = BASE_MB + pixels * BYTES_PER_PIXEL / 2**20
    seconds = pixels * OPERATIONS_PER_PIXEL / (threads * CORE_OPERATIONS_PER_S)
    free_mb = free_memory_mb()
    if needed_mb <= free_mb and seconds <= LONG_CALL_S:
        return None
    if free_mb <= BASE_MB:
        raise InputError(
            f"{free_mb / 1024:.1f} GiB of memory are free, and PyTorch takes {BASE_MB / 1024:.1f} "
            "and more for a detector"
        )
    # Of both, so that the way out is one.
    scale = min(1.0, (LONG_CALL_S / seconds) ** 0.5)
    if needed_mb > free_mb:
        scale = min(scale, ((free_mb - BASE_MB) / 2 / (needed_mb - BASE_MB)) ** 0.5)
    text = (
        f"at {height}x{width} engines are made for up to {largest[0]}x{largest[1]}, where a call "
        f"takes about {needed_mb / 1024:.1f} GiB of memory and {seconds / 60:.1f} min"
    )
    way_out = f"{_smaller(sizes, view, scale)} takes less"
    if needed_mb > free_mb:
        raise InputError(f"{text}, and {free_mb / 1024:.1f} GiB are free: {way_out}")
    return f"{text}: {way_out}"


def _smaller(sizes: dict[str, inputs.Size], view: View, scale: float) -> str:
    """The options with which the sides of the largest images are smaller by a factor."""
    image, largest = (
        "x".join(str(max(inputs.SMALLEST_SIDE, int(side * scale))) for side in sizes[name])
        for name in ("opt", "max")
    )
    if not (view.shortest or view.largest):
        return f"--image-size {image}"
    if all(own <= side * scale for own, side in zip(sizes["opt"], sizes["max"])):
        return f"--max-size {largest}"
    return f"--image-size {image} --max-size {largest}"


@contextlib.contextmanager
def worker_for(hosts: Hosts, command: Command, threads: int) -> Iterator[Worker]:
    """A worker for some questions.

    Raises:
        errors.InputError: it cannot be started, or fails.
    """
    try:
        with hosts.of(command).worker(hosts.folder / "questions.log", threads) as worker:
            yield worker
    except RunFailed as error:
        raise InputError(f"{command} does not answer: {error}") from None


def survey_of(
    command: Command, request: protocol.Survey, threads: int, hosts: Hosts
) -> protocol.Surveyed:
    """What there is in an environment.

    Raises:
        errors.InputError: it cannot be had, or something that was asked for is not in there.
    """
    # What is wrong with the suite's own environment is not said to be of an environment.
    place = "" if command.name is None else f"{command}: "
    with worker_for(hosts, command, threads) as worker:
        try:
            return worker.ask(request, READY_LIMIT_S)
        except InputError as error:
            raise InputError(f"{place}{error}") from None


def default_backends() -> tuple[str, ...]:
    """Names of the backends that are measured where none is named, if they can be had."""
    return tuple(backend.name for backend in base.load_all() if backend.default)


def _asked_backends(
    asked: Sequence[str] | None, commands: dict[str, Command]
) -> tuple[str, ...] | None:
    """Backends of the suite's own environment that were asked for; None: what there is.

    Raises:
        errors.InputError: one is unknown.
    """
    if asked is None:
        return None
    for name in asked:
        if "@" in name and name not in commands:
            raise InputError(f"backend '{name}': no --environment {name}=COMMAND says what it is")
        base.load(name.partition("@")[0])
    own = [name for name in asked if name not in commands]
    return tuple(dict.fromkeys(("torch", *own)))


def _choices(
    asked: tuple[str, ...] | None,
    commands: dict[str, Command],
    survey: protocol.Surveyed,
    are_named: bool,
) -> tuple[tuple[Choice, ...], dict[str, str]]:
    """What is measured, the baseline first; and which defaults were left out, and why.

    Raises:
        errors.InputError: one that was asked for by name cannot be had.
    """
    choices, left_out = [], {}
    for name in asked or default_backends():
        backend, reason = base.load(name), survey.backends[name].reason
        if name in commands:
            continue  # It is measured in another environment.
        if reason is None:
            choices.append(Choice(backend))
        elif are_named:
            raise InputError(f"backend '{name}' is unavailable: {reason}")
        elif survey.device in backend.devices:
            left_out[backend.label] = reason
    for name, command in commands.items():
        choices.append(Choice(base.load(name.partition("@")[0]), command))
    ordered = sorted(choices, key=lambda choice: (choice.backend.rank, choice.environment or ""))
    return tuple(ordered), left_out


def _check_environment(choice: Choice, device: str, threads: int, hosts: Hosts) -> dict[str, str]:
    """Makes sure that a backend can be had in its environment; returns the versions in there.

    Raises:
        errors.InputError: it cannot.
    """
    request = protocol.Survey((choice.backend.name,), device, "bundled")
    survey = survey_of(choice.command, request, threads, hosts)
    known = survey.backends[choice.backend.name]
    if known.reason is not None:
        raise InputError(
            f"backend '{choice.name}' is unavailable in its environment: {known.reason}"
        )
    return {"python": survey.python, **known.versions}


def _precisions(
    asked: Sequence[str] | None, device: str, choices: Sequence[Choice]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The precisions to measure, each once; and which backends do not compute in them.

    Raises:
        errors.InputError: no backend but perhaps the baseline has one that was asked for.
    """
    if asked is None:
        if device == "cuda":
            return ("fp32", "fp16"), {}
        return (("fp32", "bf16") if has_native_bf16(cpu_flags()) else ("fp32",)), {}
    without = {}
    for precision in asked:
        unable = [x for x in choices if precision not in x.backend.precisions[device]]
        if len(unable) == len(choices):
            raise InputError(f"no backend here computes in {precision} on {device}")
        if unable:
            without[precision] = tuple(choice.labelled() for choice in unable)
    return tuple(dict.fromkeys(asked)), without


def _weights(options: argparse.Namespace) -> str:
    """What `--weights` comes to: only synthetic ones find a number of objects that was asked for.

    Raises:
        errors.InputError: a number of objects was asked for of others.
    """
    if options.detections == (OBJECTS,) or options.weights == "synthetic":
        return options.weights
    if options.weights != "auto":
        raise InputError(
            f"--detections makes synthetic weights: it does not go with --weights {options.weights}"
        )
    return "synthetic"


def _check_weights(models: Sequence[Model], weights: str, threads: int, hosts: Hosts) -> None:
    """Makes sure that the weights that were asked for will be found, for all of these models.

    Model-zoo checkpoints are downloaded here, where their progress can be seen.

    Raises:
        errors.InputError: a checkpoint cannot be had or read, or is of another architecture.
    """
    zoo.download_zoo(models, weights)
    if weights not in zoo.NAMED_WEIGHTS:
        with worker_for(hosts, Command.own(), threads) as worker:
            worker.ask(protocol.CheckWeights(tuple(models), weights))


def _tf32(options: argparse.Namespace, device: str) -> bool | None:
    """Whether a GPU may round fp32 to TF32, which it may by default; None on a CPU."""
    return options.tf32 is not False if device == "cuda" else None


def _stop_rule(options: argparse.Namespace, device: str) -> StopRule:
    """When enough rounds have been made.

    Raises:
        errors.InputError: there are fewer of them than generations, or too few generations.
    """
    asked = options.generations
    if asked is not None and 1 < asked < LEAST_GENERATIONS:
        raise InputError(
            f"--generations {asked}: so few tell nothing of how processes differ; 1, or at least "
            f"{LEAST_GENERATIONS}"
        )
    if options.iterations is not None:
        if asked is not None and asked > options.iterations:
            raise InputError(
                f"--iterations {options.iterations} are too few for --generations {asked}"
            )
        return StopRule.fixed(options.iterations, asked or 1)
    return StopRule(
        half_width=HALF_WIDTH[device],
        budget_s=options.time_budget,
        min_generations=asked or GENERATIONS,
        max_generations=asked or StopRule.max_rounds // LEAST_ROUNDS_OF_GENERATION,
    )


def _warm_up(calls: int | None, default: WarmUp) -> WarmUp:
    return default if calls is None else WarmUp.fixed(calls)
