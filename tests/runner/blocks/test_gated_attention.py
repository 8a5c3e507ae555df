"""Attention whose heads are gated: against Qwen3.5's full attention in transformers, and in ONNX."""

from __future__ import annotations

from pathlib import Path

import onnx_models
import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Rope, SubLayer, sequential
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model
from toy_models import logits_in_pieces, logits_of, tokens_of
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

LAYERS, HEADS, SIZE = 2, (6, 2, 16), 16


@pytest.fixture(scope="module")
def oracle() -> Qwen3_5ForCausalLM:
    """Layers of full attention alone, whose norms are stored as the distance from one."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=toys.VOCABULARY,
        hidden_size=96,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        num_attention_heads=HEADS[0],
        num_key_value_heads=HEADS[1],
        head_dim=SIZE,
    )
    return toys.randomized(Qwen3_5ForCausalLM(config))


@pytest.fixture(scope="module")
def model(oracle: Qwen3_5ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Model:
    toy = toys.toy_of(oracle, tmp_path_factory.mktemp("qwen"))

    def layer(index: int) -> tuple[SubLayer, ...]:
        prefix = f"layers.{index}"
        attention = toys.attention(
            toy,
            f"{prefix}.self_attn",
            HEADS,
            query_norm=toy.norm_around_one(f"{prefix}.self_attn.q_norm.weight"),
            key_norm=toy.norm_around_one(f"{prefix}.self_attn.k_norm.weight"),
            rope=Rope(SIZE // 4, oracle.config.rope_parameters["rope_theta"]),
            gated=True,
        )
        return (
            sequential(toy.norm_around_one(f"{prefix}.input_layernorm.weight"), attention),
            sequential(toy.norm_around_one(f"{prefix}.post_attention_layernorm.weight"), toy.mlp(f"{prefix}.mlp")),
        )

    return toy.model(toy.graph([layer(index) for index in range(LAYERS)], toy.norm_around_one("norm.weight")))


def test_logits_equal_transformers(model: Model, oracle: Qwen3_5ForCausalLM) -> None:
    tokens = tokens_of(50)
    expected = logits_of(oracle, tokens)
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    assert relative_error(logits_in_pieces(model, tokens, [20, 1, 29]), expected) < 1e-5
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert relative_error(runner_logits(padded, tokens), expected) < 1e-5


def test_onnx(model: Model, oracle: Qwen3_5ForCausalLM, tmp_path: Path) -> None:
    tokens = tokens_of(40, seed=1)
    engine = toys.onnx_of(model, tmp_path / "onnx")
    assert relative_error(onnx_models.onnx_logits(engine, tokens[0], 9), logits_of(oracle, tokens)[0]) < 1e-5
