"""Cohere2 and Cohere2-MoE in llama.cpp and ONNX Runtime: transformers' numbers, of every variant that each can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cohere_checkpoints as cohere
import gguf
import llama
import modelopt
import pytest
import torch
from cohere_checkpoints import DENSE_BEYOND_LLAMA, DENSE_VARIANTS, MIXTURE_BEYOND_LLAMA, MIXTURE_VARIANTS
from conversions import convert
from forward import random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.archs.cohere2 import DENSE, MIXTURE
from moecast.archs.config import Config
from moecast.convert.onnx.prepack import prepack
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.runner.engines import OnnxModel
from moecast.sources.gguf import read_gguf
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)  # windows are of 24


def listed(dense: dict[str, Any], mixtures: dict[str, Any]) -> Any:
    cases = [(False, changes) for changes in dense.values()] + [(True, changes) for changes in mixtures.values()]
    ids = [*(f"dense, {name}" for name in dense), *mixtures]
    return pytest.mark.parametrize(("mixture", "overrides"), cases, ids=ids)


IN_LLAMA = listed(DENSE_VARIANTS, MIXTURE_VARIANTS)
BEYOND_LLAMA = listed(DENSE_BEYOND_LLAMA, MIXTURE_BEYOND_LLAMA)
ALL = listed(DENSE_VARIANTS | DENSE_BEYOND_LLAMA, MIXTURE_VARIANTS | MIXTURE_BEYOND_LLAMA)
UNQUANTIZED = 1e-10  # measured: at most 1e-12
ROUNDED = 3e-3  # llama.cpp rounds activations to 8 bits; measured: at most 8e-4, where tokens go to other experts


@IN_LLAMA
def test_unquantized_file_in_llama(mixture: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Read back, it is the same model."""
    oracle = cohere.cohere_model(mixture, **overrides)
    folder = cohere.save_cohere(tmp_path / "model", oracle)
    path = unquantized(folder, tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED
    source, written = open_model(folder), open_model(path)
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1] and source.graph.tied == written.graph.tied
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-6


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, mixture: bool, tmp_path: Path) -> None:
    """Inner widths that blocks of 256 do not divide are padded."""
    folder = cohere.save_cohere(tmp_path / "model", cohere.cohere_model(mixture, intermediate_size=160))
    path = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True).files[0]
    assert {w.columns for w in open_model(path).graph.weights() if "ffn_down" in w.name} == (
        {160, 320} if mixture and quant == "Q8_0" else {160} if quant == "Q8_0" else {256, 512} if mixture else {256}
    )
    assert divergence(path, TOKENS) < ROUNDED


@BEYOND_LLAMA
def test_what_llama_computes_otherwise_is_refused(mixture: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = cohere.save_cohere(tmp_path / "model", cohere.cohere_model(mixture, **overrides))
    key, name = next(iter(overrides)), "cohere2moe" if mixture else "cohere2"
    with pytest.raises(BadInput, match=f"{key}.*, which llama.cpp does not do for {name}: use --to onnx"):
        plan_for(open_model(folder), Goal("F32"))
    with pytest.raises(BadInput, match=key):
        unquantized(folder, tmp_path / "out")
    assert plan_for(open_model(folder), Goal("F32"), file_format="onnx").tensors


def test_metadata(tmp_path: Path) -> None:
    folder = cohere.save_cohere(tmp_path / "dense", cohere.cohere_model(False, **DENSE_VARIANTS["another pattern"]))
    found = metadata(unquantized(folder, tmp_path), "cohere2")
    assert found.pop("attention.layer_norm_epsilon") == pytest.approx(1e-5)
    attention = {
        "context_length": 2048, "embedding_length": 256, "attention.head_count": 8, "attention.head_count_kv": 2,
        "attention.sliding_window": 24, "rope.freq_base": 5e4, "rope.scaling.type": "none",
    }  # fmt: skip
    assert found == attention | {
        "block_count": 4, "feed_forward_length": 512, "attention.key_length": 32, "attention.value_length": 32,
        "attention.sliding_window_pattern": [False, True, False, False], "rope.dimension_count": 32,
        "logit_scale": 0.25,
    }  # fmt: skip
    changes = cohere.NORTH | {"num_shared_experts": 2, "norm_topk_prob": True}
    folder = cohere.save_cohere(tmp_path / "mixture", cohere.cohere_model(True, **changes))
    found = metadata(unquantized(folder, tmp_path), "cohere2moe")
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found == attention | {
        "block_count": 5, "feed_forward_length": 512, "attention.key_length": 64, "attention.value_length": 64,
        "attention.sliding_window_pattern": [False, True, True, True, False], "rope.dimension_count": 64,
        "logit_scale": 1.0, "leading_dense_block_count": 1, "expert_count": 16, "expert_used_count": 4,
        "expert_feed_forward_length": 256, "expert_shared_count": 2, "expert_shared_feed_forward_length": 512,
        "expert_gating_func": 2, "expert_weights_norm": True,
    }  # fmt: skip


def metadata(path: Path, name: str) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key.removeprefix(f"{name}."): fields[key].contents() for key in fields if key.startswith(f"{name}.")}


def test_keys_as_other_converters_write_them(tmp_path: Path) -> None:
    """A period of windows or none for a list, both epsilons where there is a root mean square, gating by default."""
    dense = cohere.save_cohere(tmp_path / "dense", cohere.cohere_model(False))
    north = cohere.save_cohere(tmp_path / "north", cohere.cohere_model(True, **cohere.NORTH))
    windows, rms = "attention.sliding_window_pattern", "attention.layer_norm_rms_epsilon"
    for folder, architecture, changes in (
        (dense, DENSE, {windows: 4}),
        (dense, DENSE, {windows: None}),
        (north, MIXTURE, {windows: 4, "attention.layer_norm_epsilon": 1e-5, "expert_gating_func": None}),
        (north, MIXTURE, {windows: None, "expert_weights_norm": None}),
    ):
        stored, tensors = read_gguf(unquantized(folder, tmp_path / "out"))
        values = stored | {f"{architecture.name}.{key}": value for key, value in changes.items()}
        read = architecture.from_gguf(Config(values, "model.gguf"), tensors)
        assert read == architecture.from_gguf(Config(stored, "model.gguf"), tensors)
        (tmp_path / "out" / f"{folder.name}-F32.gguf").unlink()
    for key, value, named in (
        (windows, [True], "has 1 entries"), ("attention.sliding_window", None, "sliding_window is missing"),
        ("expert_gating_func", 3, "expert_gating_func is 3"), ("logit_scale", None, "logit_scale is missing"),
        ("rope.scaling.type", "yarn", "rope.scaling.type"), (rms, -1.0, "layer_norm_rms_epsilon"),
    ):  # fmt: skip
        values = stored | {f"cohere2moe.{key}": value}
        with pytest.raises(BadInput, match=rf"^model\.gguf: .*{named}"):
            MIXTURE.from_gguf(Config(values, "model.gguf"), tensors)


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "experts"])
def test_text_goes_on_as_in_llama(mixture: bool, tmp_path: Path) -> None:
    folder = cohere.save_cohere(tmp_path / "model", cohere.cohere_model(mixture))
    assert_goes_on_alike(folder, tmp_path)


def test_nvfp4_is_kept_code_for_code(tmp_path: Path) -> None:
    """The oracle computes with the values that the codes stand for."""
    from transformers import Cohere2MoeForCausalLM

    model = cohere.cohere_model(True, seed=3, **MIXTURE_VARIANTS["two dense layers"])
    plain = cohere.save_cohere(tmp_path / "plain", model)
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: "nvfp4" if name.endswith("_proj") else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    oracle = Cohere2MoeForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    path = convert(tmp_path / "quantized", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    matrices = {name for name in types if name.startswith("blk.") and name.endswith(".weight")}
    kept = {name for name in matrices if "norm" not in name and "ffn_gate_inp" not in name}
    assert {name for name in types if types[name] == "NVFP4"} == kept and len(kept) == 4 * 4 + 2 * 3 + 2 * 6
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(runner_logits(open_model(path), TOKENS)[0], expected) < 1e-5
    assert llama.mean_divergence(expected.numpy(), llama.run_isolated(path, TOKENS[0].tolist())) < ROUNDED


@ALL
def test_onnx_is_transformers(mixture: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = cohere.cohere_model(mixture, **overrides)
    folder = cohere.save_cohere(tmp_path / "model", oracle)
    settings = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    engine = OnnxModel(convert(folder, tmp_path, "F32", **settings).files[0].parent, threads=1)
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(onnx_logits(engine, TOKENS[0]), expected) < 1e-5
    assert relative_error(onnx_logits(engine, TOKENS[0], pieces=7), expected) < 1e-5


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_quantized_onnx_is_our_runner(quant: str, mixture: bool, tmp_path: Path) -> None:
    """The embedding that is the head too lies there once; in the order of kernels it is beside that."""
    result = cast(cohere.save_cohere(tmp_path / "model", cohere.cohere_model(mixture)), tmp_path / "out", quant)
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < 1e-5
    sizes = sum(file.stat().st_size for file in result.folder.glob("*.onnx_data"))
    assert sizes == result.plan.bytes
    assert prepack(result.folder, NoProgress()) > 0
    assert relative_error(onnx_logits(result.engine(low_memory=False), TOKENS[0]), expected) < 1e-5
