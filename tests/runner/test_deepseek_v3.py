"""DeepSeek V3 and Kimi K2 in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepseek_v3_checkpoints as deepseek
import pytest
from deepseek_v3_checkpoints import FEW, LIMITS, VARIANTS
from forward import assert_same_logits, random_tokens, relative_error
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from toy_models import logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 160)
ALL = VARIANTS | LIMITS


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_logits_equal_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    """Of models without near ties of experts, which processors would settle differently."""
    oracle = deepseek.deepseek_model(seed=3, **overrides)
    assert_same_logits(open_model(deepseek.save_deepseek(tmp_path / "m", oracle)), oracle, TOKENS)


def test_in_memory_names_give_the_same_logits(tmp_path: Path) -> None:
    oracle = deepseek.deepseek_model()
    assert_same_logits(open_model(deepseek.save_deepseek(tmp_path / "m", oracle, in_memory_names=True)), oracle, TOKENS)


@pytest.mark.parametrize("encoding", ["fp8", "int4", "bf16"])
@pytest.mark.parametrize("name", ["V3", "Kimi", "odd widths"])
def test_published_checkpoint(name: str, encoding: str, tmp_path: Path) -> None:
    """With blocks that are cut off in FP8, and below other names beside a vision tower in INT4."""
    oracle = deepseek.save_published(tmp_path / "m", deepseek.deepseek_model(seed=1, **VARIANTS[name]), encoding)
    assert_same_logits(open_model(tmp_path / "m"), oracle, TOKENS)


@pytest.mark.parametrize("overrides", FEW.values(), ids=FEW)
def test_steps_and_pieces_of_a_text(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = deepseek.deepseek_model(seed=4, **overrides)
    model = open_model(deepseek.save_deepseek(tmp_path / "m", oracle))
    sizes = [80, *[1] * 12, 68]
    assert relative_error(logits_in_pieces(model, TOKENS, sizes), logits_of(oracle, TOKENS)) < 1e-5


@pytest.mark.parametrize("overrides", FEW.values(), ids=FEW)
def test_padding_changes_no_result(overrides: dict[str, Any], tmp_path: Path) -> None:
    widths = {"hidden_size": 224, "moe_intermediate_size": 96, "intermediate_size": 80}
    oracle = deepseek.deepseek_model(**overrides | widths)
    model = open_model(deepseek.save_deepseek(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == 256
    assert_same_logits(padded, oracle, TOKENS)
