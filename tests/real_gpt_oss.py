"""The complete tensor lists of published gpt-oss checkpoints: names, shapes and dtypes, without the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod

import real_models
from moecast.archs.expressions import TensorInfo

_DTYPE_BYTES = {"BF16": 2, "U8": 1}
_Stored = Iterator[tuple[str, tuple[int, ...], str]]


@cache
def tensors(name: str, mxfp4: bool = True) -> tuple[TensorInfo, ...]:
    """Of the release whose config.json has that name in tests/data, or of the same model all in BF16."""
    return tuple(
        TensorInfo(tensor, dtype, shape, "hub", 0, prod(shape) * _DTYPE_BYTES[dtype])
        for tensor, shape, dtype in _stored(real_models.config(name).get, mxfp4)
    )


def _stored(key: Callable[[str], int], mxfp4: bool) -> _Stored:
    hidden, inner, experts = key("hidden_size"), key("intermediate_size"), key("num_local_experts")
    heads, size = key("num_attention_heads"), key("head_dim")
    queries, keys = heads * size, key("num_key_value_heads") * size
    for whole in ("model.embed_tokens.weight", "lm_head.weight"):
        yield whole, (key("vocab_size"), hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    for layer in range(key("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (hidden,), "BF16"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.router", experts, hidden),
        ):
            yield f"{prefix}.{name}.weight", (rows, columns), "BF16"
            yield f"{prefix}.{name}.bias", (rows,), "BF16"
        yield f"{prefix}.self_attn.sinks", (heads,), "BF16"
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            stack = f"{prefix}.mlp.experts.{name}"
            yield f"{stack}_bias", (experts, rows), "BF16"
            if mxfp4:
                yield f"{stack}_blocks", (experts, rows, columns // 32, 16), "U8"
                yield f"{stack}_scales", (experts, rows, columns // 32), "U8"
            else:
                yield stack, (experts, columns, rows), "BF16"
