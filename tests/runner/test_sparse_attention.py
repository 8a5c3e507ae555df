"""DeepSeek V3.2 and GLM-5 in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepseek_v3_checkpoints import save_deepseek, save_published
from forward import assert_same_logits, random_tokens, relative_error, runner_logits
from moecast.archs.graph import LatentAttention
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from sparse_checkpoints import VARIANTS, sparse_model
from toy_models import logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 200)  # of which an indexer leaves 32


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = sparse_model(family, **overrides)
    model = open_model(save_deepseek(tmp_path / "m", oracle))
    assert_same_logits(model, oracle, TOKENS)
    full = model.attending_to_all()
    assert_same_logits(full, sparse_model(family, **overrides | {"index_topk": 200}), TOKENS)
    assert relative_error(runner_logits(full, TOKENS), logits_of(oracle, TOKENS)) > 1e-3


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sizes", [[190, *[1] * 10], [50, 1, 1, 148]], ids=["steps", "pieces"])
def test_steps_and_pieces_of_a_text(family: str, overrides: dict[str, Any], sizes: list[int], tmp_path: Path) -> None:
    oracle = sparse_model(family, **overrides)
    model = open_model(save_deepseek(tmp_path / "m", oracle))
    assert relative_error(logits_in_pieces(model, TOKENS, sizes), logits_of(oracle, TOKENS)) < 1e-5


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_in_memory_names_give_the_same_logits(family: str, tmp_path: Path) -> None:
    oracle = sparse_model(family)
    assert_same_logits(open_model(save_deepseek(tmp_path / "m", oracle, in_memory_names=True)), oracle, TOKENS)


@pytest.mark.parametrize("encoding", ["fp8", "bf16"])
@pytest.mark.parametrize("name", ["DeepSeek V3.2 of odd widths", "GLM-5.2"])
def test_encodings_of_the_hub(name: str, encoding: str, tmp_path: Path) -> None:
    """With a block for drafting, which picks by an indexer of its own."""
    family, overrides = VARIANTS[name]
    oracle = save_published(tmp_path / "hub", sparse_model(family, seed=1, **overrides), encoding, drafts=True)
    model = open_model(tmp_path / "hub")
    (prediction,) = model.graph.predictions
    attention = prediction.layer.operations[0]
    assert isinstance(attention, LatentAttention) and attention.indexer
    assert_same_logits(model, oracle, TOKENS)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_padding_changes_no_result(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    narrow = {"hidden_size": 224, "moe_intermediate_size": 96, "intermediate_size": 80}
    oracle = sparse_model(family, **overrides | narrow)
    model = open_model(save_deepseek(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == 256
    assert_same_logits(padded, oracle, TOKENS)


@pytest.mark.slow
def test_context_of_4096(tmp_path: Path) -> None:
    """Of which an indexer leaves half."""
    oracle = sparse_model("glm_moe_dsa", index_topk=2048, num_hidden_layers=1, first_k_dense_replace=0)
    model = open_model(save_deepseek(tmp_path / "m", oracle))
    tokens = random_tokens(1, 4096)
    found = runner_logits(model, tokens)
    assert relative_error(found, logits_of(oracle, tokens)) < 1e-5
    full = model.attending_to_all()
    dropped = (runner_logits(full, tokens) - found)[0].norm(dim=-1) / found[0].norm(dim=-1)
    assert dropped[:2048].max() < 1e-5 and dropped[2048:].min() > 1e-4
