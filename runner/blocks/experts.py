"""A layer's experts, some at a time, for all streams before the next are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...archs.graph import MoE, Router
from ...archs.weights import Weight
from ...errors import BadInput
from ..activations import Workspace
from ..weights import Weights
from .common import activate, mlp, normalizer, route


class Mixture:
    """The operation with its weights."""

    def __init__(self, operation: MoE, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights

    def begin(self, tokens: Tensor, workspace: Workspace, where: str) -> RoutedTokens:
        """The way of `tokens` [chunks, context] through the experts; `where` names model and layer for messages."""
        return RoutedTokens(self._operation, self._weights, tokens, workspace, where)


class RoutedTokens:
    """One stream's tokens [chunks, context] on their way through the experts of a layer.

    `route` every chunk, `finish_routing`, `add` what experts answer in any order, take `answer`.
    """

    def __init__(self, operation: MoE, weights: Weights, tokens: Tensor, workspace: Workspace, where: str) -> None:
        self.operation = operation
        self.weights = weights
        self._tokens = tokens
        self._where = where
        shape = (*tokens.shape, operation.up.columns)
        self._inputs, self._answers = workspace.activations(*shape), workspace.activations(*shape)
        router = operation.router if isinstance(operation.router, Router) else None
        self._normalize = normalizer(router.input_norm, weights) if router and router.input_norm else None
        self._input_scale = router.input_scale if router else 1.0
        self._chosen: list[Tensor] = []
        self._shares: list[Tensor] = []

    def route(self, normed: Tensor, residual: Tensor) -> None:
        """Take in the next chunk: states [tokens, hidden size], normed and as the residual has them."""
        chunk, down = len(self._chosen), self.operation.latent_down
        states = self._input_scale * self._normalize(residual) if self._normalize else normed
        chosen, shares = route(self.operation.router, states, self._tokens[chunk], self.weights)
        inputs = self.weights.project(normed, down) if down else normed
        self.weights.announce([stack for stack in (self.operation.gate, self.operation.up) if stack], inputs)
        self._inputs[chunk] = inputs
        self._chosen.append(chosen)
        self._shares.append(shares)

    def finish_routing(self) -> None:
        """All chunks are routed: bring the tokens into the experts' order."""
        chosen, top_k = torch.cat(self._chosen).flatten(), self.operation.router.top_k
        order = chosen.argsort(stable=True)
        self.counts = torch.bincount(chosen, minlength=self.operation.experts).cpu()
        self._rows = (order // top_k).split(self.counts.tolist())
        self._portions = torch.cat(self._shares).flatten()[order].split(self.counts.tolist())

    def pieces(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of the tokens that chose an expert and its shares in their answers, so many at a time."""
        pairs = zip(self._rows[expert].split(MoE.TOKENS), self._portions[expert].split(MoE.TOKENS), strict=True)
        return ((rows, shares) for rows, shares in pairs if len(rows))

    def inputs(self, rows: Tensor) -> Tensor:
        """What experts read of tokens, [tokens, width]."""
        return self._inputs.rows(rows)

    def output(self, expert: int, states: Tensor) -> Tensor:
        """states [tokens, width] -> [tokens, width] through one expert."""
        operation = self.operation
        gate = self._projected(states, operation.gate, operation.gate_bias, expert) if operation.gate else None
        up = self._projected(states, operation.up, operation.up_bias, expert)
        inner = activate(operation.activation, operation.clamp, gate, up)
        return self._projected(inner, operation.down, operation.down_bias, expert)

    def check(self, experts: Sequence[int], sums: Sequence[Tensor]) -> None:
        """Raises BadInput where what experts said adds up to something that is not finite."""
        for expert, total in zip(experts, torch.stack([*sums]).tolist() if sums else (), strict=True):
            if not math.isfinite(total):
                raise BadInput(f"{self._where}, expert {expert}: the output is NaN or infinite")

    def _projected(self, states: Tensor, weight: Weight, bias: Weight | None, expert: int) -> Tensor:
        projected = self.weights.project(states, weight, expert)
        return projected + self.weights.load(bias)[expert] if bias else projected

    def add(self, rows: Tensor, answers: Tensor) -> None:
        """Add to tokens what an expert answers, in the share that it has."""
        self._answers.add_rows(rows, answers)

    def answer(self, chunk: int, normed: Tensor) -> Tensor:
        """What the whole block says to a chunk of normed states, [tokens, hidden size] both."""
        operation, answer = self.operation, self._answers[chunk]
        if operation.latent_up:
            answer = self.weights.project(answer, operation.latent_up)
        if operation.shared:
            shared = mlp(operation.shared, normed, self.weights)
            if operation.shared_gate:
                shared = shared * (normed @ self.weights.load(operation.shared_gate).view(-1, 1)).sigmoid()
            answer = answer + shared
        return answer if operation.scale == 1 else answer * operation.scale


_Piece = tuple[RoutedTokens, Tensor, Tensor]  # tokens of a stream, and the shares of an expert in their answers


def order_of_experts(streams: Sequence[RoutedTokens], unwanted: bool) -> list[int]:
    """In which order routed streams run through experts: first through those that most tokens of the first want; those
    that no stream wants come last, or not at all."""
    tokens = torch.zeros(2, max(stream.operation.experts for stream in streams), dtype=torch.int64, device="cpu")
    tokens[0, : streams[0].operation.experts] = streams[0].counts
    for stream in streams:
        tokens[1, : stream.operation.experts] += stream.counts
    order = tokens[0].argsort(descending=True, stable=True)
    return [*map(int, order if unwanted else order[tokens[1, order] > 0])]


def run_experts(
    streams: Sequence[RoutedTokens],
    order: Sequence[int],
    experts_done: Callable[[Sequence[int]], None] | None,
    at_once: int = 1,
) -> None:
    """Run routed streams through experts in an order, so many at a time; see `stream.advance`.

    What those of the first weights find of the experts of a group is known when those of the next come to it.
    """
    alike: dict[tuple[int, int], list[RoutedTokens]] = {}
    for stream in streams:
        alike.setdefault((id(stream.weights), id(stream.operation)), []).append(stream)
    for start in range(0, len(order), at_once):
        group = order[start : start + at_once]
        for those in alike.values():
            _run_group(those, group, all_of_them=experts_done is not None)
        if experts_done:
            experts_done(group)
        for expert in group:
            for stream in streams:
                stream.weights.release(expert)


def _run_group(streams: Sequence[RoutedTokens], experts: Sequence[int], all_of_them: bool) -> None:
    """Streams of the same weights through some experts, which are made ready together: all, or those with tokens."""
    operation = streams[0].operation
    there = [expert for expert in experts if expert < operation.experts]
    wanted = [expert for expert in there if any(stream.counts[expert] for stream in streams)]
    if made := there if all_of_them else wanted:
        streams[0].weights.prepare(operation.stacks, made)
    totals = [(expert, total) for expert in wanted for total in _run(streams, expert)]
    streams[0].check([expert for expert, _ in totals], [total for _, total in totals])


def _run(streams: Sequence[RoutedTokens], expert: int) -> Iterator[Tensor]:
    """Streams of the same weights through one expert; few tokens of each are many of all, and multiply faster.

    Gives what its answers add up to, some at a time, which nobody has to wait for.
    """
    for block in _blocks([(stream, rows, shares) for stream in streams for rows, shares in stream.pieces(expert)]):
        output = streams[0].output(expert, torch.cat([stream.inputs(rows) for stream, rows, _ in block]))
        yield output.sum()
        parts = output.split([len(rows) for _, rows, _ in block])
        for (stream, rows, shares), part in zip(block, parts, strict=True):
            stream.add(rows, part * shares[:, None])


def _blocks(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces side by side, as long as they are no more tokens than one piece may be."""
    block: list[_Piece] = []
    for piece in pieces:
        if block and sum(len(rows) for _, rows, _ in block) + len(piece[1]) > MoE.TOKENS:
            yield block
            block = []
        block.append(piece)
    if block:
        yield block
