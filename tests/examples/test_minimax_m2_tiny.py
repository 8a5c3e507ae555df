"""The trained example is a real test bed: it has learnt, all its experts work, and its format is the Hub's."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from trained_examples import EXAMPLES, ExpertShares, best_unigram_perplexity
from transformers import AutoTokenizer, MiniMaxM2ForCausalLM

FOLDER = EXAMPLES / "minimax-m2-tiny"
LARGEST_PERPLEXITY = 25.0

Tensors = dict[str, torch.Tensor]
Perplexity = Callable[[MiniMaxM2ForCausalLM, torch.Tensor], float]


@pytest.fixture(scope="module")
def model(load_minimax_m2: Callable[[Path], MiniMaxM2ForCausalLM]) -> MiniMaxM2ForCausalLM:
    return load_minimax_m2(FOLDER)


def test_it_predicts_text_it_never_saw(reference: float, chunks: torch.Tensor) -> None:
    assert reference < LARGEST_PERPLEXITY < best_unigram_perplexity(chunks) / 5


def test_every_layer_needs_its_experts(
    model: MiniMaxM2ForCausalLM,
    chunks: torch.Tensor,
    reference: float,
    perplexity: Perplexity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for layer in model.model.layers:
        with monkeypatch.context() as patch:
            patch.setattr(layer.mlp.experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
            assert perplexity(model, chunks) > 1.02 * reference


def test_every_expert_receives_tokens(
    model: MiniMaxM2ForCausalLM, chunks: torch.Tensor, perplexity: Perplexity
) -> None:
    with ExpertShares([layer.mlp.gate for layer in model.model.layers], model.config.num_local_experts) as counted:
        perplexity(model, chunks)
    assert counted.relative().min() > 0.1, counted.relative()
    assert counted.relative().max() < 4, counted.relative()


def test_the_selection_biases_are_trained(tensors: Tensors, config: dict[str, Any]) -> None:
    for layer in range(config["num_hidden_layers"]):
        bias = tensors[f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"]
        assert bias.dtype == torch.float32
        assert bias.abs().min() > 0
        assert len(bias.unique()) > 1


def test_dtypes_and_shapes_are_those_of_the_hub(tensors: Tensors) -> None:
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    linear = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|block_sparse_moe\.experts\.\d+\.w[123])\.weight")
    assert fp8 == {name for name in tensors if linear.fullmatch(name)}
    for name in fp8:
        scale = tensors[f"{name}_scale_inv"]
        assert scale.dtype == torch.float32
        assert scale.shape == tuple(-(-size // 128) for size in tensors[name].shape)
        # Each block uses the whole range of E4M3: its largest magnitude is 448.
        blocks = tensors[name].float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        assert (blocks.abs().amax(dim=(1, 3)) == 448).all()
    for name in tensors.keys() - fp8:
        exact = name.endswith(("_scale_inv", "gate.weight", "e_score_correction_bias"))
        assert tensors[name].dtype == (torch.float32 if exact else torch.bfloat16)


def test_shards_have_the_traps_of_the_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(file.name for file in FOLDER.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) >= 3
    assert files[0].startswith("model-00000-of-")
    assert f"of-{len(files):05d}" not in files[0]
    for layer in range(config["num_hidden_layers"]):
        of_layer = {file for name, file in index["weight_map"].items() if f".layers.{layer}." in name}
        assert len(of_layer) > 1, "a layer must straddle shards"


def test_config_declares_what_is_not_shipped_and_names_no_special_tokens(
    config: dict[str, Any], tensors: Tensors
) -> None:
    assert config["use_mtp"] and config["num_mtp_modules"] == 3
    assert not any("mtp" in name for name in tensors)
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & config.keys()
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]


def test_special_tokens_end_the_vocabulary(config: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    specials = ["]!p~[", "]~b]", "[e~[", "]~!b[", "<think>", "</think>"]
    assert len(tokenizer) == config["vocab_size"]
    first = config["vocab_size"] - len(specials)
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(first, config["vocab_size"]))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("]~!b[", "[e~[")
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["bos_token_id"] == tokenizer.bos_token_id
    assert generation["eos_token_id"] == tokenizer.eos_token_id


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Six times seven?"},
    {
        "role": "assistant",
        "reasoning_content": "Multiply.",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": "7"}}}],
    },
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "42."},
]
RENDERED = """\
]~!b[]~b]system
Be brief.[e~[
]~b]user
Six times seven?[e~[
]~b]ai
<think>
Multiply.
</think>


<minimax:tool_call>
<invoke name="multiply">
<parameter name="a">6</parameter>
<parameter name="b">7</parameter>
</invoke>
</minimax:tool_call>[e~[
]~b]tool
<response>42</response>[e~[
]~b]ai
42.[e~[
]~b]ai
<think>
"""


def test_the_chat_template_renders_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == RENDERED
    described = tokenizer.apply_chat_template(
        CONVERSATION[:2], tokenize=False, tools=[{"type": "function", "function": {"name": "multiply"}}]
    )
    assert '<tool>{"name": "multiply"}</tool>[e~[\n]~b]user' in described


def test_the_chat_template_refuses_unknown_roles() -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role: narrator"):
        AutoTokenizer.from_pretrained(FOLDER).apply_chat_template([{"role": "narrator", "content": ""}])
