"""The complete tensor lists of published checkpoints with latent attention: names, shapes and dtypes, no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from typing import Any

import real_models
from moecast.archs.expressions import TensorInfo

_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4}

Entries = Iterator[tuple[str, tuple[int, ...], str]]


def _plain(module: str, rows: int, columns: int) -> Entries:
    yield f"{module}.weight", (rows, columns), "BF16"


def _fp8(module: str, rows: int, columns: int) -> Entries:
    yield f"{module}.weight", (rows, columns), "F8_E4M3"
    yield f"{module}.weight_scale_inv", (-(-rows // 128), -(-columns // 128)), "F32"


def _int4(module: str, rows: int, columns: int) -> Entries:
    """compressed-tensors'."""
    yield f"{module}.weight_packed", (rows, columns // 8), "I32"
    yield f"{module}.weight_scale", (rows, columns // 32), "BF16"
    yield f"{module}.weight_shape", (2,), "I32"


def _nvfp4(module: str, rows: int, columns: int) -> Entries:
    """ModelOpt's, with scales of activations."""
    yield f"{module}.weight", (rows, columns // 2), "U8"
    yield f"{module}.weight_scale", (rows, columns // 16), "F8_E4M3"
    for suffix in ("weight_scale_2", "input_scale"):
        yield f"{module}.{suffix}", (), "F32"


def _experts_int4(module: str, rows: int, columns: int) -> Entries:
    return (_int4 if ".experts." in module else _plain)(module, rows, columns)


def _nvfp4_of_v3(module: str, rows: int, columns: int) -> Entries:
    """All but what makes queries, keys and values, and the drafting block."""
    kept = ".layers.61." in module or ("self_attn" in module and not module.endswith("o_proj"))
    return (_plain if kept else _nvfp4)(module, rows, columns)


def _nvfp4_of_kimi(module: str, rows: int, columns: int) -> Entries:
    return (_nvfp4 if ".experts." in module else _plain)(module, rows, columns)


def _nvfp4_of_glm(module: str, rows: int, columns: int) -> Entries:
    kept = ".experts." not in module or ".layers.78." in module
    return (_plain if kept else _nvfp4)(module, rows, columns)


# By the names of configurations in tests/data: what they are stored in, and what is before their names.
RELEASES: dict[str, tuple[Callable[[str, int, int], Entries], str]] = {
    "deepseek-v3": (_fp8, ""),
    "deepseek-v3.2": (_fp8, ""),
    "glm-5": (_plain, ""),
    "glm-5.2": (_plain, ""),
    "glm-5.2-nvfp4": (_nvfp4_of_glm, ""),
    "kimi-k2": (_fp8, ""),
    "kimi-k2.5": (_experts_int4, "language_model."),
    "kimi-k2.7-nvfp4": (_nvfp4_of_kimi, "language_model."),
}
ENCODINGS = {"NVFP4": _nvfp4_of_v3, "BF16": _plain, "FP8": _fp8}


@cache
def tensors(name: str, encoding: str | None = None) -> tuple[TensorInfo, ...]:
    """Of the release whose config.json has that name in tests/data, in its encoding or in another one."""
    released, prefix = RELEASES[name]
    values = dict(real_models.config(name)._values)
    model = _Model(values.get("text_config", values), ENCODINGS[encoding] if encoding else released, prefix)
    entries = [*model.tensors(), *(_vision(values["vision_config"]) if prefix else ())]
    return tuple(
        TensorInfo(name, dtype, shape, "hub", 0, prod(shape) * _DTYPE_BYTES[dtype]) for name, shape, dtype in entries
    )


class _Model:
    def __init__(self, config: dict[str, Any], linear: Callable[[str, int, int], Entries], prefix: str) -> None:
        self.config, self.key = config, config.__getitem__
        self.linear = linear
        self.prefix = prefix
        self.drafts = config.get("num_nextn_predict_layers", 0)
        kinds = config.get("indexer_types", ["full"] * config["num_hidden_layers"])
        self.picking = [*(kind == "full" for kind in kinds), *[True] * self.drafts]

    def tensors(self) -> Entries:
        hidden, vocabulary, layers = map(self.key, ("hidden_size", "vocab_size", "num_hidden_layers"))
        yield f"{self.prefix}model.embed_tokens.weight", (vocabulary, hidden), "BF16"
        yield f"{self.prefix}model.norm.weight", (hidden,), "BF16"
        yield f"{self.prefix}lm_head.weight", (vocabulary, hidden), "BF16"
        for index in range(layers + self.drafts):
            layer = f"{self.prefix}model.layers.{index}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{layer}.{norm}.weight", (hidden,), "BF16"
            yield from self._attention(f"{layer}.self_attn")
            if self.picks(index):
                yield from self._indexer(f"{layer}.self_attn.indexer")
            yield from self._feed_forward(f"{layer}.mlp", index < self.key("first_k_dense_replace"))
            if index >= layers:
                for norm in ("enorm", "hnorm", "shared_head.norm"):
                    yield f"{layer}.{norm}.weight", (hidden,), "BF16"
                yield from _plain(f"{layer}.eh_proj", hidden, 2 * hidden)
                if self.key("model_type") == "glm_moe_dsa":
                    continue
                yield from _plain(f"{layer}.embed_tokens", vocabulary, hidden)
                yield from _plain(f"{layer}.shared_head.head", vocabulary, hidden)

    def _attention(self, module: str) -> Entries:
        hidden, heads, rank, latent, plain, turned, value = map(
            self.key,
            (
                *("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
                *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
            ),
        )
        yield from self.linear(f"{module}.q_a_proj", rank, hidden)
        yield f"{module}.q_a_layernorm.weight", (rank,), "BF16"
        yield from self.linear(f"{module}.q_b_proj", heads * (plain + turned), rank)
        yield from self.linear(f"{module}.kv_a_proj_with_mqa", latent + turned, hidden)
        yield f"{module}.kv_a_layernorm.weight", (latent,), "BF16"
        yield from self.linear(f"{module}.kv_b_proj", heads * (plain + value), latent)
        yield from self.linear(f"{module}.o_proj", hidden, heads * value)

    def picks(self, layer: int) -> bool:
        """Whether it has an indexer."""
        return "index_topk" in self.config and self.picking[layer]

    def _indexer(self, module: str) -> Entries:
        heads, size = self.key("index_n_heads"), self.key("index_head_dim")
        norm = "F32" if self.key("model_type") == "deepseek_v32" else "BF16"
        yield from self.linear(f"{module}.wq_b", heads * size, self.key("q_lora_rank"))
        yield from self.linear(f"{module}.wk", size, self.key("hidden_size"))
        yield f"{module}.k_norm.weight", (size,), norm
        yield f"{module}.k_norm.bias", (size,), norm
        yield from _plain(f"{module}.weights_proj", heads, self.key("hidden_size"))

    def _feed_forward(self, module: str, dense: bool) -> Entries:
        hidden, size, experts = map(self.key, ("hidden_size", "moe_intermediate_size", "n_routed_experts"))
        if dense:
            yield from self._mlp(module, self.key("intermediate_size"))
            return
        yield f"{module}.gate.weight", (experts, hidden), "BF16"
        yield f"{module}.gate.e_score_correction_bias", (experts,), "F32"
        yield from self._mlp(f"{module}.shared_experts", size * self.key("n_shared_experts"))
        for expert in range(experts):
            yield from self._mlp(f"{module}.experts.{expert}", size)

    def _mlp(self, module: str, size: int) -> Entries:
        hidden = self.key("hidden_size")
        yield from self.linear(f"{module}.gate_proj", size, hidden)
        yield from self.linear(f"{module}.up_proj", size, hidden)
        yield from self.linear(f"{module}.down_proj", hidden, size)


def _vision(config: dict[str, Any]) -> Entries:
    """Kimi K2.5's tower for pictures, and what leads from it to the language model."""
    size, inner, patch = (config[key] for key in ("vt_hidden_size", "vt_intermediate_size", "patch_size"))
    places = (config["init_pos_emb_height"], config["init_pos_emb_width"])
    merged = config["mm_hidden_size"] * prod(config["merge_kernel_size"])

    def both(module: str, *shape: int) -> Entries:
        yield f"{module}.weight", shape, "BF16"
        yield f"{module}.bias", shape[:1], "BF16"

    yield from both("vision_tower.patch_embed.proj", size, 3, patch, patch)
    yield "vision_tower.patch_embed.pos_emb.weight", (*places, size), "BF16"
    for layer in range(config["vt_num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{layer}"
        for norm in ("norm0", "norm1"):
            yield from both(f"{block}.{norm}", size)
        shapes = {"wqkv": (3 * size, size), "wo": (size, size), "mlp.fc0": (inner, size), "mlp.fc1": (size, inner)}
        for name, shape in shapes.items():
            yield from both(f"{block}.{name}", *shape)
    yield from both("vision_tower.encoder.final_layernorm", size)
    yield from both("mm_projector.pre_norm", config["mm_hidden_size"])
    yield from both("mm_projector.proj.0", merged, merged)
    yield from both("mm_projector.proj.2", config["text_hidden_size"], merged)
