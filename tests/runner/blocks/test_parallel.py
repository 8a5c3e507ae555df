"""Branches that read the same norm and are added together, as in Cohere's models: against transformers, and in ONNX."""

from __future__ import annotations

from pathlib import Path

import onnx_models
import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Branch, Rope, SubLayer
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model
from toy_models import logits_of, tokens_of
from transformers import Cohere2Config, Cohere2ForCausalLM

HIDDEN, LAYERS, WINDOW, CAP = 96, 4, 24, 2.0


@pytest.fixture(scope="module")
def oracle() -> Cohere2ForCausalLM:
    """Three layers with a window and rotation, then one without either."""
    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=toys.VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        logit_scale=0.25,
        attn_implementation="eager",
        pad_token_id=0,
    )
    return toys.randomized(Cohere2ForCausalLM(config))


@pytest.fixture(scope="module")
def model(oracle: Cohere2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Model:
    toy = toys.toy_of(oracle, tmp_path_factory.mktemp("cohere"))

    def layer(index: int) -> SubLayer:
        norm = toy.norm(f"layers.{index}.input_layernorm.weight", 1e-5, centered=True)
        full = oracle.config.layer_types[index] == "full_attention"
        rope = None if full else Rope(16, oracle.config.rope_parameters["rope_theta"], interleaved=True)
        window = None if full else WINDOW
        attention = toys.attention(toy, f"layers.{index}.self_attn", (6, 2, 16), rope=rope, window=window)
        return SubLayer((Branch(norm, attention), Branch(norm, toy.mlp(f"layers.{index}.mlp"))))

    norm = toy.norm("norm.weight", 1e-5, centered=True)
    graph = toy.graph([(layer(index),) for index in range(LAYERS)], norm, logit_scale=0.25)
    return toy.model(graph)


def test_logits_equal_transformers(model: Model, oracle: Cohere2ForCausalLM) -> None:
    assert {"full_attention", "sliding_attention"} == {*oracle.config.layer_types}
    tokens = tokens_of(4 * WINDOW)
    assert relative_error(runner_logits(model, tokens), logits_of(oracle, tokens)) < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 40, [30, 1, 1, 64], [96]])
def test_pieces_equal_the_whole(model: Model, oracle: Cohere2ForCausalLM, sizes: list[int]) -> None:
    tokens = tokens_of(sum(sizes), seed=1)
    assert relative_error(toys.logits_in_pieces(model, tokens, sizes), logits_of(oracle, tokens)) < 1e-5


def test_a_shared_norm_is_one_weight(model: Model) -> None:
    names = [weight.name for weight in model.graph.weights()]
    assert len(names) == len({*names}) == 2 + 1 + LAYERS * (1 + 4 + 3)


def test_onnx(model: Model, oracle: Cohere2ForCausalLM, tmp_path: Path) -> None:
    engine = toys.onnx_of(model, tmp_path / "onnx")
    tokens = tokens_of(3 * WINDOW, seed=2)
    for pieces in (None, 7):
        found = onnx_models.onnx_logits(engine, tokens[0], pieces)
        assert relative_error(found, logits_of(oracle, tokens)[0]) < 1e-5


def test_padding_leaves_a_hidden_size_whose_mean_is_removed(model: Model, oracle: Cohere2ForCausalLM) -> None:
    padded = pad(model.graph, 80)
    assert padded.hidden_size == HIDDEN
    assert {w.columns for w in padded.weights() if w.name.endswith("down_proj.weight")} == {160}
    tokens = tokens_of(40, seed=3)
    found = runner_logits(Model(model.path, model.architecture, padded, (), {}), tokens)
    assert relative_error(found, logits_of(oracle, tokens)) < 1e-5
