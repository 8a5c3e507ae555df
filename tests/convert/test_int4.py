"""Checkpoints in whole numbers of 4 bits, from every packing to llama.cpp: the numbers of what was packed."""

from __future__ import annotations

from pathlib import Path

import cohere_checkpoints as cohere
import deltanet_checkpoints as deltanet
import gguf
import int4_packs
import llama
import pytest
import qwen3_checkpoints as qwen3
import torch
from conversions import convert
from forward import assert_same_logits, random_tokens
from moecast.errors import BadInput
from moecast.sources.model import open_model
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)
SIZES = {"hidden_size": 128, "moe_intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}


@pytest.mark.parametrize(
    "style",
    ["gptq", "gptq symmetric", "gptq order", "gptq v2", "awq", "compressed", "compressed symmetric",
     "compressed symmetric order"],
)  # fmt: skip
def test_packed_checkpoint(style: str, tmp_path: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    plain = qwen3.save_qwen3(tmp_path / "plain", qwen3.qwen3_model(seed=4, **SIZES))
    int4_packs.repacked(plain, tmp_path / "packed", tmp_path / "exact", style)
    oracle = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32).eval()
    assert_same_logits(open_model(tmp_path / "packed"), oracle, TOKENS)
    path = convert(tmp_path / "packed", tmp_path, "F32", calibration=None, verify=False).files[0]
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < 1e-8


_OTHERS = {
    "qwen3_next": ("Qwen3NextForCausalLM", 19),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", 19),
    "cohere2_moe": ("Cohere2MoeForCausalLM", 10),
}  # class, and how many packed weights a file has


def _other_family(family: str, folder: Path) -> Path:
    common = {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    if family == "cohere2_moe":
        return cohere.save_cohere(folder, cohere.cohere_model(True, **common, num_hidden_layers=1))
    kinds = ["linear_attention", "full_attention"]
    widths = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    model = deltanet.model_of(family, **common, **widths, layer_types=kinds, num_hidden_layers=2)
    return deltanet.save(folder, model)


@pytest.mark.parametrize("style", ["gptq symmetric", "awq"])
@pytest.mark.parametrize("family", _OTHERS)
def test_other_families(family: str, style: str, tmp_path: Path) -> None:
    """Codes stay as they are where heads or rows are put in another order."""
    import transformers

    int4_packs.repacked(_other_family(family, tmp_path / "plain"), tmp_path / "packed", tmp_path / "exact", style)
    kind, packed = _OTHERS[family]
    oracle = getattr(transformers, kind).from_pretrained(tmp_path / "exact", dtype=torch.float32).eval()
    assert_same_logits(open_model(tmp_path / "packed"), oracle, TOKENS)
    if style == "gptq symmetric":
        result = convert(tmp_path / "packed", tmp_path, "native", calibration=None, verify=False, padding=False)
        types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(result.files[0]).tensors]
        assert types.count("Q4_0") == packed and not [line for line in result.problems if "rounded" in line]
        assert_same_logits(open_model(result.files[0]), oracle, TOKENS)


@pytest.mark.parametrize("quant", ["native", "Q8_0", "Q5_K_M"])
def test_symmetric_numbers_are_kept_code_for_code(quant: str, tmp_path: Path) -> None:
    """In Q4_0, whatever larger type was asked for."""
    from transformers import Qwen3MoeForCausalLM

    plain = qwen3.save_qwen3(tmp_path / "plain", qwen3.qwen3_model(seed=5, **SIZES))
    int4_packs.repacked(plain, tmp_path / "packed", tmp_path / "exact", "gptq symmetric")
    path = convert(tmp_path / "packed", tmp_path, quant, calibration=None, verify=False, padding=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    packed = {name for name in types if ("exps" in name or "attn_" in name) and "norm" not in name}
    assert {types[name] for name in packed} == {"Q4_0"}
    if quant == "native":
        oracle = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32).eval()
        assert_same_logits(open_model(path), oracle, TOKENS)


def test_numbers_that_are_not_what_the_configuration_says(tmp_path: Path) -> None:
    plain = qwen3.save_qwen3(tmp_path / "plain", qwen3.qwen3_model(num_hidden_layers=1, **SIZES))
    int4_packs.repacked(plain, tmp_path / "packed", tmp_path / "exact", "gptq")
    result = convert(tmp_path / "packed", tmp_path, "native", calibration=None, verify=False)
    assert [line for line in result.problems if "rounded to Q4_0 what config.json says" in line]
    quantization = int4_packs.CONFIGURATIONS["gptq"] | {"sym": False}
    int4_packs.edit_config(tmp_path / "packed", quantization_config=quantization)
    result = convert(tmp_path / "packed", tmp_path / "out", "native", calibration=None, verify=False)
    assert result.problems == () and result.bits_per_weight > 8


@pytest.mark.parametrize(
    ("change", "named"),
    [({"bits": 8}, "bits is 8"), ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
     ({"quant_method": "auto-round"}, "qweight holds whole numbers that neither GPTQ nor AWQ packed"),
     ({"quant_method": "awq"}, "expected .* words of eight numbers")],
)  # fmt: skip
def test_other_packings_are_refused(change: dict[str, object], named: str, tmp_path: Path) -> None:
    plain = qwen3.save_qwen3(tmp_path / "plain", qwen3.qwen3_model(num_hidden_layers=1, **SIZES))
    int4_packs.repacked(plain, tmp_path / "packed", tmp_path / "exact", "gptq")
    quantization = int4_packs.CONFIGURATIONS["gptq"] | change
    int4_packs.edit_config(tmp_path / "packed", quantization_config=quantization)
    with pytest.raises(BadInput, match=named) as error:
        open_model(tmp_path / "packed")
    line = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in line and len(line) < 300
