"""What recurrent operations have in common: a causal convolution, a space, and how what was written to it fades."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class RecurrentState:
    """The last inputs of the convolution, [taps - 1, channels], and S, a matrix for each head."""

    convolution: Tensor
    space: Tensor

    @classmethod
    def initial(cls, taps: Tensor, *space: int) -> RecurrentState:
        """Before the first token; taps: [channels, taps], space: the shape of S."""
        channels, count = taps.shape
        before = torch.zeros(count - 1, channels, device=taps.device)
        return cls(before, torch.zeros(*space, device=taps.device))


def convolve(inputs: Tensor, before: Tensor, taps: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[tokens, channels] after those `before` -> the same shape through convolution and SiLU, and what to remember."""
    known = torch.cat((before, inputs))
    mixed = functional.conv1d(known.T, taps[:, None], bias, groups=len(taps))  # [channels, tokens]
    return functional.silu(mixed.T), known[len(inputs) :]


def fading(passed: Tensor, like: Tensor) -> Tensor:
    """What is left of each token's writing at each later one, [heads, tokens, tokens], and 0 at earlier ones.

    passed: logarithms of what is left of S after each token, [heads, tokens].
    """
    later = torch.ones(2 * passed.shape[1:], dtype=torch.bool, device=passed.device).tril()
    return exponential((passed[:, :, None] - passed[:, None, :]).masked_fill(~later, -torch.inf), like)


def exponential(powers: Tensor, like: Tensor) -> Tensor:
    """In float32, on the device of another tensor."""
    return powers.exp().float().to(like.device)
