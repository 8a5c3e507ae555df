"""What Gemma 4's models are made of: their quantities, and how a graph is built of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import BadInput
from .dimensions import Dimensions, of, quantity, written
from .graph import (
    MLP,
    Activation,
    Attention,
    Branch,
    Graph,
    Layer,
    MoE,
    Norm,
    PerLayerEmbedding,
    PerLayerInput,
    Rope,
    Router,
    Score,
    SubLayer,
)
from .shared import Builder, Source, check_heads, check_rotary, check_top_k
from .weights import Role, Weight

NAME = "gemma4"
STILL = 1e30  # divides the frequency of pairs that do not turn, in files
_SCALED_ROLES = (  # what llama.cpp multiplies by a `.scale`; that of down projections of experts is a weight here
    *(Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT),
    *(Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN),
    *(Role.EXPERT_GATE, Role.EXPERT_UP),
)


def attentions(graph: Graph) -> list[Attention]:
    return [operation for operation in graph.operations() if isinstance(operation, Attention)]


def _of_kind(graph: Graph, windowed: bool) -> Attention | None:
    return next((op for op in attentions(graph) if (op.window is not None) == windowed), None)


def _head_size(windowed: bool) -> Callable[[Graph], int]:
    """Of that kind of layers, or, where there is none, of the other."""
    return lambda graph: (_of_kind(graph, windowed) or attentions(graph)[0]).head_size


def _rope_base(windowed: bool) -> Callable[[Graph], float | None]:
    def find(graph: Graph) -> float | None:
        found = _of_kind(graph, windowed)
        return found.rope.base if found and found.rope else None

    return find


def _list(values: Sequence[int]) -> int | list[int]:
    """One number where all are equal, as llama.cpp's converter writes them."""
    return values[0] if len({*values}) == 1 else [*values]


def _dense_sizes(graph: Graph) -> int | list[int]:
    return _list([op.up.shape[0] for op in graph.operations() if isinstance(op, MLP)])


@dataclass(frozen=True)
class Family(Dimensions):
    """Quantities of absent kinds of blocks are 0. Lists have an entry for each layer: whether its attention has a
    window, how many key-value heads, whether projected keys are its values, and how wide its dense layer is. The last
    `shared` layers use keys and values of earlier ones; `per_layer` is the width of per-layer embeddings."""

    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    dense_sizes: tuple[int, ...] = quantity(gguf="feed_forward_length", from_graph=_dense_sizes)
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: tuple[int, ...] = quantity(
        gguf="attention.head_count_kv",
        from_graph=lambda graph: _list([op.key_value_heads for op in attentions(graph)]),
    )
    full_head_size: int = quantity(
        gguf=("attention.key_length", "attention.value_length"), from_graph=_head_size(windowed=False)
    )
    head_size: int = quantity(
        gguf=("attention.key_length_swa", "attention.value_length_swa"), from_graph=_head_size(windowed=True)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon, default=1e-6
    )
    window: int = quantity(
        gguf="attention.sliding_window",
        from_graph=lambda graph: max(op.window or 1 for op in attentions(graph)),
    )
    windowed: tuple[bool, ...] = quantity(
        gguf="attention.sliding_window_pattern",
        from_graph=lambda graph: [op.window is not None for op in attentions(graph)],
    )
    shared: int = quantity(
        gguf="attention.shared_kv_layers",
        from_graph=lambda graph: sum(op.keys_of is not None for op in attentions(graph)),
        default=0,
    )
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=_rope_base(windowed=False), default=1e6)
    window_rope_base: float = quantity(gguf="rope.freq_base_swa", from_graph=_rope_base(windowed=True), default=1e4)
    rotary_size: int = written("rope.dimension_count", _head_size(windowed=False))
    window_rotary_size: int = written("rope.dimension_count_swa", _head_size(windowed=True))
    softcap: float = quantity(
        "final_logit_softcapping", "final_logit_softcapping", lambda graph: graph.logit_softcap or 0.0, default=0.0
    )
    per_layer: int = quantity(
        gguf="embedding_length_per_layer_input",
        from_graph=lambda graph: graph.per_layer.width if graph.per_layer else 0,
        default=0,
    )
    experts: int = quantity(gguf="expert_count", from_graph=of(MoE, lambda moe: moe.experts), default=0)
    top_k: int = quantity(gguf="expert_used_count", from_graph=of(MoE, lambda moe: moe.router.top_k), default=0)
    expert_size: int = quantity(
        gguf="expert_feed_forward_length", from_graph=of(MoE, lambda moe: moe.expert_size), default=0
    )
    values_from_keys: tuple[bool, ...] = quantity()


def check(d: Family, origin: str) -> None:
    for count in d.key_value_heads:
        check_heads(origin, d.heads, count)
    check_rotary(origin, "head_dim", d.head_size, d.head_size)
    check_rotary(origin, "global_head_dim", d.full_head_size, d.full_head_size)
    if d.experts and d.top_k > d.experts:
        check_top_k(origin, d.top_k, d.experts)
    own = d.windowed[: d.layers - d.shared]
    if missing := {*d.windowed} - {*own}:
        kind = "sliding_attention" if True in missing else "full_attention"
        raise BadInput(
            f"{origin}: num_kv_shared_layers is {d.shared}, expected a layer of {kind} with keys of its own before them"
        )


class _Builder(Builder):
    """Makes the blocks of one model."""

    def __init__(self, d: Family, source: Source) -> None:
        super().__init__(d, d.epsilon, source)
        self._d = d

    def layer(self, index: int) -> Layer:
        d, blk = self._d, f"blk.{index}"
        attention = SubLayer(
            (Branch(self._norm(f"{blk}.attn_norm"), self._attention(index)),),
            post_norm=self._norm(f"{blk}.post_attention_norm"),
        )
        dense = replace(self.gated_mlp(blk, d.dense_sizes[index]), activation=Activation.GEGLU)
        after_dense = self._norm(f"{blk}.post_ffw_norm_1") if d.experts else None
        branches = [Branch(self._norm(f"{blk}.ffn_norm"), dense, after_dense)]
        if d.experts:
            norms = [self._norm(f"{blk}.{place}_ffw_norm_2") for place in ("pre", "post")]
            branches.append(Branch(norms[0], self._routed(blk), norms[1]))
        sublayers = [attention, SubLayer(tuple(branches), post_norm=self._norm(f"{blk}.post_ffw_norm"))]
        if d.per_layer:
            sublayers.append(
                SubLayer((Branch(None, self._per_layer_input(blk)),), post_norm=self._norm(f"{blk}.post_norm"))
            )
        scale = self.weight(f"{blk}.layer_output_scale.weight", Role.SCALE, 1)
        return Layer(index, (*sublayers[:-1], replace(sublayers[-1], scale=scale)))

    def per_layer(self) -> PerLayerEmbedding:
        """Embeddings are scaled up by the square root of their width, as the model's own."""
        d = self._d
        width, vocabulary = d.layers * d.per_layer, d.vocabulary
        return PerLayerEmbedding(
            table=self.weight("per_layer_token_embd.weight", Role.PER_LAYER_TABLE, vocabulary, width),
            projection=self.weight("per_layer_model_proj.weight", Role.PER_LAYER_PROJECTION, width, d.hidden),
            norm=self.norm("per_layer_proj_norm.weight", d.per_layer),
            table_scale=d.per_layer**0.5,
            projection_scale=d.hidden**-0.5,
            scale=0.5**0.5,
        )

    def _norm(self, name: str) -> Norm:
        """Over the hidden size."""
        return self.norm(f"{name}.weight", self.hidden)

    def _attention(self, index: int) -> Attention:
        """Norms of queries and keys are all that scales their products."""
        d, blk, windowed = self._d, f"blk.{index}", self._d.windowed[index]
        size = d.head_size if windowed else d.full_head_size
        keys, queries = d.key_value_heads[index] * size, d.heads * size
        keys_of = self._keys_of(index)
        own = keys_of is None
        return Attention(
            heads=d.heads,
            key_value_heads=d.key_value_heads[index],
            head_size=size,
            query=self.weight(f"{blk}.attn_q.weight", Role.ATTENTION_Q, queries, d.hidden),
            key=self.weight(f"{blk}.attn_k.weight", Role.ATTENTION_K, keys, d.hidden) if own else None,
            value=self._value(index, keys) if own else None,
            output=self.weight(f"{blk}.attn_output.weight", Role.ATTENTION_OUTPUT, d.hidden, queries),
            query_norm=self.norm(f"{blk}.attn_q_norm.weight", size),
            key_norm=self.norm(f"{blk}.attn_k_norm.weight", size) if own else None,
            rope=Rope(size, d.window_rope_base) if windowed else self._proportional(size),
            window=d.window if windowed else None,
            scale=1.0,
            keys_of=keys_of,
            value_epsilon=d.epsilon if own else None,
        )

    def _value(self, index: int, rows: int) -> Weight | None:
        if self._d.values_from_keys[index]:
            return None
        return self.weight(f"blk.{index}.attn_v.weight", Role.ATTENTION_V, rows, self.hidden)

    def _proportional(self, size: int) -> Rope:
        """Some of the pairs do not turn; one tensor says it for all layers."""
        return Rope(size, self._d.rope_base, divisors=self.weight("rope_freqs.weight", Role.SCALE, size // 2))

    def _keys_of(self, index: int) -> int | None:
        """The last layer of the same kind that has keys of its own, for those without."""
        d = self._d
        own = d.layers - d.shared
        return None if index < own else max(other for other in range(own) if d.windowed[other] == d.windowed[index])

    def _routed(self, blk: str) -> MoE:
        """The router reads the residual through a norm of its own."""
        d = self._d
        weight = self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        router = Router(
            *(weight, None, Score.SOFTMAX, d.top_k),
            input_norm=self.norm(f"{blk}.ffn_gate_inp.scale", d.hidden),
            input_scale=d.hidden**-0.5,
        )
        moe = self.experts(blk, router, Activation.GEGLU, (d.experts, d.expert_size, d.hidden))
        scale = self.weight(f"{blk}.ffn_down_exps.scale", Role.SCALE, d.experts)
        return replace(moe, router=replace(router, expert_scale=scale))

    def _per_layer_input(self, blk: str) -> PerLayerInput:
        d = self._d
        return PerLayerInput(
            gate=self.weight(f"{blk}.inp_gate.weight", Role.PER_LAYER_GATE, d.per_layer, d.hidden),
            output=self.weight(f"{blk}.proj.weight", Role.PER_LAYER_OUTPUT, d.hidden, d.per_layer),
            activation=Activation.GEGLU,
        )


def build(d: Family, source: Source) -> Graph:
    builder = _Builder(d, source)
    graph = builder.graph(NAME, tuple(map(builder.layer, range(d.layers))), tied=True)
    return replace(
        graph,
        per_layer=builder.per_layer() if d.per_layer else None,
        scaled_roles=_SCALED_ROLES,
        embedding_scale=d.hidden**0.5,
        logit_softcap=d.softcap or None,
    )
