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


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("report", [LARGE, SMALL, large_report(100 * "name")], ids=["large", "small", "long names"])
def test_labels_have_room(report: Report, width: int) -> None:
    groups, found = flaws(page(report), width)
    assert groups > 10
    assert found == []


def test_what_has_no_room_is_found() -> None:
    chart = (
        '<svg class="chart" width="100"><text x="50" y="9">much too long</text><text x="55" y="9">on it</text></svg>'
    )
    _, found = flaws(f"<!DOCTYPE html><title>t</title><p style='width: 500px'>wide</p>{chart}", 390)
    assert {"much too long is cut off", "much too long on on it"} <= {*found}
    assert any(flaw.endswith(" wide") for flaw in found)
