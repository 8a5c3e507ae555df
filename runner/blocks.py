"""The blocks of a graph in torch: hidden states in, hidden states out, all in float32.

Formulas are those of the original models; the tests compare every block against transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.graph import Activation, Attention, MoE, Norm, Rope, Router, Score

Load = Callable[..., Tensor]  # Model.load: (weight, expert=None, rows=None) -> float32


def normaliser(norm: Norm, load: Load) -> Callable[[Tensor], Tensor]:
    """RMSNorm with its weight loaded: divides every row [..., size] by its root mean square, times the weight."""
    weight = load(norm.weight)
    return lambda hidden: functional.rms_norm(hidden, weight.shape, weight, norm.epsilon)


def attention(operation: Attention, hidden: Tensor, norm: Norm, load: Load) -> None:
    """Adds causal self-attention of `norm(hidden)` to `hidden` [chunks, tokens, hidden size], in place."""
    normalise = normaliser(norm, load)
    normalise_query, normalise_key = normaliser(operation.query_norm, load), normaliser(operation.key_norm, load)
    query_weight, key_weight = load(operation.query), load(operation.key)
    value_weight, output_weight = load(operation.value), load(operation.output)
    for chunk in hidden:  # one at a time: the scores of a chunk are [heads, tokens, tokens]
        normed = normalise(chunk)
        query = _split_heads(normalise_query(normed @ query_weight.T), operation.heads)
        key = _split_heads(normalise_key(normed @ key_weight.T), operation.key_value_heads)
        value = _split_heads(normed @ value_weight.T, operation.key_value_heads)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, operation.rope)[None],
            rotate(key, operation.rope)[None],
            value[None],
            is_causal=True,
            enable_gqa=True,
        )  # [1, heads, tokens, head size]
        chunk += mixed[0].transpose(0, 1).flatten(1) @ output_weight.T


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


def moe(operation: MoE, hidden: Tensor, norm: Norm, load: Load) -> None:
    """Adds the routed experts' answer to `norm(hidden)` to `hidden` [chunks, tokens, hidden size], in place.

    Experts are loaded one after another; each sees only the tokens that were routed to it.
    """
    rows = hidden.flatten(0, 1)
    normed = normaliser(norm, load)(rows)
    chosen, shares = route(operation.router, normed, load)
    for expert in range(operation.experts):
        tokens, choice = torch.where(chosen == expert)
        if len(tokens):
            output = expert_output(operation, expert, normed[tokens], load)
            rows.index_add_(0, tokens, output * shares[tokens, choice, None])


def route(router: Router, normed: Tensor, load: Load) -> tuple[Tensor, Tensor]:
    """normed [tokens, hidden size] -> chosen experts and their shares, both [tokens, top_k].

    The bias moves the choice only; the shares are the chosen experts' own scores, scaled to sum to one.
    """
    scores = _SCORES[router.score](normed @ load(router.weight).T)
    chosen = torch.topk(scores + load(router.bias), router.top_k, dim=-1, sorted=False).indices
    shares = scores.gather(1, chosen)
    return chosen, shares / shares.sum(dim=-1, keepdim=True)


def expert_output(operation: MoE, expert: int, states: Tensor, load: Load) -> Tensor:
    """states [tokens, hidden size] -> [tokens, hidden size] through one expert."""
    inner = _ACTIVATIONS[operation.activation](
        states @ load(operation.gate, expert).T, states @ load(operation.up, expert).T
    )
    return inner @ load(operation.down, expert).T


_SCORES: dict[Score, Callable[[Tensor], Tensor]] = {Score.SIGMOID: torch.sigmoid}
_ACTIVATIONS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    Activation.SWIGLU: lambda gate, up: functional.silu(gate) * up,
}
