"""Configurations in other words: what transformers' classes read is read here, or it is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import real_models
from moecast.archs import deepseek_v4, minimax_m2, nemotron_h
from moecast.archs.architecture import Architecture
from moecast.archs.config import Config
from moecast.archs.harmless import check_repeated, refuse_unread, refuse_unread_metadata
from moecast.errors import BadInput
from moecast.sources.checkpoint import read_tensors
from transformers import AutoConfig

Values = dict[str, Any]
EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = {"minimax_m2": "minimax-m2-tiny", "deepseek_v4": "deepseek-v4-tiny", "nemotron_h": "nemotron-3-tiny"}
RATIOS = {value: key for key, value in deepseek_v4.RATIOS.items()}


def example(family: str) -> Values:
    values: Values = json.loads((EXAMPLES / EXAMPLE[family] / "config.json").read_text())
    values.pop("quantization_config", None)
    if "time_step_limit" in values:
        values["time_step_limit"] = [0.0, float("inf")]
    values.pop("norm_eps", None)  # another name of layer_norm_epsilon
    return values


def read(values: Values) -> tuple[Any, Architecture]:
    """The quantities of a configuration of which every key has been understood."""
    config = Config(values, "config.json")
    match values["model_type"]:
        case "minimax_m2":
            found, architecture = minimax_m2._read_config(config), minimax_m2.ARCHITECTURE
        case "deepseek_v4":
            found, architecture = deepseek_v4._read_config(config), deepseek_v4.ARCHITECTURE
        case _:
            found, architecture = nemotron_h._read_config(config, drafts=False), nemotron_h.MIXTURE
    config.flag("tie_word_embeddings", default=False)
    refuse_unread(config, architecture.name, architecture.harmless, ())
    return found, architecture


def ours(values: Values) -> Values:
    d, _ = read(values)
    shared = {"heads": d.heads, "head_size": d.head_size, "epsilon": d.epsilon, "experts": d.experts, "top_k": d.top_k}
    match values["model_type"]:
        case "minimax_m2":
            return shared | {"rotary": d.rotary_size, "theta": d.rope_base, "width": d.expert_size}
        case "deepseek_v4":
            yarn = (d.yarn_factor, d.yarn_context) if d.scaling == "yarn" else None
            thetas = (d.rope_base, d.compressed_rope_base)
            of_layers = {"ratios": d.ratios, "hashed": d.hash_layers}
            return (
                shared | of_layers | {"rotary": d.rotary_size, "theta": thetas, "yarn": yarn, "scale": d.router_scale}
            )
        case _:
            return shared | {
                "kinds": d.kinds,
                "groups": (d.router_groups, d.router_groups_used, d.mamba_groups),
                "scale": d.router_scale,
                "kernel": d.kernel,
            }


def theirs(values: Values) -> Values:
    """The same of transformers' class."""
    values = copy.deepcopy(values)
    c = AutoConfig.for_model(values.pop("model_type"), **values)
    shared = {"heads": c.num_attention_heads, "head_size": c.head_dim, "top_k": c.num_experts_per_tok}
    match c.model_type:
        case "minimax_m2":
            rope = c.rope_parameters
            assert rope["rope_type"] == "default"
            rotary = int(c.head_dim * rope.get("partial_rotary_factor", 1.0))
            found = {"epsilon": c.rms_norm_eps, "experts": c.num_local_experts, "width": c.intermediate_size}
            return shared | found | {"rotary": rotary, "theta": rope["rope_theta"]}
        case "deepseek_v4":
            main, compress = c.rope_parameters["main"], c.rope_parameters["compress"]
            yarn = compress["rope_type"] == "yarn"
            return shared | {
                "epsilon": c.rms_norm_eps,
                "experts": c.n_routed_experts,
                "ratios": tuple(deepseek_v4.RATIOS[kind] for kind in c.layer_types),
                "hashed": c.mlp_layer_types.count("hash_moe"),
                "rotary": c.qk_rope_head_dim,
                "theta": (main["rope_theta"], compress["rope_theta"]),
                "yarn": (compress["factor"], compress["original_max_position_embeddings"]) if yarn else None,
                "scale": c.routed_scaling_factor,
            }
        case _:
            letters = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}
            return shared | {
                "epsilon": c.layer_norm_epsilon,
                "experts": c.n_routed_experts,
                "kinds": "".join(letters[kind] for kind in c.layers_block_type),
                "groups": (c.n_group, c.topk_group, c.n_groups),
                "scale": c.routed_scaling_factor,
                "kernel": c.conv_kernel,
            }


def _replaced(**values: Any) -> Callable[[Values], Values]:
    return lambda config: config | values


def _without(*keys: str) -> Callable[[Values], Values]:
    return lambda config: {key: value for key, value in config.items() if key not in keys}


def _renamed(old: str, new: str) -> Callable[[Values], Values]:
    return lambda config: {new if key == old else key: value for key, value in config.items()}


def _inside(section: str, **values: Any) -> Callable[[Values], Values]:
    """Values in a section, which is made where there is none."""
    return lambda config: config | {section: (config.get(section) or {}) | values}


def _flat(config: Values) -> Values:
    """YaRN in one `rope_parameters`."""
    yarn = config.get("rope_scaling") or {}
    if "type" not in yarn or "rope_parameters" in config:
        return config
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    flat = {"rope_type": yarn["type"], "rope_theta": config.get("rope_theta", 1e4)}
    return kept | {"rope_parameters": flat | {key: value for key, value in yarn.items() if key != "type"}}


def _sections(config: Values) -> Values:
    """The same in a section of its own, beside the other embedding's."""
    flat = _flat(config).get("rope_parameters", {})
    if "factor" not in flat or "main" in flat:
        return config
    compress = flat | {"rope_theta": 7e4, "attention_factor": 1.0}
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    return kept | {"rope_parameters": {"main": {"rope_type": "default", "rope_theta": 3e4}, "compress": compress}}


def _saved(config: Values) -> Values:
    """As transformers writes it again."""
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    saved: Values = json.loads(AutoConfig.for_model(config["model_type"], **values).to_json_string())
    if "time_step_limit" in saved:
        saved["time_step_limit"] = [0.0, float("inf")]  # written in a way of its own
    return saved


def _letters_as_words(config: Values) -> Values:
    words = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    if "hybrid_override_pattern" not in config:
        return config
    kinds = [words[kind] for kind in config["hybrid_override_pattern"]]
    return _without("hybrid_override_pattern")(config) | {"layers_block_type": kinds}


def _ratios_as_words(config: Values) -> Values:
    """`layer_types` counts before `compress_ratios`."""
    count = config["num_hidden_layers"]
    if "compress_ratios" not in config:
        return config
    return config | {"layer_types": [RATIOS[ratio] for ratio in reversed(config["compress_ratios"][:count])]}


COMMON = [
    _saved,
    _replaced(num_experts_per_tok=1),
    _replaced(attention_dropout=0.1, use_cache=False, temperature=0.7),
    _replaced(rope_scaling=None),
    _replaced(sliding_window_pattern=None, unheard_of=None, other={}),
]
CHANGES: dict[str, list[Callable[[Values], Values]]] = {
    "minimax_m2": [
        *COMMON,
        _replaced(rope_theta=12345.0),
        _inside("rope_parameters", rope_theta=777.0, rope_type="default"),
        _inside("rope_scaling", rope_theta=888.0, type="default"),
        _inside("rope_parameters", partial_rotary_factor=0.25),
        _replaced(partial_rotary_factor=0.75),
        _without("rotary_dim"),
        _without("rope_theta"),
        _renamed("num_local_experts", "num_experts"),
        _replaced(rms_norm_eps=3e-5),
        _replaced(scoring_func="sigmoid"),
        _replaced(rope_scaling={"type": "default"}),
    ],
    "deepseek_v4": [
        *COMMON,
        _flat,
        _sections,
        _ratios_as_words,
        _without("rope_theta"),
        _without("compress_rope_theta"),
        _replaced(rope_theta=12345.0),
        _replaced(compress_rope_theta=54321.0),
        _replaced(routed_scaling_factor=2.25),
        _renamed("n_routed_experts", "num_local_experts"),
        _replaced(mlp_layer_types=["hash_moe", "hash_moe", "moe"]),
        _replaced(compress_rate_csa=4, compress_rate_hca=128),
        _without("rope_scaling"),
    ],
    "nemotron_h": [
        *COMMON,
        _letters_as_words,
        _renamed("n_groups", "mamba_n_groups"),
        _renamed("conv_kernel", "mamba_d_conv"),
        _replaced(n_group=4, topk_group=2),
        _replaced(routed_scaling_factor=1.5),
        _replaced(layer_norm_epsilon=2e-5),
        _without("n_group", "topk_group"),
        _replaced(rope_theta=777.0, partial_rotary_factor=0.5),
        _replaced(mamba_dt_min=0.1, mamba_expand=3, mamba_chunk_size=64),
        _renamed("n_routed_experts", "num_local_experts"),
    ],
}


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
    bare = _without("rope_theta", "compress_rope_theta")(plain)
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
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("use_sliding_window", True, "use_sliding_window"),
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
])  # fmt: skip
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -1.0, 0.0, 1e39, 1e-46, 10**40, -5])
def test_numbers_have_a_range(family: str, key: str, value: float) -> None:
    with pytest.raises(BadInput, match=rf"config\.json: {key} is .*expected a positive number"):
        read(example(family) | {key: value})


def test_layers_of_own_sizes_are_refused_by_their_key() -> None:
    """Nemotron Puzzle: what does not fit is a tensor's shape, and why is a key that nobody read."""
    folder = EXAMPLES / EXAMPLE["nemotron_h"]
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
