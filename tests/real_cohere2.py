"""The complete tensor lists of published Cohere2 checkpoints: names, shapes and dtypes, without the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod

import real_models
from moecast.archs.config import Config
from moecast.archs.expressions import TensorInfo

_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_TOWER = 27  # layers for pictures

_Stored = Iterator[tuple[str, tuple[int, ...], str]]
_Encoding = Callable[[str, int, int], _Stored]  # a matrix by its module, rows and columns


def _plain(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns), "BF16"


def _nvfp4(module: str, rows: int, columns: int) -> _Stored:
    """As compressed-tensors packs it."""
    yield f"{module}.weight_packed", (rows, columns // 2), "U8"
    yield f"{module}.weight_scale", (rows, columns // 16), "F8_E4M3"
    for suffix in ("weight_global_scale", "input_global_scale"):
        yield f"{module}.{suffix}", (1,), "F32"


def _fp8(module: str, rows: int, columns: int) -> _Stored:
    """A scale for each row."""
    yield f"{module}.weight", (rows, columns), "F8_E4M3"
    yield f"{module}.weight_scale", (rows, 1), "BF16"


_EXPERTS: dict[str, _Encoding] = {"BF16": _plain, "NVFP4": _nvfp4, "FP8": _fp8}


@cache
def tensors(name: str, encoding: str = "BF16") -> tuple[TensorInfo, ...]:
    """Of the configuration of that name in tests/data; `encoding` is that of routed experts."""
    config = real_models.config(name)
    text = config.section("text_config")
    pictured = bool(text.keys())
    listed = [*_text(text if pictured else config, "model.language_model." if pictured else "model.", encoding)]
    listed += _tower() if pictured else ()
    return tuple(
        TensorInfo(name, dtype, shape, "hub", 0, prod(shape) * _DTYPE_BYTES[dtype]) for name, shape, dtype in listed
    )


def _text(config: Config, prefix: str, encoding: str) -> _Stored:
    hidden, experts = config.integer("hidden_size"), config.integer("num_experts", default=0)
    heads, key_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    size, head = config.integer("intermediate_size"), config.integer("head_dim")
    dense = config.integer("first_k_dense_replace", default=0) if experts else config.integer("num_hidden_layers")
    dense_size = config.integer("prefix_dense_intermediate_size", default=size)
    shared = size * config.integer("num_shared_experts", default=0)
    yield f"{prefix}embed_tokens.weight", (config.integer("vocab_size"), hidden), "BF16"
    yield f"{prefix}norm.weight", (hidden,), "BF16"
    for layer in range(config.integer("num_hidden_layers")):
        below = f"{prefix}layers.{layer}"
        yield f"{below}.input_layernorm.weight", (hidden,), "BF16"
        for kind, count in (("q", heads), ("k", key_heads), ("v", key_heads)):
            yield from _plain(f"{below}.self_attn.{kind}_proj", count * head, hidden)
        yield from _plain(f"{below}.self_attn.o_proj", hidden, heads * head)
        if layer < dense:
            yield from _gated(f"{below}.mlp", hidden, dense_size, _plain)
            continue
        yield f"{below}.mlp.gate.weight", (experts, hidden), "BF16"
        for expert in range(experts):
            yield from _gated(f"{below}.mlp.experts.{expert}", hidden, size, _EXPERTS[encoding])
        if shared:
            yield from _gated(f"{below}.mlp.shared_experts", hidden, shared, _plain)


def _gated(module: str, hidden: int, size: int, encoded: _Encoding) -> _Stored:
    yield from encoded(f"{module}.gate_proj", size, hidden)
    yield from encoded(f"{module}.up_proj", size, hidden)
    yield from encoded(f"{module}.down_proj", hidden, size)


def _tower() -> _Stored:
    """Some of what sees pictures."""
    for layer in range(_TOWER):
        yield from _plain(f"model.vision_tower.encoder.layers.{layer}.self_attn.out_proj", 1152, 1152)
    yield from _plain("model.multi_modal_projector.linear_2", 4096, 18432)
