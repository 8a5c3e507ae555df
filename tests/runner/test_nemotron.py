"""Nemotron-H in the runner against transformers, in every encoding that NVIDIA publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt
import nemotron_checkpoints as nemotron
import pytest
import torch
from block_weights import context_of
from forward import assert_same_logits, random_tokens, relative_error
from moecast.archs.graph import Mamba2
from moecast.runner.blocks.mamba import MambaMixer, scan
from moecast.runner.weights import ModelWeights
from moecast.sources.model import open_model
from nemotron_checkpoints import DENSE, GROUPED, LATENT, WITH_DENSE_LAYER

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 80)


@pytest.mark.parametrize(
    "overrides",
    [{}, LATENT, LATENT | GROUPED, WITH_DENSE_LAYER, DENSE],
    ids=["full width", "latent", "groups", "dense layer", "dense"],
)
@pytest.mark.parametrize("in_memory_names", [False, True], ids=["Hub names", "in-memory names"])
def test_logits_equal_transformers(overrides: dict[str, Any], in_memory_names: bool, tmp_path: Path) -> None:
    oracle = nemotron.nemotron_model(**overrides)
    assert_same_logits(open_model(nemotron.save_nemotron(tmp_path / "m", oracle, in_memory_names)), oracle, TOKENS)


def test_prompt_of_several_scan_chunks(tmp_path: Path) -> None:
    oracle = nemotron.nemotron_model(seed=1)
    assert_same_logits(open_model(nemotron.save_nemotron(tmp_path / "m", oracle)), oracle, random_tokens(2, 300))


def test_old_spelling_and_missing_bias(tmp_path: Path) -> None:
    """A pattern string, no number of layers, bare Infinity, no bias in the convolution."""
    oracle = nemotron.nemotron_model(seed=2, use_conv_bias=False)
    folder = nemotron.save_nemotron(tmp_path / "m", oracle)
    pattern = oracle.config.hybrid_override_pattern
    nemotron.edit(
        folder,
        ("layers_block_type", "num_hidden_layers"),
        hybrid_override_pattern=pattern,
        time_step_limit=[0, float("inf")],
    )
    assert "Infinity" in (folder / "config.json").read_text()
    assert_same_logits(open_model(folder), oracle, TOKENS)


def mixed(module: str) -> modelopt.Encoding | None:
    """Everything at once, the mixture of the Super release and two encodings more."""
    if module.endswith(("q_proj", "k_proj", "v_proj")):
        return "fp8_rows"
    if "latent" in module:
        return "nvfp4_compressed"
    return modelopt.experts_in_nvfp4(module)


@pytest.mark.parametrize("encoding_of", [lambda module: "nvfp4" if "mixer" in module else None, mixed])
def test_quantized_checkpoints(encoding_of: Any, tmp_path: Path) -> None:
    """The oracle computes with the values that the codes stand for."""
    from transformers import NemotronHForCausalLM

    plain = nemotron.save_nemotron(tmp_path / "plain", nemotron.nemotron_model(seed=3, **LATENT))
    values = modelopt.rewrite(plain, tmp_path / "quantized", encoding_of)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    oracle = NemotronHForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    assert_same_logits(open_model(tmp_path / "quantized"), oracle, TOKENS)


@pytest.mark.parametrize("encoding", ["nvfp4", "nvfp4_compressed", "fp8", "fp8_rows"])
def test_rows_and_experts_are_those_of_the_whole(encoding: modelopt.Encoding, tmp_path: Path) -> None:
    plain = nemotron.save_nemotron(tmp_path / "plain", nemotron.nemotron_model(seed=4))
    values = modelopt.rewrite(plain, tmp_path / "m", lambda module: encoding if "mixer." in module else None)
    model = open_model(tmp_path / "m")
    for weight in model.graph.weights():
        if weight.name == "blk.0.ssm_in.weight":
            expected = values["backbone.layers.0.mixer.in_proj.weight"]
            assert torch.allclose(model.load(weight), expected, rtol=1e-6, atol=0)
            assert torch.equal(model.load(weight, None, (5, 70)), model.load(weight)[5:70])
        if weight.name == "blk.1.ffn_up_exps.weight":
            expected = values["backbone.layers.1.mixer.experts.3.up_proj.weight"]
            assert torch.allclose(model.load(weight, 3), expected, rtol=1e-6, atol=0)
            assert torch.equal(model.load(weight, 3, (1, 9)), model.load(weight, 3)[1:9])


def test_stepping_equals_chunks(tmp_path: Path) -> None:
    """One token at a time from the remembered state, and any split of the prompt, give what one pass gives."""
    model = open_model(nemotron.save_nemotron(tmp_path / "m", nemotron.nemotron_model(seed=5)))
    operation = next(op for op in model.graph.operations() if isinstance(op, Mamba2))
    mixer = MambaMixer(operation, ModelWeights(model))
    states = torch.randn(300, model.graph.hidden_size, generator=torch.Generator().manual_seed(0))
    context = context_of(torch.arange(300))  # a state space does not look at it
    whole, last = mixer(states, mixer.initial_state(), context)
    for sizes in ([1] * 300, [200, 1, 1, 98], [3, 297]):
        memory, parts = mixer.initial_state(), []
        for part in states.split(sizes):
            output, memory = mixer(part, memory, context)
            parts.append(output)
        assert relative_error(torch.cat(parts), whole) < 1e-5
        assert relative_error(memory.space, last.space) < 1e-5
        assert relative_error(memory.convolution, last.convolution) < 1e-5
        assert memory.space.dtype == torch.float32


def test_scan_is_the_recurrence() -> None:
    """Against the definition in float64, with states that vanish within a token and states that never fade."""
    generator = torch.Generator().manual_seed(0)
    tokens, heads, size, groups, state_size = 200, 4, 8, 2, 16
    x = torch.randn(tokens, heads, size, generator=generator)
    b, c = torch.randn(2, tokens, groups, state_size, generator=generator)
    step = torch.rand(tokens, heads, generator=generator)
    decay = torch.tensor([-1e-6, -0.1, -5.0, -300.0])
    space = torch.randn(heads, size, state_size, generator=generator)
    y, last = scan(x, step, decay, b, c, space)
    exact = space.double()
    for t in range(tokens):
        inputs = (step[t, :, None] * x[t]).double()[..., None] * b[t].repeat_interleave(2, 0).double()[:, None]
        exact = torch.exp(step[t].double() * decay)[:, None, None] * exact + inputs
        expected = (exact @ c[t].repeat_interleave(2, 0).double()[..., None])[..., 0]
        assert relative_error(y[t], expected) < 1e-5
    assert relative_error(last, exact) < 1e-5
