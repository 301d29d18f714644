"""The eager module with its weights in `torch.channels_last`, else the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from backends.base import Optimized
from backends.torch import Torch
from errors import Unsupported

if TYPE_CHECKING:
    from detectors.export import Export


class TorchChannelsLast(Torch):
    """Convolutions compute on N x H x W x C in memory, as users are told to try first.

    The weights decide: a convolution whose weight is channels_last gives what is channels_last,
    whatever it is given, and most operators between two convolutions keep that.
    """

    name = "torch_channels_last"
    label = "Torch channels_last"
    rank = 1
    default = False

    def optimize(
        self, export: Export, precision: str, device: str, cache: Optional[Path] = None
    ) -> Optimized:
        """See `Backend.optimize`; the export's own module is changed.

        Raises:
            errors.Unsupported: it is a file that PyTorch does not run, or that has no weights of
                convolutions.
        """
        import torch

        if export.own_runner is not None:
            raise Unsupported(
                f"{export.own_runner} runs the file, and lays out its weights as it likes"
            )
        if not _has_weights_of_convolutions(export.eager):
            raise Unsupported(
                "it has no weights of convolutions to lay out: a frozen file has them as constants"
            )
        export.eager.to(memory_format=torch.channels_last)
        return super().optimize(export, precision, device, cache)


def _has_weights_of_convolutions(module: Any) -> bool:
    return any(x.dim() == 4 for x in module.parameters())
