"""The adapter: published tensor lists are consumed exactly once, sizes are llama.cpp's, configurations are asserted."""

from __future__ import annotations

from typing import Any

import pytest
import real_models
import real_qwen3
from moecast.archs.config import Config
from moecast.archs.graph import Attention, Graph, MoE, Router
from moecast.archs.harmless import refuse_unread
from moecast.archs.qwen3_moe import ARCHITECTURE
from moecast.errors import BadInput

MIB = 2**20
RELEASES = ["qwen3-30b-a3b", "qwen3-235b-a22b", "qwen3-coder-480b-a35b"]


def graph_of(name: str, encoding: str = "BF16", **changes: Any) -> Graph:
    """Of a published list, with some keys of its config.json changed."""
    config = Config(dict(real_models.config(name)._values) | changes, "config.json")
    graph = ARCHITECTURE.from_checkpoint(config, real_qwen3.tensors(name, encoding))
    refuse_unread(config, ARCHITECTURE.name, ARCHITECTURE.harmless, ())
    return graph


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("qwen3-30b-a3b", 18_867, 61_064_245_248),
        ("qwen3-235b-a22b", 36_945, 470_187_269_120),
        ("qwen3-coder-480b-a35b", 30_321, 960_309_750_784),
    ],
)
def test_list_has_the_published_totals(name: str, count: int, size: int) -> None:
    tensors = real_qwen3.tensors(name)
    assert (len(tensors), sum(tensor.length for tensor in tensors)) == (count, size)


@pytest.mark.parametrize(
    ("name", "total", "active", "state"),
    [  # in billions; bytes of keys and values for a token
        ("qwen3-30b-a3b", 30.5, 3.3, 98_304), ("qwen3-235b-a22b", 235.1, 22.1, 192_512),
        ("qwen3-coder-480b-a35b", 480.2, 35.4, 253_952),
    ],
)  # fmt: skip
def test_real_model(name: str, total: float, active: float, state: int) -> None:
    """As the model cards say, which count the whole embedding as active."""
    graph = graph_of(name)
    assert graph.parameters() / 1e9 == pytest.approx(total, abs=0.06)
    assert (graph.active_parameters() + graph.embedding.elements) / 1e9 == pytest.approx(active, abs=0.1)
    assert graph.state_bytes_per_token() == state and graph.fixed_state_bytes() == 0
    attention, experts = graph.layers[-1].operations
    assert isinstance(attention, Attention) and isinstance(experts, MoE) and isinstance(experts.router, Router)
    assert attention.head_size == 128 and attention.query_norm.weight.shape == (128,)
    assert experts.router.normalize and experts.router.top_k == 8


@pytest.mark.parametrize("encoding", ["FP8", "NVFP4"])
@pytest.mark.parametrize("name", RELEASES[:2])
def test_quantized_releases_hold_the_same_weights(name: str, encoding: str) -> None:
    plain, quantized = graph_of(name), graph_of(name, encoding)
    assert [(w.name, w.shape) for w in quantized.weights()] == [(w.name, w.shape) for w in plain.weights()]
    assert quantized.notes == ()


@pytest.mark.parametrize("encoding", ["GPTQ", "AWQ"])
def test_whole_numbers_are_refused_by_name(encoding: str) -> None:
    with pytest.raises(BadInput, match=r"self_attn\.q_proj is not in a form that can be read: .*GPTQ, AWQ") as error:
        graph_of("qwen3-30b-a3b", encoding, quantization_config={"quant_method": encoding.lower(), "bits": 4})
    assert "\n" not in str(error.value)
