"""The choice of blocks of tokens that attention looks at, in ONNX (see `graph.BlockSelection`)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...archs.graph import BlockSelection
from .builder import Builder
from .positions import token_positions
from .rotary import rotate

_UNSEEN = -1e30  # infinity would make a fused kernel that meets an unseen block first compute with what is no number


def selection_bias(build: Builder, block: BlockSelection, states: ir.Value, layer: int, heads: int) -> ir.Value:
    """What is added to the scores of attention, [batch, heads, sequence, tokens]; future tokens may be among the seen.

    Args:
        states: [batch, sequence, hidden size].
        heads: of the attention's queries.
    """
    keys = _index_keys(build, block, states, layer)
    queries = build.norm(build.reshape(build.project(states, block.query), [0, 0, block.heads, -1]), block.query_norm)
    sizes = (block.heads, block.head_size)
    queries = rotate(build, build.reshape(queries, [0, 0, block.heads * block.head_size]), sizes, block.rope)
    scores = build.microsoft("FusedMatMul", build.reshape(queries, [0, -1, block.head_size]), keys, transB=1)
    count = build.op("Shape", keys, start=1, end=2)
    scores = build.op("Reshape", scores, build.op("Concat", build.constant([0, -1, block.heads]), count, axis=0))
    best = _best_of_blocks(build, block, scores, count)
    most = build.op("Min", build.op("Shape", best, start=3), build.constant([block.top_k]))
    values, chosen = build.ops("TopK", best, most, outputs=2, axis=-1)
    unseen = build.op("Expand", build.constant(_UNSEEN), build.op("Shape", best))
    seen = build.op("Expand", build.constant(0.0), build.op("Shape", values))
    return _for_tokens(build, block, build.op("ScatterElements", unseen, chosen, seen, axis=-1), count, heads)


def _index_keys(build: Builder, block: BlockSelection, states: ir.Value, layer: int) -> ir.Value:
    """Those of all tokens, [batch, tokens, head size], which are a state."""
    own = build.norm(build.project(states, block.key), block.key_norm)
    own = rotate(build, own, (1, block.head_size), block.rope)
    name, result = f"past_key_values.{layer}.index_key", f"present.{layer}.index_key"
    keys = build.op("Concat", build.state(name, result, (0, block.head_size), growing=0), own, axis=1)
    build.remember(result, keys)
    return keys


def _best_of_blocks(build: Builder, block: BlockSelection, scores: ir.Value, count: ir.Value) -> ir.Value:
    """Scores [batch, sequence, heads, tokens] -> the largest of each block, infinity for those that come first."""
    past, padding, local = _places(build, block, count)
    scores = build.op("Pad", build.op("Where", past, scores, build.constant(-np.inf)), padding, build.constant(-np.inf))
    apart = build.reshape(scores, [0, 0, block.heads, -1, block.block_size])
    best = build.op("ReduceMax", apart, build.constant([-1]), keepdims=0)
    return build.op("Where", local, build.constant(np.inf), best)


def _places(build: Builder, block: BlockSelection, count: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What follows from positions alone.

    Which tokens are past, bool [batch, sequence, 1, tokens], how scores are padded to whole blocks, and which blocks
    are the token's own or close before it, bool [batch, sequence, 1, blocks].
    """

    def make() -> tuple[ir.Value, ir.Value, ir.Value]:
        size, axes = build.constant(block.block_size), build.constant([-1, -2])
        positions, zero, one = token_positions(build), build.constant(0), build.constant(1)
        tokens = build.op("Squeeze", count)
        apart = build.op("Unsqueeze", positions, axes)
        past = build.op("GreaterOrEqual", apart, build.op("Range", zero, tokens, one))
        blocks = build.op("Div", build.op("Add", tokens, build.constant(block.block_size - 1)), size)
        missing = build.op("Sub", build.op("Mul", blocks, size), tokens)
        padding = build.op(
            "Concat", build.constant([0] * 7), build.op("Unsqueeze", missing, build.constant([0])), axis=0
        )
        distance = build.op("Sub", build.op("Div", apart, size), build.op("Range", zero, blocks, one))
        near = build.op("Less", distance, build.constant(block.local))
        return past, padding, build.op("And", build.op("GreaterOrEqual", distance, zero), near)

    return build.once(("places of blocks", block.block_size, block.local), make)


def _for_tokens(build: Builder, block: BlockSelection, bias: ir.Value, count: ir.Value, heads: int) -> ir.Value:
    """[batch, sequence, index heads, blocks] -> [batch, heads, sequence, tokens]"""
    each = build.op("Unsqueeze", bias, build.constant([-1]))
    each = build.op("Expand", each, build.constant([1, 1, 1, 1, block.block_size]))
    each = build.slice(build.reshape(each, [0, 0, block.heads, -1]), build.constant([0]), count, axis=3)
    apart = build.op("Unsqueeze", build.op("Transpose", each, perm=[0, 2, 1, 3]), build.constant([2]))
    repeated = build.op("Expand", apart, build.constant([1, 1, heads // block.heads, 1, 1]))
    shape = build.op("Concat", build.constant([0, heads, -1]), count, axis=0)
    return build.op("Reshape", repeated, shape)
