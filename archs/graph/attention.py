"""Attention in all its forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..weights import Weight
from .operation import PASSING, Operation
from .parts import Norm, Rope

_CACHED = 2  # bytes of a number in a cache of keys and values


@dataclass(frozen=True)
class BlockSelection:
    """Picks the `top_k` blocks of `block_size` tokens that each key-value head lets a token see (MiniMax 2026).

    Every such head has an index query, all share one index key a token; both are normed and rotated. A block counts by
    the largest product in it of the query and the keys up to the token. The token's own block and those before it,
    `local` in all, come first.
    """

    head_size: int
    block_size: int
    top_k: int
    local: int
    query: Weight
    key: Weight
    query_norm: Norm
    key_norm: Norm
    rope: Rope

    @property
    def heads(self) -> int:
        return self.query.shape[0] // self.head_size

    @property
    def reads(self) -> tuple[Weight, ...]:
        """The weights whose columns are the hidden size."""
        return (self.query, self.key)


@dataclass(frozen=True)
class Attention(Operation):
    """Causal grouped-query attention: softmax(`scale` * query . key), by default with head size^-1/2.

    Query and key norms span all heads at once, or each head by itself if their weight is that wide. Without `rope` the
    attention knows no positions; with a `window` a token sees the last so many, itself included. An operation with
    `keys_of` has no keys and values of its own: it attends to those of the layer of that number. A learnt `sink` logit
    per head takes its share of the softmax (Xiao et al. 2024). The query projection of a `gated` one gives each head
    its query and then a gate, by whose sigmoid what the head gives is multiplied. With a `selection` each key-value
    head shows a token some blocks of tokens alone. Without `value` projected keys are the values too, as they are
    before norm and rotation. With a `value_epsilon` each head's values pass an RMSNorm without weights.
    """

    heads: int
    key_value_heads: int
    head_size: int
    query: Weight
    key: Weight | None
    value: Weight | None
    output: Weight
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rope: Rope | None = None
    window: int | None = None
    scale: float | None = None
    keys_of: int | None = None
    query_bias: Weight | None = None
    key_bias: Weight | None = None
    value_bias: Weight | None = None
    output_bias: Weight | None = None
    sink: Weight | None = None
    gated: bool = False
    selection: BlockSelection | None = None
    value_epsilon: float | None = None

    def __post_init__(self) -> None:
        alone = self.keys_of is None
        assert alone == (self.key is not None) and (self.key or not self.value), "keys and values are of one layer"
        assert not self.selection or (alone and not self.window and self.selection.heads == self.key_value_heads)

    @property
    def softmax_scale(self) -> float:
        return self.head_size**-0.5 if self.scale is None else self.scale

    @property
    def reads(self) -> tuple[Weight, ...]:
        projections = tuple(weight for weight in (self.query, self.key, self.value) if weight)
        return (*projections, *(self.selection.reads if self.selection else ()))

    @property
    def shares_state_of(self) -> int | None:
        return self.keys_of

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.output, self.output_bias) if self.output_bias else (self.output,)

    @property
    def heads_per_group(self) -> int | None:
        return self.heads // self.key_value_heads

    @property
    def state_bytes_per_token(self) -> int:
        return 0 if self.window else self._state_bytes

    @property
    def fixed_state_bytes(self) -> int:
        return self.window * self._state_bytes if self.window else 0

    @property
    def _state_bytes(self) -> int:
        """Of a token that is remembered."""
        index = self.selection.head_size if self.selection else 0
        return 0 if self.keys_of is not None else _CACHED * (2 * self.key_value_heads * self.head_size + index)

    @property
    def needs_flash_attention(self) -> bool:
        return self.selection is not None

    def attending_to_all(self) -> Attention:
        return replace(self, selection=None)

    def scratch_values(self, context: int) -> int:
        index = self.selection.heads * (context + self.selection.head_size) if self.selection else 0
        return PASSING * context * (self.heads * (context + self.head_size) + index)


@dataclass(frozen=True)
class Compressor:
    """Pools every `ratio` tokens into one entry: per channel, values weighted by softmax(`gate x + position`).

    Where it `overlaps`, value and gate are twice as wide: a token's first half goes into the next entry, its second
    half into its own, so an entry pools 2 * ratio tokens. Entries are normalized, then rotated by the position of the
    first token of their own.
    """

    ratio: int
    overlaps: bool
    value: Weight
    gate: Weight
    position: Weight
    norm: Norm
    rope: Rope

    @property
    def reads(self) -> tuple[Weight, ...]:
        """The weights whose columns are the hidden size."""
        return (self.value, self.gate)


@dataclass(frozen=True)
class Indexer:
    """Picks the `top_k` keys that a token attends to, by the sum over heads of `head_weight x * relu(query . key)`.

    Queries come from the attention's latent query; `rope` rotates them by the token's position, as it does the keys.
    Where these come from, the kinds of indexers say.
    """

    heads: int
    head_size: int
    top_k: int
    query: Weight
    head_weight: Weight
    rope: Rope

    @property
    def reads(self) -> tuple[Weight, ...]:
        """The weights whose columns are the hidden size."""
        return (self.head_weight,)

    def scratch_values(self, tokens: int, keys: int) -> int:
        """An upper bound of the numbers that exist while so many tokens choose among so many keys."""
        return PASSING * tokens * (self.heads + 1) * (keys + self.head_size)


@dataclass(frozen=True)
class EntryIndexer(Indexer):
    """An indexer whose keys are entries of a compressor of the same ratio as the attention's."""

    compressor: Compressor

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (*super().reads, *self.compressor.reads)


@dataclass(frozen=True)
class TokenIndexer(Indexer):
    """An indexer with a key for each token, `key_norm(key x)`, of which the first part is rotated."""

    key: Weight
    key_norm: Norm

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (*super().reads, self.key)

    @property
    def state_bytes_per_token(self) -> int:
        """Of the keys."""
        return _CACHED * self.head_size


@dataclass(frozen=True)
class LatentAttention(Operation):
    """Multi-head latent attention: all heads' keys and values are made of one vector a token (DeepSeek-AI 2024).

    `key_value_down x` is a latent, normed, and one key of `rope.size` that is rotated. Of a head's query the first part
    meets `key_up[head] . latent`, the rest, rotated, the one key; softmax(`scale` * their sum) weighs
    `value_up[head] . latent`. Without `query_down` queries are made of x, else of `query_norm(query_down x)`.
    `key_up` is stored transposed, [heads, latent size, key size]: so a query is taken to the latents, of which nothing
    but themselves is remembered. With an `indexer` a token attends to those alone that it picks, or to those that the
    layer of number `selection_of` attends to (DeepSeek sparse attention, 2025).
    """

    heads: int
    query_down: Weight | None
    query_norm: Norm | None
    query: Weight
    key_value_down: Weight
    key_value_norm: Norm
    key_up: Weight
    value_up: Weight
    output: Weight
    rope: Rope
    scale: float
    indexer: TokenIndexer | None = None
    selection_of: int | None = None

    TOKENS: ClassVar[int] = 256  # at a time: the scores of a whole chunk would be [heads, tokens, tokens before]

    def __post_init__(self) -> None:
        assert self.rope.last, "the last part of a head is rotated"
        assert (self.query_down is None) == (self.query_norm is None), "the latent query is normed"
        assert not self.indexer or self.query_down, "an indexer's queries are made of the latent query"
        assert not self.indexer or self.selection_of is None, "a layer picks itself, or as another one"

    @property
    def latent_size(self) -> int:
        return self.key_up.shape[1]

    @property
    def key_size(self) -> int:
        """Of a head's key, the part that is not rotated."""
        return self.key_up.columns

    @property
    def value_size(self) -> int:
        return self.value_up.shape[1]

    @property
    def remembered_size(self) -> int:
        """Of a token: its latent and its rotated key."""
        return self.latent_size + self.rope.size

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (self.query_down or self.query, self.key_value_down, *(self.indexer.reads if self.indexer else ()))

    @property
    def shares_state_of(self) -> int | None:
        return self.selection_of

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.output,)

    @property
    def heads_per_group(self) -> int | None:
        """The latent is the one key-value head that files tell of."""
        return self.heads

    @property
    def state_bytes_per_token(self) -> int:
        return _CACHED * self.remembered_size + (self.indexer.state_bytes_per_token if self.indexer else 0)

    def scratch_values(self, context: int) -> int:
        tokens = min(context, self.TOKENS)
        choice = self.indexer.scratch_values(tokens, context) if self.indexer else 0
        scores = tokens * self.heads * (context + self.remembered_size)
        return PASSING * (context * self.remembered_size + scores) + choice

    def attending_to_all(self) -> LatentAttention:
        return replace(self, indexer=None, selection_of=None)


@dataclass(frozen=True)
class CompressedAttention(Operation):
    """Attention to the last `window` tokens, and to compressed entries of the whole past (DeepSeek-AI 2026).

    One rotated vector per token or entry is key and value of all heads; the output is rotated back. Queries pass
    through a latent norm, then each head through a norm without weights. A learnt `sink` logit per head takes its
    share of the softmax. Output: the heads of each of `groups` groups are projected by the group's own rows of
    `output_down`, then `output_up` joins the groups. Without `indexer` every complete entry is attended to.
    """

    heads: int
    head_size: int
    window: int
    groups: int
    query_down: Weight
    query_norm: Norm
    query_up: Weight
    key_value: Weight
    key_value_norm: Norm
    sink: Weight
    output_down: Weight
    output_up: Weight
    rope: Rope
    compressor: Compressor | None
    indexer: EntryIndexer | None

    TOKENS: ClassVar[int] = 256  # at a time: the scores of a whole chunk would be [heads, tokens, window + entries]

    @property
    def reads(self) -> tuple[Weight, ...]:
        others = (*(self.compressor.reads if self.compressor else ()), *(self.indexer.reads if self.indexer else ()))
        return (self.query_down, self.key_value, *others)

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.output_up,)

    @property
    def state_bytes_per_token(self) -> int:
        """Entries count by their share of a token."""
        if not self.compressor:
            return 0
        return _CACHED * ((self.head_size + (self.indexer.head_size if self.indexer else 0)) // self.compressor.ratio)

    @property
    def fixed_state_bytes(self) -> int:
        return _CACHED * self.window * self.head_size

    def scratch_values(self, context: int) -> int:
        tokens = min(context, self.TOKENS)
        entries = context // self.compressor.ratio if self.compressor else 0
        return PASSING * tokens * self.heads * (tokens + self.window + entries + self.head_size)

    def attending_to_all(self) -> CompressedAttention:
        return replace(self, indexer=None)
