#!/usr/bin/env python3
"""Which configurations of Detectron2's model zoo work, and with which engines?

Each file of the zoo has a process of its own. It builds the bundled detector with the seeded
weights of the tests, on small seeded images, and judges each engine as the suite does, at the size
that is traced and at another. An interpreter that has Detectron2 compares with that. What is
finished is kept in a folder, and is not tried again unless the code that it stands on has changed:
detectors/ or the backend. Writes docs/zoo.md. From the root of the repository:

    python3 tools/check_zoo.py FOLDER --detectron2 PYTHON
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from detectors.zoo_configurations import ZOO, zoo_configuration
from errors import InputError, Unsupported, first_cause

if TYPE_CHECKING:
    from torch import Tensor

    from detectors.export import Export
    from models import Model
    from results.record import Agreement

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "zoo.md"
ENGINES = ("torchscript", "openvino", "onnxruntime", "inductor")
# Cell -> what the table calls it.
COLUMNS = {
    "builds": "builds",
    "detectron2": "Detectron2",
    "torchscript": "TorchScript",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "inductor": "Inductor",
}
# Inductor takes minutes for each: one file of each kind of architecture.
FOR_INDUCTOR = (
    "COCO-Detection/retinanet_R_50_FPN_3x",
    "COCO-Detection/faster_rcnn_R_50_FPN_3x",
    "COCO-Detection/faster_rcnn_R_50_C4_3x",
    "COCO-Detection/faster_rcnn_R_50_DC5_3x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x",
    "Misc/cascade_mask_rcnn_R_50_FPN_3x",
    "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x",
    "COCO-Detection/rpn_R_50_FPN_1x",
    "Misc/semantic_R_50_FPN_1x",
)
# Height and width: of what is traced, and of another image. Heads of C4 are heavy, so there is to
# be less to propose.
SIZES = {"opt": (96, 128), "max": (107, 173)}
SIZES_OF_C4 = {"opt": (64, 96), "max": (75, 131)}
# Number of scores of a box -> what is added to that of the background, or all of some hundred
# thousand candidates would be listed. For 81 the tests' weights do so.
BACKGROUND = {9: 4.0, 21: 5.0, 1204: 12.0, 1231: 12.0}
# Scores of boxes are spread apart, each time twice as much, until so many objects are found.
LEAST_FOUND = 10
SPREADS = 8
BOX_SCORES = re.compile(r"box_predictor.*cls_score\.weight$")
MEMORY_BYTES = 8 << 30
CELL_LIMIT_S = {"inductor": 1500.0}
USUAL_LIMIT_S = 420.0


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        file: of the model zoo, without its ending.
        column: one of `COLUMNS`.
        code: digest of the code that it stands on.
        text: what the table says; empty where it failed.
        note: a sentence for a footnote, or nothing.
        found: how many objects the eager module finds at the two sizes.
        seconds: that it took.
        versions: of what it was tried with.
        day: when it was tried.
    """

    file: str
    column: str
    code: str
    text: str
    note: str = ""
    found: int = 0
    seconds: float = 0.0
    versions: Tuple[str, ...] = ()
    day: str = field(default_factory=lambda: date.today().isoformat())


def main() -> int:
    """Tries what is not finished, and writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for what is finished, and for logs")
    parser.add_argument("--detectron2", metavar="PYTHON", help="an interpreter that has Detectron2")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="files whose names match")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES)
    parser.add_argument("--page", type=Path, default=PAGE, help="where it is written")
    parser.add_argument("--page-only", action="store_true", help="tries nothing")
    parser.add_argument("--cells", nargs=2, metavar=("FILE", "COLUMNS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cells:
        file, columns = options.cells
        return try_here(options.folder, file, columns.split(","))
    options.folder = options.folder.resolve()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        if not options.page_only:
            try_all(options)
        options.page.write_text(page(options.folder, machine()), encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


# What there is to try, in processes of its own --------------------------------------------------


def try_all(options: argparse.Namespace) -> None:
    """One process after another, the largest detectors last, and Inductor after them."""
    files = [name for name in sorted(ZOO, key=effort) if fnmatch.fnmatch(name, options.only)]
    if not files:
        raise InputError(f"no file of the model zoo matches '{options.only}'")
    if options.detectron2:
        check_detectron2(options.detectron2)
    engines = [name for name in options.engines if name != "inductor"]
    for name in files:
        try_in_process(options.folder, name, ["builds", *engines], sys.executable)
        if options.detectron2 and is_built(options.folder, name):
            try_in_process(options.folder, name, ["detectron2"], options.detectron2)
    for name in files:
        wanted = name in FOR_INDUCTOR and "inductor" in options.engines
        if wanted and is_built(options.folder, name):
            try_in_process(options.folder, name, ["inductor"], sys.executable)


def check_detectron2(python: str) -> None:
    """Makes sure that an interpreter has Detectron2, before any file is tried.

    Raises:
        errors.InputError: it has not.
    """
    command = [python, "-c", "import detectron2.model_zoo"]
    try:
        done = subprocess.run(command, capture_output=True, cwd=ROOT)
    except OSError as error:
        raise InputError(f"{python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise InputError(f"{python} has no Detectron2 that can be imported")


def is_built(folder: Path, name: str, unless_tried: bool = False) -> bool:
    """Whether there is a detector to try anything with.

    Args:
        unless_tried: what to say where that was not tried yet.
    """
    cell = current(folder).get((name, "builds"))
    return unless_tried if cell is None else bool(cell.text)


def effort(name: str) -> Tuple[int, bool, str]:
    """Sorts what is large last."""
    settings = zoo_configuration(name).model
    depth = settings.resnets.depth * (2 if settings.resnets.num_groups > 1 else 1)
    return depth, settings.roi_heads.num_classes > 1000, name


def try_in_process(folder: Path, name: str, columns: Sequence[str], python: str) -> None:
    """Tries the cells of a file that are not finished; where a process dies, another goes on.

    Args:
        columns: in the order in which they are tried; `builds` comes first, and without it nothing.
    """
    while True:
        code_of.cache_clear()  # Someone may be working on it.
        pending = [x for x in columns if (name, x) not in current(folder)]
        if not pending or not is_built(folder, name, unless_tried=True):
            return
        reason = run_process(folder, name, pending, python)
        if is_built(folder, name, unless_tried=True):
            blame(folder, name, pending, reason)
        for column in pending:
            if (name, column) in current(folder):
                say(current(folder)[name, column])


def blame(folder: Path, name: str, columns: Sequence[str], reason: str) -> None:
    """Keeps why a process ended, where it did so before its time: its next cell was the cause."""
    left = [x for x in columns if (name, x) not in current(folder)]
    if left:
        keep(folder, Cell(name, left[0], code_of(left[0]), "", reason))


def run_process(folder: Path, name: str, columns: Sequence[str], python: str) -> str:
    """Runs the cells of a file; returns why the process ended, in a sentence."""
    limit = sum(CELL_LIMIT_S.get(column, USUAL_LIMIT_S) for column in columns)
    command = [
        python,
        str(ROOT / "tools" / "check_zoo.py"),
        str(folder),
        "--cells",
        name,
        ",".join(columns),
    ]
    log = folder / "logs" / f"{name.replace('/', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        try:
            process = subprocess.run(
                command, stdout=file, stderr=file, timeout=limit, env=one_thread(), cwd=ROOT
            )
        except subprocess.TimeoutExpired:
            return f"It took longer than {limit:g} s."
    code = process.returncode
    return f"The process died: signal {-code}." if code < 0 else f"The process ended with {code}."


def one_thread() -> Dict[str, str]:
    """The environment of a process."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"}


# What is finished -------------------------------------------------------------------------------


def keep(folder: Path, cell: Cell) -> None:
    """Adds a cell to what is finished."""
    with open(folder / "cells.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(cell)) + "\n")


def say(cell: Cell) -> None:
    """Prints one line."""
    told = f"{cell.text or 'failed'} ({cell.seconds:.0f} s) {cell.note}".strip()
    print(f"{cell.file} {cell.column}: {told}", flush=True)


def finished(folder: Path) -> Dict[Tuple[str, str], Cell]:
    """File and column -> the last cell that was kept.

    Raises:
        errors.InputError: the folder holds something else.
    """
    path = folder / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        cells = [Cell(**json.loads(line)) for line in lines]
    except (ValueError, TypeError):
        raise InputError(f"{path} was not written by this tool; name another folder") from None
    return {(cell.file, cell.column): cell for cell in cells}


def current(folder: Path) -> Dict[Tuple[str, str], Cell]:
    """The same without what stands on other code."""
    return {key: x for key, x in finished(folder).items() if x.code == code_of(x.column)}


@functools.lru_cache(maxsize=None)
def code_of(column: str) -> str:
    """Digest of the detectors, and of the backend with what it stands on."""
    names = ("base", "torch", "torchscript", column) if column in ENGINES else ()
    paths = sorted((ROOT / "detectors").glob("*.py"))
    paths += [ROOT / "backends" / f"{name}.py" for name in dict.fromkeys(names)]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# One file, in this process ----------------------------------------------------------------------


def try_here(folder: Path, name: str, columns: Sequence[str]) -> int:
    """Tries cells of a file one after another, and keeps each when it is finished."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    subject = Subject(name)
    for column in columns:
        start = time.perf_counter()
        try:
            text, note = subject.try_column(column)
        except (InputError, Unsupported) as error:
            text, note = "", sentence(str(error))
        except Exception as error:
            text, note = "", sentence(first_cause(error))
        seconds = time.perf_counter() - start
        versions = versions_of(column)
        found = subject.found if text else 0
        code = code_of(column)
        keep(folder, Cell(name, column, code, text, note, found, seconds, versions))
        if column == "builds" and not text:
            break
    return 0


class Subject:
    """A configuration of the model zoo, in this process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sizes = SIZES_OF_C4 if "C4" in name else SIZES

    @functools.cached_property
    def images(self) -> Dict[str, Tuple[Tensor, ...]]:
        """Size -> the images of a call; engines are made for `opt` to `max`."""
        from seeded_weights import seeded_image

        calls = {size: (seeded_image(1, *sides),) for size, sides in self.sizes.items()}
        return {"min": calls["opt"], **calls}

    @functools.cached_property
    def export(self) -> Export:
        """The bundled detector, made ready."""
        from detectors.build import build
        from detectors.config import build_detector
        from models import Model

        configuration = zoo_configuration(self.name)
        # Detectron2's RetinaNet clips its boxes in any case.
        clips = configuration.model.meta_architecture == "RetinaNet"
        model: Model = Model(self.name, self.name, postprocess=clips)
        like = build_detector(configuration, clips, initialize=False).state_dict()
        return build(model, weights_of(like), "seeded weights", self.images)

    @property
    def state(self) -> Dict[str, Tensor]:
        """The weights."""
        return self.export.eager.detector.state_dict()

    @functools.cached_property
    def reference(self) -> Dict[str, Tuple[Any, ...]]:
        """Size -> what the eager module gives, with weights that find something."""
        scores = [x for name, x in self.state.items() if BOX_SCORES.search(name)]
        for _ in range(SPREADS):
            found = {size: arrays(self.export.eager, self.images[size]) for size in SIZES}
            if not scores or min(map(self.count, found.values())) >= LEAST_FOUND:
                break
            for weight in scores:
                weight.mul_(2)
        return found

    def count(self, outputs: Sequence[Any]) -> int:
        """How many objects were found."""
        named = dict(zip(self.export.fields, outputs))
        return len(named["scores"]) if "scores" in named else LEAST_FOUND

    @property
    def found(self) -> int:
        """How many objects there are in the reference, which is known."""
        first = self.export.fields[0]
        if first == "sem_seg":
            return 0
        return sum(len(outputs[0]) for outputs in self.reference.values())

    def try_column(self, column: str) -> Tuple[str, str]:
        """What the table says of it, empty where it failed, and a sentence for a footnote."""
        if column == "builds":
            return self.builds()
        if column == "detectron2":
            return self.equals_detectron2()
        return self.runs_in(column)

    def builds(self) -> Tuple[str, str]:
        """Whether there is such a detector, and whether it finds something."""
        found = {size: self.judge(outputs, size) for size, outputs in self.reference.items()}
        text, note = self.told(found)
        return ("yes" if text else ""), note

    def runs_in(self, engine: str) -> Tuple[str, str]:
        """How much an engine finds of what the eager module does."""
        import torch

        from backends import base

        backend = base.load(engine)
        reason = backend.unavailable("cpu")
        if reason is not None:
            return "", sentence(reason)
        wanted = self.reference  # Before an engine has changed anything in the process.
        with torch.no_grad():
            call = backend.optimize(self.export, "fp32", "cpu").call
            found = {size: arrays(call, self.images[size]) for size in wanted}
        return self.told({size: self.judge(outputs, size) for size, outputs in found.items()})

    def told(self, found: Dict[str, Agreement]) -> Tuple[str, str]:
        """The same of what was compared at each size."""
        texts = {size: sides({size: self.sizes[size]}, "") for size in found}
        return told({texts[size]: agreement for size, agreement in found.items()})

    def equals_detectron2(self) -> Tuple[str, str]:
        """How much Detectron2 finds of what the bundled detector does, and how alike."""
        import detectron2_reference
        from golden import assert_same

        wanted = self.reference
        theirs = detectron2_reference.build(self.name, weights=lambda like: self.state)
        found, close = {}, True
        for size in SIZES:
            (fields,) = detectron2_reference.outputs_of_part(theirs, self.images[size])
            named = {name: fields[name].numpy() for name in self.export.fields}
            found[size] = self.judge(tuple(named.values()), size)
            try:
                assert_same(dict(zip(self.export.fields, wanted[size])), named)
            except AssertionError:
                close = False
        text, note = self.told(found)
        if text and not note and not close:
            note = "It agrees, and differs by more than the tests of the suite allow."
        return text, note

    def judge(self, outputs: Sequence[Any], size: str) -> Agreement:
        """Compares with the eager module."""
        from measure.verify import verify

        rules = self.export.score_threshold, self.export.limit
        return verify(self.reference[size], outputs, self.export.fields, "fp32", *rules)


def versions_of(column: str) -> Tuple[str, ...]:
    """Of what a column is tried with, such as `torch 2.4.0`."""
    own = column in ("openvino", "onnxruntime", "detectron2")
    return tuple(f"{name} {version(name)}" for name in ["torch", *([column] if own else [])])


def arrays(call: Any, images: Tuple[Tensor, ...]) -> Tuple[Any, ...]:
    """What a call gives for images, as NumPy arrays."""
    import torch

    with torch.no_grad():
        return tuple(x.cpu().numpy() for x in call(*images))


def weights_of(like: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The tests' seeded weights, with the background as likely as other numbers of classes need."""
    from seeded_weights import seeded_weights

    state = seeded_weights(like)
    for key, bias in state.items():
        if key.endswith("cls_score.bias") and len(bias) in BACKGROUND:
            bias[80:81] = 0  # It is the background of 81.
            bias[-1] = BACKGROUND[len(bias)]
    return state


def told(found: Dict[str, Agreement]) -> Tuple[str, str]:
    """What the table says of several sizes, empty where one is wrong, and a sentence.

    Args:
        found: size as text -> how it compares.
    """
    for size, agreement in found.items():
        if agreement.verdict != "match":
            reason = agreement.reason or f"{agreement.matched} of {agreement.expected}"
            return "", sentence(f"{agreement.verdict} at {size}: {reason}")
    matched = sum(agreement.matched for agreement in found.values())
    expected = sum(agreement.expected for agreement in found.values())
    least = min((x.labels for x in found.values() if x.labels is not None), default=1.0)
    if matched == expected and least == 1:
        return "all", ""
    texts = [f"{matched} of {expected}"] if expected else []
    if least < 1:
        # Never rounded up to what it is not.
        texts.append(f"{int(10000 * least) / 100:.2f}% of labels")
    return ", ".join(texts), ""


def sentence(text: str) -> str:
    """One line that begins with a capital letter and ends with a full stop."""
    line = " ".join(text.split())[:300].rstrip(".")
    return f"{line[:1].upper()}{line[1:]}."


# The page ---------------------------------------------------------------------------------------

HEAD = """# The model zoo

Each configuration file of Detectron2's model zoo, tried by `tools/check_zoo.py` (its options say
how to go on, and to try one file alone). The bundled detector is built as wide as the file has it,
with seeded weights, and sees two small seeded images, {sizes} pixels; files of C4, whose
heads are heavy, {sizes_of_c4}. Engines are made with the first. **builds**: it finds {least}
objects or more in the two, or several labels. **Detectron2**: the real one finds the same with the
same weights. The engines compute in fp32 on a CPU, and are judged as the suite judges them, against
the eager module. Inductor is tried with one file of each kind of architecture.

**all**: everything matches at both sizes; **N of M**: so many of the detections do, and rounding
explains the others; **[1]**: a note below; **-**: not tried.

{when}, {machine}, one thread; {versions}.{others}
"""


def page(folder: Path, made_on: str) -> str:
    """The page, in Markdown.

    Args:
        made_on: the kind of machine.
    """
    from results.tables import Table, left, markdown

    cells = finished(folder)
    notes: List[str] = []
    rows = [
        (name, *(cell_text(cells, name, column, notes) for column in COLUMNS))
        for name in sorted(ZOO)
    ]
    table = Table("The model zoo", left("file", *COLUMNS.values()), tuple(rows))
    footnotes = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    head = HEAD.format(
        sizes=sides(SIZES, " and "),
        sizes_of_c4=sides(SIZES_OF_C4, " and "),
        least=min((x.found for x in cells.values() if x.found), default=0),
        when=days(cells.values()),
        machine=made_on,
        versions=", ".join(sorted({x for cell in cells.values() for x in cell.versions})),
        others=of_other_code(cells.values()),
    )
    return "\n".join([head, markdown(table), "", *footnotes]).rstrip() + "\n"


def cell_text(cells: Dict[Tuple[str, str], Cell], name: str, column: str, notes: List[str]) -> str:
    """What stands in the table; a note that is new is added to the notes."""
    cell = cells.get((name, column))
    if cell is None:
        built = cells.get((name, "builds"))
        refused = built is not None and not built.text
        without = column == "detectron2" and all(key[1] != column for key in cells)
        alike = column == "inductor" and name not in FOR_INDUCTOR
        return "-" if refused or without or alike else "not tried yet"
    if not cell.note:
        return cell.text
    if cell.note not in notes:
        notes.append(cell.note)
    return f"{cell.text} [{notes.index(cell.note) + 1}]".strip()


def days(cells: Iterable[Cell]) -> str:
    """From when to when the cells were tried."""
    found = sorted({cell.day for cell in cells})
    return " to ".join(dict.fromkeys([found[0], found[-1]])) if found else "nothing yet"


def of_other_code(cells: Iterable[Cell]) -> str:
    """A sentence on how many cells were tried with other code than there is now, or nothing."""
    count = sum(cell.code != code_of(cell.column) for cell in cells)
    return f" Of the cells, {count} were tried with earlier code." if count else ""


def sides(sizes: Dict[str, Tuple[int, int]], between: str) -> str:
    """Sizes as text."""
    return between.join(f"{height}x{width}" for height, width in sizes.values())


def machine() -> str:
    """The kind of machine."""
    from results.environment import environment

    cpu = environment({}).cpu
    return f"{cpu.usable_cores} cores of {cpu.model}"


if __name__ == "__main__":
    sys.exit(main())
