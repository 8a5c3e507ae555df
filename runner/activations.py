"""What flows between blocks, kept chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Activations:
    """float32 [chunks, tokens, ...], zeros at first; read and written a chunk at a time, or by rows of all chunks."""

    def __init__(self, *shape: int) -> None:
        self._values = torch.zeros(shape)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, chunk: int) -> Tensor:
        """[tokens, ...], to be changed only by storing it again."""
        return self._values[chunk]

    def __setitem__(self, chunk: int, values: Tensor) -> None:
        self._values[chunk] = values

    def copy(self) -> Activations:
        """The same numbers, to go another way."""
        twin = Activations.__new__(Activations)
        twin._values = self._values.clone()
        return twin

    def rows(self, indices: Tensor) -> Tensor:
        """The tokens of these numbers, counted over all chunks, [indices, ...]."""
        return self._values.flatten(0, 1)[indices]

    def add_rows(self, indices: Tensor, values: Tensor) -> None:
        """Add [indices, ...] to these tokens; each number stands there once."""
        self._values.flatten(0, 1).index_add_(0, indices, values)
