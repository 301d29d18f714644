"""What a worker and its parent say to each other: a JSON object a line; arrays go through files.

It depends on no version of Python, NumPy or PyTorch of the other side, so that a worker may live
in another environment. Every request is a dataclass whose `answer` is the dataclass that comes
back. The parent speaks to the host of an environment, which forks workers and hands lines on:

    {"to": 3, "id": 17, "ask": "Detect", "with": {"name": "min", "outputs": "/tmp/.../min.npz"}}
    {"from": 3, "id": 17, "answer": {"seconds": [0.21, 0.2], "malformed": null}}
    {"from": 3, "id": 17, "error": "Unsupported", "message": "..."}
    {"from": 3, "died": -9}

Valid on Python 3.8, as workers import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import (
    Any,
    ClassVar,
    Dict,
    Generic,
    List,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from benchmark import WarmUp
from configuration import Input
from detectors.inputs import View
from models import Detectron2Model, Model, Module
from results.record import (
    AccuracyControl,
    AveragePrecision,
    Copies,
    Coverage,
    Drawn,
    DrawnRun,
    GpuState,
    ImageSizes,
    PartKind,
    Preparation,
    Stages,
    Task,
    Weights,
)

PROTOCOL = 2
# The number of the host itself, among those of its workers.
HOST = 0
# Seconds that a worker has to close what it has opened, when it was told to stop.
STOP_S = 2.0
# Bytes that are read at once.
CHUNK = 1 << 16

A = TypeVar("A")


class Request(Generic[A]):
    """Something that is asked for; what comes back is an `answer`."""

    answer: ClassVar[Type[Any]]


# Answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """The first line of a host, before it imports anything that takes long.

    Attributes:
        pid: as the host sees it; in a container that is not what the parent sees.
    """

    protocol: int
    python: str
    pid: int


@dataclass(frozen=True)
class Ready:
    """The second line of a host, when it has imported what its workers start with.

    Attributes:
        problem: why no worker can be started, or None.
    """

    problem: Optional[str] = None


@dataclass(frozen=True)
class Done:
    """There is nothing to tell."""


@dataclass(frozen=True)
class Started:
    """A worker that runs; `pid` as its host sees it."""

    pid: int


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be had in an environment.

    Attributes:
        reason: why not, in a sentence; None where it can.
        versions: distribution -> version of what it stands on; empty where it cannot be had.
    """

    reason: Optional[str]
    versions: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Surveyed:
    """What there is in an environment.

    Attributes:
        device: `cuda` or `cpu`; the one that was asked for, else what there is.
        gpu: its name, as PyTorch has it; None on a CPU.
        source: `detectron2` or `bundled`.
        cudnn_benchmark: see `results.record.Settings`.
    """

    device: str
    gpu: Optional[str]
    source: str
    python: str
    backends: Dict[str, Availability]
    cudnn_benchmark: Optional[bool] = None


@dataclass(frozen=True)
class Inspected:
    """What there is in a file that a detector was exported to."""

    module: Module


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model that was made ready.

    Attributes:
        sizes: of all inputs, as the detector sees them.
        timed: the inputs that are timed: `opt`, and the further images.
        flops: timed input -> of a call; None where PyTorch does not count them.
        image_digests: timed input -> what tells its images from others.
        fields: names of the tensors of one image in a flat tuple.
        score_threshold: detections score more; None: there is no threshold, or it is not known.
        limit: of detections in an image; None: there is none, or it is not known.
        given: the same of what a file of the user's gives, which may lack the image's size.
        blank_failure: why a file of the user's fails on a plain picture, or None.
        drawn_failure: why it fails at sizes that were drawn, which are no inputs then; or None.
    """

    sizes: ImageSizes
    timed: Tuple[str, ...]
    flops: Dict[str, Optional[int]]
    image_digests: Dict[str, str]
    weights: Weights
    fields: Tuple[str, ...]
    score_threshold: Optional[float]
    limit: Optional[int]
    given: Tuple[str, ...] = ()
    blank_failure: Optional[str] = None
    drawn_failure: Optional[str] = None


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run that was prepared.

    Attributes:
        label: what the table calls it, where that depends on what executes it.
        artifacts: name of a file that is worth keeping -> its text.
        control: see `results.record.Run`.
    """

    precision: str
    provider: str
    prepare: Preparation
    coverage: Coverage
    python: str
    versions: Dict[str, str]
    label: Optional[str] = None
    threads: Optional[int] = None
    cached: bool = False
    artifacts: Dict[str, str] = field(default_factory=dict)
    control: Optional[AccuracyControl] = None


@dataclass(frozen=True)
class Seconds:
    """Of calls, in order.

    Attributes:
        copies: what a GPU copied in each of the timed ones; empty on a CPU.
    """

    seconds: Tuple[float, ...]
    copies: Tuple[Copies, ...] = ()


@dataclass(frozen=True)
class Detected:
    """A call that was made to see what it finds; its flat tuple is in the file that was named.

    Attributes:
        first_s: seconds of the first call.
        seconds: see `results.record.Run.size_seconds`.
        malformed: why there is no such file: what came out is no tuple of tensors.
    """

    first_s: float
    seconds: Tuple[float, ...]
    malformed: Optional[str] = None


@dataclass(frozen=True)
class CalledNewSize:
    """A call of images of a new size.

    Attributes:
        seconds: that it took.
        resident_mb: memory of the process in MiB after it; None where the system does not tell.
    """

    seconds: float
    resident_mb: Optional[float] = None


@dataclass(frozen=True)
class WatchedPart:
    """How far what leaves a part is from eager fp32: see `results.record.PartDifference`."""

    name: str
    kind: PartKind
    difference: Optional[float]
    accumulated: Optional[float]


@dataclass(frozen=True)
class Watched:
    """The parts of an engine, as far as they could be compared."""

    parts: Tuple[WatchedPart, ...]


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each stage, call by call."""

    calls: Tuple[Stages, ...]


@dataclass(frozen=True)
class Memory:
    """Largest memory so far in MiB: resident, and allocated on the device."""

    peak_memory_mb: float
    peak_device_memory_mb: Optional[float] = None


@dataclass(frozen=True)
class Artifact:
    """Size in MiB of what was compiled; None where there is no such file."""

    mb: Optional[float]


@dataclass(frozen=True)
class EffectivePrecision:
    """The precision that a run really computes in."""

    precision: str


@dataclass(frozen=True)
class Peak:
    """Operations per second of PyTorch's matrix products; None where it has none.

    Attributes:
        precision: that they were computed in.
    """

    operations_per_s: Optional[float]
    precision: str


@dataclass(frozen=True)
class CpuTime:
    """Seconds of CPU that a worker and its children that have ended have used so far."""

    seconds: float


@dataclass(frozen=True)
class InputOf:
    """How a model wants its images.

    Attributes:
        assumed: what its configuration does not say, in a sentence; None: it says it all.
    """

    input: Input
    assumed: Optional[str] = None


@dataclass(frozen=True)
class BatchRead:
    """Images of a data set that were read.

    Attributes:
        left_out: id of an image -> why it could not be.
    """

    left_out: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """What was found in a data set, judged.

    Attributes:
        detections: in all of its images.
    """

    detections: int
    tasks: Dict[Task, AveragePrecision]


@dataclass(frozen=True)
class ComparedImage:
    """An image of a data set in which a run finds something else than the reference.

    Attributes:
        loss, lost, spurious, classes, score_difference, iou, mask_iou, oks: see
            `results.record.WorstImage`.
        reference, own: what both find, for drawing it.
    """

    id: int
    loss: float
    lost: int
    spurious: int
    classes: int
    score_difference: Optional[float]
    iou: Optional[float]
    mask_iou: Optional[float]
    oks: Optional[float]
    reference: Drawn
    own: DrawnRun


@dataclass(frozen=True)
class WorstFound:
    """The images with the largest loss, the worst first."""

    images: Tuple[ComparedImage, ...]


# Requests to a host ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Start(Request[Started]):
    """Fork a worker.

    Attributes:
        number: of the worker, in the messages to and from it.
        log: file that takes what it prints; temporary files lie beside it.
        threads: CPU threads that it may use.
        tf32: whether a GPU may round fp32 to TF32, see `backends.base.allow_tf32`; None: it has
            nothing to do with one.
    """

    answer: ClassVar = Started
    number: int
    log: str
    threads: int
    tf32: Optional[bool] = None


@dataclass(frozen=True)
class Kill(Request[Done]):
    """End a worker at once, with all that it has started."""

    answer: ClassVar = Done
    number: int


# Requests to a worker --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop(Request[Done]):
    """End yourself, when what you have opened is closed."""

    answer: ClassVar = Done


@dataclass(frozen=True)
class Survey(Request[Surveyed]):
    """What is there?

    Attributes:
        backends: names of the backends in question.
        device: `cpu`, `cuda`, or None for what there is.
        source: `auto`, `bundled` or `detectron2`.
    """

    answer: ClassVar = Surveyed
    backends: Tuple[str, ...]
    device: Optional[str]
    source: str = "auto"


@dataclass(frozen=True)
class InspectModule(Request[Inspected]):
    """What is in a file? None of it is run.

    Attributes:
        fields: names of the tensors that it gives for an image; empty: they are to be guessed.
        is_trusted: whether it may be a program.
    """

    answer: ClassVar = Inspected
    path: str
    fields: Tuple[str, ...]
    is_trusted: bool


@dataclass(frozen=True)
class ReadInput(Request[InputOf]):
    """How does a model that Detectron2 builds want its images?"""

    answer: ClassVar = InputOf
    model: Detectron2Model


@dataclass(frozen=True)
class CheckWeights(Request[Done]):
    """Can these models be built, and a checkpoint be read and loaded into them?"""

    answer: ClassVar = Done
    models: Tuple[Model, ...]
    weights: str


@dataclass(frozen=True)
class PrepareModel(Request[ModelFacts]):
    """Make weights and inputs of a model, and compute the reference.

    Attributes:
        folder: takes `state.npz`, `inputs.npz`, and `reference-NAME.npz` for each input. The input
            `blank`, if there is one, is a picture in which nothing is found.
        drawn: sizes of further inputs, `drawn 1` and so on.
    """

    answer: ClassVar = ModelFacts
    model: Model
    source: str
    weights: str
    images: Tuple[str, ...]
    view: View
    detections: int
    seed: int
    folder: str
    drawn: Tuple[Tuple[int, int], ...] = ()


@dataclass(frozen=True)
class DatasetImage:
    """An image of a data set.

    Attributes:
        size: height and width that the annotations have.
    """

    id: int
    path: str
    size: Tuple[int, int]


@dataclass(frozen=True)
class Validate:
    """How int8 is judged while it is made.

    Attributes:
        truth: annotations of the images that it is calibrated on, see `measure.accuracy.evaluate`.
        images: in the order in which they are in the file.
        category_ids: in the order of the classes.
        tasks: of `results.record.Task`.
        oks_sigmas: see `measure.accuracy.evaluate`; empty: COCO's.
        least_ratio: the share of the AP that is to be kept.
    """

    truth: str
    images: Tuple[DatasetImage, ...]
    category_ids: Tuple[int, ...]
    tasks: Tuple[str, ...]
    oks_sigmas: Tuple[float, ...]
    least_ratio: float


@dataclass(frozen=True)
class PrepareRun(Request[RunFacts]):
    """Build a model and optimize it.

    Attributes:
        folder: where `PrepareModel` has left weights and inputs.
        cache: folder in which engines are kept between invocations, or None.
        calibration: file with images to calibrate int8 on, see `detectors.inputs.Calls`; None: they
            are made of the timed one.
        validation: how int8 is judged on these; None: it is not.
        saved: folder in which `Save` has left the engine; None: it is made.
    """

    answer: ClassVar = RunFacts
    model: Model
    backend: str
    precision: str
    device: str
    source: str
    folder: str
    cache: Optional[str] = None
    calibration: Optional[str] = None
    validation: Optional[Validate] = None
    saved: Optional[str] = None


@dataclass(frozen=True)
class Save(Request[Done]):
    """Save the engine for later generations; what cannot be saved is made anew in each."""

    answer: ClassVar = Done
    folder: str


@dataclass(frozen=True)
class Warm(Request[Seconds]):
    """Make calls until the run is warm: see `benchmark.WarmUp`."""

    answer: ClassVar = Seconds
    minimum: int
    maximum: int
    agreement: Optional[float]
    seconds: Optional[float]

    @classmethod
    def by(cls, rule: WarmUp) -> Warm:
        """The request for a rule."""
        return cls(rule.minimum, rule.maximum, rule.agreement, rule.seconds)

    @property
    def rule(self) -> WarmUp:
        """The rule of this request."""
        return WarmUp(self.minimum, self.maximum, self.agreement, self.seconds)


@dataclass(frozen=True)
class TimedCalls(Request[Seconds]):
    """A call for each of the timed inputs, one after the other."""

    answer: ClassVar = Seconds


@dataclass(frozen=True)
class CallNewSize(Request[CalledNewSize]):
    """Call the images of a timed input, cut or mirrored to a new size.

    Attributes:
        size: height and width.
        place: of the input among those that are timed; counted on from the last to the first.
    """

    answer: ClassVar = CalledNewSize
    size: Tuple[int, int]
    place: int


@dataclass(frozen=True)
class Detect(Request[Detected]):
    """Call an input and keep what is found.

    Attributes:
        name: of the input.
        outputs: file for the flat tuple, as `numpy.savez` writes it.
        repeat: whether short calls are repeated, for their seconds.
    """

    answer: ClassVar = Detected
    name: str
    outputs: str
    repeat: bool = True


@dataclass(frozen=True)
class Watch(Request[Watched]):
    """Optimize the detector once more, with what leaves each part, and compare the parts.

    Attributes:
        name: of the input to call.
        file: with images of a data set, as `ReadBatch` leaves it, of which the first is called in
            place of the input; or None.
        outputs: file for flat tuples: `wanted/0` and so on is what eager fp32 finds, `run/0` the
            run, `watched/0` the engine while its parts are watched. What is malformed is left out.
    """

    answer: ClassVar = Watched
    name: str
    file: Optional[str]
    outputs: str


@dataclass(frozen=True)
class TimeStages(Request[StageTimes]):
    """Time the stages of the eager module in so many calls."""

    answer: ClassVar = StageTimes
    calls: int


@dataclass(frozen=True)
class Trace(Request[Done]):
    """Write a Chrome trace of one call; PyTorch's profiler slows the process down."""

    answer: ClassVar = Done
    path: str


@dataclass(frozen=True)
class ReadMemory(Request[Memory]):
    """How much memory has it taken?"""

    answer: ClassVar = Memory


@dataclass(frozen=True)
class ReadCoverage(Request[Coverage]):
    """How much of the graph did the engine take, with what showed in running?"""

    answer: ClassVar = Coverage


@dataclass(frozen=True)
class ReadArtifact(Request[Artifact]):
    """How large is what was compiled?"""

    answer: ClassVar = Artifact


@dataclass(frozen=True)
class ReadPrecision(Request[EffectivePrecision]):
    """What does it compute in? Perhaps by PyTorch's profiler, which slows the process down."""

    answer: ClassVar = EffectivePrecision


@dataclass(frozen=True)
class ReadGpu(Request[GpuState]):
    """How is the GPU?"""

    answer: ClassVar = GpuState


@dataclass(frozen=True)
class ReadCpuTime(Request[CpuTime]):
    """How much CPU has it used? For workers that cannot be seen from outside."""

    answer: ClassVar = CpuTime


@dataclass(frozen=True)
class MeasurePeak(Request[Peak]):
    """How fast does PyTorch multiply matrices?"""

    answer: ClassVar = Peak
    precision: str
    device: str


@dataclass(frozen=True)
class ReadBatch(Request[BatchRead]):
    """Read images of a data set as the detector sees them.

    Attributes:
        file: takes them, 3 x H x W uint8 each, by their ids.
    """

    answer: ClassVar = BatchRead
    images: Tuple[DatasetImage, ...]
    view: View
    file: str


@dataclass(frozen=True)
class DetectBatch(Request[Done]):
    """Call the run with images of a data set.

    Attributes:
        file: that has the images; `outputs` takes what is found, `ID/0`, `ID/1` and so on of each.
    """

    answer: ClassVar = Done
    file: str
    outputs: str


@dataclass(frozen=True)
class KeepBatch(Request[Done]):
    """Append what was found to a file, in COCO's format of results: a line for each image.

    Attributes:
        outputs: of `DetectBatch`.
        fields: names of the tensors of an image.
        category_ids: of the classes.
    """

    answer: ClassVar = Done
    outputs: str
    images: Tuple[DatasetImage, ...]
    fields: Tuple[str, ...]
    category_ids: Tuple[int, ...]
    kept: str


@dataclass(frozen=True)
class Judge(Request[Judged]):
    """What is the average precision of what was found?

    Attributes:
        truth: annotations of the images.
        kept: of `KeepBatch`.
        tasks: of `results.record.Task`.
        classes: their names.
        oks_sigmas: see `measure.accuracy.evaluate`; empty: COCO's.
        resamples: file of the reference's AP in resamples of the images; its figures lie beside.
        is_reference: whether this makes that file.
        least_ratio: the share of the reference's AP that is to be kept.
    """

    answer: ClassVar = Judged
    truth: str
    kept: str
    tasks: Tuple[str, ...]
    classes: Tuple[str, ...]
    oks_sigmas: Tuple[float, ...]
    resamples: str
    is_reference: bool
    least_ratio: float
    seed: int


@dataclass(frozen=True)
class FindWorst(Request[WorstFound]):
    """In which images does a run differ most from the reference?

    Attributes:
        reference, own: what both have found, of `KeepBatch`.
        category_ids: of the classes.
        oks_sigmas: see `measure.geometry.oks`; empty: COCO's.
    """

    answer: ClassVar = WorstFound
    reference: str
    own: str
    category_ids: Tuple[int, ...]
    oks_sigmas: Tuple[float, ...]


@dataclass(frozen=True)
class KeepCopy(Request[Done]):
    """Write a small copy of an image, as JPEG.

    Attributes:
        path: of the image.
        to: of the copy.
        longest: pixels that its longer side has at most.
    """

    answer: ClassVar = Done
    path: str
    to: str
    longest: int


REQUESTS: Dict[str, Type[Request[Any]]] = {
    kind.__name__: kind
    for kind in (
        *(Start, Kill, Stop, Survey, InspectModule, ReadInput, CheckWeights, PrepareModel),
        *(PrepareRun, Save, Warm, TimedCalls, Detect, TimeStages, Trace, ReadMemory, ReadCoverage),
        *(ReadArtifact, ReadPrecision, ReadGpu, ReadCpuTime, MeasurePeak, Watch, CallNewSize),
        *(ReadBatch, DetectBatch, KeepBatch, Judge, FindWorst, KeepCopy),
    )
}


def request(message: Dict[str, Any]) -> Request[Any]:
    """The request of a message.

    Raises:
        ValueError: there is no such request, or it lacks something.
    """
    try:
        return _typed(message["with"], REQUESTS[message["ask"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no request of this protocol: {error}") from error


def _typed(value: Any, hint: Any) -> Any:
    """JSON's arrays and objects as the tuples and records that a type names.

    Raises:
        KeyError, TypeError: a record has no such field, or lacks one.
    """
    if get_origin(hint) is Union and value is not None:  # Optional: there are no others.
        return _typed(value, get_args(hint)[0])
    if get_origin(hint) is tuple and value is not None:
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        return tuple(_typed(each, kind) for each, kind in zip(value, kinds))
    if is_dataclass(hint):
        hints = _hints(hint)
        return hint(**{name: _typed(each, hints[name]) for name, each in value.items()})
    return value


def _hints(record: Type[Any]) -> Dict[str, Any]:
    """The types of a record's fields.

    Python 3.8 refuses to evaluate `answer: ClassVar`, which is none, and the rest with it.
    """
    annotations = {each.name: each.type for each in fields(record)}
    alone = type(
        record.__name__, (), {"__annotations__": annotations, "__module__": record.__module__}
    )
    return get_type_hints(alone)


def lines(buffer: bytearray) -> List[bytes]:
    """Takes the complete lines out of what was read so far."""
    *complete, rest = bytes(buffer).split(b"\n")
    buffer[:] = rest
    return complete
