"""DeepSeek V3 and Kimi K2 in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepseek_v3_checkpoints as deepseek
import pytest
from deepseek_v3_checkpoints import LIMITS, VARIANTS
from forward import assert_same_logits, random_tokens
from moecast.sources.model import open_model

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 160)
ALL = VARIANTS | LIMITS


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_logits_equal_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = deepseek.deepseek_model(**overrides)
    assert_same_logits(open_model(deepseek.save_deepseek(tmp_path / "m", oracle)), oracle, TOKENS)
