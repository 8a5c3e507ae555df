"""MiniMax M3 in the runner against transformers: every variant, in every form that checkpoints come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import minimax_m3_checkpoints as m3
import modelopt
import pytest
from forward import assert_same_logits, random_tokens, relative_error, runner_logits
from minimax_m3_checkpoints import BEYOND_LLAMA, VARIANTS
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from toy_models import logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 150)
ALL = VARIANTS | BEYOND_LLAMA


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_logits_equal_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = m3.minimax_m3_model(**overrides)
    assert_same_logits(open_model(m3.save_minimax_m3(tmp_path / "m", oracle)), oracle, TOKENS)


@pytest.mark.parametrize("in_memory_names", [False, True], ids=["published", "in memory"])
def test_beside_a_vision_tower(in_memory_names: bool, tmp_path: Path) -> None:
    oracle = m3.minimax_m3_model()
    folder = m3.save_minimax_m3(tmp_path / "m", m3.with_vision_tower(oracle), in_memory_names)
    model = open_model(folder)
    assert sum("tensors of the vision tower are left out" in note for note in model.graph.notes) == 1
    assert_same_logits(model, oracle, TOKENS)


@pytest.mark.parametrize("flattened", [False, True], ids=["nested", "flattened"])
def test_published_names_of_keys(flattened: bool, tmp_path: Path) -> None:
    oracle = m3.minimax_m3_model()
    assert_same_logits(open_model(m3.save_published(tmp_path / "m", oracle, flattened)), oracle, TOKENS)


@pytest.mark.parametrize("encodings", [("nvfp4", "mxfp8"), ("mxfp8_inverse", "mxfp8_inverse")])
def test_quantized_releases(encodings: tuple[modelopt.Encoding, ...], tmp_path: Path) -> None:
    oracle = m3.save_quantized(tmp_path / "m", m3.minimax_m3_model(hidden_size=160), encodings)
    assert_same_logits(open_model(tmp_path / "m"), oracle, TOKENS)


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_pieces_of_a_text(overrides: dict[str, Any], tmp_path: Path) -> None:
    _assert_same_in_pieces([100, 1, 1, 48], overrides, tmp_path)


def test_steps_of_a_text(tmp_path: Path) -> None:
    """Over the beginning of a block."""
    _assert_same_in_pieces([90, *[1] * 16, 44], {}, tmp_path)


def _assert_same_in_pieces(sizes: list[int], overrides: dict[str, Any], folder: Path) -> None:
    oracle = m3.minimax_m3_model(**overrides)
    model = open_model(m3.save_minimax_m3(folder / "m", oracle))
    assert relative_error(logits_in_pieces(model, TOKENS, sizes), logits_of(oracle, TOKENS)) < 1e-5


def test_selection_makes_a_difference(tmp_path: Path) -> None:
    """With room for all blocks of these texts it is another model: the one without selection."""
    model = open_model(m3.save_minimax_m3(tmp_path / "m", m3.minimax_m3_model()))
    everything = logits_of(m3.minimax_m3_model(index_topk_blocks=10), TOKENS)
    assert relative_error(runner_logits(model, TOKENS), everything) > 1e-2
    assert relative_error(runner_logits(model.attending_to_all(), TOKENS), everything) < 1e-5


@pytest.mark.slow
def test_thousands_of_tokens(tmp_path: Path) -> None:
    """Blocks as large and as many as published: 2,048 of 4,200 tokens are looked at."""
    kinds = {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "minimax_m3_sparse"]}
    oracle = m3.minimax_m3_model(index_block_size=128, index_topk_blocks=16, num_hidden_layers=2, **kinds)
    model, tokens = open_model(m3.save_minimax_m3(tmp_path / "m", oracle)), random_tokens(1, 4200)
    expected = logits_of(oracle, tokens)
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    assert relative_error(runner_logits(model.attending_to_all(), tokens), expected) > 1e-3


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_padding_changes_no_result(overrides: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 224, "intermediate_size": 96, "dense_intermediate_size": 80}
    oracle = m3.minimax_m3_model(**{**overrides, **sizes, "shared_intermediate_size": 96})
    model = open_model(m3.save_minimax_m3(tmp_path / "m", oracle))
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == 256
    assert_same_logits(padded, oracle, TOKENS)
