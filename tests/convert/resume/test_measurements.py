"""Measurements for a budget that were damaged are made again, to the same file."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import checkpoints
import pytest
from conversions import convert, stopped_after
from moecast.convert.settings import Goal
from mutations import damaged_bytes

ATTEMPTS = 6
pytestmark = pytest.mark.slow


def _convert(folder: Path) -> bytes:
    options = {"context": 32, "chunks": 2, "calibration": folder.parent / "text", "error_feedback": False}
    source = checkpoints.EXAMPLES / "minimax-m2-tiny"
    return convert(source, folder / "m.gguf", Goal(size=2_500_000), padding=False, **options).files[0].read_bytes()


def _stop(folder: Path, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a conversion after it has measured, and has written so many pieces."""
    with stopped_after(pieces, monkeypatch):
        _convert(folder)


def test_damaged_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text(checkpoints.TEXT.read_text(encoding="utf-8")[:1200], encoding="utf-8")
    whole = _convert(tmp_path / "whole")
    _stop(tmp_path / "stopped", 100, monkeypatch)
    kept = sorted((tmp_path / "stopped" / ".m.gguf.plan.journal").iterdir())
    assert {"damage", "divergences", "records"} <= {file.name for file in kept}
    for seed in range(ATTEMPTS):
        shutil.copytree(tmp_path / "stopped", tmp_path / str(seed))
        file = tmp_path / str(seed) / ".m.gguf.plan.journal" / kept[seed % len(kept)].name
        file.write_bytes(damaged_bytes(file.read_bytes(), Random(seed)))
        assert _convert(tmp_path / str(seed)) == whole, f"another file after damage to {file.name}, seed {seed}"
        left = sorted(file.name for file in (tmp_path / str(seed)).iterdir())
        assert left == ["m.fingerprints.json", "m.gguf"]
