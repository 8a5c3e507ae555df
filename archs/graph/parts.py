"""What operations are made of: norms, rotary embeddings, activations, scores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..weights import Weight

SIGMOID_GAIN = 1.702  # of SWIGLU_OAI


class Activation(Enum):
    """What lies between the projections of an expert or a multi-layer perceptron."""

    SWIGLU = "swiglu"  # silu(gate) * up; with a clamp c: silu(min(gate, c)) * min(max(up, -c), c)
    SWIGLU_OAI = "swiglu_oai"  # gate * sigmoid(1.702 gate) * (up + 1), clamped alike; llama.cpp's name of it
    GEGLU = "geglu"  # gelu(gate) * up, gelu by its approximation with tanh (Shazeer 2020)
    RELU_SQUARED = "relu_squared"  # max(up, 0)^2, there is no gate (So et al. 2021)


class Score(Enum):
    """What turns router logits into scores."""

    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"
    SQRT_SOFTPLUS = "sqrt_softplus"


@dataclass(frozen=True)
class Norm:
    """RMSNorm: `x / sqrt(mean(x^2) + epsilon) * weight`, in float32 (Zhang & Sennrich 2019).

    A weight of shape [groups, size] normalizes every group of `size` elements by itself. Where it is `centered`, the
    mean is removed first and `bias` added last: LayerNorm (Ba et al. 2016).
    """

    weight: Weight
    epsilon: float
    centered: bool = False
    bias: Weight | None = None


@dataclass(frozen=True)
class Yarn:
    """Slows by `factor` the rotations that turn less than `slow` times within `original_context` tokens.

    Those that turn more than `fast` times stay, the ones between are blended, from a whole pair to a whole pair where
    limits are `rounded`. What is rotated is multiplied by `magnitude` (Peng et al. 2023, whose choice is
    1 + 0.1 ln(factor)).
    """

    factor: float
    original_context: int
    fast: float
    slow: float
    magnitude: float = 1.0
    rounded: bool = True


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) on `size` dimensions of a head: the first ones, or the `last`.

    Of these, i is paired with i + size/2, or, `interleaved`, 2i with 2i + 1. With `sections` so many pairs turn by the
    place in time, height and width of an image (M-RoPE), which in a text are one position. Each pair turns by the
    position divided by its own one of the `divisors` [size / 2].
    """

    size: int
    base: float
    interleaved: bool = False
    last: bool = False
    yarn: Yarn | None = None
    sections: tuple[int, ...] = ()
    divisors: Weight | None = None
