"""Streams: hidden states of token chunks, advanced one layer at a time, several streams together.

Memory holds the states, the dense weights of one sublayer and one expert; nothing of a model stays between layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from ..archs.graph import (
    MLP,
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    Graph,
    LatentAttention,
    Layer,
    Mamba2,
    MoE,
    Norm,
    Operation,
    PerLayerEmbedding,
    PerLayerInput,
    SubLayer,
)
from ..archs.weights import Weight
from ..errors import BadInput
from ..sources.model import Model, pieces
from ..sources.read_ahead import StoredRows, stored_rows
from .activations import Activations, Workspace
from .blocks.attention import AttentionMixer
from .blocks.common import DenseMixer, normalizer
from .blocks.compressed_attention import CompressedAttentionMixer
from .blocks.context import Context
from .blocks.deltanet import DeltaNetMixer
from .blocks.experts import Mixture, RoutedTokens, order_of_experts, run_experts
from .blocks.latent_attention import LatentAttentionMixer
from .blocks.mamba import MambaMixer
from .blocks.per_layer import PerLayerMixer, project_inputs
from .blocks.residual import Residual, residual_of
from .placement import Placement
from .weights import ModelWeights, Weights, multiply

_TOKENS = 1024  # embedded at a time


class Mixer(Protocol):
    """An operation with its weights that runs a chunk at a time; its tokens may act on later ones."""

    def initial_state(self) -> Any:
        """The state before the first token."""

    def __call__(self, states: Tensor, memory: Any, context: Context) -> tuple[Tensor, Any]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""


MIXERS: Mapping[type[Operation], Callable[[Any, Weights], Mixer | Mixture]] = {
    Attention: AttentionMixer,
    CompressedAttention: CompressedAttentionMixer,
    GatedDeltaNet: DeltaNetMixer,
    LatentAttention: LatentAttentionMixer,
    Mamba2: MambaMixer,
    MLP: DenseMixer,
    MoE: Mixture,
    PerLayerInput: PerLayerMixer,
}
"""What computes each operation, made of it and its weights."""


class Cache:
    """What mixers remember of texts after `tokens` tokens, for streams of what follows."""

    def __init__(self) -> None:
        self.tokens = 0
        self.states: dict[tuple[int, int, int, int], Any] = {}  # by layer, sublayer, branch and chunk


@dataclass(frozen=True)
class Entered:
    """A sublayer whose experts, if it has any, are waiting to be run: what computes each of its branches."""

    layer: Layer
    number: int
    blocks: tuple[Mixer | RoutedTokens, ...]

    @property
    def sublayer(self) -> SubLayer:
        return self.layer.sublayers[self.number]

    @property
    def experts(self) -> list[RoutedTokens]:
        return [block for block in self.blocks if isinstance(block, RoutedTokens)]


class Stream:
    """Runs `tokens` [chunks, context] through `weights`, by default those of `model` as they are stored.

    `hidden` is the residual, zeros until `embed`: [chunks, context, hidden size], or with hyper-connections
    [chunks, context, streams, hidden size]. `shared` is what later layers will read of those passed, by the numbers of
    these: [chunks, tokens so far, width]. `inputs` are the tokens' per-layer embeddings for layers to come, by the
    numbers of these: [chunks, context, width]. With a `cache`, the tokens follow those of the streams that filled it. A
    stream that goes on where another stopped is given that one's `states`, and the numbers of the layers whose shared
    states are among them; inputs are the other one's, where it is still there, or found anew.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        cache: Cache | None = None,
        weights: Weights | None = None,
        states: Iterable[Tensor] | None = None,
        sharing: Iterable[int] = (),
        workspace: Workspace | None = None,
        inputs: Mapping[int, Activations] | None = None,
    ) -> None:
        self.model = model
        self.weights = weights or ModelWeights(model)
        self.tokens = tokens.to(self.weights.device)
        self.shared: dict[int, Activations] = {}
        self._cache = cache
        self._positions = (cache.tokens if cache else 0) + torch.arange(tokens.shape[1], device=self.weights.device)
        self._residual = residual_of(self.weights)
        self._workspace = workspace or Workspace(placement=Placement(self.weights.device))
        self.buffer, self.experts_at_once = self._workspace.buffer, self._workspace.experts_at_once
        self._readers = self.weights.graph.shared_states()
        self.hidden = self._workspace.activations(*tokens.shape, *self._residual.width, whole_chunks=True)
        if cache:
            cache.tokens += tokens.shape[1]
        self.begun = states is not None
        self.inputs = dict(inputs or {})
        if states is not None and self.weights.graph.per_layer and inputs is None:
            self.begun = False
            embed([self])  # because per-layer embeddings are made of its embeddings
        if states is not None:
            self._take_up(iter(states), sharing)

    def states(self) -> Iterator[Tensor]:
        """All that the stream has come to, as a stream that goes on from here wants it."""
        for activations in (self.hidden, *self.shared.values()):
            yield from (activations[chunk] for chunk in range(len(activations)))

    def advance(self, layer: Layer) -> None:
        """Run all chunks through one layer. Raises BadInput when its output is not finite."""
        advance([self], [layer])

    def before_experts(self, layer: Layer, number: int) -> Entered:
        """Run all chunks through a sublayer; through one with experts only up to these."""
        sublayer, where = layer.sublayers[number], f"{self.weights.label}: layer {layer.index}"
        made = (MIXERS[type(operation)](operation, self.weights) for operation in sublayer.operations)
        blocks = (m.begin(self.tokens, self._workspace, where) if isinstance(m, Mixture) else m for m in made)
        entered = Entered(layer, number, tuple(blocks))
        if entered.experts:
            self._route(entered)
        else:
            self.after_experts(entered)
        return entered

    def after_experts(self, entered: Entered) -> None:
        """Complete a sublayer whose experts have run."""
        sublayer, weights = entered.sublayer, self.weights
        norms = [_normalizer(branch.norm, weights) for branch in sublayer.branches]
        post_norms = [_normalizer(branch.post_norm, weights) for branch in sublayer.branches]
        finish = _normalizer(sublayer.post_norm, weights)
        scale = weights.load(sublayer.scale) if isinstance(sublayer.scale, Weight) else sublayer.scale
        for chunk in range(len(self.hidden)):
            way = self._residual.branch(sublayer, self.hidden[chunk])
            outputs = (
                post_norm(self._run(entered, place, chunk, norm(way.input)))
                for place, (norm, post_norm) in enumerate(zip(norms, post_norms, strict=True))
            )
            joined = way.join(finish(reduce(torch.add, outputs)))
            if scale is not None:
                joined = joined * scale
            if not math.isfinite(float(joined.sum())):
                name = " + ".join(type(operation).__name__ for operation in sublayer.operations)
                where = f"{weights.label}: layer {entered.layer.index}, {name}"
                raise BadInput(f"{where}: the output is NaN or infinite")
            self.hidden[chunk] = joined

    def leave(self, layer: Layer) -> None:
        """The layer is passed: drop what nobody will read any more."""
        for source in [source for source in self.shared if self._readers[source] <= layer.index]:
            del self.shared[source]
        self.inputs.pop(layer.index, None)

    def _route(self, entered: Entered) -> None:
        branches = entered.sublayer.branches
        norms = [_normalizer(branch.norm, self.weights) for branch in branches]
        for chunk in range(len(self.hidden)):
            read = self._residual.branch(entered.sublayer, self.hidden[chunk]).input
            for block, norm in zip(entered.blocks, norms, strict=True):
                if isinstance(block, RoutedTokens):
                    block.route(norm(read), read)
        for experts in entered.experts:
            experts.finish_routing()

    def _run(self, entered: Entered, place: int, chunk: int, normed: Tensor) -> Tensor:
        """One chunk through one branch of a sublayer."""
        block, index = entered.blocks[place], entered.layer.index
        source = entered.sublayer.operations[place].shares_state_of
        if isinstance(block, RoutedTokens):
            return block.answer(chunk, normed)
        shared = {} if source is None else {source: self.shared[source][chunk]}
        own = self.inputs[index][chunk] if index in self.inputs else None
        context = Context(self.tokens[chunk], self._positions, index, index in self._readers, own, shared)
        key = (index, entered.number, place, chunk)
        past = self._cache.states.get(key) if self._cache else None
        output, state = self._mixed(block, normed, past or block.initial_state(), context, chunk)
        if self._cache:
            self._cache.states[key] = state
        if context.shares and index in context.shared:
            self._share(index, chunk, context.shared[index])
        return output

    def _mixed(self, block: Mixer, normed: Tensor, memory: Any, context: Context, chunk: int) -> tuple[Tensor, Any]:
        """One chunk through a mixer, and what that remembers."""
        return block(normed, memory, context)

    def _share(self, layer: int, chunk: int, states: Tensor) -> None:
        if layer not in self.shared:
            self.shared[layer] = self._workspace.activations(len(self.hidden), *states.shape, whole_chunks=True)
        self.shared[layer][chunk] = states

    def _take_up(self, states: Iterator[Tensor], sharing: Iterable[int]) -> None:
        """Go on from what another stream has come to."""
        for chunk in range(len(self.hidden)):
            self.hidden[chunk] = next(states)
        for layer in sharing:
            for chunk in range(len(self.hidden)):
                self._share(layer, chunk, next(states))

    def final_states(self, positions: slice) -> Tensor:
        """States ready for the head, [chunks * positions, hidden size], of the given positions of every chunk."""
        return torch.cat([self.final(chunk, positions) for chunk in range(len(self.hidden))])

    def final_activations(self, positions: slice) -> Activations:
        """The same for texts of any length, [chunks, positions, hidden size]."""
        count = len(range(self.tokens.shape[1])[positions])
        size = self.weights.graph.hidden_size
        final = self._workspace.activations(len(self.hidden), count, size, whole_chunks=True)
        for chunk in range(len(self.hidden)):
            final[chunk] = self.final(chunk, positions)
        return final

    def final(self, chunk: int, positions: slice | Tensor) -> Tensor:
        """Those of one chunk, [positions, hidden size]."""
        normalize = normalizer(self.weights.graph.final_norm, self.weights)
        return normalize(self.end(chunk, positions))

    def end(self, chunk: int, positions: slice | Tensor) -> Tensor:
        """What the residual of one chunk amounts to, before the last norm, [positions, hidden size]."""
        return self._residual.end(self.hidden[chunk][positions])

    def logits(self, states: Tensor) -> Tensor:
        """Final states [positions, hidden size] -> [positions, vocabulary size]"""
        return torch.cat([word_logits(self.weights.graph, states, rows) for rows in self.head_blocks()], dim=1)

    def head_blocks(self) -> Iterator[Tensor]:
        """The rows of the output projection, [block rows, hidden size] at a time, in vocabulary order."""
        for _, rows in pieces(self.weights.graph.head):
            yield self.weights.load(self.weights.graph.head, None, rows)
            self.weights.release()

    def embed(self, words: tuple[int, int]) -> None:
        """Begin with the tokens that are among these words."""
        add_embeddings(self.weights, words, self.tokens, self._residual, self.hidden)

    def embed_for_layers(self, per_layer: PerLayerEmbedding) -> None:
        """Work out the per-layer embeddings of all tokens, while `hidden` is their embeddings."""
        layers, width = range(per_layer.table.columns // per_layer.width), per_layer.width
        self.inputs = {
            layer: self._workspace.activations(*self.tokens.shape, width, whole_chunks=True) for layer in layers
        }
        for words in blocks_of_words(per_layer.table):
            for places, rows in _looked_up(self.weights, per_layer.table, words, self.tokens):
                for layer, part in enumerate((per_layer.scale * per_layer.table_scale * rows).split(width, dim=1)):
                    self.inputs[layer].add_rows(places, part)
            self.weights.release()
        for chunk in range(len(self.hidden)):
            for layer, part in enumerate(project_inputs(per_layer, self.hidden[chunk], self.weights)):
                self.inputs[layer][chunk] = self.inputs[layer][chunk] + part
        self.weights.release()


def embed(streams: Sequence[Stream]) -> None:
    """Begin streams that have not begun: the vocabulary comes in blocks, each loaded once for all of them."""
    beginning = [stream for stream in streams if not stream.begun]
    for blocks in zip_longest(*(blocks_of_words(stream.weights.graph.embedding) for stream in beginning)):
        for stream, words in zip(beginning, blocks, strict=True):
            if words:
                stream.embed(words)
        for stream in beginning:
            stream.weights.release()
    for stream in beginning:
        if per_layer := stream.weights.graph.per_layer:
            stream.embed_for_layers(per_layer)
        stream.begun = True


def blocks_of_words(table: Weight) -> Iterator[tuple[int, int]]:
    """The rows of a table with one for each word, so many at a time."""
    return (rows for _, rows in pieces(table) if rows)


def add_embeddings(
    weights: Weights, words: tuple[int, int], tokens: Tensor, residual: Residual, states: Activations
) -> None:
    """Add to `states` what a residual is of the embeddings of those tokens [chunks, context] that are among words."""
    for places, rows in _looked_up(weights, weights.graph.embedding, words, tokens):
        states.add_rows(places, residual.begin(weights.graph.embedding_scale * rows))


def _looked_up(
    weights: Weights, table: Weight, words: tuple[int, int], tokens: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of the tokens that are among words, counted over all chunks, and their rows of a table, part by part."""
    flat = tokens.flatten()
    places = torch.where((flat >= words[0]) & (flat < words[1]))[0]
    for part in places.split(_TOKENS) if len(places) else ():
        block = weights.load(table, None, words)
        yield part, block[flat[part] - words[0]]


def advance(
    streams: Sequence[Stream],
    layers: Sequence[Layer | None],
    experts_done: Callable[[Sequence[int]], None] | None = None,
) -> None:
    """Run every stream through a layer of its own (None: it has no more), all of them together, from its embedding on.

    Streams of the same weights share what is loaded, as many experts at a time as the first stream's workspace says;
    `experts_done` is told of those that all streams have passed, while they are still loaded. Raises BadInput naming
    the first block or expert whose output is not finite.
    """
    embed(streams)
    pairs = [(stream, layer) for stream, layer in zip(streams, layers, strict=True) if layer]
    for number in range(max(len(layer.sublayers) for _, layer in pairs)):
        here = [(stream, layer) for stream, layer in pairs if number < len(layer.sublayers)]
        entered = [(stream, stream.before_experts(layer, number)) for stream, layer in here]
        waiting = [(stream, sublayer) for stream, sublayer in entered if sublayer.experts]
        if waiting:
            routed = [experts for _, sublayer in waiting for experts in sublayer.experts]
            order = order_of_experts(routed, unwanted=experts_done is not None)
            with _reading_ahead(waiting, order):
                run_experts(routed, order, experts_done, waiting[0][0].experts_at_once)
        for stream, sublayer in waiting:
            stream.after_experts(sublayer)
        for stream, _ in here:
            stream.weights.release()
    for stream, layer in pairs:
        stream.leave(layer)


@contextmanager
def _reading_ahead(waiting: Sequence[tuple[Stream, Entered]], order: Sequence[int]) -> Iterator[None]:
    """While this lasts, the stored numbers of experts are read before it is their turn in an order."""
    operations: dict[Model, dict[int, MoE]] = {}
    for stream, sublayer in waiting:
        here = operations.setdefault(stream.model, {})
        here.update((id(experts.operation), experts.operation) for experts in sublayer.experts)
    with ExitStack() as stack:
        for model, different in operations.items():
            stacks = [weight for operation in different.values() for weight in operation.stacks]
            steps = ([*_stored(stacks, expert)] for expert in order)
            limit = waiting[0][0].buffer // len(operations)
            stack.enter_context(model.storage.reading_ahead(steps, limit))
        yield


def _stored(stacks: Sequence[Weight], expert: int) -> Iterator[StoredRows]:
    """What one expert of those that have it is made of."""
    for stack in stacks:
        if expert < stack.matrices:
            yield from stored_rows(stack.source, expert, None)


def word_logits(graph: Graph, states: Tensor, rows: Tensor) -> Tensor:
    """Final states [positions, hidden size], some rows of the head [words, hidden size] -> [positions, words]"""
    logits = multiply(states, rows)
    if graph.logit_scale != 1.0:
        logits = logits * graph.logit_scale
    cap = graph.logit_softcap
    return logits if cap is None else cap * (logits / cap).tanh()


def _normalizer(norm: Norm | None, weights: Weights) -> Callable[[Tensor], Tensor]:
    """The norm, or nothing where there is none."""
    return normalizer(norm, weights) if norm else lambda states: states
