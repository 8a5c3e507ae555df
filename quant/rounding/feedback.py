"""GPTQ (error feedback): rounding in which each column compensates the rounding errors of earlier columns.

Rounding weights one by one to what is nearest ignores that inputs go together. Where they are known to, a weight takes
up a part of the errors of the weights before it (GPTQ: Frantar et al. 2022). The scales are chosen block by block for
what has been carried so far, by the same search as without feedback; then levels are chosen column by column, or for
formats of lattices eight columns at a time.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ...archs.weights import Weight
from ..formats import quantize as blocks
from ..formats.devices import kernels_for
from ..formats.lanes import Coupling, Grid, reciprocal
from ..formats.table import format_named
from .moments import SecondMoments, divided
from .statistics import Importance

_SWEEPS: Final = 2  # through the values of a block, after they have been chosen in turn; kernels know two at most


def quantize_weight(
    rows: Tensor,
    weight: Weight,
    expert: int | None,
    name: str,
    importance: Importance | None,
    threads: int | None = None,
) -> Tensor:
    """Quantize rows of a weight with all that is known of its inputs: [rows, columns] -> uint8 [rows, row bytes].

    Columns beyond the weight's are padding and have no inputs. Raises BadInput as `quantize` does.
    """
    moments = importance.moments(weight, expert) if importance and can_feed_back(name) else None
    if moments is not None:
        return quantize_with_feedback(rows, name, moments.padded(rows.shape[1]), threads)
    means = importance.of(weight, expert) if importance else None
    if means is not None:
        means = functional.pad(means, (0, rows.shape[1] - len(means)))
    return blocks.quantize(rows, name, means, threads)


def can_feed_back(name: str) -> bool:
    """Whether a format's levels can be chosen for given scales."""
    codec = blocks.CODECS.get(name)
    return codec is not None and codec.grid is not None


def quantize_with_feedback(x: Tensor, name: str, moments: SecondMoments, threads: int | None = None) -> Tensor:
    """Quantize rows so that the squared error of their outputs is small: x [rows, columns] -> uint8 [rows, row bytes].

    moments: of the inputs of all columns. Raises BadInput as `quantize` does.
    """
    format = format_named(name)
    format.row_bytes(x.shape[1])
    cholesky = moments.cholesky(format.block_size)
    values = x.to(torch.float32)
    errors = torch.empty_like(values, dtype=cholesky.carried.dtype)  # of the blocks so far
    added = errors.new_empty(len(x), format.block_size)
    parts = []
    for number, triangle in enumerate(cholesky.blocks):
        start = number * format.block_size
        here = slice(start, start + format.block_size)
        if start:
            torch.mm(errors[:, :start], cholesky.carried[:start, here], out=added)
        parts.append(_round(name, values[:, here], added if start else None, triangle, errors[:, here], threads))
    return torch.cat(parts, dim=1)


def _round(
    name: str, values: Tensor, added: Tensor | None, triangle: Tensor, errors: Tensor, threads: int | None
) -> Tensor:
    """The bytes of blocks that cost little, ``sum(((values + added - stored) @ triangle)²)``; fills in `errors`.

    Scales come from the search without feedback. Then levels are chosen value by value, each making good what those
    before it cost (Babai 1986); and then changed where that helps, given all others.

    values, added, errors: [rows, block_size], the last being values less what is stored; triangle: [block_size,
    block_size], upper.
    """
    format, grid = format_named(name), blocks.CODECS[name].grid
    assert grid
    coupling = _coupling(triangle, grid.group)
    if kernels := kernels_for("choose", format, values.device):
        threads = threads or torch.get_num_threads()
        data, bad = kernels.choose(format, values, added, coupling, errors, _SWEEPS, threads)
        if bad is not None:
            raise blocks.not_finite(bad)
        return data
    wanted = values if added is None else values + added
    lanes = blocks.quantize(wanted, name, coupling.first_weights, threads).T
    levels, stored = _choose(grid, lanes, wanted.T, coupling)
    torch.sub(values, stored.T, out=errors)
    return grid.with_levels(lanes, levels).T


def _coupling(triangle: Tensor, group: int) -> Coupling:
    """How the values of a block go together, for levels that are chosen by groups."""
    metric, squares = triangle @ triangle.T, triangle.diagonal().square()
    groups = torch.arange(len(triangle), device=triangle.device) // group
    slopes = triangle @ (triangle * (groups == groups[:, None])).T
    weights = blocks.relative_weights(squares.double())
    return Coupling(weights, divided(triangle, group).T, slopes, metric, squares, metric.diagonal())


def _choose(grid: Grid, data: Tensor, wanted_values: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    """The levels of blocks whose scales are chosen, and what they stand for, [block_size, lanes] both.

    data: uint8 [block_bytes, lanes]; wanted_values: [block_size, lanes].
    """
    scale, minimum = (part.repeat_interleave(len(wanted_values) // len(part), dim=0) for part in grid.scales(data))
    inverse, levels, stored = reciprocal(scale), torch.empty_like(wanted_values), torch.empty_like(wanted_values)
    groups = [slice(start, start + grid.group) for start in range(0, len(wanted_values), grid.group)]
    metric, weights = coupling.metric, coupling.weights

    def nearest(here: slice, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        chosen = grid.nearest((wanted + minimum[here]) * inverse[here], weights[here])
        return chosen, scale[here] * chosen - minimum[here]

    wanted = wanted_values.clone()
    for here in groups:
        levels[here], stored[here] = nearest(here, wanted[here], coupling.first_weights)
        after = slice(here.stop, None)
        wanted[after] += coupling.carried[after, here] @ (wanted_values[here] - stored[here])
    slope = coupling.slopes @ (stored - wanted)
    for here in groups * _SWEEPS:
        chosen, changed = nearest(here, stored[here] - slope[here] / weights[here, None], weights)
        change = changed - stored[here]
        better = (change * (2 * slope[here] + metric[here, here] @ change)).sum(0) < 0
        change = torch.where(better, change, 0.0)
        levels[here] = torch.where(better, chosen, levels[here])
        stored[here] += change
        slope += metric[:, here] @ change
    return levels, stored
