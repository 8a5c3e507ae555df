"""What recurrent operations have in common in ONNX: a causal convolution and a space, each with its state.

The states are the last inputs of the convolution, [batch, channels, taps - 1], and the space, [batch, heads, key size,
value size]. A prompt, a piece of it and a single step are the same operators.
"""

from __future__ import annotations

import onnx_ir as ir

from ...archs.weights import Weight
from .builder import Builder

Heads = tuple[int, int]
"""How many there are, and how wide each is."""


def convolve(build: Builder, inputs: ir.Value, weight: Weight, bias: Weight | None, layer: int) -> ir.Value:
    """[batch, sequence, channels] -> the same shape, through the causal convolution and SiLU."""
    channels, taps = weight.shape
    past, present, shape = f"past.{layer}.conv", f"present.{layer}.conv", (channels, taps - 1)
    mixed, state = build.ops(
        "CausalConvWithState",
        build.op("Transpose", inputs, perm=[0, 2, 1]),
        build.weight(weight, [channels, 1, taps]),
        build.weight(bias) if bias else None,
        build.state(past, present, shape),
        outputs=2,
        domain="com.microsoft",
        activation="silu",
    )
    build.remember(present, state)
    return build.op("Transpose", mixed, perm=[0, 2, 1])


def attend(
    build: Builder,
    inputs: tuple[ir.Value, ...],
    keys: Heads,
    values: Heads,
    layer: int,
    rule: str,
    scale: float = 1.0,
) -> ir.Value:
    """What linear attention answers, like its values; neighbouring heads of values share queries and keys.

    Args:
        inputs: queries, keys and values, [batch, sequence, heads * size] each; then, [batch, sequence, heads] each, the
            logarithm of what the space keeps and, where the rule wants it, how much is written.
        rule: "gated" or "gated_delta".
        scale: of the answers.
    """
    past, present, shape = f"past.{layer}.recurrent", f"present.{layer}.recurrent", (values[0], keys[1], values[1])
    queries_keys_values, rates = inputs[:3], inputs[3:]
    answers, space = build.ops(
        "LinearAttention",
        *(*queries_keys_values, build.state(past, present, shape), *rates),
        outputs=2,
        domain="com.microsoft",
        update_rule=rule,
        q_num_heads=keys[0],
        kv_num_heads=values[0],
        scale=scale,
    )
    build.remember(present, space)
    return answers
