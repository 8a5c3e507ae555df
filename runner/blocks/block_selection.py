"""The choice of blocks of tokens that attention looks at (see `graph.BlockSelection`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import BlockSelection
from ..weights import Weights
from .common import normalizer, split_heads
from .rotary import rotate


class BlockSelector:
    """A selection with its weights."""

    def __init__(self, block: BlockSelection, weights: Weights) -> None:
        self._block, self._weights = block, weights
        self._normalize_query = normalizer(block.query_norm, weights)
        self._normalize_key = normalizer(block.key_norm, weights)

    def __call__(self, states: Tensor, memory: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Index keys of all tokens seen, and which of these each key-value head shows, bool [heads, tokens, keys].

        Args:
            states: of the new tokens, [tokens, hidden size].
            memory: index keys of those before, [tokens, head size].
            positions: of the new tokens.
        """
        own = self._normalize_key(self._weights.project(states, self._block.key))
        own = rotate(own, self._block.rope, positions)
        keys = own if memory is None else torch.cat((memory, own))
        return keys, self._choose(states, keys, positions)

    def _choose(self, states: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Whole blocks, also what of them is not past."""
        block = self._block
        queries = split_heads(self._weights.project(states, block.query), block.heads)
        queries = rotate(self._normalize_query(queries), block.rope, positions)
        future = torch.arange(len(keys), device=keys.device) > positions[:, None]
        scores = (queries @ keys.T).masked_fill(future, -torch.inf)
        scores = functional.pad(scores, (0, -len(keys) % block.block_size), value=-torch.inf)
        best = scores.unflatten(-1, (-1, block.block_size)).amax(dim=-1)  # [heads, tokens, blocks]
        before = positions[:, None] // block.block_size - torch.arange(best.shape[-1], device=keys.device)
        best = best.masked_fill((before >= 0) & (before < block.local), torch.inf)
        chosen = best.topk(min(block.top_k, best.shape[-1]), dim=-1).indices
        shown = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
        return shown.repeat_interleave(block.block_size, dim=-1)[..., : len(keys)]
