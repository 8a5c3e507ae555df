"""Qwen3-MoE in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import qwen3_checkpoints as qwen3
import torch
from forward import assert_same_logits, random_tokens, relative_error
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from qwen3_checkpoints import BEYOND_LLAMA, VARIANTS
from toy_models import STEPS_AND_PIECES, logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(3, 80)
ALL = VARIANTS | BEYOND_LLAMA


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_logits_equal_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = qwen3.qwen3_model(**overrides)
    assert_same_logits(open_model(qwen3.save_qwen3(tmp_path / "m", oracle)), oracle, TOKENS)


def test_in_memory_names_give_the_same_logits(tmp_path: Path) -> None:
    oracle = qwen3.qwen3_model(num_hidden_layers=3, mlp_only_layers=[1])
    folder = qwen3.save_qwen3(tmp_path / "m", oracle, in_memory_names=True)
    assert_same_logits(open_model(folder), oracle, TOKENS)


@pytest.mark.parametrize("overrides", [{}, VARIANTS["odd widths"]], ids=["whole blocks", "blocks cut off"])
def test_fp8_checkpoint(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = qwen3.save_qwen3_fp8(tmp_path / "m", qwen3.qwen3_model(seed=1, **overrides))
    assert_same_logits(open_model(tmp_path / "m"), oracle, TOKENS)


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    """Stored BF16 is exact in float32: the oracle computes in float32 with the rounded weights."""
    oracle = qwen3.qwen3_model(seed=2)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.bfloat16())
    folder = qwen3.save_qwen3(tmp_path / "m", copy.deepcopy(oracle).bfloat16())
    assert_same_logits(open_model(folder), oracle, TOKENS)


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_steps_and_pieces_of_a_text(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = qwen3.qwen3_model(**overrides)
    model = open_model(qwen3.save_qwen3(tmp_path / "m", oracle))
    assert relative_error(logits_in_pieces(model, TOKENS, STEPS_AND_PIECES), logits_of(oracle, TOKENS)) < 1e-5


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_padding_changes_no_result(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = qwen3.qwen3_model(**overrides | {"hidden_size": 224, "moe_intermediate_size": 96, "intermediate_size": 80})
    model = open_model(qwen3.save_qwen3(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == 256
    assert_same_logits(padded, oracle, TOKENS)
