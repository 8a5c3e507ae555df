"""The blocks of a graph in torch: hidden states in, hidden states out, all in float32.

Formulas are those of the original models; the tests compare every block against transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.graph import MLP, Activation, Attention, MoE, Norm, Rope, Router, Score

Load = Callable[..., Tensor]  # Model.load: (weight, expert=None, rows=None) -> float32


def normaliser(norm: Norm, load: Load) -> Callable[[Tensor], Tensor]:
    """RMSNorm with its weight loaded: divides every row [..., size] by its root mean square, times the weight."""
    weight = load(norm.weight)

    def normalise(hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape[-1:], None, norm.epsilon) * weight

    return normalise


def attention(operation: Attention, hidden: Tensor, norm: Norm, load: Load) -> None:
    """Adds causal self-attention of `norm(hidden)` to `hidden` [chunks, tokens, hidden size], in place."""
    normalise = normaliser(norm, load)
    prepare_query = _preparation(operation.query_norm, operation.heads, operation.rope, load)
    prepare_key = _preparation(operation.key_norm, operation.key_value_heads, operation.rope, load)
    query_weight, key_weight = load(operation.query), load(operation.key)
    value_weight, output_weight = load(operation.value), load(operation.output)
    for chunk in hidden:  # one at a time: the scores of a chunk are [heads, tokens, tokens]
        normed = normalise(chunk)
        mixed = functional.scaled_dot_product_attention(
            prepare_query(normed @ query_weight.T)[None],
            prepare_key(normed @ key_weight.T)[None],
            _split_heads(normed @ value_weight.T, operation.key_value_heads)[None],
            is_causal=True,
            enable_gqa=True,
        )  # [1, heads, tokens, head size]
        chunk += mixed[0].transpose(0, 1).flatten(1) @ output_weight.T


def _preparation(norm: Norm | None, heads: int, rope: Rope | None, load: Load) -> Callable[[Tensor], Tensor]:
    """What happens to projected queries or keys [tokens, width] before they meet: norm, head split, rotation."""
    normalise = normaliser(norm, load) if norm else lambda states: states

    def prepare(states: Tensor) -> Tensor:
        split = _split_heads(normalise(states), heads)
        return rotate(split, rope) if rope else split

    return prepare


def _split_heads(states: Tensor, heads: int) -> Tensor:
    """[tokens, heads * head size] -> [heads, tokens, head size]"""
    return states.view(len(states), heads, -1).transpose(0, 1)


def rotate(states: Tensor, rope: Rope) -> Tensor:
    """Rotates the first `rope.size` dimensions of [heads, tokens, head size] by each token's position."""
    cosine, sine = _rotation(rope, states.shape[1])
    half = rope.size // 2
    first, second, rest = states[..., :half], states[..., half : rope.size], states[..., rope.size :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


@cache
def _rotation(rope: Rope, tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/size), each [tokens, size / 2]."""
    frequencies = 1.0 / rope.base ** (torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size)
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def mlp(operation: MLP, hidden: Tensor, norm: Norm, load: Load) -> None:
    """Adds the answer of a dense layer to `norm(hidden)` to `hidden` [chunks, tokens, hidden size], in place."""
    rows = hidden.flatten(0, 1)
    rows += _mlp_output(operation, normaliser(norm, load)(rows), load)


def moe(operation: MoE, hidden: Tensor, norm: Norm, load: Load) -> None:
    """Adds the experts' answer to `norm(hidden)` to `hidden` [chunks, tokens, hidden size], in place.

    Experts are loaded one after another; each sees only the tokens that were routed to it.
    """
    rows = hidden.flatten(0, 1)
    normed = normaliser(norm, load)(rows)
    chosen, shares = route(operation.router, normed, load)
    states = normed @ load(operation.latent_down).T if operation.latent_down else normed
    answer = torch.zeros_like(states)
    for expert in range(operation.experts):
        tokens, choice = torch.where(chosen == expert)
        if len(tokens):
            output = expert_output(operation, expert, states[tokens], load)
            answer.index_add_(0, tokens, output * shares[tokens, choice, None])
    rows += answer @ load(operation.latent_up).T if operation.latent_up else answer
    if operation.shared:
        rows += _mlp_output(operation.shared, normed, load)


def route(router: Router, normed: Tensor, load: Load) -> tuple[Tensor, Tensor]:
    """normed [tokens, hidden size] -> chosen experts and their shares, both [tokens, top_k].

    The bias moves the choice only; the shares are the chosen experts' own scores, scaled to a fixed sum.
    """
    scores = _SCORES[router.score](normed @ load(router.weight).T)
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
    up = states @ load(operation.up, expert).T
    gate = states @ load(operation.gate, expert).T if operation.gate else None
    return _activate(operation.activation, gate, up) @ load(operation.down, expert).T


def _mlp_output(operation: MLP, states: Tensor, load: Load) -> Tensor:
    return _activate(operation.activation, None, states @ load(operation.up).T) @ load(operation.down).T


def _activate(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    match activation:
        case Activation.SWIGLU:
            assert gate is not None
            return functional.silu(gate) * up
        case Activation.RELU_SQUARED:
            return functional.relu(up).square()


_SCORES: dict[Score, Callable[[Tensor], Tensor]] = {Score.SIGMOID: torch.sigmoid}
