"""Heat maps: rows and columns of cells in a few shades, as little text as a page of many layers and experts can be.

matplotlib would write a path of 130 bytes for each cell, or a picture without values. Here cells of one shade share a
path, and what a pointer or a screen reader gets of it is its title.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeVar

from .report import ExpertTraffic, ReportedTensor
from .text import ranges

_SHADES = 8
_SHARES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of what every expert would see if all saw the same
_STANDS_OUT = "zero"  # the shade of what is exact, or was never seen
_MOST_TICKS = 9
_EVEN = 1.01  # values that differ by less are one

_Value = TypeVar("_Value")
Cell = tuple[str, str]  # its shade, and its value in words


@dataclass(frozen=True)
class Area:
    """Cells of a row in one shade: an SVG path between 0 and 1, and what they say."""

    shade: str
    path: str
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a heat map; `title` is what all of it says where its areas say nothing."""

    label: str
    areas: tuple[Area, ...]
    title: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells above an axis.

    Attributes:
        columns: how many there are; `ticks` are those that are labelled.
        axis: what a column is.
        legend: shades, and what each means.
    """

    name: str
    columns: int
    axis: str
    rows: tuple[Row, ...]
    legend: tuple[Cell, ...]

    @property
    def ticks(self) -> range:
        steps = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
        return range(0, self.columns, next(step for step in steps if self.columns <= _MOST_TICKS * step))


def type_map(tensors: Sequence[ReportedTensor]) -> HeatMap | None:
    """Types by role and layer, stronger shades for more bits; None where there are none to choose."""
    chosen = [tensor for tensor in tensors if tensor.layer is not None and not tensor.protected]
    bits = {tensor.type: 8 * tensor.bytes / tensor.weights for tensor in chosen}
    order = sorted(bits, key=lambda name: (bits[name], name))
    shades = {name: _shade(rank * (_SHADES - 1) // max(len(order) - 1, 1)) for rank, name in enumerate(order)}

    def cell(members: Sequence[ReportedTensor]) -> Cell:
        names = sorted({tensor.type for tensor in members}, key=order.index)
        return shades[names[-1]], " and ".join(names)

    return _by_role("Types", chosen, cell, [(shades[name], f"{name}: {bits[name]:.3g} bits") for name in order])


def rounding_map(tensors: Sequence[ReportedTensor]) -> HeatMap | None:
    """Rounding errors by role and layer, stronger shades for larger ones; None where nothing was measured."""
    measured = [t for t in tensors if t.layer is not None and not t.protected and t.rounding_error is not None]
    errors = [tensor.rounding_error for tensor in measured if tensor.rounding_error]
    bounds = _bounds(errors)
    words = (
        [f"{low:.2%} to {high:.2%}" for low, high in pairwise((min(errors), *bounds, max(errors)))] if errors else []
    )

    def cell(members: Sequence[ReportedTensor]) -> Cell:
        worst = max(tensor.rounding_error or 0.0 for tensor in members)
        return (_shade(sum(worst >= bound for bound in bounds)), f"{worst:.2%}") if worst else (_STANDS_OUT, "exact")

    exact = [(_STANDS_OUT, "exact")] if len(errors) < len(measured) else []
    return _by_role("Rounding errors", measured, cell, [*exact, *((_shade(n), text) for n, text in enumerate(words))])


def traffic_map(layers: Sequence[ExpertTraffic]) -> HeatMap | None:
    """Calibration tokens by layer and expert, as shares of what each would see if all saw the same."""
    if not layers:
        return None
    rows = []
    for layer in layers:
        mean = sum(layer.tokens) / len(layer.tokens)
        shades = [_shade(sum(n >= share * mean for share in _SHARES)) if n else _STANDS_OUT for n in layer.tokens]
        rows.append(Row(str(layer.layer), tuple(_areas_by_shade(shades)), layer.summary))
    low, *_, high = shares = [f"1/{round(1 / share)}" if share < 1 else f"{share:g}" for share in _SHARES]
    words = [f"less than {low}", *(f"{first} to {second}" for first, second in pairwise(shares)), f"{high} and more"]
    legend = [(_STANDS_OUT, "never seen"), *((_shade(number), text) for number, text in enumerate(words))]
    columns = max(len(layer.tokens) for layer in layers)
    return HeatMap("Expert traffic", columns, "Expert", tuple(rows), tuple(legend))


def _by_role(
    name: str, tensors: Sequence[ReportedTensor], cell: Callable[[Sequence[ReportedTensor]], Cell], legend: list[Cell]
) -> HeatMap | None:
    """A row for each role, a column for each layer; several tensors of a role in a layer are one cell."""
    found: dict[str, dict[int, list[ReportedTensor]]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            found.setdefault(tensor.role, {}).setdefault(tensor.layer, []).append(tensor)
    if not found:
        return None
    columns = max(layer for layers in found.values() for layer in layers) + 1
    rows = []
    for role, layers in found.items():
        label = role.replace("_", " ")
        cells = [cell(layers[layer]) if layer in layers else None for layer in range(columns)]
        rows.append(Row(label, tuple(_areas(cells, label))))
    return HeatMap(name, columns, "Layer", tuple(rows), tuple(legend))


def _areas(cells: Sequence[Cell | None], label: str) -> Iterator[Area]:
    """Neighbours that are alike, together; None is no cell."""
    for value, first, last in _runs(cells):
        if value:
            shade, meaning = value
            yield Area(shade, _path(first, last), f"{label}, layer {ranges([*range(first, last + 1)])}: {meaning}")


def _areas_by_shade(shades: Sequence[str]) -> Iterator[Area]:
    """All cells of a shade together, because thousands of experts make thousands of runs."""
    paths: dict[str, str] = {}
    for shade, first, last in _runs(shades):
        paths[shade] = paths.get(shade, "") + _path(first, last)
    yield from (Area(shade, path) for shade, path in paths.items())


def _runs(values: Sequence[_Value]) -> Iterator[tuple[_Value, int, int]]:
    """Values with the first and the last place where they stand side by side."""
    first = 0
    for value, members in groupby(values):
        last = first + len([*members]) - 1
        yield value, first, last
        first = last + 1


def _path(first: int, last: int) -> str:
    return f"M{first} 0h{last + 1 - first}v1H{first}z"


def _shade(number: int) -> str:
    return f"shade{number}"


def _bounds(values: Sequence[float]) -> list[float]:
    """What divides values into shades, evenly on a logarithmic scale; nothing where all are nearly one."""
    if not values or max(values) < _EVEN * min(values):
        return []
    step = (max(values) / min(values)) ** (1 / _SHADES)
    return [min(values) * step**number for number in range(1, _SHADES)]
