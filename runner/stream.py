"""A model's hidden states for a set of token chunks, advanced one layer at a time.

Memory holds the states, one layer's dense weights and one expert; nothing of the model stays between layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.graph import MLP, Attention, CompressedAttention, Layer, Mamba2, MoE, Operation
from ..sources.model import Model
from .attention import AttentionMixer
from .blocks import mlp, moe, normaliser
from .compressed_attention import CompressedAttentionMixer
from .mamba import MambaMixer
from .residual import residual_of

_BLOCK_ROWS = 4096  # vocabulary rows of the embedding or the head in memory at a time


class Mixer(Protocol):
    """An operation through which the tokens of a chunk act on later ones, with its weights loaded."""

    def initial_state(self) -> Any:
        """The state before the first token."""

    def __call__(self, states: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""


Cache = dict[tuple[int, int, int], Any]  # (layer, sublayer, chunk) -> what a mixer remembers


class Stream:
    """Runs `tokens` [chunks, context] through `model`.

    `hidden` is the residual: float32 [chunks, context, hidden size], or with hyper-connections
    [chunks, context, streams, hidden size]. With a `cache`, the tokens follow those of the stream that filled it.
    """

    def __init__(self, model: Model, tokens: Tensor, cache: Cache | None = None) -> None:
        self.model = model
        self.tokens = tokens
        self._cache = cache
        self._residual = residual_of(model.graph, model.load)
        self.hidden = self._residual.begin(self._embed(tokens))

    def advance(self, layer: Layer) -> None:
        """Run all chunks through one layer. Raises BadInput when its output is not finite."""
        for number, sublayer in enumerate(layer.sublayers):
            branch = self._residual.branch(sublayer, self.hidden)
            normed = normaliser(sublayer.norm, self.model.load)(branch.input)
            branch.join(self._run(sublayer.operation, normed, (layer.index, number)))
            if not math.isfinite(float(self.hidden.sum())):
                block = type(sublayer.operation).__name__
                raise BadInput(f"{self.model.path}: layer {layer.index}, {block}: the output is NaN or infinite")

    def _run(self, operation: Operation, normed: Tensor, place: tuple[int, int]) -> Tensor:
        """[chunks, tokens, hidden size] -> the same shape."""
        load = self.model.load
        match operation:
            case Attention():
                return self._mix(AttentionMixer(operation, load), normed, place)
            case CompressedAttention():
                return self._mix(CompressedAttentionMixer(operation, load), normed, place)
            case Mamba2():
                return self._mix(MambaMixer(operation, load), normed, place)
            case MoE():
                return moe(operation, normed, self.tokens, load)
            case MLP():
                return mlp(operation, normed, load)

    def _mix(self, mixer: Mixer, normed: Tensor, place: tuple[int, int]) -> Tensor:
        """One chunk at a time, because the scores of a chunk are [heads, tokens, keys]."""
        outputs = []
        for number, chunk in enumerate(normed):
            past = self._cache.get((*place, number)) if self._cache is not None else None
            output, state = mixer(chunk, past or mixer.initial_state())
            outputs.append(output)
            if self._cache is not None:
                self._cache[*place, number] = state
        return torch.stack(outputs)

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
