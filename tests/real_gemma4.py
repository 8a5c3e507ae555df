"""The complete tensor lists of published Gemma 4 checkpoints: names, shapes and dtypes, without the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any

import real_models
from moecast.archs.expressions import TensorInfo

_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_PREFIX = "model.language_model"

_Stored = Iterator[tuple[str, tuple[int, ...], str]]


@cache
def tensors(name: str, nvfp4: str = "nothing") -> tuple[TensorInfo, ...]:
    """Of the release whose config.json has that name in tests/data; modules with `nvfp4` in their names are in that."""
    config = real_models.config(name)
    listed = [*_language(config.get("text_config"), nvfp4), *_vision(config.get("vision_config"))]
    if config.get("vision_config"):
        rows, columns = config.get("text_config")["hidden_size"], config.get("vision_config")["hidden_size"]
        listed += _plain("model.embed_vision.embedding_projection", rows, columns)
    return tuple(
        TensorInfo(tensor, dtype, shape, "hub", 0, prod(shape) * _DTYPE_BYTES[dtype]) for tensor, shape, dtype in listed
    )


def _plain(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns), "BF16"


def _modelopt(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns // 2), "U8"
    yield f"{module}.weight_scale", (rows, columns // 16), "F8_E4M3"
    for suffix in ("weight_scale_2", "input_scale"):
        yield f"{module}.{suffix}", (), "F32"


def _language(text: dict[str, Any], nvfp4: str) -> _Stored:
    hidden, layers, width = text["hidden_size"], text["num_hidden_layers"], text.get("hidden_size_per_layer_input")
    yield f"{_PREFIX}.embed_tokens.weight", (text["vocab_size"], hidden), "BF16"
    yield f"{_PREFIX}.norm.weight", (hidden,), "BF16"
    if width:
        yield from _plain(f"{_PREFIX}.embed_tokens_per_layer", text["vocab_size_per_layer_input"], layers * width)
        yield from _plain(f"{_PREFIX}.per_layer_model_projection", layers * width, hidden)
        yield f"{_PREFIX}.per_layer_projection_norm.weight", (width,), "BF16"
    for layer in range(layers):
        module = f"{_PREFIX}.layers.{layer}"
        places = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        for norm in (f"{place}_layernorm" for place in places):
            yield f"{module}.{norm}.weight", (hidden,), "BF16"
        yield f"{module}.layer_scalar", (1,), "BF16"
        yield from _attention(f"{module}.self_attn", text, text["layer_types"][layer] == "full_attention")
        wide = text.get("use_double_wide_mlp") and layer >= layers - text["num_kv_shared_layers"]
        encoded = _modelopt if nvfp4 in f"{module}.mlp" else _plain
        inner = text["intermediate_size"] * (2 if wide else 1)
        yield from encoded(f"{module}.mlp.gate_proj", inner, hidden)
        yield from encoded(f"{module}.mlp.up_proj", inner, hidden)
        yield from encoded(f"{module}.mlp.down_proj", hidden, inner)
        if text.get("enable_moe_block"):
            yield from _experts(module, text, nvfp4)
        if width:
            yield from _plain(f"{module}.per_layer_input_gate", width, hidden)
            yield from _plain(f"{module}.per_layer_projection", hidden, width)
            yield f"{module}.post_per_layer_input_norm.weight", (hidden,), "BF16"


def _attention(module: str, text: dict[str, Any], full: bool) -> _Stored:
    """Keys and values stand in all layers, also in those that use the ones of others."""
    hidden, size = text["hidden_size"], text["global_head_dim" if full else "head_dim"]
    from_keys = full and text["attention_k_eq_v"]
    keys = size * text["num_global_key_value_heads" if from_keys else "num_key_value_heads"]
    yield from _plain(f"{module}.q_proj", text["num_attention_heads"] * size, hidden)
    yield from _plain(f"{module}.k_proj", keys, hidden)
    if not from_keys:
        yield from _plain(f"{module}.v_proj", keys, hidden)
    yield from _plain(f"{module}.o_proj", hidden, text["num_attention_heads"] * size)
    for norm in ("q_norm", "k_norm"):
        yield f"{module}.{norm}.weight", (size,), "BF16"


def _experts(module: str, text: dict[str, Any], nvfp4: str) -> _Stored:
    hidden, count, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    for place in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
        yield f"{module}.{place}.weight", (hidden,), "BF16"
    yield from _plain(f"{module}.router.proj", count, hidden)
    yield f"{module}.router.scale", (hidden,), "BF16"
    yield f"{module}.router.per_expert_scale", (count,), "BF16"
    if nvfp4 not in f"{module}.experts":
        yield f"{module}.experts.gate_up_proj", (count, 2 * inner, hidden), "BF16"
        yield f"{module}.experts.down_proj", (count, hidden, inner), "BF16"
        return
    for expert in range(count):
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield from _modelopt(f"{module}.experts.{expert}.{name}_proj", rows, columns)


def _vision(vision: dict[str, Any] | None) -> _Stored:
    if not vision:
        return
    width, inner, tower = vision["hidden_size"], vision["intermediate_size"], "model.vision_tower"
    heads, size = vision["num_attention_heads"], vision["head_dim"]
    yield from _plain(f"{tower}.patch_embedder.input_proj", width, 3 * vision["patch_size"] ** 2)
    yield f"{tower}.patch_embedder.position_embedding_table", (2, vision["position_embedding_size"], width), "BF16"
    for layer in range(vision["num_hidden_layers"]):
        module = f"{tower}.encoder.layers.{layer}"
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{module}.{place}_layernorm.weight", (width,), "BF16"
        for name in ("q", "k", "v"):
            yield from _plain(f"{module}.self_attn.{name}_proj.linear", heads * size, width)
        yield from _plain(f"{module}.self_attn.o_proj.linear", width, heads * size)
        for name in ("gate", "up"):
            yield from _plain(f"{module}.mlp.{name}_proj.linear", inner, width)
        yield from _plain(f"{module}.mlp.down_proj.linear", width, inner)
        for norm in ("q_norm", "k_norm"):
            yield f"{module}.self_attn.{norm}.weight", (size,), "BF16"
    for name in ("std_bias", "std_scale"):
        yield f"{tower}.{name}", (width,), "BF16"
