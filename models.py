"""What the whole suite has to know: which test models there are, and a few defaults.

It imports nothing heavy, for `--help`.
"""

from dataclasses import dataclass
from typing import Dict, Iterable, List, Tuple

VERSION = "0.1.0"

# Seconds of timed rounds for each call of a round; seven models at two precisions are 14 groups.
RUN_BUDGET_S = 15.0
# Names of the inputs that engines are made for; `opt` is timed.
TUNING = ("min", "opt", "max")


@dataclass(frozen=True)
class TestModel:
    """One of the seven.

    Attributes:
        name: what the command line calls it.
        config: Detectron2's model-zoo configuration.
        kind: `traced` or `scripted`, how it is exported.
        images_per_call: how many images one call takes.
        postprocess: whether boxes are clipped and masks pasted into the image.
    """

    __test__ = False  # pytest: this is no test

    name: str
    config: str
    kind: str = "traced"
    images_per_call: int = 1
    postprocess: bool = False

    @property
    def fields(self) -> Tuple[str, ...]:
        """Names of the tensors of one image, in their order in the flat tuple."""
        if "retinanet" in self.config:
            return ("pred_boxes", "pred_classes", "scores", "image_size")
        return ("pred_boxes", "pred_classes", "pred_masks", "scores", "image_size")


_CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_3x"
_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x"
_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
_RETINANET = "COCO-Detection/retinanet_R_50_FPN_3x"

MODELS: Dict[str, TestModel] = {
    model.name: model
    for model in (
        TestModel("testCascadeRCNN", _CASCADE),
        TestModel("testMaskRCNNC4", _C4),
        TestModel("testMaskRCNNFPN", _FPN),
        TestModel("testMaskRCNNFPN_b2", _FPN, images_per_call=2),
        TestModel("testMaskRCNNFPN_pproc", _FPN, postprocess=True),
        TestModel("testRetinaNet", _RETINANET, postprocess=True),
        TestModel("testRetinaNet_scripted", _RETINANET, kind="scripted"),
    )
}


def timed(inputs: Iterable[str]) -> List[str]:
    """Of the names of a test model's inputs, the timed ones: `opt` and the further images."""
    return [name for name in inputs if name not in ("min", "max")]
