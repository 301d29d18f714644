"""What the whole suite has to know: which models there are, and a few defaults.

It imports nothing heavy, for `--help`.
"""

from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional

from configuration import Configuration

VERSION = "0.1.0"

# Seconds of timed rounds for each call of a round; seven models at two precisions are 14 groups.
RUN_BUDGET_S = 15.0
# Names of the inputs that engines are made for; `opt` is timed.
TUNING = ("min", "opt", "max")
# Names of two inputs that are not timed either: of another aspect ratio, where `min` and `max` are
# squares, and one in which nothing is found.
TURNED = "turned"
BLANK = "blank"


@dataclass(frozen=True)
class Model:
    """One of the seven test models, or a model of the user's own.

    Attributes:
        name: what the command line calls a test model; of one's own, made of the file's name.
        config: Detectron2's model-zoo configuration, or the name of the user's file.
        kind: `traced` or `scripted`, how it is exported.
        images_per_call: how many images one call takes.
        postprocess: whether boxes are clipped and masks pasted into the image.
        configuration: of a model of the user's own; None: that of the model zoo.
    """

    name: str
    config: str
    kind: str = "traced"
    images_per_call: int = 1
    postprocess: bool = False
    configuration: Optional[Configuration] = None


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


def timed(inputs: Iterable[str]) -> List[str]:
    """Of the names of a test model's inputs, the timed ones: `opt` and the further images."""
    return [name for name in inputs if name not in ("min", "max", TURNED, BLANK)]
