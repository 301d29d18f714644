"""What TorchBlade published for these models, as data, beside what is measured here.

`torchblade.csv` has the 26 rows of BladeDISC's `pytorch_blade/benchmark/detectron2/README.md`
(https://github.com/alibaba/BladeDISC, added in pull request 202 on 2022-03-29). Times here are
milliseconds: the published table prints seconds under the heading ms.

What the page says of how they were measured, and what it does not:

- Torch is the eager model, TorchBlade the exported module with TensorRT engines in it, both on
  CUDA, fp16 under autocast; 100 calls of warm-up, then 200 timed ones, one side after the other.
- The GPU, driver and library versions are not stated. The VGG-16 table published beside it is
  headed "Nvidia T4", and the project's nightly benchmark job of that commit ran on a T4 in the
  container `nvcr.io/nvidia/pytorch:21.11-py3`; that these rows come from there is likely, not said.
  So it is the ratios that can be set beside other ratios, not the milliseconds.
- There are no fp32 figures for the scripted RetinaNet.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

from benchmark import Speedup, describe_speedup, verdict

# Test model -> the model and export under which TorchBlade lists it.
PUBLISHED_AS: Dict[str, Tuple[str, str]] = {
    "testCascadeRCNN": ("CascadeRCNN", "traced"),
    "testMaskRCNNC4": ("MaskRCNNC4", "traced"),
    "testMaskRCNNFPN": ("MaskRCNNFPN", "traced"),
    "testMaskRCNNFPN_b2": ("MaskRCNNFPN_b2", "traced"),
    "testMaskRCNNFPN_pproc": ("MaskRCNNFPN_pproc", "traced"),
    "testRetinaNet": ("RetinaNet", "traced"),
    "testRetinaNet_scripted": ("RetinaNet", "scripted"),
}

# The published precision that ours is set beside; bf16 is a CPU's half precision.
COUNTERPART = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16"}


@dataclass(frozen=True)
class PublishedRow:
    """One published row; times in milliseconds a call, FPS in images a second."""

    model: str
    export: str
    backend: str
    precision: str
    median_fps: float
    mean_fps: float
    median_ms: float
    mean_ms: float
    p99_ms: float
    std_dev_ms: float

    @property
    def images_per_call(self) -> int:
        return 2 if self.model.endswith("_b2") else 1


class Measured(NamedTuple):
    """One speedup of ours.

    Attributes:
        model: test model, `testRetinaNet`.
        export: `traced` or `scripted`.
        precision: what it ran in.
        backend: the backend's label.
        ratio: speedup over Torch; None where the run failed.
        low, high: its 95% interval.
        name: what the table calls it; empty for the test model's own name.
    """

    model: str
    export: str
    precision: str
    backend: str
    ratio: Optional[float]
    low: Optional[float]
    high: Optional[float]
    name: str = ""


def torchblade() -> List[PublishedRow]:
    """The published rows, in the order of the page."""
    text = {"model", "export", "backend", "precision"}
    with open(Path(__file__).with_name("torchblade.csv"), newline="", encoding="utf-8") as file:
        return [
            PublishedRow(**{k: v if k in text else float(v) for k, v in row.items()})
            for row in csv.DictReader(file)
        ]


def speedups() -> Dict[Tuple[str, str, str], float]:
    """(model, export, precision) -> Torch's median over TorchBlade's, as published."""
    medians = {(r.model, r.export, r.precision, r.backend): r.median_ms for r in torchblade()}
    return {
        key[:3]: median / medians[key[:3] + ("TorchBlade",)]
        for key, median in medians.items()
        if key[3] == "Torch"
    }


def _published_cell(model: str, precision: str, published: Dict) -> str:
    counterpart = COUNTERPART.get(precision)
    ratio = published.get((*PUBLISHED_AS.get(model, ("", "")), counterpart))
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" if counterpart == precision else f"{ratio:.2f}x ({counterpart})"


def _measured_cell(row: Measured) -> str:
    if row.ratio is None:
        return "-"
    known = row.low is not None and row.high is not None
    judged = verdict(row.low, row.high) if known else "inconclusive"
    return describe_speedup(Speedup(row.ratio, row.low, row.high, judged))


def comparison(ours: Iterable[Tuple]) -> str:
    """A Markdown table of our speedups beside those that TorchBlade published.

    Args:
        ours: tuples with the fields of `Measured`, one a row.

    Returns:
        The table and one line that says what the two columns are, without a final newline.
    """
    published = speedups()
    lines = [
        "| Model | Export | precision | Backend | Speedup | TorchBlade, published |",
        "| :-- | :-- | :-- | :-- | --: | --: |",
    ]
    for row in (Measured(*values) for values in ours):
        name = row.name or row.model[len("test") :]
        cells = [name, row.export, row.precision, row.backend]
        cells += [_measured_cell(row), _published_cell(row.model, row.precision, published)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Each speedup is over Torch on the same machine. TorchBlade's was measured with TensorRT "
        "on a CUDA GPU that its page does not name: compare ratios, not milliseconds.",
    ]
    return "\n".join(lines)
