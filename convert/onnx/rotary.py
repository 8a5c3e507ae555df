"""Rotary embeddings in ONNX. Angles follow from the positions, so no table limits the context."""

from __future__ import annotations

import onnx_ir as ir
from torch.nn import functional

from ...archs.graph import Rope
from ...runner.blocks.rotary import frequencies
from .builder import Builder
from .positions import token_positions


def rotate(
    build: Builder,
    heads: ir.Value,
    sizes: tuple[int, int],
    rope: Rope,
    positions: ir.Value | None = None,
    backwards: bool = False,
) -> ir.Value:
    """Rotates each head of [batch, sequence, number of heads * head size].

    Args:
        sizes: number of heads and head size.
        positions: int64 [batch, sequence], those of the new tokens by default.
        backwards: by the negative positions.
    """
    number, size = sizes
    cosine, sine = _angles(build, rope, size, positions or token_positions(build))
    if backwards:
        sine = build.once(("backwards", sine.name), lambda: build.op("Neg", sine))
    return build.op(
        "RotaryEmbedding",
        *(heads, cosine, sine),
        num_heads=number,
        rotary_embedding_dim=size if rope.last else rope.size,
        interleaved=int(rope.interleaved),
    )


def _angles(build: Builder, rope: Rope, size: int, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines of each pair, [batch, sequence, pairs].

    Where the last dimensions turn, those before them do so by nothing: far faster than to take heads apart.
    """
    assert rope.interleaved or not rope.last, "only neighbours are pairs wherever they stand in a head"
    still = (size - rope.size) // 2 if rope.last else 0
    magnitude = rope.yarn.magnitude if rope.yarn else 1.0
    assert not (rope.divisors and still), "pairs that do not turn have no divisors"
    assert magnitude == 1 or not still, "what does not turn is not multiplied either"

    def make() -> tuple[ir.Value, ir.Value]:
        turns = build.op("Unsqueeze", build.op("Cast", positions, to=ir.DataType.FLOAT), build.constant([-1]))
        angle = build.op("Mul", turns, build.constant(functional.pad(frequencies(rope), (still, 0)).numpy()))
        angle = build.op("Div", angle, build.weight(rope.divisors)) if rope.divisors else angle
        return build.scaled(build.op("Cos", angle), magnitude), build.scaled(build.op("Sin", angle), magnitude)

    return build.once((rope, still, positions.name), make)
