"""What operations say of themselves, on every example, and what weights of a stack mean to those who read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from moecast.archs.expressions import OnePlus, Read, Stack, TensorInfo, Zeros
from moecast.archs.graph import Graph, Layer, MoE, Operation, graph_as_json, sequential, weights_in, with_weights
from moecast.archs.weights import Role, StackKind, Weight, scale_name
from moecast.quant.planning.padding import pad
from moecast.quant.rounding.statistics import Statistics
from moecast.runner.memory import RUNNING, working_set
from moecast.sources.decode import evaluate
from moecast.sources.model import open_model, pieces
from moecast.sources.storage import Storage

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("minimax-m2-tiny", "nemotron-3-tiny", "deepseek-v4-tiny", "qwen3.5-tiny")


@pytest.fixture(params=NAMES)
def graph(request: pytest.FixtureRequest) -> Graph:
    return open_model(EXAMPLES / request.param).graph


def _matrices(operation: Operation) -> list[Weight]:
    others = (Role.HASH_TABLE, Role.COMPRESSOR_POSITION, Role.NORM)
    return [weight for weight in weights_in(operation) if len(weight.shape) > 1 and weight.role not in others]


def test_what_faces_the_residual_is_as_wide_and_nothing_else_is(graph: Graph) -> None:
    hidden, telling = graph.hidden_size, 0
    for operation in graph.operations():
        assert all(weight.columns == hidden for weight in operation.reads)
        assert all(weight.shape[-2] == hidden for weight in operation.writes)
        matrices = [weight for weight in _matrices(operation) if hidden in weight.shape[-2:]]
        if all(weight.shape[-2:].count(hidden) == 1 for weight in matrices):  # else an inner width is as large
            assert {w.name for w in operation.reads} == {w.name for w in matrices if w.columns == hidden}
            assert {w.name for w in operation.writes} == {w.name for w in matrices if w.shape[-2] == hidden}
            telling += 1
    assert telling


def test_widths_are_those_of_their_weights(graph: Graph) -> None:
    for operation in graph.operations():
        for width in operation.widths:
            assert {w.shape[-2] for w in width.rows} | {w.columns for w in width.columns} == {width.size}


def test_stacks_are_the_experts(graph: Graph) -> None:
    for operation in graph.operations():
        stacks = [w for w in weights_in(operation) if w.experts is not None]
        assert {w.name for w in operation.stacks} == {w.name for w in stacks}
        for weight in weights_in(operation):
            share = operation.experts_per_token / (weight.experts or 1) if weight.experts else 1.0
            assert operation.active_share(weight) == share


def test_padding_twice_is_padding_once(graph: Graph) -> None:
    padded = pad(graph, 192)
    assert [w.shape for w in pad(padded, 192).weights()] == [w.shape for w in padded.weights()]
    assert padded == graph or padded.hidden_size % 192 == 0


def test_more_context_takes_more_memory(graph: Graph) -> None:
    sizes = [working_set(graph, context, RUNNING) for context in (64, 512, 4096)]
    assert sizes == sorted({*sizes})


@dataclass(frozen=True)
class Twice(Operation):
    """An operation that nobody knows, with an inner width that may grow and a state."""

    first: Weight
    second: Weight

    @property
    def reads(self) -> tuple[Weight, ...]:
        return (self.first,)

    @property
    def writes(self) -> tuple[Weight, ...]:
        return (self.second,)

    @property
    def state_bytes_per_token(self) -> int:
        return 7

    @property
    def fixed_state_bytes(self) -> int:
        return 1000

    def scratch_values(self, context: int) -> int:
        return 10**9 * context


def test_an_operation_that_nobody_knows_is_padded_and_priced_by_its_facts() -> None:
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    hidden = graph.hidden_size
    first = Weight("a", Role.DENSE_UP, (9, hidden), Zeros((9, hidden)))
    second = Weight("b", Role.DENSE_DOWN, (hidden, 9), Zeros((hidden, 9)))
    norm = graph.layers[0].sublayers[0].branches[0].norm
    assert norm
    strange = Graph(
        *("strange", graph.vocabulary_size, hidden, 512, graph.embedding),
        (Layer(0, (sequential(norm, Twice(first, second)),)),),
        *(graph.final_norm, graph.head),
    )
    assert (strange.state_bytes_per_token(), strange.fixed_state_bytes()) == (7, 1000)
    (padded,) = pad(strange, 2 * hidden + 2).operations()
    assert isinstance(padded, Twice)
    assert (padded.first.shape, padded.second.shape) == ((9, 2 * hidden + 2), (2 * hidden + 2, 9))
    assert working_set(strange, 3, RUNNING) - working_set(strange, 2, RUNNING) >= 4 * 10**9


def test_changed_weights_keep_the_rest() -> None:
    graph = open_model(EXAMPLES / "deepseek-v4-tiny").graph
    assert with_weights(graph, lambda weight: weight) == graph
    renamed = with_weights(graph, lambda weight: Weight(f"x.{weight.name}", weight.role, weight.shape, weight.source))
    assert [w.name for w in renamed.weights()] == [f"x.{w.name}" for w in graph.weights()]
    assert str(graph_as_json(graph)).replace("'name': '", "'name': 'x.") == str(graph_as_json(renamed))


def _heads(role: Role = Role.ATTENTION_KEY_UP) -> Weight:
    return Weight("blk.0.attn_k_b.weight", role, (3, 4, 8), Zeros((3, 4, 8)))


def test_three_dimensions_are_experts_or_heads() -> None:
    experts, heads = _heads(Role.EXPERT_UP), _heads()
    assert (experts.stack, experts.experts, experts.matrices) == (StackKind.EXPERTS, 3, 3)
    assert (heads.stack, heads.experts, heads.matrices) == (StackKind.HEADS, None, 3)
    assert [*pieces(heads)] == [*pieces(experts)] == [(0, None), (1, None), (2, None)]
    with pytest.raises(AssertionError, match="ATTENTION_Q"):
        _heads(Role.ATTENTION_Q)


def test_heads_borrow_nothing_from_each_other_and_count_as_no_experts() -> None:
    statistics, states = Statistics(), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    experts = Weight("blk.0.ffn_up_exps.weight", Role.EXPERT_UP, (2, 4, 8), Zeros((2, 4, 8)))
    for head in range(3):
        statistics.add(_heads(), head, states[head])
    assert statistics.expert_tokens is None
    statistics.add(experts, 1, states[0])
    again = Statistics.of_tensors(statistics.tensors())
    for found in (statistics, again):
        assert found.expert_tokens is not None and found.expert_tokens.tolist() == [0, 5]
        for head in range(3):
            torch.testing.assert_close(found.of(_heads(), head), states[head].square().mean(0).double())
    statistics.add_layer([experts], states[0])
    borrowed = statistics.of(experts, 0)
    assert borrowed is not None
    torch.testing.assert_close(borrowed, states[0].square().mean(0).double())
    statistics.clear()
    assert statistics.expert_tokens is None


def test_one_plus(tmp_path: Path) -> None:
    """Norms that a checkpoint stores as their distance from one."""
    stored = torch.randn(16, generator=torch.Generator().manual_seed(0))
    (tmp_path / "data").write_bytes(stored.numpy().tobytes())
    source = OnePlus(Read(TensorInfo("w", "F32", (16,), str(tmp_path / "data"), 0, 64)))
    assert torch.equal(evaluate(source, Storage()), stored + 1)
    assert source.shape == (16,)
    stack = Stack((source, source))
    assert torch.equal(evaluate(stack, Storage(), 1), stored + 1)


def test_names_of_scales() -> None:
    assert scale_name("blk.3.ffn_up_exps.weight") == "blk.3.ffn_up_exps.scale"


def test_mixtures_name_the_experts_of_a_token() -> None:
    graph = open_model(EXAMPLES / "minimax-m2-tiny").graph
    assert {op.experts_per_token for op in graph.operations()} == {
        0,
        *(op.router.top_k for op in graph.operations() if isinstance(op, MoE)),
    }
