"""The adapter: published tensor lists are consumed exactly once, sizes are llama.cpp's, configurations are asserted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import real_gpt_oss
import real_models
from moecast.archs.config import Config
from moecast.archs.gpt_oss import ARCHITECTURE
from moecast.archs.graph import Attention, Graph, MoE, Router
from moecast.archs.harmless import refuse_unread
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.fit import Machine, fit
from moecast.quant.planning.plan import plan_file, plan_tensors
from moecast.quant.planning.recipes import recipe_named
from moecast.runner.blocks.rotary import frequencies

GIB = 2**30
RELEASES = ["gpt-oss-20b", "gpt-oss-120b"]


def graph_of(name: str, mxfp4: bool = True, **changes: Any) -> Graph:
    """Of a published list, with some keys of its config.json changed."""
    config = Config(dict(real_models.config(name)._values) | changes, "config.json")
    graph = ARCHITECTURE.from_checkpoint(config, real_gpt_oss.tensors(name, mxfp4))
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    return graph


_published = cache(graph_of)


@pytest.mark.parametrize(
    ("name", "count", "size"), [("gpt-oss-20b", 459, 13_761_264_768), ("gpt-oss-120b", 687, 65_248_815_744)]
)
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    tensors = real_gpt_oss.tensors(name)
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize(
    ("name", "total", "active", "layers"),
    [("gpt-oss-20b", 20.91, 3.61, 24), ("gpt-oss-120b", 116.83, 5.13, 36)],  # in billions
)
def test_real_model(name: str, total: float, active: float, layers: int) -> None:
    """As the model card says, which counts the embedding once."""
    graph = graph_of(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.01)
    assert graph.active_parameters() / 1e9 == pytest.approx(active, abs=0.05)
    each = 2 * 8 * 64 * 2  # keys and values of a token, in a layer
    assert graph.state_bytes_per_token() == layers // 2 * each
    assert graph.fixed_state_bytes() == layers // 2 * 128 * each
    first, second = (layer.operations[0] for layer in graph.layers[:2])
    assert isinstance(first, Attention) and isinstance(second, Attention)
    assert (first.window, second.window) == (128, None) and first.sink.shape == (64,)
    experts = graph.layers[-1].operations[1]
    assert isinstance(experts, MoE) and isinstance(experts.router, Router) and experts.router.top_k == 4
    assert (experts.clamp, experts.down_bias.shape) == (7.0, (experts.experts, 2880))


def test_published_rotations_are_not_rounded() -> None:
    """Against transformers, whose magnitude is 1.34657 too; the pairs between 8.09 and 17.40 of 32 are blended."""
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = graph_of("gpt-oss-20b").layers[0].operations[0].rope
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](GptOssConfig(), "cpu")
    assert frequencies(rope).numpy() == pytest.approx(expected.numpy(), rel=1e-6)
    assert rope.yarn.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("name", RELEASES)
def test_fine_tunes_hold_the_same_weights(name: str) -> None:
    published, tuned = graph_of(name), graph_of(name, mxfp4=False, quantization_config=None)
    assert [(w.name, w.shape) for w in tuned.weights()] == [(w.name, w.shape) for w in published.weights()]
    assert published.notes == tuned.notes and len(tuned.notes) == 1


@pytest.mark.parametrize(("name", "size"), [("gpt-oss-20b", 11.27), ("gpt-oss-120b", 59.02)])
def test_planned_size_is_that_of_published_files(name: str, size: float) -> None:
    """GiB that llama.cpp prints of ggml-org's files: experts in MXFP4, other matrices in Q8_0."""
    for mxfp4, quant in ((True, "MXFP4_MOE"), (True, "Q8_0"), (False, "MXFP4_MOE")):
        plan = plan_tensors(_published(name, mxfp4), recipe_named(quant))
        assert plan.bytes / GIB == pytest.approx(size, abs=0.005)


@pytest.mark.parametrize(
    ("quant", "types"),
    [  # what rows of 2880 take in llama-quantize: embedding, query, experts; attn_output has rows of 4096
        ("Q4_K_M", ("Q5_0", "Q5_0", "Q5_0", "Q4_K")), ("Q5_K_M", ("Q5_1", "Q5_1", "Q5_1", "Q5_K")),
        ("Q6_K", ("Q8_0", "Q8_0", "Q8_0", "Q6_K")), ("Q3_K_M", ("Q4_0", "Q4_0", "Q4_0", "Q4_K")),
        ("Q2_K", ("Q4_0", "Q4_0", "Q4_0", "Q3_K")), ("IQ4_XS", ("IQ4_NL", "IQ4_NL", "IQ4_NL", "IQ4_XS")),
    ],
)  # fmt: skip
def test_rows_of_2880_fall_back(quant: str, types: tuple[str, ...]) -> None:
    """But experts stay in MXFP4, if that is what they are in: it takes less than any of these."""
    names = ("token_embd", "blk.3.attn_q", "blk.3.ffn_up_exps", "blk.3.attn_output")
    for mxfp4 in (False, True):
        plan = plan_tensors(_published("gpt-oss-20b", mxfp4), recipe_named(quant))
        found = {tensor.weight.name.removesuffix(".weight"): tensor.type.name for tensor in plan.tensors}
        assert found["output"] == "Q8_0"
        expected = (*types[:2], "MXFP4" if mxfp4 else types[2], types[3])
        assert tuple(found[name] for name in names) == expected


def test_padding_pays_below_four_bits() -> None:
    """To 3072, 6.7 % more in either direction; experts that are stored in MXFP4 are given up for much less alone."""
    for mxfp4, gains in ((True, {"Q4_K_M": False, "Q3_K_M": False, "Q2_K": True}), (False, {"Q4_K_M": True})):
        for quant, gain in gains.items():
            plan = plan_file(_published("gpt-oss-20b", mxfp4), recipe_named(quant))
            assert plan.graph.hidden_size == (3072 if gain else 2880), quant
            assert any(note.startswith("padded rows" if gain else "no rows padded") for note in plan.notes)


def test_fits_into_a_machine() -> None:
    """Windows take as much for any context; what is stored exactly is not given up where there is room."""
    graph = _published("gpt-oss-120b")
    found = fit(graph, Machine(ram=64 * GIB, vram=24 * GIB, context=32_768), typical_damage(graph))
    assert found.state_bytes == 18 * 2048 * (32_768 + 128)
    experts = {tensor.type.name for tensor in found.plan.tensors if tensor.weight.experts is not None}
    assert experts == {"MXFP4"} and 0 < found.layers_in_ram < 36


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_act", "gelu", "hidden_act"), ("attention_bias", False, "attention_bias"),
        ("swiglu_alpha", 1.5, "swiglu_alpha"), ("layer_types", ["full_attention"], "layer_types"),
        ("layer_types", ["chunked_attention"] * 24, "layer_types"), ("sliding_window", None, "window is missing"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope type is 'linear'"),
        ("rope_scaling", {"rope_type": "yarn"}, "factor is missing"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}, "beta_fast"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate"),
        ("initial_context_length", 8192, "initial_context_length"), ("experts_per_token", 8, "experts_per_token"),
        ("num_local_experts", 2, "num_experts_per_tok"), ("num_attention_heads", 30, "attention heads"),
        ("head_dim", 63, "head_dim"),
    ],
)  # fmt: skip
def test_unknown_config_values_are_named(key: str, value: object, named: str) -> None:
    with pytest.raises(BadInput, match=rf"^config\.json.*{named}") as error:
        graph_of("gpt-oss-20b", **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mxfp4", [True, False], ids=["MXFP4", "BF16"])
@pytest.mark.parametrize("missing", [0, 12, 17, 200, -1])
def test_missing_tensor_is_named(missing: int, mxfp4: bool) -> None:
    tensors = list(real_gpt_oss.tensors("gpt-oss-20b", mxfp4))
    name = tensors.pop(missing).name
    with pytest.raises(BadInput, match=name.removesuffix("_blocks")):
        ARCHITECTURE.from_checkpoint(real_models.config("gpt-oss-20b"), tensors)


@pytest.mark.parametrize("pattern", [None, 2, [True, False] * 2, [False, True, True, False], 1, 0, 3])
def test_pattern_of_windows_is_read_as_llama_reads_it(pattern: object) -> None:
    from moecast.archs.gpt_oss import _read_pattern

    key = "gpt-oss.attention.sliding_window_pattern"
    found = _read_pattern(Config({"gpt-oss.block_count": 4, key: pattern}, "model.gguf"))
    period = {None: 2, 0: 5}.get(pattern if not isinstance(pattern, list) else -1, pattern)
    assert [*found] == (pattern if isinstance(pattern, list) else [n % period < period - 1 for n in range(4)])
    for wrong in ([True] * 3, "x", -1):
        with pytest.raises(BadInput, match=rf"^model\.gguf: {key} is .*, expected true or false for each layer"):
            _read_pattern(Config({"gpt-oss.block_count": 4, key: wrong}, "model.gguf"))
