"""Grouped-query attention over everything before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.graph import Attention
from .blocks import Load, normaliser, split_heads
from .rotary import rotate


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of all tokens seen, [key-value heads, tokens, head size] each."""

    keys: Tensor
    values: Tensor


class AttentionMixer:
    """The operation with its weights loaded."""

    def __init__(self, operation: Attention, load: Load) -> None:
        self._operation = operation
        self._query, self._key, self._value = load(operation.query), load(operation.key), load(operation.value)
        self._output = load(operation.output)
        self._normalise_query = normaliser(operation.query_norm, load)
        self._normalise_key = normaliser(operation.key_norm, load)

    def initial_state(self) -> AttentionState:
        """The state before the first token."""
        nothing = torch.empty(self._operation.key_value_heads, 0, self._operation.head_size)
        return AttentionState(nothing, nothing)

    def __call__(self, states: Tensor, memory: AttentionState) -> tuple[Tensor, AttentionState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        o, past = self._operation, memory.keys.shape[1]
        positions = past + torch.arange(len(states))
        query = split_heads(self._normalise_query(states @ self._query.T), o.heads)
        key = split_heads(self._normalise_key(states @ self._key.T), o.key_value_heads)
        value = split_heads(states @ self._value.T, o.key_value_heads)
        keys = torch.cat((memory.keys, rotate(key, o.rope, positions)), dim=1)
        values = torch.cat((memory.values, value), dim=1)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, o.rope, positions)[None],
            keys[None],
            values[None],
            attn_mask=torch.ones(len(states), keys.shape[1], dtype=torch.bool).tril(past),
            enable_gqa=True,
        )  # [1, heads, tokens, head size]
        return mixed[0].transpose(0, 1).flatten(1) @ self._output.T, AttentionState(keys, values)
