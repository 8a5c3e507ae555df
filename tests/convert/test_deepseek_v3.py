"""DeepSeek V3 and Kimi K2 in llama.cpp: the numbers of transformers, of every variant, and what it has to be told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deepseek_v3_checkpoints as deepseek
import gguf
import llama
import llama_library
import modelopt
import pytest
import torch
from click.testing import CliRunner
from conversions import convert
from deepseek_v3_checkpoints import DEEPSEEK, FEW, LIMITS, VARIANTS
from forward import random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.cli import main
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from safetensors.torch import load_file, save_file
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 160)
UNQUANTIZED = 1e-8  # measured: at most 4e-12
ROUNDED = 1e-3  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = deepseek.deepseek_model(**overrides)
    path = unquantized(deepseek.save_deepseek(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED


@pytest.mark.parametrize("name", [*FEW, "Kimi", "no mscale", "attention factor", *LIMITS])
def test_file_read_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    overrides = (VARIANTS | LIMITS)[name]
    folder = deepseek.save_deepseek(tmp_path / "model", deepseek.deepseek_model(**overrides))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    rank = overrides.get("kv_lora_rank", DEEPSEEK["kv_lora_rank"])
    for graph in (source.graph, written.graph):
        assert graph.state_bytes_per_token() == 3 * 2 * (rank + DEEPSEEK["qk_rope_head_dim"])
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    # Kimi's norms of latents have another epsilon there.
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-4


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded, but for those within latent attention."""
    oracle = deepseek.deepseek_model(hidden_size=192, moe_intermediate_size=160, intermediate_size=480)
    folder = deepseek.save_deepseek(tmp_path / "model", oracle)
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert open_model(result.files[0]).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    assert divergence(result.files[0], TOKENS) < ROUNDED


def test_text_goes_on_as_in_llama(tmp_path: Path) -> None:
    folder = deepseek.save_deepseek(tmp_path / "model", deepseek.deepseek_model())
    assert_goes_on_alike(folder, tmp_path)


def test_metadata(tmp_path: Path) -> None:
    folder = deepseek.save_deepseek(tmp_path / "model", deepseek.deepseek_model())
    fields = gguf.GGUFReader(unquantized(folder, tmp_path)).fields
    found = {key.removeprefix("deepseek2."): fields[key].contents() for key in fields if key.startswith("deepseek2.")}
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert found.pop("rope.scaling.yarn_log_multiplier") == pytest.approx(0.1)
    assert found == {
        "context_length": 2560, "embedding_length": 256, "block_count": 3, "vocab_size": 512,
        "feed_forward_length": 512, "leading_dense_block_count": 1, "attention.head_count": 4,
        "attention.head_count_kv": 1, "attention.q_lora_rank": 128, "attention.kv_lora_rank": 160,
        "attention.key_length": 192, "attention.value_length": 160, "attention.key_length_mla": 96,
        "attention.value_length_mla": 48, "rope.dimension_count": 32, "rope.freq_base": 1e4,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "expert_count": 16,
        "expert_used_count": 4, "expert_feed_forward_length": 256, "expert_shared_count": 1, "expert_gating_func": 2,
        "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
    }  # fmt: skip


def test_limits_of_yarn_are_said_to_be_given_at_each_start(tmp_path: Path) -> None:
    """llama.cpp reads them from no file; what the plan tells to do about it makes its numbers right."""
    oracle = deepseek.deepseek_model(**LIMITS["Kimi K2's limits"])
    folder = deepseek.save_deepseek(tmp_path / "model", oracle)
    (said,) = [line for line in plan_for(open_model(folder), Goal("F32")).problems if "YaRN" in line]
    assert "--yarn-beta-fast 1 --yarn-beta-slow 1" in said
    path, expected = tmp_path / "model.gguf", logits_of(oracle, TOKENS)[0].numpy()
    shown = CliRunner().invoke(main, ["convert", str(folder), "-o", str(path), "--quant", "F32", "--no-verify"])
    assert "--jinja --yarn-beta-fast 1 --yarn-beta-slow 1" in shown.output
    told = {"yarn_beta_fast": 1.0, "yarn_beta_slow": 1.0}
    alone, right = (llama.run_isolated(path, TOKENS[0].tolist(), settings=settings) for settings in ({}, told))
    assert llama.mean_divergence(expected, right) < UNQUANTIZED < 1e-3 < llama.mean_divergence(expected, alone)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"rms_norm_eps": 1e-3}, "rms_norm_eps"), ({"num_hidden_layers": 26, "n_routed_experts": 8}, "q_lora_rank")],
)
def test_what_llama_computes_otherwise_is_refused(overrides: dict[str, Any], named: str, tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    folder = deepseek.save_deepseek(tmp_path / "model", deepseek.deepseek_model(**small, **overrides))
    with pytest.raises(BadInput, match=rf"{named}.*, which llama\.cpp does not do for deepseek2: use --to onnx"):
        plan_for(open_model(folder), Goal("F32"))


def test_experts_of_whole_numbers_are_kept_code_for_code(tmp_path: Path) -> None:
    oracle = deepseek.save_published(tmp_path / "model", deepseek.deepseek_model(seed=3), "int4")
    path = convert(tmp_path / "model", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    experts = {type for name, type in types.items() if name.endswith("_exps.weight")}
    assert experts == {"Q4_0"} and types["blk.1.attn_k_b.weight"] == types["blk.0.attn_q_a.weight"] == "BF16"
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(runner_logits(open_model(path), TOKENS)[0], expected) < 1e-5
    assert llama.mean_divergence(expected.numpy(), llama.run_isolated(path, TOKENS[0].tolist())) < ROUNDED


def test_nvfp4_is_kept_where_its_scale_is_multiplied_by(tmp_path: Path) -> None:
    """Only that of attention's output is in llama.cpp; other codes are rounded anew."""
    from transformers import DeepseekV3ForCausalLM

    plain = deepseek.save_deepseek(tmp_path / "plain", deepseek.deepseek_model(seed=3, v_head_dim=64))
    encoded = ("o_proj", "gate_proj", "up_proj", "down_proj")
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: "nvfp4" if name.endswith(encoded) else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    oracle = DeepseekV3ForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    path = convert(tmp_path / "quantized", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name for name in types if types[name] == "NVFP4"} == {f"blk.{n}.attn_output.weight" for n in range(3)}
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < ROUNDED


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
def test_drafting_block(encoding: str, tmp_path: Path) -> None:
    """It is kept, read back, and loaded by llama.cpp; the model's own numbers are as without."""
    oracle = deepseek.save_published(tmp_path / "model", deepseek.deepseek_model(), encoding, drafts=True)
    source = open_model(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path, "F32", calibration=None, verify=False).files[0]
    graph = open_model(path).graph
    (prediction,), (stored,) = graph.predictions, source.graph.predictions
    assert prediction.layer.index == 3 and prediction.projection.shape == stored.projection.shape == (256, 512)
    assert any("embedding and head" in note for note in source.graph.notes)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert {"blk.3.nextn.eh_proj.weight", "blk.3.nextn.shared_head_norm.weight", "blk.3.attn_k_b.weight"} <= names
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED
    library = llama_library.load_library()
    parameters = llama_library.model_parameters(n_gpu_layers=0, load_mtp=True)
    handle = library.llama_model_load_from_file(os.fsencode(path), parameters)
    assert handle is not None, llama_library.failure("llama.cpp cannot load the drafting block")
    library.llama_model_free(handle)


def test_incomplete_drafting_block_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    deepseek.save_published(folder, deepseek.deepseek_model(), "bf16", drafts=True)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    file = folder / values["weight_map"].pop("model.layers.3.self_attn.o_proj.weight")
    index.write_text(json.dumps(values))
    tensors = load_file(file)
    del tensors["model.layers.3.self_attn.o_proj.weight"]
    save_file(tensors, file)
    graph = open_model(folder).graph
    assert not graph.predictions
    assert any("o_proj" in note for note in graph.notes) and any("left out" in note for note in graph.notes)


@pytest.mark.parametrize("overrides", FEW.values(), ids=FEW)
def test_onnx_is_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = deepseek.deepseek_model(**overrides)
    folder = deepseek.save_deepseek(tmp_path / "model", oracle)
    settings = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    engine = OnnxModel(convert(folder, tmp_path, "F32", **settings).files[0].parent, threads=1)
    tokens = TOKENS[0, :96]
    expected = logits_of(oracle, tokens[None])[0]
    assert relative_error(onnx_logits(engine, tokens), expected) < 1e-5
    assert relative_error(onnx_logits(engine, tokens, pieces=17), expected) < 1e-5


def test_quantized_onnx_is_our_runner(tmp_path: Path) -> None:
    result = cast(deepseek.save_deepseek(tmp_path / "model", deepseek.deepseek_model()), tmp_path / "out")
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < 1e-5
