"""Pasting masks: from M x M probabilities inside a box to a mask of the whole image."""

from contextlib import contextmanager
from typing import Iterator, List

import torch
import torch.nn.functional as F
from torch import Tensor


def _sample(masks: Tensor, boxes: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Values of N x M x M masks, stretched over N boxes, at pixel rows and columns: N x h x w."""
    x0, y0, x1, y1 = boxes.split(1, dim=1)
    y = (ys + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (xs + 0.5 - x0) / (x1 - x0) * 2 - 1
    height, width = y.shape[1], x.shape[1]
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, width), y[:, :, None].expand(-1, height, width)], dim=3
    )
    return F.grid_sample(
        masks[:, None],
        grid.to(masks.dtype),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )[:, 0]


@torch.jit.script_if_tracing
def _paste_one_by_one(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """Pastes one mask after the other, each only around its box: the least arithmetic."""
    height, width = int(size[0]), int(size[1])
    pasted = torch.zeros([masks.shape[0], height, width], dtype=torch.bool, device=masks.device)
    # Whole numbers before the loop: ONNX slices with nothing else.
    first = boxes[:, :2].floor().to(torch.int64) - 1
    last = boxes[:, 2:].ceil().to(torch.int64) + 1
    for n in range(masks.shape[0]):
        x0, y0 = max(int(first[n, 0]), 0), max(int(first[n, 1]), 0)
        x1, y1 = min(int(last[n, 0]), width), min(int(last[n, 1]), height)
        ys = torch.arange(y0, y1, dtype=torch.float32, device=boxes.device)
        xs = torch.arange(x0, x1, dtype=torch.float32, device=boxes.device)
        mask = _sample(masks[n : n + 1], boxes[n : n + 1], ys, xs)
        pasted[n, y0:y1, x0:x1] = mask[0] >= 0.5
    return pasted


@torch.jit.script_if_tracing
def _paste_in_chunks(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """Pastes many masks at once into the whole image: more arithmetic, but fewer kernels."""
    height, width = int(size[0]), int(size[1])
    ys = torch.arange(height, device=boxes.device, dtype=torch.float32)
    xs = torch.arange(width, device=boxes.device, dtype=torch.float32)
    # As many at once as make 1 GiB of float32.
    per_chunk = max(1, (1 << 28) // (height * width))
    pasted = torch.jit.annotate(List[Tensor], [])
    for start in range(0, masks.shape[0], per_chunk):
        end = start + per_chunk
        pasted.append(_sample(masks[start:end], boxes[start:end], ys, xs) >= 0.5)
    if len(pasted) == 0:
        return torch.zeros([0, height, width], dtype=torch.bool, device=masks.device)
    return torch.cat(pasted)


def _paste_by_rows(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """Pastes all masks at once, by taking rows and mixing them two and two, without a loop.

    Bilinear interpolation is separable: each column of the image is a mixture of two columns of the
    mask, and each row one of two rows of that. The pixels are those of the others. As products of
    matrices it would take about as long; but OpenVINO would round those to bfloat16, the places of
    the pixels included, and int8 would quantize them.
    """
    count, cells = masks.shape[0], masks.shape[-1]
    side = cells + 2
    # Around a mask there is nothing.
    padded = F.pad(masks, [1, 1, 1, 1]).transpose(1, 2).reshape(count * side, side)
    x0, y0, x1, y1 = boxes.split(1, dim=1)
    first = torch.arange(count, device=boxes.device)[:, None] * side
    columns = _mixed_rows(padded, first, cells, size[1], x0, x1).transpose(1, 2)  # N x side x W
    columns = columns.reshape(count * side, columns.shape[2])
    return _mixed_rows(columns, first, cells, size[0], y0, y1) >= 0.5


def _mixed_rows(
    rows: Tensor, first: Tensor, cells: int, pixels: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """For every pixel along a side of the image, the mixture of the two rows that it lies between.

    Args:
        rows: (N * (cells + 2)) x D, those of all masks, one after the other; the first and the last
            of each mask are zeros.
        first: N x 1, where each mask begins.
        cells: of a mask, along this side.
        pixels: P, how many there are.
        low, high: N x 1, the pixels where each box begins and ends.

    Returns:
        N x P x D.
    """
    at = torch.arange(pixels, dtype=torch.float32, device=low.device)
    # In the steps of `F.grid_sample`, so that the rounding is the same.
    at = (at + 0.5 - low) / (high - low) * 2 - 1
    at = (((at + 1) * cells - 1) / 2).clamp(min=-1, max=cells)
    before = at.floor().clamp(max=cells - 1)
    share = (at - before)[:, :, None].to(rows.dtype)
    place = first + 1 + before.to(torch.int64)
    return rows[place] * (1 - share) + rows[place + 1] * share


# Whether what is traced now is for an engine that has kernels of its own.
_for_engine = False


@contextmanager
def for_engine() -> Iterator[None]:
    """While it lasts, pasting is traced without a loop, which engines are slow at."""
    global _for_engine
    before, _for_engine = _for_engine, True
    try:
        yield
    finally:
        _for_engine = before


def paste_masks(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """Pastes masks into the image.

    Args:
        masks: N x M x M probabilities.
        boxes: N x 4, none of them empty.
        size: height and width of the image.

    Returns:
        N x H x W bool, true where the probability is at least 0.5.
    """
    # One `if` with both would not script: it would look at the global, too.
    if not torch.jit.is_scripting():  # noqa: SIM102
        if torch.jit.is_tracing() and _for_engine:
            return _paste_by_rows(masks, boxes, size)
    if masks.is_cuda:
        return _paste_in_chunks(masks, boxes, size)
    return _paste_one_by_one(masks, boxes, size)
