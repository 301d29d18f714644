"""The parent's side of a data set: each run is called with its images, and what it finds is judged.

Nothing is timed meanwhile. What was found is kept image by image, so that an evaluation that was
interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from benchmark import RunFailed
from detectors.inputs import View
from errors import InputError
from measure import protocol
from measure.accuracy import LEAST_IMAGES
from measure.calibration import Calibration
from measure.coco_results import kept_images
from measure.dataset import OTHER_SIZE, Dataset, Picture
from measure.plan import Plan
from measure.progress import Progress
from measure.worker import CALL_LIMIT_S, Command, Hosts, Worker
from models import Model
from results.file import write_text
from results.record import Accuracy, Evaluated, Task, WorstImage
from results.record import Picture as DrawnPicture

# Images that are handed on at once: their pixels, as the detector sees them, and how many.
BATCH_PIXELS, BATCH_IMAGES = 4 << 20, 32
# Pixels of the longer side of an image that is kept for the page, at most.
LONGEST_SIDE = 480
# Seconds for judging what was found.
JUDGE_LIMIT_S = 3600.0
# COCO's keypoints of a person, for which it has sigmas.
COCO_KEYPOINTS = 17

# The folder in `--output` that has what was found, until all is measured.
EVALUATED = "evaluated"

A = TypeVar("A")

# What is judged where a detector gives it.
TASKS: tuple[tuple[Task, str], ...] = (
    ("bbox", "pred_boxes"),
    ("segm", "pred_masks"),
    ("keypoints", "pred_keypoints"),
)


def tasks_of(
    dataset: Dataset, fields: Sequence[str], oks_sigmas: Sequence[float]
) -> tuple[tuple[Task, ...], dict[Task, str]]:
    """What can be judged of what a detector gives, and why the rest cannot.

    Args:
        fields: names of the tensors of an image.
        oks_sigmas: of the detector's configuration.
    """
    given = [task for task, field in TASKS if field in fields]
    reasons: dict[Task, str] = {}
    if "segm" in given and not dataset.has_masks:
        reasons["segm"] = f"{dataset.name} has objects without masks"
    if "keypoints" in given:
        if not dataset.keypoints:
            reasons["keypoints"] = f"{dataset.name} has no keypoints"
        elif len(oks_sigmas or range(COCO_KEYPOINTS)) != dataset.keypoints:
            reasons["keypoints"] = (
                f"{dataset.name} has {dataset.keypoints} keypoints, and the configuration has no "
                "TEST.KEYPOINT_OKS_SIGMAS for them"
            )
    return tuple(task for task in given if task not in reasons), reasons


def check_model(dataset: Dataset, model: Model, fields: Sequence[str], weights: str) -> None:
    """Makes sure that what a model finds can be judged.

    Args:
        fields: names of the tensors of an image.
        weights: where they come from, see `results.record.Weights`.

    Raises:
        errors.InputError: it cannot.
    """
    if "pred_boxes" not in fields:
        raise InputError(f"--dataset judges detections, and {model.name} gives {', '.join(fields)}")
    if weights == "synthetic":
        raise InputError(
            f"{model.name} has synthetic weights, which find nothing in a data set: --weights FILE"
        )


def validation_of(
    calibration: Calibration,
    model: Model,
    fields: Sequence[str],
    weights: str,
    least_ratio: float,
) -> protocol.Validate | str | None:
    """How int8 is judged while it is made, or why it cannot be; None: nothing is annotated.

    Args:
        fields: names of the tensors of an image.
        weights: where they come from, see `results.record.Weights`.
        least_ratio: the share of the AP that is to be kept.
    """
    annotated = calibration.annotated
    if annotated is None:
        return None
    if weights == "synthetic":
        return "synthetic weights find nothing"
    if model.classes not in (None, len(annotated.classes)):
        return f"{len(annotated.classes)} categories, and {model.name} tells {model.classes} apart"
    if len(annotated.images) < LEAST_IMAGES:
        return f"{len(annotated.images)} images are too few"
    tasks, _ = tasks_of(annotated, fields, model.oks_sigmas)
    if not tasks:
        return f"{model.name} gives {', '.join(fields)}"
    return protocol.Validate(
        truth=str(calibration.truth),
        images=tuple(map(_as_asked, annotated.images)),
        category_ids=annotated.category_ids,
        tasks=tasks,
        oks_sigmas=model.oks_sigmas,
        least_ratio=least_ratio,
    )


class NotJudged(Exception):
    """What a run found could not be judged, which is not the run's fault; the message says why."""


def _as_asked(picture: Picture) -> protocol.DatasetImage:
    return protocol.DatasetImage(picture.id, str(picture.path), picture.size)


class Evaluator:
    """Evaluates the runs of a model on a data set.

    Args:
        sizes: height and width of `min` and `max`, which engines are made for.
        fields: names of the tensors of an image.
        weights: their digest.
        scratch: folder for what is handed on.
        kept: folder for what was found, perhaps by an earlier invocation.

    Raises:
        errors.InputError: there is no image that engines are made for.
    """

    def __init__(
        self,
        dataset: Dataset,
        model: Model,
        view: View,
        sizes: tuple[Sequence[int], Sequence[int]],
        fields: Sequence[str],
        weights: str | None,
        plan: Plan,
        scratch: Path,
        kept: Path,
        progress: Progress,
    ) -> None:
        self.dataset, self.model, self.view, self.fields = dataset, model, view, tuple(fields)
        self.weights, self.plan, self.progress = weights, plan, progress
        self.scratch, self.kept = scratch, kept
        self.oks_sigmas = model.oks_sigmas
        self.tasks, self.not_judged = tasks_of(dataset, fields, self.oks_sigmas)
        self.left_out: dict[int, str] = {}
        for picture in dataset.images:
            own = view.resized(picture.size)
            if not all(a <= b <= c for a, b, c in zip(sizes[0], own, sizes[1])):
                self.left_out[picture.id] = OTHER_SIZE
        if len(self.left_out) == len(dataset.images):
            least, most = ("x".join(map(str, size)) for size in sizes)
            raise InputError(
                f"no image of {dataset.name} fits: engines are made for {least} to {most}"
            )
        # What Torch fp32 has, once it was evaluated.
        self.reference: Accuracy | None = None
        self._reference_kept: Path | None = None
        # Why something could not be kept.
        self.failures: list[str] = []
        # Key in `detections.json` -> an image that is worth a look.
        self.pictures: dict[str, DrawnPicture] = {}

    # Images ----------------------------------------------------------------------------------

    def batches(self, done: set[int]) -> Iterator[list[Picture]]:
        """The images that are still to be seen, a handful at a time."""
        batch: list[Picture] = []
        pixels = 0
        for picture in self.dataset.images:
            if picture.id in self.left_out or picture.id in done:
                continue
            height, width = self.view.resized(picture.size)
            if batch and (len(batch) == BATCH_IMAGES or pixels + height * width > BATCH_PIXELS):
                yield batch
                batch, pixels = [], 0
            batch.append(picture)
            pixels += height * width
        if batch:
            yield batch

    def evaluated(self) -> Evaluated:
        """The record of the images."""
        names = {picture.id: picture.name for picture in self.dataset.images}
        reasons = dict.fromkeys(self.left_out.values())
        left_out = {
            reason: [names[each] for each, why in self.left_out.items() if why == reason]
            for reason in reasons
        }
        taken = set(names) - set(self.left_out)
        return Evaluated(
            images=len(taken),
            objects=sum(
                1 for x in self.dataset.annotations if x["image_id"] in taken and not x["iscrowd"]
            ),
            left_out={reason: (len(each), tuple(each[:3])) for reason, each in left_out.items()},
            not_judged=self.not_judged,
        )

    # A run -----------------------------------------------------------------------------------

    def evaluate(self, run: Worker, hosts: Hosts, name: str, facts: protocol.RunFacts) -> Accuracy:
        """Calls a run with the images, and judges what it finds; the first is the reference.

        Args:
            name: of the run, which names its files.
            facts: what is known of it: its detections depend on it.

        Raises:
            benchmark.RunFailed, errors.Unsupported, errors.InputError: the run fails with one of
                the images, or does not find what can be judged.
            NotJudged: something else failed: the evaluator, or a disk that is full.
        """
        try:
            return self._evaluate(run, hosts, name, facts)
        except OSError as error:
            raise NotJudged(error.strerror or str(error)) from None

    def _evaluate(self, run: Worker, hosts: Hosts, name: str, facts: protocol.RunFacts) -> Accuracy:
        start = time.monotonic()
        self.kept.mkdir(parents=True, exist_ok=True)
        kept = self.kept / f"{name}.jsonl"
        truth = self.scratch / "truth.json"
        log = self.scratch / "evaluator.log"
        with hosts.of(Command.own()).worker(log, self.plan.threads) as evaluator:
            self._detect(run, evaluator, kept, name, facts)
            self.dataset.write(self._seen(), truth)
            request = protocol.Judge(
                truth=str(truth),
                kept=str(kept),
                tasks=self.tasks,
                classes=self.dataset.classes,
                oks_sigmas=self.oks_sigmas,
                resamples=str(self.scratch / "resamples.npz"),
                is_reference=self.reference is None,
                least_ratio=self.plan.min_ap_ratio,
                seed=self.plan.seed,
            )
            judged = _ask(evaluator, request, JUDGE_LIMIT_S)
        accuracy = Accuracy(
            images=len(self._seen()),
            detections=judged.detections,
            tasks=judged.tasks,
            seconds=time.monotonic() - start,
            file=self._write_results(name, kept),
        )
        if self.reference is None:
            self.reference, self._reference_kept = accuracy, kept
        return accuracy

    def with_worst(
        self, accuracy: Accuracy, hosts: Hosts, name: str, label: str, precision: str
    ) -> Accuracy:
        """The same with the images in which a run differs most; they are kept for the page.

        Args:
            accuracy: of the run.
            name: of the run, as `evaluate` had it.
            label, precision: of the run, for the page.
        """
        output = self.plan.output
        if output is None or self._reference_kept is None:
            return accuracy
        worst: list[WorstImage] = []
        reasons: list[str] = []
        try:
            log = self.scratch / "evaluator.log"
            with hosts.of(Command.own()).worker(log, self.plan.threads) as evaluator:
                for image in evaluator.ask(self._find_worst(name), JUDGE_LIMIT_S).images:
                    try:
                        worst.append(self._kept_image(image, evaluator, output, label, precision))
                    except InputError as error:
                        reasons.append(str(error))
        except (RunFailed, InputError, OSError) as error:
            reasons.append(str(error))
        for reason in reasons:
            self.progress.say(f"{label} {precision}: an image in which it differs: {reason}")
        return replace(accuracy, worst=tuple(worst), not_drawn=reasons[0] if reasons else None)

    def _find_worst(self, name: str) -> protocol.FindWorst:
        files = str(self._reference_kept), str(self.kept / f"{name}.jsonl")
        return protocol.FindWorst(*files, self.dataset.category_ids, self.oks_sigmas)

    def _kept_image(
        self,
        image: protocol.ComparedImage,
        evaluator: Worker,
        output: Path,
        label: str,
        precision: str,
    ) -> WorstImage:
        """Keeps an image for the page, with what was found in it.

        Raises:
            benchmark.RunFailed: the evaluator fails, or dies.
            errors.InputError: the image cannot be read, or its copy not written.
        """
        picture = next(x for x in self.dataset.images if x.id == image.id)
        key, file = f"{self.model.name}: image {image.id}", f"dataset-{image.id}.jpg"
        copy = str((output / file).resolve())
        evaluator.ask(protocol.KeepCopy(str(picture.path), copy, LONGEST_SIDE))
        if key not in self.pictures:
            self.pictures[key] = DrawnPicture(file, (image.reference,), {}, picture.size)
        self.pictures[key].runs.setdefault(precision, {})[label] = (image.own,)
        return WorstImage(
            image=picture.name,
            picture=key,
            loss=image.loss,
            lost=image.lost,
            spurious=image.spurious,
            classes=image.classes,
            score_difference=image.score_difference,
            iou=image.iou,
            mask_iou=image.mask_iou,
            oks=image.oks,
        )

    def read_worst(self, hosts: Hosts, name: str) -> tuple[str, str] | None:
        """The image in which a run differs most from the reference.

        Args:
            name: of the run, as `evaluate` had it.

        Returns:
            its name, and a file that has it as the detector sees it; None where none differs.

        Raises:
            errors.InputError: it cannot be read any more.
            NotJudged: the process that reads it fails.
        """
        if self._reference_kept is None:
            return None
        file = str(self.scratch / "worst.npz")
        log = self.scratch / "evaluator.log"
        with hosts.of(Command.own()).worker(log, self.plan.threads) as reader:
            found = _ask(reader, self._find_worst(name), JUDGE_LIMIT_S).images
            if not found:
                return None
            picture = next(x for x in self.dataset.images if x.id == found[0].id)
            asked = protocol.ReadBatch((_as_asked(picture),), self.view, file)
            left_out = _ask(reader, asked).left_out
        if left_out:
            raise InputError(f"{picture.name}: {next(iter(left_out.values()))}")
        return picture.name, file

    def _seen(self) -> list[int]:
        return [x.id for x in self.dataset.images if x.id not in self.left_out]

    def _detect(
        self, run: Worker, evaluator: Worker, kept: Path, name: str, facts: protocol.RunFacts
    ) -> None:
        """Calls the run with all images that it has not seen yet."""
        done = self._resume(kept, facts)
        images, found = str(self.scratch / "images.npz"), str(self.scratch / "found.npz")
        after = f", after {len(done)} from before" if done else ""
        title = f"{name}: evaluating{after}"
        total = len(self._seen())
        with self.progress.counting(title, total, len(done), "image") as advance:
            for batch in self.batches(done):
                asked = tuple(_as_asked(picture) for picture in batch)
                left_out = _ask(evaluator, protocol.ReadBatch(asked, self.view, images)).left_out
                for image_id, reason in left_out.items():
                    self._leave_out(int(image_id), reason)
                asked = tuple(x for x in asked if str(x.id) not in left_out)
                if asked:
                    limit_s = CALL_LIMIT_S * len(asked)
                    run.ask(protocol.DetectBatch(images, found), limit_s)
                    request = protocol.KeepBatch(
                        found, asked, self.fields, self.dataset.category_ids, str(kept)
                    )
                    _ask(evaluator, request)
                advance(len(batch))
        for path in (images, found):
            Path(path).unlink(missing_ok=True)

    def _leave_out(self, image_id: int, reason: str) -> None:
        self.left_out[image_id] = reason
        name = next(x.name for x in self.dataset.images if x.id == image_id)
        self.progress.say(f"{self.dataset.name}: {name} is left out: {reason}")

    def _resume(self, kept: Path, facts: protocol.RunFacts) -> set[int]:
        """The images of which there is what was found; what is of another run is removed."""
        stamp = kept.with_suffix(".stamp")
        calibration = self.plan.calibration and self.plan.calibration.digest
        control = facts.control and (facts.control.least_ratio, facts.control.kept)
        run = (facts.precision, facts.provider, facts.python, facts.versions, calibration, control)
        images = [(x.id, x.path.stat().st_mtime_ns) for x in self.dataset.images]
        data = (self.dataset.digest, images)
        decisive = (data, self.model, self.view, self.fields, self.weights, run)
        digest = hashlib.sha256(repr(decisive).encode()).hexdigest()
        if not kept.exists() or not stamp.exists() or stamp.read_text() != digest:
            kept.write_text("")
            stamp.write_text(digest)
            return set()
        # A last line that was cut off goes.
        whole = list(kept_images(kept))
        kept.write_text("".join(json.dumps(each) + "\n" for each in whole))
        return {image_id for image_id, _ in whole}

    def _write_results(self, name: str, kept: Path) -> str | None:
        """Writes detections in COCO's format of results; returns the name of the file."""
        if self.plan.output is None:
            return None
        file = f"{name}.coco.json"
        found = [x for _, results in kept_images(kept) for x in results]
        try:
            write_text(self.plan.output / file, json.dumps(found))
        except InputError as error:
            self.progress.say(str(error))
            self.failures.append(str(error))
            return None
        return file


def _ask(evaluator: Worker, request: protocol.Request[A], limit_s: float = CALL_LIMIT_S) -> A:
    """The evaluator's answer.

    Raises:
        errors.InputError: what was found cannot be judged.
        NotJudged: the evaluator fails, or dies.
    """
    try:
        return evaluator.ask(request, limit_s)
    except RunFailed as error:
        raise NotJudged(f"what was found could not be judged: {error}") from None
