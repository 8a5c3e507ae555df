"""DeepSeek V3.2 and GLM-5 in llama.cpp: transformers' numbers, where indexers drop most of a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import llama
import llama_library
import modelopt
import pytest
import torch
from conversions import convert
from deepseek_v3_checkpoints import save_deepseek, save_published
from forward import random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.archs.graph import LatentAttention
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import onnx_logits
from sparse_checkpoints import VARIANTS, sparse_model
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 200)  # of which an indexer leaves 32
UNQUANTIZED = 1e-8  # measured: at most 3e-12
ROUNDED = 5e-3  # llama.cpp rounds activations to 8 bits, and then picks other tokens too; measured: at most 1.5e-3


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = sparse_model(family, **overrides)
    path = unquantized(save_deepseek(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED


@pytest.mark.parametrize(("family", "overrides"), VARIANTS.values(), ids=VARIANTS)
def test_file_read_back_is_the_same_model(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = save_deepseek(tmp_path / "model", sparse_model(family, **overrides))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    assert source.graph.shared_states() == written.graph.shared_states()
    # GLM's norms of latents have another epsilon there.
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-5


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, family: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded."""
    folder = save_deepseek(tmp_path / "model", sparse_model(family, hidden_size=192, moe_intermediate_size=160))
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert open_model(result.files[0]).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    assert divergence(result.files[0], TOKENS) < ROUNDED


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_text_goes_on_as_in_llama(family: str, tmp_path: Path) -> None:
    assert_goes_on_alike(save_deepseek(tmp_path / "model", sparse_model(family)), tmp_path)


@pytest.mark.parametrize("name", ["DeepSeek V3.2", "GLM-5.2"])
def test_metadata(name: str, tmp_path: Path) -> None:
    """What a file says beside that which it says of latent attention."""
    family, overrides = VARIANTS[name]
    folder = save_deepseek(tmp_path / "model", sparse_model(family, **overrides))
    fields = gguf.GGUFReader(unquantized(folder, tmp_path)).fields
    architecture = fields["general.architecture"].contents()
    found = {
        key.removeprefix(f"{architecture}.attention.indexer."): fields[key].contents()
        for key in fields
        if "indexer." in key
    }
    assert architecture == ("deepseek32" if family == "deepseek_v32" else "glm-dsa")
    assert fields[f"{architecture}.expert_gating_func"].contents() == 2
    types = {"types": [True, True, False, False, True, False]} if family == "glm_moe_dsa" else {}
    assert found == {"head_count": 16, "key_length": 64, "top_k": 32, **types}


def test_epsilon_of_glm_is_said_to_be_another_in_llama(tmp_path: Path) -> None:
    """And it is: keys so small that it is what they are divided by are picked otherwise there."""
    oracle = sparse_model("glm_moe_dsa")
    with torch.no_grad():
        for layer in oracle.model.layers:
            layer.self_attn.indexer.wk.weight *= 1e-3
    folder = save_deepseek(tmp_path / "model", oracle)
    (said,) = [line for line in plan_for(open_model(folder), Goal("F32")).problems if "epsilon" in line]
    assert "llama.cpp" in said
    path, expected = unquantized(folder, tmp_path), logits_of(oracle, TOKENS)[0]
    assert relative_error(runner_logits(open_model(path), TOKENS)[0], expected) < 1e-5
    assert llama.mean_divergence(expected.numpy(), llama.run_isolated(path, TOKENS[0].tolist())) > 1e-4
    deepseek = save_deepseek(tmp_path / "other", sparse_model("deepseek_v32"))
    assert not any("epsilon" in line for line in plan_for(open_model(deepseek), Goal("F32")).problems)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"index_head_dim": 96}, "index_head_dim"),
        ({"index_head_dim": 32}, "index_head_dim"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    ],
)
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_what_llama_cannot_run_is_refused(overrides: dict[str, Any], named: str, family: str, tmp_path: Path) -> None:
    folder = save_deepseek(tmp_path / "model", sparse_model(family, num_hidden_layers=2, **overrides))
    with pytest.raises(BadInput, match=rf"{named}.*, which llama\.cpp does not do for (deepseek32|glm-dsa)"):
        plan_for(open_model(folder), Goal("F32"))


@pytest.mark.parametrize("name", ["DeepSeek V3.2", "GLM-5.2"])
def test_drafting_block(name: str, tmp_path: Path) -> None:
    """It is kept with its indexer, read back, and loaded by llama.cpp; the model's own numbers are as without."""
    family, overrides = VARIANTS[name]
    oracle = save_published(tmp_path / "model", sparse_model(family, seed=1, **overrides), "fp8", drafts=True)
    path = unquantized(tmp_path / "model", tmp_path)
    (prediction,) = open_model(path).graph.predictions
    attention, layers = prediction.layer.operations[0], oracle.config.num_hidden_layers
    assert isinstance(attention, LatentAttention) and attention.indexer
    assert attention.indexer.key.name == f"blk.{layers}.indexer.attn_k.weight"
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED
    library = llama_library.load_library()
    parameters = llama_library.model_parameters(n_gpu_layers=0, load_mtp=True)
    handle = library.llama_model_load_from_file(os.fsencode(path), parameters)
    assert handle is not None, llama_library.failure("llama.cpp cannot load the drafting block")
    library.llama_model_free(handle)


@pytest.mark.parametrize("name", ["DeepSeek V3.2", "GLM-5.2", "GLM-5 of odd widths"])
def test_onnx_is_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    oracle = sparse_model(family, **overrides)
    settings = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    folder = save_deepseek(tmp_path / "model", oracle)
    engine = OnnxModel(convert(folder, tmp_path, "F32", **settings).files[0].parent, threads=1)
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(onnx_logits(engine, TOKENS[0]), expected) < 1e-5
    assert relative_error(onnx_logits(engine, TOKENS[0], pieces=7), expected) < 1e-5


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_nvfp4_is_kept_where_its_scale_is_multiplied_by(family: str, tmp_path: Path) -> None:
    """That of experts, dense layers and attention's output, code for code; others are rounded anew."""
    plain = save_deepseek(tmp_path / "plain", sparse_model(family, seed=3))
    kinds = ("o_proj", "gate_proj", "up_proj", "down_proj", "q_b_proj")
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: "nvfp4" if name.endswith(kinds) else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    oracle = type(sparse_model(family)).from_pretrained(exact, dtype=torch.float32).eval()
    path = convert(tmp_path / "quantized", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    kept = {name.removeprefix("blk.1.") for name in types if types[name] == "NVFP4" and name.startswith("blk.1.")}
    shared, experts = ({f"ffn_{kind}_{stem}.weight" for kind in ("gate", "up", "down")} for stem in ("shexp", "exps"))
    assert kept == {"attn_output.weight"} | shared | experts
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < ROUNDED
