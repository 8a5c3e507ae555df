"""The page of a report: one HTML file that fetches nothing, in light and dark, for screens and paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import charts
from .heatmaps import rounding_map, traffic_map, type_map
from .report import Report, ReportedTensor, grouped
from .rows import parity_rows
from .text import human_bytes, printable, ranges

if TYPE_CHECKING:
    from ..runner.measure.slices import Slice

_SLICES = {
    "category": "By category of text",
    "position": "By position in the context",
    "confidence": "By the probability that the source gives to its most probable token",
}


def page(report: Report) -> str:
    """The page as HTML; whatever names hold is text in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finished,
    )
    environment.filters |= {"bytes": human_bytes, "ranges": ranges}
    return environment.get_template("page.html").render(
        report=report,
        summary=[*_summary(report)],
        groups=grouped(report.tensors),
        maps={"types": type_map(report.tensors), "rounding": rounding_map(report.tensors)},
        traffic=traffic_map(report.experts),
        charts=_charts(report),
        slices=[(key, title, members) for key, title in _SLICES.items() if (members := _slices(report).get(key))],
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),  # ours, and no text
    )


def _finished(value: Any) -> Any:
    """Text without characters that HTML does not have, or that turn other text around."""
    return value if isinstance(value, Markup) else printable(value, keep="\n")


def _summary(report: Report) -> Iterator[tuple[str, str]]:
    if report.bytes is not None:
        yield "Size", human_bytes(report.bytes)
    if report.bits_per_weight is not None:
        yield "Bits per weight", f"{report.bits_per_weight:.2f}"
    if report.bytes_per_token is not None:
        yield "Weights that a token touches", human_bytes(report.bytes_per_token)
    if report.expected_kld is not None:
        yield "Expected KL divergence", f"{report.expected_kld:.5f}"
    if report.parity:
        yield "Perplexity ratio", f"{report.parity.perplexity_ratio:.4f}"
        yield from parity_rows(report.parity)


def _charts(report: Report) -> dict[str, Markup]:
    """Those for which there are numbers, by name."""
    drawn: dict[str, str] = {}
    if report.tensors:
        drawn["sizes"] = charts.size_chart(_sizes(report.tensors))
    if len(report.layers) > 1:
        drawn["layers"] = charts.layer_chart(report.layers)
    if len(report.candidates) > 1:
        drawn["pareto"] = charts.pareto_chart(report.candidates)
    drawn |= {key: charts.slice_chart(key, slices) for key, slices in _slices(report).items()}
    return {name: Markup(svg) for name, svg in drawn.items()}  # matplotlib has escaped what is in it


def _slices(report: Report) -> dict[str, tuple[Slice, ...]]:
    """What is told slice by slice; one alone is all that was compared."""
    found = report.parity.slices if report.parity else {}
    return {key: slices for key, slices in found.items() if len(slices) > 1}


def _sizes(tensors: Sequence[ReportedTensor]) -> list[tuple[str, int]]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.role.replace("_", " ")] += tensor.bytes
    largest, rest = sizes.most_common(12), sizes.most_common()[12:]
    return [*largest, ("all others", sum(size for _, size in rest))] if rest else largest
