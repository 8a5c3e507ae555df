"""Settings that mean nothing together are refused where they are made, by the names of their options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Checkpoint
from moecast.cli import main
from moecast.convert import Calibration, Goal, HubAccess, Output
from moecast.convert.plans.choose import with_error_feedback
from moecast.errors import BadInput


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (Goal, {"recipe": "Q4_K_M", "size": 10**9}, "--quant and --size exclude each other"),
        (Goal, {"plan": "a.json", "like": "b.gguf"}, "--plan and --like exclude each other"),
        (Goal, {"recipe": "Q4_K_M", "bytes_per_token": 10**9}, "--bytes-per-token is a further limit"),
        (
            Goal,
            {"recipe": "Q4_K_M", "measure": True},
            "--measure finds the best plan for a budget",
        ),
        (Calibration, {"text": None, "error_feedback": True}, "--error-feedback needs calibration text"),
        (Calibration, {"imatrix": "i.gguf", "error_feedback": True}, "--error-feedback needs calibration text"),
        (Calibration, {"imatrix": "i.gguf", "save_to": "o.gguf"}, "--imatrix-out needs calibration text"),
        (Calibration, {"text": None, "min_expert_tokens": 1}, "--min-expert-tokens needs calibration text"),
        (Output, {"file_format": "onnx", "pre": "gpt2"}, "--pre means nothing for an ONNX model"),
        (Output, {"name": "a/b"}, "--name is 'a/b', expected a name that files can have"),
        (Output, {"name": ""}, "--name is '', expected a name that files can have"),
        (Output, {"name": "..\\x"}, "expected a name that files can have"),
        (Goal, {"recipe": ""}, "--quant is empty, expected a recipe"),
        (Output, {"activations": "int8"}, "--activations means nothing for a GGUF file"),
        (HubAccess, {"scratch": 1, "keep_source": True}, "leave one of them out"),
    ],
)
def test_refused_together(make: Callable[..., object], values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--calibration", "a.txt", "--no-calibration"], "--calibration and --no-calibration exclude"),
        (["convert", "--no-verify", "--max-kld", "1"], "--max-kld judges the comparison with the source"),
        (["convert", "--dry-run", "--bpw", "4", "--measure"], "--dry-run does not measure"),
        (["plan", "--fit", "--quant", "Q4_K_M"], "--fit finds the size by itself"),
        (["plan", "--ram", "8GB"], "--ram: add --fit, whose machine this describes"),
    ],
)
def test_options_refused_together(minimax: Checkpoint, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, [arguments[0], str(minimax.folder), *arguments[1:]])
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("goal", "calibration", "feeds_back", "measured"),
    [
        (Goal("Q4_K_M"), Calibration(), False, False),
        (Goal("Q4_K_M"), Calibration(error_feedback=True), True, False),
        (Goal(size=10**9), Calibration(), True, True),
        (Goal(size=10**9), Calibration(error_feedback=False), False, True),
        (Goal(bits_per_weight=4, measure=False), Calibration(text=None), False, False),
        (Goal(like="other.gguf"), Calibration(imatrix="imatrix.gguf"), False, False),
        (Goal(plan="plan.json"), Calibration(), True, False),
    ],
)
def test_what_follows(goal: Goal, calibration: Calibration, feeds_back: bool, measured: bool) -> None:
    assert with_error_feedback(calibration, goal).error_feedback is feeds_back
    assert goal.measures is measured
