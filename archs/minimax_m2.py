"""MiniMax M2, M2.1, M2.5, M2.7: full attention with whole-width q/k norms, then sigmoid-routed SwiGLU experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import BadInput
from .catalogue import Catalogue
from .config import Config
from .graph import Activation, Attention, Graph, Layer, MoE, Norm, Rope, Router, Score, SubLayer
from .registry import Architecture
from .weights import Expression, Read, Role, Rows, Stack, TensorInfo, Weight

GGUF_SIGMOID = 2  # llama.cpp's expert_gating_func; without it a file loads and then aborts at the first token


@dataclass(frozen=True)
class _Dimensions:
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    rotary_size: int
    rope_base: float
    experts: int
    top_k: int
    expert_size: int
    epsilon: float
    context: int


# GGUF name -> module of the checkpoint; the experts' are stacked.
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens",
    "output_norm.weight": "model.norm",
    "output.weight": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm",
    "attn_q.weight": "self_attn.q_proj",
    "attn_k.weight": "self_attn.k_proj",
    "attn_v.weight": "self_attn.v_proj",
    "attn_output.weight": "self_attn.o_proj",
    "attn_q_norm.weight": "self_attn.q_norm",
    "attn_k_norm.weight": "self_attn.k_norm",
    "ffn_norm.weight": "post_attention_layernorm",
    "ffn_gate_inp.weight": "{moe}.gate",
    "exp_probs_b.bias": "{moe}.e_score_correction_bias",
}
_EXPERT_NAMES = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    dimensions = _read_config(config)
    catalogue = Catalogue(tensors, config.origin, _scale_block(config))
    tied = config.flag("tie_word_embeddings", default=False)
    graph = _build(dimensions, _checkpoint_source(catalogue, dimensions, tied))
    catalogue.finish()
    return graph


def _read_config(config: Config) -> _Dimensions:
    config.expect("hidden_act", "silu")
    config.expect("scoring_func", "sigmoid")
    config.expect("use_qk_norm", True)
    config.expect("qk_norm_type", "per_layer")
    config.expect("use_routing_bias", True)
    config.expect("shared_intermediate_size", 0)
    config.expect("rope_scaling", {})
    config.expect("sliding_window")
    layers = config.integer("num_hidden_layers")
    kinds = config.get("attn_type_list") or []
    for layer, kind in enumerate(kinds if isinstance(kinds, list) else [kinds]):
        if kind != 1:
            raise BadInput(f"{config.origin}: attn_type_list[{layer}] is {kind!r}, expected 1 (full attention)")
    rope = config.section("rope_parameters")
    rope.expect("rope_type", "default")
    head_size = config.integer("head_dim")
    partial = rope.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=1.0))
    dimensions = _Dimensions(
        vocabulary=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        layers=layers,
        heads=config.integer("num_attention_heads"),
        key_value_heads=config.integer("num_key_value_heads"),
        head_size=head_size,
        rotary_size=config.integer("rotary_dim", default=int(head_size * partial)),
        rope_base=config.number("rope_theta", default=rope.number("rope_theta", default=5e6)),
        experts=config.integer("num_local_experts", "num_experts"),
        top_k=config.integer("num_experts_per_tok"),
        expert_size=config.integer("intermediate_size"),
        epsilon=config.number("rms_norm_eps", default=1e-6),
        context=config.integer("max_position_embeddings"),
    )
    _check(dimensions, config.origin)
    return dimensions


def _scale_block(config: Config) -> tuple[int, int]:
    quantization = config.section("quantization_config")
    block = quantization.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise BadInput(f"{quantization.origin}: weight_block_size is {block!r}, expected two positive whole numbers")
    return block[0], block[1]


def _check(dimensions: _Dimensions, origin: str) -> None:
    d = dimensions
    if d.heads % d.key_value_heads:
        raise BadInput(f"{origin}: {d.heads} attention heads are not a multiple of {d.key_value_heads} key-value heads")
    if d.top_k > d.experts:
        raise BadInput(f"{origin}: num_experts_per_tok is {d.top_k}, expected at most the {d.experts} experts")
    if d.rotary_size > d.head_size or d.rotary_size % 2:
        raise BadInput(f"{origin}: rotary_dim is {d.rotary_size}, expected an even number up to head_dim {d.head_size}")


def _checkpoint_source(catalogue: Catalogue, dimensions: _Dimensions, tied: bool) -> Callable[[str], Expression]:
    """Finds a weight under the Hub's names (also what transformers saves) or under its in-memory, fused names."""
    embedding = catalogue.matrix("model.embed_tokens")

    @cache
    def fused(name: str) -> Expression:
        return catalogue.plain(name)

    def experts(prefix: str, kind: str) -> Expression:
        if f"{prefix}.mlp.gate.weight" not in catalogue:
            name = f"{prefix}.block_sparse_moe.experts.{{}}.{_EXPERT_NAMES[kind]}"
            return Stack(tuple(catalogue.matrix(name.format(expert)) for expert in range(dimensions.experts)))
        if kind == "ffn_down_exps.weight":
            return fused(f"{prefix}.mlp.experts.down_proj")
        first = 0 if kind == "ffn_gate_exps.weight" else dimensions.expert_size  # rows of the gate come first
        return Rows(fused(f"{prefix}.mlp.experts.gate_up_proj"), first, first + dimensions.expert_size)

    def find(name: str) -> Expression:
        if name == "token_embd.weight" or (name == "output.weight" and tied and "lm_head.weight" not in catalogue):
            return embedding
        if name in _GLOBAL_NAMES:
            return catalogue.matrix(_GLOBAL_NAMES[name])
        _, layer, kind = name.split(".", 2)
        prefix = f"model.layers.{layer}"
        if kind in _EXPERT_NAMES:
            return experts(prefix, kind)
        moe = "mlp" if f"{prefix}.mlp.gate.weight" in catalogue else "block_sparse_moe"
        module = f"{prefix}.{_LAYER_NAMES[kind].format(moe=moe)}"
        return catalogue.plain(module) if kind.endswith(".bias") else catalogue.matrix(module)

    return find


def _build(d: _Dimensions, source: Callable[[str], Expression]) -> Graph:
    def weight(name: str, role: Role, *shape: int) -> Weight:
        return Weight(name, role, shape, source(name))

    def norm(name: str, size: int) -> Norm:
        return Norm(weight(name, Role.NORM, size), d.epsilon)

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        query_size, key_size = d.heads * d.head_size, d.key_value_heads * d.head_size
        attention = Attention(
            heads=d.heads,
            key_value_heads=d.key_value_heads,
            head_size=d.head_size,
            query=weight(f"{blk}.attn_q.weight", Role.ATTENTION_Q, query_size, d.hidden),
            key=weight(f"{blk}.attn_k.weight", Role.ATTENTION_K, key_size, d.hidden),
            value=weight(f"{blk}.attn_v.weight", Role.ATTENTION_V, key_size, d.hidden),
            output=weight(f"{blk}.attn_output.weight", Role.ATTENTION_OUTPUT, d.hidden, query_size),
            query_norm=norm(f"{blk}.attn_q_norm.weight", query_size),
            key_norm=norm(f"{blk}.attn_k_norm.weight", key_size),
            rope=Rope(d.rotary_size, d.rope_base),
        )
        experts = MoE(
            router=Router(
                weight=weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
                bias=weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
                score=Score.SIGMOID,
                top_k=d.top_k,
            ),
            gate=weight(f"{blk}.ffn_gate_exps.weight", Role.EXPERT_GATE, d.experts, d.expert_size, d.hidden),
            up=weight(f"{blk}.ffn_up_exps.weight", Role.EXPERT_UP, d.experts, d.expert_size, d.hidden),
            down=weight(f"{blk}.ffn_down_exps.weight", Role.EXPERT_DOWN, d.experts, d.hidden, d.expert_size),
            activation=Activation.SWIGLU,
        )
        attention_norm = norm(f"{blk}.attn_norm.weight", d.hidden)
        experts_norm = norm(f"{blk}.ffn_norm.weight", d.hidden)
        return Layer(index, (SubLayer(attention_norm, attention), SubLayer(experts_norm, experts)))

    return Graph(
        architecture=ARCHITECTURE.name,
        vocabulary_size=d.vocabulary,
        hidden_size=d.hidden,
        context_length=d.context,
        embedding=weight("token_embd.weight", Role.EMBEDDING, d.vocabulary, d.hidden),
        layers=tuple(layer(index) for index in range(d.layers)),
        final_norm=norm("output_norm.weight", d.hidden),
        head=weight("output.weight", Role.HEAD, d.vocabulary, d.hidden),
    )


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    prefix = ARCHITECTURE.name
    catalogue = Catalogue(tensors, metadata.origin)
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise BadInput(f"{metadata.origin}: tensor token_embd.weight is missing, the file is incomplete")
    metadata.expect(f"{prefix}.expert_gating_func", GGUF_SIGMOID)
    head_size = metadata.integer(f"{prefix}.attention.key_length")
    dimensions = _Dimensions(
        vocabulary=embedding.shape[0],
        hidden=metadata.integer(f"{prefix}.embedding_length"),
        layers=metadata.integer(f"{prefix}.block_count"),
        heads=metadata.integer(f"{prefix}.attention.head_count"),
        key_value_heads=metadata.integer(f"{prefix}.attention.head_count_kv"),
        head_size=head_size,
        rotary_size=metadata.integer(f"{prefix}.rope.dimension_count", default=head_size),
        rope_base=metadata.number(f"{prefix}.rope.freq_base", default=10000.0),
        experts=metadata.integer(f"{prefix}.expert_count"),
        top_k=metadata.integer(f"{prefix}.expert_used_count"),
        expert_size=metadata.integer(f"{prefix}.feed_forward_length"),
        epsilon=metadata.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        context=metadata.integer(f"{prefix}.context_length"),
    )
    _check(dimensions, metadata.origin)
    graph = _build(dimensions, lambda name: Read(catalogue.take(name)))
    catalogue.finish()
    return graph


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    attention, experts = (sublayer.operation for sublayer in graph.layers[0].sublayers)
    assert isinstance(attention, Attention) and attention.rope and isinstance(experts, MoE)
    values = {
        "context_length": graph.context_length,
        "embedding_length": graph.hidden_size,
        "block_count": len(graph.layers),
        "feed_forward_length": experts.expert_size,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.key_value_heads,
        "attention.key_length": attention.head_size,
        "attention.value_length": attention.head_size,
        "attention.layer_norm_rms_epsilon": graph.final_norm.epsilon,
        "rope.dimension_count": attention.rope.size,
        "rope.freq_base": attention.rope.base,
        "expert_count": experts.experts,
        "expert_used_count": experts.router.top_k,
        "expert_feed_forward_length": experts.expert_size,
        "expert_gating_func": GGUF_SIGMOID,
    }
    return {f"{graph.architecture}.{key}": value for key, value in values.items()}


ARCHITECTURE = Architecture(
    name="minimax-m2",
    model_types=("minimax_m2",),
    example="minimax-m2-tiny",
    pre_tokenizer="minimax-m2",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
)
