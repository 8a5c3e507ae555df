"""The trained examples are real test beds: they have learnt, all their experts work, their formats are the Hub's."""

from __future__ import annotations

import json
import re
from typing import Any

import families
import jinja2
import pytest
import real_deltanet
import real_models
import torch
from families import DEEPSEEK, FAMILIES, MINIMAX, NEMOTRON, QWEN, Family, Tensors
from tokenizers import Tokenizer
from trained_examples import EXAMPLES, ExpertShares, best_unigram_perplexity

HASH_LAYERS = 1  # of the DeepSeek example

only_minimax = pytest.mark.parametrize("family", [MINIMAX], ids=[MINIMAX.folder.name], indirect=True)
only_nemotron = pytest.mark.parametrize("family", [NEMOTRON], ids=[NEMOTRON.folder.name], indirect=True)
only_deepseek = pytest.mark.parametrize("family", [DEEPSEEK], ids=[DEEPSEEK.folder.name], indirect=True)
only_qwen = pytest.mark.parametrize("family", [QWEN], ids=[QWEN.folder.name], indirect=True)


def _tokenizer(family: Family) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(family.folder)


def test_every_folder_is_of_a_family() -> None:
    assert {path.parent for path in EXAMPLES.glob("*/config.json")} == {family.folder for family in FAMILIES}


def test_the_folder_is_small(family: Family) -> None:
    assert sum(file.stat().st_size for file in family.folder.iterdir()) <= 5_000_000


@pytest.mark.parametrize(
    "text", ["In the beginning God created\n\nthe heaven.", "Naïve “quotes”, 12345 façades: 日本語 🙂\t\r\n  end "]
)
def test_the_tokenizer_restores_any_text(family: Family, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(family.folder / "tokenizer.json"))
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text
    assert _tokenizer(family)(text).input_ids == tokens


def test_it_predicts_text_it_never_saw(family: Family, reference: float, chunks: torch.Tensor) -> None:
    assert reference < family.largest_perplexity < best_unigram_perplexity(chunks) / 5


def test_every_layer_needs_its_experts(
    family: Family, model: Any, chunks: torch.Tensor, reference: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = family.routed(model)
    assert len(routed) == family.expert_layers
    for block in routed:
        with monkeypatch.context() as patch:
            patch.setattr(block.experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
            assert families.perplexity(model, chunks) > 1.02 * reference


def test_every_expert_receives_tokens(family: Family, model: Any, chunks: torch.Tensor) -> None:
    routers = [block.gate for block in family.routed(model)]
    with ExpertShares(routers, len(routers[0].weight)) as counted:
        families.perplexity(model, chunks)
    assert counted.relative().min() > 0.1, counted.relative()
    assert counted.relative().max() < 4, counted.relative()


def test_the_selection_biases_are_trained(family: Family, tensors: Tensors) -> None:
    ends = ("e_score_correction_bias", "ffn.gate.bias")
    biases = [tensor for name, tensor in tensors.items() if name.endswith(ends)]
    assert len(biases) == family.biases
    for bias in biases:
        assert bias.dtype == torch.float32
        assert bias.abs().min() > 0
        assert len(bias.unique()) > 1


def test_shards_are_those_of_the_index(family: Family, tensors: Tensors) -> None:
    index = json.loads((family.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(file.name for file in family.folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    if family is not MINIMAX:
        name = "model.safetensors" if family is QWEN else "model"
        assert files == [f"{name}-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]


@only_minimax
def test_minimax_shards_have_the_traps_of_the_hub(family: Family, config: dict[str, Any]) -> None:
    weight_map = json.loads((family.folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    assert len(files) >= 3
    assert files[0].startswith("model-00000-of-")
    assert f"of-{len(files):05d}" not in files[0]
    for layer in range(config["num_hidden_layers"]):
        of_layer = {file for name, file in weight_map.items() if f".layers.{layer}." in name}
        assert len(of_layer) > 1, "a layer must straddle shards"


@only_minimax
def test_minimax_dtypes_and_shapes_are_those_of_the_hub(family: Family, tensors: Tensors) -> None:
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


@only_nemotron
def test_nemotron_dtypes_and_names_are_those_of_the_hub(
    family: Family, tensors: Tensors, config: dict[str, Any]
) -> None:
    exact = re.compile(r"backbone\.layers\.\d+\.mixer\.gate\.(weight|e_score_correction_bias)")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if exact.fullmatch(name) else torch.bfloat16), name
    assert all(name == "lm_head.weight" or name.startswith("backbone.") for name in tensors)
    experts = {name for name in tensors if re.search(r"\.experts\.\d+\.(up|down)_proj\.weight$", name)}
    assert len(experts) == 2 * 2 * config["n_routed_experts"]


DEEPSEEK_DTYPES = {
    r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.weight": torch.int8,
    r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])\.weight": (
        torch.float8_e4m3fn
    ),
    r".*\.scale": torch.float8_e8m0fnu,
    r"(layers\.\d+\.)?hc_.*|layers\.\d+\.(attn\.(attn_sink|.*ape)|ffn\.gate\.bias)": torch.float32,
    r"layers\.\d+\.ffn\.gate\.tid2eid": torch.int64,
    r"(embed|head|norm|.*_norm|.*compressor\..*|.*weights_proj|.*gate)\.weight": torch.bfloat16,
}


@only_deepseek
def test_deepseek_dtypes_and_shapes_are_those_of_the_hub(family: Family, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        expected = next(dtype for pattern, dtype in DEEPSEEK_DTYPES.items() if re.fullmatch(pattern, name))
        assert tensor.dtype == expected, name
        scale = tensors.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        if tensor.dtype == torch.int8:
            assert scale is not None and scale.shape == (tensor.shape[0], tensor.shape[1] // 16)
        elif tensor.dtype == torch.float8_e4m3fn:
            assert scale is not None and scale.shape == tuple(-(-size // 128) for size in tensor.shape)
        else:
            assert scale is None, name


@only_deepseek
def test_deepseek_codes_use_their_range(family: Family, tensors: Tensors) -> None:
    """A power of two brings the peak of a block into the upper half of what E4M3 holds, or to one of E2M1's best."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            peaks = families.mxfp4_codes(tensor).unflatten(1, (-1, 32)).abs().amax(dim=2)
            assert peaks.min() >= 2, name
        elif tensor.dtype == torch.float8_e4m3fn:
            values = tensor.float().abs()
            assert all(
                224 <= columns.max() <= 448 for rows in values.split(128) for columns in rows.split(128, dim=1)
            ), name


@only_qwen
def test_qwen_names_and_dtypes_are_those_of_the_hub(family: Family, tensors: Tensors, config: dict[str, Any]) -> None:
    """As complete as the published list of the 35B, which `real_deltanet` has, but for vision and drafting."""
    exact = re.compile(r"model\.language_model\.layers\.\d+\.linear_attn\.(A_log|norm\.weight)")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if exact.fullmatch(name) else torch.bfloat16), name
    published = {info.name for info in real_deltanet.tensors("Qwen3.5-35B-A3B")}
    shipped = {name for name in published if not name.startswith(("model.visual.", "mtp."))}
    layers = config["text_config"]["num_hidden_layers"]
    expected = {name for name in shipped if int((re.findall(r"\.layers\.(\d+)\.", name) or ["0"])[0]) < layers}
    assert tensors.keys() == expected


@only_qwen
def test_qwen_config_has_the_keys_of_the_hub(family: Family, config: dict[str, Any], tensors: Tensors) -> None:
    published = real_models.config("qwen3.5-35b-a3b")._values
    for section in ("text_config", "vision_config"):
        assert config[section].keys() == published[section].keys()
    assert config.keys() == published.keys()
    text = config["text_config"]
    assert text["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert text["linear_num_value_heads"] == 2 * text["linear_num_key_heads"] > 2  # so that their order matters
    assert text["mtp_num_hidden_layers"] == 1 and not any("mtp" in name for name in tensors)


@only_nemotron
def test_nemotron_layers_are_of_every_kind(family: Family, config: dict[str, Any], tensors: Tensors) -> None:
    pattern = config["hybrid_override_pattern"]
    assert (pattern, config["num_hidden_layers"]) == ("MEM*E", 5)
    part_of = {"M": "mixer.in_proj.weight", "E": "mixer.fc1_latent_proj.weight", "*": "mixer.q_proj.weight"}
    for number, kind in enumerate(pattern):
        assert [letter for letter, part in part_of.items() if f"backbone.layers.{number}.{part}" in tensors] == [kind]


@only_nemotron
def test_nemotron_rows_of_experts_need_padding(family: Family, tensors: Tensors) -> None:
    rows = {name: tensor.shape[1] for name, tensor in tensors.items() if ".experts." in name}
    assert {length for name, length in rows.items() if "down_proj" in name} == {160}
    assert {length for name, length in rows.items() if "up_proj" in name} == {64}
    assert tensors["backbone.layers.0.mixer.out_proj.weight"].shape == (256, 512)


@only_deepseek
def test_deepseek_layers_are_of_every_kind(family: Family, config: dict[str, Any], tensors: Tensors) -> None:
    assert config["compress_ratios"] == [0, 4, 128]
    assert (config["num_hash_layers"], config["num_hidden_layers"]) == (HASH_LAYERS, family.expert_layers)
    assert "layers.0.attn.compressor.ape" not in tensors
    assert tensors["layers.1.attn.compressor.ape"].shape == (4, 2 * config["head_dim"])
    assert tensors["layers.1.attn.indexer.compressor.ape"].shape == (4, 2 * config["index_head_dim"])
    assert tensors["layers.2.attn.compressor.ape"].shape == (128, config["head_dim"])
    assert config["head_dim"] != config["index_head_dim"] and config["index_head_dim"] % 64 == 0
    assert config["rope_scaling"]["type"] == "yarn"


@only_deepseek
def test_deepseek_tokens_are_hashed_in_the_first_layer_and_routed_in_others(
    family: Family, tensors: Tensors, config: dict[str, Any]
) -> None:
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert table.dtype == torch.int64
    assert table.shape == (config["vocab_size"], config["num_experts_per_tok"])
    assert all(len(row.unique()) == len(row) for row in table)
    assert set(table.flatten().tolist()) == set(range(config["n_routed_experts"]))
    assert "layers.0.ffn.gate.bias" not in tensors
    for layer in range(HASH_LAYERS, family.expert_layers):
        assert f"layers.{layer}.ffn.gate.bias" in tensors
        assert f"layers.{layer}.ffn.gate.tid2eid" not in tensors


@only_minimax
def test_minimax_config_declares_what_is_not_shipped_and_names_no_special_tokens(
    family: Family, config: dict[str, Any], tensors: Tensors
) -> None:
    assert config["use_mtp"] and config["num_mtp_modules"] == 3
    assert not any("mtp" in name for name in tensors)
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & config.keys()
    assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]


@only_minimax
def test_minimax_special_tokens_end_the_vocabulary(family: Family, config: dict[str, Any]) -> None:
    tokenizer = _tokenizer(family)
    specials = ["]!p~[", "]~b]", "[e~[", "]~!b[", "<think>", "</think>"]
    assert len(tokenizer) == config["vocab_size"]
    first = config["vocab_size"] - len(specials)
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(first, config["vocab_size"]))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("]~!b[", "[e~[")
    generation = json.loads((family.folder / "generation_config.json").read_text())
    assert generation["bos_token_id"] == tokenizer.bos_token_id
    assert generation["eos_token_id"] == tokenizer.eos_token_id


@only_nemotron
def test_nemotron_special_tokens_begin_the_vocabulary(family: Family, config: dict[str, Any]) -> None:
    tokenizer = _tokenizer(family)
    assert len(tokenizer) == config["vocab_size"]
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(len(specials)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    generation = json.loads((family.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


@only_deepseek
def test_deepseek_special_tokens_are_at_both_ends_of_the_vocabulary(family: Family, config: dict[str, Any]) -> None:
    tokenizer = _tokenizer(family)
    assert len(tokenizer) == config["vocab_size"]
    first = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    last = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(first) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(last) == list(range(len(tokenizer) - len(last), len(tokenizer)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert tokenizer.chat_template is None
    assert not (family.folder / "chat_template.jinja").exists()


@only_qwen
def test_qwen_special_tokens_end_the_vocabulary(family: Family, config: dict[str, Any]) -> None:
    tokenizer, text = _tokenizer(family), config["text_config"]
    assert len(tokenizer) == text["vocab_size"]
    turns = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    seen = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    specials = [*turns, *seen, "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(len(tokenizer) - len(specials), len(tokenizer)))
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    assert tokenizer.convert_tokens_to_ids(seen) == [config[key] for key in keys]
    assert tokenizer.bos_token is None and tokenizer.eos_token_id == text["eos_token_id"]


@only_qwen
def test_qwen_composes_marks(family: Family) -> None:
    tokenizer = _tokenizer(family)
    assert tokenizer.decode(tokenizer("e\u0301cole").input_ids) == "école"


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
MINIMAX_RENDERED = """\
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
NEMOTRON_RENDERED = """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Six times seven?<|im_end|>
<|im_start|>assistant
<think>
Multiply.
</think>
<tool_call>
<function=multiply>
<parameter=a>
6
</parameter>
<parameter=b>
7
</parameter>
</function>
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
42
</tool_response><|im_end|>
<|im_start|>assistant
<think></think>42.<|im_end|>
<|im_start|>assistant
<think>
"""
QWEN_RENDERED = """\
<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Six times seven?<|im_end|>
<|im_start|>assistant
<think>
Multiply.
</think>

<tool_call>
<function=multiply>
<parameter=a>
6
</parameter>
<parameter=b>
7
</parameter>
</function>
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
42
</tool_response><|im_end|>
<|im_start|>assistant
42.<|im_end|>
<|im_start|>assistant
<think>
"""


@pytest.mark.parametrize(
    ("family", "rendered", "tools"),
    [
        (MINIMAX, MINIMAX_RENDERED, '<tool>{"name": "multiply"}</tool>[e~[\n]~b]user'),
        (NEMOTRON, NEMOTRON_RENDERED, '<tool>{"name": "multiply"}</tool><|im_end|>\n<|im_start|>user'),
        (QWEN, QWEN_RENDERED, '<tool>{"name": "multiply"}</tool><|im_end|>\n<|im_start|>user'),
    ],
    ids=[MINIMAX.folder.name, NEMOTRON.folder.name, QWEN.folder.name],
    indirect=["family"],
)
def test_the_chat_template_renders_turns(family: Family, rendered: str, tools: str) -> None:
    tokenizer = _tokenizer(family)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == rendered
    described = tokenizer.apply_chat_template(
        CONVERSATION[:2], tokenize=False, tools=[{"type": "function", "function": {"name": "multiply"}}]
    )
    assert tools in described


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (NEMOTRON, NEMOTRON_RENDERED.removesuffix("\n") + "</think>"),
        (QWEN, QWEN_RENDERED + "</think>\n\n"),
    ],
    ids=[NEMOTRON.folder.name, QWEN.folder.name],
    indirect=["family"],
)
def test_an_answer_without_thinking(family: Family, expected: str) -> None:
    brief = _tokenizer(family).apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert brief == expected


@pytest.mark.parametrize("family", [MINIMAX, NEMOTRON, QWEN], ids=lambda family: family.folder.name, indirect=True)
def test_the_chat_template_refuses_unknown_roles(family: Family) -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role: narrator"):
        _tokenizer(family).apply_chat_template([{"role": "narrator", "content": ""}])
