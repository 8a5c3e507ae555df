"""Experts quantized together, as they are on a GPU: what one by one gives, stopped at any moment, within the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moecast.convert.encode
import pytest
import torch
from conftest import Checkpoint
from conversions import convert, stopped_after
from moecast.errors import BadInput
from moecast.quant.rounding import feedback
from moecast.runner import memory
from moecast.runner.placement import CPU, Need, Placement
from moecast.runner.texts import CALIBRATION_TEXT
from numbered import DEVICE, numbered_device
from torch import Tensor
from trained_examples import EXAMPLES

GB = 10**9
EXAMPLE = EXAMPLES / "minimax-m2-tiny"
TOGETHER = 5  # of 16 experts: the last is alone
SHORT: dict[str, Any] = {"context": 128, "chunks": 8, "calibration_chunks": 24}
FEEDBACK: dict[str, Any] = {"error_feedback": True} | SHORT


def _placed(monkeypatch: pytest.MonkeyPatch, placement: Placement) -> list[Need]:
    """Runs compute there; what they said that they need."""
    needs: list[Need] = []

    def place(wanted: str, vram: int | None, need: Need) -> Placement:
        needs.append(need)
        return placement

    monkeypatch.setattr(memory, "place", place)
    return needs


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """How many experts are quantized at a time."""
    quantize, found = moecast.convert.encode.quantize_weight, set()

    def noted(rows: Tensor, *others: Any) -> Tensor:
        found.add(len(rows))
        return quantize(rows, *others)

    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", noted)
    return found


@pytest.mark.whole
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_without_error_feedback_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: set[int], verify: bool
) -> None:
    alone = convert(EXAMPLE, tmp_path / "alone.gguf", "Q3_K_M", verify=verify, **SHORT)
    _placed(monkeypatch, Placement(CPU, experts_at_once=TOGETHER))
    together = convert(EXAMPLE, tmp_path / "together.gguf", "Q3_K_M", verify=verify, **SHORT)
    assert sizes == {1, TOGETHER}
    assert together.files[0].read_bytes() == alone.files[0].read_bytes()


@pytest.mark.whole
def test_with_error_feedback_the_divergence_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: set[int]
) -> None:
    found = []
    for count in (1, TOGETHER):
        with monkeypatch.context() as patched:
            _placed(patched, Placement(CPU, experts_at_once=count))
            found.append(convert(EXAMPLE, tmp_path / f"{count}.gguf", "Q3_K_M", **FEEDBACK))
    assert sizes == {1, TOGETHER}
    first, second = (torch.frombuffer(bytearray(made.files[0].read_bytes()), dtype=torch.uint8) for made in found)
    assert float((first != second).double().mean()) < 0.01
    klds = [made.parity.mean_kld for made in found if made.parity]
    assert klds[1] == pytest.approx(klds[0], rel=0.02)


@pytest.mark.slow
def test_stopped_among_them_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with another number of them: that is a conversion of its own."""
    _placed(monkeypatch, Placement(CPU, experts_at_once=TOGETHER))
    options = FEEDBACK | {"chunks": 2}
    expected = convert(EXAMPLE, tmp_path / "undisturbed.gguf", "Q3_K_M", **options).files[0].read_bytes()
    output = tmp_path / "out" / "model.gguf"
    output.parent.mkdir()
    for pieces in (7, 3, 11):
        with stopped_after(pieces, monkeypatch):
            convert(EXAMPLE, output, "Q3_K_M", **options)
    with monkeypatch.context() as patched:
        _placed(patched, Placement(CPU, experts_at_once=TOGETHER - 1))
        with pytest.raises(BadInput, match="device"):
            convert(EXAMPLE, output, "Q3_K_M", **options)
    made = convert(EXAMPLE, output, "Q3_K_M", **options)
    assert made.resumed and made.files[0].read_bytes() == expected


@pytest.mark.whole
@pytest.mark.parametrize("quant", ["Q8_0", pytest.param("Q4_0", marks=pytest.mark.slow)])
def test_memory_holds(minimax_fp8: Checkpoint, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on a device is at most what was said to be needed there, without room for activations; of the second
    type with error feedback, whose levels are of no account here."""
    monkeypatch.setattr(memory, "_SLACK", 0)
    monkeypatch.setattr(feedback, "_choose", lambda grid, data, wanted, coupling: (wanted.round(), wanted))
    text, peaks = tmp_path / "text.txt", []
    text.write_text(CALIBRATION_TEXT.read_text(encoding="utf-8")[:600], encoding="utf-8")
    options: dict[str, Any] = {"error_feedback": True, "calibration": text, "context": 16, "chunks": 1}
    for count in (1, 4):
        needs = _placed(monkeypatch, Placement(DEVICE, 0, experts_at_once=count))
        with numbered_device() as device:
            convert(minimax_fp8.folder, tmp_path / f"{count}.gguf", quant, **options)
        peaks.append(device.peak)
        assert device.peak <= needs[0].least + (count - 1) * needs[0].expert
    assert peaks[0] < peaks[1] <= peaks[0] + 3 * needs[0].expert
