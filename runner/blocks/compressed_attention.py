"""Attention to a window of tokens and to compressed entries of everything before (see `graph.CompressedAttention`).

Any number of tokens runs from any state, so that a prompt, a piece of it and a single step are the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import CompressedAttention, Compressor
from ..weights import Weights
from .common import normalizer, split_heads
from .context import Context
from .indexer import IndexerMixer, only
from .rotary import rotate


@dataclass(frozen=True)
class CompressorState:
    """Finished entries [entries, size], and what unfinished ones need.

    `values` and `gates` [tokens, width] belong to the window that is not complete yet; the first halves of the last
    complete window's, `previous_*` [ratio, size], go into the next entry where entries overlap.
    """

    entries: Tensor
    values: Tensor
    gates: Tensor
    previous_values: Tensor
    previous_gates: Tensor


@dataclass(frozen=True)
class CompressedAttentionState:
    """Number of tokens seen, the last rotated keys [tokens, head size], and the states of both compressors."""

    tokens: int
    keys: Tensor
    compressor: CompressorState | None
    indexer: CompressorState | None


class CompressedAttentionMixer:
    """The operation with its weights."""

    def __init__(self, operation: CompressedAttention, weights: Weights) -> None:
        self._operation, self._weights = operation, weights
        self._sink = weights.load(operation.sink)
        self._normalize_query = normalizer(operation.query_norm, weights)
        self._normalize_key = normalizer(operation.key_value_norm, weights)
        self._compressor = CompressorMixer(operation.compressor, weights) if operation.compressor else None
        indexer = operation.indexer
        self._indexer = IndexerMixer(indexer, weights) if indexer else None
        self._index_compressor = CompressorMixer(indexer.compressor, weights) if indexer else None

    def initial_state(self) -> CompressedAttentionState:
        """The state before the first token."""
        return CompressedAttentionState(
            tokens=0,
            keys=torch.empty(0, self._operation.head_size, device=self._weights.device),
            compressor=self._compressor.initial_state() if self._compressor else None,
            indexer=self._index_compressor.initial_state() if self._index_compressor else None,
        )

    def __call__(
        self, states: Tensor, memory: CompressedAttentionState, context: Context
    ) -> tuple[Tensor, CompressedAttentionState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        outputs = []
        for part in states.split(self._operation.TOKENS) if context.causal else (states,):
            output, memory = self._run(part, memory, context.causal)
            outputs.append(output)
        return torch.cat(outputs), memory

    def remember(self, states: Tensor, memory: CompressedAttentionState) -> CompressedAttentionState:
        """What later tokens see of states [tokens, hidden size] that ask for nothing; without a compressor."""
        assert not self._compressor
        positions = memory.tokens + torch.arange(len(states), device=states.device)
        window = torch.cat((memory.keys, self._keys(states, positions)))
        return CompressedAttentionState(memory.tokens + len(states), window[1 - self._operation.window :], None, None)

    def _keys(self, states: Tensor, positions: Tensor) -> Tensor:
        o = self._operation
        return rotate(self._normalize_key(self._weights.project(states, o.key_value)), o.rope, positions)

    def _run(
        self, states: Tensor, memory: CompressedAttentionState, causal: bool
    ) -> tuple[Tensor, CompressedAttentionState]:
        o, project = self._operation, self._weights.project
        positions = memory.tokens + torch.arange(len(states), device=states.device)
        latent = self._normalize_query(project(states, o.query_down))
        queries = split_heads(project(latent, o.query_up), o.heads)
        queries = rotate(functional.rms_norm(queries, (o.head_size,), eps=o.query_norm.epsilon), o.rope, positions)
        keys = window = torch.cat((memory.keys, self._keys(states, positions)))
        distance = positions[:, None] - (memory.tokens - len(memory.keys) + torch.arange(len(keys), device=keys.device))
        visible = (distance >= 0) & (distance < o.window) if causal else distance < o.window
        compressed = indexed = None
        if self._compressor and memory.compressor:
            compressed = self._compressor(states, memory.compressor)
            entries = torch.arange(len(compressed.entries), device=keys.device)
            complete = (positions[:, None] + 1) // self._compressor.ratio > entries
            if self._indexer and self._index_compressor and memory.indexer:
                indexed = self._index_compressor(states, memory.indexer)
                complete = only(self._indexer.best(states, latent, positions, indexed.entries, complete), complete)
            keys, visible = torch.cat((keys, compressed.entries)), torch.cat((visible, complete), dim=1)
        mixed = rotate(self._attend(queries, keys, visible), o.rope, -positions)
        state = CompressedAttentionState(memory.tokens + len(states), window[1 - o.window :], compressed, indexed)
        return self._project(mixed), state

    def _attend(self, queries: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """queries [heads, tokens, size], keys [keys, size], visible [tokens, keys] -> [heads, tokens, size]"""
        scores = (queries @ keys.T * self._operation.head_size**-0.5).masked_fill(~visible, -torch.inf)
        sink = self._sink[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1] @ keys

    def _project(self, heads: Tensor) -> Tensor:
        """[heads, tokens, size] -> [tokens, hidden size]"""
        o = self._operation
        groups = heads.transpose(0, 1).reshape(heads.shape[1], o.groups, -1).transpose(0, 1)
        inner = self._weights.project_groups(groups, o.output_down).transpose(0, 1).flatten(1)
        return self._weights.project(inner, o.output_up)


class CompressorMixer:
    """A compressor with its weights: tokens in, a state with more entries out."""

    def __init__(self, block: Compressor, weights: Weights) -> None:
        self._block, self._weights = block, weights
        self._position = weights.load(block.position)
        self._normalize = normalizer(block.norm, weights)
        self.ratio = block.ratio

    def initial_state(self) -> CompressorState:
        """The state before the first token."""
        width, size = self._block.value.shape[0], self._block.norm.weight.columns
        none = torch.zeros(self.ratio, size, device=self._weights.device)
        nothing = none.new_empty(0, width)
        return CompressorState(none[:0], nothing, nothing, none, torch.full_like(none, -torch.inf))

    def __call__(self, states: Tensor, memory: CompressorState) -> CompressorState:
        """states: [tokens, hidden size] that follow those the state has seen."""
        slots = (len(memory.values) + torch.arange(len(states), device=states.device)) % self.ratio
        project, block = self._weights.project, self._block
        values = torch.cat((memory.values, project(states, block.value)))
        gates = torch.cat((memory.gates, project(states, block.gate) + self._position[slots]))
        complete = len(values) // self.ratio * self.ratio
        ready_values, previous_values = self._slots(values[:complete], memory.previous_values)
        ready_gates, previous_gates = self._slots(gates[:complete], memory.previous_gates)
        pooled = self._normalize((ready_values * ready_gates.softmax(dim=1)).sum(dim=1))
        starts = self.ratio * (len(memory.entries) + torch.arange(len(pooled), device=pooled.device))
        entries = torch.cat((memory.entries, rotate(pooled, self._block.rope, starts)))
        return CompressorState(entries, values[complete:], gates[complete:], previous_values, previous_gates)

    def _slots(self, tokens: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, width] in whole windows -> what each entry pools [entries, slots, size], and the new `previous`."""
        windows = tokens.unflatten(0, (-1, self.ratio))
        if not self._block.overlaps:
            return windows, previous
        for_next, own = windows.chunk(2, dim=-1)
        before = torch.cat((previous[None], for_next))
        return torch.cat((before[:-1], own), dim=1), before[-1]
