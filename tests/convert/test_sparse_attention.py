"""DeepSeek V3.2 and GLM-5 in llama.cpp: transformers' numbers, where indexers drop most of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama
import pytest
from conversions import convert
from deepseek_v3_checkpoints import save_deepseek
from forward import random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.sources.model import open_model
from sparse_checkpoints import VARIANTS, sparse_model
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 200)  # of which an indexer leaves 32
UNQUANTIZED = 1e-8
ROUNDED = 1e-3  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = sparse_model(family, **overrides)
    path = unquantized(save_deepseek(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    d = llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs)
    print("KLD", d)
    assert d < UNQUANTIZED


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_file_read_back_is_the_same_model(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = save_deepseek(tmp_path / "model", sparse_model(family, **overrides))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    assert source.graph.shared_states() == written.graph.shared_states()
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-6


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, family: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded."""
    folder = save_deepseek(tmp_path / "model", sparse_model(family, hidden_size=192, moe_intermediate_size=160))
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert open_model(result.files[0]).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    d = divergence(result.files[0], TOKENS)
    print("KLD", d)
    assert d < ROUNDED


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_text_goes_on_as_in_llama(family: str, tmp_path: Path) -> None:
    assert_goes_on_alike(save_deepseek(tmp_path / "model", sparse_model(family)), tmp_path)
