"""Computes the golden outputs with the real Detectron2 and writes them beside this file.

Needs Detectron2 (2021 or newer; from source, it is on no package registry):

    python -m pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2
    python tests/data/make_golden.py

and takes a minute. Weights and images are seeded, so nothing is downloaded. Writes
`golden_<test model>.npz` for the test models, `golden_parts.npz` for those of `parts.py`,
`golden_example.npz` for what the predictor finds with `examples/shapes`,
`parameters.json` with the names and shapes of Detectron2's parameters and its anchors, and says in
all of them which versions computed them. An output that rounding errors would change is refused: it
would fail elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

# Grey levels by which images are disturbed to see what rounding could change. The outputs move as
# far as they do under PyTorch's other convolutions (mkldnn off), or farther.
DISTURBANCE = 2e-5


def main() -> None:
    """Writes all files, or fails saying what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--commit", help="Detectron2's, for the record, where its installation does not know it"
    )
    arguments = parser.parse_args()
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"Detectron2 cannot be imported ({error}); see --help") from None
    import detectron2_reference as reference

    from models import MODELS

    about = _about(arguments.commit)
    configs = list(dict.fromkeys(model.config for model in MODELS.values()))
    parameters: Dict[str, Any] = {"about": about}
    for config in configs:
        detector = reference.build(config)
        parameters[config] = _describe(detector)
        for model in MODELS.values():
            if model.config == config:
                _write_golden(model, detector, about)
    _write_parts(about)
    _write_example(about)
    path = Path(__file__).with_name("parameters.json")
    path.write_text(json.dumps(parameters, indent=1) + "\n", encoding="utf-8")
    print(path.name)


def _about(commit: str | None) -> Dict[str, str]:
    origin = metadata.distribution("detectron2").read_text("direct_url.json") or "{}"
    known = json.loads(origin).get("vcs_info", {}).get("commit_id")
    return {
        "detectron2": metadata.version("detectron2"),
        "detectron2_commit": commit or known or "unknown",
        "torch": metadata.version("torch"),
        "torchvision": metadata.version("torchvision"),
        "numpy": metadata.version("numpy"),
        "date": datetime.date.today().isoformat(),
    }


def _describe(detector: Any) -> Dict[str, Any]:
    import detectron2_reference as reference
    import golden

    return {
        "state_dict": golden.shapes_of(detector),
        "cell_anchors": [json.dumps(x.tolist()) for x in reference.cell_anchors(detector)],
    }


def _write_golden(model: Any, detector: Any, about: Dict[str, str]) -> None:
    import detectron2_reference as reference
    import golden

    if model.kind == "scripted":
        detector = reference.script(detector)
    outputs: Dict[str, List[golden.Fields]] = {}
    for call, images in golden.calls(model).items():
        outputs[call] = _compute(functools.partial(reference.outputs, model, detector), images)
        counts = [len(x["scores"]) for x in outputs[call]]
        print(f"{model.name} {call}: {counts} objects")
    path = golden.save(model.name, outputs, about)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _write_parts(about: Dict[str, str]) -> None:
    import detectron2_reference as reference
    import golden
    import parts

    outputs: Dict[str, List[golden.Fields]] = {}
    shapes: Dict[str, Dict[str, str]] = {}
    for name, (config, _) in parts.PARTS.items():
        detector = reference.build(config, parts.settings_of(name), parts.weights_of)
        outputs[name] = _compute(
            functools.partial(reference.outputs_of_part, detector), parts.images_of(name)
        )
        shapes[name] = golden.shapes_of(detector)
        sizes = {field: x.shape for field, x in outputs[name][0].items()}
        print(f"{name}: {sizes}")
    path = golden.save("parts", outputs, {**about, "state_dict": shapes})
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _write_example(about: Dict[str, str]) -> None:
    """What Detectron2's own predictor finds, in pixels of the images as they are."""
    import golden
    from detectron2.config import get_cfg
    from detectron2.data.detection_utils import read_image
    from detectron2.engine import DefaultPredictor

    folder = TESTS.parent / "examples" / "shapes"
    config = get_cfg()
    config.merge_from_file(str(folder / "config.yaml"))
    config.MODEL.WEIGHTS = str(folder / "model.pth")
    config.DATASETS.TEST = ()
    predict = DefaultPredictor(config)
    outputs: Dict[str, List[golden.Fields]] = {}
    for path in sorted((folder / "images").iterdir()):
        found = predict(read_image(str(path), format="BGR"))["instances"]
        fields = {name: getattr(found, name) for name in ("pred_classes", "pred_masks", "scores")}
        fields["pred_boxes"] = found.pred_boxes.tensor
        outputs[path.stem] = [{name: x.numpy() for name, x in fields.items()}]
    path = golden.save("example", outputs, about)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _compute(call: Callable[[Any], List[Dict[str, Any]]], images: Any) -> List[Dict[str, Any]]:
    import golden
    import torch

    found = [{field: x.numpy() for field, x in fields.items()} for fields in call(images)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        disturbed = tuple(
            image + DISTURBANCE * (2 * torch.rand(image.shape, generator=generator) - 1)
            for image in images
        )
        for fields, expected in zip(call(disturbed), found):
            golden.assert_same({field: x.numpy() for field, x in fields.items()}, expected)
    return found


if __name__ == "__main__":
    main()
