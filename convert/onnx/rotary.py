"""Rotary embeddings in ONNX. Angles follow from the positions, so no table limits the context."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Rope
from ...runner.rotary import frequencies
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
    still = size - rope.size if rope.last else 0
    angles = _angles(build, rope, positions or token_positions(build), backwards)
    turning = heads
    if still:
        before, turning = build.split(build.reshape(heads, [0, 0, number, size]), [still, rope.size])
        turning = build.reshape(turning, [0, 0, number * rope.size])
    turned = build.op(
        "RotaryEmbedding",
        *(turning, *angles),
        num_heads=number,
        rotary_embedding_dim=rope.size,
        interleaved=int(rope.interleaved),
    )
    if not still:
        return turned
    joined = build.op("Concat", before, build.reshape(turned, [0, 0, number, rope.size]), axis=-1)
    return build.reshape(joined, [0, 0, number * size])


def _angles(build: Builder, rope: Rope, positions: ir.Value, backwards: bool) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines, [batch, sequence, size / 2]."""

    def make() -> tuple[ir.Value, ir.Value]:
        turns = build.op("Unsqueeze", build.op("Cast", positions, to=ir.DataType.FLOAT), build.constant([-1]))
        angle = build.op("Mul", turns, build.constant(frequencies(rope).numpy()))
        return build.op("Cos", angle), build.op("Sin", angle)

    cosine, sine = build.once((rope, positions.name), make)
    if backwards:
        sine = build.once((rope, positions.name, "backwards"), lambda: build.op("Neg", sine))
    return cosine, sine
