"""The blocks of a graph in torch: normed hidden states in, what they add out, all in float32.

Formulas are those of the original models; the tests compare every block against transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import MLP, SIGMOID_GAIN, Activation, HashRouter, Norm, Router, Score
from ..weights import Weights
from .context import Context


def normalizer(norm: Norm, weights: Weights) -> Callable[[Tensor], Tensor]:
    """A norm of rows [..., size] with its weights loaded."""
    weight = weights.load(norm.weight)
    bias = weights.load(norm.bias) if norm.bias else None

    def normalize_mean_square(hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape[-1:], None, norm.epsilon) * weight

    def normalize_variance(hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, weight.shape[-1:], weight, bias, norm.epsilon)

    return normalize_variance if norm.centered else normalize_mean_square


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[tokens, heads * head size] -> [heads, tokens, head size]"""
    return states.view(len(states), heads, -1).transpose(0, 1)


def mlp(operation: MLP, states: Tensor, weights: Weights) -> Tensor:
    """[tokens, width] -> [tokens, width] through a dense layer."""
    gate = weights.project(states, operation.gate) if operation.gate else None
    inner = activate(operation.activation, operation.clamp, gate, weights.project(states, operation.up))
    return weights.project(inner, operation.down)


class DenseMixer:
    """A dense layer with its weights; it mixes no tokens, so there is nothing to remember."""

    def __init__(self, operation: MLP, weights: Weights) -> None:
        self._operation = operation
        self._weights = weights

    def initial_state(self) -> None:
        """The state before the first token."""

    def __call__(self, states: Tensor, memory: None, context: Context) -> tuple[Tensor, None]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        return mlp(self._operation, states, self._weights), None


def route(router: Router | HashRouter, states: Tensor, tokens: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """states [tokens, hidden size], token ids [tokens] -> chosen experts and their shares, both [tokens, top_k].

    Shares are the chosen experts' own scores, as a rule scaled to a fixed sum: a bias moves the choice only.
    """
    logits = weights.project(states, router.weight)
    if isinstance(router, Router) and router.logit_bias:
        logits = logits + weights.load(router.logit_bias)
    scores = _SCORES[router.score](logits)
    if isinstance(router, HashRouter):
        chosen = weights.load(router.table)[tokens].long()
        return chosen, _normalized(scores.gather(1, chosen), router.epsilon) * router.scale
    candidates = _best_groups(router, scores + weights.load(router.bias) if router.bias else scores)
    chosen = torch.topk(candidates, router.top_k, dim=-1, sorted=False).indices
    shares = scores.gather(1, chosen)
    shares = (_normalized(shares, router.epsilon) if router.normalize else shares) * router.scale
    return chosen, shares * weights.load(router.expert_scale)[chosen] if router.expert_scale else shares


def _normalized(shares: Tensor, epsilon: float) -> Tensor:
    return shares / (shares.sum(dim=-1, keepdim=True) + epsilon)


def _best_groups(router: Router, scores: Tensor) -> Tensor:
    """Scores [tokens, experts] with minus infinity wherever an expert's group is not among the best."""
    if router.groups_used == router.groups:
        return scores
    grouped = scores.view(len(scores), router.groups, -1)
    ranking = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = ranking.topk(router.groups_used, dim=-1, sorted=False).indices
    excluded = torch.ones_like(ranking, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(excluded[..., None], -torch.inf).flatten(1)


def activate(activation: Activation, clamp: float | None, gate: Tensor | None, up: Tensor) -> Tensor:
    """What lies between an expert's projections."""
    match activation:
        case Activation.SWIGLU | Activation.SWIGLU_OAI:
            assert gate is not None
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            if activation is Activation.SWIGLU:
                return functional.silu(gate) * up
            return gate * torch.sigmoid(SIGMOID_GAIN * gate) * (up + 1)
        case Activation.GEGLU:
            assert gate is not None and clamp is None
            return functional.gelu(gate, approximate="tanh") * up
        case Activation.RELU_SQUARED:
            return functional.relu(up).square()


_SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    Score.SIGMOID: torch.sigmoid,
    Score.SOFTMAX: lambda logits: logits.softmax(dim=-1),
    Score.SQRT_SOFTPLUS: lambda logits: functional.softplus(logits).sqrt(),
}
