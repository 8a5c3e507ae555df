"""Plans under a budget, on the complete tensor lists of published models and on small ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import real_deepseek
import real_models
from moecast.archs.deepseek_v4 import ARCHITECTURE as DEEPSEEK
from moecast.archs.graph import Graph, Mamba2
from moecast.archs.minimax_m2 import ARCHITECTURE as MINIMAX
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant import format_named
from moecast.quant.planning.allocation import (
    Damage,
    allowed_types,
    bytes_per_token,
    plan_within,
    typical_damage,
    typical_error,
)
from moecast.quant.planning.exact import exact_format
from moecast.quant.planning.fit import Machine, fit, layers_in_ram
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.plan_file import plan_like, read_plan_file, write_plan_file
from moecast.quant.planning.recipes import SENSITIVE, UNREPACKED, recipe_named
from moecast.sources.model import open_model

GIB = 2**30
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def pro() -> Graph:
    """DeepSeek V4 Pro, 1.6 T parameters."""
    config = real_models.config(real_deepseek.CONFIGS["pro"])
    return DEEPSEEK.from_checkpoint(config, real_deepseek.tensors("pro"))


@pytest.fixture(scope="module")
def minimax() -> Graph:
    """MiniMax M2, 229 B parameters in FP8."""
    return MINIMAX.from_checkpoint(real_models.config("minimax-m2.7"), real_models.minimax_m2())


@pytest.mark.parametrize("budget", [400 * 10**9, 700 * 10**9])
def test_the_budget_of_a_1600_billion_parameter_model_is_used_and_kept(pro: Graph, budget: int) -> None:
    plan = plan_within(pro, budget, typical_damage(pro), one_bit=True)
    assert 0.995 * budget <= plan.bytes <= budget


def test_types_respect_blocks_source_precision_and_the_engine(pro: Graph, minimax: Graph) -> None:
    for graph in (pro, minimax):
        for weight in graph.weights():
            formats = allowed_types(weight, one_bit=True)
            assert all(format.fits(weight.columns) for format in formats)
            if weight.role.keep_f32:
                assert [format.name for format in formats] == ["F32"]
            elif weight.role in SENSITIVE:
                assert all(format.bits_per_weight > 8 for format in formats)
            elif weight.role is Role.ATTENTION_OUTPUT_DOWN:
                assert not {format.name for format in formats} & set(UNREPACKED)
            elif weight.role is Role.EXPERT_UP:
                # MXFP4 and FP8 sources: nothing wider than they are, and MXFP4 itself loses nothing
                most = 4.75 if graph is pro else 8.5
                assert max(format.bits_per_weight for format in formats) <= most
                assert (exact_format(weight.source) in formats) == (graph is pro)


def test_expert_bits_follow_the_budget_and_stay_within_what_a_token_may_touch(minimax: Graph) -> None:
    damage = typical_damage(minimax)
    plans = [plan_within(minimax, size * GIB, damage, one_bit=True) for size in (60, 90)]
    bits = [[t.type.bits_per_weight for t in plan.tensors if t.weight.role is Role.EXPERT_UP] for plan in plans]
    assert sum(bits[0]) < sum(bits[1])
    limit = 0.8 * bytes_per_token(plans[1])
    slower = plan_within(minimax, 90 * GIB, damage, one_bit=True, active_budget=limit)
    assert bytes_per_token(slower) <= limit * 1.001  # alignment
    assert slower.bytes <= 90 * GIB


def test_a_sensitive_weight_gets_more_bits_than_its_like(minimax: Graph) -> None:
    damage = typical_damage(minimax)
    name = "blk.30.ffn_down_exps.weight"
    raised = Damage({**damage.sensitivity, name: 30 * damage.sensitivity[name]})
    plan = plan_within(minimax, 80 * GIB, raised)
    bits = {t.weight.name: t.type.bits_per_weight for t in plan.tensors if t.weight.role is Role.EXPERT_DOWN}
    assert bits[name] == max(bits.values()) > min(bits.values())


def test_typical_errors_fall_with_the_bits() -> None:
    names = ["IQ2_XXS", "IQ3_XXS", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0"]
    errors = [typical_error(name) for name in names]
    assert errors == sorted(errors, reverse=True)
    assert typical_error("Q8_0") == pytest.approx(1 / 12 / 127**2 * 9, rel=1)  # steps of a 127th of about 3 sigma


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    plan = plan_within(graph, 2_000_000, typical_damage(graph), name="2MB")
    write_plan_file(plan, tmp_path / "plan.json")
    again = plan_like(graph, read_plan_file(tmp_path / "plan.json"))
    assert [(t.weight.name, t.type) for t in again.tensors] == [(t.weight.name, t.type) for t in plan.tensors]
    assert again.recipe.name == "2MB"


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    other = open_model(EXAMPLES / "nemotron-3-tiny").graph
    write_plan_file(plan_tensors(other, recipe_named("Q4_K_M")), tmp_path / "plan.json")
    with pytest.raises(BadInput, match="another model"):
        plan_like(graph, read_plan_file(tmp_path / "plan.json"))
    (tmp_path / "plan.json").write_text('{"version": 2}')
    with pytest.raises(BadInput, match="version is 2"):
        read_plan_file(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(BadInput, match="holds a JSON list, expected an object"):
        read_plan_file(tmp_path / "plan.json")


@pytest.mark.slow
def test_a_machine_holds_weights_state_and_working_memory(minimax: Graph) -> None:
    machine = Machine(ram=96 * GIB, vram=24 * GIB, context=32768)
    found = fit(minimax, machine, typical_damage(minimax))
    cached = 32768 * 62 * 2 * 8 * 128 * 2  # tokens, layers, keys and values, heads, head size, bytes
    assert found.state_bytes == cached
    experts = dict.fromkeys(range(62), 0)
    rest = embedding = 0
    for tensor in found.plan.tensors:
        if tensor.weight.role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            assert tensor.weight.layer is not None
            experts[tensor.weight.layer] += tensor.aligned_bytes
        elif tensor.weight.role is Role.EMBEDDING:
            embedding = tensor.aligned_bytes
        else:
            rest += tensor.aligned_bytes
    in_ram = embedding + sum(size for layer, size in experts.items() if layer < found.layers_in_ram)
    on_gpu = rest + sum(size for layer, size in experts.items() if layer >= found.layers_in_ram)
    assert in_ram <= 90 * GIB
    assert on_gpu + found.state_bytes + found.working_bytes <= 23.5 * GIB
    assert in_ram + on_gpu > 0.97 * (90 * GIB + 23.5 * GIB - found.state_bytes - found.working_bytes)
    with pytest.raises(BadInput, match="less --context"):
        fit(minimax, Machine(96 * GIB, 8 * GIB, 200_000), typical_damage(minimax))


@pytest.mark.slow
def test_where_a_plan_runs(minimax: Graph) -> None:
    """As the plan that was made for a machine; with less of either memory it does not run, or less is on the GPU."""
    machine = Machine(ram=96 * GIB, vram=24 * GIB, context=32768)
    found = fit(minimax, machine, typical_damage(minimax))
    assert layers_in_ram(found.plan, machine) == found.layers_in_ram
    assert layers_in_ram(found.plan, Machine(90 * GIB, 24 * GIB, 32768)) is None
    assert layers_in_ram(found.plan, Machine(96 * GIB, 4 * GIB, 32768)) is None
    assert layers_in_ram(found.plan, Machine(192 * GIB, 20 * GIB, 32768)) > found.layers_in_ram  # type: ignore[operator]
    assert layers_in_ram(found.plan, Machine(192 * GIB, 192 * GIB, 32768)) == 0
    needed = found.plan.bytes + found.state_bytes + found.working_bytes
    alone = [layers_in_ram(found.plan, Machine(ram, 0, 32768)) for ram in (needed + 7 * GIB, needed + 9 * GIB)]
    assert needed > 16 * 7 * GIB and alone == [None, 62]


def test_recurrent_state_does_not_depend_on_the_context() -> None:
    graph = open_model(EXAMPLES / "nemotron-3-tiny").graph
    mambas = [operation for operation in graph.operations() if isinstance(operation, Mamba2)]
    assert graph.fixed_state_bytes() == sum(4 * (512 * 64 + 3 * (512 + 2 * 2 * 64)) for _ in mambas)


def test_more_bits_than_a_format_has_are_no_option() -> None:
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    assert format_named("BF16") not in allowed_types(next(w for w in graph.weights() if w.role is Role.EXPERT_UP))
    assert format_named("BF16") in allowed_types(graph.embedding)
