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
    queries = build.microsoft(
        "BranchwiseRMSNorm", build.project(latent, o.query_up), num_branches=o.heads, epsilon=o.query_norm.epsilon
    )
    queries = rotate(build, queries, (o.heads, o.head_size), o.rope)
    keys, visible = _window(build, o, states, layer), _window_visible(build, o.window)
    if o.compressor:
        entries = compress(build, o.compressor, states, f"{layer}.compressor")
        complete = entries_complete(build, o.compressor.ratio)
        if o.indexer:
            complete = choose(build, o.indexer, states, latent, complete, f"{layer}.indexer")
        keys = build.op("Concat", keys, entries, axis=1)
        visible = build.op("Concat", visible, complete, axis=-1)
    mixed = _attend(build, o, queries, keys, visible)
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
    """Which of the window's keys each token sees, bool [batch, sequence, keys]."""

    def make() -> ir.Value:
        before, after = span(build)
        oldest = build.op("Max", build.op("Sub", before, build.constant(window - 1)), build.constant(0))
        places = build.op("Range", oldest, after, build.constant(1))
        distance = build.op("Sub", build.op("Unsqueeze", token_positions(build), build.constant([-1])), places)
        past = build.op("GreaterOrEqual", distance, build.constant(0))
        return build.op("And", past, build.op("Less", distance, build.constant(window)))

    return build.once(("window visible", window), make)


def _attend(
    build: Builder, operation: CompressedAttention, queries: ir.Value, keys: ir.Value, visible: ir.Value
) -> ir.Value:
    """Queries [batch, sequence, heads * size], keys [batch, keys, size], visible [batch, sequence, keys] -> as queries.

    A key of zeros stands before the others for the sink: its score is the head's sink, as a value it adds nothing.
    """
    o = operation
    count = build.op("Shape", keys, start=1, end=2)
    keys = build.op("Concat", _zero_key(build, o.head_size), keys, axis=1)
    all_keys = build.op("Add", count, build.constant([1]))
    rows = build.reshape(queries, [0, -1, o.head_size])
    scores = build.microsoft("FusedMatMul", rows, keys, transB=1, alpha=o.head_size**-0.5)
    scores = build.op("Reshape", scores, build.op("Concat", build.constant([0, -1, o.heads]), all_keys, axis=0))
    counts = build.op("Unsqueeze", build.op("Pad", visible, build.constant([0, 0, 1, 0, 0, 0])), build.constant([2]))
    behind = build.op("Concat", build.constant([0, 0, 0]), count, axis=0)
    sink_or_nothing = build.op("Pad", build.weight(o.sink, [o.heads, 1]), behind, build.constant(-np.inf))
    shares = build.op("Softmax", build.op("Where", counts, scores, sink_or_nothing), axis=-1)
    shares = build.op("Reshape", shares, build.op("Concat", build.constant([0, -1]), all_keys, axis=0))
    return build.reshape(build.op("MatMul", shares, keys), [0, -1, o.heads * o.head_size])


def _zero_key(build: Builder, size: int) -> ir.Value:
    """[batch, 1, size]"""

    def make() -> ir.Value:
        shape = build.op("Concat", batch_size(build), build.constant([1, size]), axis=0)
        return build.op("Expand", build.constant(0.0), shape)

    return build.once(("zero key", size), make)


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
