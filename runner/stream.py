"""Streams: hidden states of token chunks, advanced one layer at a time, several streams together.

Memory holds the states, the dense weights of one sublayer and one expert; nothing of a model stays between layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..archs.graph import MLP, Attention, CompressedAttention, Layer, Mamba2, MoE, SubLayer
from ..errors import BadInput
from ..sources.model import Model, pieces
from .activations import Activations, Workspace
from .blocks.attention import AttentionMixer
from .blocks.common import mlp, normalizer
from .blocks.compressed_attention import CompressedAttentionMixer
from .blocks.experts import RoutedTokens, run_experts
from .blocks.mamba import MambaMixer
from .blocks.residual import residual_of
from .weights import ModelWeights, Weights, multiply

_TOKENS = 1024  # embedded at a time


class Mixer(Protocol):
    """An operation through which the tokens of a chunk act on later ones."""

    def initial_state(self) -> Any:
        """The state before the first token."""

    def __call__(self, states: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""


Cache = dict[tuple[int, int, int], Any]  # (layer, sublayer, chunk) -> what a mixer remembers
Block = Callable[[int, Tensor], Tensor]  # (chunk, normed states [tokens, hidden size]) -> the same shape


class Stream:
    """Runs `tokens` [chunks, context] through `weights`, by default those of `model` as they are stored.

    `hidden` is the residual: [chunks, context, hidden size], or with hyper-connections
    [chunks, context, streams, hidden size]. With a `cache`, the tokens follow those of the stream that filled it.
    A stream that goes on where another stopped is given that one's `hidden`, chunk by chunk.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        cache: Cache | None = None,
        weights: Weights | None = None,
        hidden: Iterable[Tensor] | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.weights = weights or ModelWeights(model)
        self._cache = cache
        self._residual = residual_of(self.weights)
        self._workspace = workspace or Workspace()
        self.hidden = self._workspace.activations(*tokens.shape, *self._residual.width, whole_chunks=True)
        if hidden is None:
            self._embed()
        else:
            for chunk, states in enumerate(hidden):
                self.hidden[chunk] = states

    def advance(self, layer: Layer) -> None:
        """Run all chunks through one layer. Raises BadInput when its output is not finite."""
        advance([self], [layer])

    def before_experts(self, layer: Layer, number: int) -> RoutedTokens | None:
        """Run all chunks through a sublayer; through a MoE only up to its experts, which are given back."""
        sublayer = layer.sublayers[number]
        operation = sublayer.operation
        if not isinstance(operation, MoE):
            self._pass(layer, sublayer, self._block(operation, (layer.index, number)))
            return None
        experts = RoutedTokens(
            operation, self.weights, self.tokens, self._workspace, f"{self.weights.label}: layer {layer.index}"
        )
        normalize = normalizer(sublayer.norm, self.weights)
        for chunk in range(len(self.hidden)):
            experts.route(normalize(self._residual.branch(sublayer, self.hidden[chunk]).input))
        experts.finish_routing()
        return experts

    def after_experts(self, layer: Layer, number: int, experts: RoutedTokens) -> None:
        """Complete a MoE whose experts have run."""
        self._pass(layer, layer.sublayers[number], experts.answer)

    def _pass(self, layer: Layer, sublayer: SubLayer, block: Block) -> None:
        normalize = normalizer(sublayer.norm, self.weights)
        for chunk in range(len(self.hidden)):
            branch = self._residual.branch(sublayer, self.hidden[chunk])
            joined = branch.join(block(chunk, normalize(branch.input)))
            if not math.isfinite(float(joined.sum())):
                name = type(sublayer.operation).__name__
                raise BadInput(f"{self.weights.label}: layer {layer.index}, {name}: the output is NaN or infinite")
            self.hidden[chunk] = joined

    def _block(self, operation: Attention | CompressedAttention | Mamba2 | MLP, place: tuple[int, int]) -> Block:
        match operation:
            case Attention():
                return self._mixed(AttentionMixer(operation, self.weights), place)
            case CompressedAttention():
                return self._mixed(CompressedAttentionMixer(operation, self.weights), place)
            case Mamba2():
                return self._mixed(MambaMixer(operation, self.weights), place)
            case MLP():
                return lambda _, normed: mlp(operation, normed, self.weights)

    def _mixed(self, mixer: Mixer, place: tuple[int, int]) -> Block:
        def block(chunk: int, normed: Tensor) -> Tensor:
            past = self._cache.get((*place, chunk)) if self._cache is not None else None
            output, state = mixer(normed, past or mixer.initial_state())
            if self._cache is not None:
                self._cache[*place, chunk] = state
            return output

        return block

    def final_states(self, positions: slice) -> Tensor:
        """States ready for the head, [chunks * positions, hidden size], of the given positions of every chunk."""
        return torch.cat([self.final(chunk, positions) for chunk in range(len(self.hidden))])

    def final_activations(self, positions: slice) -> Activations:
        """The same for texts of any length, [chunks, positions, hidden size]."""
        count = len(range(self.tokens.shape[1])[positions])
        size = self.weights.graph.hidden_size
        final = self._workspace.activations(len(self.hidden), count, size, whole_chunks=True)
        for chunk in range(len(self.hidden)):
            final[chunk] = self.final(chunk, positions)
        return final

    def final(self, chunk: int, positions: slice) -> Tensor:
        """Those of one chunk, [positions, hidden size]."""
        normalize = normalizer(self.weights.graph.final_norm, self.weights)
        return normalize(self._residual.end(self.hidden[chunk][positions]))

    def logits(self, states: Tensor) -> Tensor:
        """Final states [positions, hidden size] -> [positions, vocabulary size]"""
        return torch.cat([multiply(states, block) for block in self.head_blocks()], dim=1)

    def head_blocks(self) -> Iterator[Tensor]:
        """The rows of the output projection, [block rows, hidden size] at a time, in vocabulary order."""
        for _, rows in pieces(self.weights.graph.head):
            yield self.weights.load(self.weights.graph.head, None, rows)
            self.weights.release()

    def _embed(self) -> None:
        embedding, tokens = self.weights.graph.embedding, self.tokens.flatten()
        for _, rows in pieces(embedding):
            assert rows
            places = torch.where((tokens >= rows[0]) & (tokens < rows[1]))[0]
            for part in places.split(_TOKENS) if len(places) else ():
                block = self.weights.load(embedding, None, rows)
                self.hidden.add_rows(part, self._residual.begin(block[tokens[part] - rows[0]]))
            self.weights.release()


def advance(
    streams: Sequence[Stream], layers: Sequence[Layer | None], expert_done: Callable[[int], None] | None = None
) -> None:
    """Run every stream through a layer of its own (None: it has no more), all of them together.

    Streams of the same weights share what is loaded, an expert at a time; `expert_done` is told of each that all of
    them have passed, while it is still loaded. Raises BadInput naming the first block or expert whose output is not
    finite.
    """
    pairs = [(stream, layer) for stream, layer in zip(streams, layers, strict=True) if layer]
    for number in range(max(len(layer.sublayers) for _, layer in pairs)):
        here = [(stream, layer) for stream, layer in pairs if number < len(layer.sublayers)]
        entered = [(stream, layer, stream.before_experts(layer, number)) for stream, layer in here]
        waiting = [(stream, layer, experts) for stream, layer, experts in entered if experts]
        if waiting:
            run_experts([experts for _, _, experts in waiting], expert_done)
        for stream, layer, experts in waiting:
            stream.after_experts(layer, number, experts)
        for stream, _ in here:
            stream.weights.release()
