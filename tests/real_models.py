"""The complete tensor lists of published checkpoints: names, shapes and dtypes, without the numbers.

`tests/archs` checks each list's tensor count and bytes against the totals of the published files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

from moecast.archs.config import Config
from moecast.archs.expressions import TensorInfo

DATA = Path(__file__).parent / "data"
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def config(name: str) -> Config:
    """A published config.json from tests/data."""
    path = DATA / f"{name}-config.json"
    return Config(json.loads(path.read_text()), path.name)


@cache
def minimax_m2() -> tuple[TensorInfo, ...]:
    """MiniMax M2, M2.1, M2.5 and M2.7: all releases have the same 96,103 tensors."""
    return tuple(
        TensorInfo(name, dtype, shape, "hub", 0, _bytes(shape, dtype)) for name, shape, dtype in minimax_m2_tensors()
    )


def minimax_m2_tensors(
    layers: int = 62, experts: int = 256, vocabulary: int = 200064
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    hidden, expert_size = 3072, 1536

    def linear(module: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
        yield f"{module}.weight", (rows, columns), "F8_E4M3"
        yield f"{module}.weight_scale_inv", (-(-rows // 128), -(-columns // 128)), "F32"

    yield "model.embed_tokens.weight", (vocabulary, hidden), "BF16"
    yield "model.norm.weight", (hidden,), "BF16"
    yield "lm_head.weight", (vocabulary, hidden), "BF16"
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,), "BF16"
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,), "BF16"
        for name, rows, columns in (("q", 6144, hidden), ("k", 1024, hidden), ("v", 1024, hidden), ("o", hidden, 6144)):
            yield from linear(f"{prefix}.self_attn.{name}_proj", rows, columns)
        yield f"{prefix}.self_attn.q_norm.weight", (6144,), "BF16"
        yield f"{prefix}.self_attn.k_norm.weight", (1024,), "BF16"
        moe = f"{prefix}.block_sparse_moe"
        yield f"{moe}.gate.weight", (experts, hidden), "F32"
        yield f"{moe}.e_score_correction_bias", (experts,), "F32"
        for expert in range(experts):
            yield from linear(f"{moe}.experts.{expert}.w1", expert_size, hidden)
            yield from linear(f"{moe}.experts.{expert}.w2", hidden, expert_size)
            yield from linear(f"{moe}.experts.{expert}.w3", expert_size, hidden)


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return prod(shape) * DTYPE_BYTES[dtype]
