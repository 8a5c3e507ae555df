"""Statistics of weights' inputs: mean squares of columns, and with error feedback second moments, per expert."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.weights import Weight
from .moments import SecondMoments, products_of

PRIOR: Final = 16  # tokens that the average over all experts counts for beside an expert's own
_WAITING: Final = 256  # sums of squares that are fetched together from a GPU, which does not stop for each


class Importance(Protocol):
    """What quantizers weigh columns by."""

    def of(self, weight: Weight, expert: int | None) -> Tensor | None:
        """The mean square of each input of one matrix, [columns]; None where nothing is known."""

    def moments(self, weight: Weight, experts: Sequence[int | None]) -> SecondMoments | None:
        """How the inputs of these matrices go together; None where that is not known of each of them."""


class Statistics:
    """Sums of squares of the inputs of weights, and how many inputs there were.

    `sums` are float64 [matrices, columns] by weight name, `counts` int64 [matrices], on the CPU wherever inputs lie.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._waiting: list[tuple[str, int, Tensor]] = []  # what is to be added, still where inputs lie
        self.counts: dict[str, Tensor] = {}
        self._layer: dict[str, tuple[Tensor, int]] = {}  # sums of squares that all experts' tokens make, and how many
        self._expert_stacks: list[str] = []

    @classmethod
    def of_tensors(cls, tensors: Iterator[Tensor]) -> Statistics:
        """What `tensors` gave: enough for an importance matrix."""
        statistics = cls()
        names, statistics._expert_stacks = (bytes(next(tensors).tolist()).decode().split("\n") for _ in range(2))
        for name in names:
            statistics._sums[name], statistics.counts[name] = next(tensors), next(tensors)
        return statistics

    @property
    def sums(self) -> dict[str, Tensor]:
        self._add_waiting()
        return self._sums

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        found = torch.cat([squares for *_, squares in self._waiting]).cpu().double()
        parts = found.split([len(squares) for *_, squares in self._waiting])
        for (name, matrix, _), squares in zip(self._waiting, parts, strict=True):
            self._sums[name][matrix] += squares
        self._waiting.clear()

    def tensors(self) -> Iterator[Tensor]:
        """Sums and counts as tensors, the names (UTF-8) of all weights and of stacks of experts first."""
        for names in (self.sums, self._expert_stacks):
            yield torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8, device="cpu")
        for name, sums in self.sums.items():
            yield sums
            yield self.counts[name]

    def add_layer(self, weights: Sequence[Weight], states: Tensor) -> None:
        """Count in what all experts of a layer read, [tokens, columns], before any of them runs.

        weights: the stacks that read it; which expert reads which token does not matter here.
        """
        squares = _squares(states).cpu().double()
        for weight in weights:
            before, tokens = self._layer.get(weight.name, (torch.zeros_like(squares), 0))
            self._layer[weight.name] = before + squares, tokens + len(states)

    def add(self, weight: Weight, expert: int | None, states: Tensor) -> None:
        """Count in what a matrix is multiplied with, [inputs, columns]."""
        name, columns = weight.name, states.shape[1]
        if name not in self._sums:
            self._sums[name] = torch.zeros(weight.matrices, columns, dtype=torch.float64, device="cpu")
            self.counts[name] = torch.zeros(weight.matrices, dtype=torch.int64, device="cpu")
            if weight.experts is not None:
                self._expert_stacks.append(name)
        self._waiting.append((name, expert or 0, _squares(states)))
        if states.device.type == "cpu" or len(self._waiting) >= _WAITING:  # in memory they would lie between large ones
            self._add_waiting()
        self.counts[name][expert or 0] += len(states)

    def of(self, weight: Weight, expert: int | None) -> Tensor | None:
        """The mean square of each input of one matrix, float64 [columns]; None where nothing has passed.

        An expert's own mean is drawn towards a prior, the more so the less it has seen: (n own + k prior) / (n + k).
        The prior of gate and up projections is the mean over all tokens of the layer. Inner neurons of two experts have
        nothing in common: that of down projections is one value for all columns, the expert's own mean. So no expert's
        figures depend on which others came before. Columns that pad a weight have no inputs: 0.
        """
        matrix, known = expert or 0, weight.name in self._sums
        if weight.experts is not None and (known or self._layer):
            mean = self._mean_of_expert(weight, matrix)
        elif known:
            mean = self.sums[weight.name][matrix] / self.counts[weight.name][matrix]
        else:
            return None
        return functional.pad(mean, (0, weight.columns - len(mean)))

    def _mean_of_expert(self, weight: Weight, expert: int) -> Tensor:
        sums = self.sums.get(weight.name)
        alike = torch.ones(weight.columns, dtype=torch.float64, device="cpu")
        squares, tokens = self._layer.get(weight.name, (alike, 1))
        prior = squares / tokens
        if sums is None:  # no expert has been reached so far
            return prior
        own, count = sums[expert], int(self.counts[weight.name][expert])
        if weight.name not in self._layer and count:
            prior = own.mean() / count
        return (own + PRIOR * prior) / (count + PRIOR)

    def moments(self, weight: Weight, experts: Sequence[int | None]) -> SecondMoments | None:
        return None

    def release(self, expert: int | None = None) -> None:
        """Nobody will ask again for what was made of one expert's inputs, or of all."""

    @property
    def expert_tokens(self) -> Tensor | None:
        """How many tokens each expert has seen, int64 [experts]; None where there are no experts."""
        return next((self.counts[name] for name in self._expert_stacks if name in self.counts), None)

    def clear(self) -> None:
        self._sums.clear()
        self._waiting.clear()
        self.counts.clear()
        self._layer.clear()
        self._expert_stacks.clear()


def _squares(states: Tensor) -> Tensor:
    """Sums over inputs [inputs, columns] of their squares, [columns]."""
    return states.square().sum(dim=0)


class _Sum:
    """Products of inputs added up."""

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.tokens = 0

    def add(self, products: Tensor, tokens: int) -> None:
        self.products = products if self.products is None else self.products.add_(products)
        self.tokens += tokens


def _products(sum: _Sum) -> Tensor:
    assert sum.products is not None
    return sum.products


class SecondMomentStatistics(Statistics):
    """Statistics that know the mean products of inputs too, until an expert or the layer is done.

    Weights that read the same states one after another (gate and up; queries, keys and values) share theirs.

    dtype: of the products that carry rounding errors, see `SecondMoments`.
    rounded: names of weights that are rounded already, of whose inputs squares are enough.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, rounded: Collection[str] = ()) -> None:
        super().__init__()
        self._dtype = dtype
        self._rounded = rounded
        self._own: dict[tuple[str, int | None], _Sum] = {}
        self._shared: dict[str, _Sum] = {}  # of all tokens of the layer, by weights that read its states
        self._made: dict[tuple[_Sum, ...], SecondMoments] = {}
        self._last: tuple[Tensor, tuple[str, int | None]] | None = None

    def add_layer(self, weights: Sequence[Weight], states: Tensor) -> None:
        super().add_layer(weights, states)
        if all(weight.name in self._rounded for weight in weights):
            return
        shared = self._shared.setdefault(weights[0].name, _Sum())
        shared.add(products_of(states), len(states))
        self._shared.update({weight.name: shared for weight in weights})

    def add(self, weight: Weight, expert: int | None, states: Tensor) -> None:
        super().add(weight, expert, states)
        if weight.role.keep_f32 or weight.name in self._rounded:
            return
        key, last = (weight.name, expert), self._last
        if last and states is last[0]:
            self._own[key] = self._own[last[1]]
            return
        self._own.setdefault(key, _Sum()).add(products_of(states), len(states))
        self._last = states, key
        self._made = {}

    def moments(self, weight: Weight, experts: Sequence[int | None]) -> SecondMoments | None:
        """The mean products of the inputs of these matrices; None where nothing has passed one of them.

        What all tokens of the layer are like counts for as many tokens as there are columns beside what the expert has
        read. Inner neurons of two experts have nothing in common: down projections borrow nothing, but each input's
        square is drawn towards the mean of all.
        """
        shared = self._shared.get(weight.name)
        found = (self._own.get((weight.name, expert)) or shared for expert in experts)
        sums = tuple(own for own in found if own)
        if len(sums) < len(experts):
            return None
        if sums not in self._made:
            borrows = weight.experts is not None
            means = torch.stack([_products(own) for own in sums])
            tokens = [self._average(mean, own, shared, borrows) for mean, own in zip(means, sums, strict=True)]
            self._made[sums] = SecondMoments(means, tokens, self._dtype)
        return self._made[sums].padded(weight.columns)

    def _average(self, products: Tensor, own: _Sum, shared: _Sum | None, borrows: bool) -> int:
        """Turn products of one matrix, its own, into means; how many tokens stand behind them."""
        prior = 0
        if borrows and own is not shared:
            prior = min(len(products), shared.tokens) if shared else PRIOR
            if shared:
                products.add_(_products(shared), alpha=prior / shared.tokens)
            else:
                products.diagonal().add_(PRIOR * products.diagonal().mean() / own.tokens)
        products.div_(own.tokens + prior)
        return own.tokens + prior

    def release(self, expert: int | None = None) -> None:
        self._last, self._made = None, {}
        if expert is not None:
            self._own = {key: own for key, own in self._own.items() if key[1] != expert}

    def clear(self) -> None:
        super().clear()
        self._own.clear()
        self._shared.clear()
        self._made.clear()
        self._last = None


def statistics_for(error_feedback: bool, dtype: torch.dtype, rounded: Collection[str] = ()) -> Statistics:
    """What rounding has to know of inputs, computing in `dtype`: without error feedback their squares are enough."""
    return SecondMomentStatistics(dtype, rounded) if error_feedback else Statistics()
