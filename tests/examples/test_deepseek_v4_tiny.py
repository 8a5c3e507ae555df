"""The trained example is a real test bed: it has learnt, all its experts work, and its format is the Hub's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trained_examples import EXAMPLES, ExpertShares, best_unigram_perplexity
from transformers import AutoTokenizer, DeepseekV4ForCausalLM, PreTrainedModel

FOLDER = EXAMPLES / "deepseek-v4-tiny"
LARGEST_PERPLEXITY = 40.0
LAYERS, HASH_LAYERS = 3, 1
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

Tensors = dict[str, torch.Tensor]
Perplexity = Callable[[PreTrainedModel, torch.Tensor], float]


def dequantized(tensors: Tensors) -> Tensors:
    """The values that the stored tensors stand for, under the same names; float32 but for the hash tables."""
    values = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if scale is None:
            values[name] = tensor if tensor.dtype == torch.int64 else tensor.float()
        elif tensor.dtype == torch.int8:
            values[name] = _codes(tensor) * scale.float().repeat_interleave(32, dim=1)
        else:
            rows, columns = tensor.shape
            factors = scale.float().repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
            values[name] = tensor.float() * factors[:rows, :columns]
    return values


def _codes(packed: torch.Tensor) -> torch.Tensor:
    """The even column of two is in the low half of a byte."""
    codes = packed.view(torch.uint8).long()
    return E2M1[torch.stack([codes & 15, codes >> 4], dim=-1)].flatten(1)


@pytest.fixture(scope="module")
def model(tensors: Tensors, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> DeepseekV4ForCausalLM:
    """Dequantized by hand; the published names and keys are understood by transformers."""
    folder = tmp_path_factory.mktemp("dequantized")
    save_file(dequantized(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    stored = ("quantization_config", "expert_dtype")
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in stored}))
    model, report = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def test_it_predicts_text_it_never_saw(reference: float, chunks: torch.Tensor) -> None:
    assert reference < LARGEST_PERPLEXITY < best_unigram_perplexity(chunks) / 5


@pytest.mark.parametrize("number", range(LAYERS))
def test_every_layer_needs_its_experts(
    model: DeepseekV4ForCausalLM,
    chunks: torch.Tensor,
    reference: float,
    perplexity: Perplexity,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    experts = model.model.layers[number].mlp.experts
    monkeypatch.setattr(experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
    assert perplexity(model, chunks) > 1.02 * reference


def test_every_expert_receives_tokens(
    model: DeepseekV4ForCausalLM, chunks: torch.Tensor, perplexity: Perplexity
) -> None:
    with ExpertShares([layer.mlp.gate for layer in model.model.layers], model.config.n_routed_experts) as counted:
        perplexity(model, chunks)
    assert counted.relative().min() > 0.1, counted.relative()
    assert counted.relative().max() < 4, counted.relative()


def test_layers_are_of_every_kind(config: dict[str, Any], tensors: Tensors) -> None:
    assert config["compress_ratios"] == [0, 4, 128]
    assert (config["num_hash_layers"], config["num_hidden_layers"]) == (HASH_LAYERS, LAYERS)
    assert "layers.0.attn.compressor.ape" not in tensors
    assert tensors["layers.1.attn.compressor.ape"].shape == (4, 2 * config["head_dim"])
    assert tensors["layers.1.attn.indexer.compressor.ape"].shape == (4, 2 * config["index_head_dim"])
    assert tensors["layers.2.attn.compressor.ape"].shape == (128, config["head_dim"])
    assert config["head_dim"] != config["index_head_dim"] and config["index_head_dim"] % 64 == 0
    assert config["rope_scaling"]["type"] == "yarn"


def test_tokens_are_hashed_in_the_first_layer_and_routed_in_others(tensors: Tensors, config: dict[str, Any]) -> None:
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert table.dtype == torch.int64
    assert table.shape == (config["vocab_size"], config["num_experts_per_tok"])
    assert all(len(row.unique()) == len(row) for row in table)
    assert set(table.flatten().tolist()) == set(range(config["n_routed_experts"]))
    assert "layers.0.ffn.gate.bias" not in tensors
    for layer in range(HASH_LAYERS, LAYERS):
        bias = tensors[f"layers.{layer}.ffn.gate.bias"]
        assert bias.abs().min() > 0 and len(bias.unique()) > 1
        assert f"layers.{layer}.ffn.gate.tid2eid" not in tensors


DTYPES = {
    r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.weight": torch.int8,
    r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])\.weight": (
        torch.float8_e4m3fn
    ),
    r".*\.scale": torch.float8_e8m0fnu,
    r"(layers\.\d+\.)?hc_.*|layers\.\d+\.(attn\.(attn_sink|.*ape)|ffn\.gate\.bias)": torch.float32,
    r"layers\.\d+\.ffn\.gate\.tid2eid": torch.int64,
    r"(embed|head|norm|.*_norm|.*compressor\..*|.*weights_proj|.*gate)\.weight": torch.bfloat16,
}


def test_dtypes_and_shapes_are_those_of_the_hub(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        assert tensor.dtype == next(dtype for pattern, dtype in DTYPES.items() if re.fullmatch(pattern, name)), name
        scale = tensors.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        if tensor.dtype == torch.int8:
            assert scale is not None and scale.shape == (tensor.shape[0], tensor.shape[1] // 16)
        elif tensor.dtype == torch.float8_e4m3fn:
            assert scale is not None and scale.shape == tuple(-(-size // 128) for size in tensor.shape)
        else:
            assert scale is None, name


def test_codes_use_their_range(tensors: Tensors) -> None:
    """A power of two brings the peak of a block into the upper half of what E4M3 holds, or to one of E2M1's best."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            peaks = _codes(tensor).unflatten(1, (-1, 32)).abs().amax(dim=2)
            assert peaks.min() >= 2, name
        elif tensor.dtype == torch.float8_e4m3fn:
            values = tensor.float().abs()
            assert all(
                224 <= columns.max() <= 448 for rows in values.split(128) for columns in rows.split(128, dim=1)
            ), name


def test_shards_are_those_of_the_index(tensors: Tensors) -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(file.name for file in FOLDER.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]


def test_special_tokens_are_at_both_ends_of_the_vocabulary(config: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer) == config["vocab_size"]
    first = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    last = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(first) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(last) == list(range(len(tokenizer) - len(last), len(tokenizer)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert tokenizer.chat_template is None
    assert not (FOLDER / "chat_template.jinja").exists()
