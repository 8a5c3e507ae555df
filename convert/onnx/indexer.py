"""The choice of what a token attends to, in ONNX (see `graph.Indexer`)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...archs.graph import Indexer
from .builder import Builder
from .positions import batch_and_sequence
from .rotary import rotate


def choose(
    build: Builder, block: Indexer, keys: ir.Value, states: ir.Value, latent: ir.Value, visible: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The best keys for each token, int64 [batch, sequence, chosen], and which of them are `visible` to it.

    Of keys with equal scores the earliest are taken.

    Args:
        keys: [batch, keys, head size].
        states: [batch, sequence, hidden size].
        latent: the attention's latent queries, [batch, sequence, latent size].
        visible: bool [batch, sequence, keys].
    """
    heads, size = block.heads, block.head_size
    queries = rotate(build, build.project(latent, block.query), (heads, size), block.rope)
    queries = build.reshape(queries, [0, -1, size])
    affinity = build.op("Relu", build.microsoft("FusedMatMul", queries, keys, transB=1))
    count = build.op("Shape", keys, start=1, end=2)
    shape = build.op("Concat", batch_and_sequence(build), build.constant([heads]), count, axis=0)
    affinity = build.op("Reshape", affinity, shape, allowzero=1)
    weights = build.op("Mul", build.project(states, block.head_weight), build.constant((heads * size) ** -0.5))
    weights = build.op("Unsqueeze", weights, build.constant([2]))
    scores = build.op("Squeeze", build.op("MatMul", weights, affinity), build.constant([2]))
    nothing = build.constant(-np.inf)
    scores = build.op("Where", visible, scores, nothing)
    most = build.op("Min", count, build.constant([block.top_k]))
    best_scores, best = build.ops("TopK", scores, most, outputs=2, axis=-1)
    return best, build.op("Greater", best_scores, nothing)
