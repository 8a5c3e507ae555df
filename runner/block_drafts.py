"""Drafts of blocks of tokens (DSpark): what a draft says at many places of a text, all places together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..archs.graph import BlockDraft, Layer
from ..sources.model import Model, pieces
from .activations import Activations, Workspace
from .blocks.common import normalizer
from .blocks.compressed_attention import CompressedAttentionMixer
from .blocks.context import Context
from .stream import Mixer, Stream
from .weights import Weights


class Features:
    """What a draft of blocks reads of its model: the mean of the streams after each of some layers.

    Args:
        sources: numbers of these layers.
    """

    def __init__(self, sources: Sequence[int], workspace: Workspace) -> None:
        self._sources, self._workspace = sources, workspace
        self._kept: dict[int, Activations] = {}

    def passed(self, stream: Stream, layer: Layer) -> None:
        """The model's stream has passed one more layer."""
        if layer.index in self._sources:
            size = stream.weights.graph.hidden_size
            means = self._workspace.activations(*stream.tokens.shape, size, whole_chunks=True)
            for chunk in range(len(means)):
                means[chunk] = stream.hidden[chunk].view(len(stream.hidden[chunk]), -1, size).mean(dim=1)
            self._kept[layer.index] = means

    def of(self, chunk: int) -> Tensor:
        """[tokens, layers * hidden size]"""
        return torch.cat([self._kept[layer][chunk] for layer in self._sources], dim=1)


class BlockStream(Stream):
    """A stream of blocks of tokens that see one another, and keys of the model's tokens before them.

    Its head has more columns than the model's, for what stands before a token.

    Args:
        tokens: blocks of a chunk one after another, [chunks, blocks * size].
        read: what keys are made of, of each token of the text, [chunks, tokens, hidden size].
        places: how many of these come before each block, in ascending order.
    """

    def __init__(
        self,
        draft: Model,
        tokens: Tensor,
        weights: Weights,
        read: Activations,
        places: Sequence[int],
        workspace: Workspace,
    ) -> None:
        super().__init__(draft, tokens, None, weights, workspace=workspace)
        self._read, self._places = read, places

    def _mixed(self, block: Mixer, normed: Tensor, memory: Any, context: Context, chunk: int) -> tuple[Tensor, Any]:
        assert isinstance(block, CompressedAttentionMixer)
        read, seen, outputs = self._read[chunk], 0, []
        for place, own in zip(self._places, normed.chunk(len(self._places)), strict=True):
            memory, seen = block.remember(read[seen:place], memory), place
            outputs.append(block(own, memory, replace(context, causal=False))[0])
        return torch.cat(outputs), memory

    def head_blocks(self) -> Iterator[Tensor]:
        graph, load = self.weights.graph, self.weights.load
        for _, rows in pieces(graph.head):
            yield torch.cat((load(graph.head, None, rows), load(_block_of(self.weights).after, None, rows)), dim=1)
            self.weights.release()


class BlockDrafts:
    """Drafts that begin at many places of a text, each a block; its tokens are told one by one.

    Args:
        draft: what drafts, see `Model.draft`; its weights are `weights`.
        stream: the model's, which has passed all layers, of which `features` knows.
        places: numbers of the last tokens that are known there, in ascending order, from 1.
    """

    def __init__(
        self,
        draft: Model,
        weights: Weights,
        stream: Stream,
        features: Features,
        places: Sequence[int],
        workspace: Workspace,
    ) -> None:
        block = _block_of(weights)
        self._weights, self._size, self._step = weights, block.size, 0
        self._before = stream.tokens[:, list(places)]
        masks = torch.full((*self._before.shape, block.size - 1), block.mask, device=self._before.device)
        tokens = torch.cat((self._before[..., None], masks), dim=2).flatten(1)
        texts = (features.of(chunk)[: places[-1]] for chunk in range(len(tokens)))
        read = self._fused(block, texts, (len(tokens), places[-1]), workspace)
        self._stream = BlockStream(draft, tokens, weights, read, places, workspace)
        for layer in weights.graph.layers:
            self._stream.advance(layer)

    def states(self) -> tuple[Stream, list[Tensor]]:
        """The next token of every draft: the stream that predicts it, and its states of each chunk, [places, size]."""
        block, rows = _block_of(self._weights), slice(self._step, None, self._size)
        before = self._weights.load(block.before)[self._before]
        finals = (self._stream.final(chunk, rows) for chunk in range(len(before)))
        states = [torch.cat(both, dim=1) for both in zip(finals, before, strict=True)]
        self._weights.release()
        return self._stream, states

    def confidence(self) -> Tensor:
        """How sure the draft is that its next token will be accepted, from 0 to 1, [chunks, places]."""
        block, rows = _block_of(self._weights), slice(self._step, None, self._size)
        before = self._weights.load(block.before)[self._before]
        ends = torch.stack([self._stream.end(chunk, rows) for chunk in range(len(before))])
        logits = self._weights.project(torch.cat((ends, before), dim=2).flatten(0, 1), block.confidence)
        self._weights.release()
        return logits.view(before.shape[:2]).sigmoid()

    def take(self, tokens: Tensor) -> None:
        """Go on with the tokens [chunks, places] that were predicted."""
        self._before, self._step = tokens, self._step + 1

    def _fused(
        self, block: BlockDraft, features: Iterable[Tensor], shape: tuple[int, int], workspace: Workspace
    ) -> Activations:
        """What keys are made of: of each chunk's features [tokens, layers * hidden size]."""
        fused = workspace.activations(*shape, self._weights.graph.hidden_size, whole_chunks=True)
        normalize = normalizer(block.norm, self._weights)
        for chunk, own in enumerate(features):
            fused[chunk] = normalize(self._weights.project(own, block.projection))
        self._weights.release()
        return fused


def _block_of(weights: Weights) -> BlockDraft:
    assert weights.graph.block
    return weights.graph.block
