"""What DeepSeek V4's tensors are called: on the Hub, saved by transformers, and in transformers' memory.

Every GGUF name is followed by the names it may have in a checkpoint; whichever is there is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from .catalogue import Catalogue
from .weights import Expression, Rows, Stack

_GLOBAL_NAMES = {
    "token_embd.weight": ("embed.weight", "model.embed_tokens.weight"),
    "output_norm.weight": ("norm.weight", "model.norm.weight"),
    "output.weight": ("head.weight", "lm_head.weight"),
    "output_hc_fn.weight": ("hc_head_fn", "model.hc_head.hc_fn"),
    "output_hc_base.weight": ("hc_head_base", "model.hc_head.hc_base"),
    "output_hc_scale.weight": ("hc_head_scale", "model.hc_head.hc_scale"),
}
_LAYER_NAMES = {
    "attn_norm.weight": ("attn_norm.weight", "input_layernorm.weight"),
    "attn_q_a.weight": ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "attn_q_a_norm.weight": ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "attn_q_b.weight": ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    "attn_kv.weight": ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "attn_kv_a_norm.weight": ("attn.kv_norm.weight", "attn.norm.weight", "self_attn.kv_norm.weight"),
    "attn_sinks.weight": ("attn.attn_sink", "self_attn.sinks"),
    "attn_output_a.weight": ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    "attn_output_b.weight": ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    "attn_compressor_kv.weight": ("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight"),
    "attn_compressor_gate.weight": ("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj.weight"),
    "attn_compressor_ape.weight": ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    "attn_compressor_norm.weight": ("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight"),
    "indexer.attn_q_b.weight": ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    "indexer.proj.weight": (
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    "indexer_compressor_kv.weight": (
        "attn.indexer.compressor.wkv.weight",
        "self_attn.compressor.indexer.kv_proj.weight",
    ),
    "indexer_compressor_gate.weight": (
        "attn.indexer.compressor.wgate.weight",
        "self_attn.compressor.indexer.gate_proj.weight",
    ),
    "indexer_compressor_ape.weight": (
        "attn.indexer.compressor.ape",
        "self_attn.compressor.indexer.position_bias",
    ),
    "indexer_compressor_norm.weight": (
        "attn.indexer.compressor.norm.weight",
        "self_attn.compressor.indexer.kv_norm.weight",
    ),
    "hc_attn_fn.weight": ("hc_attn_fn", "attn_hc.fn"),
    "hc_attn_base.weight": ("hc_attn_base", "attn_hc.base"),
    "hc_attn_scale.weight": ("hc_attn_scale", "attn_hc.scale"),
    "hc_ffn_fn.weight": ("hc_ffn_fn", "ffn_hc.fn"),
    "hc_ffn_base.weight": ("hc_ffn_base", "ffn_hc.base"),
    "hc_ffn_scale.weight": ("hc_ffn_scale", "ffn_hc.scale"),
    "ffn_norm.weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "ffn_gate_inp.weight": ("ffn.gate.weight", "mlp.gate.weight"),
    "ffn_gate_tid2eid.weight": ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    "exp_probs_b.bias": ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "ffn_gate_shexp.weight": ("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"),
    "ffn_up_shexp.weight": ("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn_down_shexp.weight": ("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"),
}
_EXPERT_NAMES = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}


def checkpoint_source(catalogue: Catalogue, experts: int, expert_size: int) -> Callable[[str], Expression]:
    """Finds a weight by its GGUF name, whichever way the checkpoint names it."""

    @cache
    def fused(name: str) -> Expression:
        return catalogue.plain(name)

    def stack(prefix: str, kind: str) -> Expression:
        module = f"{prefix}.mlp.experts"
        if f"{module}.gate_up_proj" not in catalogue:
            name = f"{prefix}.ffn.experts.{{}}.{_EXPERT_NAMES[kind]}"
            return Stack(tuple(catalogue.matrix(name.format(expert)) for expert in range(experts)))
        if kind == "ffn_down_exps.weight":
            return fused(f"{module}.down_proj")
        first = 0 if kind == "ffn_gate_exps.weight" else expert_size  # rows of the gate come first
        return Rows(fused(f"{module}.gate_up_proj"), first, first + expert_size)

    def find(name: str) -> Expression:
        if name in _GLOBAL_NAMES:
            return _take(catalogue, _GLOBAL_NAMES[name])
        _, layer, kind = name.split(".", 2)
        prefix = f"layers.{layer}" if f"layers.{layer}.attn_norm.weight" in catalogue else f"model.layers.{layer}"
        if kind in _EXPERT_NAMES:
            return stack(prefix, kind)
        return _take(catalogue, (f"{prefix}.{candidate}" for candidate in _LAYER_NAMES[kind]))

    return find


def _take(catalogue: Catalogue, candidates: Iterable[str]) -> Expression:
    names = list(candidates)
    name = next((name for name in names if name in catalogue), names[0])
    if name.endswith(".weight"):
        return catalogue.matrix(name.removesuffix(".weight"))
    return catalogue.integers(name) if name.endswith(".tid2eid") else catalogue.plain(name)
