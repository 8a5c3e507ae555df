"""Reports in Chromium, on a phone and on a desk: nothing cut off, no label on another, nothing to scroll sideways."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chromium import flaws
from moecast.reports.page import page
from moecast.reports.report import ExpertTraffic, Report
from reported import large_report

pytestmark = [pytest.mark.chromium, pytest.mark.whole]
LARGE = large_report()
SMALL = replace(
    LARGE,
    tensors=tuple(tensor for tensor in LARGE.tensors if tensor.layer in (0, 1)),
    experts=tuple(ExpertTraffic(layer, (5, 0, 7, 20)) for layer in range(2)),
)


def _scaled(report: Report, scale: float) -> Report:
    """A report of divergences so many times as large."""
    assert report.parity
    slices = {
        key: tuple(
            replace(one, mean_kld=scale * one.mean_kld, mean_kld_error=scale * one.mean_kld_error) for one in members
        )
        for key, members in report.parity.slices.items()
    }
    return replace(report, parity=replace(report.parity, slices=slices))


@pytest.mark.parametrize(
    "report",
    [LARGE, _scaled(SMALL, 0.03), _scaled(large_report(100 * "name"), 0.001)],
    ids=["large", "small", "long names"],
)
def test_labels_have_room(report: Report) -> None:
    groups, found = flaws(page(report))
    assert groups > 10
    assert found == []


def test_what_has_no_room_is_found() -> None:
    chart = (
        '<svg class="chart" width="100"><text x="50" y="9">much too long</text><text x="55" y="9">on it</text></svg>'
    )
    axis = '<div class="axis"><span>0.5</span><span>0.6</span></div>'
    _, found = flaws(f"<!DOCTYPE html><title>t</title><p style='width: 500px'>wide</p>{chart}{axis}")
    assert {"390: much too long is cut off", "1280: much too long on on it", "390: 0.5 on 0.6"} <= {*found}
    assert any(flaw.startswith("390: ") and flaw.endswith(" wide") for flaw in found)
