"""Mamba-2 in ONNX: ONNX Runtime's linear attention, whose state a single step continues as a prompt does."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Mamba2
from .builder import Builder


def mamba(build: Builder, operation: Mamba2, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what the block adds, of the same shape.

    Its states are the last inputs of the convolution, [batch, channels, taps - 1], and the space, [batch, heads, state
    size, head size]. The step's decay makes it gated attention, with B as keys, C as queries and step * x as values;
    heads of a group share keys and queries (Dao & Gu 2024).
    """
    o, (channels, _) = operation, operation.convolution.shape
    projected = build.project(states, o.input)
    gate, convolved, step = build.split(projected, [o.inner_size, channels, o.heads])
    mixed = _convolve(build, o, convolved, layer)
    x, keys, queries = build.split(mixed, [o.inner_size, *2 * [o.groups * o.state_size]])
    step = build.op("Softplus", build.op("Add", step, build.weight(o.step_bias)))
    decay = build.op("Mul", step, build.weight(o.decay, [o.heads]))
    x = build.reshape(x, [0, 0, o.heads, o.head_size])
    values = build.op("Mul", x, build.op("Unsqueeze", step, build.constant([-1])))
    joined = build.constant([0, 0, o.inner_size])
    y = _attend(build, o, (queries, keys, build.op("Reshape", values, joined)), decay, layer)
    y = build.op("Add", y, build.op("Reshape", build.op("Mul", x, build.weight(o.skip)), joined))
    group = o.inner_size // o.groups
    gated = build.reshape(build.op("Mul", y, build.silu(gate)), [0, 0, o.groups, group])
    normed = build.op("Mul", build.normalize(gated, group, o.norm.epsilon), build.weight(o.norm.weight))
    return build.project(build.op("Reshape", normed, joined), o.output)


def _convolve(build: Builder, operation: Mamba2, inputs: ir.Value, layer: int) -> ir.Value:
    """[batch, sequence, channels] -> the same shape, through the causal convolution and SiLU."""
    channels, taps = operation.convolution.shape
    past, present, shape = f"past.{layer}.conv", f"present.{layer}.conv", (channels, taps - 1)
    mixed, state = build.ops(
        "CausalConvWithState",
        build.op("Transpose", inputs, perm=[0, 2, 1]),
        build.weight(operation.convolution, [channels, 1, taps]),
        build.weight(operation.convolution_bias),
        build.state(past, present, shape),
        outputs=2,
        domain="com.microsoft",
        activation="silu",
    )
    build.remember(present, state)
    return build.op("Transpose", mixed, perm=[0, 2, 1])


def _attend(
    build: Builder, operation: Mamba2, inputs: tuple[ir.Value, ir.Value, ir.Value], decay: ir.Value, layer: int
) -> ir.Value:
    """Queries, keys and values side by side for all heads, decay [batch, sequence, heads] -> y like the values."""
    o = operation
    past, present, shape = f"past.{layer}.recurrent", f"present.{layer}.recurrent", (o.heads, o.state_size, o.head_size)
    y, space = build.ops(
        "LinearAttention",
        *(*inputs, build.state(past, present, shape), decay),
        outputs=2,
        domain="com.microsoft",
        update_rule="gated",
        q_num_heads=o.groups,
        kv_num_heads=o.heads,
        scale=1.0,
    )
    build.remember(present, space)
    return y
