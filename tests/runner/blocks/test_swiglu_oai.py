"""The SwiGLU of gpt-oss in a dense layer, against its formula, and in ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Activation, sequential
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model
from onnx_models import onnx_logits
from torch import Tensor
from torch.nn import functional

SIZE, INNER = 96, 80


@pytest.fixture(scope="module", params=[None, 1.5], ids=["open", "clamped"])
def clamp(request: pytest.FixtureRequest) -> float | None:
    return request.param


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> toys.Toy:
    inputs = {f"mlp.{name}_proj.weight": (INNER, SIZE) for name in ("gate", "up")}
    shapes = inputs | {"embedding": (toys.VOCABULARY, SIZE), "head": (toys.VOCABULARY, SIZE)}
    shapes |= {"mlp.down_proj.weight": (SIZE, INNER), "norm": (SIZE,), "before": (SIZE,)}
    return toys.Toy(tmp_path_factory.mktemp("dense"), toys.random_tensors(0, shapes))


@pytest.fixture(scope="module")
def model(toy: toys.Toy, clamp: float | None) -> Model:
    layer = replace(toy.mlp("mlp"), activation=Activation.SWIGLU_OAI, clamp=clamp)
    return toy.model(toy.graph([(sequential(toy.norm("before"), layer),)], toy.norm("norm")))


def expected(toy: toys.Toy, tokens: Tensor, clamp: float | None) -> Tensor:
    def normed(states: Tensor, name: str) -> Tensor:
        return functional.rms_norm(states, (SIZE,), toy[name], 1e-6)

    states = toy["embedding"][tokens]
    gate, up = (normed(states, "before") @ toy[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    states = states + (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ toy["mlp.down_proj.weight"].T
    return normed(states, "norm") @ toy["head"].T


def test_formula(toy: toys.Toy, model: Model, clamp: float | None) -> None:
    tokens = toys.tokens_of(30)
    assert relative_error(runner_logits(model, tokens), expected(toy, tokens, clamp)) < 1e-5
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.layers[0].operations[0].up.shape == (128, 128)
    assert relative_error(runner_logits(padded, tokens), expected(toy, tokens, clamp)) < 1e-5


def test_onnx(toy: toys.Toy, model: Model, clamp: float | None, tmp_path: Path) -> None:
    tokens = toys.tokens_of(30)
    engine = toys.onnx_of(model, tmp_path / "onnx")
    assert relative_error(onnx_logits(engine, tokens[0]), expected(toy, tokens, clamp)[0]) < 1e-5
