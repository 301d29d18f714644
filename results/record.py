"""What a result file holds: these records are its schema.

`results.file` reads and writes them. docs/results.schema.json is generated from them, and
docs/results.md explains them. Units are in the names: `_s` seconds, `_ms` milliseconds, `_mb` MiB,
`_fps` images per second. What does not exist is None.

Workers make some of these records, so this file stays valid on Python 3.8, and imports NumPy at
most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Dict, Literal, Optional, Tuple

from benchmark import BreakEven, Speedup, Statistics

SCHEMA = 2
TOOL = "run_blade"

# That can be asked for.
Precision = Literal["fp32", "fp16", "bf16", "int8"]
# That a run computes in. tf32: what fp32 comes to on a GPU that rounds it in convolutions and
# products: 10 bits of mantissa, and the range of fp32.
EffectivePrecision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
# What became of a run. failed: it crashed, or ran out of time or memory; unsupported: its backend
# cannot take the export; mismatch: it was measured, but its detections are not the reference's.
Status = Literal["ok", "failed", "unsupported", "mismatch"]
# What ended the rounds of a group. interval: every speedup was known well enough; generations: so
# many were asked for; width: the intervals had stopped shrinking; interrupted: all that came before
# what was found had been checked, so that such a group is measured again.
Stopped = Literal[
    "interval",
    "max rounds",
    "generations",
    "fixed",
    "time budget",
    "width",
    "all failed",
    "interrupted",
]

# Input (`min`, `opt`, `max`, and with several images `image 2` and so on) -> height and width of
# each image of the call, in pixels.
ImageSizes = Dict[str, Tuple[Tuple[int, int], ...]]


@dataclass(frozen=True)
class Cpu:
    """The CPU.

    Attributes:
        model: as the system names it.
        architecture: `x86_64`, `aarch64` and so on.
        flags: features that decide which kernels an engine picks; empty where the system does not
            tell.
        governor: how Linux chooses the frequency; None where it does not say.
        physical_cores, logical_cores: of the machine.
        usable_cores: by this process: CPU affinity and a container's quota, rounded down.
    """

    model: str = ""
    architecture: str = ""
    flags: Tuple[str, ...] = ()
    governor: Optional[str] = None
    physical_cores: Optional[int] = None
    logical_cores: Optional[int] = None
    usable_cores: Optional[int] = None


@dataclass(frozen=True)
class Commit:
    """The commit of the suite, and whether tracked files differed from it."""

    revision: str
    dirty: bool


@dataclass(frozen=True)
class Environment:
    """What was measured on, without host name, user name or paths.

    Attributes:
        time: start, UTC, ISO 8601; where groups were kept from an earlier invocation, its start.
        gpu: as PyTorch names it; None on a CPU.
        load_average: over 1, 5 and 15 minutes, before anything was measured.
        memory_mb: of the machine, or a container's limit.
        versions: distribution -> version, of the suite's own environment.
        variables: environment variables that change how libraries compute; a path reads `(path)`.
    """

    time: str = ""
    cpu: Cpu = field(default_factory=Cpu)
    gpu: Optional[str] = None
    load_average: Tuple[float, ...] = ()
    memory_mb: Optional[int] = None
    os: str = ""
    kernel: str = ""
    python: str = ""
    versions: Dict[str, str] = field(default_factory=dict)
    commit: Optional[Commit] = None
    variables: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """The command line, defaults filled in. Of paths there is the last part only.

    Attributes:
        config_digest: tells a configuration from another of the same name, its `opts` included.
        module: a file that was exported elsewhere; `module_digest` tells it from others.
        fields: names of the tensors that it gives, as far as they were named.
        weights_digest: tells a checkpoint file from another of the same name; None for weights that
            come from no file of the user's.
        environment: names of the environments that were given, as in `openvino@old`.
        dataset: name of the annotations; `dataset_digest` tells them from others.
        limit: how many of its images are taken.
        calibration: name of the folder with images that int8 takes its ranges from;
            `calibration_annotations`: of what is in them; `calibration_limit`: how many are taken;
            `calibration_digest` tells those that were taken from others, as the detector sees them.
        tf32: whether a GPU was allowed to round fp32 to TF32, by PyTorch and all engines.
        cudnn_benchmark: whether cuDNN tried its kernels for each size (PyTorch's
            `torch.backends.cudnn.benchmark`). None, as `tf32`: on a CPU, and in files of before.
    """

    model: Tuple[str, ...] = ()
    config_file: Optional[str] = None
    config_digest: Optional[str] = None
    opts: Tuple[str, ...] = ()
    module: Optional[str] = None
    module_digest: Optional[str] = None
    fields: Tuple[str, ...] = ()
    trust_module: bool = False
    backend: Tuple[str, ...] = ()
    precision: Tuple[str, ...] = ()
    device: str = "cpu"
    source: str = "bundled"
    trust_config: bool = False
    image: Tuple[str, ...] = ()
    image_size: Optional[Tuple[int, int]] = None
    min_size: Optional[Tuple[int, int]] = None
    max_size: Optional[Tuple[int, int]] = None
    weights: str = "auto"
    weights_digest: Optional[str] = None
    detections: Tuple[int, ...] = (100,)
    environment: Tuple[str, ...] = ()
    warmup: Optional[int] = None
    iterations: Optional[int] = None
    generations: Optional[int] = None
    time_budget: Optional[float] = None
    threads: Optional[int] = None
    sizes: Optional[int] = None
    seed: int = 0
    output: Optional[str] = None
    cache: Optional[str] = None
    rerun: bool = False
    fail_on: Tuple[str, ...] = ()
    coverage: bool = False
    costs: bool = False
    stages: bool = False
    roofline: bool = False
    trace: bool = False
    compare_published: bool = False
    bisect: bool = False
    debug: bool = False
    dataset: Optional[str] = None
    dataset_digest: Optional[str] = None
    limit: Optional[int] = None
    min_ap_ratio: float = 0.99
    max_latency_ms: Optional[float] = None
    max_memory_mb: Optional[float] = None
    max_prepare_s: Optional[float] = None
    calibration: Optional[str] = None
    calibration_annotations: Optional[str] = None
    calibration_limit: Optional[int] = None
    calibration_digest: Optional[str] = None
    tf32: Optional[bool] = None
    cudnn_benchmark: Optional[bool] = None


@dataclass(frozen=True)
class Weights:
    """Where the weights of a test model come from.

    Attributes:
        source: `zoo`: the model-zoo checkpoint; `file`: a checkpoint of the user's; `synthetic`.
        file: name of the checkpoint; None for synthetic weights.
        objects: that synthetic weights were made to find.
        no_zoo: why synthetic weights stand in for the model zoo's.
        digest: tells them from others: 16 hexadecimal digits.
    """

    source: Literal["zoo", "file", "synthetic"]
    file: Optional[str] = None
    objects: Optional[int] = None
    no_zoo: Optional[str] = None
    digest: Optional[str] = None


@dataclass(frozen=True)
class Coverage:
    """How much of the graph an engine took; None for what its backend does not tell.

    Attributes:
        operators: of the graph.
        operators_in_engine: of these, in engines.
        share_of_flops: of the group's `flops`, in engines, 0 to 1.
        segments: engines.
        graph_breaks: places where TorchDynamo left the graph.
        graphs: that TorchDynamo captured.
        operators_by_provider: execution provider -> operators.
        heavy_layers: precision -> convolutions and matrix products.
        fallback_operators: operator -> how often PyTorch has to run it.
        failures: why parts of the graph were left to PyTorch.
        warnings: of the engine's builder.
        nodes_by_segment: TorchBlade's own count, constants and lists included.
        refittable_engines: whether the engines' weights can be exchanged, which may be slower.
        recompilations_while_timed: how often it compiled within the timed rounds, and the calls of
            new sizes that follow them.
        resident_warm_mb, resident_end_mb: memory that its process had in use after the warm-up, and
            after the rounds and the calls of new sizes; None on systems without /proc.
    """

    operators: Optional[int] = None
    operators_in_engine: Optional[int] = None
    share_of_flops: Optional[float] = None
    segments: Optional[int] = None
    graph_breaks: Optional[int] = None
    graphs: Optional[int] = None
    operators_by_provider: Optional[Dict[str, int]] = None
    heavy_layers: Optional[Dict[str, int]] = None
    fallback_operators: Optional[Dict[str, int]] = None
    failures: Optional[Tuple[str, ...]] = None
    warnings: Optional[Tuple[str, ...]] = None
    nodes_by_segment: Optional[Tuple[int, ...]] = None
    refittable_engines: Optional[bool] = None
    recompilations_while_timed: Optional[int] = None
    resident_warm_mb: Optional[float] = None
    resident_end_mb: Optional[float] = None

    def merged(self, more: Coverage) -> Coverage:
        """This, with all that the other knows: its fields that are not None take precedence."""
        known = {name: value for name, value in vars(more).items() if value is not None}
        return replace(self, **known)


@dataclass(frozen=True)
class Preparation:
    """Seconds that it took to prepare a run.

    Attributes:
        build: of the eager module, which every run needs.
        export: tracing or scripting; convert; compile: None for phases that the backend has not.
        total: all of these, and what lies between and after them.
    """

    build: float
    total: float
    export: Optional[float] = None
    convert: Optional[float] = None
    compile: Optional[float] = None

    @property
    def own(self) -> float:
        """What this run took beyond what every run has to do."""
        return self.total - self.build


@dataclass(frozen=True)
class Agreement:
    """How well detections agree with the reference's: see `measure.verify`.

    Attributes:
        verdict: `error` where the output is malformed; `too few` where all agrees, but there is
            next to nothing to agree on.
        reason: one sentence: what is wrong or, for a match, what was left out of account.
        expected: detections of the reference.
        matched: of these, how many have a partner that agrees with them.
        lost: how many have none; spurious: detections that the reference does not have.
        exempt: those, of either side, that have no partner and lie so close to the cut that it does
            not count. expected = matched + lost + the reference's share of these.
        box_drift: largest difference of a coordinate, in pixels; score_drift: of scores;
            mask_drift: largest 1 - IoU of masks; keypoint_drift: largest 1 - OKS (object keypoint
            similarity) of keypoints; over pairs that show the same object, whether they agree or
            not. None where there are no such pairs (or no masks, no keypoints).
        bias: median signed difference of x1, y1, x2, y2 over those pairs, in pixels; of rotated
            boxes, of x and y of the center, width, height, and the angle in degrees.
        labels: share of the pixels of a semantic map that have the reference's label, 0 to 1; None
            where there is no map.
        has_objects: False where the detector gives a semantic map and lists nothing.
    """

    verdict: Literal["match", "mismatch", "error", "too few"]
    reason: str = ""
    expected: int = 0
    matched: int = 0
    lost: int = 0
    spurious: int = 0
    exempt: int = 0
    box_drift: Optional[float] = None
    score_drift: Optional[float] = None
    mask_drift: Optional[float] = None
    bias: Optional[Tuple[float, ...]] = None
    keypoint_drift: Optional[float] = None
    labels: Optional[float] = None
    has_objects: bool = True

    @property
    def is_wrong(self) -> bool:
        """Whether it finds something else."""
        return self.verdict in ("mismatch", "error")

    @property
    def text(self) -> str:
        """What the table says: `100/100 match`, `MISMATCH 3/100`, `ERROR`, `1/1 too few to tell`.

        Of a semantic map it is a share, `99.98% match`, and of both, `100/100, 99.98% match`. Where
        detections that should not be there are the greater part of the trouble, their number
        follows: `MISMATCH 100/100 +250`.
        """
        if self.verdict == "error":
            return "ERROR"
        if self.verdict == "match":
            return f"{self.counts} match"
        if self.verdict == "too few":
            return f"{self.counts} too few to tell"
        surplus = f" +{self.spurious}" if self.spurious > self.lost else ""
        return f"MISMATCH {self.counts}{surplus}"

    @property
    def counts(self) -> str:
        """What agrees of what: `99/100`, of a semantic map `99.98%`, which is never rounded up."""
        counts = [f"{self.matched}/{self.expected}"] if self.has_objects else []
        if self.labels is not None:
            counts.append(f"{math.floor(10_000 * self.labels) / 100:.2f}%")
        return ", ".join(counts)


# What average precision is of: boxes, masks or keypoints, in COCO's words.
Task = Literal["bbox", "segm", "keypoints"]
# Whether average precision is kept; `too few`: images to tell.
APVerdict = Literal["keeps", "loses", "too few"]


@dataclass(frozen=True)
class Difference:
    """What average precision differs by from Torch fp32's on the same images, in percent.

    Attributes:
        value: AP less that of Torch fp32; low, high: of its 95% interval from resamples of images.
        ratio: AP over that of Torch fp32; ratio_low, ratio_high: the same of it.
        verdict: whether the ratio keeps to `--min-ap-ratio`.
        images_needed: about how many would tell; None where it was told, or where that is more than
            anyone has.
        classes: class -> its AP less that of Torch fp32; None where there is no object of it to be
            found.
    """

    value: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    verdict: APVerdict
    images_needed: Optional[int] = None
    classes: Dict[str, Optional[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's figures of one task, in percent; None where there is no object to be found.

    Attributes:
        ap: mean over IoU from 0.5 to 0.95 in steps of 0.05, and over the classes.
        ap50, ap75: at one IoU.
        small, medium, large: of objects up to 32 x 32 pixels, up to 96 x 96, and above.
        classes: class -> its `ap`.
        difference: None for the reference itself.
    """

    ap: Optional[float]
    ap50: Optional[float] = None
    ap75: Optional[float] = None
    small: Optional[float] = None
    medium: Optional[float] = None
    large: Optional[float] = None
    classes: Dict[str, Optional[float]] = field(default_factory=dict)
    difference: Optional[Difference] = None


@dataclass(frozen=True)
class WorstImage:
    """An image of a data set in which a run finds something else than Torch fp32.

    Attributes:
        image: name of its file in the data set.
        picture: its key in `detections.json`.
        loss: what they are ordered by: see `measure.worst.Difference`.
        lost: detections of the reference without a partner of their class; spurious: of the run.
        classes: detections that show an object of the reference as one of another class.
        score_difference: mean, without sign, and iou: mean, of pairs that show the same object;
            None: there are none.
        mask_iou: mean IoU of their masks; oks: mean OKS (object keypoint similarity) of their
            keypoints; None: there are none.
    """

    image: str
    picture: str
    loss: float
    lost: int
    spurious: int
    classes: int
    score_difference: Optional[float] = None
    iou: Optional[float] = None
    mask_iou: Optional[float] = None
    oks: Optional[float] = None


@dataclass(frozen=True)
class Accuracy:
    """What a run found in a data set.

    Attributes:
        images: that it was called with.
        detections: in all of them.
        tasks: what was judged.
        seconds: that it took, images read included.
        file: name of the file with the detections in COCO's format of results.
        worst: of a run that mismatches or has less AP, see `has_less`, the images that differ most,
            if they were kept.
        not_drawn: why `worst` has none, or not all, in a sentence; else None.
        reason: why nothing was judged, or not all, in a sentence; else None.
    """

    images: int = 0
    detections: int = 0
    tasks: Dict[Task, AveragePrecision] = field(default_factory=dict)
    seconds: float = 0.0
    file: Optional[str] = None
    worst: Tuple[WorstImage, ...] = ()
    reason: Optional[str] = None
    not_drawn: Optional[str] = None

    @property
    def verdict(self) -> Optional[APVerdict]:
        """Of all tasks, the worst; None where nothing was compared."""
        verdicts = [x.difference.verdict for x in self.tasks.values() if x.difference]
        order: Tuple[APVerdict, ...] = ("loses", "too few", "keeps")
        return next((verdict for verdict in order if verdict in verdicts), None)

    @property
    def has_less(self) -> bool:
        """Whether AP is lost or, with too few images to tell that, is less for sure."""
        known = [x.difference for x in self.tasks.values() if x.difference]
        return any(x.verdict == "loses" or (x.verdict == "too few" and x.high < 0) for x in known)

    @property
    def ratio(self) -> Optional[float]:
        """Of all tasks, the smallest share of the reference's AP; None where there is none."""
        return min((x.difference.ratio for x in self.tasks.values() if x.difference), default=None)


@dataclass(frozen=True)
class Evaluated:
    """The images of a data set that the runs of a group were called with.

    Attributes:
        images: how many; of them, `objects` are annotated.
        left_out: what others are -> how many these are, and the names of the first three.
        not_judged: task -> why it was not, in a sentence.
    """

    images: int
    objects: int
    left_out: Dict[str, Tuple[int, Tuple[str, ...]]] = field(default_factory=dict)
    not_judged: Dict[Task, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """The images that int8 took the ranges of activations from.

    Attributes:
        images: how many.
        source: name of their folder or annotations; None: they were made of the timed image.
        left_out: why some were not taken -> how many these are, and the names of the first three.
        is_evaluated: whether runs are evaluated on the timed image, which they were made of.
        not_judged: why what int8 costs in AP was not judged on them, although they are annotated.
    """

    images: int
    source: Optional[str] = None
    left_out: Dict[str, Tuple[int, Tuple[str, ...]]] = field(default_factory=dict)
    is_evaluated: bool = False
    not_judged: Optional[str] = None


@dataclass(frozen=True)
class AccuracyControl:
    """Layers that an int8 run has in fp32, as they cost too much of the AP.

    It was judged on the images that int8 is calibrated on.

    Attributes:
        reference: AP of Torch fp32 there, in percent.
        least_ratio: the share of it that is to be kept.
        before, after: the share that is kept with all layers in int8, and with some in fp32; of the
            task that keeps the least.
        kept: names of those in fp32; empty: int8 keeps the AP, or nothing helps.
        layers: how many there are in int8 otherwise.
    """

    reference: Dict[Task, float]
    least_ratio: float
    before: float
    after: float
    kept: Tuple[str, ...]
    layers: int


# Of what kind a part of a detector is.
PartKind = Literal["backbone", "FPN", "heads", "decoding", "NMS", "postprocessing"]


@dataclass(frozen=True)
class PartDifference:
    """How far what leaves a part of an engine is from the reference: see `measure.bisection`.

    Attributes:
        name: of the part: `FPN`, `RPN head`; kind: what sort of part it is.
        difference: from what eager fp32 makes of what the engine's own parts before it gave. Of
            tensors it is a share of their standard deviation; of lists of boxes, a mean of 0 to 1.
            None: there is no comparing, as there are values that are no numbers, or another shape.
        bound: what is tolerated, about twice what healthy engines need.
        accumulated: from what eager fp32 gives from the images on; None where there is no telling.
    """

    name: str
    kind: PartKind
    difference: Optional[float]
    bound: float
    accumulated: Optional[float] = None

    @property
    def is_beyond(self) -> bool:
        """Whether a healthy engine would not differ so much."""
        return self.difference is None or self.difference > self.bound


@dataclass(frozen=True)
class Bisection:
    """Where an engine that went wrong first leaves Torch fp32.

    Attributes:
        image: that it was looked for in: an input, such as `opt`, or a file of the data set.
        parts: in the order in which they are computed, as far as they could be.
        vanished: whether the engine finds what Torch fp32 finds while its parts are watched.
        reason: why its parts could not be watched, in a sentence; else None.
    """

    image: Optional[str] = None
    parts: Tuple[PartDifference, ...] = ()
    vanished: bool = False
    reason: Optional[str] = None

    @property
    def first(self) -> Optional[PartDifference]:
        """The first part that is beyond its bound; None: there is none."""
        return next((part for part in self.parts if part.is_beyond), None)


@dataclass(frozen=True)
class Copies:
    """Seconds of a call on a GPU that it copied, by its own clock.

    Attributes:
        upload_s: images from pinned host memory.
        download_s: detections to pinned host memory. Where the GPU waits for the host between two
            tensors, that counts, too.
    """

    upload_s: float
    download_s: float


@dataclass(frozen=True)
class Run:
    """One test model, backend and precision, measured.

    Attributes:
        backend: name, as on the command line.
        environment: name of the environment that its workers ran in, as in `openvino@old`; None for
            the suite's own, and for one that was given without a name.
        label: what the table calls it.
        baseline: whether the others' speedups are relative to this run.
        effective_precision: that it computed in, read back from the engine where it tells; None if
            it never came to run. Where fp32 was asked for, `tf32` on a GPU that rounds to it.
        provider: what executed it, as the engine names it.
        threads: CPU threads of the engine.
        reason: one sentence; None where the status is `ok`.
        samples_s: of every timed call: sample i was taken in round i, so that equal positions in
            two runs are neighbours in time. A run that failed has those from before.
        warmup_s: of the calls before, which are not counted. Nor are those that a turn of short
            calls begins with, which nobody keeps.
        copies: what of `samples_s` went into copies, medians; None on a CPU.
        size_seconds: input that is not timed (`min`, `max`) -> seconds of calls that the check of
            detections made, not in turns with other runs: two after one that is not counted. Where
            that took more than a second, it is one, if a timed call takes less than half of it
            for as many pixels, else the first alone.
        first_call_s: the same inputs -> seconds of the first call there.
        new_size_s: of calls after the rounds, each of a size that was never seen before: call i is
            of size i of the group's `new_sizes`, made in turns with the other runs. No speedup is
            made of them.
        new_size_resident_mb: memory that its process had in use after each of these calls; empty
            on systems without /proc.
        prepare: None where it was not prepared.
        cached: whether the compiled engine came from `--cache`.
        artifact_mb: size of what was compiled, as one would deploy it.
        peak_memory_mb, peak_device_memory_mb: of its process: resident, and allocated on a GPU.
        speedup: over the baseline; None for the baseline itself, and without samples.
        speedup_over_fp32: over Torch at fp32 in the same rounds; None in groups at fp32.
        speedup_over_own_torch: over Torch of the run's own environment, where that took part.
        break_even: images after which the time to prepare, beyond the baseline's, has paid back.
        detections: input -> agreement with eager fp32 on the same images; None for the reference
            itself, and where nothing came out.
        python, versions: of the environment that it ran in, what its backend stands on.
        artifacts: names of files that were kept beside the result file.
        settled: whether its process stood still after its calls, before the next had its turn.
        accuracy: what it found in a data set; None where none was given.
        control: at int8, which layers stay in fp32; None where that was not judged.
        bisection: with `--bisect`, of a run that mismatches or loses AP: the part that goes wrong;
            else None.
    """

    backend: str
    label: str
    baseline: bool
    requested_precision: Precision
    status: Status
    environment: Optional[str] = None
    effective_precision: Optional[EffectivePrecision] = None
    provider: Optional[str] = None
    threads: Optional[int] = None
    reason: Optional[str] = None
    samples_s: Tuple[float, ...] = ()
    warmup_s: Tuple[float, ...] = ()
    copies: Optional[Copies] = None
    size_seconds: Dict[str, Tuple[float, ...]] = field(default_factory=dict)
    first_call_s: Dict[str, float] = field(default_factory=dict)
    new_size_s: Tuple[float, ...] = ()
    new_size_resident_mb: Tuple[float, ...] = ()
    prepare: Optional[Preparation] = None
    cached: bool = False
    artifact_mb: Optional[float] = None
    peak_memory_mb: Optional[float] = None
    peak_device_memory_mb: Optional[float] = None
    statistics: Optional[Statistics] = None
    speedup: Optional[Speedup] = None
    speedup_over_fp32: Optional[Speedup] = None
    speedup_over_own_torch: Optional[Speedup] = None
    break_even: Optional[BreakEven] = None
    detections: Optional[Dict[str, Agreement]] = None
    coverage: Coverage = field(default_factory=Coverage)
    python: Optional[str] = None
    versions: Dict[str, str] = field(default_factory=dict)
    artifacts: Tuple[str, ...] = ()
    settled: bool = True
    accuracy: Optional[Accuracy] = None
    control: Optional[AccuracyControl] = None
    bisection: Optional[Bisection] = None

    @property
    def name(self) -> str:
        """As the command line has it: `openvino`, `openvino@old`."""
        return self.backend if self.environment is None else f"{self.backend}@{self.environment}"


@dataclass(frozen=True)
class Stages:
    """Median seconds of each stage of the eager module, exclusive of the others.

    Attributes:
        postprocessing: what comes after the last of the parts: decoding, fitting boxes to the
            image, pasting masks into it.
        rest: what comes before them: normalising, padding.
    """

    backbone: float = 0.0
    proposals: float = 0.0
    head: float = 0.0
    roi_heads: float = 0.0
    nms: float = 0.0
    postprocessing: float = 0.0
    rest: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What else the machine did within the timed rounds.

    Attributes:
        steal_share, others_share: of its cores, taken by a hypervisor and by other processes, 0 to
            1.
        thermal_throttles: how often cores were slowed down for their temperature.
        quota_periods, quota_stops: periods of a container's CPU quota, and in how many of them it
            stopped the processes; 0 where there is none.
    """

    steal_share: float = 0.0
    others_share: float = 0.0
    thermal_throttles: int = 0
    quota_periods: int = 0
    quota_stops: int = 0


@dataclass(frozen=True)
class GpuState:
    """The GPU at one moment, as NVML tells; None for what it does not.

    Attributes:
        throttled: what holds the clocks back.
    """

    name: Optional[str] = None
    driver: Optional[str] = None
    memory_mb: Optional[int] = None
    max_sm_clock_mhz: Optional[int] = None
    sm_clock_mhz: Optional[int] = None
    memory_clock_mhz: Optional[int] = None
    temperature_c: Optional[int] = None
    throttled: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The runs of one test model at one precision, measured in turns with each other.

    With several `--image` a turn of a run is a call for each of them. A group with `image` None has
    the mean of these calls as a sample, and says all that is not of one image. A group for each
    image follows, of the same rounds, in which a sample is the call for that image.

    Attributes:
        model: test model, or model of the user's own.
        new_sizes: height and width in pixels of the images of the calls of new sizes, in order.
        no_new_sizes: why there are none, in a sentence, if it was not asked for; else None.
        export: how it was exported; of a file that was exported elsewhere, what it is.
        image: with several, the file name of the one that the group is about; None for all of them
            together, and where there is but one.
        objects: that synthetic weights were made to find.
        found: detections of the reference at `opt`, of all images of the call; None where the
            detector gives a semantic map and lists nothing.
        image_sizes: of every input; timed is `opt`, and `image 2` and so on. `drawn 1` and
            `drawn 2` are of sizes between those of `min` and `max`. `blank` is a picture in which
            nothing is found, if there was one.
        flops: of a call at `opt`: two for each multiply-add of a convolution or matrix product, as
            `torch.utils.flop_counter` counts them.
        image_digest: tells the timed images from others: 16 hexadecimal digits.
        rounds: complete ones.
        generations: of these, how many were made in each; between two of them all processes were
            started anew. Empty: one, in a file of before.
        half_width: the share to which speedups were to be known for the rounds to end.
        budget_s: seconds of timed rounds after which they end; None: no limit.
        gpu: before and after the rounds.
        fp32_samples_s: of Torch at fp32, which took part in the rounds of a lower precision.
        not_compared: names of what the detector gives besides, and nobody knows how to compare.
        evaluated: the images of a data set; None where none was given.
        calibrated: at int8, the images that ranges were taken from.
        runs: the baseline first.
    """

    model: str
    export: Literal["traced", "scripted", "torchscript", "exported", "compiled", "onnx"]
    precision: Precision
    images_per_call: int
    image_sizes: ImageSizes
    rounds: int
    stopped: Stopped
    runs: Tuple[Run, ...]
    generations: Tuple[int, ...] = ()
    image: Optional[str] = None
    objects: int = 100
    found: Optional[int] = None
    flops: Optional[int] = None
    image_digest: Optional[str] = None
    weights: Optional[Weights] = None
    half_width: Optional[float] = None
    budget_s: Optional[float] = None
    stages: Optional[Stages] = None
    machine: Optional[Machine] = None
    gpu: Tuple[GpuState, ...] = ()
    fp32_samples_s: Tuple[float, ...] = ()
    not_compared: Tuple[str, ...] = ()
    evaluated: Optional[Evaluated] = None
    calibrated: Optional[Calibrated] = None
    new_sizes: Tuple[Tuple[int, int], ...] = ()
    no_new_sizes: Optional[str] = None

    @property
    def baseline(self) -> Run:
        """The run that the others' speedups are relative to."""
        return next(run for run in self.runs if run.baseline)


# Why a run is not shipped: it was not measured, finds something else, or breaks a constraint.
Exclusion = Literal["failed", "mismatch", "ap", "latency", "memory", "prepare"]


@dataclass(frozen=True)
class Constraints:
    """What a run that one ships has to keep to; None: whatever it is.

    Attributes:
        max_latency_ms: of the median call.
        min_ap_ratio: share of Torch fp32's average precision, where that was looked at.
        max_memory_mb: peak of its process, or on a GPU what it allocates there.
        max_prepare_s: to prepare it, building the model included.
    """

    max_latency_ms: Optional[float] = None
    min_ap_ratio: float = 0.99
    max_memory_mb: Optional[float] = None
    max_prepare_s: Optional[float] = None


@dataclass(frozen=True)
class Candidate:
    """A run that one could ship.

    Attributes:
        run: as the command line has it: `openvino`, `openvino@old`.
        label: what the table calls it.
        precision: requested.
        median_ms: of a call; None where it was not timed.
        speedup: over Torch fp32 in the same rounds; None for Torch fp32 itself.
        ap: task -> AP in percent; ap_differences: task -> from Torch fp32.
        memory_mb, prepare_s: see `Constraints`.
        new_size_ms: median of its calls of new sizes; None where there are none.
        pays_back: images after which its preparation has paid back, against Torch fp32.
        packages: that it needs beside PyTorch's.
        excluded: why it does not qualify; empty: it does.
    """

    run: str
    label: str
    precision: Precision
    median_ms: Optional[float] = None
    speedup: Optional[Speedup] = None
    ap: Dict[Task, float] = field(default_factory=dict)
    ap_differences: Dict[Task, Difference] = field(default_factory=dict)
    memory_mb: Optional[float] = None
    prepare_s: Optional[float] = None
    new_size_ms: Optional[float] = None
    pays_back: Optional[BreakEven] = None
    packages: int = 0
    excluded: Tuple[Exclusion, ...] = ()

    @property
    def name(self) -> str:
        """As sentences have it: `OpenVINO bf16`."""
        return f"{self.label} {self.precision}"

    @property
    def ratio(self) -> float:
        """How many times as fast as Torch fp32; 0 where that is not known."""
        if self.median_ms is None:
            return 0.0
        return self.speedup.ratio if self.speedup else 1.0


@dataclass(frozen=True)
class Recommendation:
    """Which run of a model to ship, and why.

    Attributes:
        model: test model, or model of the user's own, and what it was measured on.
        constraints: that were given.
        ship: None: no run qualifies.
        runner_up: the next that qualifies, if there is one.
        is_tie: whether `ship` is the simpler one of some that cannot be told apart.
        others: all other runs, the fastest first.
        resolution: the difference of speed that is taken for noise, as a share.
        images: of the data set that AP was looked at on; None: it was not looked at.
        is_synthetic: whether the weights were made up.
        baseline: what the speedups are over: Torch fp32, or what runs a file of the user's.
    """

    model: str
    constraints: Constraints
    baseline: str = "Torch fp32"
    ship: Optional[Candidate] = None
    runner_up: Optional[Candidate] = None
    is_tie: bool = False
    others: Tuple[Candidate, ...] = ()
    resolution: float = 0.03
    images: Optional[int] = None
    is_synthetic: bool = False


@dataclass(frozen=True)
class SameAgainstSame:
    """A/A: Torch against itself in two processes, timed like any two runs.

    Attributes:
        resolution: how far the interval strays from 1, as a share: a smaller difference cannot be
            told from noise. None with too few rounds.
        samples_s: of the two processes; generations: how many of them in each.
    """

    model: str
    precision: Precision
    speedup: Speedup
    resolution: Optional[float]
    samples_s: Tuple[Tuple[float, ...], Tuple[float, ...]]
    generations: Tuple[int, ...] = ()


@dataclass(frozen=True)
class Results:
    """A result file.

    Attributes:
        version: of the suite.
        groups: in the order in which they were measured.
        aa: None where it was not measured.
        peaks: with `--roofline`: effective precision -> operations per second of PyTorch's matrix
            products.
        left_out: label -> why a backend that is measured by default was left out.
        without: precision -> labels of the backends that do not compute in it.
        recommendations: for each model, which run to ship.
        warnings: why to be careful; nothing is dropped for them.
        complete: whether everything that was asked for was measured.
    """

    version: str
    environment: Environment
    settings: Settings
    groups: Tuple[Group, ...] = ()
    aa: Optional[SameAgainstSame] = None
    peaks: Dict[str, float] = field(default_factory=dict)
    left_out: Dict[str, str] = field(default_factory=dict)
    without: Dict[str, Tuple[str, ...]] = field(default_factory=dict)
    recommendations: Tuple[Recommendation, ...] = ()
    warnings: Tuple[str, ...] = ()
    complete: bool = False
    tool: str = TOOL
    schema: int = SCHEMA


@dataclass(frozen=True)
class Drawn:
    """What was found in one image, for drawing it.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels; what a rotated box lies in.
        scores: of proposals, logits.
        classes: -1 for proposals, which have none.
        corners: of rotated boxes: x and y of the four, one after the other; else empty.
        keypoints: x and y of each keypoint of each detection; empty where there are none.
        labels: a semantic map: a PNG file with a color for each label, as Base64.
        masks: the outlines of each mask, several where it has holes or parts: x and y of the
            corners, one after the other; empty where there are no masks. Where there are too many
            corners to draw, the last masks have no outlines; one that is noise has none.
    """

    boxes: Tuple[Tuple[float, float, float, float], ...]
    scores: Tuple[float, ...]
    classes: Tuple[int, ...]
    corners: Tuple[Tuple[float, ...], ...] = ()
    keypoints: Tuple[Tuple[Tuple[float, float], ...], ...] = ()
    labels: Optional[str] = None
    masks: Tuple[Tuple[Tuple[float, ...], ...], ...] = ()


@dataclass(frozen=True)
class DrawnRun(Drawn):
    """What a run found in one image.

    Attributes:
        agrees: for each detection, whether it has a partner in the reference.
        lost: indices of the reference's detections that have none.
    """

    agrees: Tuple[bool, ...] = ()
    lost: Tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """An entry of `detections.json`: what was found in the images of a call at the timed size.

    Attributes:
        image: name of the file, beside the result file.
        reference: for each image of the call, what Torch fp32 found.
        runs: requested precision -> label of a run -> what it found in each image.
        size: height and width of the image, whose pixels boxes are in; None: those it was timed at.
    """

    image: str
    reference: Tuple[Drawn, ...]
    runs: Dict[str, Dict[str, Tuple[DrawnRun, ...]]] = field(default_factory=dict)
    size: Optional[Tuple[int, int]] = None
