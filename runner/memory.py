"""Memory bounds: how much running a model takes, and what is left of it for activations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..archs.graph import Graph, Operation, weights_in
from ..archs.graph.operation import PASSING
from ..archs.weights import Weight
from ..errors import BadInput
from ..files import rss_bytes
from ..sources.model import PIECE_ROWS
from .activations import BUFFER_BYTES, Workspace

RUNNING = 1  # form of a weight: as it is
QUANTIZING = 3  # forms: as it is, as it is stored, and its pieces while they are joined
_FLOAT = 4  # bytes
_FACTORING = 8  # matrices of moments while one is taken apart
_ROUTE_BYTES, _SCORE_BYTES = 48, 128  # of a token: for each expert it goes to, and for its prediction
_SLACK = 96 << 20  # what the allocator keeps to itself
_BUFFERS = 2  # one reads ahead, the other writes behind
_BUFFER_SHARE = 8  # each takes at most one part in so many of what is left


def workspace(
    memory: int | None,
    graph: Graph,
    tokens: int,
    context: int,
    folder: Path | None,
    copies: int = RUNNING,
    error_feedback: bool = False,
) -> Workspace:
    """Room for activations and buffers: what is left of `memory` bytes beside all else that a run holds at its peak.

    Args:
        memory: for the whole process; None keeps everything in memory.
        graph: what runs `tokens` tokens of all streams, in chunks of `context`.
        copies: how many forms of a weight are held at once: RUNNING, QUANTIZING, or `comparing` plans.
        folder: where activations go that do not fit.
        error_feedback: whether mean products of inputs are kept, see `quant.moments`.

    Raises BadInput when even without activations more is needed, saying how much.
    """
    if memory is None:
        return Workspace()
    floor = rss_bytes() + working_set(graph, context, copies) + _routing(graph, tokens) + _SLACK
    floor += _moments(graph) if error_feedback else 0
    if memory < floor:
        raise BadInput(
            f"--memory is {memory / 1e9:.2f} GB, but the least that this model takes is {floor / 1e9:.2f} GB; "
            "give it that, or a smaller --context"
        )
    buffer = min(BUFFER_BYTES, (memory - floor) // _BUFFER_SHARE)
    return Workspace(memory - floor - _BUFFERS * buffer, folder, buffer)


def comparing(plans: int) -> int:
    """The `copies` of so many plans side by side: what each makes of a weight, the source, and what is being made."""
    return plans + 3


def working_set(graph: Graph, context: int, copies: int) -> int:
    """An upper bound of the bytes that weights and the numbers of one chunk take while a model runs."""
    vocabulary = PIECE_ROWS * (copies * graph.hidden_size + 8 * context)
    residual = PASSING * context * graph.residual_size
    sublayers = (sublayer for layer in graph.layers for sublayer in layer.sublayers)
    largest = max(sum(_operation(op, context, copies) for op in sublayer.operations) for sublayer in sublayers)
    return _FLOAT * (largest + vocabulary + residual)


def _moments(graph: Graph) -> int:
    """An upper bound of the bytes that mean products of inputs take: of a layer's dense weights, and of one expert."""

    def squares(weights: Iterable[Weight]) -> int:
        return sum(weight.columns**2 for weight in weights if not weight.role.keep_f32 and len(weight.shape) > 1)

    layers = [list(weights_in(layer)) for layer in graph.layers]
    largest = max(weight.columns for weights in layers for weight in weights if not weight.role.keep_f32)
    return _FLOAT * (max(map(squares, layers)) + _FACTORING * largest**2)


def _routing(graph: Graph, tokens: int) -> int:
    """Bytes that remember where each token goes and how it was predicted."""
    top_k = max((operation.experts_per_token for operation in graph.operations()), default=0)
    return tokens * (_ROUTE_BYTES * top_k + _SCORE_BYTES)


def _operation(operation: Operation, context: int, copies: int) -> int:
    """Numbers in memory while an operation runs."""
    weights = list(weights_in(operation))
    sizes = [weight.elements // (weight.experts or 1) for weight in weights]  # one expert at a time
    decoding = 2 * max(sizes, default=0)  # codes and scales of the largest
    statistics = 2 * sum(weight.columns * weight.experts for weight in weights if weight.experts)
    return copies * sum(sizes) + decoding + statistics + operation.scratch_values(context)
