"""The choice of what a token attends to (see `graph.Indexer`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import Indexer, TokenIndexer
from ..weights import Weights
from .common import normalizer, split_heads
from .rotary import rotate


class IndexerMixer:
    """An indexer with its weights; the keys it chooses from are made elsewhere."""

    def __init__(self, block: Indexer, weights: Weights) -> None:
        self._block, self._weights = block, weights

    def best(self, states: Tensor, latent: Tensor, positions: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        """The keys that each token attends to, int64 [tokens, chosen], as far as they are `visible` to it.

        Of keys with equal scores, which are zero where no head's key matches, the earliest are taken.

        Args:
            states: [tokens, hidden size].
            latent: the attention's latent queries, [tokens, latent size].
            positions: [tokens].
            keys: [keys, head size].
            visible: bool [tokens, keys].
        """
        block, project = self._block, self._weights.project
        queries = rotate(split_heads(project(latent, block.query), block.heads), block.rope, positions)
        shares = project(states, block.head_weight) * (block.heads * block.head_size) ** -0.5  # [tokens, heads]
        scores = torch.einsum("hte,th->te", functional.relu(queries @ keys.T), shares)
        ranking = scores.masked_fill(~visible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        return ranking[:, : block.top_k]


class TokenIndexerMixer(IndexerMixer):
    """An indexer that makes a key of each token."""

    def __init__(self, block: TokenIndexer, weights: Weights) -> None:
        super().__init__(block, weights)
        self._key, self._normalize_key = block.key, normalizer(block.key_norm, weights)

    def keys(self, states: Tensor, positions: Tensor) -> Tensor:
        """[tokens, hidden size] -> [tokens, head size]"""
        return rotate(self._normalize_key(self._weights.project(states, self._key)), self._block.rope, positions)


def only(best: Tensor, visible: Tensor) -> Tensor:
    """Of what is visible, bool [tokens, keys], the keys of these numbers alone, int64 [tokens, chosen]."""
    return torch.zeros_like(visible).scatter_(1, best, True) & visible
