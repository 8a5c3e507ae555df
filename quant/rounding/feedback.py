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
from ..formats.lanes import Grid, reciprocal
from ..formats.table import Format, format_named
from .moments import SecondMoments, divided
from .statistics import Importance

_SWEEPS: Final = 2  # through the values of a block, after they have been chosen one after another


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
    format, grid = format_named(name), blocks.CODECS[name].grid
    assert grid
    format.row_bytes(x.shape[1])
    cholesky = moments.cholesky(format.block_size)
    values = x.T.to(torch.float32).contiguous()
    errors = torch.zeros_like(values, dtype=cholesky.carried.dtype)  # of the blocks so far
    parts = []
    for start in range(0, len(values), format.block_size):
        here = slice(start, start + format.block_size)
        wanted_values = values[here] + (cholesky.carried[:start, here].T @ errors[:start]).float()
        triangle = cholesky.triangle[here, here]
        data = blocks.quantize(wanted_values.T, name, triangle.diagonal().square(), threads).T
        levels, stored = _choose(grid, format, data, wanted_values, triangle, threads)
        errors[here] = values[here] - stored
        parts.append(grid.with_levels(data, levels).T)
    return torch.cat(parts, dim=1)


def _choose(
    grid: Grid, format: Format, data: Tensor, wanted_values: Tensor, triangle: Tensor, threads: int | None
) -> tuple[Tensor, Tensor]:
    """The levels of blocks whose scales are chosen, and what they stand for, [block_size, lanes] both.

    Minimizes ``sum((triangle.T @ (stored - wanted_values))²)``: first value by value, each making good what those
    before it cost (Babai 1986), then by going through the values again, changing what helps.

    data: uint8 [block_bytes, lanes]; wanted_values: [block_size, lanes]; triangle: [block_size, block_size], upper.
    """
    scales, metric = grid.scales(data), triangle @ triangle.T
    carried, weights = divided(triangle, grid.group), (triangle.diagonal().square(), metric.diagonal())
    if kernels := kernels_for("choose", format, wanted_values.device):
        threads = threads or torch.get_num_threads()
        return kernels.choose(format, wanted_values, scales, carried.T, metric, weights, _SWEEPS, threads)
    scale, minimum = (part.repeat_interleave(len(wanted_values) // len(part), dim=0) for part in scales)
    inverse, levels, stored = reciprocal(scale), torch.empty_like(wanted_values), torch.empty_like(wanted_values)
    groups = [slice(start, start + grid.group) for start in range(0, len(wanted_values), grid.group)]

    def nearest(here: slice, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        chosen = grid.nearest((wanted + minimum[here]) * inverse[here], weights[here])
        return chosen, scale[here] * chosen - minimum[here]

    wanted = wanted_values.clone()
    for here in groups:
        levels[here], stored[here] = nearest(here, wanted[here], weights[0])
        after = slice(here.stop, None)
        wanted[after] += carried[here, after].T @ (wanted_values[here] - stored[here])
    slope = metric @ (stored - wanted_values)
    for here in groups * _SWEEPS:
        chosen, changed = nearest(here, stored[here] - slope[here] / weights[1][here, None], weights[1])
        change = changed - stored[here]
        better = (change * (2 * slope[here] + metric[here, here] @ change)).sum(0) < 0
        change = torch.where(better, change, 0.0)
        levels[here] = torch.where(better, chosen, levels[here])
        stored[here] += change
        slope += metric[:, here] @ change
    return levels, stored
