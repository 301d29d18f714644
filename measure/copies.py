"""Images from the host to the GPU and detections back, which every timed call on one has in it.

Valid on Python 3.8 and PyTorch 2.0.1, as workers import it.
"""

from __future__ import annotations

from typing import Any, Sequence, Tuple

from results.record import Copies

DEVICE = "cuda"


def pinned(images: Sequence[Any]) -> Tuple[Any, ...]:
    """The images in pinned host memory, from where a GPU takes them by itself."""
    return tuple(image.pin_memory() for image in images)


class Copier:
    """Copies between pinned host memory and the GPU, and times that by CUDA's events.

    It waits for nothing: whoever calls it waits for the GPU at the end of the call, as without it,
    and asks for the seconds after that.
    """

    def __init__(self) -> None:
        import torch

        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]

    def upload(self, images: Sequence[Any]) -> Tuple[Any, ...]:
        """Images that are in pinned host memory, on the GPU."""
        self._events[0].record()
        on_gpu = tuple(image.to(DEVICE, non_blocking=True) for image in images)
        self._events[1].record()
        return on_gpu

    def download(self, outputs: Any) -> Any:
        """What an engine gave, in pinned host memory as soon as the GPU has been waited for.

        Args:
            outputs: a flat tuple of tensors; what is none stays where it is.
        """
        self._events[2].record()
        if isinstance(outputs, (tuple, list)):
            outputs = tuple(_on_host(x) for x in outputs)
        self._events[3].record()
        return outputs

    def seconds(self) -> Copies:
        """What the copies of the last call took, once the GPU has been waited for."""
        upload_ms, download_ms = (
            start.elapsed_time(end) for start, end in zip(self._events[::2], self._events[1::2])
        )
        return Copies(upload_ms / 1000, download_ms / 1000)


def _on_host(output: Any) -> Any:
    """A tensor's copy in pinned memory; the size of an image, say, is on the host already."""
    import torch

    if not isinstance(output, torch.Tensor) or not output.is_cuda:
        return output
    # PyTorch keeps pinned memory that was freed: none is allocated once a call has been made.
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    return host.copy_(output.detach(), non_blocking=True)
