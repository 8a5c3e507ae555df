"""Weights of a single block, made from the parameters of somebody else's module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moecast.archs.expressions import Zeros
from moecast.archs.graph import MLP, Activation, Norm
from moecast.archs.weights import Role, Weight
from moecast.runner.blocks.context import Context
from moecast.runner.weights import WeightProducts
from torch import Tensor, nn


class BlockWeights(WeightProducts):
    """What a block asks its weights for, answered from a dictionary; there is no graph around the block."""

    def __init__(self) -> None:
        super().__init__(graph=None, label="one block")  # type: ignore[arg-type]
        self._numbers: dict[str, Tensor] = {}

    def add(self, numbers: Tensor, role: Role | None = None) -> Weight:
        """A promise of these numbers; a role that fits their dimensions does where it does not matter."""
        role = role or (Role.EXPERT_UP if numbers.dim() == 3 else Role.DENSE_UP)
        name, shape = f"blk.0.{len(self._numbers)}", tuple(numbers.shape)
        self._numbers[name] = numbers.detach()
        return Weight(name, role, shape, Zeros(shape))

    def norm(self, module: Any) -> Norm:
        """A norm of transformers, which has its epsilon under this name."""
        return Norm(self.add(module.weight, Role.NORM), module.variance_epsilon)

    def mlp(self, module: Any, activation: Activation, clamp: float | None = None) -> MLP:
        """A dense layer, with a gate where the module has one."""
        gate = self.add(module.gate_proj.weight) if hasattr(module, "gate_proj") else None
        return MLP(self.add(module.up_proj.weight), self.add(module.down_proj.weight), activation, gate, clamp)

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        numbers = self._numbers[weight.name]
        numbers = numbers if expert is None else numbers[expert]
        return numbers if rows is None else numbers[slice(*rows)]

    def release(self, expert: int | None = None) -> None: ...


def states(tokens: int, size: int, seed: int = 0) -> Tensor:
    """Normed hidden states, [tokens, size]."""
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))


def in_pieces(mixer: Callable[..., tuple[Tensor, Any]], inputs: Tensor, sizes: list[int]) -> Tensor:
    """The output of a mixer that is given these numbers of tokens one after another."""
    memory, outputs = mixer.initial_state(), []  # type: ignore[attr-defined]
    for positions in torch.arange(len(inputs)).split(sizes):
        output, memory = mixer(inputs[positions], memory, context_of(positions))
        outputs.append(output)
    return torch.cat(outputs)


def context_of(positions: Tensor) -> Context:
    """Of tokens that stand there, for a mixer that does not ask which tokens they are."""
    return Context(torch.zeros_like(positions), positions)


def causal_mask(tokens: int, window: int | None = None) -> Tensor:
    """What transformers adds to the scores, [1, 1, tokens, tokens]: 0 for the last `window` tokens, else -inf."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        visible &= ~visible.tril(-window)
    return torch.zeros(1, 1, tokens, tokens).masked_fill(~visible, -torch.inf)


def modules_of(model: nn.Module, kind: str) -> list[Any]:
    """The modules of a class of that name, in order."""
    return [module for module in model.modules() if type(module).__name__ == kind]
