"""What a conversion takes from an earlier file changes nothing but how long it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import moecast.convert.encode
import moecast.convert.plans.allocate
import pytest
import torch
from conftest import Checkpoint
from conversions import convert
from moecast.archs.weights import Weight
from moecast.convert.calibrate import write_imatrix
from moecast.convert.resume import sidecar
from moecast.convert.settings import Calibration, Goal
from moecast.sources.gguf import read_gguf

TEXT = checkpoints.TEXT.read_text(encoding="utf-8")
BARE: dict[str, Any] = {"calibration": None, "verify": False}
LANES: dict[str, Any] = {"calibration": "calibration", "context": 64, "chunks": 2}
DOWN = (("ffn_down_exps", "Q5_K"),)  # the role that changes


class Notes:
    """Progress that keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int, detail: str = "") -> None: ...

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "calibration").write_text(TEXT[:1200], encoding="utf-8")
    return tmp_path / "calibration"


def _types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in read_gguf(file)[1]}


def _rounded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of what is rounded from here on."""
    names: set[str] = set()
    quantize = moecast.convert.encode.quantize_weight

    def noted(rows: torch.Tensor, weight: Weight, *rest: Any) -> torch.Tensor:
        names.add(weight.name)
        return quantize(rows, weight, *rest)

    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", noted)
    return names


@pytest.mark.parametrize(
    ("earlier", "goal", "options"),
    [
        ("Q4_K_M", Goal("Q4_K_M", tensor_types=DOWN), BARE),
        ("Q4_K_M", "Q3_K_M", BARE),
        ("Q4_K_M", "Q5_K_M", BARE | {"split_max_bytes": 500_000}),
        ("IQ2_XS", Goal("IQ2_XS", tensor_types=DOWN), LANES),
        ("IQ2_XS", Goal("IQ2_XS", tensor_types=DOWN), LANES | {"verify": False}),
        ("IQ3_XXS", Goal("IQ3_XXS", tensor_types=DOWN), LANES | {"error_feedback": True}),
        ("IQ4_XS", Goal("Q4_K_M"), LANES | {"error_feedback": True, "verify": False}),
        ("Q3_K_M", Goal("Q3_K_M", tensor_types=DOWN), BARE | {"imatrix": "imatrix.gguf"}),
    ],
)
def test_same_bytes(
    minimax_fp8: Checkpoint,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    earlier: str,
    goal: str | Goal,
    options: dict[str, Any],
) -> None:
    folder = text.parent
    if "imatrix" in options:
        write_imatrix(minimax_fp8.folder, folder / "imatrix.gguf", Calibration(text, context=64))
    options = {
        key: folder / value if key in ("calibration", "imatrix") and value else value for key, value in options.items()
    }
    before = convert(minimax_fp8.folder, folder / "before.gguf", earlier, **options)
    fresh = convert(minimax_fp8.folder, folder / "fresh.gguf", goal, **options)
    rounded, types = _rounded(monkeypatch), [_types(made.files[0]) for made in (before, fresh)]
    same = {name for name, type in types[1].items() if types[0][name] == type}
    assert 0 < len(same) < len(types[1])
    made = convert(minimax_fp8.folder, folder / "made.gguf", goal, reuse=before.files[0], **options)
    for mine, theirs in zip(made.files, fresh.files, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert rounded == types[1].keys() - same
    assert made.parity == fresh.parity and made.problems == fresh.problems
    assert made.details.findings == fresh.details.findings
    assert made.reused and (made.reused.tensors, made.reused.of) == (len(same), len(types[1]))
    assert sidecar.read_fingerprints(made.files[0]) == sidecar.read_fingerprints(fresh.files[0])
