"""Token positions in ONNX, and the counts that follow from them."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder


def token_positions(build: Builder) -> ir.Value:
    """The model's input: positions of the new tokens, int64 [batch, sequence]."""
    return build.input("position_ids", "int64", ["batch", "sequence"])


def span(build: Builder) -> tuple[ir.Value, ir.Value]:
    """How many tokens came before the new ones, and how many there are with them, int64 []."""

    def make() -> tuple[ir.Value, ir.Value]:
        positions = token_positions(build)
        before = build.op("ReduceMin", positions, keepdims=0)
        return before, build.op("Add", build.op("ReduceMax", positions, keepdims=0), build.constant(1))

    return build.once("span", make)


def whole_windows(build: Builder, ratio: int) -> tuple[ir.Value, ir.Value]:
    """How many windows of `ratio` tokens were whole before the new ones, and how many are with them, int64 []."""

    def make() -> tuple[ir.Value, ir.Value]:
        before, after = (build.op("Div", count, build.constant(ratio)) for count in span(build))
        return before, after

    return build.once(("whole windows", ratio), make)


def batch_and_sequence(build: Builder) -> ir.Value:
    """Number of texts and of new tokens of each, int64 [2]."""
    return build.once("batch and sequence", lambda: build.op("Shape", token_positions(build)))


def batch_size(build: Builder) -> ir.Value:
    """int64 [1]"""
    return build.once("batch size", lambda: build.op("Shape", token_positions(build), end=1))
