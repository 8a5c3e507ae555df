"""Gemma 4 in llama.cpp and ONNX Runtime: the numbers of transformers, of every variant that each can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gemma4_checkpoints as gemma
import gguf
import llama
import pytest
from conversions import convert
from forward import random_tokens, relative_error, runner_logits
from gemma4_checkpoints import BEYOND_LLAMA, KINDS, VARIANTS
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)
WITH_ITS_GELU = 2e-9  # measured: at most 6e-10
UNQUANTIZED = 1e-7  # its GELU is a table of 16 bits; measured: at most 3e-8
READ_BACK = KINDS | {name: VARIANTS[name] for name in ("no cap", "half of each head turns")}
ROUNDED = 1.5e-3  # llama.cpp rounds activations to 8 bits; measured: at most 5e-4


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(settings: dict[str, Any], tmp_path: Path) -> None:
    oracle = gemma.gemma_model(**settings)
    path = unquantized(gemma.save_gemma(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED
    with_its_gelu = logits_of(gemma.with_table(oracle), TOKENS)
    assert llama.mean_divergence(with_its_gelu[0].numpy(), theirs) < WITH_ITS_GELU


@pytest.mark.parametrize("settings", READ_BACK.values(), ids=READ_BACK)
def test_file_read_back_is_the_same_model(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**settings))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    for fact in ("state_bytes_per_token", "fixed_state_bytes", "shared_states", "active_parameters"):
        assert getattr(source.graph, fact)() == getattr(written.graph, fact)()
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-6


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("settings", [*KINDS.values(), VARIANTS["odd widths"]], ids=[*KINDS, "odd widths"])
def test_quantized_file_in_llama(settings: dict[str, Any], quant: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded."""
    folder = gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**settings))
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert divergence(result.files[0], TOKENS) < ROUNDED


def test_text_goes_on_as_in_llama(tmp_path: Path) -> None:
    """With windows that are over and keys of other layers."""
    assert_goes_on_alike(gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**gemma.PER_LAYER)), tmp_path, count=34)


def test_metadata(tmp_path: Path) -> None:
    folder = gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**gemma.PER_LAYER))
    fields = gguf.GGUFReader(unquantized(folder, tmp_path)).fields
    found = {key.removeprefix("gemma4."): fields[key].contents() for key in fields if key.startswith("gemma4.")}
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found == {
        "context_length": 2048, "embedding_length": 256, "block_count": 8, "attention.head_count": 4,
        "attention.head_count_kv": 1, "attention.key_length": 128, "attention.value_length": 128,
        "attention.key_length_swa": 64, "attention.value_length_swa": 64, "attention.sliding_window": 32,
        "attention.sliding_window_pattern": [True, True, False, True, False, True, True, False],
        "attention.shared_kv_layers": 3, "feed_forward_length": [384] * 5 + [768] * 3, "final_logit_softcapping": 8.0,
        "embedding_length_per_layer_input": 32, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
        "rope.dimension_count": 128, "rope.dimension_count_swa": 64,
    }  # fmt: skip


@pytest.mark.parametrize("settings", BEYOND_LLAMA.values(), ids=BEYOND_LLAMA)
def test_what_llama_computes_otherwise_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**settings))
    with pytest.raises(BadInput, match=r"layer_types.*, which llama.cpp does not do for gemma4: use --to onnx"):
        plan_for(open_model(folder), Goal("F32"))


def test_nvfp4_is_kept_code_for_code(tmp_path: Path) -> None:
    """Down projections of experts too, whose scales join those that the model has for each expert."""
    settings = gemma.MIXTURE | {"num_hidden_layers": 3, "layer_types": gemma.SHORT}
    folder, oracle = gemma.save_gemma_nvfp4(tmp_path / "model", gemma.gemma_model(seed=3, **settings))
    path = convert(folder, tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    kinds = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    assert {name for name in types if types[name] == "NVFP4"} == {
        f"blk.{layer}.{kind}.weight" for layer in range(3) for kind in kinds
    }
    expected = logits_of(oracle, TOKENS)[0]
    for source in (folder, path):
        assert relative_error(runner_logits(open_model(source), TOKENS)[0], expected) < 1e-5
    assert llama.mean_divergence(expected.numpy(), llama.run_isolated(path, TOKENS[0].tolist())) < ROUNDED


ONNX = BEYOND_LLAMA | {name: VARIANTS[name] for name in ("per layer", "half of each head turns")}


@pytest.mark.parametrize("settings", ONNX.values(), ids=ONNX)
def test_onnx_is_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    oracle = gemma.gemma_model(**settings)
    folder = gemma.save_gemma(tmp_path / "model", oracle)
    how = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    engine = OnnxModel(convert(folder, tmp_path, "F32", **how).files[0].parent, threads=1)
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(onnx_logits(engine, TOKENS[0]), expected) < 1e-5
    assert relative_error(onnx_logits(engine, TOKENS[0], pieces=7), expected) < 1e-5


@pytest.mark.parametrize("settings", [gemma.DENSE, gemma.PER_LAYER], ids=["dense", "per layer"])
def test_quantized_onnx_is_our_runner(settings: dict[str, Any], tmp_path: Path) -> None:
    result = cast(gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**settings)), tmp_path / "out")
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < 1e-5


def test_experts_have_no_form_in_onnx(tmp_path: Path) -> None:
    """Operators of experts know gates of sigmoids alone."""
    folder = gemma.save_gemma(tmp_path / "model", gemma.gemma_model(**gemma.MIXTURE))
    with pytest.raises(BadInput, match=r"ONNX has no form for .* yet: use --to gguf"):
        convert(folder, tmp_path / "out", "Q4_0", file_format="onnx", calibration=None, verify=False)
