"""What DeepSeek V4's tensors are called: on the Hub, saved by transformers, and in transformers' memory.

The blocks of drafts have the Hub's names, and endings of their own.
"""

from __future__ import annotations

from .catalogue import Catalogue
from .expressions import Expression, SideBySide
from .shared import Experts, Names

WHOLE_NAMES = {
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
    "nextn.enorm.weight": ("enorm.weight",),
    "nextn.hnorm.weight": ("hnorm.weight",),
    "nextn.eh_proj.weight": ("e_proj.weight",),  # and h_proj
    "nextn.shared_head_norm.weight": ("norm.weight",),
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


def _table(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> Expression:
    return catalogue.integers(name)


def _side_by_side(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> Expression:
    prefix = name.removesuffix("e_proj.weight")
    return SideBySide((catalogue.matrix(f"{prefix}e_proj"), catalogue.matrix(f"{prefix}h_proj")))


NAMES = Names(
    layers=("layers.{}.", "model.layers.{}."),
    whole=WHOLE_NAMES,
    layer=_LAYER_NAMES,
    experts={
        "ffn_gate_exps.weight": Experts("ffn.experts.{}.w1", "mlp.experts.gate_up_proj", half=0),
        "ffn_up_exps.weight": Experts("ffn.experts.{}.w3", "mlp.experts.gate_up_proj", half=1),
        "ffn_down_exps.weight": Experts("ffn.experts.{}.w2", "mlp.experts.down_proj"),
    },
    special={"ffn_gate_tid2eid.weight": _table, "nextn.eh_proj.weight": _side_by_side},
)
