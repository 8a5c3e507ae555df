"""Memory bounds: how much running a model takes, and what is left of it for activations."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from ctypes import CDLL
from pathlib import Path

from ..archs.graph import Attention, CompressedAttention, Graph, Mamba2, MoE, Operation, weights_in
from ..archs.weights import Role, Weight
from ..errors import BadInput
from .activations import Workspace

RUNNING = 1  # form of a weight: as it is
QUANTIZING = 3  # forms: as it is, as it is stored, and its pieces while they are joined
_FLOAT = 4  # bytes
_PASSING = 4  # numbers that exist beside a chunk's result while it is computed, in multiples of it
_FACTORING = 8  # matrices of moments while one is taken apart
_BLOCK = 1024  # tokens of an expert, rows of a vocabulary at a time
_ROUTE_BYTES, _SCORE_BYTES = 48, 128  # of a token: for each expert it goes to, and for its prediction
_SLACK = 96 << 20  # what the allocator keeps to itself


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:  # getrusage would count the parent that forked us as well
        return _status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def workspace(
    memory: int | None,
    graph: Graph,
    tokens: int,
    context: int,
    folder: Path | None,
    copies: int = RUNNING,
    error_feedback: bool = False,
) -> Workspace:
    """Room for activations: what is left of `memory` bytes beside all else that a run holds at its peak.

    Args:
        memory: for the whole process; None keeps everything in memory.
        graph: what runs `tokens` tokens of all lanes, in chunks of `context`.
        copies: how many forms of a weight are held at once: RUNNING, QUANTIZING, or `comparing` plans.
        folder: where activations go that do not fit.
        error_feedback: whether mean products of inputs are kept, see `quant.moments`.

    Raises BadInput when even without activations more is needed, saying how much.
    """
    if memory is None:
        return Workspace()
    floor = _resident() + working_set(graph, context, copies) + _routing(graph, tokens) + _SLACK
    floor += _moments(graph) if error_feedback else 0
    if memory < floor:
        raise BadInput(
            f"--memory is {memory / 1e9:.2f} GB, but the least that this model takes is {floor / 1e9:.2f} GB; "
            "give it that, or a smaller --context"
        )
    return Workspace(memory - floor, folder)


def comparing(plans: int) -> int:
    """The `copies` of so many plans side by side: what each makes of a weight, the source, and what is being made."""
    return plans + 3


def working_set(graph: Graph, context: int, copies: int) -> int:
    """An upper bound of the bytes that weights and the numbers of one chunk take while a model runs."""
    vocabulary = _BLOCK * (copies * graph.hidden_size + 8 * context)
    residual = _PASSING * context * graph.residual_size
    return _FLOAT * (max(_operation(op, context, copies) for op in graph.operations()) + vocabulary + residual)


def _moments(graph: Graph) -> int:
    """An upper bound of the bytes that mean products of inputs take: of a layer's dense weights, and of one expert."""

    def squares(weights: Iterable[Weight]) -> int:
        return sum(weight.columns**2 for weight in weights if not weight.role.keep_f32 and len(weight.shape) > 1)

    layers = [list(weights_in(layer)) for layer in graph.layers]
    largest = max(weight.columns for weights in layers for weight in weights if not weight.role.keep_f32)
    return _FLOAT * (max(map(squares, layers)) + _FACTORING * largest**2)


def _routing(graph: Graph, tokens: int) -> int:
    """Bytes that remember where each token goes and how it was predicted."""
    top_k = max((op.router.top_k for op in graph.operations() if isinstance(op, MoE)), default=0)
    return tokens * (_ROUTE_BYTES * top_k + _SCORE_BYTES)


def _operation(operation: Operation, context: int, copies: int) -> int:
    """Numbers in memory while an operation runs."""
    weights = list(weights_in(operation))
    dense = sum(weight.elements for weight in weights if weight.experts is None and weight.role is not Role.HASH_TABLE)
    largest = max(weight.elements // (weight.experts or 1) for weight in weights)  # its codes and scales, decoded
    held = copies * dense + 2 * largest
    match operation:
        case MoE():
            expert = sum(weight.elements // weight.experts for weight in weights if weight.experts)
            statistics = 2 * sum(weight.columns * weight.experts for weight in weights if weight.experts)
            passing = _BLOCK * (3 * operation.up.columns + 4 * operation.expert_size)
            table = sum(weight.elements for weight in weights if weight.role is Role.HASH_TABLE)
            return held + copies * (expert + table) + statistics + passing
        case Attention(heads=heads, head_size=size):
            return held + _PASSING * context * heads * (context + size)
        case CompressedAttention(heads=heads, head_size=size, window=window):
            return held + _PASSING * min(context, 256) * heads * (min(context, 256) + window + context // 4 + size)
        case Mamba2(heads=heads, head_size=size, state_size=state):
            return held + _PASSING * heads * (2 * 128 * 128 + size * state + context * (2 * size + state))
        case _:
            return held + _PASSING * context * largest // max(weight.columns for weight in weights)


def _resident() -> int:
    """Of what is in use, without what glibc keeps of what was freed, in case earlier work was done in this process."""
    trim = getattr(CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    try:
        return _status("VmRSS")
    except OSError:
        return peak_rss_bytes()


def _status(key: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024
