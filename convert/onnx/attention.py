"""Grouped-query attention in ONNX, with its keys and values as state."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Attention, Norm
from ...archs.weights import Weight
from .block_selection import selection_bias
from .builder import Builder
from .positions import span, token_positions
from .rotary import rotate


def attention(build: Builder, operation: Attention, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what attention adds, of the same shape."""
    o = operation
    query, gate = _query_and_gate(build, o, states)
    query = _prepared(build, o, query, o.query_norm, o.heads)
    mixed = _own(build, o, query, states, layer) if o.key else _of_another(build, o, query)
    if gate is not None:
        mixed = build.op("Mul", mixed, build.op("Sigmoid", gate))
    return _projected(build, mixed, o.output, o.output_bias)


def _own(build: Builder, operation: Attention, query: ir.Value, states: ir.Value, layer: int) -> ir.Value:
    """What heads find in keys and values that the layer remembers, [batch, sequence, heads * head size]."""
    o = operation
    assert o.key
    projected = _projected(build, states, o.key, o.key_bias)
    key = _prepared(build, o, projected, o.key_norm, o.key_value_heads)
    value = _projected(build, states, o.value, o.value_bias) if o.value else projected
    if o.value_epsilon is not None:
        apart = build.reshape(value, [0, 0, o.key_value_heads, o.head_size])
        apart = build.normalize(apart, o.head_size, o.value_epsilon)
        value = build.reshape(apart, [0, 0, o.key_value_heads * o.head_size])
    last, total = _lengths(build)
    shape = (o.key_value_heads, 0, o.head_size)
    memories = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    results = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    past = [build.state(memory, result, shape, growing=1) for memory, result in zip(memories, results, strict=True)]
    bias = selection_bias(build, o.selection, states, layer, o.heads) if o.selection else None
    added = (bias, build.weight(o.sink)) if o.sink else (bias,)
    mixed, *present = build.ops(
        "GroupQueryAttention",
        *(query, key, value, *past, last, total),
        *((*[None] * 3, *added) if any(added) else ()),
        outputs=3,
        domain="com.microsoft",
        num_heads=o.heads,
        kv_num_heads=o.key_value_heads,
        **({"local_window_size": o.window} if o.window else {}),
        **({"scale": o.scale} if o.scale is not None else {}),
    )
    for name, state in zip(results, present, strict=True):
        build.remember(name, state)
    build.once(("remembered", layer), lambda: present)
    return mixed


def _of_another(build: Builder, operation: Attention, query: ir.Value) -> ir.Value:
    """The same of what an earlier layer remembers, the new tokens among it."""
    o = operation
    keys, values = build.made(("remembered", o.keys_of))
    heads = build.op("Transpose", build.reshape(query, [0, 0, o.heads, o.head_size]), perm=[0, 2, 1, 3])
    mixed = build.op("Attention", heads, keys, values, _visible(build, o.window), scale=o.softmax_scale)
    mixed = build.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return build.reshape(mixed, [0, 0, o.heads * o.head_size])


def _visible(build: Builder, window: int | None) -> ir.Value:
    """Which of all tokens so far each of the new ones sees, bool [batch, 1, sequence, tokens]."""

    def make() -> ir.Value:
        tokens = build.op("Range", build.constant(0), span(build)[1], build.constant(1))
        positions = build.op("Unsqueeze", token_positions(build), build.constant([1, 3]))
        distance = build.op("Sub", positions, tokens)
        seen = build.op("GreaterOrEqual", distance, build.constant(0))
        return build.op("And", seen, build.op("Less", distance, build.constant(window))) if window else seen

    return build.once(("visible", window), make)


def _query_and_gate(build: Builder, operation: Attention, states: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """What heads ask and how much of the answer they let through, [batch, sequence, heads * head size] each."""
    o = operation
    projected = _projected(build, states, o.query, o.query_bias)
    if not o.gated:
        return projected, None
    apart = build.split(build.reshape(projected, [0, 0, o.heads, 2 * o.head_size]), [o.head_size] * 2)
    query, gate = (build.reshape(half, [0, 0, o.heads * o.head_size]) for half in apart)
    return query, gate


def _projected(build: Builder, states: ir.Value, weight: Weight, bias: Weight | None) -> ir.Value:
    """states [..., columns] -> [..., rows]"""
    projected = build.project(states, weight)
    return build.op("Add", projected, build.weight(bias)) if bias else projected


def _prepared(build: Builder, operation: Attention, projected: ir.Value, norm: Norm | None, heads: int) -> ir.Value:
    """Queries or keys [batch, sequence, heads * head size], normed and rotated."""
    if norm and norm.weight.columns == heads * operation.head_size:
        projected = build.norm(projected, norm)
    elif norm:
        apart = build.norm(build.reshape(projected, [0, 0, heads, operation.head_size]), norm)
        projected = build.reshape(apart, [0, 0, heads * operation.head_size])
    return rotate(build, projected, (heads, operation.head_size), operation.rope) if operation.rope else projected


def _lengths(build: Builder) -> tuple[ir.Value, ir.Value]:
    """Index of each text's last token, int32 [batch], and the number of tokens of the longest, int32 []."""

    def make() -> tuple[ir.Value, ir.Value]:
        mask = build.input("attention_mask", "int64", ["batch", "total_sequence"])
        count = build.op("ReduceSum", mask, build.constant([1]), keepdims=0)
        last = build.op("Sub", count, build.constant(1))
        total = build.op("Squeeze", build.op("Shape", mask, start=1, end=2))
        return build.to_int32(last), build.to_int32(total)

    return build.once("lengths", make)
