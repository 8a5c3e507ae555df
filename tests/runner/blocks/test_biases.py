"""Biases of attention's projections: against Qwen2-MoE in transformers, and in ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_models
import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Rope, SubLayer, sequential
from moecast.archs.weights import Role
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model
from toy_models import logits_of, tokens_of
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

LAYERS, TOP_K = 2, 3


@pytest.fixture(scope="module")
def oracle() -> Qwen2MoeForCausalLM:
    """Transformers gives queries, keys and values a bias, and the output one when it is put there."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=toys.VOCABULARY,
        hidden_size=96,
        moe_intermediate_size=80,
        shared_expert_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_experts=12,
        num_experts_per_tok=TOP_K,
    )
    model = Qwen2MoeForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.empty(96))
    return toys.randomized(model)


@pytest.fixture(scope="module")
def model(oracle: Qwen2MoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Model:
    toy = toys.toy_of(oracle, tmp_path_factory.mktemp("qwen"))

    def layer(index: int) -> tuple[SubLayer, ...]:
        prefix = f"layers.{index}"
        named = {"query": "q", "key": "k", "value": "v", "output": "o"}
        attention = toys.attention(
            toy,
            f"{prefix}.self_attn",
            (6, 2, 16),
            rope=Rope(16, oracle.config.rope_parameters["rope_theta"]),
            **{f"{k}_bias": toy.weight(f"{prefix}.self_attn.{n}_proj.bias", Role.BIAS) for k, n in named.items()},
        )
        experts = replace(
            toys.mixture(toy, f"{prefix}.mlp", TOP_K, normalize=oracle.config.norm_topk_prob),
            shared=toy.mlp(f"{prefix}.mlp.shared_expert", "SHARED"),
            shared_gate=toy.weight(f"{prefix}.mlp.shared_expert_gate.weight", Role.SHARED_ROUTER),
        )
        return (
            sequential(toy.norm(f"{prefix}.input_layernorm.weight"), attention),
            sequential(toy.norm(f"{prefix}.post_attention_layernorm.weight"), experts),
        )

    return toy.model(toy.graph([layer(index) for index in range(LAYERS)], toy.norm("norm.weight")))


def test_logits_equal_transformers(model: Model, oracle: Qwen2MoeForCausalLM) -> None:
    tokens = tokens_of(50)
    expected = logits_of(oracle, tokens)
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    padded = pad(model.graph, 128)
    assert padded.hidden_size == 128
    found = runner_logits(Model(model.path, model.architecture, padded, (), {}), tokens)
    assert relative_error(found, expected) < 1e-5


def test_onnx(model: Model, oracle: Qwen2MoeForCausalLM, tmp_path: Path) -> None:
    tokens = tokens_of(40, seed=1)
    engine = toys.onnx_of(model, tmp_path / "onnx")
    assert relative_error(onnx_models.onnx_logits(engine, tokens[0], 9), logits_of(oracle, tokens)[0]) < 1e-5
