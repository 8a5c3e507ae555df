"""Qwen3-Next and Qwen3.5 in ONNX Runtime and onnxruntime-genai: the numbers of transformers, of every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deltanet_checkpoints as deltanet
import modelopt
import numpy as np
import onnxruntime_genai
import pytest
import torch
from conversions import convert
from deltanet_checkpoints import BEYOND_LLAMA, FAMILIES, VARIANTS
from forward import random_tokens, relative_error, runner_logits
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)
ALL = VARIANTS | BEYOND_LLAMA
EXACT, ROUNDED = 1e-5, 4e-2  # relative errors of logits: float32 activations, and activations of 8 bits


def in_full(checkpoint: Path, output: Path) -> OnnxModel:
    """A checkpoint as ONNX, all of it in float32."""
    settings: dict[str, Any] = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    result = convert(checkpoint, output, "F32", calibration=None, **settings)
    return OnnxModel(result.files[0].parent, threads=1)


def assert_same(engine: OnnxModel, oracle: Any, *pieces: int | None) -> None:
    """Fed so many tokens at a time, None for all at once."""
    expected = logits_of(oracle, TOKENS)[0]
    assert [n for n in pieces if relative_error(onnx_logits(engine, TOKENS[0], n), expected) >= EXACT] == []


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_is_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = deltanet.model_of(family, **overrides)
    steps = () if overrides else (1,)  # they cost most
    assert_same(in_full(deltanet.save(tmp_path / "model", oracle), tmp_path), oracle, None, 7, *steps)


def test_shares_as_they_are(tmp_path: Path) -> None:
    oracle = deltanet.model_of("qwen3_next", norm_topk_prob=False)
    assert_same(in_full(deltanet.save(tmp_path / "model", oracle), tmp_path), oracle, None)


@pytest.mark.parametrize("fp8", [False, True], ids=["experts fused", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_form(family: str, fp8: bool, tmp_path: Path) -> None:
    """Without its drafting block."""
    oracle = deltanet.model_of(family)
    assert_same(in_full(deltanet.save_published(tmp_path / "model", oracle, fp8=fp8), tmp_path), oracle, None, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_nvfp4(family: str, tmp_path: Path) -> None:
    """Its values, of heads in another order. The oracle computes with what the codes stand for."""
    import transformers

    oracle = deltanet.model_of(family, seed=3)
    plain = deltanet.save(tmp_path / "plain", oracle)
    encoded = ("_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z", "lm_head")
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: "nvfp4" if name.endswith(encoded) else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    kind = getattr(transformers, type(oracle).__name__)
    oracle = kind.from_pretrained(exact, dtype=torch.float32).eval()
    assert_same(in_full(tmp_path / "quantized", tmp_path), oracle, None)


@pytest.mark.parametrize(("quant", "activations", "tolerance"), [
    ("Q4_0", "float32", EXACT), ("Q3_K_S", "float32", EXACT), ("Q4_0", "int8", ROUNDED), ("Q8_0", "int8", ROUNDED),
    ("Q2_0", "int8", ROUNDED),
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers_as_the_gguf_of_its_plan(
    family: str, quant: str, activations: str, tolerance: float, tmp_path: Path
) -> None:
    folder = deltanet.save(tmp_path / "model", deltanet.model_of(family, linear_num_value_heads=6))
    result = cast(folder, tmp_path, quant, activations)
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_genai_continues_as_we_do(family: str, tmp_path: Path) -> None:
    """A prompt in two pieces, and then step by step: it writes the next states over the ones before."""
    result = cast(deltanet.save(tmp_path / "model", deltanet.model_of(family)), tmp_path)
    model, prompt, count = onnxruntime_genai.Model(str(result.folder)), TOKENS[0, :40], 24
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    for piece in prompt.split(25):
        generator.append_tokens(piece.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0).tolist()
    logits = onnx_logits(result.engine(), torch.tensor(found[:-1]))[len(prompt) - 1 :]
    assert len(found) > len(prompt) + count // 2
    assert found[len(prompt) :] == logits.argmax(dim=1).tolist()


def test_layers_without_attention_have_no_settings_for_genai(tmp_path: Path) -> None:
    """It takes the sizes of heads from them."""
    oracle = deltanet.model_of("qwen3_5", layer_types=["linear_attention"] * 4, use_cache=False)
    engine = in_full(deltanet.save(tmp_path / "model", oracle), tmp_path)
    assert_same(engine, oracle, None, 1)
    assert not (engine.path / "genai_config.json").exists()
