"""Norms of what is added, with and without norms of what is read: against OLMo 2 in transformers, and formulas."""

from __future__ import annotations

from pathlib import Path

import onnx_models
import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Branch, Rope, SubLayer
from moecast.archs.weights import Role
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model
from torch import Tensor
from toy_models import logits_of, tokens_of
from transformers import Olmo2Config, Olmo2ForCausalLM

LAYERS, EPSILON = 2, 1e-6


@pytest.fixture(scope="module")
def oracle() -> Olmo2ForCausalLM:
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=toys.VOCABULARY,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=EPSILON,
        pad_token_id=0,
    )
    return toys.randomized(Olmo2ForCausalLM(config))


@pytest.fixture(scope="module")
def model(oracle: Olmo2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Model:
    toy = toys.toy_of(oracle, tmp_path_factory.mktemp("olmo"))

    def layer(index: int) -> tuple[SubLayer, ...]:
        prefix = f"layers.{index}"
        attention = toys.attention(
            toy,
            f"{prefix}.self_attn",
            (6, 2, 16),
            query_norm=toy.norm(f"{prefix}.self_attn.q_norm.weight", EPSILON),
            key_norm=toy.norm(f"{prefix}.self_attn.k_norm.weight", EPSILON),
            rope=Rope(16, oracle.config.rope_parameters["rope_theta"]),
        )
        after = [toy.norm(f"{prefix}.post_{name}_layernorm.weight", EPSILON) for name in ("attention", "feedforward")]
        return (
            SubLayer((Branch(None, attention, after[0]),)),
            SubLayer((Branch(None, toy.mlp(f"{prefix}.mlp")),), post_norm=after[1]),
        )

    return toy.model(toy.graph([layer(index) for index in range(LAYERS)], toy.norm("norm.weight", EPSILON)))


def test_logits_equal_transformers(model: Model, oracle: Olmo2ForCausalLM) -> None:
    tokens = tokens_of(60)
    assert relative_error(runner_logits(model, tokens), logits_of(oracle, tokens)) < 1e-5


def test_padding_changes_no_result(model: Model, oracle: Olmo2ForCausalLM) -> None:
    """Neither where a residual is read without a norm, nor where what is added is normed."""
    padded = pad(model.graph, 128)
    assert padded.hidden_size == 128
    tokens = tokens_of(60, seed=1)
    found = runner_logits(Model(model.path, model.architecture, padded, (), {}), tokens)
    assert relative_error(found, logits_of(oracle, tokens)) < 1e-5


def test_onnx(model: Model, oracle: Olmo2ForCausalLM, tmp_path: Path) -> None:
    tokens = tokens_of(40, seed=2)
    found = onnx_models.onnx_logits(toys.onnx_of(model, tmp_path / "onnx"), tokens[0])
    assert relative_error(found, logits_of(oracle, tokens)[0]) < 1e-5


def _rms(states: Tensor, weight: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + EPSILON) * weight


@pytest.mark.parametrize("scale", [0.7, "scale"])
def test_scales_and_soft_cap(scale: float | str, tmp_path: Path) -> None:
    """Of the embedding, of what leaves a sublayer, and of the logits; by the formula, in the runner and in ONNX."""
    shapes = dict.fromkeys(("embedding", "head"), (toys.VOCABULARY, 96))
    shapes |= {"mlp.gate_proj.weight": (64, 96), "mlp.up_proj.weight": (64, 96), "mlp.down_proj.weight": (96, 64)}
    shapes |= {"before": (96,), "after": (96,), "last": (96,), "scale": (1,)}
    toy = toys.Toy(tmp_path / "toy", toys.random_tensors(0, shapes))
    factor = toy.weight("scale", Role.SCALE) if isinstance(scale, str) else scale
    sublayer = SubLayer((Branch(toy.norm("before"), toy.mlp("mlp"), toy.norm("after")),), scale=factor)
    facts = {"embedding_scale": 96**0.5, "logit_scale": 3.0, "logit_softcap": 2.0}
    model = toy.model(toy.graph([(sublayer,)], toy.norm("last"), **facts))
    tokens = tokens_of(20)
    x = 96**0.5 * toy["embedding"][tokens]
    read = _rms(x, toy["before"])
    inner = torch.nn.functional.silu(read @ toy["mlp.gate_proj.weight"].T) * (read @ toy["mlp.up_proj.weight"].T)
    x = (x + _rms(inner @ toy["mlp.down_proj.weight"].T, toy["after"])) * (
        toy[scale] if isinstance(scale, str) else scale
    )
    expected = 2 * torch.tanh(3 * (_rms(x, toy["last"]) @ toy["head"].T) / 2)
    assert expected.abs().max() > 1.9 and relative_error(runner_logits(model, tokens), expected) < 1e-5
    padded = pad(model.graph, 128)
    found = runner_logits(Model(model.path, model.architecture, padded, (), {}), tokens)
    assert relative_error(found, expected) < 1e-5
    engine = toys.onnx_of(model, tmp_path / "onnx")
    assert relative_error(onnx_models.onnx_logits(engine, tokens[0]), expected[0]) < 1e-5
