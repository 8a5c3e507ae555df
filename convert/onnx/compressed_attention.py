"""Attention to a window of tokens and to compressed entries in ONNX (see `graph.CompressedAttention`).

Positions tell how far everything has got, so one model takes any piece of a text from any state. The texts of a batch
are equally long.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...archs.graph import CompressedAttention
from .builder import Builder
from .compressor import compress, entries_complete
from .indexer import choose
from .positions import batch_size, span, token_positions
from .rotary import rotate


def compressed_attention(build: Builder, operation: CompressedAttention, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what attention adds, of the same shape.

    Its states are the last rotated keys, and those of the compressors.
    """
    o = operation
    latent = build.norm(build.project(states, o.query_down), o.query_norm)
    queries = build.reshape(build.project(latent, o.query_up), [0, 0, o.heads, o.head_size])
    queries = build.normalize(queries, o.head_size, o.query_norm.epsilon)
    queries = rotate(build, build.reshape(queries, [0, 0, o.heads * o.head_size]), (o.heads, o.head_size), o.rope)
    keys = [_sink_key(build, o.head_size), _window(build, o, states, layer)]
    visible, chosen = [_window_visible(build, o.window)], None
    if o.compressor:
        entries = compress(build, o.compressor, states, f"{layer}.compressor")
        complete = entries_complete(build, o.compressor.ratio)
        if o.indexer:
            keys_of_entries = compress(build, o.indexer.compressor, states, f"{layer}.indexer")
            best, complete = choose(build, o.indexer, keys_of_entries, states, latent, complete)
            chosen = build.op("GatherND", entries, build.op("Unsqueeze", best, build.constant([-1])), batch_dims=1)
        else:
            keys.append(entries)
        visible.append(complete)
    mixed = _attend(build, o, queries, build.op("Concat", *keys, axis=1), chosen, _bias(build, visible))
    return _project(build, o, rotate(build, mixed, (o.heads, o.head_size), o.rope, backwards=True))


def _window(build: Builder, operation: CompressedAttention, states: ir.Value, layer: int) -> ir.Value:
    """Rotated keys of the new tokens and of those before them that some can see: [batch, keys, head size]"""
    o = operation
    own = build.norm(build.project(states, o.key_value), o.key_value_norm)
    own = rotate(build, own, (1, o.head_size), o.rope)
    past, present, shape = f"past.{layer}.window", f"present.{layer}.window", (0, o.head_size)
    keys = build.op("Concat", build.state(past, present, shape, growing=0), own, axis=1)
    build.remember(present, build.slice(keys, build.constant([1 - o.window]), None, axis=1))
    return keys


def _window_visible(build: Builder, window: int) -> ir.Value:
    """Whether each token sees the sink's key, which it does, and the window's: bool [batch, sequence, 1 + keys]."""

    def make() -> ir.Value:
        before, after = span(build)
        oldest = build.op("Max", build.op("Sub", before, build.constant(window - 1)), build.constant(0))
        places = build.op("Range", oldest, after, build.constant(1))
        distance = build.op("Sub", build.op("Unsqueeze", token_positions(build), build.constant([-1])), places)
        past = build.op("GreaterOrEqual", distance, build.constant(0))
        visible = build.op("And", past, build.op("Less", distance, build.constant(window)))
        return build.op("Pad", visible, build.constant([0, 0, 1, 0, 0, 0]), build.constant(True))

    return build.once(("window visible", window), make)


def _bias(build: Builder, visible: list[ir.Value]) -> ir.Value:
    """Parts of bool [batch, sequence, keys] -> what it adds to scores, [batch, sequence, 1, keys]."""

    def make() -> ir.Value:
        joined = build.op("Unsqueeze", build.op("Concat", *visible, axis=-1), build.constant([2]))
        return build.op("Where", joined, build.constant(0.0), build.constant(-np.inf))

    return build.once(("bias", *(part.name for part in visible)), make)


def _sink_key(build: Builder, size: int) -> ir.Value:
    """A key of zeros, [batch, 1, size]: its score is the head's sink alone, as a value it adds nothing."""

    def make() -> ir.Value:
        shape = build.op("Concat", batch_size(build), build.constant([1, size]), axis=0)
        return build.op("Expand", build.constant(0.0), shape)

    return build.once(("sink key", size), make)


def _attend(
    build: Builder,
    operation: CompressedAttention,
    queries: ir.Value,
    keys: ir.Value,
    chosen: ir.Value | None,
    bias: ir.Value,
) -> ir.Value:
    """Attention to keys that all tokens share, the sink's first, and to those chosen for each.

    Args:
        queries: [batch, sequence, heads * size], as is the result.
        keys: [batch, keys, size].
        chosen: [batch, sequence, chosen, size].
        bias: [batch, sequence, 1, keys + chosen].
    """
    o = operation
    count = build.op("Shape", keys, start=1, end=2)
    rows = build.reshape(queries, [0, -1, o.head_size])
    scores = build.microsoft("FusedMatMul", rows, keys, transB=1, alpha=o.head_size**-0.5)
    scores = build.op("Reshape", scores, build.op("Concat", build.constant([0, -1, o.heads]), count, axis=0))
    if chosen:
        heads = build.reshape(queries, [0, 0, o.heads, o.head_size])
        own = build.microsoft("FusedMatMul", heads, chosen, transB=1, alpha=o.head_size**-0.5)
        scores = build.op("Concat", scores, own, axis=-1)
    scores = build.op("Add", build.op("Add", scores, _sinks(build, o, scores)), bias)
    shares = build.op("Softmax", scores, axis=-1)
    if chosen:
        sizes = build.op("Concat", count, build.op("Shape", chosen, start=2, end=3), axis=0)
        shares, own = build.ops("Split", shares, sizes, outputs=2, axis=-1)
    shares = build.op("Reshape", shares, build.op("Concat", build.constant([0, -1]), count, axis=0))
    mixed = build.reshape(build.op("MatMul", shares, keys), [0, -1, o.heads * o.head_size])
    mixed = build.known(mixed, "batch", "sequence", o.heads * o.head_size)
    if chosen:
        own = build.reshape(build.op("MatMul", own, chosen), [0, 0, o.heads * o.head_size])
        mixed = build.op("Add", mixed, own)
    return mixed


def _sinks(build: Builder, operation: CompressedAttention, scores: ir.Value) -> ir.Value:
    """The sinks' logits as scores of the first key, [heads, keys]."""
    others = build.op("Sub", build.op("Shape", scores, start=3), build.constant([1]))
    behind = build.op("Concat", build.constant([0, 0, 0]), others, axis=0)
    return build.op("Pad", build.weight(operation.sink, [operation.heads, 1]), behind)


def _project(build: Builder, operation: CompressedAttention, mixed: ir.Value) -> ir.Value:
    """[batch, sequence, heads * head size] -> [batch, sequence, hidden size]; each group has its rows of the matrix."""
    o = operation
    rows, columns = o.output_down.shape
    each = rows // o.groups
    projected = [
        build.project(group, o.output_down, (number * each, (number + 1) * each))
        for number, group in enumerate(build.split(mixed, o.groups * [columns]))
    ]
    return build.project(build.op("Concat", *projected, axis=-1), o.output_up)
