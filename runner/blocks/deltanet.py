"""Gated DeltaNet in torch: any number of tokens from any state, a prompt and a single step are the same code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import GatedDeltaNet
from ..placement import wide
from ..weights import Weights
from .common import normalizer, split_heads
from .context import Context
from .recurrent import RecurrentState, convolve, exponential, fading


class DeltaNetMixer:
    """The operation with its weights."""

    def __init__(self, operation: GatedDeltaNet, weights: Weights) -> None:
        self._operation = operation
        self._weights, load = weights, weights.load
        self._convolution = load(operation.convolution)
        self._step_bias, self._decay = load(operation.step_bias), load(operation.decay)
        self._normalize = normalizer(operation.norm, weights)

    def initial_state(self) -> RecurrentState:
        """The state before the first token."""
        o = self._operation
        return RecurrentState.initial(self._convolution, o.heads, o.key_size, o.value_size)

    def __call__(self, states: Tensor, memory: RecurrentState, context: Context) -> tuple[Tensor, RecurrentState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        o, project = self._operation, self._weights.project
        mixed, convolved = convolve(project(states, o.input), memory.convolution, self._convolution)
        query, key, value = torch.split(mixed, [*o.parts], dim=-1)
        beta, alpha = self._rates(states)
        y, space = delta_rule(
            self._for_all_heads(query) * o.key_size**-0.5,
            self._for_all_heads(key),
            split_heads(value, o.heads),
            beta.sigmoid().T,
            (self._decay * functional.softplus(alpha + self._step_bias)).T,
            memory.space,
        )
        gated = self._normalize(y.transpose(0, 1)).flatten(1) * functional.silu(project(states, o.gate))
        return project(gated, o.output), RecurrentState(convolved, space)

    def _rates(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What decides how much is written and how much is kept, [tokens, heads] each."""
        o, project = self._operation, self._weights.project
        if o.alpha:
            return project(states, o.beta), project(states, o.alpha)
        beta, alpha = project(states, o.beta).unflatten(1, (o.key_heads, 2, -1)).unbind(2)
        return beta.flatten(1), alpha.flatten(1)

    def _for_all_heads(self, keys: Tensor) -> Tensor:
        """Queries or keys [tokens, key heads * key size] of length one, [heads, tokens, key size]."""
        o = self._operation
        apart = split_heads(keys, o.key_heads)
        unit = apart * (apart.square().sum(-1, keepdim=True) + o.key_epsilon).rsqrt()
        times = o.heads // o.key_heads
        return unit.repeat(times, 1, 1) if o.tiled else unit.repeat_interleave(times, dim=0)


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor, space: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence S_t = a_t S_(t-1) + k_t (outer) d_t, d_t = beta_t (v_t - (a_t S_(t-1))^T k_t), y_t = S_t^T q_t.

    The d of a chunk's tokens depend on each other by a triangular system (Yang et al. 2025, section 3.3), chunks act
    on each other through S; a chunk of one token is the recurrence itself.

    Args:
        query, key: [heads, tokens, key size].
        value: [heads, tokens, value size].
        beta: [heads, tokens], from 0 to 1.
        decay: logarithms of a, [heads, tokens].
        space: S before the first token, [heads, key size, value size].

    Returns:
        y [heads, tokens, value size] and S after the last token.
    """
    outputs = []
    for start in range(0, query.shape[1], GatedDeltaNet.CHUNK):
        part = slice(start, start + GatedDeltaNet.CHUNK)
        q, k, v, strength = query[:, part], key[:, part], value[:, part], beta[:, part, None]
        passed = wide(decay[:, part]).cumsum(1)  # in float64, because differences of long sums follow
        between, since = fading(passed, query), exponential(passed, query)[..., None]
        system = strength * (k @ k.mT) * between  # its diagonal counts as ones
        missed = strength * (v - since * (k @ space))
        written = torch.linalg.solve_triangular(system, missed, upper=False, unitriangular=True)
        outputs.append(since * (q @ space) + (q @ k.mT * between) @ written)
        remaining = exponential(passed[:, -1:] - passed, query)[..., None]
        space = since[:, -1:] * space + (k * remaining).mT @ written
    return torch.cat(outputs, dim=1), space
