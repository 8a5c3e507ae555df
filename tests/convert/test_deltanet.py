"""Qwen3-Next and Qwen3.5 in llama.cpp: the numbers of transformers, of every variant that it can run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deltanet_checkpoints as deltanet
import gguf
import llama
import llama_library
import modelopt
import pytest
import torch
from conversions import convert
from deltanet_checkpoints import BEYOND_LLAMA, FAMILIES, VARIANTS
from forward import assert_same_logits, random_tokens, relative_error, runner_logits
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.sources.model import open_model
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)
UNQUANTIZED = 1e-8
ROUNDED = 1e-3  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_file(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp computes from it what transformers does of the checkpoint; read back it is the same model."""
    oracle = deltanet.model_of(family, **overrides)
    folder = deltanet.save(tmp_path / "model", oracle)
    path = unquantized(folder, tmp_path)
    theirs, expected = llama.run_isolated(path, TOKENS[0].tolist()), logits_of(oracle, TOKENS)
    assert llama.mean_divergence(expected[0].numpy(), theirs) < UNQUANTIZED
    source, written = open_model(folder).graph, open_model(path)
    weights = [[(w.name, w.role, w.shape) for w in graph.weights()] for graph in (source, written.graph)]
    assert weights[0] == weights[1]
    assert written.graph.fixed_state_bytes() == source.fixed_state_bytes()
    assert relative_error(runner_logits(written, TOKENS), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_block(family: str, tmp_path: Path) -> None:
    """It is kept, as llama.cpp's own converter does, and changes nothing; or it is left out."""
    oracle = deltanet.model_of(family, linear_num_value_heads=6)
    folder = deltanet.save_published(tmp_path / "model", oracle)
    expected = logits_of(oracle, TOKENS)[0].numpy()
    for mtp in (None, False):
        result = convert(folder, tmp_path / str(mtp), "F32", calibration=None, verify=False, mtp=mtp)
        written = open_model(result.files[0]).graph
        assert len(written.predictions) == (mtp is None)
        assert llama.mean_divergence(expected, llama.run_isolated(result.files[0], TOKENS[0].tolist())) < UNQUANTIZED
        library, name = llama_library.load_library(), os.fsencode(result.files[0])
        handle = library.llama_model_load_from_file(name, llama_library.model_parameters(n_gpu_layers=0, load_mtp=True))
        assert handle is not None, llama_library.failure("llama.cpp cannot load the drafting block")
        library.llama_model_free(handle)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_file(family: str, quant: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded; what sets decay and strength stays in float32."""
    sizes = {"moe_intermediate_size": 160, "shared_expert_intermediate_size": 96, "intermediate_size": 480}
    known = {key: size for key, size in sizes.items() if key in FAMILIES[family]}
    oracle = deltanet.model_of(family, hidden_size=192, linear_num_value_heads=8, **known)
    folder = deltanet.save(tmp_path / "model", oracle)
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert open_model(result.files[0]).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(result.files[0]).tensors}
    rates = {
        name: type for name, type in types.items() if name.endswith(("_ba.weight", "_beta.weight", "_alpha.weight"))
    }
    assert rates and {*rates.values()} == {"F32"}
    assert divergence(result.files[0], TOKENS) < ROUNDED


@pytest.mark.parametrize("family", FAMILIES)
def test_text_goes_on_as_in_llama(family: str, tmp_path: Path) -> None:
    folder = deltanet.save(tmp_path / "model", deltanet.model_of(family, seed=1))
    assert_goes_on_alike(folder, tmp_path, 12)


@pytest.mark.parametrize("overrides", BEYOND_LLAMA.values(), ids=BEYOND_LLAMA)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_computes_otherwise_is_refused(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = deltanet.save(tmp_path / "model", deltanet.model_of(family, **overrides))
    (key,) = overrides
    with pytest.raises(BadInput, match=rf"{key}.*, which llama\.cpp does not do for qwen3"):
        plan_for(open_model(folder), Goal("F32"))


def test_shares_as_they_are_are_refused(tmp_path: Path) -> None:
    folder = deltanet.save(tmp_path / "model", deltanet.model_of("qwen3_next", norm_topk_prob=False))
    with pytest.raises(BadInput, match=r"norm_topk_prob false.*, which llama\.cpp does not do for qwen3next"):
        unquantized(folder, tmp_path / "out")


@pytest.mark.parametrize("heads", [2, 4], ids=["heads in order", "heads in another order"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nvfp4_is_kept_code_for_code(family: str, heads: int, tmp_path: Path) -> None:
    """But for the projections whose heads change places. The oracle computes with the values that codes stand for."""
    import transformers

    oracle = deltanet.model_of(family, seed=3, linear_num_value_heads=heads)
    plain = deltanet.save(tmp_path / "plain", oracle)
    encoded = ("_proj", "in_proj_qkv", "in_proj_z", "lm_head") + (("in_proj_qkvz",) if heads == 4 else ())
    values = modelopt.rewrite(plain, tmp_path / "quantized", lambda name: "nvfp4" if name.endswith(encoded) else None)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    kind = getattr(transformers, type(oracle).__name__)
    expected = logits_of(kind.from_pretrained(exact, dtype=torch.float32).eval(), TOKENS)[0]
    path = convert(tmp_path / "quantized", tmp_path, "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    kept = {name.split(".", 2)[-1].removesuffix(".weight") for name in types if types[name] == "NVFP4"}
    ends = [""] if family == "qwen3_5" else ["_exps", "_shexp"]
    inner = {f"{part}{end}" for part in ("ffn_gate", "ffn_up", "ffn_down") for end in ends}
    mixers = {"attn_q", "attn_k", "attn_v", "attn_output"}
    moved = {"attn_qkv", "attn_gate", "ssm_out"} if heads == 2 and family != "qwen3_next" else set()
    assert kept - {"weight"} == inner | mixers | moved
    assert types["output.weight"] == "NVFP4"
    written = runner_logits(open_model(path), TOKENS)[0]
    assert relative_error(written, expected) < (1e-5 if moved else 0.02)  # what is moved is rounded to Q8_0
    assert llama.mean_divergence(written.numpy(), llama.run_isolated(path, TOKENS[0].tolist())) < ROUNDED


def test_projections_in_one_tensor(tmp_path: Path) -> None:
    """As llama.cpp's converter first wrote Qwen3-Next: query, key, value and gate of each key head in turn."""
    model = deltanet.model_of("qwen3_next", linear_num_value_heads=6)
    path = convert(deltanet.save(tmp_path / "m", model), tmp_path, "F32", calibration=None, verify=False).files[0]
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "first.gguf", "qwen3next")
    for name, part in reader.fields.items():
        if name.startswith("qwen3next."):
            kind = part.types[0]
            writer.add_key_value(name, part.contents(), kind, part.types[-1] if len(part.types) > 1 else None)
    for tensor in reader.tensors:
        block, _, kind = tensor.name.rpartition(".attn_")
        delta = model.model.layers[int(block.removeprefix("blk."))].linear_attn if kind == "qkv.weight" else None
        if delta:
            writer.add_tensor(f"{block}.ssm_in.weight", delta.in_proj_qkvz.weight.detach().numpy())
        elif kind != "gate.weight":
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_logits(open_model(tmp_path / "first.gguf"), model, random_tokens(1, 40))
