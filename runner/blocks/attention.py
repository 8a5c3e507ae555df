"""Grouped-query attention over everything before, a window or selected blocks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import Attention, Norm, Rope
from ...archs.weights import Weight
from ..weights import Weights
from .block_selection import BlockSelector
from .common import normalizer, split_heads
from .context import Context
from .rotary import rotate


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of all tokens that later ones may see, [key-value heads, tokens, head size] each.

    Where blocks of tokens are selected, there are index keys [tokens, index head size] too.
    """

    keys: Tensor
    values: Tensor
    index_keys: Tensor | None = None


class AttentionMixer:
    """The operation with its weights."""

    def __init__(self, operation: Attention, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights
        self._prepare_query = _preparation(operation.query_norm, operation.heads, operation.rope, weights)
        self._prepare_key = _preparation(operation.key_norm, operation.key_value_heads, operation.rope, weights)
        self._selector = BlockSelector(operation.selection, weights) if operation.selection else None

    def initial_state(self) -> AttentionState:
        """The state before the first token."""
        nothing = torch.empty(
            self._operation.key_value_heads, 0, self._operation.head_size, device=self._weights.device
        )
        return AttentionState(nothing, nothing)

    def __call__(self, states: Tensor, memory: AttentionState, context: Context) -> tuple[Tensor, AttentionState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        o, positions = self._operation, context.positions
        query, gate = self._query_and_gate(states)
        query = self._prepare_query(query, positions)
        if o.keys_of is None:
            keys, values = self._keys_and_values(states, memory, positions)
            if context.shares:
                context.shared[context.layer] = torch.cat((keys, values)).transpose(0, 1).flatten(1)
        else:
            shared = split_heads(context.shared[o.keys_of], 2 * o.key_value_heads)
            keys, values = shared.chunk(2)
        count = torch.arange(keys.shape[1], device=keys.device)
        distance = positions[:, None] - (positions[-1] + 1 - keys.shape[1] + count)
        visible = distance >= 0 if o.window is None else (distance >= 0) & (distance < o.window)
        index_keys = None
        if self._selector:
            index_keys, chosen = self._selector(states, memory.index_keys, positions)
            visible = visible & chosen
        mixed = self._attend(query, keys, values, visible).transpose(0, 1).flatten(1)
        mixed = mixed if gate is None else mixed * gate.sigmoid()
        return self._projected(mixed, o.output, o.output_bias), self._remembered(keys, values, index_keys)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """query [heads, tokens, head size], visible [tokens, keys] -> [heads, tokens, head size]

        Where key-value heads differ in what is `visible`, it is [key-value heads, tokens, keys].
        A sink is one key more that all tokens see, and as a value it adds nothing. Its score is the head's logit:
        queries have that in a dimension of its own, in which the sink is 1 and other keys are 0.
        """
        o = self._operation
        if o.sink:
            logits = self._weights.load(o.sink)[:, None, None] / o.softmax_scale
            query = torch.cat((query, logits.expand(-1, query.shape[1], 1)), dim=-1)
            keys, values = (functional.pad(states, (0, 1, 1, 0)) for states in (keys, values))
            keys[:, 0, -1] = 1
            visible = functional.pad(visible, (1, 0), value=True)
        apart = 1 if visible.dim() == 2 else o.key_value_heads  # how many are attended to each by itself
        query, keys, values = (states.unflatten(0, (apart, -1)) for states in (query, keys, values))
        mask = visible if apart == 1 else visible[:, None]
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=o.softmax_scale, enable_gqa=True
        )
        return mixed.flatten(0, 1)[..., : o.head_size]

    def _query_and_gate(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """What heads ask and how much of the answer they let through, [tokens, heads * head size] each."""
        o = self._operation
        projected = self._projected(states, o.query, o.query_bias)
        if not o.gated:
            return projected, None
        query, gate = projected.unflatten(1, (o.heads, 2, -1)).unbind(2)
        return query.flatten(1), gate.flatten(1)

    def _keys_and_values(self, states: Tensor, memory: AttentionState, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens seen, the new ones last."""
        o = self._operation
        assert o.key
        key = self._projected(states, o.key, o.key_bias)
        value = split_heads(self._projected(states, o.value, o.value_bias) if o.value else key, o.key_value_heads)
        if o.value_epsilon is not None:
            value = functional.rms_norm(value, value.shape[-1:], None, o.value_epsilon)
        keys = torch.cat((memory.keys, self._prepare_key(key, positions)), dim=1)
        return keys, torch.cat((memory.values, value), dim=1)

    def _projected(self, states: Tensor, weight: Weight, bias: Weight | None) -> Tensor:
        projected = self._weights.project(states, weight)
        return projected + self._weights.load(bias) if bias else projected

    def _remembered(self, keys: Tensor, values: Tensor, index_keys: Tensor | None) -> AttentionState:
        """Nothing of another layer's, and of a window what the next token will see."""
        o, count = self._operation, keys.shape[1]
        first = count if o.keys_of is not None else 0 if o.window is None else max(0, count + 1 - o.window)
        return AttentionState(keys[:, first:], values[:, first:], index_keys)


def _preparation(
    norm: Norm | None, heads: int, rope: Rope | None, weights: Weights
) -> Callable[[Tensor, Tensor], Tensor]:
    """What happens to projected queries or keys [tokens, width] before they meet: norm, head split, rotation."""
    normalize = normalizer(norm, weights) if norm else None
    divisors = weights.load(rope.divisors) if rope and rope.divisors else None

    def prepare(states: Tensor, positions: Tensor) -> Tensor:
        if normalize and norm and norm.weight.columns == states.shape[-1]:
            heads_apart = split_heads(normalize(states), heads)
        else:
            heads_apart = split_heads(states, heads)
            heads_apart = normalize(heads_apart) if normalize else heads_apart
        return rotate(heads_apart, rope, positions, divisors) if rope else heads_apart

    return prepare
