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
from typing import Dict, List, NamedTuple, Optional, Tuple

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

# The published precision that ours is set beside; bf16 is a CPU's half precision, and tf32 what
# fp32 comes to on a GPU.
COUNTERPART = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "fp16"}


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


class Counterpart(NamedTuple):
    """What was published for one of our runs: a speedup over Torch, and the precision it is at."""

    ratio: float
    precision: str


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


def beside(model: str, precision: str) -> Optional[Counterpart]:
    """What to set beside a speedup of ours; None where nothing was published.

    Args:
        model: test model, `testRetinaNet`.
        precision: that ours ran in.
    """
    theirs = COUNTERPART.get(precision, "")
    ratio = speedups().get((*PUBLISHED_AS.get(model, ("", "")), theirs))
    return None if ratio is None else Counterpart(ratio, theirs)
