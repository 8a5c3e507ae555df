"""Configurations in other words: what transformers' classes read is read here, or it is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
import real_models
from moecast.archs import (
    nemotron_h,
)
from moecast.archs.config import Config
from moecast.archs.harmless import check_repeated, refuse_unread, refuse_unread_metadata
from moecast.errors import BadInput
from moecast.sources.checkpoint import read_tensors
from quantities import EXAMPLE, example, ours, read, theirs
from spellings import CHANGES, Values, without


def perturbed(family: str, count: int) -> Iterator[Values]:
    """The example with each change by itself, then with some of them one after the other."""
    for change in CHANGES[family]:
        yield change(example(family))
    choice = random.Random(family)
    for _ in range(count):
        values = example(family)
        for change in choice.sample(CHANGES[family], choice.randint(2, 5)):
            values = change(values)
        yield values


@pytest.mark.parametrize("family", EXAMPLE)
def test_numbers_are_those_of_transformers(family: str) -> None:
    """A refusal is as good, as long as few are refused."""
    agreed = refused = 0
    for values in perturbed(family, 150):
        try:
            found = ours(values)
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            refused += 1
            continue
        assert found == theirs(values), values
        agreed += 1
    assert agreed > 2 * refused


@pytest.mark.parametrize("form", ["type", "rope_type"])
def test_yarn_of_deepseek_v4_is_found_wherever_it_stands(form: str) -> None:
    """By type of layer transformers overlooks it; what is meant is plain."""
    plain = example("deepseek_v4")
    yarn = {form if key == "type" else key: value for key, value in plain.pop("rope_scaling").items()}
    compressed = yarn | {"rope_theta": plain["compress_rope_theta"]}
    main = {"rope_type": "default", "rope_theta": plain["rope_theta"]}
    layers = {"compressed_sparse_attention": compressed, "heavily_compressed_attention": compressed}
    bare = without("rope_theta", "compress_rope_theta")(plain)
    for values in (
        plain | {"rope_parameters": yarn},
        plain | {"rope_scaling": yarn},
        bare | {"rope_parameters": {"main": main, "compress": compressed}},
        bare | {"rope_parameters": {"sliding_attention": main, **layers}},
        plain | {"rope_parameters": yarn | main | {form: "yarn"}, "compress_rope_parameters": compressed}
        if form == "rope_type"
        else plain | {"rope_parameters": yarn},
    ):
        assert read(values)[0] == read(example("deepseek_v4"))[0]
    layers["heavily_compressed_attention"] = compressed | {"factor": 2}
    with pytest.raises(BadInput, match="yarn_factor"):
        read(bare | {"rope_parameters": {"sliding_attention": main, **layers}})
    with pytest.raises(BadInput, match="mscale"):
        read(plain | {"rope_parameters": yarn | {"mscale": 2.0}})


@pytest.mark.parametrize("name", sorted(path.name for path in real_models.DATA.glob("*-config.json")))
def test_published_configurations_are_understood(name: str) -> None:
    read(json.loads((real_models.DATA / name).read_text()))


@pytest.mark.parametrize("family", EXAMPLE)
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attention_multiplier", 0.5, "attention_multiplier"),
        ("block_configs", [{"block_type": "moe", "num_experts_per_tok": 2}], "block_configs"),
        ("attn_logit_softcapping", 30.0, "attn_logit_softcapping"),
        ("attention_chunk_size", 64, "attention_chunk_size"),
        ("quantization_config", {"quant_method": "x", "transform_config": {"u": 1}}, "quantization_config"),
    ],
)
def test_unknown_keys_are_refused_until_the_user_says_so(family: str, key: str, value: object, named: str) -> None:
    values = example(family) | {key: value}
    with pytest.raises(BadInput, match=rf"^config\.json: {named}.* --ignore-config {named}") as error:
        read(values)
    assert len(str(error.value)) < 300
    config = Config(values, "config.json")
    known = [inner for inner in config.unread() if inner != key]
    refuse_unread(config, family, known, [key])


@pytest.mark.parametrize(("family", "first", "second"), [
    ("minimax_m2", "num_local_experts", "num_experts"), ("deepseek_v4", "n_routed_experts", "num_local_experts"),
    ("nemotron_h", "layer_norm_epsilon", "norm_eps"), ("nemotron_h", "n_groups", "mamba_n_groups"),
    ("qwen3_moe", "num_experts", "num_local_experts"), ("gpt_oss", "num_experts_per_tok", "experts_per_token"),
])  # fmt: skip
def test_two_names_of_one_quantity_have_to_agree(family: str, first: str, second: str) -> None:
    values = example(family)
    read(values | {second: values[first]})
    with pytest.raises(BadInput, match=f"{first} is .* but {second}"):
        read(values | {second: 2 * values[first]})


@pytest.mark.parametrize(("family", "key"), [
    ("minimax_m2", "rms_norm_eps"), ("minimax_m2", "rope_theta"), ("deepseek_v4", "hc_eps"),
    ("deepseek_v4", "routed_scaling_factor"), ("deepseek_v4", "swiglu_limit"), ("deepseek_v4", "compress_rope_theta"),
    ("nemotron_h", "layer_norm_epsilon"), ("nemotron_h", "routed_scaling_factor"),
    ("qwen3_moe", "rms_norm_eps"), ("qwen3_moe", "rope_theta"), ("gpt_oss", "swiglu_limit"), ("gpt_oss", "rope_theta"),
    ("cohere2", "logit_scale"), ("cohere2", "layer_norm_eps"), ("cohere2_moe", "rms_norm_eps"),
    ("qwen3_next", "rms_norm_eps"), ("qwen3_next", "rope_theta"), ("qwen3_next", "partial_rotary_factor"),
])  # fmt: skip
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -1.0, 0.0, 1e39, 1e-46, 10**40, -5])
def test_numbers_have_a_range(family: str, key: str, value: float) -> None:
    with pytest.raises(BadInput, match=rf"config\.json: {key} is .*expected a positive number"):
        read(example(family) | {key: value})


def test_layers_of_own_sizes_are_refused_by_their_key() -> None:
    """Nemotron Puzzle: what does not fit is a tensor's shape, and why is a key that nobody read."""
    folder = EXAMPLE["nemotron_h"].parent
    values = json.loads((folder / "config.json").read_text())
    values |= {"n_routed_experts": 2 * values["n_routed_experts"]}
    read_graph, tensors = nemotron_h.MIXTURE.from_checkpoint, read_tensors(folder)
    with pytest.raises(BadInput) as bare:
        read_graph(Config(values, "config.json"), tensors)
    values["block_configs"] = [{"num_experts": 4}]
    with pytest.raises(BadInput, match=r"^config\.json: block_configs gives layers sizes of their own") as named:
        read_graph(Config(values, "config.json"), tensors)
    assert str(named.value).endswith(str(bare.value))


@pytest.mark.parametrize("value", [2**32, 10**30, 0, -1])
def test_whole_numbers_have_a_range(value: int) -> None:
    for family, key in (("minimax_m2", "hidden_size"), ("deepseek_v4", "sliding_window"), ("nemotron_h", "head_dim")):
        with pytest.raises(BadInput, match=rf"config\.json: {key} is .*expected a positive whole number"):
            read(example(family) | {key: value})


def test_keys_of_gguf_files_are_understood_or_refused() -> None:
    """Of the architecture's own alone: llama.cpp reads no other ones."""
    stored = {"tiny.experts": 4, "tiny.tilt": 0.5, "general.tags": ["x"], "publisher.note": "y"}
    metadata = Config(stored, "model.gguf")
    check_repeated(metadata, {"tiny.experts": 4, "tiny.width": 8})
    with pytest.raises(BadInput, match=r"^model\.gguf: tiny\.tilt is 0\.5.* --ignore-config tiny\.tilt$"):
        refuse_unread_metadata(metadata, "tiny", (), ())
    refuse_unread_metadata(metadata, "tiny", ["tilt"], ())
    refuse_unread_metadata(metadata, "tiny", (), ["tiny.tilt"])
    for expected in (5, [4, 5], 4.5):
        with pytest.raises(BadInput, match=r"^model\.gguf: tiny\.experts is 4, expected "):
            check_repeated(metadata, {"tiny.experts": expected})
