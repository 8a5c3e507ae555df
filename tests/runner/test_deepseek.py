"""DeepSeek V4 in the runner: transformers' logits over more tokens than the window, compressors and indexer need."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import deepseek_checkpoints
import pytest
import torch
from forward import assert_same_logits, random_tokens, relative_error, runner_logits
from moecast.runner.stream import Cache, Stream
from moecast.sources.model import Model, open_model
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

pytestmark = pytest.mark.numeric

TOKENS = 400  # three entries of 128, a hundred of 4 of which the indexer leaves 16


@pytest.fixture(scope="module")
def oracle() -> DeepseekV4ForCausalLM:
    return deepseek_checkpoints.deepseek_model()


@pytest.fixture(scope="module")
def model(oracle: DeepseekV4ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(deepseek_checkpoints.save_deepseek(tmp_path_factory.mktemp("deepseek"), oracle))


def test_logits_equal_transformers(model: Model, oracle: DeepseekV4ForCausalLM) -> None:
    assert_same_logits(model, oracle, random_tokens(2, TOKENS))


def test_in_memory_names_give_the_same_logits(oracle: DeepseekV4ForCausalLM, tmp_path: Path) -> None:
    folder = deepseek_checkpoints.save_deepseek(tmp_path / "memory", oracle, in_memory_names=True)
    assert_same_logits(open_model(folder), oracle, random_tokens(1, TOKENS))


@pytest.mark.parametrize(
    ("experts", "scale"), [("mxfp4", 1.0), ("fp8", 1.0), ("fp8", 1.37)], ids=["Flash", "FP8", "Base"]
)
def test_encodings_of_the_hub(experts: str, scale: float, tmp_path: Path) -> None:
    """FP4 experts as Flash and Pro have them, FP8 experts, and Base's FP8 with float32 scales."""
    oracle = deepseek_checkpoints.save_deepseek_hub(
        tmp_path / "hub", deepseek_checkpoints.deepseek_model(seed=1), experts, scale
    )
    assert_same_logits(open_model(tmp_path / "hub"), oracle, random_tokens(1, TOKENS))


def _in_pieces(model: Model, tokens: Tensor, cuts: list[int]) -> Iterator[Tensor]:
    cache = Cache()
    for start, stop in pairwise(cuts):
        stream = Stream(model, tokens[:, start:stop], cache)
        for layer in model.graph.layers:
            stream.advance(layer)
        states = stream.final_states(slice(None))
        logits = stream.logits(states)
        yield logits.view(*stream.tokens.shape, -1)


@pytest.mark.parametrize(
    "cuts", [[0, 1, 63, 130, 131, 259, 300, TOKENS], [0, 3, 125, *range(126, 142)]], ids=["pieces", "steps"]
)
def test_pieces_equal_the_whole(model: Model, oracle: DeepseekV4ForCausalLM, cuts: list[int]) -> None:
    """Cuts within windows of both ratios, and single steps across the end of one."""
    tokens = random_tokens(2, TOKENS)[:, : cuts[-1]]
    with torch.no_grad():
        expected = oracle(tokens).logits
    assert relative_error(torch.cat(list(_in_pieces(model, tokens, cuts)), dim=1), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index_topk", {"index_topk": 99}), ("window", {"sliding_window": 60}), ("yarn", {"rope_scaling": None}),
        ("sinkhorn", {"hc_sinkhorn_iters": 3}), ("clamp", {"swiglu_limit": 2.0}),
    ],
)  # fmt: skip
def test_every_setting_matters(name: str, change: dict[str, object], model: Model) -> None:
    """The oracle with one setting changed is far from us: the comparison above would notice."""
    tokens = random_tokens(1, TOKENS)
    with torch.no_grad():
        expected = deepseek_checkpoints.deepseek_model(**change)(tokens).logits
    assert relative_error(runner_logits(model, tokens), expected) > 1e-3


def test_full_attention_is_that_of_a_model_that_chooses_all(model: Model) -> None:
    """The oracle's indexer may take all hundred entries; the model without one needs none of its weights."""
    tokens = random_tokens(1, TOKENS)
    full = model.attending_to_all()
    names = {weight.name for weight in full.graph.weights()}
    assert {weight.name for weight in model.graph.weights()} - names and not any("indexer" in name for name in names)
    assert_same_logits(full, deepseek_checkpoints.deepseek_model(index_topk=100), tokens)
    assert relative_error(runner_logits(full, tokens), runner_logits(model, tokens)) > 1e-3
