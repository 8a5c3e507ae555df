"""Rotary embeddings in ONNX. Angles follow from the positions, so no table limits the context."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Rope
from ...runner.rotary import frequencies
from .builder import Builder


def rotate(build: Builder, states: ir.Value, rope: Rope, heads: int) -> ir.Value:
    """Rotates the first dimensions of each head of [batch, sequence, heads * head size] by the tokens' positions."""
    cosine, sine = angles(build, rope)
    return build.op(
        "RotaryEmbedding",
        *(states, cosine, sine),
        num_heads=heads,
        rotary_embedding_dim=rope.size,
        interleaved=int(rope.interleaved),
    )


def angles(build: Builder, rope: Rope) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines for the new tokens, [batch, sequence, size / 2]."""

    def make() -> tuple[ir.Value, ir.Value]:
        positions = build.input("position_ids", "int64", ["batch", "sequence"])
        turns = build.op("Unsqueeze", build.op("Cast", positions, to=ir.DataType.FLOAT), build.constant([-1]))
        angle = build.op("Mul", turns, build.constant(frequencies(rope).numpy()))
        return build.op("Cos", angle), build.op("Sin", angle)

    return build.once(rope, make)
