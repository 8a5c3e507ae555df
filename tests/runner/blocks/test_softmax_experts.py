"""Experts chosen by a softmax, and norms a head wide: against Qwen3-MoE in transformers, and in ONNX."""

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
from toy_models import logits_of, tokens_of
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, TOP_K = 2, 3


def _oracle(normalized: bool) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=toys.VOCABULARY,
        hidden_size=96,
        intermediate_size=128,
        moe_intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=12,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=normalized,
    )
    return toys.randomized(Qwen3MoeForCausalLM(config))


def _model(oracle: Qwen3MoeForCausalLM, folder: Path) -> Model:
    toy, config = toys.toy_of(oracle, folder), oracle.config

    def layer(index: int) -> tuple[SubLayer, ...]:
        prefix = f"layers.{index}"
        attention = toys.attention(
            toy,
            f"{prefix}.self_attn",
            (6, 2, 32),
            query_norm=toy.norm(f"{prefix}.self_attn.q_norm.weight"),
            key_norm=toy.norm(f"{prefix}.self_attn.k_norm.weight"),
            rope=Rope(32, config.rope_parameters["rope_theta"]),
        )
        experts = toys.mixture(toy, f"{prefix}.mlp", TOP_K, normalize=config.norm_topk_prob)
        return (
            sequential(toy.norm(f"{prefix}.input_layernorm.weight"), attention),
            sequential(toy.norm(f"{prefix}.post_attention_layernorm.weight"), experts),
        )

    return toy.model(toy.graph([layer(index) for index in range(LAYERS)], toy.norm("norm.weight")))


@pytest.mark.parametrize("normalized", [True, False])
def test_logits_equal_transformers(normalized: bool, tmp_path: Path) -> None:
    oracle = _oracle(normalized)
    model, tokens = _model(oracle, tmp_path), tokens_of(50)
    expected = logits_of(oracle, tokens)
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    padded = pad(model.graph, 128)
    assert padded.hidden_size == 128
    found = runner_logits(Model(model.path, model.architecture, padded, (), {}), tokens)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("normalized", [True, False])
def test_onnx(normalized: bool, tmp_path: Path) -> None:
    oracle, tokens = _oracle(normalized), tokens_of(40, seed=1)
    engine = toys.onnx_of(_model(oracle, tmp_path / "toy"), tmp_path / "onnx")
    assert relative_error(onnx_models.onnx_logits(engine, tokens[0], 9), logits_of(oracle, tokens)[0]) < 1e-5
