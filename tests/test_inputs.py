"""What a test model is called with: images, their sizes, tuning inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Tuple

import numpy as np
import pytest
import torch
from PIL import Image

from detectors import inputs
from detectors.inputs import (
    View,
    describe_sizes,
    digest,
    read_image,
    read_images,
    tuning_inputs,
    tuning_sizes,
    write_image,
)
from errors import InputError

# Images ----------------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def quarters(height: int = 64, width: int = 96) -> np.ndarray:
    """Red left of green, both above blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, :, 2] = 255
    return pixels


def test_an_image_is_bgr_and_keeps_its_size(tmp_path):
    image = read_image(save(tmp_path / "image.png", quarters()), None)
    assert image.dtype == np.float32
    assert image.shape == (3, 64, 96)
    assert image.flags.c_contiguous
    assert image[:, 10, 10].tolist() == [0, 0, 255]  # red
    assert image[:, 10, 90].tolist() == [0, 255, 0]  # green
    assert image[:, 60, 50].tolist() == [255, 0, 0]  # blue


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_an_image_may_have_other_channels(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(quarters()).convert(mode).save(path)
    assert read_image(path, None).shape == (3, 64, 96)


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_an_image_of_16_bits_is_scaled_not_clipped(tmp_path, name):
    """It is white where it is brightest, as the same image of 8 bits."""
    gray = np.linspace(0, 255, 96).astype(np.uint8) * np.ones((64, 1), np.uint8)
    deep = save(tmp_path / name, gray.astype(np.uint16) * 257)
    plain = save(tmp_path / "plain.png", gray)
    assert np.array_equal(read_image(deep, None), read_image(plain, None))
    assert len(np.unique(read_image(deep, None))) > 50


@pytest.mark.parametrize(
    ("kind", "words"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")]
)
def test_an_image_of_unknown_range_is_refused(tmp_path, kind, words):
    path = save(tmp_path / "image.tif", np.ones((64, 96), kind))
    with pytest.raises(InputError, match=f"has {words} for pixels: convert it to 8 bits"):
        read_image(path, None)


def test_an_image_that_lies_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees clockwise
    image = read_image(save(tmp_path / "image.png", quarters(), exif=exif), None)
    assert image.shape == (3, 96, 64)
    assert image[:, 10, 60].tolist() == [0, 0, 255]  # red: top left became top right


def test_an_image_is_cropped_around_its_center_and_resized(tmp_path):
    pixels = np.full((50, 300, 3), 255, np.uint8)
    pixels[:, 100:200] = 0
    image = read_image(save(tmp_path / "image.png", pixels), (100, 200))
    assert image.shape == (3, 100, 200)
    # But for the border, where the resizing mixes in what was cut away.
    assert image[:, :, 5:-5].max() == 0


def test_a_small_image_can_be_enlarged(tmp_path):
    path = save(tmp_path / "image.png", quarters(16, 24))
    assert read_image(path, (32, 48)).shape == (3, 32, 48)
    with pytest.raises(InputError, match="has 24 x 16 pixels; both sides must have at least 32"):
        read_image(path, None)


def test_the_default_image_is_a_photograph_of_480_by_640():
    image = read_image(None, None)
    assert image.shape == (3, 480, 640)
    assert image.min() < 20
    assert image.max() > 235
    assert image.std() > 30
    assert read_image(None, (64, 96)).shape == (3, 64, 96)


def test_the_default_image_needs_matplotlib(monkeypatch):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install matplotlib, or give an --image"):
        read_image(None, None)


# Tuning inputs ---------------------------------------------------------------------------------


def test_tuning_inputs_are_the_image_scaled_in_both_directions():
    """And turned at `max`, where an engine that carries the aspect ratio of `opt` shows."""
    image = read_image(None, (240, 400))
    ratios = []
    for seed in range(20):
        tuned = tuning_inputs(image, 1, seed)
        assert list(tuned) == ["min", "opt", "max"]
        assert np.array_equal(tuned["opt"][0].numpy(), image)
        for name, (low, high) in (("min", (0.5, 0.7)), ("max", (2.0, 3.0))):
            height, width = tuned[name][0].shape[-2:]
            if name == "max":
                height, width = width, height
            # Sides are rounded down.
            assert low * 240 - 1 <= height <= high * 240
            assert abs(height / 240 - width / 400) < 1 / 240
        ratios.append([tuned[name][0].shape[-1] for name in ("min", "max")])
    assert len({small for small, _ in ratios}) > 5
    assert len({large for _, large in ratios}) > 5


@pytest.mark.parametrize("size", [(100, 100), (110, 100), (100, 300), (300, 100), (480, 640)])
def test_tuning_sizes_are_a_range_of_more_than_one_aspect_ratio(size):
    for seed in range(20):
        sizes = tuning_sizes(size, seed)
        for low, middle, high in zip(sizes["min"], sizes["opt"], sizes["max"]):
            assert low <= middle <= high
        ratios = [height / width for height, width in sizes.values()]
        assert max(ratios) > 1.19 * min(ratios)


def test_tuning_inputs_can_be_repeated():
    image = read_image(None, (64, 96))
    first, again, other = (tuning_inputs(image, 1, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name][0], again[name][0]) for name in first)
    assert first["max"][0].shape != other["max"][0].shape


def test_tuning_inputs_show_the_same_picture():
    """The middle of it, where the aspect ratio is another one."""
    image = torch.from_numpy(read_image(None, (120, 160)))
    for name, (scaled,) in tuning_inputs(image, 1, 0).items():
        shown = image[:, :, 35:125] if name == "max" else image
        restored = torch.nn.functional.interpolate(scaled[None], size=shown.shape[-2:])[0]
        both = torch.stack([restored.flatten(), shown.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9, name


def test_a_call_takes_as_many_images_as_the_model_asks_for():
    tuned = tuning_inputs(read_image(None, (64, 96)), 2, 0)
    assert [len(images) for images in tuned.values()] == [2, 2, 2]
    first, second = tuned["opt"]
    assert first.data_ptr() != second.data_ptr()


def test_the_images_of_a_call_differ():
    """An engine that gives one image's detections for both, or that image's size, shows."""
    image = read_image(None, (64, 96))
    tuned = inputs.inputs([image, image], 2, 0)
    for name in ("opt", "max", "image 2"):
        first, second = tuned[name]
        assert torch.equal(first, second.flip(-1))
        assert not torch.equal(first, second)
    first, second = tuned["min"]
    assert first.shape[1] == second.shape[1]
    assert first.shape[2] > second.shape[2]
    for count in (1, 2):
        call = inputs.inputs([image], count, 0)["opt"]
        assert inputs.call_digest(image, count) == digest(x.numpy() for x in call)


def test_no_tuning_input_is_smaller_than_32_pixels():
    smallest = tuning_inputs(read_image(None, (32, 100)), 1, 0)["min"][0]
    assert smallest.shape[-2] == 32
    assert 50 <= smallest.shape[-1] <= 70


@pytest.mark.parametrize("size", [(240, 400), (32, 100), (427, 611)])
def test_tuning_sizes_are_those_of_the_tuning_inputs(size):
    for seed in range(10):
        tuned = tuning_inputs(np.zeros((3, *size), np.float32), 1, seed)
        sizes = {name: (found,) for name, found in tuning_sizes(size, seed).items()}
        assert describe_sizes(tuned) == sizes
        assert sizes["opt"] == (size,)


def test_arrays_and_tensors_give_the_same_inputs():
    image = read_image(None, (64, 96))
    image.flags.writeable = False  # As one that was read from a file may be.
    first = inputs.inputs([image, image[:, :, ::-1]], 2, 3)
    again = inputs.inputs([torch.tensor(x.copy()) for x in (image, image[:, :, ::-1])], 2, 3)
    assert list(first) == list(again) == ["min", "opt", "max", "image 2"]
    for name, images in first.items():
        assert all(torch.equal(one, other) for one, other in zip(images, again[name]))
    assert np.array_equal(first["image 2"][0].numpy(), image[:, :, ::-1])
    assert describe_sizes(first)["image 2"] == ((64, 96), (64, 96))


def test_inputs_are_copies():
    image = read_image(None, (64, 96))
    for given in (image, torch.from_numpy(image.copy())):
        for images in inputs.inputs([given, given], 1, 0).values():
            images[0].fill_(-1)
        assert given.min() >= 0


# Several images --------------------------------------------------------------------------------


def photographs(folder: Path, *sizes: Tuple[int, int]) -> list:
    return [
        save(folder / f"{place}.png", quarters(*size)) for place, size in enumerate(sizes, start=1)
    ]


def test_further_images_may_have_other_sizes_within_the_range(tmp_path):
    sizes = tuning_sizes((100, 160), 7)
    paths = photographs(tmp_path, (100, 160), sizes["min"], sizes["max"])
    assert [x.shape[1:] for x in read_images(paths, View(), 7)] == [
        (100, 160),
        sizes["min"],
        sizes["max"],
    ]
    assert [x.shape for x in read_images(paths, View((48, 64)), 7)] == [(3, 48, 64)] * 3


@pytest.mark.parametrize(("which", "by"), [("min", -1), ("max", 1)])
@pytest.mark.parametrize("side", [0, 1])
def test_further_images_beyond_the_range_are_refused(tmp_path, which, by, side):
    sizes = tuning_sizes((100, 160), 7)
    size = list(sizes[which])
    size[side] += by
    paths = photographs(tmp_path, (100, 160), size)
    with pytest.raises(InputError) as error:
        read_images(paths, View(), 7)
    bounds = ["x".join(map(str, sizes[name])) for name in ("min", "max")]
    assert str(error.value) == (
        f"image {paths[1]} has {size[0]}x{size[1]} pixels, and the engines are made for "
        f"{bounds[0]} to {bounds[1]}, after the first image: "
        "give an --image-size, or measure it alone"
    )


def test_no_path_is_the_default_image():
    (image,) = read_images([], View((64, 96)), 0)
    assert np.array_equal(image, read_image(None, (64, 96)))


def test_an_image_is_written_as_it_was_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    image = read_image(save(tmp_path / "image.png", pixels), None)
    write_image(image, tmp_path / "again.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), pixels)
    write_image(image * 2 - 100.4, tmp_path / "clipped.png")
    wanted = np.clip(np.round(pixels * 2.0 - 100.4), 0, 255)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "clipped.png")), wanted)


# Digests ---------------------------------------------------------------------------------------


def test_a_digest_is_that_of_the_bytes_in_order():
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, dtype=np.int64)
    # What earlier result files have: of the bytes 0 to 5 as float32 and 7 as int64.
    assert digest([first, second]) == "ea3559e4dd0a7fbd"
    assert digest([second, first]) != digest([first, second])
    assert digest([first.T]) == digest([np.ascontiguousarray(first.T)]) != digest([first])
    assert digest([first, np.zeros((0, 4)), second]) == digest([first, second])


def test_arrays_need_no_pytorch(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from detectors import inputs\n"
        "images = inputs.read_images([Path(sys.argv[1])] * 2, inputs.View((64, 96)), 0)\n"
        "inputs.digest(images), inputs.tuning_sizes((64, 96), 0), inputs.describe_sizes({})\n"
        "inputs.write_image(images[0], Path(sys.argv[1]))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    path = save(tmp_path / "image.png", quarters())
    root = Path(inputs.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=True)


# Images as a detector resizes them -------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "edges", "expected"),
    [
        # What Detectron2's ResizeShortestEdge gives.
        ((480, 640), (800, 1333), (800, 1067)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((333, 500), (800, 1333), (800, 1201)),
        ((360, 1000), (800, 1333), (480, 1333)),
        ((1001, 333), (800, 1333), (1333, 443)),
        ((600, 600), (800, 1333), (800, 800)),
        ((128, 160), (160, 240), (160, 200)),
        ((75, 101), (0, 1333), (75, 101)),
    ],
)
def test_the_size_that_an_image_is_resized_to(size, edges, expected):
    assert View(None, *edges).resized(size) == expected


def test_a_detector_sees_an_image_resized_and_in_its_format(tmp_path):
    image = read_image(save(tmp_path / "image.png", quarters(60, 80)), None)
    seen = inputs.seen(image, View(None, 90, 200, "RGB"))
    assert seen.shape == (3, 90, 120)
    assert seen.dtype == np.float32
    assert np.array_equal(seen, seen.round())  # Pillow resizes bytes.
    # Red, green and blue are the other way round, and the corners are where they were.
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert np.array_equal(seen[:, y, x], image[::-1, y, x])
    assert inputs.seen(image, View()) is not None
    assert np.array_equal(inputs.seen(image, View()), image)


def test_the_range_of_what_resizing_gives():
    view = View(None, 800, 1333)
    images = [np.zeros((3, 480, 640), np.float32)]
    assert inputs.view_sizes(images, view, 0) == {
        "min": (667, 667),
        "opt": (800, 1067),
        "max": (1333, 1333),
        "turned": (1067, 800),
    }
    # An image that is more elongated is in it, too.
    images.append(np.zeros((3, 300, 1000), np.float32))
    sizes = inputs.view_sizes(images, view, 0)
    assert (sizes["min"], sizes["max"]) == ((400, 667), (1333, 1333))
    calls = inputs.inputs(images, 1, 0, view)
    assert {name: tuple(x.shape[1:]) for name, (x,) in calls.items()} == {
        **sizes,
        "image 2": (400, 1333),
    }
    own = View(None, 800, 1333, "BGR", (300, 400), (900, 1400))
    sizes = inputs.view_sizes(images, own, 0)
    assert (sizes["min"], sizes["max"]) == ((300, 400), (900, 1400))
    assert sizes["turned"] == (900, 800)  # Not larger than engines are made for.
    # A square would be the same when it is turned.
    square = inputs.view_sizes([np.zeros((3, 500, 500), np.float32)], view, 0)
    assert (square["opt"], square["turned"]) == ((800, 800), (1333, 667))
    # Where nothing is resized, `max` itself is turned.
    assert set(inputs.view_sizes(images, View(), 0)) == {"min", "opt", "max"}


def test_an_image_that_resizing_leaves_too_small(tmp_path):
    path = save(tmp_path / "image.png", quarters(40, 1000))
    with pytest.raises(InputError, match="would be resized to 10x240: too small"):
        read_images([path], View(None, 160, 240), 0)


def test_a_small_image_that_resizing_enlarges(tmp_path):
    path = save(tmp_path / "image.png", quarters(20, 30))
    (image,) = read_images([path], View(None, 160, 240), 0)
    assert image.shape == (3, 20, 30)
    with pytest.raises(InputError, match="30 x 20 pixels; both sides must have at least 32"):
        read_images([path], View(None, 0, 240), 0)


def test_the_way_out_for_an_image_that_engines_do_not_take(tmp_path):
    paths = [
        save(tmp_path / name, quarters(*size))
        for name, size in (("a.png", (64, 64)), ("b.png", (640, 64)))
    ]
    with pytest.raises(InputError, match="give an --image-size, or measure it alone"):
        read_images(paths, View(), 0)
    # A model of one's own that resizes nothing.
    with pytest.raises(InputError, match="--min-size and --max-size have to include it"):
        read_images(paths, View(None, 0, 1333), 0)
