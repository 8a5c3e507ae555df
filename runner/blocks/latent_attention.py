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
from .indexer import TokenIndexerMixer, only
from .rotary import rotate


@dataclass(frozen=True)
class LatentAttentionState:
    """What keys and values of all tokens so far are made of, [tokens, remembered size], and by what they are chosen.

    `index_keys` are an indexer's, [tokens, its head size].
    """

    latents: Tensor
    index_keys: Tensor


class LatentAttentionMixer:
    """The operation with its weights."""

    def __init__(self, operation: LatentAttention, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights
        self._normalize_query = normalizer(operation.query_norm, weights) if operation.query_norm else None
        self._normalize_latent = normalizer(operation.key_value_norm, weights)
        self._indexer = TokenIndexerMixer(operation.indexer, weights) if operation.indexer else None

    def initial_state(self) -> LatentAttentionState:
        """The state before the first token."""
        o = self._operation
        latents = torch.empty(0, o.remembered_size, device=self._weights.device)
        return LatentAttentionState(latents, latents.new_empty(0, o.indexer.head_size if o.indexer else 0))

    def __call__(
        self, states: Tensor, memory: LatentAttentionState, context: Context
    ) -> tuple[Tensor, LatentAttentionState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        memory = self._with(states, memory, context.positions)
        outputs, choices = [], []
        for part in torch.arange(len(states), device=states.device).split(self._operation.TOKENS):
            positions, chosen = context.positions[part], self._chosen_elsewhere(context, part)
            output, chosen = self._answer(states[part], positions, memory, chosen)
            outputs.append(output)
            choices.append(chosen)
        if context.shares:
            context.shared[context.layer] = torch.cat([chosen for chosen in choices if chosen is not None]).float()
        return torch.cat(outputs), memory

    def _chosen_elsewhere(self, context: Context, part: Tensor) -> Tensor | None:
        """What some of the tokens attend to as another layer has it, int64 [tokens, chosen]."""
        source = self._operation.selection_of
        return None if source is None else context.shared[source][part].long()

    def _with(self, states: Tensor, memory: LatentAttentionState, positions: Tensor) -> LatentAttentionState:
        """What is remembered once these tokens are."""
        latents = torch.cat((memory.latents, self._remembered(states, positions)))
        if not self._indexer:
            return LatentAttentionState(latents, memory.index_keys)
        return LatentAttentionState(latents, torch.cat((memory.index_keys, self._indexer.keys(states, positions))))

    def _remembered(self, states: Tensor, positions: Tensor) -> Tensor:
        """[tokens, hidden size] -> normed latents and rotated keys, [tokens, remembered size]"""
        o = self._operation
        latent, key = self._weights.project(states, o.key_value_down).split((o.latent_size, o.rope.size), dim=-1)
        return torch.cat((self._normalize_latent(latent), rotate(key, o.rope, positions)), dim=-1)

    def _answer(
        self, states: Tensor, positions: Tensor, memory: LatentAttentionState, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Of tokens that are remembered already, [tokens, hidden size], their outputs, and which keys they attend to.

        These are int64 [tokens, chosen], None where they are all before.
        """
        o, keys = self._operation, memory.latents
        latent = self._query_latent(states)
        query = rotate(split_heads(self._weights.project(latent, o.query), o.heads), o.rope, positions)
        unturned, turned = query.split((o.key_size, o.rope.size), dim=-1)
        query = torch.cat((self._project_heads(unturned, o.key_up), turned), dim=-1)
        visible = positions[:, None] >= torch.arange(len(keys), device=keys.device)
        if self._indexer:
            chosen = self._indexer.best(states, latent, positions, memory.index_keys, visible)
        visible = visible if chosen is None else only(chosen, visible)
        shares = (query @ keys.T * o.scale).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        mixed = self._project_heads(shares @ keys[:, : o.latent_size], o.value_up)
        return self._weights.project(mixed.transpose(0, 1).flatten(1), o.output), chosen

    def _query_latent(self, states: Tensor) -> Tensor:
        """What queries are made of."""
        o = self._operation
        if o.query_down is None or self._normalize_query is None:
            return states
        return self._normalize_query(self._weights.project(states, o.query_down))

    def _project_heads(self, states: Tensor, weight: Weight) -> Tensor:
        """[heads, tokens, columns] -> [heads, tokens, rows], each head by its own matrix"""
        return torch.stack([self._weights.project(part, weight, head) for head, part in enumerate(states)])
