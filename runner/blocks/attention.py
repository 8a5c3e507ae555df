"""Grouped-query attention over everything before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import Attention, Norm, Rope
from ..weights import Weights
from .common import normalizer, split_heads
from .rotary import rotate


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of all tokens seen, [key-value heads, tokens, head size] each."""

    keys: Tensor
    values: Tensor


class AttentionMixer:
    """The operation with its weights."""

    def __init__(self, operation: Attention, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights
        self._prepare_query = _preparation(operation.query_norm, operation.heads, operation.rope, weights)
        self._prepare_key = _preparation(operation.key_norm, operation.key_value_heads, operation.rope, weights)

    def initial_state(self) -> AttentionState:
        """The state before the first token."""
        nothing = torch.empty(self._operation.key_value_heads, 0, self._operation.head_size)
        return AttentionState(nothing, nothing)

    def __call__(self, states: Tensor, memory: AttentionState) -> tuple[Tensor, AttentionState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        o, past = self._operation, memory.keys.shape[1]
        positions = past + torch.arange(len(states))
        query, key, value = (self._weights.project(states, weight) for weight in (o.query, o.key, o.value))
        keys = torch.cat((memory.keys, self._prepare_key(key, positions)), dim=1)
        values = torch.cat((memory.values, split_heads(value, o.key_value_heads)), dim=1)
        mixed = functional.scaled_dot_product_attention(
            self._prepare_query(query, positions)[None],
            keys[None],
            values[None],
            attn_mask=torch.ones(len(states), keys.shape[1], dtype=torch.bool).tril(past),
            enable_gqa=True,
        )  # [1, heads, tokens, head size]
        output = self._weights.project(mixed[0].transpose(0, 1).flatten(1), o.output)
        return output, AttentionState(keys, values)


def _preparation(
    norm: Norm | None, heads: int, rope: Rope | None, weights: Weights
) -> Callable[[Tensor, Tensor], Tensor]:
    """What happens to projected queries or keys [tokens, width] before they meet: norm, head split, rotation."""
    normalize = normalizer(norm, weights) if norm else None

    def prepare(states: Tensor, positions: Tensor) -> Tensor:
        heads_apart = split_heads(normalize(states) if normalize else states, heads)
        return rotate(heads_apart, rope, positions) if rope else heads_apart

    return prepare
