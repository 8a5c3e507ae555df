"""What DeepSeek V4's tensors are called: on the Hub, saved by transformers, and in transformers' memory.

Every GGUF name is followed by the names it may have in a checkpoint; whichever is there is taken.
"""

from __future__ import annotations

from functools import cache

from .catalogue import Catalogue
from .weights import Expression, Rows, SideBySide, Stack

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


class CheckpointSource:
    """Finds a weight by its GGUF name, whichever way the checkpoint names it."""

    def __init__(self, catalogue: Catalogue, layers: int, experts: int, expert_size: int) -> None:
        self._catalogue = catalogue
        self._layers = layers
        self._experts = experts
        self._expert_size = expert_size
        self._fused = cache(catalogue.plain)  # several weights each

    def __call__(self, name: str) -> Expression:
        """A weight of the model itself."""
        if name in _GLOBAL_NAMES:
            return self._take(_GLOBAL_NAMES[name])
        _, layer, kind = name.split(".", 2)
        hub = f"layers.{layer}"
        return self._in_block(hub if f"{hub}.attn_norm.weight" in self._catalogue else f"model.{hub}", kind)

    def draft(self, name: str) -> Expression:
        """A weight of the draft, whose blocks are numbered on from the layers and which has an ending of its own."""
        if name in _GLOBAL_NAMES:
            return self._take((f"mtp.0.{_GLOBAL_NAMES[name][0]}",))
        _, block, kind = name.split(".", 2)
        prefix = f"mtp.{int(block) - self._layers}"
        if kind == "nextn.eh_proj.weight":
            return SideBySide((self._catalogue.matrix(f"{prefix}.e_proj"), self._catalogue.matrix(f"{prefix}.h_proj")))
        if kind.startswith("nextn."):
            return self._catalogue.plain(f"{prefix}.{kind.removeprefix('nextn.')}")
        return self._in_block(prefix, kind)

    def _in_block(self, prefix: str, kind: str) -> Expression:
        if kind in _EXPERT_NAMES:
            return self._stack(prefix, kind)
        return self._take(tuple(f"{prefix}.{candidate}" for candidate in _LAYER_NAMES[kind]))

    def _stack(self, prefix: str, kind: str) -> Expression:
        module = f"{prefix}.mlp.experts"
        if f"{module}.gate_up_proj" not in self._catalogue:
            name = f"{prefix}.ffn.experts.{{}}.{_EXPERT_NAMES[kind]}"
            return Stack(tuple(self._catalogue.matrix(name.format(expert)) for expert in range(self._experts)))
        if kind == "ffn_down_exps.weight":
            return self._fused(f"{module}.down_proj")
        first = 0 if kind == "ffn_gate_exps.weight" else self._expert_size  # rows of the gate come first
        return Rows(self._fused(f"{module}.gate_up_proj"), first, first + self._expert_size)

    def _take(self, candidates: tuple[str, ...]) -> Expression:
        name = next((name for name in candidates if name in self._catalogue), candidates[0])
        if name.endswith(".weight"):
            return self._catalogue.matrix(name.removesuffix(".weight"))
        return self._catalogue.integers(name) if name.endswith(".tid2eid") else self._catalogue.plain(name)
