"""The complete tensor lists of published Qwen3-MoE checkpoints: names, shapes and dtypes, without the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod

import real_models
from moecast.archs.expressions import TensorInfo

_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4}

_Stored = Iterator[tuple[str, tuple[int, ...], str]]
_Encoding = Callable[[str, int, int], _Stored]  # a matrix by its module, rows and columns


def _plain(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.weight", (rows, columns), "BF16"


def _fp8(module: str, rows: int, columns: int) -> _Stored:
    """Qwen's, whose scales are BF16."""
    yield f"{module}.weight", (rows, columns), "F8_E4M3"
    yield f"{module}.weight_scale_inv", (-(-rows // 128), -(-columns // 128)), "BF16"


def _nvfp4(module: str, rows: int, columns: int) -> _Stored:
    """ModelOpt's, with scales of activations and of the cache."""
    yield f"{module}.weight", (rows, columns // 2), "U8"
    yield f"{module}.weight_scale", (rows, columns // 16), "F8_E4M3"
    for suffix in ("weight_scale_2", "input_scale"):
        yield f"{module}.{suffix}", (), "F32"
    if module.endswith((".k_proj", ".v_proj")):
        yield f"{module}.{module[-6]}_scale", (), "F32"


def _gptq(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.qweight", (columns // 8, rows), "I32"
    yield f"{module}.qzeros", (columns // 128, rows // 8), "I32"
    yield f"{module}.scales", (columns // 128, rows), "F16"
    yield f"{module}.g_idx", (columns,), "I32"


def _awq(module: str, rows: int, columns: int) -> _Stored:
    yield f"{module}.qweight", (columns, rows // 8), "I32"
    yield f"{module}.qzeros", (columns // 128, rows // 8), "I32"
    yield f"{module}.scales", (columns // 128, rows), "F16"


ENCODINGS: dict[str, _Encoding] = {"BF16": _plain, "FP8": _fp8, "NVFP4": _nvfp4, "GPTQ": _gptq, "AWQ": _awq}


@cache
def tensors(name: str, encoding: str = "BF16") -> tuple[TensorInfo, ...]:
    """Of the release whose config.json has that name in tests/data."""
    return tuple(
        TensorInfo(tensor, dtype, shape, "hub", 0, prod(shape) * _DTYPE_BYTES[dtype])
        for tensor, shape, dtype in _stored(real_models.config(name).get, ENCODINGS[encoding])
    )


def _stored(key: Callable[[str], int], encoded: _Encoding) -> _Stored:
    hidden, size, vocabulary = key("hidden_size"), key("head_dim"), key("vocab_size")
    queries, keys = key("num_attention_heads") * size, key("num_key_value_heads") * size
    yield "model.embed_tokens.weight", (vocabulary, hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    yield "lm_head.weight", (vocabulary, hidden), "BF16"
    for layer in range(key("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (hidden,), "BF16"
        for name, rows, columns in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden)):
            yield from encoded(f"{prefix}.self_attn.{name}_proj", rows, columns)
        yield from encoded(f"{prefix}.self_attn.o_proj", hidden, queries)
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{norm}.weight", (size,), "BF16"
        yield f"{prefix}.mlp.gate.weight", (key("num_experts"), hidden), "BF16"
        for expert in range(key("num_experts")):
            module = f"{prefix}.mlp.experts.{expert}"
            yield from encoded(f"{module}.gate_proj", key("moe_intermediate_size"), hidden)
            yield from encoded(f"{module}.up_proj", key("moe_intermediate_size"), hidden)
            yield from encoded(f"{module}.down_proj", hidden, key("moe_intermediate_size"))
