"""Memory bounds: how much running a model takes, on which device it can run, and what is left for activations."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ..archs.graph import Graph, Operation, weights_in
from ..archs.graph.operation import PASSING
from ..archs.weights import Weight
from ..errors import BadInput
from ..files import rss_bytes
from ..sources.model import PIECE_ROWS
from .activations import BUFFER_BYTES, Workspace
from .placement import Need, place
from .settings import Compute

_log = logging.getLogger(__name__)

RUNNING = 1  # form of a weight: as it is
_QUANTIZING = 3  # forms: as it is, as it is stored, and its pieces while they are joined
_FLOAT = 4  # bytes
_FACTORING = 8  # matrices of moments while one is taken apart
_MOMENTS = 5  # of an expert's inputs: sums, means, their factor, what it carries, and strips of these
_ROUTE_BYTES, _SCORE_BYTES = 48, 128  # of a token: for each expert it goes to, and for its prediction
_SLACK = 96 << 20  # what the allocator keeps to itself
_BUFFER_SHARE = 4  # all buffers take at most one part in so many of what is left


def workspace(
    compute: Compute,
    graph: Graph,
    tokens: int,
    context: int,
    folder: Path | None = None,
    copies: int = RUNNING,
    error_feedback: bool = False,
    files: int = 1,
) -> Workspace:
    """A device to compute on, and room for activations and buffers: what is left beside all else that a run holds.

    Args:
        compute: which device, and the bounds of its memory and of the process's; without one for the latter, what the
            device does not hold stays in memory.
        graph: what runs `tokens` tokens of all streams, in chunks of `context`.
        copies: how many forms of a weight are held at once: RUNNING, `quantizing`, or `comparing` plans.
        folder: where activations go that do not fit.
        error_feedback: whether mean products of inputs are kept, see `quant.moments`.
        files: how many are written at once, each behind a buffer; one more reads ahead.

    Raises BadInput when even without activations more is needed, saying how much.
    """
    least = needed(graph, tokens, context, copies, error_feedback) + _SLACK
    experts = max((stack.matrices for operation in graph.operations() for stack in operation.stacks), default=1)
    need = Need(least, _of_an_expert(graph, copies, error_feedback), experts)
    placement, memory = place(compute.device, compute.vram, need), compute.memory
    _log.debug(placement.why)
    if memory is None:
        return Workspace(placement=placement)
    floor = rss_bytes() + (_in_transit(graph, tokens) + _SLACK if placement.has_own_memory else least)
    if memory < floor:
        raise BadInput(
            f"--memory is {memory / 1e9:.2f} GB, but the least that this model takes is {floor / 1e9:.2f} GB; "
            "give it that, or a smaller --context"
        )
    buffers = 1 + files
    buffer = min(BUFFER_BYTES, (memory - floor) // (_BUFFER_SHARE * buffers))
    return Workspace(memory - floor - buffers * buffer, folder, placement, buffer)


def quantizing(files: int, forms: int) -> int:
    """The `copies` of so many files whose rows have so many lengths: what each stores of a weight, each form of the
    source that is padded in another way, and pieces while they are joined."""
    return _QUANTIZING + files - 1 + forms - 1


def comparing(plans: int) -> int:
    """The `copies` of so many plans side by side: what each makes of a weight, the source, and what is being made."""
    return plans + 3


def needed(graph: Graph, tokens: int, context: int, copies: int = RUNNING, error_feedback: bool = False) -> int:
    """An upper bound of what a run holds where it computes, but for activations; arguments are `workspace`'s."""
    moments = _moments(graph) if error_feedback else 0
    return working_set(graph, context, copies) + _routing(graph, tokens) + moments


def working_set(graph: Graph, context: int, copies: int) -> int:
    """An upper bound of the bytes that weights and the numbers of one chunk take while a model runs."""
    vocabulary = PIECE_ROWS * (copies * graph.hidden_size + 8 * context)
    residual = PASSING * context * graph.residual_size
    sublayers = (sublayer for layer in graph.layers for sublayer in layer.sublayers)
    largest = max(sum(_operation(op, context, copies) for op in sublayer.operations) for sublayer in sublayers)
    return _FLOAT * (max(largest, _per_layer_embedding(graph, context, copies)) + vocabulary + residual)


def _per_layer_embedding(graph: Graph, context: int, copies: int) -> int:
    """Numbers in memory while per-layer embeddings are worked out."""
    if not graph.per_layer:
        return 0
    table, projection = graph.per_layer.table, graph.per_layer.projection
    return copies * (PIECE_ROWS * table.columns + projection.elements) + PASSING * context * table.columns


def _moments(graph: Graph) -> int:
    """An upper bound of the bytes that mean products of inputs take: of a layer's dense weights, and of one expert."""

    def squares(weights: Iterable[Weight]) -> int:
        return sum(weight.columns**2 for weight in weights if not weight.role.keep_f32 and len(weight.shape) > 1)

    layers = [list(weights_in(layer)) for layer in graph.layers]
    largest = max(weight.columns for weights in layers for weight in weights if not weight.role.keep_f32)
    return _FLOAT * (max(map(squares, layers)) + _FACTORING * largest**2)


def _of_an_expert(graph: Graph, copies: int, error_feedback: bool) -> int:
    """An upper bound of the bytes that one more expert takes which is done together with others."""

    def of(operation: Operation) -> int:
        moments = _MOMENTS * sum(alike[0].columns ** 2 for alike in operation.stacks_by_input) if error_feedback else 0
        return moments + copies * sum(stack.elements // stack.matrices for stack in operation.stacks)

    return _FLOAT * max(map(of, graph.operations()), default=0)


def _in_transit(graph: Graph, tokens: int) -> int:
    """What the process holds while a GPU computes: a matrix as it is read and as it is written, statistics, scores."""
    weights = list(graph.weights())
    matrix = max(weight.elements // (weight.experts or 1) for weight in weights)
    statistics = max(
        sum(2 * weight.columns * (weight.experts or 1) for weight in weights_in(layer)) for layer in graph.layers
    )
    return _FLOAT * (_QUANTIZING * matrix + statistics) + _SCORE_BYTES * tokens


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
