"""DeepSeek V3.2 and GLM-5 in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forward import assert_same_logits, random_tokens, relative_error, runner_logits
from moecast.sources.model import Model, open_model
from sparse_checkpoints import VARIANTS, save_sparse, sparse_model
from toy_models import logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 200)  # of which an indexer leaves 32


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = sparse_model(family, **overrides)
    model = open_model(save_sparse(tmp_path / "m", oracle))
    assert_same_logits(model, oracle, TOKENS)
    full = Model(model.path, model.architecture, model.graph.attending_to_all(), model.tensors, {})
    assert_same_logits(full, sparse_model(family, **overrides | {"index_topk": 200}), TOKENS)
    assert relative_error(runner_logits(full, TOKENS), logits_of(oracle, TOKENS)) > 1e-3


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sizes", [[190, *[1] * 10], [50, 1, 1, 148]], ids=["steps", "pieces"])
def test_steps_and_pieces_of_a_text(family: str, overrides: dict[str, Any], sizes: list[int], tmp_path: Path) -> None:
    oracle = sparse_model(family, **overrides)
    model = open_model(save_sparse(tmp_path / "m", oracle))
    assert relative_error(logits_in_pieces(model, TOKENS, sizes), logits_of(oracle, TOKENS)) < 1e-5
