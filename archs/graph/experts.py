"""Dense layers and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..weights import Weight
from .operation import Operation, Width
from .parts import Activation, Norm, Score


@dataclass(frozen=True)
class MLP(Operation):
    """`down(activation(gate x, up x))`: a dense layer, or the shared expert beside routed ones."""

    up: Weight
    down: Weight
    activation: Activation
    gate: Weight | None = None
    clamp: float | None = None

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.down,)

    @property
    def widths(self) -> tuple[Width, ...]:
        return (Width(self.up.shape[0], self.reads, self.writes),)

    def scratch_values(self, context: int) -> int:
        inner, outside = self.up.shape
        return context * (outside + 3 * inner)


@dataclass(frozen=True)
class Router:
    """Scores every expert, by logits `weight x + logit_bias`, adds `bias` for the choice only, and keeps `top_k`.

    With g = `groups` > 1 the experts form g equal groups, of which only the `groups_used` with the largest sum of
    two biased scores take part. To `normalize`, the scores are divided by their sum + `epsilon`; they are multiplied
    by `scale` and the expert's own `expert_scale` [experts]. Softmax over the chosen logits alone is softmax over all
    of them, normalized. With an `input_norm` the residual itself is read, through that and multiplied by `input_scale`.
    """

    weight: Weight
    bias: Weight | None
    score: Score
    top_k: int
    groups: int = 1
    groups_used: int = 1
    epsilon: float = 0.0
    scale: float = 1.0
    normalize: bool = True
    expert_scale: Weight | None = None
    input_norm: Norm | None = None
    input_scale: float = 1.0
    logit_bias: Weight | None = None


@dataclass(frozen=True)
class HashRouter:
    """Looks up a token's experts in `table` [vocabulary, top_k]; their shares come from scores as a `Router`'s do."""

    weight: Weight
    table: Weight
    score: Score
    epsilon: float
    scale: float

    @property
    def top_k(self) -> int:
        return self.table.columns


@dataclass(frozen=True)
class MoE(Operation):
    """Routed experts `down(activation(gate x, up x))`, weighted by the router and summed.

    Projections may have a bias for each expert, [experts, rows].
    With latent projections the experts live in a smaller space: `latent_up(sum of experts(latent_down x))`; the
    router and the shared expert, whose answer is added, see x itself. With a `shared_gate` [1, hidden size] that
    answer is multiplied by sigmoid(shared_gate . x). The sum of all is multiplied by `scale`.
    """

    router: Router | HashRouter
    up: Weight
    down: Weight
    activation: Activation
    gate: Weight | None = None
    latent_down: Weight | None = None
    latent_up: Weight | None = None
    shared: MLP | None = None
    shared_gate: Weight | None = None
    clamp: float | None = None
    gate_bias: Weight | None = None
    up_bias: Weight | None = None
    down_bias: Weight | None = None
    scale: float = 1.0

    TOKENS: ClassVar[int] = 1024  # that an expert takes at a time

    @property
    def experts(self) -> int:
        return self.up.shape[0]

    @property
    def expert_size(self) -> int:
        """Width of one expert's hidden layer."""
        return self.up.shape[1]

    @property
    def reads(self) -> tuple[Weight, ...]:
        routed = (self.latent_down,) if self.latent_down else self._inputs
        gate = (self.shared_gate,) if self.shared_gate else ()
        return (self.router.weight, *routed, *(self.shared.reads if self.shared else ()), *gate)

    @property
    def residual_norms(self) -> tuple[Norm, ...]:
        norm = self.router.input_norm if isinstance(self.router, Router) else None
        return (norm,) if norm else ()

    @property
    def writes(self) -> tuple[Weight, ...]:
        routed = (self.latent_up,) if self.latent_up else self._outputs
        return (*routed, *(self.shared.writes if self.shared else ()))

    @property
    def widths(self) -> tuple[Width, ...]:
        biases = tuple(bias for bias in (self.gate_bias, self.up_bias) if bias)
        inner = Width(self.expert_size, (*self._inputs, *biases), (self.down,))
        widths = (inner, *(self.shared.widths if self.shared else ()))
        if self.latent_down and self.latent_up:
            latent = Width(self.latent_up.columns, (self.latent_down, *self._outputs), (self.latent_up, *self._inputs))
            return (latent, *widths)
        return widths

    @property
    def stacks_by_input(self) -> tuple[tuple[Weight, ...], ...]:
        return self._inputs, (self.down,)

    @property
    def experts_per_token(self) -> int:
        return self.router.top_k

    def active_share(self, weight: Weight) -> float:
        return self.router.top_k / self.experts if weight in self.stacks else 1.0

    def scratch_values(self, context: int) -> int:
        """Tokens of one expert, and those of a chunk in the shared one."""
        routed = self.TOKENS * (3 * self.up.columns + 4 * self.expert_size)
        return routed + (self.shared.scratch_values(context) if self.shared else 0)

    @property
    def _inputs(self) -> tuple[Weight, ...]:
        """What multiplies an expert's input."""
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def _outputs(self) -> tuple[Weight, ...]:
        """What gives an expert's output."""
        return (self.down, self.down_bias) if self.down_bias else (self.down,)
