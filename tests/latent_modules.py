"""Multi-head latent attention as transformers has it in several families, as an operation of a graph."""

from __future__ import annotations

from typing import Any

from block_weights import BlockWeights
from moecast.archs.graph import LatentAttention, Norm, Rope, TokenIndexer, Yarn
from moecast.archs.weights import Role
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def latent_attention(module: Any, weights: BlockWeights) -> LatentAttention:
    """The operation of a module, with its indexer if it has one."""
    config = module.config
    parts = (config.qk_nope_head_dim, config.v_head_dim)
    keys, values = module.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, sum(parts))).split(parts, dim=1)
    rope = Rope(config.qk_rope_head_dim, 1e4, interleaved=True, last=True, yarn=_yarn(config))
    ranked = module.q_lora_rank is not None
    indexer = getattr(module, "indexer", None)
    return LatentAttention(
        heads=config.num_attention_heads,
        query_down=weights.add(module.q_a_proj.weight) if ranked else None,
        query_norm=weights.norm(module.q_a_layernorm) if ranked else None,
        query=weights.add((module.q_b_proj if ranked else module.q_proj).weight),
        key_value_down=weights.add(module.kv_a_proj_with_mqa.weight),
        key_value_norm=weights.norm(module.kv_a_layernorm),
        key_up=weights.add(keys.transpose(1, 2), Role.ATTENTION_KEY_UP),
        value_up=weights.add(values, Role.ATTENTION_VALUE_UP),
        output=weights.add(module.o_proj.weight),
        rope=rope,
        scale=module.scaling,
        indexer=_indexer(indexer, weights, rope) if indexer else None,
    )


def _indexer(module: Any, weights: BlockWeights, rope: Rope) -> TokenIndexer:
    bias = weights.add(module.k_norm.bias, Role.BIAS)
    return TokenIndexer(
        heads=module.n_heads,
        head_size=module.head_dim,
        top_k=module.index_topk,
        query=weights.add(module.wq_b.weight),
        head_weight=weights.add(module.weights_proj.weight, Role.INDEXER_HEADS),
        rope=Rope(rope.size, rope.base, interleaved=type(module).__name__.startswith("Glm"), yarn=rope.yarn),
        key=weights.add(module.wk.weight),
        key_norm=Norm(weights.add(module.k_norm.weight, Role.NORM), module.k_norm.eps, centered=True, bias=bias),
    )


def _yarn(config: Any) -> Yarn | None:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    _, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
    fast, slow = rope.get("beta_fast", 32), rope.get("beta_slow", 1)
    return Yarn(rope["factor"], rope["original_max_position_embeddings"], fast, slow, magnitude)
