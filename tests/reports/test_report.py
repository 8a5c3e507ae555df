"""Reports as data: what follows from what is in them, and their files, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import moecast.files
import pytest
from moecast.errors import BadInput
from moecast.reports.report import ExpertTraffic, grouped
from moecast.reports.text import json_text
from moecast.reports.write import write_report
from reported import STEP, large_report

DOCUMENT = Path(__file__).parents[2] / "docs" / "reports.md"


def test_the_layer_where_a_large_error_enters() -> None:
    report = large_report()
    found = report.first_large_error
    assert found and found.layer == STEP and found.jump == pytest.approx(0.05)
    assert report.parity
    errors = report.parity.layer_errors
    assert math.fsum(layer.jump for layer in report.layers) == pytest.approx(errors[-1])
    even = replace(report, parity=replace(report.parity, layer_errors=(0.5, 0.6, 0.7, 0.8)))
    assert even.first_large_error is None


def test_groups_are_tensors_by_role_and_type() -> None:
    report = large_report()
    groups = {(group.role, group.type): group for group in grouped(report.tensors)}
    assert groups["expert_gate", "IQ2_XXS"].layers == "0-61"
    assert sum(group.bytes for group in groups.values()) == sum(tensor.bytes for tensor in report.tensors)
    assert sum(group.tensors for group in groups.values()) == len(report.tensors)


def test_coverage_of_a_layer() -> None:
    layer = ExpertTraffic(5, (3, 0, 9, 0))
    assert (layer.fewest, layer.median, layer.most, layer.unseen) == (0, 1.5, 9, [1, 3])


def test_the_json_file_is_as_documented(tmp_path: Path) -> None:
    report = large_report()
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    documented = {
        name: {*re.findall(r"`(\w+)`", keys)}
        for name, keys in re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    }
    assert {*documented} == {*found}
    for name, keys in documented.items():
        value = found[name][0] if isinstance(found[name], list) else found[name]
        assert keys <= (value.keys() if isinstance(value, dict) else set()), name
        if isinstance(value, dict) and name not in ("parity", "candidates"):
            assert keys == value.keys()


def test_numbers_that_json_has_no_form_for_are_null() -> None:
    report = replace(large_report(), expected_kld=math.nan)
    assert json.loads(json_text(report.as_json()))["expected_kld"] is None


def test_earlier_files_stay_when_new_ones_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(large_report(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {*before} == {"report.html", "report.json"}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(moecast.files, "sync", full)
    with pytest.raises(BadInput, match="cannot be written: No space"):
        write_report(large_report("another"), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write_report(large_report(), tmp_path / "file")
