"""Qwen3-MoE in llama.cpp and ONNX Runtime: the numbers of transformers, of every variant that each can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama
import modelopt
import pytest
import qwen3_checkpoints as qwen3
import torch
from conversions import convert
from forward import random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from qwen3_checkpoints import BEYOND_LLAMA, QWEN3, VARIANTS
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)
ALL = VARIANTS | BEYOND_LLAMA
UNQUANTIZED = 1e-8  # measured: at most 1e-12
ROUNDED = 1e-3  # llama.cpp rounds activations to 8 bits; measured: at most 5e-5


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = qwen3.qwen3_model(**overrides)
    path = unquantized(qwen3.save_qwen3(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_file_read_back_is_the_same_model(overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = qwen3.save_qwen3(tmp_path / "model", qwen3.qwen3_model(**overrides))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    layers, heads, head_size = source.graph.layers, QWEN3["num_key_value_heads"], QWEN3["head_dim"]
    for graph in (source.graph, written.graph):
        assert graph.state_bytes_per_token() == len(layers) * 2 * heads * head_size * 2
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-6


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded."""
    oracle = qwen3.qwen3_model(hidden_size=192, moe_intermediate_size=160)
    folder = qwen3.save_qwen3(tmp_path / "model", oracle)
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert open_model(result.files[0]).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    assert divergence(result.files[0], TOKENS) < ROUNDED


def test_text_goes_on_as_in_llama(tmp_path: Path) -> None:
    folder = qwen3.save_qwen3(tmp_path / "model", qwen3.qwen3_model())
    assert_goes_on_alike(folder, tmp_path)


def test_metadata(tmp_path: Path) -> None:
    folder = qwen3.save_qwen3(tmp_path / "model", qwen3.qwen3_model(**VARIANTS["yarn"]))
    fields = gguf.GGUFReader(unquantized(folder, tmp_path)).fields
    found = {key.removeprefix("qwen3moe."): fields[key].contents() for key in fields if key.startswith("qwen3moe.")}
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found == {
        "context_length": 2048, "embedding_length": 256, "block_count": 2, "attention.head_count": 8,
        "attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64,
        "rope.dimension_count": 64, "rope.freq_base": 1e4, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32, "expert_count": 16, "expert_used_count": 4,
        "expert_feed_forward_length": 256,
    }  # fmt: skip


@pytest.mark.parametrize("overrides", BEYOND_LLAMA.values(), ids=BEYOND_LLAMA)
def test_what_llama_computes_otherwise_is_refused(overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = qwen3.save_qwen3(tmp_path / "model", qwen3.qwen3_model(**overrides))
    key = next(key for key in overrides if key not in ("num_hidden_layers", "sliding_window"))
    with pytest.raises(BadInput, match=f"{key}.*, which llama.cpp does not do for qwen3moe: use --to onnx"):
        plan_for(open_model(folder), Goal("F32"))
    with pytest.raises(BadInput, match=key):
        unquantized(folder, tmp_path / "out")
    assert plan_for(open_model(folder), Goal("F32"), file_format="onnx").tensors


def test_nvfp4_is_kept_code_for_code(tmp_path: Path) -> None:
    """The oracle computes with the values that the codes stand for."""
    from transformers import Qwen3MoeForCausalLM

    plain = qwen3.save_qwen3(tmp_path / "plain", qwen3.qwen3_model(seed=3))
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: "nvfp4" if name.endswith("_proj") else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    oracle = Qwen3MoeForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    path = convert(tmp_path / "quantized", tmp_path, "native", calibration=None, verify=False).files[0]
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name for name in types if types[name] == "NVFP4"} == {
        f"blk.{layer}.{kind}.weight" for layer in (0, 1) for kind in kinds
    }
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(runner_logits(open_model(path), TOKENS)[0], expected) < 1e-5
    assert llama.mean_divergence(expected.numpy(), llama.run_isolated(path, TOKENS[0].tolist())) < ROUNDED


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_onnx_is_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = qwen3.qwen3_model(**overrides)
    folder = qwen3.save_qwen3(tmp_path / "model", oracle)
    settings = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    engine = OnnxModel(convert(folder, tmp_path, "F32", **settings).files[0].parent, threads=1)
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(onnx_logits(engine, TOKENS[0]), expected) < 1e-5
    assert relative_error(onnx_logits(engine, TOKENS[0], pieces=7), expected) < 1e-5


def test_quantized_onnx_is_our_runner(tmp_path: Path) -> None:
    result = cast(qwen3.save_qwen3(tmp_path / "model", qwen3.qwen3_model()), tmp_path / "out")
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < 1e-5
