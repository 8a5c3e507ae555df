"""Experts that calibration never reached: stored as well as the others, and reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversions import convert
from moecast.archs.weights import Weight
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.runner.measure.evaluate import Parity
from moecast.runner.observe import ObservingWeights
from moecast.runner.texts import CALIBRATION_TEXT
from moecast.sources.model import open_model
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimax-m2-tiny"
STARVED = (1, 6, 11, 12)


class Notes(NoProgress):
    """Keeps the lines that a conversion notes down."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def converted(folder: Path, text: Path, error_feedback: bool, progress: NoProgress) -> tuple[Path, Parity]:
    how = {"calibration": text, "error_feedback": error_feedback, "progress": progress}
    result = convert(EXAMPLE, folder, "IQ2_XXS", padding=False, chunks=6, **how)
    assert result.parity
    return result.files[0], result.parity


@pytest.mark.slow
@pytest.mark.parametrize("error_feedback", [False, True], ids=["nearest", "error feedback"])
def test_starved_experts_are_no_worse_off(
    error_feedback: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation text uses them; what others saw stands in for what they did not."""
    text = tmp_path / "calibration.txt"
    text.write_text(CALIBRATION_TEXT.read_text(encoding="utf-8")[:24000], encoding="utf-8")
    _, covered = converted(tmp_path / "covered", text, error_feedback, NoProgress())
    project, notes = ObservingWeights.project, Notes()

    def project_but_for_starved(
        self: ObservingWeights, states: Tensor, weight: Weight, expert: int | None = None
    ) -> Tensor:
        return (
            self._inner.project(states, weight, expert) if expert in STARVED else project(self, states, weight, expert)
        )

    monkeypatch.setattr(ObservingWeights, "project", project_but_for_starved)
    with pytest.raises(BadInput, match="layer 0: 4 of 16 experts saw fewer than 1 calibration tokens, expert 1"):
        convert(EXAMPLE, tmp_path, "IQ2_XXS", padding=False, calibration=text, min_expert_tokens=1, verify=False)
    path, starved = converted(tmp_path / "starved", text, error_feedback, notes)
    assert starved.mean_kld <= 1.2 * covered.mean_kld
    assert sum("12 of 16 experts seen, fewest 0 tokens" in line for line in notes.lines) == 2
    source, stored = open_model(EXAMPLE), open_model(path)
    for original, written in zip(source.graph.weights(), stored.graph.weights(), strict=True):
        for expert in STARVED if original.experts else ():
            expected, values = source.load(original, expert), stored.load(written, expert)
            assert float((values - expected).square().sum() / expected.square().sum()) < 0.2  # NaN is not less
