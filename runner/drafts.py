"""Multi-token prediction: what a block drafts at many places of a text, step by step, all places together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..sources.model import Model
from .activations import Activations, Workspace
from .blocks.common import normalizer
from .blocks.context import Context
from .blocks.residual import residual_of
from .stream import Mixer, Stream, add_embeddings, blocks_of_words, word_logits
from .weights import Weights


class BranchedStream(Stream):
    """A stream whose chunks are a text and branches behind it: what may follow the first so many of its tokens.

    Args:
        starts: after how many tokens of the text each branch begins, in ascending order.
        length: tokens of a branch.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        weights: Weights,
        states: Iterable[Tensor],
        workspace: Workspace,
        starts: Sequence[int],
        length: int,
    ) -> None:
        super().__init__(model, tokens, None, weights, states, (), workspace)
        self._starts, self._length = starts, length

    def _mixed(self, block: Mixer, normed: Tensor, memory: Any, context: Context, chunk: int) -> tuple[Tensor, Any]:
        text, branches, seen = [], [], 0
        behind = len(normed) - len(self._starts) * self._length
        for number, start in enumerate(self._starts):
            if start > seen:
                output, memory = block(normed[seen:start], memory, _part(context, seen, start))
                text.append(output)
                seen = start
            first = behind + number * self._length
            own = _part(context, first, first + self._length)
            positions = start + torch.arange(self._length, device=normed.device)
            branches.append(block(normed[first : first + self._length], memory, replace(own, positions=positions))[0])
        if seen < behind:
            output, memory = block(normed[seen:behind], memory, _part(context, seen, behind))
            text.append(output)
        return torch.cat((*text, *branches)), memory


def _part(context: Context, first: int, last: int) -> Context:
    return replace(context, tokens=context.tokens[first:last], positions=context.positions[first:last])


class MultiTokenPrediction:
    """Drafts that begin at many places of a text, one more token of each at every step.

    A place is the number of the last token that is known there. The block has read each pair of the model's hidden
    state of a token and the token after it, up to there; then it reads its own states and the tokens that it drafts.

    Args:
        draft: what drafts, see `Model.draft`; its weights are `weights`.
        stream: the model's, which has passed all layers.
        places: in ascending order, from 1.
    """

    def __init__(
        self, draft: Model, weights: Weights, stream: Stream, places: Sequence[int], workspace: Workspace
    ) -> None:
        self._draft, self._weights, self._workspace = draft, weights, workspace
        (self._block,) = weights.graph.predictions
        self._residual = residual_of(weights)
        self._places, self._text = places, stream.tokens[:, 1 : places[-1] + 1]
        seen = slice(0, places[-1])
        self._read = self._inputs(self._text, (self._hidden(stream, chunk, seen) for chunk in range(len(self._text))))
        self._drafted: list[tuple[Tensor, Activations]] = []  # tokens [chunks, places], what the block reads of them

    def states(self) -> tuple[Stream, list[Tensor]]:
        """The next token of every draft: the stream that predicts it, and its states of each chunk, [places, size]."""
        self._stream = self._run()
        return self._stream, [self._stream.final(chunk, self._rows()) for chunk in range(len(self._text))]

    def take(self, tokens: Tensor) -> None:
        """Go on with the tokens [chunks, places] that were predicted."""
        rows = self._rows()
        hidden = (self._hidden(self._stream, chunk, rows) for chunk in range(len(self._text)))
        self._drafted.append((tokens, self._inputs(tokens, hidden)))

    def _run(self) -> Stream:
        """The text and all that was drafted through the block."""
        count = range(len(self._text))
        if not self._drafted:
            states = (self._read[chunk] for chunk in count)
            stream = Stream(self._draft, self._text, None, self._weights, states, workspace=self._workspace)
        else:
            drafted = torch.stack([tokens for tokens, _ in self._drafted], dim=2)
            tokens = torch.cat((self._text, drafted.flatten(1)), dim=1)
            branches = (torch.stack([read[chunk] for _, read in self._drafted], dim=1).flatten(0, 1) for chunk in count)
            states = (torch.cat((self._read[chunk], branch)) for chunk, branch in enumerate(branches))
            stream = BranchedStream(
                self._draft, tokens, self._weights, states, self._workspace, self._places, len(self._drafted)
            )
        stream.advance(self._block.layer)
        return stream

    def _rows(self) -> Tensor:
        """Where the last tokens of all drafts are in a chunk."""
        steps, places = len(self._drafted), torch.tensor(self._places, device=self._text.device)
        if not steps:
            return places - 1
        return self._text.shape[1] + steps * (1 + torch.arange(len(places), device=places.device)) - 1

    def _hidden(self, stream: Stream, chunk: int, rows: slice | Tensor) -> Tensor:
        """What the block reads of tokens of a chunk beside the tokens that follow them."""
        return stream.hidden[chunk][rows] if self._block.of_residual else stream.final(chunk, rows)

    def _inputs(self, tokens: Tensor, hidden: Iterator[Tensor]) -> Activations:
        """The residual with which the block begins, of tokens [chunks, n] and of hidden states before them."""
        block, weights = self._block, self._weights
        inputs = self._workspace.activations(*tokens.shape, *self._residual.width, whole_chunks=True)
        for words in blocks_of_words(weights.graph.embedding):
            add_embeddings(weights, words, tokens, self._residual, inputs)
            weights.release()
        norms = normalizer(block.embedding_norm, weights), normalizer(block.hidden_norm, weights)
        for chunk, states in enumerate(hidden):
            both = torch.cat((norms[0](inputs[chunk]), norms[1](states)), dim=-1)
            inputs[chunk] = weights.project(both.flatten(0, -2), block.projection).view_as(states)
        weights.release()
        return inputs


def most_probable(stream: Stream, states: Sequence[Tensor]) -> Tensor:
    """The token that a model finds most probable after states [n, hidden size] of each chunk, [chunks, n]."""
    shape = len(states), len(states[0])
    best = torch.full(shape, -torch.inf, device=stream.weights.device)
    words = torch.zeros(shape, dtype=torch.int64, device=stream.weights.device)
    first_word = 0
    for rows in stream.head_blocks():
        for chunk, own in enumerate(states):
            logits, found = word_logits(stream.weights.graph, own, rows).max(dim=1)
            better = logits > best[chunk]
            best[chunk] = torch.where(better, logits, best[chunk])
            words[chunk] = torch.where(better, first_word + found, words[chunk])
        first_word += len(rows)
    return words
