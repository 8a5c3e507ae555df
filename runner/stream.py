"""A model's hidden states for a set of token chunks, advanced one layer at a time.

Memory holds the states, one layer's dense weights and one expert; nothing of the model stays between layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.graph import MLP, Attention, Layer, Mamba2, MoE
from ..sources.model import Model
from .blocks import attention, mlp, moe, normaliser
from .mamba import mamba

_BLOCK_ROWS = 4096  # vocabulary rows of the embedding or the head in memory at a time


class Stream:
    """Runs `tokens` [chunks, context] through `model`; `hidden` is float32 [chunks, context, hidden size]."""

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.model = model
        self.hidden = self._embed(tokens)

    def advance(self, layer: Layer) -> None:
        """Run all chunks through one layer. Raises BadInput when its output is not finite."""
        for sublayer in layer.sublayers:
            match sublayer.operation:
                case Attention():
                    attention(sublayer.operation, self.hidden, sublayer.norm, self.model.load)
                case Mamba2():
                    mamba(sublayer.operation, self.hidden, sublayer.norm, self.model.load)
                case MLP():
                    mlp(sublayer.operation, self.hidden, sublayer.norm, self.model.load)
                case MoE():
                    moe(sublayer.operation, self.hidden, sublayer.norm, self.model.load)
            if not math.isfinite(float(self.hidden.sum())):
                block = type(sublayer.operation).__name__
                raise BadInput(f"{self.model.path}: layer {layer.index}, {block}: the output is NaN or infinite")

    def final_states(self, positions: slice) -> Tensor:
        """States ready for the head, [chunks * positions, hidden size], of the given positions of every chunk."""
        states = self.hidden[:, positions].flatten(0, 1)
        return normaliser(self.model.graph.final_norm, self.model.load)(states)

    def head_blocks(self) -> Iterator[Tensor]:
        """The rows of the output projection, [block rows, hidden size] at a time, in vocabulary order."""
        rows = self.model.graph.vocabulary_size
        for start in range(0, rows, _BLOCK_ROWS):
            yield self.model.load(self.model.graph.head, None, (start, min(start + _BLOCK_ROWS, rows)))

    def _embed(self, tokens: Tensor) -> Tensor:
        embedding = self.model.graph.embedding
        rows, columns = embedding.shape
        hidden = torch.empty((*tokens.shape, columns))
        for start in range(0, rows, _BLOCK_ROWS):
            inside = (tokens >= start) & (tokens < start + _BLOCK_ROWS)
            if inside.any():
                block = self.model.load(embedding, None, (start, min(start + _BLOCK_ROWS, rows)))
                hidden[inside] = block[tokens[inside] - start]
        return hidden
