"""Which kernels work on a tensor: those of the kind of device it lies on.

Where there are none, torch does the same work on any device, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

import torch
from torch import Tensor

from . import cuda, native
from .lanes import Coupling
from .table import Format, Work


class Kernels(Protocol):
    """What a kind of device does with tensors that lie there."""

    def can(self, work: Work, format: Format, device: torch.device) -> bool:
        """Whether there is a kernel for it, which is made ready if that takes time."""

    def prepare(self, work: Work, formats: Iterable[Format], device: torch.device) -> None:
        """Make kernels ready in the background, if that takes time."""

    def quantize(
        self, rows: Tensor, format: Format, weights: Tensor | None, result: Tensor, threads: int
    ) -> int | None:
        """Quantize rows [rows, columns] to uint8 `result` [rows, row bytes].

        weights: [experts, columns], of so many rows each; None weights all alike.
        Returns the first row that holds a value that is not finite, if any; then the result is incomplete.
        """

    def dequantize(self, data: Tensor, format: Format, result: Tensor, threads: int) -> None:
        """Read uint8 rows [rows, row bytes] into float32 or bfloat16 `result` [rows, columns]."""

    def choose(
        self,
        format: Format,
        values: Tensor,
        added: Tensor | None,
        coupling: Coupling,
        errors: Tensor,
        sweeps: int,
        threads: int,
    ) -> tuple[Tensor, Tensor]:
        """Round blocks of several matrices with error feedback: float32 [matrices, lanes, block_size] -> uint8
        [matrices, lanes, block_bytes].

        added: to the values, what errors of other blocks make of them; of the type of `errors`, float32 or bfloat16.
        errors: [matrices, lanes, block_size], filled with the values less what the blocks hold.
        See quant/rounding/feedback.py. The second part of the result is the first lane of all that holds a value that
        is not finite, or -1: int64 [] on the same device, so that nobody has to wait for it.
        """


_KERNELS: Final[dict[str, Kernels]] = {"cpu": native, "cuda": cuda}


def kernels_for(work: Work, format: Format, device: torch.device) -> Kernels | None:
    """The kernels that do this work on a device, if there are any; the first time that takes a GPU some seconds."""
    kernels = _KERNELS.get(device.type)
    return kernels if kernels and kernels.can(work, format, device) else None


def prepare(work: Work, formats: Iterable[Format], device: torch.device) -> None:
    """Make kernels ready in the background, where that takes time, because they will be wanted soon."""
    if kernels := _KERNELS.get(device.type):
        kernels.prepare(work, formats, device)
