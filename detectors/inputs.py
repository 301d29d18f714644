"""What a detector is called with: images as arrays, and the tensors that are made of them.

PyTorch is imported by the functions that return tensors, and by no other.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np

from errors import InputError
from models import DRAWN, TURNED

if TYPE_CHECKING:
    from torch import Tensor

# The images that TorchBlade's benchmark tunes for are smaller and larger by factors from here.
MIN_SCALE = (0.5, 0.7)
MAX_SCALE = (2.0, 3.0)
DEFAULT_SIZE = (480, 640)
# Sides that differ by a smaller factor than this make a square.
NEARLY_SQUARE = 1.2
# Two halvings less than the stride of the coarsest feature map: below, nothing is left of it.
SMALLEST_SIDE = 32

# Aspect ratios of the images that a detector which resizes them is made ready for, both ways.
MOST_ELONGATED = 2.0

# Grey, black, and what is not in the photographs that detectors are trained on.
PLAIN_COLOURS = ((128, 128, 128), (0, 0, 0), (0, 255, 0), (255, 255, 0))

# Images that int8 is calibrated on where there are none of the user's, of each size.
CROPS = 4

# Height and width in pixels.
Size = Tuple[int, int]


@dataclass(frozen=True)
class View:
    """How a detector sees images.

    Attributes:
        size: height and width to crop (around the center) and resize images to; None for their own.
        shortest: length that the shorter edge is then resized to, in pixels; 0 leaves it.
        longest: length that the longer edge has at most, where there is resizing.
        format: the order of the channels, `BGR` or `RGB`.
        smallest, largest: the sizes of `min` and `max`; None: see `view_sizes`.
        least, most: sizes that `min` and `max` stay between, as a file takes no others; None: any.
    """

    size: Optional[Size] = None
    shortest: int = 0
    longest: int = 0
    format: str = "BGR"
    smallest: Optional[Size] = None
    largest: Optional[Size] = None
    least: Optional[Size] = None
    most: Optional[Size] = None

    def takes(self, size: Size) -> bool:
        """Whether a size lies between `least` and `most`."""
        least, most = self.least or size, self.most or size
        return all(a <= b <= c for a, b, c in zip(least, size, most))

    @property
    def taken(self) -> str:
        """What lies between `least` and `most`, in words."""
        least, most = ("x".join(map(str, x or ())) for x in (self.least, self.most))
        return " ".join(filter(None, (least and f"from {least}", most and f"up to {most}")))

    def resized(self, size: Sequence[int]) -> Size:
        """The size that an image is resized to: the rule of Detectron2's predictor.

        Args:
            size: height and width.
        """
        height, width = int(size[0]), int(size[1])
        if not self.shortest:
            return height, width
        scale = self.shortest / min(height, width)
        sides = [scale * height, scale * width]
        # The shorter edge has that length exactly, whatever rounding makes of the product.
        sides[height > width] = self.shortest
        if max(sides) > self.longest:
            scale = self.longest / max(sides)
            sides = [scale * side for side in sides]
        return int(sides[0] + 0.5), int(sides[1] + 0.5)


# Images ----------------------------------------------------------------------------------------


def default_image() -> Path:
    """A photograph that a dependency brings along: Grace Hopper, from matplotlib's sample data.

    Raises:
        errors.InputError: matplotlib is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder) / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if path.exists():
            return path
    raise InputError(
        "the default image comes with matplotlib, which is not installed here: "
        "pip install matplotlib, or give an --image"
    )


def read_image(
    path: Optional[Path], size: Optional[Size], least: int = SMALLEST_SIDE
) -> np.ndarray:
    """Reads an image as Detectron2 wants it: BGR, 0 to 255, float32, 3 x H x W.

    Args:
        path: any format that Pillow reads; None for the default image.
        size: height and width to crop (around the center) and resize it to; None for the image's
            own, or 480 x 640 for the default image.
        least: the fewest pixels of a side.

    Raises:
        errors.InputError: it is no image, is broken, or has a side below that.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path is None:
        path, size = default_image(), size or DEFAULT_SIZE
    try:
        with Image.open(path) as image:
            # Cameras store photographs lying on the side and say so in a tag.
            image = ImageOps.exif_transpose(_eight_bits(image, path)).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read: {error}") from None
    if size is not None:
        height, width = size
        image = ImageOps.fit(image, (width, height), Image.BICUBIC)
    if min(image.size) < least:
        raise InputError(
            f"image {path} has {image.width} x {image.height} pixels; "
            f"both sides must have at least {least}"
        )
    bgr = np.asarray(image)[:, :, ::-1].transpose(2, 0, 1)
    return np.ascontiguousarray(bgr, dtype=np.float32)


def _eight_bits(image: Any, path: Path) -> Any:
    """The image with 8 bits a channel; what has more, Pillow would clip to white.

    Raises:
        errors.InputError: it has pixels without a known range.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        scaled = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        scaled.info.update(image.info)  # Such as which side is up.
        return scaled
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise InputError(f"image {path} has {kind} for pixels: convert it to 8 bits a channel")
    return image


def read_images(paths: Sequence[Path], view: View, seed: int) -> List[np.ndarray]:
    """Reads images as `read_image` does; without any path, the default image.

    Args:
        view: of the detector; images are cropped to its size, and not resized further.
        seed: of `tuning_sizes`.

    Raises:
        errors.InputError: one cannot be read, or engines do not take its size.
    """
    # Small ones that are enlarged will do.
    least = 1 if view.shortest else SMALLEST_SIDE
    images = [read_image(path, view.size, least) for path in paths or (None,)]
    for path, image in zip(paths or (default_image(),), images):
        own = view.resized(image.shape[-2:])
        if not view.takes(own):
            raise InputError(
                f"image {path} has {own[0]}x{own[1]} pixels, and the file takes images "
                f"{view.taken}: give an --image-size"
            )
    ranges = view_sizes(images, view, seed)
    smallest, largest = ranges["min"], ranges["max"]
    for path, image in zip(paths or (default_image(),), images):
        own = view.resized(image.shape[-2:])
        if min(own) < SMALLEST_SIDE:
            raise InputError(f"image {path} would be resized to {own[0]}x{own[1]}: too small")
        if not all(a <= b <= c for a, b, c in zip(smallest, own, largest)):
            what = "would be resized to" if view.shortest else "has"
            raise InputError(
                f"image {path} {what} {own[0]}x{own[1]} pixels, and the engines are made for "
                f"{smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]}{_way_out(view)}"
            )
    return images


def _way_out(view: View) -> str:
    if view.longest or view.smallest or view.largest:  # Test models have none of these.
        return ": --min-size and --max-size have to include it"
    return ", after the first image: give an --image-size, or measure it alone"


def seen(image: np.ndarray, view: View) -> np.ndarray:
    """An image as the detector gets it: resized by Pillow's bilinear filter, channels in its order.

    Args:
        image: 3 x H x W, BGR, as `read_image` gives it.
    """
    size = view.resized(image.shape[-2:])
    if size != image.shape[-2:]:
        from PIL import Image

        pixels = Image.fromarray(image.transpose(1, 2, 0).astype(np.uint8))
        pixels = pixels.resize((size[1], size[0]), Image.BILINEAR)
        image = np.asarray(pixels).transpose(2, 0, 1)
    if view.format == "RGB":
        image = image[::-1]
    return np.ascontiguousarray(image, dtype=np.float32)


def write_image(image: np.ndarray, path: Path, longest: Optional[int] = None) -> None:
    """Writes an image as a file of the format of its name.

    Args:
        image: 3 x H x W, BGR, 0 to 255, as `read_image` gives it.
        longest: pixels that its longer side may have, else it is made smaller; None: any.
    """
    from PIL import Image

    rgb = np.clip(np.round(image[::-1].transpose(1, 2, 0)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(rgb)
    if longest is not None:
        picture.thumbnail((longest, longest))
    picture.save(path)


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Tells one image, or one set of weights, from another: 16 hexadecimal digits.

    Args:
        arrays: their order counts, their shapes do not.
    """
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array))
    return hasher.hexdigest()[:16]


def call_digest(image: np.ndarray, images_per_call: int, view: View = View()) -> str:
    """The `digest` of the images that a call takes, made of one as `inputs` makes them."""
    image = seen(image, view)
    return digest(image[..., ::-1] if place % 2 else image for place in range(images_per_call))


# Inputs ----------------------------------------------------------------------------------------


def tuning_sizes(size: Sequence[int], seed: int) -> Dict[str, Size]:
    """The sizes of the tuning inputs: `opt` is the image's, `min` and `max` are scaled both ways.

    `max` is also turned, upright where the image lies on its side, or narrower where it is nearly a
    square: an engine that carries the aspect ratio that it was traced at is seen there. No side is
    smaller than at `opt`, so that the three are a range.

    Args:
        size: height and width of the image.
        seed: of the scales, uniform in 0.5 to 0.7 and 2 to 3. No side gets below 32 pixels.
    """
    generator = np.random.default_rng(seed)
    smallest = _scaled(size, generator.uniform(*MIN_SCALE))
    height, width = _scaled(size, generator.uniform(*MAX_SCALE))
    if _is_elongated((height, width)):
        turned = width, height
    else:
        turned = height, int(width / NEARLY_SQUARE)  # Turning it would change next to nothing.
    opt = (int(size[0]), int(size[1]))
    largest = (max(turned[0], opt[0]), max(turned[1], opt[1]))
    return {"min": smallest, "opt": opt, "max": largest}


def _is_elongated(size: Size) -> bool:
    return max(size) >= NEARLY_SQUARE * min(size)


def _scaled(size: Sequence[int], factor: float) -> Size:
    height, width = (max(SMALLEST_SIDE, int(side * factor)) for side in size)
    return height, width


def view_sizes(images: Sequence[Any], view: View, seed: int) -> Dict[str, Size]:
    """The sizes of the tuning inputs of a detector: `opt` is that of the first image.

    Where images are resized, `min` and `max` are the range of what comes of aspect ratios up to
    1:2 and 2:1, and of the images. Both are squares then, so `turned` is the first image with its
    sides exchanged, or upright where it is nearly a square.

    Args:
        images: ... x H x W, as `read_images` gives them.
        seed: of `tuning_sizes`.

    Raises:
        errors.InputError: the view's smallest size is not below its largest.
    """
    sizes = [view.resized(image.shape[-2:]) for image in images]
    ranges = tuning_sizes(sizes[0], seed)
    if view.shortest:
        side = 64 * view.shortest  # So large that rounding to pixels does not matter.
        elongated = int(side * MOST_ELONGATED)
        shapes = ((side, side), (side, elongated), (elongated, side))
        sizes += [view.resized(shape) for shape in shapes]
        smallest = [max(SMALLEST_SIDE, min(x[axis] for x in sizes)) for axis in (0, 1)]
        ranges["min"] = smallest[0], smallest[1]
        ranges["max"] = max(x[0] for x in sizes), max(x[1] for x in sizes)
        ranges[TURNED] = sizes[0][::-1] if _is_elongated(sizes[0]) else view.resized(shapes[2])
    for name, wanted, end, choose in (
        ("min", view.smallest, view.least, max),
        ("max", view.largest, view.most, min),
    ):
        ranges[name] = wanted or ranges[name]
        if end is not None:
            height, width = map(choose, ranges[name], end)
            ranges[name] = height, width
    if any(a > b for a, b in zip(ranges["min"], ranges["max"])):
        smallest, largest = ("x".join(map(str, ranges[name])) for name in ("min", "max"))
        raise InputError(f"no image fits between {smallest} and {largest} (--min-size, --max-size)")
    if TURNED in ranges:
        height, width = np.clip(ranges[TURNED], ranges["min"], ranges["max"]).tolist()
        ranges[TURNED] = height, width
    return ranges


def tuning_inputs(
    image: Union[np.ndarray, Tensor],
    images_per_call: int,
    seed: int,
    sizes: Optional[Dict[str, Size]] = None,
) -> Dict[str, Tuple[Tensor, ...]]:
    """The images of a call in three sizes: `opt` as it is, `min` and `max` scaled.

    With several images a call, those of `min` differ in size, too.

    Args:
        image: 3 x H x W, as the detector sees it.
        seed: of `tuning_sizes`.
        sizes: of `min` and `max`, and of other inputs that are made of the image; None: those of
            `tuning_sizes`.
    """
    opt = _tensor(image)
    sizes = sizes or tuning_sizes(opt.shape[-2:], seed)
    first, *others = _call(_fitted(opt, sizes["min"]), images_per_call)
    narrow = narrower(sizes["min"])
    return {
        "min": (first, *(_fitted(other, narrow) for other in others)),
        "opt": _call(opt, images_per_call),
        **{
            name: _call(_fitted(opt, size), images_per_call)
            for name, size in sizes.items()
            if name not in ("min", "opt")
        },
    }


def narrower(size: Size) -> Size:
    """The size of further images of a call at `min`."""
    return size[0], max(SMALLEST_SIDE, size[1] * 7 // 8)


def inputs(
    images: Sequence[np.ndarray],
    images_per_call: int,
    seed: int,
    view: View = View(),
    drawn: Sequence[Size] = (),
) -> Dict[str, Tuple[Tensor, ...]]:
    """All that a detector is called with: `tuning_inputs` of the first image, and the others.

    The others are named by their place, `image 2` and so on.

    Args:
        images: 3 x H x W each, as `read_images` gives them.
        drawn: sizes of further inputs that are made of the first image, `drawn 1` and so on.
    """
    sizes = {**view_sizes(images, view, seed), **dict(zip(DRAWN, drawn))}
    first, *rest = (seen(image, view) for image in images)
    others = {
        f"image {place}": _call(_tensor(image), images_per_call)
        for place, image in enumerate(rest, start=2)
    }
    return {**tuning_inputs(first, images_per_call, seed, sizes), **others}


class Calls(Sequence[Any]):
    """Calls with the images of a file, read one by one: together they may take gigabytes.

    Args:
        path: of `numpy.savez`, with images 3 x H x W, uint8.
        images_per_call: a last call that is not full has its last image several times.
    """

    def __init__(self, path: Path, images_per_call: int) -> None:
        self._file = np.load(str(path), allow_pickle=False)
        self._names = list(self._file.files)
        self._count = images_per_call

    def __len__(self) -> int:
        return -(-len(self._names) // self._count)

    def __getitem__(self, place: Any) -> Any:
        """The images of a call, float tensors 3 x H x W."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        own = self._names[place * self._count : (place + 1) * self._count]
        own += own[-1:] * (self._count - len(own))
        return tuple(_tensor(self._file[name].astype(np.float32)) for name in own)


def crops(image: Tensor, count: int = CROPS) -> List[Tensor]:
    """The image and seeded crops of it, every other one flipped, all of its size.

    Args:
        image: 3 x H x W.
    """
    import torch
    import torch.nn.functional as F

    height, width = image.shape[-2:]
    generator = np.random.default_rng(0)
    images = [image]
    for number in range(1, count):
        share = generator.uniform(0.5, 1)
        rows, columns = max(1, int(share * height)), max(1, int(share * width))
        top, left = generator.integers(height - rows + 1), generator.integers(width - columns + 1)
        crop = image[None, :, top : top + rows, left : left + columns]
        crop = F.interpolate(crop, size=(height, width), mode="bilinear", align_corners=False)[0]
        images.append(torch.flip(crop, dims=[2]) if number % 2 else crop)
    return images


def plain(like: Sequence[Tensor]) -> Iterator[Tuple[Tensor, ...]]:
    """Calls with pictures of one colour: in one of them, a detector may find nothing.

    Args:
        like: the images of a call, whose sizes they have.
    """
    for colour in PLAIN_COLOURS:
        yield tuple(
            image.new_tensor(colour)[:, None, None].expand_as(image).contiguous() for image in like
        )


def describe_sizes(inputs: Dict[str, Tuple[Any, ...]]) -> Dict[str, Tuple[Size, ...]]:
    """Input (`min`, `opt`, `max` and others) -> height and width of each image of the call.

    Args:
        inputs: tensors or arrays, ... x H x W.
    """
    return {
        name: tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
        for name, images in inputs.items()
    }


def _tensor(image: Union[np.ndarray, Tensor]) -> Tensor:
    import torch

    # A copy, as an array that was read from a file may not be written to.
    return torch.from_numpy(image.copy()) if isinstance(image, np.ndarray) else image


def _fitted(image: Tensor, size: Size) -> Tensor:
    """The middle of an image, as much of it as has that aspect ratio, at that size."""
    import torch.nn.functional as F

    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    rows, columns = (min(x, round(y / scale)) for x, y in zip((height, width), size))
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = image[:, top : top + rows, left : left + columns]
    return F.interpolate(middle[None], size=list(size), mode="bilinear", align_corners=False)[0]


def mirrored(image: Tensor, size: Size) -> Tensor:
    """An image cut to a size and, where it is too small, mirrored at its edges; on the CPU.

    What is in it keeps its scale and its place, so that about as much is found in it: synthetic
    weights find next to nothing in an image that is resized.

    By NumPy: PyTorch's threads would spin on into the call that follows.

    Args:
        image: 3 x H x W.
    """
    pixels = image.cpu().numpy()
    rows, columns = (
        side - 1 - np.abs(np.arange(wanted) % (2 * side) - side + 0.5).astype(int)
        for side, wanted in zip(pixels.shape[-2:], size)
    )
    return _tensor(pixels[:, rows][:, :, columns])


def _call(image: Tensor, count: int) -> Tuple[Tensor, ...]:
    """The images of a call: every second one is mirrored, as an engine may mix up what is alike."""
    return tuple(image.flip(-1) if place % 2 else image.clone() for place in range(count))
