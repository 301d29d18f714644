"""The checkpoints of Detectron2's model zoo, and what `--weights` knows besides files.

It imports no PyTorch: the parent process downloads, where the progress can be seen.
"""

from __future__ import annotations

import hashlib
import os
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Iterable, Optional
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import urlopen

from errors import InputError
from models import Model
from results.environment import digest_of_files

# What `--weights` knows besides files.
NAMED_WEIGHTS = ("auto", "zoo", "synthetic")

ZOO_URL = "https://dl.fbaipublicfiles.com/detectron2"

# Model-zoo config -> model id and file; the six hex digits are the beginning of the file's md5.
ZOO = {
    "COCO-Detection/retinanet_R_50_FPN_3x": "190397829/model_final_5bd44e.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x": "137849525/model_final_4ce675.pkl",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": "137849600/model_final_f10217.pkl",
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": "144998488/model_final_480dd8.pkl",
}


class CheckpointUnavailable(InputError):
    """A model-zoo checkpoint is neither in the local cache nor can it be downloaded."""


def checkpoint_digest(weights: str) -> Optional[str]:
    """Tells a checkpoint from another of the same name: 16 hexadecimal digits, or None.

    Args:
        weights: one of `NAMED_WEIGHTS`, which have no file of the user's and no digest, or the
            path of a checkpoint.
    """
    if weights in NAMED_WEIGHTS:
        return None
    return digest_of_files([weights])


def download_zoo(models: Iterable[Model], weights: str) -> None:
    """Downloads the checkpoints that `--weights auto` and `zoo` look for; the cache keeps them.

    Args:
        weights: as for `checkpoint_digest`; what is not of the model zoo downloads nothing.

    Raises:
        CheckpointUnavailable: one cannot be had, and `weights` is `zoo`. `auto` does without.
    """
    if weights not in ("auto", "zoo"):
        return
    try:
        for config in dict.fromkeys(model.config for model in models):
            zoo_checkpoint(config)
    except CheckpointUnavailable:
        if weights == "zoo":
            raise


def cache_dir() -> Path:
    """Where Detectron2 (through iopath) keeps what it has downloaded."""
    return Path(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()


def zoo_checkpoint(model_zoo_config: str, base_url: str = ZOO_URL, timeout: float = 5.0) -> Path:
    """The model-zoo checkpoint of a config: from the local cache, else downloaded into it.

    The cache is Detectron2's own, so what either has downloaded the other finds. A cached file
    that does not have the md5 in its name is downloaded again.

    Args:
        model_zoo_config: one of `ZOO`.
        base_url: where the zoo is.
        timeout: seconds to wait for a connection, and then for each piece.

    Raises:
        CheckpointUnavailable: not in the cache, and the download failed.
        InputError: there is no such config.
    """
    if model_zoo_config not in ZOO:
        raise InputError(
            f"no model-zoo checkpoint is known for '{model_zoo_config}'; there are {', '.join(ZOO)}"
        )
    url = f"{base_url}/{model_zoo_config}/{ZOO[model_zoo_config]}"
    path = cache_dir() / urlparse(url).path.lstrip("/")
    digest = path.stem.rsplit("_", 1)[-1]
    if not (path.is_file() and _md5(path).startswith(digest)):
        _download(url, path, digest, timeout)
    return path


def _md5(path: Path) -> str:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def _download(url: str, path: Path, digest: str, timeout: float) -> None:
    """Downloads to `path`; the file appears there whole and checked, or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointUnavailable(
            f"cannot create {path.parent} for {url} ({error.strerror}); "
            "set FVCORE_CACHE to a directory that can be written"
        ) from error
    # In the same directory, so that the last step is a rename; of this process alone.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        _fetch(url, partial, timeout)
        found = _md5(partial)
        if not found.startswith(digest):
            raise CheckpointUnavailable(
                f"{url} is damaged: its md5 begins with {found[:6]} instead of {digest}"
            )
        os.replace(partial, path)
    except (OSError, HTTPException) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise CheckpointUnavailable(f"cannot download {url}: {reason}") from error
    finally:
        if partial.exists():
            partial.unlink()


def _fetch(url: str, path: Path, timeout: float) -> None:
    """Copies a URL's bytes to `path`, with a progress bar where stderr is a terminal."""
    from tqdm import tqdm

    with urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm(
            total=total,
            desc=path.name.split(".pkl")[0],
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=None,
        ) as bar:
            for piece in iter(lambda: response.read(1 << 16), b""):
                file.write(piece)
                bar.update(len(piece))
        if total is not None and file.tell() != total:
            raise OSError(f"the connection ended after {file.tell()} of {total} bytes")
