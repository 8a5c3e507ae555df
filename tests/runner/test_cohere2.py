"""Cohere2 and Cohere2-MoE in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cohere_checkpoints as cohere
import modelopt
import pytest
import torch
from cohere_checkpoints import DENSE_BEYOND_LLAMA, DENSE_VARIANTS, MIXTURE_BEYOND_LLAMA, MIXTURE_VARIANTS, NORTH
from forward import assert_same_logits, random_tokens, relative_error
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from nemotron_checkpoints import edit
from toy_models import STEPS_AND_PIECES, logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 80)  # windows are of 24
DENSE, MIXTURES = DENSE_VARIANTS | DENSE_BEYOND_LLAMA, MIXTURE_VARIANTS | MIXTURE_BEYOND_LLAMA
ALL = [(False, changes) for changes in DENSE.values()] + [(True, changes) for changes in MIXTURES.values()]
IDS = [*(f"dense, {name}" for name in DENSE), *MIXTURES]


@pytest.mark.parametrize(("mixture", "overrides"), ALL, ids=IDS)
def test_logits_equal_transformers(mixture: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = cohere.cohere_model(mixture, **overrides)
    assert_same_logits(open_model(cohere.save_cohere(tmp_path / "m", oracle)), oracle, TOKENS)


@pytest.mark.parametrize(("mixture", "overrides"), ALL, ids=IDS)
def test_steps_and_pieces_of_a_text(mixture: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = cohere.cohere_model(mixture, **overrides)
    model = open_model(cohere.save_cohere(tmp_path / "m", oracle))
    assert relative_error(logits_in_pieces(model, TOKENS, STEPS_AND_PIECES), logits_of(oracle, TOKENS)) < 1e-5


@pytest.mark.parametrize(("mixture", "overrides"), ALL, ids=IDS)
def test_padding_changes_no_result(mixture: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Inner widths alone: means are removed, or the embedding is the head."""
    oracle = cohere.cohere_model(mixture, **overrides | {"intermediate_size": 96})
    model = open_model(cohere.save_cohere(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == model.graph.hidden_size and padded.graph != model.graph
    assert_same_logits(padded, oracle, TOKENS)


def test_a_hidden_size_grows_without_either(tmp_path: Path) -> None:
    oracle = cohere.cohere_model(True, hidden_size=224, rms_norm_eps=1e-6, tie_word_embeddings=False)
    model = open_model(cohere.save_cohere(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == 256
    assert_same_logits(padded, oracle, TOKENS)


@pytest.mark.parametrize("overrides", [{}, NORTH], ids=["A+", "North"])
def test_in_memory_names_give_the_same_logits(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = cohere.cohere_model(True, **overrides)
    assert_same_logits(open_model(cohere.save_cohere(tmp_path / "m", oracle, in_memory_names=True)), oracle, TOKENS)


def test_as_the_hub_has_it(tmp_path: Path) -> None:
    """BF16 is exact in float32: the oracle computes with the rounded weights."""
    oracle = cohere.cohere_model(False, seed=1)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.bfloat16())
    assert_same_logits(open_model(cohere.publish_cohere2(tmp_path / "m", oracle)), oracle, TOKENS)


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "experts"])
def test_beside_a_tower_for_pictures(mixture: bool, tmp_path: Path) -> None:
    model = cohere.pictured(mixture)
    opened = open_model(cohere.save_cohere(tmp_path / "m", model))
    assert opened.architecture.name == ("cohere2moe" if mixture else "cohere2")
    assert opened.graph.notes == ("left out the vision tower, 52 tensors: text alone is understood",)
    assert_same_logits(opened, cohere.language_model(model), TOKENS)


@pytest.mark.parametrize("encoding", ["nvfp4", "nvfp4_compressed", "fp8", "fp8_rows"])
def test_quantized_checkpoint(encoding: modelopt.Encoding, tmp_path: Path) -> None:
    """The oracle computes with the values that the codes stand for."""
    from transformers import Cohere2MoeForCausalLM

    plain = cohere.save_cohere(tmp_path / "plain", cohere.cohere_model(True, seed=2))
    wanted = ".experts." if encoding.startswith("nvfp4") else "_proj"
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: encoding if wanted in name else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    oracle = Cohere2MoeForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    assert_same_logits(open_model(tmp_path / "quantized"), oracle, TOKENS)


def test_a_repeated_head_is_left_out(tmp_path: Path) -> None:
    """Some tools store it although the configuration says that the embedding serves; so does transformers read it."""
    oracle = cohere.cohere_model(False, tie_word_embeddings=False)
    folder = cohere.save_cohere(tmp_path / "m", oracle)
    edit(folder, tie_word_embeddings=True)
    oracle.lm_head.weight = oracle.model.embed_tokens.weight
    model = open_model(folder)
    assert model.graph.notes == ("left out lm_head.weight: the configuration says that the embedding is the head",)
    assert_same_logits(model, oracle, TOKENS)
