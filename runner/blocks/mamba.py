"""Mamba-2 in torch: any number of tokens from any state, so that a prompt and a single step are the same code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.graph import Mamba2
from ..placement import wide
from ..weights import Weights
from .common import normalizer
from .context import Context
from .recurrent import RecurrentState, convolve, exponential, fading


class MambaMixer:
    """The operation with its weights."""

    def __init__(self, operation: Mamba2, weights: Weights) -> None:
        self._operation = operation
        self._weights, load = weights, weights.load
        self._convolution = load(operation.convolution)
        self._convolution_bias = load(operation.convolution_bias)
        self._step_bias = load(operation.step_bias)
        self._decay, self._skip = load(operation.decay).flatten(), load(operation.skip)
        self._normalize = normalizer(operation.norm, weights)

    def initial_state(self) -> RecurrentState:
        """The state before the first token."""
        o = self._operation
        return RecurrentState.initial(self._convolution, o.heads, o.head_size, o.state_size)

    def __call__(self, states: Tensor, memory: RecurrentState, context: Context) -> tuple[Tensor, RecurrentState]:
        """states [tokens, hidden size] -> output of the same shape, and what to remember after the last token."""
        o = self._operation
        tokens, channels = len(states), len(self._convolution)
        projected = self._weights.project(states, o.input)
        gate, inputs, step = torch.split(projected, [o.inner_size, channels, o.heads], dim=-1)
        mixed, convolved = convolve(inputs, memory.convolution, self._convolution, self._convolution_bias)
        x, b, c = torch.split(mixed, [o.inner_size, *2 * [o.groups * o.state_size]], dim=-1)
        x = x.reshape(tokens, o.heads, o.head_size)
        y, space = scan(
            x,
            functional.softplus(step + self._step_bias),
            self._decay,
            b.reshape(tokens, o.groups, o.state_size),
            c.reshape(tokens, o.groups, o.state_size),
            memory.space,
        )
        gated = (y + self._skip * x).flatten(1) * functional.silu(gate)
        normed = self._normalize(gated.view(tokens, o.groups, -1)).flatten(1)
        return self._weights.project(normed, o.output), RecurrentState(convolved, space)


def scan(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """The state-space recurrence S_t = exp(step_t * decay) S_(t-1) + step_t x_t (outer) b_t, y_t = S_t c_t.

    Tokens of a chunk act on each other through one lower-triangular matrix per head, chunks through S (Dao & Gu
    2024, section 6); there is no clamp on the step, and a chunk of one token is the recurrence itself.

    Args:
        x: [tokens, heads, head size].
        step: [tokens, heads], positive.
        decay: [heads], negative.
        b, c: [tokens, groups, state size]; consecutive heads share a group.
        space: S before the first token, [heads, head size, state size].

    Returns:
        y [tokens, heads, head size] and S after the last token.
    """
    shared = x.shape[1] // b.shape[1]
    outputs = []
    for start in range(0, len(x), Mamba2.CHUNK):
        part = slice(start, start + Mamba2.CHUNK)
        inputs = (x[part] * step[part, :, None]).transpose(0, 1)  # [heads, tokens, head size]
        keys, queries = (t[part].transpose(0, 1).repeat_interleave(shared, dim=0) for t in (b, c))
        # In float64, because differences of long sums follow.
        passed = (wide(step[part]) * wide(decay)).cumsum(0).T  # [heads, tokens]
        within = (queries @ keys.transpose(1, 2) * fading(passed, x)) @ inputs
        before = queries @ space.transpose(1, 2) * exponential(passed, x)[..., None]
        outputs.append((within + before).transpose(0, 1))
        remaining = exponential(passed[:, -1:] - passed, x)[..., None]
        space = exponential(passed[:, -1], x)[:, None, None] * space + (inputs * remaining).transpose(1, 2) @ keys
    return torch.cat(outputs), space
