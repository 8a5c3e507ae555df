"""GPTQ (error feedback): rounding in which each column compensates the rounding errors of earlier columns.

Rounding weights one by one to what is nearest ignores that inputs go together. Where they are known to, a weight takes
up a part of the errors of the weights before it (GPTQ: Frantar et al. 2022). The scales are chosen block by block for
what has been carried so far, by the same search as without feedback; then levels are chosen column by column, or for
formats of lattices eight columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    experts: Sequence[int | None],
    name: str,
    importance: Importance | None,
    threads: int | None = None,
) -> Tensor:
    """Quantize rows of matrices of a weight with all that is known of their inputs.

    rows: [matrices, rows, columns] -> uint8 [matrices, rows, row bytes]. Columns beyond the weight's are padding and
    have no inputs. experts: which matrices of the stack they are; [None] where there is no stack. Raises BadInput as
    `quantize` does.
    """
    if importance is None:
        return _without_feedback(rows, name, None, threads)
    if can_feed_back(name):
        moments = importance.moments(weight, experts)
        if moments is not None:
            return quantize_with_feedback(rows, name, moments.padded(rows.shape[-1]), threads)
        if len(experts) > 1:  # some of them may have what others lack
            each = zip(rows[:, None], experts, strict=True)
            return torch.cat([quantize_weight(part, weight, [one], name, importance, threads) for part, one in each])
    known = [mean for mean in (importance.of(weight, expert) for expert in experts) if mean is not None]
    means = functional.pad(torch.stack(known), (0, rows.shape[-1] - len(known[0]))) if known else None
    return _without_feedback(rows, name, means, threads)


def _without_feedback(rows: Tensor, name: str, means: Tensor | None, threads: int | None) -> Tensor:
    data: Tensor = blocks.quantize(rows.flatten(0, 1), name, means, threads)
    return data.view(*rows.shape[:2], data.shape[1])


def can_feed_back(name: str) -> bool:
    """Whether a format's levels can be chosen for given scales."""
    codec = blocks.CODECS.get(name)
    return codec is not None and codec.grid is not None


def quantize_with_feedback(x: Tensor, name: str, moments: SecondMoments, threads: int | None = None) -> Tensor:
    """Quantize rows so that the squared error of their outputs is small.

    x: [matrices, rows, columns] -> uint8 [matrices, rows, row bytes]. moments: of the inputs of all columns of each.
    Raises BadInput as `quantize` does, counting the rows of all matrices.
    """
    format = format_named(name)
    format.row_bytes(x.shape[-1])
    cholesky = moments.cholesky(format.block_size)
    values = x.to(torch.float32)
    errors = torch.empty_like(values, dtype=cholesky.carried.dtype)  # of the blocks so far
    added = errors.new_empty(*x.shape[:2], format.block_size)
    parts, bad = [], []
    for number, (triangles, weights) in enumerate(zip(cholesky.blocks, cholesky.weights, strict=True)):
        start = number * format.block_size
        here = slice(start, start + format.block_size)
        if start:
            torch.bmm(errors[..., :start], cholesky.carried[:, :start, here], out=added)
        block = values[..., here], added if start else None
        coupling = _coupling(triangles, weights, _grid(name).group)
        data, first_bad = _round(name, *block, coupling, errors[..., here], threads)
        parts.append(data)
        bad.append(first_bad)
    rows = [row for row in torch.stack(bad).tolist() if row >= 0]  # at the end, because asking stops a GPU
    if rows:
        raise blocks.not_finite(rows[0])
    return torch.cat(parts, dim=-1)


def _grid(name: str) -> Grid:
    grid = blocks.CODECS[name].grid
    assert grid
    return grid


def _round(
    name: str, values: Tensor, added: Tensor | None, coupling: Coupling, errors: Tensor, threads: int | None
) -> tuple[Tensor, Tensor]:
    """The bytes of blocks that cost little, ``sum(((values + added - stored) @ triangle)²)``; fills in `errors`.

    Scales come from the search without feedback. Then levels are chosen value by value, each making good what those
    before it cost (Babai 1986); and then changed where that helps, given all others.

    values, added, errors: [matrices, rows, block_size], the last being values less what is stored; coupling: made of
    the triangle. The second part of the result is as `Kernels.choose` gives it.
    """
    format, grid = format_named(name), _grid(name)
    if kernels := kernels_for("choose", format, values.device):
        return kernels.choose(format, values, added, coupling, errors, _SWEEPS, threads or torch.get_num_threads())
    wanted = values if added is None else values + added
    made = []
    for matrix, lanes in enumerate(wanted.mT):
        here = coupling.of(matrix)
        data = blocks.quantize(lanes.T, name, here.search_weights, threads).T
        levels, stored = _choose(grid, data, lanes, here)
        torch.sub(values[matrix], stored.T, out=errors[matrix])
        made.append(grid.with_levels(data, levels).T)
    return torch.stack(made), torch.tensor(-1, device=values.device)


def _coupling(triangles: Tensor, weights: Tensor | None, group: int) -> Coupling:
    """How the values of blocks go together, for levels that are chosen by groups; weights: for their search."""
    metric, squares = triangles @ triangles.mT, triangles.diagonal(dim1=-2, dim2=-1).square()
    groups = torch.arange(triangles.shape[-1], device=triangles.device) // group
    slopes = triangles @ (triangles * (groups == groups[:, None])).mT
    return Coupling(weights, divided(triangles, group).mT, slopes, metric, squares, metric.diagonal(dim1=-2, dim2=-1))


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
