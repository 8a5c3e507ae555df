"""Second moments of inputs (GPTQ's Hessian), per weight and expert, and their Cholesky factor."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.weights import Role, Weight
from .statistics import PRIOR, Statistics

LEAST_SQUARE: Final = 1e-3  # of the mean: no channel is worthless, however rarely the calibration text stirred it
_STRIP: Final = 512  # columns
_LEAST_SHRINKAGE: Final = 0.01  # keeps the factorization sound in float32


class Cholesky(NamedTuple):
    """The squared error of outputs, taken apart by blocks of columns.

    With c = e @ carried from the errors e [columns] of a row in blocks before one, that block adds
    ``sum(((e + c) @ T)²)`` to what they cost, T being its part of the diagonal of `triangle`.
    """

    triangle: Tensor  # [columns, columns], upper
    carried: Tensor  # [columns, columns]; only what is above the blocks counts


class SecondMoments:
    """Mean products of the inputs of a matrix, and from how many tokens they are.

    `means` are float32 [columns, columns], of which the upper triangle counts.
    """

    def __init__(self, means: Tensor, tokens: float) -> None:
        self.means = means
        self.tokens = tokens
        self._padded: dict[int, SecondMoments] = {}
        self._triangle: Tensor | None = None
        self._factors: dict[int, Cholesky] = {}

    def padded(self, columns: int) -> SecondMoments:
        """The same with columns that have no inputs, so that there are so many."""
        missing = columns - len(self.means)
        if missing and columns not in self._padded:
            self._padded[columns] = SecondMoments(functional.pad(self.means, (0, missing, 0, missing)), self.tokens)
        return self._padded[columns] if missing else self

    def cholesky(self, size: int) -> Cholesky:
        """For blocks of so many columns."""
        if size not in self._factors:
            if self._triangle is None:
                self._triangle = self._factorized()
            self._factors[size] = Cholesky(self._triangle, divided(self._triangle, size))
        return self._factors[size]

    def _factorized(self) -> Tensor:
        """An upper triangle T with T @ T.T in proportion to the moments.

        Means of products of inputs are noisy where tokens are few: but for squares they are divided by
        1 + columns / tokens. With half as many tokens as columns, rounding then still gains on other text.

        Errors cost ``sum((e @ T)²)`` (LDLQ of Chee et al. 2023, which is equal to GPTQ of Frantar et al. 2022, but
        needs no inverse).
        """
        squares = self.means.diagonal()
        mean = float(squares.mean()) or 1.0  # only proportions count
        roots = (squares / mean).clamp(min=LEAST_SQUARE).sqrt()
        shrinkage = max(len(squares) / max(self.tokens, 1), _LEAST_SHRINKAGE)
        correlations = (self.means / (roots[:, None] * (mean * (1 + shrinkage)))).div_(roots)
        correlations.diagonal().fill_(1)
        backwards = correlations.flip(0, 1)  # whose lower triangle is read
        torch.linalg.cholesky(backwards, out=backwards)
        return backwards.flip(0, 1).mul_(roots[:, None])


def divided(triangle: Tensor, size: int) -> Tensor:
    """Each `size` columns of an upper triangle divided by their block of the diagonal, from the right."""
    columns = triangle.unflatten(1, (-1, size)).movedim(1, 0)  # [blocks, columns, size]
    blocks = columns.unflatten(1, (-1, size)).diagonal(dim1=0, dim2=1).movedim(-1, 0)  # [blocks, size, size]
    quotients: Tensor = torch.linalg.solve_triangular(blocks, columns, upper=True, left=False)
    return quotients.movedim(0, 1).flatten(1)


class _Sum:
    """WeightProducts of inputs added up, and what was made of them."""

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.tokens = 0
        self.made: SecondMoments | None = None

    def add(self, products: Tensor, tokens: int) -> None:
        self.products = products.clone() if self.products is None else self.products.add_(products)
        self.tokens += tokens
        self.made = None


def _products(states: Tensor) -> Tensor:
    """Sums over tokens of products of two columns: [columns, columns], the upper triangle and some of the rest."""
    columns = states.shape[1]
    products = torch.zeros(columns, columns)
    for start in range(0, columns, _STRIP):
        torch.mm(states[:, start : start + _STRIP].T, states[:, start:], out=products[start : start + _STRIP, start:])
    return products


class SecondMomentStatistics(Statistics):
    """Statistics that know the mean products of inputs too, until an expert or the layer is done.

    Weights that read the same states one after another (gate and up; queries, keys and values) share theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own: dict[tuple[str, int | None], _Sum] = {}
        self._shared: dict[str, _Sum] = {}  # by all experts of weights that read the layer's states
        self._last: tuple[Tensor, tuple[str, int | None]] | None = None

    def add(self, weight: Weight, expert: int | None, states: Tensor) -> None:
        super().add(weight, expert, states)
        if weight.role.keep_f32:
            return
        key, last = (weight.name, expert), self._last
        if last and states is last[0]:
            self._own[key] = self._own[last[1]]
            if last[1][0] in self._shared:
                self._shared[weight.name] = self._shared[last[1][0]]
            return
        products = _products(states)
        self._own.setdefault(key, _Sum()).add(products, len(states))
        if weight.experts is not None and weight.role is not Role.EXPERT_DOWN:
            self._shared.setdefault(weight.name, _Sum()).add(products, len(states))
        self._last = states, key

    def moments(self, weight: Weight, expert: int | None) -> SecondMoments | None:
        """The mean products of the inputs of one matrix; None where nothing has passed.

        What all experts have read so far counts for as many tokens as there are columns beside what the expert has.
        Inner neurons of two experts have nothing in common: those of down projections borrow their size alone.
        """
        shared = self._shared.get(weight.name)
        own = self._own.get((weight.name, expert)) or shared
        if own is None:
            return None
        if own.made is None:
            own.made = self._made(weight, own, shared)
        return own.made.padded(weight.columns)

    def _made(self, weight: Weight, own: _Sum, shared: _Sum | None) -> SecondMoments:
        assert own.products is not None
        if own is shared or weight.experts is None:
            return SecondMoments(own.products / own.tokens, own.tokens)
        if shared:
            assert shared.products is not None
            prior = min(len(own.products), shared.tokens)
            products = torch.add(own.products, shared.products, alpha=prior / shared.tokens)
        else:
            prior, products = PRIOR, own.products.clone()
            products.diagonal().add_(PRIOR * self.pooled(weight).mean())
        return SecondMoments(products.div_(own.tokens + prior), own.tokens + prior)

    def release(self, expert: int | None = None) -> None:
        self._last = None
        if expert is not None:
            self._own = {key: own for key, own in self._own.items() if key[1] != expert}
        for own in (*self._own.values(), *self._shared.values()):
            own.made = None

    def clear(self) -> None:
        super().clear()
        self._own.clear()
        self._shared.clear()
        self._last = None


def statistics_for(error_feedback: bool) -> Statistics:
    """What rounding has to know of inputs: without error feedback their squares are enough."""
    return SecondMomentStatistics() if error_feedback else Statistics()
