"""MiniMax M2, M2.1, M2.5, M2.7: full attention with whole-width q/k norms, then sigmoid-routed SwiGLU experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import BadInput
from .architecture import Architecture
from .config import Config
from .dimensions import Dimensions, constant, of, of_rope, quantity, written
from .expressions import TensorInfo
from .graph import Activation, Attention, Graph, Layer, MoE, Rope, Router, Score, sequential
from .shared import (
    ATTENTION_NAMES,
    WHOLE_NAMES,
    Builder,
    Experts,
    Names,
    Source,
    check_heads,
    check_rotary,
    check_top_k,
    expect_all,
    gguf_source,
    open_gguf,
    read_checkpoint,
    rope_section,
)
from .weights import Role

NAME = "minimax-m2"
_ROPE_BASE = 5e6  # what transformers takes where a configuration says none
GGUF_SIGMOID = 2  # llama.cpp's expert_gating_func; without it a file loads and then aborts at the first token


@dataclass(frozen=True)
class _Dimensions(Dimensions):
    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    expert_size: int = quantity("intermediate_size", "feed_forward_length", of(MoE, lambda moe: moe.expert_size))
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        "head_dim", ("attention.key_length", "attention.value_length"), of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon
    )
    rotary_size: int = quantity("rotary_dim", "rope.dimension_count", of_rope(lambda rope: rope.size))
    rope_base: float = quantity("rope_theta", "rope.freq_base", of_rope(lambda rope: rope.base))
    experts: int = quantity(("num_local_experts", "num_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    width: int = written("expert_feed_forward_length", of(MoE, lambda moe: moe.expert_size))
    gating: int = constant("expert_gating_func", GGUF_SIGMOID)


_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "scoring_func": ["sigmoid"],
    "use_qk_norm": [True],
    "qk_norm_type": ["per_layer"],
    "use_routing_bias": [True],
    "shared_intermediate_size": [0],
    "sliding_window": [],
}
_HARMLESS = ("mlp_intermediate_size",)  # the width of dense layers, which no release has
_HARMLESS_METADATA = ("vocab_size",)  # the embedding says it
EXPERTS = {
    "ffn_gate_exps.weight": Experts("block_sparse_moe.experts.{}.w1", "mlp.experts.gate_up_proj", half=0),
    "ffn_up_exps.weight": Experts("block_sparse_moe.experts.{}.w3", "mlp.experts.gate_up_proj", half=1),
    "ffn_down_exps.weight": Experts("block_sparse_moe.experts.{}.w2", "mlp.experts.down_proj"),
}
_NAMES = Names(
    layers=("model.layers.{}.",),
    whole=WHOLE_NAMES,
    layer=ATTENTION_NAMES
    | {
        "ffn_gate_inp.weight": ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        "exp_probs_b.bias": ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
    },
    experts=EXPERTS,
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    return read_checkpoint(config, tensors, _NAMES, partial(_build, _read_config(config)))


def _read_config(config: Config) -> _Dimensions:
    expect_all(config, _IMPLEMENTED)
    kinds = config.get("attn_type_list") or []
    for layer, kind in enumerate(kinds if isinstance(kinds, list) else [kinds]):
        if kind != 1:
            raise BadInput(f"{config.origin}: attn_type_list[{layer}] is {kind!r}, expected 1 (full attention)")
    rope = read_rope(config)
    dimensions = _Dimensions.from_config(config, rotary_size=rope.size, rope_base=rope.base)
    _check(dimensions, config.origin)
    return dimensions


def read_rope(config: Config) -> Rope:
    """The rotary embedding of a part of each head, whichever way the part is given."""
    rope = rope_section(config)
    rope.expect("rope_type", "default")
    rope.expect("type", "default")
    head_size, base = config.integer("head_dim"), config.number("rope_theta", default=_ROPE_BASE)
    whole = config.integer("rotary_dim", default=head_size)
    partial = config.number("partial_rotary_factor", default=whole / head_size)
    size = int(head_size * rope.number("partial_rotary_factor", default=partial))
    return Rope(size, rope.number("rope_theta", default=base))


def _check(d: _Dimensions, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_top_k(origin, d.top_k, d.experts)
    check_rotary(origin, "rotary_dim", d.rotary_size, d.head_size)


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue, vocabulary = open_gguf(metadata, tensors)
    dimensions = _Dimensions.from_gguf(metadata, NAME, vocabulary=vocabulary)
    _check(dimensions, metadata.origin)
    graph = _build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


def _build(d: _Dimensions, source: Source) -> Graph:
    builder = Builder(d, d.epsilon, source)
    rope = Rope(d.rotary_size, d.rope_base)
    norms = (d.heads * d.head_size, d.key_value_heads * d.head_size)

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        attention = builder.attention(blk, d.heads, d.key_value_heads, d.head_size, rope, norms)
        router = Router(
            weight=builder.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
            bias=builder.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
            score=Score.SIGMOID,
            top_k=d.top_k,
        )
        experts = builder.experts(blk, router, Activation.SWIGLU, (d.experts, d.expert_size, d.hidden))
        attention_norm = builder.norm(f"{blk}.attn_norm.weight", d.hidden)
        experts_norm = builder.norm(f"{blk}.ffn_norm.weight", d.hidden)
        return Layer(index, (sequential(attention_norm, attention), sequential(experts_norm, experts)))

    return builder.graph(NAME, tuple(layer(index) for index in range(d.layers)))


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("minimax_m2",),
    example="minimax-m2-tiny",
    pre_tokenizer="minimax-m2",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_Dimensions.metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
