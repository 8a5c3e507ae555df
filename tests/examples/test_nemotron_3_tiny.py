"""The trained example is a real test bed: it has learnt, all its experts work, and its format is the Hub's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import pytest
import torch
from trained_examples import EXAMPLES, ExpertShares, best_unigram_perplexity
from transformers import AutoTokenizer, NemotronHForCausalLM, PreTrainedModel

FOLDER = EXAMPLES / "nemotron-3-tiny"
LARGEST_PERPLEXITY = 30.0

Tensors = dict[str, torch.Tensor]
Perplexity = Callable[[PreTrainedModel, torch.Tensor], float]


@pytest.fixture(scope="module")
def model() -> NemotronHForCausalLM:
    """Loaded by transformers from the published names, in float32, without its clamp of the state-space step."""
    model, report = NemotronHForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, time_step_min=1e-30, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def _routed(model: NemotronHForCausalLM) -> list[Any]:
    return [layer.mixer for layer in model.model.layers if hasattr(layer.mixer, "experts")]


def test_it_predicts_text_it_never_saw(reference: float, chunks: torch.Tensor) -> None:
    assert reference < LARGEST_PERPLEXITY < best_unigram_perplexity(chunks) / 5


@pytest.mark.parametrize("number", [0, 1])
def test_every_layer_needs_its_experts(
    model: NemotronHForCausalLM,
    chunks: torch.Tensor,
    reference: float,
    perplexity: Perplexity,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    monkeypatch.setattr(_routed(model)[number].experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
    assert perplexity(model, chunks) > 1.02 * reference


def test_every_expert_receives_tokens(
    model: NemotronHForCausalLM, chunks: torch.Tensor, perplexity: Perplexity
) -> None:
    with ExpertShares([mixer.gate for mixer in _routed(model)], model.config.n_routed_experts) as counted:
        perplexity(model, chunks)
    assert counted.relative().min() > 0.1, counted.relative()
    assert counted.relative().max() < 4, counted.relative()


def test_layers_are_of_every_kind(config: dict[str, Any], tensors: Tensors) -> None:
    pattern = config["hybrid_override_pattern"]
    assert (pattern, config["num_hidden_layers"]) == ("MEM*E", 5)
    part_of = {"M": "mixer.in_proj.weight", "E": "mixer.fc1_latent_proj.weight", "*": "mixer.q_proj.weight"}
    for number, kind in enumerate(pattern):
        assert [letter for letter, part in part_of.items() if f"backbone.layers.{number}.{part}" in tensors] == [kind]


def test_rows_of_experts_need_padding(tensors: Tensors) -> None:
    rows = {name: tensor.shape[1] for name, tensor in tensors.items() if ".experts." in name}
    assert {length for name, length in rows.items() if "down_proj" in name} == {160}
    assert {length for name, length in rows.items() if "up_proj" in name} == {64}
    assert tensors["backbone.layers.0.mixer.out_proj.weight"].shape == (256, 512)


def test_dtypes_and_names_are_those_of_the_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    exact = re.compile(r"backbone\.layers\.\d+\.mixer\.gate\.(weight|e_score_correction_bias)")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if exact.fullmatch(name) else torch.bfloat16), name
    assert all(name == "lm_head.weight" or name.startswith("backbone.") for name in tensors)
    experts = {name for name in tensors if re.search(r"\.experts\.\d+\.(up|down)_proj\.weight$", name)}
    assert len(experts) == 2 * 2 * config["n_routed_experts"]


def test_the_selection_biases_are_trained(tensors: Tensors) -> None:
    biases = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(bias.abs().min() > 0 and len(bias.unique()) > 1 for bias in biases)


def test_shards_are_those_of_the_index(tensors: Tensors) -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(file.name for file in FOLDER.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files == [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]


def test_special_tokens_begin_the_vocabulary(config: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert len(tokenizer) == config["vocab_size"]
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(len(specials)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


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


def test_the_chat_template_renders_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == RENDERED
    brief = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert brief == RENDERED.removesuffix("<think>\n") + "<think></think>"
    described = tokenizer.apply_chat_template(
        CONVERSATION[:2], tokenize=False, tools=[{"type": "function", "function": {"name": "multiply"}}]
    )
    assert '<tool>{"name": "multiply"}</tool><|im_end|>\n<|im_start|>user' in described


def test_the_chat_template_refuses_unknown_roles() -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role: narrator"):
        AutoTokenizer.from_pretrained(FOLDER).apply_chat_template([{"role": "narrator", "content": ""}])
