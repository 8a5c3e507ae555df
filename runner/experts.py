"""A layer's experts, one after another, each for all lanes before the next is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..archs.errors import BadInput
from ..archs.graph import MoE
from .activations import Workspace
from .blocks import activate, mlp, route
from .weights import Weights

_BLOCK = 1024  # tokens an expert takes at a time


class ExpertLane:
    """One lane's tokens [chunks, context] on their way through the experts of a layer.

    `route` every chunk, `seal`, `run` experts in any order, take `answer`. `where` names model and layer for messages.
    """

    def __init__(self, operation: MoE, weights: Weights, tokens: Tensor, workspace: Workspace, where: str) -> None:
        self.operation = operation
        self.weights = weights
        self._tokens = tokens
        self._where = where
        shape = (*tokens.shape, operation.up.columns)
        self._inputs, self._answers = workspace.activations(*shape), workspace.activations(*shape)
        self._chosen: list[Tensor] = []
        self._shares: list[Tensor] = []

    def route(self, normed: Tensor) -> None:
        """Take in the next chunk: normed states [tokens, hidden size]."""
        chunk, down = len(self._chosen), self.operation.latent_down
        chosen, shares = route(self.operation.router, normed, self._tokens[chunk], self.weights)
        self._inputs[chunk] = self.weights.project(normed, down) if down else normed
        self._chosen.append(chosen)
        self._shares.append(shares)

    def seal(self) -> None:
        """All chunks are routed: bring the tokens into the experts' order."""
        chosen, top_k = torch.cat(self._chosen).flatten(), self.operation.router.top_k
        order = chosen.argsort(stable=True)
        self.counts = torch.bincount(chosen, minlength=self.operation.experts)
        self._rows = (order // top_k).split(self.counts.tolist())
        self._portions = torch.cat(self._shares).flatten()[order].split(self.counts.tolist())

    def run(self, expert: int) -> None:
        """Add an expert's answers to the tokens that chose it. Raises BadInput when they are not finite."""
        for rows, shares in zip(self._rows[expert].split(_BLOCK), self._portions[expert].split(_BLOCK), strict=True):
            if len(rows):
                output = self._output(expert, self._inputs.rows(rows))
                if not math.isfinite(float(output.sum())):
                    raise BadInput(f"{self._where}, expert {expert}: the output is NaN or infinite")
                self._answers.add_rows(rows, output * shares[:, None])

    def answer(self, chunk: int, normed: Tensor) -> Tensor:
        """What the whole block says to a chunk of normed states, [tokens, hidden size] both."""
        operation, answer = self.operation, self._answers[chunk]
        if operation.latent_up:
            answer = self.weights.project(answer, operation.latent_up)
        return answer + mlp(operation.shared, normed, self.weights) if operation.shared else answer

    def _output(self, expert: int, states: Tensor) -> Tensor:
        """states [tokens, width] -> [tokens, width] through one expert."""
        operation, project = self.operation, self.weights.project
        gate = project(states, operation.gate, expert) if operation.gate else None
        inner = activate(operation.activation, operation.clamp, gate, project(states, operation.up, expert))
        return project(inner, operation.down, expert)


def run_experts(lanes: Sequence[ExpertLane], expert_done: Callable[[int], None] | None) -> None:
    """Run sealed lanes through all experts, those with most tokens of the first lane first; see `stream.advance`."""
    count = max(lane.operation.experts for lane in lanes)
    tokens = torch.zeros(count, dtype=torch.int64)
    tokens[: lanes[0].operation.experts] = lanes[0].counts
    for expert in tokens.argsort(descending=True, stable=True).tolist():
        for lane in lanes:
            if expert < lane.operation.experts:
                lane.run(expert)
        if expert_done:
            expert_done(expert)
        for lane in lanes:
            lane.weights.forget(expert)
