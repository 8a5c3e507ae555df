"""State spaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..weights import Weight
from .operation import PASSING, Operation
from .parts import Norm


@dataclass(frozen=True)
class Mamba2(Operation):
    """A selective state space in its Mamba-2 form (Dao & Gu 2024), with inner size = heads * head size.

    `input` gives, in this order: gate [inner], x [inner], B and C [groups * state size] each, step [heads]. A causal
    depthwise convolution (taps oldest first) and SiLU act on x, B and C. With D_t = softplus(step + step_bias), each
    head keeps S_t = exp(D_t * decay) * S_(t-1) + D_t * x_t (outer) B_t and gives y_t = S_t C_t + skip * x_t. The gate
    comes before the norm: output(norm(y * silu(gate))).
    """

    heads: int
    head_size: int
    groups: int
    state_size: int
    input: Weight
    convolution: Weight
    convolution_bias: Weight
    step_bias: Weight
    decay: Weight
    skip: Weight
    norm: Norm
    output: Weight

    CHUNK: ClassVar[int] = 128  # tokens whose mutual influence is one matrix per head

    @property
    def inner_size(self) -> int:
        return self.heads * self.head_size

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (self.input,)

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.output,)

    @property
    def heads_per_group(self) -> int:
        """Files say that such a layer has no heads."""
        return 0

    @property
    def fixed_state_bytes(self) -> int:
        """The space and the last inputs of the convolution, in float32."""
        channels, taps = self.convolution.shape
        return 4 * (self.inner_size * self.state_size + (taps - 1) * channels)

    def scratch_values(self, context: int) -> int:
        size, state = self.head_size, self.state_size
        return PASSING * self.heads * (2 * self.CHUNK**2 + size * state + context * (2 * size + state))
