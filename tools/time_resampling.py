#!/usr/bin/env python3
"""How long do matching and resampling take on a data set of COCO's size?

Makes a data set as large as COCO's `val2017` (5000 images, 80 classes, 7 objects an image, 36
detections an image) and times what `--dataset` does after the detections are there. From the root
of the repository:

    python3 tools/time_resampling.py
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import accuracy

IMAGES, CLASSES, OBJECTS, DETECTIONS = 5000, 80, 7, 36


def main() -> None:
    generator = np.random.default_rng(0)
    objects, found = [], []
    for image in range(1, IMAGES + 1):
        # Few classes are seen at a time, and most detections are near an object.
        classes = generator.integers(1, CLASSES + 1, 3)
        boxes = []
        for _ in range(generator.poisson(OBJECTS)):
            box = [*generator.uniform(0, 400, 2).tolist(), *generator.uniform(5, 300, 2).tolist()]
            boxes.append((box, int(generator.choice(classes))))
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "category_id": boxes[-1][1],
                    "bbox": box,
                    "area": box[2] * box[3] * 0.6,
                    "iscrowd": 0,
                }
            )
        for _ in range(generator.poisson(DETECTIONS)):
            near, kind = boxes[generator.integers(len(boxes))] if boxes else ([50] * 4, 1)
            moved = np.array(near) + generator.normal(0, 12, 4)
            found.append(
                {
                    "image_id": image,
                    "category_id": kind,
                    "bbox": np.maximum(moved, 1).tolist(),
                    "score": float(generator.random()),
                }
            )
    content = {
        "images": [{"id": n, "height": 480, "width": 640} for n in range(1, IMAGES + 1)],
        "categories": [{"id": n, "name": str(n)} for n in range(1, CLASSES + 1)],
        "annotations": objects,
    }
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.json"
        truth.write_text(json.dumps(content))
        start = time.perf_counter()
        evaluation = accuracy.evaluate(truth, found, "bbox")
        matched = time.perf_counter()
    accuracy.average_precision(evaluation, [str(n) for n in range(CLASSES)])
    accumulated = time.perf_counter()
    values = accuracy.resampled(evaluation, 0)
    done = time.perf_counter()
    print(f"{len(objects)} objects, {len(found)} detections in {IMAGES} images")
    print(f"matching {matched - start:.1f} s, accumulating {accumulated - matched:.1f} s")
    print(f"{len(values)} resamples {done - accumulated:.1f} s, AP ±{2 * values.std():.2f}")


if __name__ == "__main__":
    main()
