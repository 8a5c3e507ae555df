"""MiniMax M3 in llama.cpp and ONNX Runtime: the numbers of transformers, of every variant that each can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama
import minimax_m3_checkpoints as m3
import pytest
from conversions import convert
from forward import random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from minimax_m3_checkpoints import BEYOND_LLAMA, VARIANTS
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 160)
ALL = VARIANTS | BEYOND_LLAMA
FLASH = {"flash_attention": True}  # without which blocks are not selected
UNQUANTIZED = 3e-7  # measured: at most 8e-8, with a block or an expert chosen otherwise 2e-5
ROUNDED = 3e-3  # llama.cpp rounds activations to 8 bits; measured: at most 3e-4


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = m3.minimax_m3_model(seed=1, **overrides)
    path = unquantized(m3.save_minimax_m3(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist(), **FLASH)
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED


def test_selection_makes_a_difference_in_llama(tmp_path: Path) -> None:
    """As the note says: without flash attention it is another model."""
    path = unquantized(m3.save_minimax_m3(tmp_path / "model", m3.minimax_m3_model()), tmp_path)
    assert divergence(path, TOKENS) > 1e-3
    assert open_model(path).graph.notes[0].startswith("llama.cpp selects blocks of tokens with -fa on")


@pytest.mark.parametrize("name", ["plain", "tied", "a shared expert of two", "odd widths"])
def test_file_read_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = m3.save_minimax_m3(tmp_path / "model", m3.minimax_m3_model(**VARIANTS[name]))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    for graph in (source.graph, written.graph):  # keys and values of 2 heads of 64, in three layers index keys of 64
        assert graph.state_bytes_per_token() == 2 * (4 * 2 * 2 * 64 + 3 * 64)
        assert graph.fixed_state_bytes() == 0
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-6


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded; what selects blocks stays as it is."""
    oracle = m3.minimax_m3_model(seed=1, hidden_size=192, intermediate_size=160, shared_intermediate_size=160)
    folder = m3.save_minimax_m3(tmp_path / "model", oracle)
    path = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True).files[0]
    assert open_model(path).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {types[name] for name in types if ".indexer." in name or "ffn_gate_inp" in name} == {"F32"}
    assert divergence(path, TOKENS, **FLASH) < ROUNDED


def test_text_goes_on_as_in_llama(tmp_path: Path) -> None:
    folder = m3.save_minimax_m3(tmp_path / "model", m3.minimax_m3_model(seed=1, index_block_size=4))
    assert_goes_on_alike(folder, tmp_path, **FLASH)


REFUSED = {
    "another clamp": "swiglu_limit",
    "a dense layer among others": "moe_layer_freq",
    "no selection": "sparse_attention_freq",
    "selection in a dense layer": "sparse_attention_freq",
    "a wider shared expert": "shared_intermediate_size",
}


@pytest.mark.parametrize("name", BEYOND_LLAMA)
def test_what_llama_computes_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    folder = m3.save_minimax_m3(tmp_path / "model", m3.minimax_m3_model(**BEYOND_LLAMA[name]))
    with pytest.raises(BadInput, match=f"{REFUSED[name]}.*, which llama.cpp does not do for minimax-m3: use --to onnx"):
        plan_for(open_model(folder), Goal("F32"))


def test_quantized_release(tmp_path: Path) -> None:
    """What is MXFP8 fits BF16; llama.cpp has no factors for NVFP4 experts here, which are rounded again."""
    oracle = m3.save_quantized(tmp_path / "m", m3.minimax_m3_model(seed=1), ("nvfp4", "mxfp8"))
    path = convert(tmp_path / "m", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name.removeprefix("blk.1."): tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {types[f"attn_{kind}.weight"] for kind in ("q", "k", "v", "output")} == {"BF16"}
    assert {types[f"ffn_{kind}_exps.weight"] for kind in ("gate", "up", "down")} == {"Q8_0"}
    theirs = llama.run_isolated(path, TOKENS[0].tolist(), **FLASH)
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < ROUNDED


def test_nvfp4_of_attention_is_kept_code_for_code(tmp_path: Path) -> None:
    oracle = m3.save_quantized(tmp_path / "m", m3.minimax_m3_model(seed=1), ("mxfp8", "nvfp4"))
    path = convert(tmp_path / "m", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name for name in types if types[name] == "NVFP4"} == {
        f"blk.{layer}.attn_{kind}.weight" for layer in range(4) for kind in ("q", "k", "v", "output")
    }
    theirs = llama.run_isolated(path, TOKENS[0].tolist(), **FLASH)
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < ROUNDED


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_onnx_is_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = m3.minimax_m3_model(seed=1, **overrides)
    folder = m3.save_minimax_m3(tmp_path / "model", oracle)
    settings = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    engine = OnnxModel(convert(folder, tmp_path, "F32", **settings).files[0].parent, threads=1)
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(onnx_logits(engine, TOKENS[0]), expected) < 1e-5
    assert relative_error(onnx_logits(engine, TOKENS[0], pieces=7), expected) < 1e-5


def test_quantized_onnx_is_our_runner(tmp_path: Path) -> None:
    result = cast(m3.save_minimax_m3(tmp_path / "model", m3.minimax_m3_model(seed=1)), tmp_path / "out")
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < 1e-5
