"""Mamba-2 in ONNX: ONNX Runtime's linear attention, whose state a single step continues as a prompt does."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Mamba2
from .builder import Builder
from .recurrent import attend, convolve


def mamba(build: Builder, operation: Mamba2, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what the block adds, of the same shape.

    The step's decay makes it gated attention, with B as keys, C as queries and step * x as values; heads of a group
    share keys and queries (Dao & Gu 2024).
    """
    o, (channels, _) = operation, operation.convolution.shape
    projected = build.project(states, o.input)
    gate, convolved, step = build.split(projected, [o.inner_size, channels, o.heads])
    mixed = convolve(build, convolved, o.convolution, o.convolution_bias, layer)
    x, keys, queries = build.split(mixed, [o.inner_size, *2 * [o.groups * o.state_size]])
    step = build.op("Softplus", build.op("Add", step, build.weight(o.step_bias)))
    decay = build.op("Mul", step, build.weight(o.decay, [o.heads]))
    x = build.reshape(x, [0, 0, o.heads, o.head_size])
    values = build.op("Mul", x, build.op("Unsqueeze", step, build.constant([-1])))
    joined = build.constant([0, 0, o.inner_size])
    inputs = (queries, keys, build.op("Reshape", values, joined), decay)
    y = attend(build, inputs, (o.groups, o.state_size), (o.heads, o.head_size), layer, "gated")
    y = build.op("Add", y, build.op("Reshape", build.op("Mul", x, build.weight(o.skip)), joined))
    group = o.inner_size // o.groups
    gated = build.reshape(build.op("Mul", y, build.silu(gate)), [0, 0, o.groups, group])
    normed = build.op("Mul", build.normalize(gated, group, o.norm.epsilon), build.weight(o.norm.weight))
    return build.project(build.op("Reshape", normed, joined), o.output)
