"""A model's hidden states for a set of token chunks, advanced one layer at a time.

Memory holds the states, one layer's dense weights and one expert; nothing of the model stays between layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.graph import MLP, Attention, CompressedAttention, Layer, MoE, Operation
from ..sources.model import Model
from .blocks import attention, mlp, moe, normaliser
from .compressed_attention import CompressedAttentionMixer
from .residual import residual_of

_BLOCK_ROWS = 4096  # vocabulary rows of the embedding or the head in memory at a time


class Stream:
    """Runs `tokens` [chunks, context] through `model`.

    `hidden` is the residual: float32 [chunks, context, hidden size], or with hyper-connections
    [chunks, context, streams, hidden size].
    """

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.model = model
        self.tokens = tokens
        self._residual = residual_of(model.graph, model.load)
        self.hidden = self._residual.begin(self._embed(tokens))

    def advance(self, layer: Layer) -> None:
        """Run all chunks through one layer. Raises BadInput when its output is not finite."""
        for sublayer in layer.sublayers:
            branch = self._residual.branch(sublayer, self.hidden)
            normed = normaliser(sublayer.norm, self.model.load)(branch.input)
            branch.join(self._run(sublayer.operation, normed))
            if not math.isfinite(float(self.hidden.sum())):
                block = type(sublayer.operation).__name__
                raise BadInput(f"{self.model.path}: layer {layer.index}, {block}: the output is NaN or infinite")

    def _run(self, operation: Operation, normed: Tensor) -> Tensor:
        """[chunks, tokens, hidden size] -> the same shape."""
        match operation:
            case Attention():
                return attention(operation, normed, self.model.load)
            case CompressedAttention():
                mixer = CompressedAttentionMixer(operation, self.model.load)
                return torch.stack([mixer(chunk, mixer.initial_state())[0] for chunk in normed])
            case MoE():
                return moe(operation, normed, self.tokens, self.model.load)
            case MLP():
                return mlp(operation, normed, self.model.load)
        raise AssertionError(operation)

    def final_states(self, positions: slice) -> Tensor:
        """States ready for the head, [chunks * positions, hidden size], of the given positions of every chunk."""
        states = self._residual.end(self.hidden[:, positions]).flatten(0, 1)
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
