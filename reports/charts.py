"""Charts by matplotlib as SVG that stands in a page: its words are words, its colours those of the page. One as PNG."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from .report import LayerError
from .text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..runner.measure.candidates import Candidate
    from ..runner.measure.slices import Slice


@dataclass(frozen=True)
class _Colors:
    """What a chart is drawn in; the series are matplotlib's "C0" and "C1"."""

    ink: str
    faint: str
    series: tuple[str, str]


_PLACES = _Colors("#010203", "#010204", ("#010205", "#010206"))  # which the page's own take, light or dark
_PAGE = {"#010203": "var(--ink)", "#010204": "var(--faint)", "#010205": "var(--series)", "#010206": "var(--other)"}
_LIGHT = _Colors("#1b1f24", "#c4ccd4", ("#0b66b0", "#c8641a"))  # the page's where it is light
_SERIES, _OTHER = "C0", "C1"
_WIDTH = 5.0  # inches of 72 units: 10 units high letters stay readable where a phone shows them at its width
_PARETO_HEIGHT = 3.4  # inches
_LONGEST = 26  # characters of a name
_STYLE: dict[Any, Any] = {  # whose keys are of types that differ between versions of matplotlib
    "svg.fonttype": "none",
    "svg.hashsalt": "moecast",  # the same page for the same data
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "text.parse_math": False,
}


def layer_chart(layers: Sequence[LayerError]) -> str:
    """Relative error after each layer as a line, what each adds as bars."""

    def draw(axes: Axes) -> None:
        numbers = [layer.layer for layer in layers]
        axes.bar(numbers, [layer.jump for layer in layers], color=_OTHER, label="added by the layer", width=0.6)
        axes.plot(numbers, [layer.error for layer in layers], color=_SERIES, marker="o", markersize=3, label="so far")
        axes.set_xlabel("Layer")
        axes.set_ylabel("Relative error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.2), ncols=2)

    return _drawn("layers", 2.6, "Relative error after each layer, and what the layer adds", draw)


def slice_chart(name: str, slices: Sequence[Slice]) -> str:
    """Mean KL divergence of slices with its standard error, in their order from top to bottom."""

    def draw(axes: Axes) -> None:
        places = range(len(slices))
        errors = [entry.mean_kld_error for entry in slices]
        axes.barh(
            places,
            [entry.mean_kld for entry in slices],
            xerr=errors,
            color=_SERIES,
            ecolor=matplotlib.rcParams["text.color"],
            height=0.6,
        )
        axes.set_yticks(places, [_short(entry.name) for entry in slices])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        _label_sparsely(axes)
        axes.set_xlabel("Mean KL divergence, nats")

    return _drawn(name, 0.8 + 0.26 * len(slices), f"KL divergence by {name}", draw)


def size_chart(sizes: Sequence[tuple[str, int]]) -> str:
    """Share of the file by role, the largest first."""

    def draw(axes: Axes) -> None:
        total = sum(size for _, size in sizes)
        bars = axes.barh(range(len(sizes)), [100 * size / total for _, size in sizes], color=_SERIES, height=0.6)
        axes.bar_label(bars, [f"{size / total:.1%}" for _, size in sizes], padding=3)
        axes.set_yticks(range(len(sizes)), [_short(role) for role, _ in sizes])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        _label_sparsely(axes)
        axes.set_xlabel("Percent of all bytes")

    return _drawn("sizes", 0.6 + 0.26 * len(sizes), "Share of the file by role", draw)


def pareto_chart(candidates: Sequence[Candidate]) -> str:
    """Size against KL divergence; what is dominated is hollow. The numbers stand in the table beside."""
    return _drawn("pareto", _PARETO_HEIGHT, "Size against KL divergence", _pareto(candidates))


def pareto_picture(candidates: Sequence[Candidate]) -> bytes:
    """The same as PNG on white, for pages that are not ours."""
    options = {"dpi": 160, "metadata": {"Software": None}}
    return _saved(_PARETO_HEIGHT, _pareto(candidates), _LIGHT, True, format="png", **options)


def _pareto(candidates: Sequence[Candidate]) -> Callable[[Axes], None]:
    points = [
        (number, entry.dominated, entry.bytes / 2**30, entry.parity.mean_kld)
        for number, entry in enumerate(candidates, 1)
        if math.isfinite(entry.parity.mean_kld)
    ]

    def draw(axes: Axes) -> None:
        for number, dominated, size, divergence in points:
            fill, edge = ("none", _OTHER) if dominated else (_SERIES, _SERIES)
            label = "dominated" if dominated else "best of their size"
            axes.scatter(size, divergence, s=36, label=label, zorder=3, facecolors=fill, edgecolors=edge)
            axes.annotate(str(number), (size, divergence), (5, 4), textcoords="offset points")
        best = sorted((size, divergence) for _, dominated, size, divergence in points if not dominated)
        axes.plot(
            [size for size, _ in best], [divergence for _, divergence in best], color=_SERIES, drawstyle="steps-post"
        )
        if min((divergence for *_, divergence in points), default=0) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        axes.legend(named.values(), named.keys(), frameon=False, loc="upper left", bbox_to_anchor=(0, 1.16), ncols=2)
        axes.set_xlabel("GiB")
        axes.set_ylabel("Mean KL divergence, nats")

    return draw


def _label_sparsely(axes: Axes) -> None:
    """So few labels of a bar's length that long ones have room beside long names."""
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", visible=False)


def _drawn(name: str, height: float, title: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws on axes, so many inches high, as SVG for a page."""
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    svg = _saved(height, draw, _PLACES, False, format="svg", metadata=metadata)
    return _for_a_page(svg.decode(), name, title)


def _saved(height: float, draw: Callable[[Axes], None], colors: _Colors, opaque: bool, **options: Any) -> bytes:
    """What `draw` draws, as matplotlib saves it."""
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    faint = ("axes.edgecolor", "grid.color")
    drawn_in: dict[Any, Any] = dict.fromkeys(ink, colors.ink) | dict.fromkeys(faint, colors.faint)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever a user's own style says
        matplotlib.rcParams.update(_STYLE | drawn_in | {"axes.prop_cycle": f"cycler('color', {[*colors.series]})"})
        warnings.simplefilter("ignore")  # of letters that this machine's fonts lack and the reader's need not
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.patch.set_visible(opaque)
        axes.patch.set_visible(opaque)
        file = BytesIO()
        figure.savefig(file, **options)
    return file.getvalue()


def _for_a_page(svg: str, name: str, title: str) -> str:
    """A drawing without the head of a file, with the page's colours, and identifiers that no other on it has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, replacement in _PAGE.items():
        svg = svg.replace(color, replacement)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box, "matplotlib draws SVG with a view box"
    opened = f'<svg class="chart" role="img" aria-label="{title}" {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opened + svg[svg.index(">") + 1 :]


def _short(name: str) -> str:
    """A name from outside that fits beside a chart."""
    text = printable(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 9]}…{text[-8:]}"
