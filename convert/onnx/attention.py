"""Grouped-query attention in ONNX, with its keys and values as state."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Attention, Norm
from ...archs.weights import Weight
from ...errors import BadInput
from .block_selection import selection_bias
from .builder import Builder
from .rotary import rotate


def attention(build: Builder, operation: Attention, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what attention adds, of the same shape.

    Raises BadInput for attention to another layer's keys.
    """
    o = operation
    if not o.key or not o.value:
        raise BadInput("ONNX has no form for attention to keys of another layer yet: use --to gguf")
    query, gate = _query_and_gate(build, o, states)
    query = _prepared(build, o, query, o.query_norm, o.heads)
    key = _prepared(build, o, _projected(build, states, o.key, o.key_bias), o.key_norm, o.key_value_heads)
    value = _projected(build, states, o.value, o.value_bias)
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
    if gate is not None:
        mixed = build.op("Mul", mixed, build.op("Sigmoid", gate))
    return _projected(build, mixed, o.output, o.output_bias)


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
