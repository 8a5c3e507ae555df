"""Plans for ONNX: types that ONNX Runtime has, exact sizes, and a place for every row."""

from __future__ import annotations

from functools import cache

import pytest
import real_deepseek
import real_deltanet
import real_models
import real_nemotron
from checkpoints import EXAMPLES
from moecast.archs import deepseek_v4, minimax_m2, nemotron_h
from moecast.archs.graph import Activation, Graph, MoE
from moecast.archs.registry import architecture_of
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant.planning.file_formats import plan_format
from moecast.quant.planning.onnx_plan import ONNX_RECIPES, SHARD_BYTES, OnnxPlan
from moecast.quant.planning.plan import Form
from moecast.sources.model import open_model

GIB = 2**30


@cache
def real_graph(name: str) -> Graph:
    if name == "minimax":
        return minimax_m2.ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.7"), real_models.minimax_m2())
    if name in ("nano", "super", "ultra"):
        tensors = real_nemotron.tensors(name, "bf16")
        return nemotron_h.MIXTURE.from_checkpoint(real_models.config(f"nemotron-3-{name}"), tensors)
    if name in real_deltanet.RELEASES:
        config = real_models.config(real_deltanet.RELEASES[name].config)
        return architecture_of(config).from_checkpoint(config, real_deltanet.tensors(name))
    config = real_models.config(real_deepseek.CONFIGS[name])
    return deepseek_v4.ARCHITECTURE.from_checkpoint(config, real_deepseek.tensors(name))


def plan(graph: Graph, quant: str) -> OnnxPlan:
    result = plan_format("onnx", graph, quant)
    assert isinstance(result, OnnxPlan)
    return result


@pytest.mark.parametrize(
    ("name", "q8_0", "q4_0", "q2_0"),
    [
        ("minimax", 239.7, 133.6, 67.4), ("nano", 48.5, 27.1, 14.0), ("super", 185.7, 103.6, 52.4),
        ("ultra", 846.1, 471.0, 236.8), ("flash", 298.1, 167.0, 84.0), ("pro", 1648.8, 919.4, 460.7),
        ("Qwen3-Next", 83.6, 46.7, 23.7), ("Qwen3.5-35B-A3B", 36.4, 20.6, 10.8), ("Qwen3.5-27B", 28.3, 16.5, 9.4),
        ("Qwen3.5-122B-A10B", 128.1, 71.7, 36.6), ("Qwen3.5-397B-A17B", 415.7, 231.8, 117.1),
    ],
)  # fmt: skip
def test_documented_sizes(name: str, q8_0: float, q4_0: float, q2_0: float) -> None:
    sizes = [plan(real_graph(name), quant).bytes / GIB for quant in ("Q8_0", "Q4_0", "Q2_0")]
    assert sizes == pytest.approx([q8_0, q4_0, q2_0], abs=0.05)


@pytest.mark.parametrize("name", ["minimax", "ultra"])
def test_bits_of_a_real_model(name: str) -> None:
    """4 bits and a 32-bit scale for 32 numbers; experts without a gate have their first projection twice."""
    graph = real_graph(name)
    doubled = {op.up.name for op in graph.operations() if isinstance(op, MoE) and not op.gate}
    expected = 0.0
    for weight in plan(graph, "Q4_0").graph.weights():
        kept = weight.role.keep_f32 or len(weight.shape) == 1
        bits = 32 if kept else 8 + 32 / 16 if weight.role is Role.HEAD else 4 + 32 / 32
        expected += weight.elements * bits / 8 * (2 if weight.name in doubled else 1)
    assert plan(graph, "Q4_0").bytes == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("quant", ONNX_RECIPES)
@pytest.mark.parametrize("name", ["minimax-m2-tiny", "nemotron-3-tiny", "deepseek-v4-tiny"])
def test_every_row_has_a_place_of_its_own(name: str, quant: str) -> None:
    result = plan(open_model(EXAMPLES / name).graph, quant)
    arrays = {array for placement in result.placements.values() for array in placement.arrays}
    ends = dict.fromkeys(result.files, 0)
    for array in sorted(arrays, key=lambda array: (array.file, array.offset)):
        assert array.offset >= ends[array.file] and array.offset % 4096 == 0
        ends[array.file] = array.offset + array.bytes
    assert all(ends[file] <= size < ends[file] + 4096 for file, size in result.files.items())
    taken = dict.fromkeys(arrays, 0)
    for tensor in result.tensors:
        placement = result.placements[tensor.weight.name]
        rows = tensor.weight.elements // tensor.weight.columns
        for array in placement.arrays:
            taken[array] += rows * len(placement.offsets) * array.row_bytes
    assert taken == {array: array.bytes for array in arrays}


def test_files_stay_below_the_limit() -> None:
    result = plan(real_graph("minimax"), "Q4_0")
    assert 34 <= len(result.files) <= 40 and max(result.files.values()) <= SHARD_BYTES
    largest = plan(real_graph("pro"), "Q8_0")
    assert max(array.bytes for placement in largest.placements.values() for array in placement.arrays) > SHARD_BYTES
    assert list(result.files) == sorted(result.files)


def test_experts_of_a_layer_have_one_type() -> None:
    """Rows of the down projections do not divide into blocks of 256: the others follow."""
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    result = plan(graph, "Q6_K")
    types = {tensor.weight.name: tensor.type.name for tensor in result.tensors}
    assert {types["blk.0.ffn_gate_exps.weight"], types["blk.0.ffn_down_exps.weight"]} == {"Q8_0"}
    assert types["blk.0.attn_q.weight"] == "Q6_K"


def test_floats_of_4_bits_are_kept_only_where_that_costs_nothing() -> None:
    graph = real_graph("flash")
    types = {
        quant: {t.type.name for t in plan(graph, quant).tensors if "_exps" in t.weight.name}
        for quant in ("Q8_0", "Q4_0")
    }
    assert types == {"Q8_0": {"MXFP4"}, "Q4_0": {"Q4_0"}}


def test_squared_relu_takes_two_rows_for_one() -> None:
    graph = open_model(EXAMPLES / "nemotron-3-tiny").graph
    experts = next(op for op in graph.operations() if isinstance(op, MoE))
    assert experts.activation is Activation.RELU_SQUARED
    placement = plan(graph, "Q4_0").placements[experts.up.name]
    assert placement.stride == 2 and placement.offsets == (0, 1)


def test_what_onnx_runtime_cannot_hold_is_refused() -> None:
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    with pytest.raises(BadInput, match="--quant Q4_K_M has types that ONNX Runtime cannot"):
        plan(graph, "q4_k_m")
    with pytest.raises(BadInput, match="--mtp"):
        plan_format("onnx", graph, None, Form(mtp=True))
