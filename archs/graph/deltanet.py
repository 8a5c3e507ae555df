"""Linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..weights import Weight
from .operation import PASSING, Operation
from .parts import Norm


@dataclass(frozen=True)
class GatedDeltaNet(Operation):
    """Linear attention whose state forgets, and is corrected by what it missed (Yang et al. 2025).

    `input` gives, in this order: query and key [key heads * key size] each, value [heads * value size]. A causal
    depthwise convolution (taps oldest first) and SiLU act on all three. Queries and keys are then divided, head by
    head, by sqrt(sum of squares + `key_epsilon`), queries also by sqrt(key size). With b_t = sigmoid(beta x) and
    a_t = exp(decay * softplus(alpha x + step_bias)) each head keeps S_t = a_t S_(t-1) + k_t (outer) d_t, where
    d_t = b_t (v_t - (a_t S_(t-1))^T k_t), and gives y_t = S_t^T q_t. The norm of each head comes before the gate:
    output(norm(y) * silu(gate x)).

    Of `heads` / `key_heads` = r heads to a key head, head j has number j // r, or j mod `key_heads` where they are
    `tiled`. Without `alpha`, `beta` gives both: for each key head the b's of its r heads, then their alphas.
    """

    key_heads: int
    heads: int
    key_size: int
    value_size: int
    input: Weight
    gate: Weight
    beta: Weight
    alpha: Weight | None
    convolution: Weight
    step_bias: Weight
    decay: Weight
    norm: Norm
    output: Weight
    tiled: bool = False
    key_epsilon: float = 1e-6

    CHUNK: ClassVar[int] = 64  # tokens whose mutual influence is one matrix per head

    @property
    def parts(self) -> tuple[int, int, int]:
        """Widths of query, key and value."""
        keys = self.key_heads * self.key_size
        return keys, keys, self.heads * self.value_size

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (self.input, self.gate, self.beta, *((self.alpha,) if self.alpha else ()))

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.output,)

    @property
    def fixed_state_bytes(self) -> int:
        """S and the last inputs of the convolution, in float32."""
        channels, taps = self.convolution.shape
        return 4 * (self.heads * self.key_size * self.value_size + (taps - 1) * channels)

    def scratch_values(self, context: int) -> int:
        key, value = self.key_size, self.value_size
        return PASSING * self.heads * (2 * self.CHUNK**2 + key * value + context * (2 * key + 2 * value))
