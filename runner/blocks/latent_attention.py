"""Multi-head latent attention in torch: queries are taken to the latents, which are all that is remembered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...archs.graph import LatentAttention
from ...archs.weights import Weight
from ..weights import Weights
from .common import normalizer, split_heads
from .context import Context
from .rotary import rotate


@dataclass(frozen=True)
class LatentAttentionState:
    """What keys and values of all tokens so far are made of, [tokens, remembered size]."""

    latents: Tensor


class LatentAttentionMixer:
    """The operation with its weights."""

    def __init__(self, operation: LatentAttention, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights
        self._normalize_query = normalizer(operation.query_norm, weights) if operation.query_norm else None
        self._normalize_latent = normalizer(operation.key_value_norm, weights)

    def initial_state(self) -> LatentAttentionState:
        """The state before the first token."""
        return LatentAttentionState(torch.empty(0, self._operation.remembered_size, device=self._weights.device))

    def __call__(
        self, states: Tensor, memory: LatentAttentionState, context: Context
    ) -> tuple[Tensor, LatentAttentionState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        memory = LatentAttentionState(torch.cat((memory.latents, self._remembered(states, context.positions))))
        step = self._operation.TOKENS
        parts = zip(states.split(step), context.positions.split(step), strict=True)
        return torch.cat([self._answer(part, positions, memory) for part, positions in parts]), memory

    def _remembered(self, states: Tensor, positions: Tensor) -> Tensor:
        """[tokens, hidden size] -> normed latents and rotated keys, [tokens, remembered size]"""
        o = self._operation
        latent, key = self._weights.project(states, o.key_value_down).split((o.latent_size, o.rope.size), dim=-1)
        return torch.cat((self._normalize_latent(latent), rotate(key, o.rope, positions)), dim=-1)

    def _answer(self, states: Tensor, positions: Tensor, memory: LatentAttentionState) -> Tensor:
        """[tokens, hidden size] -> [tokens, hidden size], of tokens that are remembered already"""
        o, keys = self._operation, memory.latents
        latent = self._query_latent(states)
        query = rotate(split_heads(self._weights.project(latent, o.query), o.heads), o.rope, positions)
        unturned, turned = query.split((o.key_size, o.rope.size), dim=-1)
        query = torch.cat((self._project_heads(unturned, o.key_up), turned), dim=-1)
        visible = positions[:, None] >= torch.arange(len(keys), device=keys.device)
        shares = (query @ keys.T * o.scale).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        mixed = self._project_heads(shares @ keys[:, : o.latent_size], o.value_up)
        return self._weights.project(mixed.transpose(0, 1).flatten(1), o.output)

    def _query_latent(self, states: Tensor) -> Tensor:
        """What queries are made of."""
        o = self._operation
        if o.query_down is None or self._normalize_query is None:
            return states
        return self._normalize_query(self._weights.project(states, o.query_down))

    def _project_heads(self, states: Tensor, weight: Weight) -> Tensor:
        """[heads, tokens, columns] -> [heads, tokens, rows], each head by its own matrix"""
        return torch.stack([self._weights.project(part, weight, head) for head, part in enumerate(states)])
