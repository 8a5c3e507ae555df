"""Gemma 4 in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gemma4_checkpoints as gemma
import pytest
import torch
from forward import assert_same_logits, random_tokens, relative_error
from gemma4_checkpoints import BEYOND_LLAMA, KINDS, VARIANTS
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from toy_models import logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(3, 80)
ALL = VARIANTS | BEYOND_LLAMA


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
def test_logits_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    oracle = gemma.gemma_model(**settings)
    assert_same_logits(open_model(gemma.save_gemma(tmp_path / "m", oracle)), oracle, TOKENS)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_published_form(settings: dict[str, Any], tmp_path: Path) -> None:
    """Stored BF16 is exact in float32: the oracle computes in float32 with the rounded weights."""
    oracle = gemma.gemma_model(seed=2, **settings)
    with torch.no_grad():
        for tensor in (*oracle.parameters(), *(t for name, t in oracle.named_buffers() if "layer_scalar" in name)):
            tensor.copy_(tensor.bfloat16())
    model = open_model(gemma.publish_gemma(tmp_path / "m", oracle, settings))
    assert_same_logits(model, oracle, TOKENS)
    notes = ["left out what sees and hears, 2 tensors: text alone is understood"]
    if settings.get("num_kv_shared_layers"):
        notes.append("left out 9 tensors of keys and values in layers that use those of others")
    assert [*model.graph.notes] == notes


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("sizes", [[1] * 44, [36, 1, 1, 6]], ids=["steps", "pieces"])
def test_steps_and_pieces_of_a_text(settings: dict[str, Any], sizes: list[int], tmp_path: Path) -> None:
    oracle = gemma.gemma_model(**settings)
    model = open_model(gemma.save_gemma(tmp_path / "m", oracle))
    tokens = random_tokens(1, 44)  # windows end after 32
    assert relative_error(logits_in_pieces(model, tokens, sizes), logits_of(oracle, tokens)) < 1e-5


@pytest.mark.parametrize("settings", [VARIANTS["odd widths"], gemma.PER_LAYER], ids=["mixture", "per layer"])
def test_padding_changes_no_result(settings: dict[str, Any], tmp_path: Path) -> None:
    """The hidden size stays: the embedding is the head."""
    oracle = gemma.gemma_model(**settings)
    model = open_model(gemma.save_gemma(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 256), (), {})
    assert {weight.columns for weight in padded.graph.weights() if "ffn_down" in weight.name} >= {512}
    assert padded.graph.hidden_size == model.graph.hidden_size
    assert_same_logits(padded, oracle, TOKENS)
