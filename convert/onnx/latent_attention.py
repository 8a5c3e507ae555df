"""Multi-head latent attention in ONNX: queries are taken to the latents, which are the state.

The texts of a batch are equally long.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...archs.graph import LatentAttention, TokenIndexer
from .builder import Builder
from .indexer import choose
from .positions import span, token_positions
from .rotary import rotate


def latent_attention(build: Builder, operation: LatentAttention, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what attention adds, of the same shape."""
    o = operation
    memory, latent = _memory(build, o, states, layer), _query_latent(build, o, states)
    queries = build.reshape(_queries(build, o, latent), [0, -1, o.remembered_size])  # one after another of each head
    count = build.op("Shape", memory, start=1, end=2)
    scores = build.microsoft("FusedMatMul", queries, memory, transB=1, alpha=o.scale)
    scores = build.op("Reshape", scores, build.op("Concat", build.constant([0, o.heads, -1]), count, axis=0))
    shares = build.op("Softmax", build.op("Add", scores, _bias(build, o, states, latent, layer)), axis=-1)
    shares = build.op("Reshape", shares, build.op("Concat", build.constant([0, -1]), count, axis=0))
    latents = build.split(memory, [o.latent_size, o.rope.size])[0]
    mixed = build.reshape(build.op("MatMul", shares, latents), [0, o.heads, -1, o.latent_size])
    values = build.op("Transpose", build.project_heads(mixed, o.value_up), perm=[0, 2, 1, 3])
    values = build.known(
        build.reshape(values, [0, 0, o.heads * o.value_size]), "batch", "sequence", o.heads * o.value_size
    )
    return build.project(values, o.output)


def _memory(build: Builder, operation: LatentAttention, states: ir.Value, layer: int) -> ir.Value:
    """Latents and rotated keys of all tokens, the new ones last: [batch, tokens, remembered size]"""
    o = operation
    latent, key = build.split(build.project(states, o.key_value_down), [o.latent_size, o.rope.size])
    parts = build.norm(latent, o.key_value_norm), rotate(build, key, (1, o.rope.size), o.rope)
    past, present = f"past.{layer}.latents", f"present.{layer}.latents"
    before = build.state(past, present, (0, o.remembered_size), growing=0)
    memory = build.op("Concat", before, build.op("Concat", *parts, axis=-1), axis=1)
    build.remember(present, memory)
    return memory


def _query_latent(build: Builder, operation: LatentAttention, states: ir.Value) -> ir.Value:
    """What queries are made of."""
    o = operation
    if o.query_down is None or o.query_norm is None:
        return states
    return build.norm(build.project(states, o.query_down), o.query_norm)


def _queries(build: Builder, operation: LatentAttention, latent: ir.Value) -> ir.Value:
    """What each head looks for among what is remembered, [batch, heads, sequence, remembered size]"""
    o = operation
    heads = build.reshape(build.project(latent, o.query), [0, 0, o.heads, o.key_size + o.rope.size])
    plain, turning = build.split(heads, [o.key_size, o.rope.size])
    turned = rotate(build, build.reshape(turning, [0, 0, o.heads * o.rope.size]), (o.heads, o.rope.size), o.rope)
    turned = build.reshape(turned, [0, 0, o.heads, o.rope.size])
    plain, turned = (build.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (plain, turned))
    return build.op("Concat", build.project_heads(plain, o.key_up), turned, axis=-1)


def _bias(build: Builder, operation: LatentAttention, states: ir.Value, latent: ir.Value, layer: int) -> ir.Value:
    """What it adds to scores that tokens see none after themselves, or only those that are picked of the others.

    [batch, 1, sequence, tokens]
    """
    o, nothing = operation, build.constant(-np.inf)
    source = layer if o.indexer else o.selection_of
    if source is None:
        return build.once(
            "causal bias",
            lambda: _for_all_heads(build, build.op("Where", _visible(build), build.constant(0.0), nothing)),
        )

    def make() -> ir.Value:
        assert o.indexer, "the layer that picks comes before those that do as it did"
        keys = _index_keys(build, o.indexer, states, layer)
        best, seen = choose(build, o.indexer, keys, states, latent, _visible(build))
        hidden = build.op("Expand", nothing, build.op("Shape", _visible(build)))
        shown = build.op("Where", seen, build.constant(0.0), nothing)
        return _for_all_heads(build, build.op("ScatterElements", hidden, best, shown, axis=-1))

    return build.once(("picked by layer", source), make)


def _index_keys(build: Builder, block: TokenIndexer, states: ir.Value, layer: int) -> ir.Value:
    """What an indexer picks by of all tokens, the new ones last: [batch, tokens, its head size]"""
    own = rotate(build, build.norm(build.project(states, block.key), block.key_norm), (1, block.head_size), block.rope)
    past, present = f"past.{layer}.index_keys", f"present.{layer}.index_keys"
    keys = build.op("Concat", build.state(past, present, (0, block.head_size), growing=0), own, axis=1)
    build.remember(present, keys)
    return keys


def _visible(build: Builder) -> ir.Value:
    """Whether a token is not after another, bool [batch, sequence, tokens]"""

    def make() -> ir.Value:
        places = build.op("Range", build.constant(0), span(build)[1], build.constant(1))
        return build.op("GreaterOrEqual", build.op("Unsqueeze", token_positions(build), build.constant([-1])), places)

    return build.once("visible tokens", make)


def _for_all_heads(build: Builder, bias: ir.Value) -> ir.Value:
    return build.op("Unsqueeze", bias, build.constant([1]))
