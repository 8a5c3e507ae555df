"""The quantities of DeepSeek V3.2 and GLM-5, and their blocks: latent attention to the tokens that an indexer picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .deepseek_v3_blocks import Family, LatentBuilder
from .dimensions import first, quantity
from .graph import Graph, LatentAttention, Norm, Rope, TokenIndexer
from .shared import Source, check_rotary
from .weights import Role

KEY_NORM_EPSILON = 1e-6  # of the indexer's keys, whatever a configuration says of other norms
_SCALED_ROLES = (  # what llama.cpp multiplies by a `.scale`
    Role.ATTENTION_OUTPUT,
    Role.DENSE_GATE,
    Role.DENSE_UP,
    Role.DENSE_DOWN,
    Role.EXPERT_GATE,
    Role.EXPERT_UP,
    Role.EXPERT_DOWN,
    Role.SHARED_GATE,
    Role.SHARED_UP,
    Role.SHARED_DOWN,
)


def first_indexer(graph: Graph) -> TokenIndexer:
    attention = first(graph, LatentAttention)
    assert attention and attention.indexer, "the first layer picks by itself"
    return attention.indexer


def _of_indexer(get: Callable[[TokenIndexer], Any]) -> Callable[[Graph], Any]:
    return lambda graph: get(first_indexer(graph))


def picking(graph: Graph) -> list[bool]:
    """Of each layer, whether it has an indexer of its own."""
    attentions = (operation for operation in graph.operations() if isinstance(operation, LatentAttention))
    return [attention.indexer is not None for attention in attentions]


@dataclass(frozen=True)
class SparseFamily(Family):
    """`picking` says of each layer whether it picks tokens itself or attends to those of the last one that did."""

    index_heads: int = quantity("index_n_heads", "attention.indexer.head_count", _of_indexer(lambda block: block.heads))
    index_head_size: int = quantity(
        "index_head_dim", "attention.indexer.key_length", _of_indexer(lambda block: block.head_size)
    )
    index_top_k: int = quantity("index_topk", "attention.indexer.top_k", _of_indexer(lambda block: block.top_k))
    index_interleaved: bool = quantity()
    picking: tuple[bool, ...] = quantity()


def check_indexers(d: SparseFamily, origin: str) -> None:
    check_rotary(origin, "qk_rope_head_dim", d.rotary_size, d.index_head_size)
    if not d.query_rank:
        raise BadInput(f"{origin}: q_lora_rank is missing, expected that of the latent queries, which indexers use too")
    if not d.picking[0]:
        raise BadInput(f"{origin}: the indexer of layer 0 is 'shared', expected 'full': there is none before it")


def build(name: str, d: SparseFamily, source: Source) -> Graph:
    """The graph of GGUF's architecture of that name."""
    return replace(_SparseBuilder(d, source).model(name), scaled_roles=_SCALED_ROLES)


class _SparseBuilder(LatentBuilder):
    """Makes the blocks of one model."""

    def __init__(self, d: SparseFamily, source: Source) -> None:
        super().__init__(d, source)
        self.sparse = d

    def latent_attention(self, index: int) -> LatentAttention:
        """A block for drafts, behind the last layer, picks itself."""
        everything, layers = super().latent_attention(index), self.sparse.picking
        if index >= len(layers) or layers[index]:
            return replace(everything, indexer=self.indexer(f"blk.{index}.indexer", everything.rope))
        return replace(everything, selection_of=max(layer for layer in range(index) if layers[layer]))

    def indexer(self, stem: str, rope: Rope) -> TokenIndexer:
        d = self.sparse
        size, named = d.index_head_size, self.weight
        bias = named(f"{stem}.k_norm.bias", Role.BIAS, size)
        norm = Norm(named(f"{stem}.k_norm.weight", Role.NORM, size), KEY_NORM_EPSILON, centered=True, bias=bias)
        return TokenIndexer(
            heads=d.index_heads,
            head_size=size,
            top_k=d.index_top_k,
            query=named(f"{stem}.attn_q_b.weight", Role.INDEXER, d.index_heads * size, d.query_rank),
            head_weight=named(f"{stem}.proj.weight", Role.INDEXER_HEADS, d.index_heads, d.hidden),
            rope=replace(rope, interleaved=d.index_interleaved, last=False),
            key=named(f"{stem}.attn_k.weight", Role.INDEXER, size, d.hidden),
            key_norm=norm,
        )
