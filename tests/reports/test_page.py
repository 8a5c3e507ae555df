"""The page of a report: valid HTML that fetches nothing, whatever names hold; its maps show the numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from moecast.reports.heatmaps import Area, rounding_map, traffic_map, type_map
from moecast.reports.page import page
from moecast.reports.report import ExpertTraffic, Report
from moecast.reports.text import printable
from reported import EXPERTS, HOSTILE, LAYERS, STEP, large_report, parsed, words


def _compared(report: Report, **changed: Any) -> Report:
    """A report whose comparison found something else."""
    assert report.parity
    return replace(report, parity=replace(report.parity, **changed))


def _without_difference(report: Report) -> Report:
    assert report.parity
    slices = {
        key: tuple(replace(part, mean_kld=0.0, mean_kld_error=0.0) for part in parts)
        for key, parts in report.parity.slices.items()
    }
    return _compared(report, layer_errors=(0.0,) * LAYERS, mean_kld=0.0, slices=slices)


BARE = replace(large_report(), bytes_per_token=None, parity=None, tensors=(), experts=(), candidates=(), problems=())


@pytest.mark.parametrize(
    "report",
    [
        large_report(),
        large_report(HOSTILE),
        replace(large_report(), kind="plan", parity=None, experts=()),
        replace(large_report(), kind="comparison", tensors=(), experts=(), candidates=()),
        BARE,
        replace(_compared(large_report(), layer_errors=(0.1,)), candidates=large_report().candidates[:1]),
        _without_difference(large_report()),
    ],
    ids=["conversion", "hostile", "plan", "comparison", "bare", "one layer, one candidate", "no difference"],
)
def test_html_is_valid_and_fetches_nothing(report: Report) -> None:
    text = page(report)
    tree = parsed(text)
    identifiers = Counter(element.get("id") for element in tree.iter() if element.get("id"))
    assert {name for name, count in identifiers.items() if count > 1} == set()
    used = [value for element in tree.iter() for name, value in element.items() if "href" in name or "src" in name]
    used += re.findall(r"url\(([^)]*)\)", text)
    assert {name for name in used if not name.startswith("#")} == set()
    assert {name.removeprefix("#") for name in used} <= {*identifiers}
    assert not {"script", "img", "iframe", "link", "object"} & {str(element.tag) for element in tree.iter()}
    assert not [name for element in tree.iter() for name, _ in element.items() if name.startswith("on")]
    assert len(text.encode()) < 700_000  # of the two megabytes that it may take


def test_names_are_text() -> None:
    tree = parsed(page(large_report(HOSTILE)))
    shown = " ".join(printable(HOSTILE).split())
    assert words(tree).count(shown) > 8
    assert "\u202e" not in words(tree) and "\x1b" not in words(tree)


def test_a_page_says_what_stands_in_its_report() -> None:
    text = words(parsed(page(large_report())))
    for said in ("70.0 GiB", "2.61", "0.031000 ± 0.000600", "Perplexity ratio1.0392", "93.00%", "SHA-256"):
        assert said in text
    assert f"Layer {STEP} is the first that adds much: 0.05" in text


def test_what_is_not_known_is_not_shown() -> None:
    text = words(parsed(page(BARE)))
    for heading in ("Where errors enter", "Expert traffic", "slice by slice", "Candidates", "Notes", "Types"):
        assert heading not in text
    assert "How to repeat it" in text


def test_traffic_is_shaded_by_shares_and_counts_who_was_never_seen() -> None:
    tokens = (0, 10, 100, 150, 250, 400, 690)
    found = traffic_map([ExpertTraffic(3, tokens)])
    assert found and found.columns == len(tokens)
    shades = ["zero", *(f"shade{number}" for number in (0, 2, 3, 4, 4, 5))]  # of a mean of 228.6
    assert [_cells(found.rows[0].areas)[place] for place in range(len(tokens))] == shades
    assert found.rows[0].title == "layer 3: fewest 0 (expert 0), median 150, most 690 (expert 6) tokens, 1 never seen"


def test_every_expert_of_every_layer_has_its_cell() -> None:
    report = large_report()
    found = traffic_map(report.experts)
    assert found and len(found.rows) == LAYERS
    for row, layer in zip(found.rows, report.experts, strict=True):
        cells = _cells(row.areas)
        assert sorted(cells) == [*range(EXPERTS)]
        assert [place for place in sorted(cells) if cells[place] == "zero"] == layer.unseen


def test_types_and_rounding_errors_are_by_role_and_layer() -> None:
    report = large_report()
    types, rounding = type_map(report.tensors), rounding_map(report.tensors)
    assert types and rounding
    assert [row.label for row in types.rows] == ["attention q", "attention output", "expert gate", "expert down"]
    assert [area.title for area in types.rows[2].areas] == ["expert gate, layer 0-61: IQ2_XXS"]
    bits = [float(re.findall(r"([\d.]+) bits", meaning)[0]) for _, meaning in types.legend]
    assert all(low < high for low, high in pairwise(bits))
    assert rounding.rows[2].areas[31].title == "expert gate, layer 31: 60.00%"
    shades = [int(area.shade[-1]) for area in rounding.rows[2].areas]
    assert shades == sorted(shades)  # errors grow from layer to layer


def test_exact_weights_stand_out() -> None:
    tensors = [replace(tensor, rounding_error=0.0) for tensor in large_report().tensors]
    found = rounding_map(tensors)
    assert found and {area.shade for row in found.rows for area in row.areas} == {"zero"}
    assert found.legend == (("zero", "exact"),)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_has_a_page_too(value: float) -> None:
    """Whatever is no number is said, and not drawn."""
    report = large_report()
    assert report.parity
    slices = {
        key: tuple(replace(one, mean_kld=value, mean_kld_error=value) for one in members)
        for key, members in report.parity.slices.items()
    }
    broken = replace(report.parity, mean_kld=value, layer_errors=(0.1, value, value), slices=slices)
    candidates = tuple(replace(one, parity=broken) for one in report.candidates)
    assert str(value) in words(parsed(page(replace(report, parity=broken, candidates=candidates))))


def test_a_page_is_the_same_for_the_same_report() -> None:
    assert page(large_report()) == page(large_report())


def test_shades_are_all_in_the_style() -> None:
    style = (Path(__file__).parents[2] / "reports" / "page.css").read_text(encoding="utf-8")
    for shade in ("zero", *(f"shade{number}" for number in range(8))):
        assert f".{shade} {{" in style
        assert len(re.findall(rf"--{shade}:", style)) == 2  # light and dark


def _cells(areas: tuple[Area, ...]) -> dict[int, str]:
    """The shade of every cell that an area covers; each is covered once."""
    cells: dict[int, str] = {}
    for area in areas:
        for first, length in re.findall(r"M(\d+) 0h(\d+)v1H\1z", area.path):
            for place in range(int(first), int(first) + int(length)):
                assert place not in cells
                cells[place] = area.shade
    return cells
