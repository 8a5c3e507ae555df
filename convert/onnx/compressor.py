"""Pooling of tokens into compressed entries, in ONNX (see `graph.Compressor`)."""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import Compressor
from .builder import Builder
from .positions import batch_size, token_positions, whole_windows
from .rotary import rotate

_NEVER = -1e30  # a gate's logit that leaves nothing; minus infinity would not be valid JSON in the states' description


def compress(build: Builder, block: Compressor, states: ir.Value, name: str) -> ir.Value:
    """states [batch, sequence, hidden size] -> all entries so far, [batch, entries, size].

    The state: these entries, and values and gates of the tokens that are not part of all their entries yet. Where
    entries overlap, those are the last whole window and what follows it; the one before the first has no weight.
    """
    slot = build.op("Mod", token_positions(build), build.constant(block.ratio))
    position = build.op("Gather", build.weight(block.position), slot, axis=0)
    values = _pooled_together(build, block, build.project(states, block.value), f"{name}.values", 0.0)
    gates = build.op("Add", build.project(states, block.gate), position)
    gates = _pooled_together(build, block, gates, f"{name}.gates", _NEVER)
    weighted = build.op("Mul", values, build.op("Softmax", gates, axis=2))
    pooled = build.norm(build.op("ReduceSum", weighted, build.constant([2]), keepdims=0), block.norm)
    new = rotate(build, pooled, (1, _size(block)), block.rope, _starts(build, block.ratio))
    past, present, shape = f"past.{name}.entries", f"present.{name}.entries", (0, _size(block))
    before = build.state(past, present, shape, growing=0)
    entries = build.op("Concat", before, new, axis=1)
    build.remember(present, entries)
    return entries


def entries_complete(build: Builder, ratio: int) -> ir.Value:
    """Which entries each token may see, those whose last token is not behind it: bool [batch, sequence, entries]."""

    def make() -> ir.Value:
        through = build.op("Add", token_positions(build), build.constant(1))
        complete = build.op("Unsqueeze", build.op("Div", through, build.constant(ratio)), build.constant([-1]))
        _, total = whole_windows(build, ratio)
        return build.op("Less", build.op("Range", build.constant(0), total, build.constant(1)), complete)

    return build.once(("entries complete", ratio), make)


def _size(block: Compressor) -> int:
    return block.norm.weight.columns


def _starts(build: Builder, ratio: int) -> ir.Value:
    """Positions of the first tokens of the new entries, int64 [batch, new entries]."""

    def make() -> ir.Value:
        starts = build.op(
            "Mul", build.op("Range", *whole_windows(build, ratio), build.constant(1)), build.constant(ratio)
        )
        return build.op("Expand", starts, build.op("Concat", batch_size(build), build.constant([1]), axis=0))

    return build.once(("starts", ratio), make)


def _pooled_together(build: Builder, block: Compressor, new: ir.Value, name: str, fill: float) -> ir.Value:
    """Values or gates of the new tokens, [batch, sequence, width] -> what each new entry pools of them and of those
    remembered, [batch, new entries, slots, size]."""
    ratio, (width, _) = block.ratio, block.value.shape
    past, present = f"past.{name}", f"present.{name}"
    shape = (ratio if block.overlaps else 0, width)
    tokens = build.op("Concat", build.state(past, present, shape, growing=0, fill=fill), new, axis=1)
    count, rows = _new_windows(build, ratio)
    build.remember(present, build.slice(tokens, rows, None, axis=1))
    grouped = build.op("Concat", batch_size(build), count, build.constant([ratio, _size(block)]), axis=0)
    if not block.overlaps:
        whole = build.slice(tokens, build.constant([0]), rows, axis=1)
        return build.op("Reshape", whole, grouped, allowzero=1)
    for_next, own = build.split(tokens, [_size(block), _size(block)])
    for_next = build.slice(for_next, build.constant([0]), rows, axis=1)
    own = build.slice(own, build.constant([ratio]), build.op("Add", rows, build.constant([ratio])), axis=1)
    windows = [build.op("Reshape", half, grouped, allowzero=1) for half in (for_next, own)]
    return build.op("Concat", *windows, axis=2)


def _new_windows(build: Builder, ratio: int) -> tuple[ir.Value, ir.Value]:
    """How many windows the new tokens complete, and how many tokens that is, int64 [1]."""

    def make() -> tuple[ir.Value, ir.Value]:
        before, after = whole_windows(build, ratio)
        count = build.op("Unsqueeze", build.op("Sub", after, before), build.constant([0]))
        return count, build.op("Mul", count, build.constant(ratio))

    return build.once(("new windows", ratio), make)
