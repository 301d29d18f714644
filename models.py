"""What the whole suite has to know: which models there are, and a few defaults.

It imports nothing heavy, for `--help`.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Tuple

from configuration import Configuration, Input

VERSION = "0.1.0"

# Rather five short generations than three long ones: Student's t of two degrees of freedom is wide.
GENERATIONS = 5
# Seconds of timed rounds, and of starting processes anew between them, for each call of a round;
# seven models at two precisions are 14 groups.
RUN_BUDGET_S = 6.0
# That int8 is calibrated on, if there are so many: NNCF's own default.
CALIBRATION_IMAGES = 300
# That the test models tell apart.
COCO_CLASSES = 80
# Names of the inputs that engines are made for; `opt` is timed.
TUNING = ("min", "opt", "max")
# Names of inputs that are not timed either: of another aspect ratio, where `min` and `max` are
# squares; at sizes that were drawn; and one in which nothing is found.
TURNED = "turned"
DRAWN = ("drawn 1", "drawn 2")
BLANK = "blank"


@dataclass(frozen=True)
class Module:
    """A file that a detector was exported to elsewhere.

    Attributes:
        path: absolute.
        kind: `torchscript`; `exported`, by torch.export; `compiled`, by AOTInductor; or `onnx`.
        digest: tells it from others, what lies beside it included.
        fields: names of the tensors that it gives for an image; empty: not known yet.
        smallest, largest: height and width of the images that it takes; None: of any size, or it
            does not tell.
    """

    path: str
    kind: str
    digest: str
    fields: Tuple[str, ...] = ()
    smallest: Optional[Tuple[int, int]] = None
    largest: Optional[Tuple[int, int]] = None

    @property
    def size(self) -> Optional[Tuple[int, int]]:
        """Height and width of the only images that it takes, if there is but one size."""
        return self.smallest if self.smallest == self.largest else None


@dataclass(frozen=True)
class Detectron2Model:
    """A model of the user's own that the installed Detectron2 builds.

    Attributes:
        name: of the user's file, for messages.
        settings: keys and their values: numbers, texts, None for no value, and tuples of these.
            Of a YAML file and what overrides it; of a program, what overrides it.
        program: path of a LazyConfig file, which is run; None for YAML.
        input: how images are made ready for it, as the worker has found out.
    """

    name: str
    settings: Tuple[Tuple[str, Any], ...] = ()
    program: Optional[str] = None
    input: Input = field(default_factory=Input)


@dataclass(frozen=True)
class Model:
    """One of the seven test models, or a model of the user's own.

    Attributes:
        name: what the command line calls a test model; of one's own, made of the file's name.
        config: Detectron2's model-zoo configuration, or the name of the user's file.
        kind: `traced` or `scripted`, how it is exported; of a file, what it is.
        images_per_call: how many images one call takes.
        postprocess: whether boxes are clipped and masks pasted into the image.
        configuration: of a model of the user's own; None: that of the model zoo, or not known, of a
            file.
        detectron2: of a model of the user's own that Detectron2 builds, in place of it.
        module: the file that it is; None where it is built.
    """

    name: str
    config: str
    kind: str = "traced"
    images_per_call: int = 1
    postprocess: bool = False
    configuration: Optional[Configuration] = None
    detectron2: Optional[Detectron2Model] = None
    module: Optional[Module] = None

    @property
    def input(self) -> Optional[Input]:
        """How images are made ready for a model of the user's own; None: for a test model."""
        own = self.configuration or self.detectron2
        return own and own.input

    @property
    def classes(self) -> Optional[int]:
        """How many it tells apart; None where that is not known."""
        if self.configuration is None:
            return None if self.detectron2 or self.module else COCO_CLASSES
        model = self.configuration.model
        is_retinanet = model.meta_architecture == "RetinaNet"
        return (model.retinanet if is_retinanet else model.roi_heads).num_classes

    @property
    def oks_sigmas(self) -> Tuple[float, ...]:
        """Of its keypoints, how far annotators differ; none: COCO's, or there are no keypoints."""
        return () if self.configuration is None else self.configuration.test.keypoint_oks_sigmas


_CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_3x"
_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x"
_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
_RETINANET = "COCO-Detection/retinanet_R_50_FPN_3x"

MODELS: Dict[str, Model] = {
    model.name: model
    for model in (
        Model("testCascadeRCNN", _CASCADE),
        Model("testMaskRCNNC4", _C4),
        Model("testMaskRCNNFPN", _FPN),
        Model("testMaskRCNNFPN_b2", _FPN, images_per_call=2),
        Model("testMaskRCNNFPN_pproc", _FPN, postprocess=True),
        Model("testRetinaNet", _RETINANET, postprocess=True),
        Model("testRetinaNet_scripted", _RETINANET, kind="scripted"),
    )
}


# What runs a file of which PyTorch does not know the operators.
OTHER_RUNNERS = {"compiled": "AOTInductor", "onnx": "ONNXRuntime"}


def runner(kind: str) -> str:
    """What runs the reference and the baseline of a model of this kind."""
    return OTHER_RUNNERS.get(kind, "Torch")


def timed(inputs: Iterable[str]) -> List[str]:
    """Of the names of a test model's inputs, the timed ones: `opt` and the further images."""
    return [name for name in inputs if name not in ("min", "max", TURNED, *DRAWN, BLANK)]
