"""The choice of compressed entries that a token attends to, in ONNX (see `graph.Indexer`)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...archs.graph import Indexer
from .builder import Builder
from .compressor import compress
from .positions import batch_and_sequence
from .rotary import rotate


def choose(
    build: Builder, block: Indexer, states: ir.Value, latent: ir.Value, complete: ir.Value, name: str
) -> ir.Value:
    """The best entries for each token of those that are `complete` for it, bool [batch, sequence, entries].

    Of entries with equal scores the earliest are taken.

    Args:
        states: [batch, sequence, hidden size].
        latent: the attention's latent queries, [batch, sequence, latent size].
        complete: bool [batch, sequence, entries].
    """
    heads, size = block.heads, block.head_size
    keys = compress(build, block.compressor, states, name)
    queries = rotate(build, build.project(latent, block.query), (heads, size), block.compressor.rope)
    queries = build.reshape(queries, [0, -1, size])
    affinity = build.op("Relu", build.microsoft("FusedMatMul", queries, keys, transB=1))
    entries = build.op("Shape", keys, start=1, end=2)
    shape = build.op("Concat", batch_and_sequence(build), build.constant([heads]), entries, axis=0)
    affinity = build.op("Reshape", affinity, shape, allowzero=1)
    weights = build.op("Mul", build.project(states, block.head_weight), build.constant((heads * size) ** -0.5))
    weights = build.op("Unsqueeze", weights, build.constant([2]))
    scores = build.op("Squeeze", build.op("MatMul", weights, affinity), build.constant([2]))
    scores = build.op("Where", complete, scores, build.constant(-np.inf))
    most = build.op("Min", entries, build.constant([block.top_k]))
    best = build.ops("TopK", scores, most, outputs=2, axis=-1)[1]
    none, chosen = (build.filled(truth, like) for truth, like in ((False, scores), (True, best)))
    return build.op("And", build.op("ScatterElements", none, best, chosen, axis=-1), complete)
