"""Gated DeltaNet in ONNX: ONNX Runtime's linear attention by the delta rule."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import GatedDeltaNet
from .builder import Builder
from .recurrent import attend, convolve


def delta_net(build: Builder, operation: GatedDeltaNet, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what the block adds, of the same shape."""
    o = operation
    mixed = convolve(build, build.project(states, o.input), o.convolution, None, layer)
    widths = o.parts
    lookups, values = build.split(mixed, [widths[0] + widths[1], widths[2]])
    queries, keys = (_for_all_heads(build, o, part) for part in build.split(_unit(build, o, lookups), widths[:2]))
    key_heads = o.heads if o.tiled else o.key_heads
    inputs = (queries, keys, values, *_rates(build, o, states))
    scale = o.key_size**-0.5
    y = attend(build, inputs, (key_heads, o.key_size), (o.heads, o.value_size), layer, "gated_delta", scale)
    norm, gate = build.weight(o.norm.weight), build.project(states, o.gate)
    gated = build.microsoft("GatedRMSNorm", y, norm, gate, activation="silu", epsilon=o.norm.epsilon)
    return build.project(gated, o.output)


def _unit(build: Builder, operation: GatedDeltaNet, lookups: ir.Value) -> ir.Value:
    """Queries and keys side by side, [batch, sequence, width], each head of them of length one."""
    o, size = operation, operation.key_size
    apart = build.reshape(lookups, [0, 0, 2 * o.key_heads, size])
    unit = build.scaled(build.normalize(apart, size, o.key_epsilon / size), size**-0.5)
    return build.reshape(unit, [0, 0, 2 * o.key_heads * size])


def _for_all_heads(build: Builder, operation: GatedDeltaNet, keys: ir.Value) -> ir.Value:
    """Queries or keys as heads want them: the operator has neighbours share one, not every so many."""
    o = operation
    times = o.heads // o.key_heads if o.tiled else 1
    return keys if times == 1 else build.op("Concat", *[keys] * times, axis=-1)


def _rates(build: Builder, operation: GatedDeltaNet, states: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Logarithms of what is kept and how much is written, [batch, sequence, heads] each."""
    o = operation
    beta = build.project(states, o.beta)
    if o.alpha:
        alpha = build.project(states, o.alpha)
    else:
        share = o.heads // o.key_heads
        apart = build.split(build.reshape(beta, [0, 0, o.key_heads, 2 * share]), [share] * 2)
        beta, alpha = (build.reshape(half, [0, 0, o.heads]) for half in apart)
    inputs = (alpha, build.weight(o.step_bias), build.weight(o.decay), beta)
    fading, strength = build.ops("LinearAttentionGate", *inputs, outputs=2, domain="com.microsoft")
    return fading, strength
