"""Plan files that people or programs have changed: the line that says where, and what is expected there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moecast.errors import BadInput
from moecast.quant.planning.plan_file import read_plan_file

ENTRY = {"name": "a.weight", "type": "Q4_K", "shape": [2, 256]}
PLAN = {"version": 1, "name": "mine", "tensors": [ENTRY]}


def _plan(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    values = {key: value for key, value in (PLAN | change).items() if value != "absent"}
    path.write_text(json.dumps(values), encoding="utf-8-sig")
    return path


def test_what_is_needed(tmp_path: Path) -> None:
    stored = read_plan_file(_plan(tmp_path, {"comment": "by hand"}))
    assert (stored.name, stored.tensors) == ("mine", {"a.weight": ("Q4_K", (2, 256))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"plan\.json: version is 2, expected 1"),
        ({"version": "absent"}, r"plan\.json: version is None, expected 1"),
        ({"name": "absent"}, r"plan\.json: name is missing, expected text"),
        ({"name": 7}, r"plan\.json: name is 7, expected text"),
        ({"tensors": "absent"}, r"plan\.json: tensors is None, expected a list of tensors"),
        ({"tensors": []}, r"plan\.json: tensors is \[\], expected a list of tensors"),
        ({"tensors": {"a": 1}}, r"plan\.json: tensors is \{'a': 1\}, expected a list of tensors"),
        ({"tensors": [ENTRY, 7]}, r"plan\.json: tensors\[1\]: name is missing, expected text"),
        ({"tensors": [ENTRY | {"type": None}]}, r"plan\.json: tensors\[0\]: type is missing, expected text"),
        ({"tensors": [ENTRY | {"shape": 256}]}, r"tensors\[0\]: shape is 256, expected whole numbers"),
        ({"tensors": [ENTRY | {"shape": [2.5]}]}, r"tensors\[0\]: shape is \[2\.5\], expected whole numbers"),
        ({"tensors": [ENTRY | {"shape": [10**30]}]}, r"tensors\[0\]: shape is \[1e\+30\], expected whole numbers"),
        ({"tensors": [ENTRY | {"shape": [-1, 2]}]}, r"tensors\[0\]: shape is \[-1, 2\], expected whole numbers"),
        ({"tensors": [ENTRY, ENTRY]}, r"plan\.json: a\.weight is there twice: remove one of them"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_plan_file(_plan(tmp_path, change))
