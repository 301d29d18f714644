"""The images that int8 takes its ranges from: never those that runs are evaluated on."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from detectors import inputs
from detectors.inputs import Size, View
from errors import InputError
from measure.dataset import OTHER_SIZE, OTHER_THAN_ANNOTATED, UNREADABLE, Dataset
from measure.dataset import read as read_dataset
from results.environment import digest_of_files, file_name
from results.record import Calibrated

FOLDER, ANNOTATIONS = "--calibration", "--calibration-annotations"
EVALUATED = "evaluated, too"


@dataclass(frozen=True)
class Calibration:
    """What int8 is calibrated on.

    Attributes:
        record: what a result file says of it.
        path: of a file with the images as the detector sees them, 3 x H x W uint8 each, as
            `numpy.savez` writes it; None: images are made of the timed one.
        digest: tells the images, and what is in them, from others; None where they are made of the
            timed one.
        annotated: the images with what is in them, in the order of the file; None: that is not
            known.
        truth: file of their annotations, see `measure.accuracy.evaluate`.
    """

    record: Calibrated
    path: str | None = None
    digest: str | None = None
    annotated: Dataset | None = None
    truth: str | None = None


def of_timed(images: Sequence[Path], dataset: Dataset | None) -> Calibration:
    """The calibration where no images are given for it: on crops of the first that is timed.

    Args:
        images: that are timed; none: the default image.
        dataset: that runs are evaluated on.
    """
    known = _Evaluated(dataset)
    return Calibration(Calibrated(images=1, is_evaluated=any(known.has(x) for x in images[:1])))


def read(
    folder: Path | None,
    annotations: Path | None,
    limit: int,
    seed: int,
    view: View,
    sizes: tuple[Size, Size],
    dataset: Dataset | None,
    into: Path,
) -> Calibration:
    """Reads images to calibrate on into a file.

    They are drawn by the seed until there are enough that can be taken.

    Args:
        folder: all images in it and below; with annotations, the one that their names start from.
        annotations: of the images that are taken, in COCO's format.
        limit: the most that are taken.
        view: how the detector sees images.
        sizes: height and width of `min` and `max`, which engines are made for.
        dataset: that runs are evaluated on; its images are not taken.
        into: the file.

    Raises:
        errors.InputError: there is no folder or no annotations, nothing in them can be taken, or
            the images do not fit on the disk.
    """
    if annotations is not None:
        root = annotations.parent if folder is None else folder
        annotated = read_dataset(annotations, root, None, seed, (ANNOTATIONS, FOLDER))
        # Cropped, they would not be what the annotations say.
        candidates = [(x.path, x.name, x.size, None) for x in annotated.images]
        source = annotated.name
    else:
        source = file_name(folder.resolve())
        candidates = [(x, file_name(x), None, view.size) for x in _images_in(folder)]
    known = _Evaluated(dataset)
    digest = hashlib.sha256()
    taken: list[int] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    with _written(into) as write:
        for place in np.random.default_rng(seed).permutation(len(candidates)).tolist():
            if len(taken) == limit:
                break
            path, name, size, crop = candidates[place]
            pixels = _read(path, size, crop, view, sizes, known)
            if isinstance(pixels, str):
                left_out[pixels].append(name)
                continue
            write(str(len(taken)), pixels)
            digest.update(repr(pixels.shape).encode())
            digest.update(pixels)
            taken.append(place)
    if not taken:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        least, most = ("x".join(map(str, size)) for size in sizes)
        made_for = f" ({least} to {most}: --min-size and --max-size)" * (OTHER_SIZE in left_out)
        raise InputError(f"{source} has no image to calibrate on: {reasons}{made_for}")
    record = Calibrated(
        images=len(taken),
        source=source,
        left_out={
            reason: (len(names), tuple(sorted(names)[:3]))
            for reason, names in sorted(left_out.items())
        },
    )
    if annotations is None:
        return Calibration(record, str(into), digest.hexdigest()[:16])
    own = replace(annotated, images=tuple(annotated.images[place] for place in taken))
    truth = into.with_suffix(".json")
    try:
        own.write([picture.id for picture in own.images], truth)
    except OSError as error:
        raise _no_room(error) from None
    digest.update(truth.read_bytes())
    return Calibration(record, str(into), digest.hexdigest()[:16], own, str(truth))


def _images_in(folder: Path) -> list[Path]:
    """The files in a folder, and below, that are called like images.

    Raises:
        errors.InputError: there is no such folder, or no such file.
    """
    from PIL import Image

    if not folder.is_dir():
        raise InputError(f"{FOLDER} {folder} is no folder")
    kinds = Image.registered_extensions().items()
    suffixes = {suffix for suffix, kind in kinds if kind in Image.OPEN}
    found = sorted(x for x in folder.rglob("*") if x.suffix.lower() in suffixes and x.is_file())
    if not found:
        raise InputError(f"{FOLDER} {folder} has no images")
    return found


def _read(
    path: Path,
    size: Size | None,
    crop: Size | None,
    view: View,
    sizes: tuple[Size, Size],
    known: _Evaluated,
) -> np.ndarray | str:
    """An image as the detector sees it, 3 x H x W uint8, or why it is not taken.

    Args:
        size: height and width that annotations have.
        crop: that it is cropped and resized to first.
    """
    try:
        if known.has(path):
            return EVALUATED
        image = inputs.read_image(path, crop, least=1)
    except (InputError, OSError):
        return UNREADABLE
    if size not in (None, image.shape[-2:]):
        return OTHER_THAN_ANNOTATED
    own = view.resized(image.shape[-2:])
    if not all(a <= b <= c for a, b, c in zip(sizes[0], own, sizes[1], strict=True)):
        return OTHER_SIZE
    return inputs.seen(image, view).astype(np.uint8)


class _Evaluated:
    """Tells which files are images that runs are evaluated on: the same file, or a copy of it."""

    def __init__(self, dataset: Dataset | None) -> None:
        self._paths: set[Path] = set()
        self._by_bytes: dict[int, list[Path]] = defaultdict(list)
        self._digests: dict[int, set[str]] = {}
        for picture in () if dataset is None else dataset.images:
            self._paths.add(picture.path.resolve())
            self._by_bytes[picture.path.stat().st_size].append(picture.path)

    def has(self, path: Path) -> bool:
        """Whether a file is one of them.

        Raises:
            OSError: it cannot be read.
        """
        if path.resolve() in self._paths:
            return True
        size = path.stat().st_size
        if size not in self._by_bytes:  # So that few files are read for this.
            return False
        if size not in self._digests:
            self._digests[size] = {digest_of_files([x]) for x in self._by_bytes[size]}
        return digest_of_files([path]) in self._digests[size]


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Callable[[str, np.ndarray], None]]:
    """A file as `numpy.savez` writes it, array by array: together they may take gigabytes.

    Yields:
        what is called with the name of an array and the array.

    Raises:
        errors.InputError: there is no room for it.
    """

    def write(name: str, array: np.ndarray) -> None:
        with file.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array, allow_pickle=False)

    try:
        with zipfile.ZipFile(path, "w") as file:
            yield write
    except OSError as error:
        raise _no_room(error) from None


def _no_room(error: OSError) -> InputError:
    return InputError(
        f"there is no room for the images to calibrate on: {error.strerror or error}; TMPDIR "
        "names another folder for them, and --calibration-limit takes fewer"
    )
