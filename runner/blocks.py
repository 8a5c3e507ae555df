"""The blocks of a graph in torch: normed hidden states in, what they add out, all in float32.

Formulas are those of the original models; the tests compare every block against transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.graph import MLP, Activation, HashRouter, MoE, Norm, Router, Score

Load = Callable[..., Tensor]  # Model.load: (weight, expert=None, rows=None) -> float32


def normaliser(norm: Norm, load: Load) -> Callable[[Tensor], Tensor]:
    """RMSNorm with its weight loaded: divides every row [..., size] by its root mean square, times the weight."""
    weight = load(norm.weight)

    def normalise(hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape[-1:], None, norm.epsilon) * weight

    return normalise


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[tokens, heads * head size] -> [heads, tokens, head size]"""
    return states.view(len(states), heads, -1).transpose(0, 1)


def moe(operation: MoE, normed: Tensor, tokens: Tensor, load: Load) -> Tensor:
    """The experts' answer to `normed` [chunks, tokens, hidden size], of the same shape; `tokens` are their ids.

    Experts are loaded one after another; each sees only the tokens that were routed to it.
    """
    states = normed.flatten(0, 1)
    chosen, shares = route(operation.router, states, tokens.flatten(), load)
    inner = states @ load(operation.latent_down).T if operation.latent_down else states
    answer = torch.zeros_like(inner)
    for expert in range(operation.experts):
        rows, choice = torch.where(chosen == expert)
        if len(rows):
            output = expert_output(operation, expert, inner[rows], load)
            answer.index_add_(0, rows, output * shares[rows, choice, None])
    if operation.latent_up:
        answer = answer @ load(operation.latent_up).T
    if operation.shared:
        answer += mlp(operation.shared, states, load)
    return answer.view_as(normed)


def mlp(operation: MLP, states: Tensor, load: Load) -> Tensor:
    """[..., width] -> [..., width] through a dense layer."""
    gate = states @ load(operation.gate).T if operation.gate else None
    inner = _activate(operation.activation, operation.clamp, gate, states @ load(operation.up).T)
    return inner @ load(operation.down).T


def route(router: Router | HashRouter, states: Tensor, tokens: Tensor, load: Load) -> tuple[Tensor, Tensor]:
    """states [tokens, hidden size], token ids [tokens] -> chosen experts and their shares, both [tokens, top_k].

    Shares are the chosen experts' own scores, scaled to a fixed sum: a bias moves the choice only.
    """
    scores = _SCORES[router.score](states @ load(router.weight).T)
    if isinstance(router, HashRouter):
        chosen = load(router.table)[tokens].long()
    else:
        candidates = _best_groups(router, scores + load(router.bias))
        chosen = torch.topk(candidates, router.top_k, dim=-1, sorted=False).indices
    shares = scores.gather(1, chosen)
    return chosen, shares / (shares.sum(dim=-1, keepdim=True) + router.epsilon) * router.scale


def _best_groups(router: Router, scores: Tensor) -> Tensor:
    """Scores [tokens, experts] with minus infinity wherever an expert's group is not among the best."""
    if router.groups_used == router.groups:
        return scores
    grouped = scores.view(len(scores), router.groups, -1)
    ranking = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = ranking.topk(router.groups_used, dim=-1, sorted=False).indices
    excluded = torch.ones_like(ranking, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(excluded[..., None], -torch.inf).flatten(1)


def expert_output(operation: MoE, expert: int, states: Tensor, load: Load) -> Tensor:
    """states [tokens, width] -> [tokens, width] through one expert."""
    gate = states @ load(operation.gate, expert).T if operation.gate else None
    inner = _activate(operation.activation, operation.clamp, gate, states @ load(operation.up, expert).T)
    return inner @ load(operation.down, expert).T


def _activate(activation: Activation, clamp: float | None, gate: Tensor | None, up: Tensor) -> Tensor:
    match activation:
        case Activation.SWIGLU:
            assert gate is not None
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            return functional.silu(gate) * up
        case Activation.RELU_SQUARED:
            return functional.relu(up).square()


_SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    Score.SIGMOID: torch.sigmoid,
    Score.SQRT_SOFTPLUS: lambda logits: functional.softplus(logits).sqrt(),
}
