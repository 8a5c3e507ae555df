"""A conversion that stops among layers that use keys of others, with per-layer embeddings, goes on alike."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import gemma4_checkpoints as gemma
import pytest
from conversions import convert
from moecast.archs.graph import Layer
from moecast.convert.resume import journal
from moecast.runner.stream import Stream


@pytest.fixture(autouse=True)
def every_piece_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BATCH_SECONDS", 0.0)


@pytest.mark.parametrize("stopped", [2, 4, 6])
def test_same_bytes_and_figures(stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before a layer: within those with keys of their own, after the last of these, and within the others.

    Calibration, source and candidate have come to the same keys and the same words for each layer: the file has the
    same bytes and the comparison the same figures.
    """
    folder = gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**gemma.PER_LAYER))
    text = tmp_path / "text.txt"
    text.write_text(checkpoints.TEXT.read_text()[:1500])
    how = {"calibration": text, "file": text, "context": 48, "chunks": 2, "threads": 1}
    whole = convert(folder, tmp_path / "whole", "Q4_K_M", **how)
    left = Stream.leave

    def leave(stream: Stream, layer: Layer) -> None:
        if layer.index == stopped:
            raise KeyboardInterrupt
        left(stream, layer)

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "leave", leave)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "again", "Q4_K_M", **how)
    passed: list[int] = []
    monkeypatch.setattr(Stream, "leave", lambda stream, layer: passed.append(layer.index) or left(stream, layer))
    again = convert(folder, tmp_path / "again", "Q4_K_M", **how)
    assert min(passed) == stopped
    assert again.files[0].read_bytes() == whole.files[0].read_bytes()
    assert again.parity == whole.parity
