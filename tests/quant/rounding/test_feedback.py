"""Error feedback: less error in the outputs than rounding to what is nearest, on inputs that it has not seen too."""

from __future__ import annotations

import ggml
import pytest
import torch
from moecast.archs.expressions import Zeros
from moecast.archs.weights import Role, Weight
from moecast.errors import BadInput
from moecast.quant import dequantize, format_named, quantize
from moecast.quant.formats import native
from moecast.quant.formats.quantize import CODECS
from moecast.quant.rounding import feedback, moments
from moecast.quant.rounding.moments import SecondMoments
from moecast.quant.rounding.statistics import SecondMomentStatistics, Statistics
from torch import Tensor

FORMATS = sorted(name for name, codec in CODECS.items() if codec.grid)
COLUMNS = 512


def _inputs(tokens: int, seed: int = 0) -> Tensor:
    """Inputs that go together, some columns ten times as large as others: [tokens, COLUMNS]."""
    mixed = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(99)) / COLUMNS**0.5
    sizes = torch.logspace(-0.5, 0.5, COLUMNS)
    values = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return values @ (mixed + 0.5 * torch.eye(COLUMNS)) * sizes


def _rows(count: int = 24) -> Tensor:
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.02


def _moments(*inputs: Tensor) -> SecondMoments:
    means = torch.stack([states.T @ states / len(states) for states in inputs])
    return SecondMoments(means, [len(states) for states in inputs])


def _fed_back(rows: Tensor, name: str, seen: SecondMoments) -> Tensor:
    """Of one matrix: [rows, columns] -> uint8 [rows, row bytes]."""
    return feedback.quantize_with_feedback(rows[None], name, seen)[0]


def _error(data: Tensor, name: str, rows: Tensor, inputs: Tensor) -> float:
    return float(((dequantize(data, name) - rows) @ inputs.T).square().sum())


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_closer_on_other_inputs(name: str) -> None:
    seen, others, rows = _inputs(4 * COLUMNS), _inputs(4 * COLUMNS, seed=5), _rows()
    fed_back = _fed_back(rows, name, _moments(seen))
    nearest = quantize(rows, name, seen.square().mean(0))
    assert fed_back.shape == nearest.shape
    assert _error(fed_back, name, rows, others) < 0.9 * _error(nearest, name, rows, others)
    assert ggml.accepts(fed_back.numpy(), name)


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "IQ2_XXS"])
def test_few_inputs_do_no_harm(name: str) -> None:
    """An eighth as many tokens as columns say next to nothing of how other tokens' inputs go together."""
    seen, others, rows = _inputs(COLUMNS // 8), _inputs(4 * COLUMNS, seed=5), _rows()
    fed_back = _fed_back(rows, name, _moments(seen))
    nearest = quantize(rows, name, seen.square().mean(0))
    assert _error(fed_back, name, rows, others) < 1.01 * _error(nearest, name, rows, others)


@pytest.mark.parametrize("name", FORMATS)
def test_torch_and_kernels_choose_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where products summed in another order fall on different sides of a middle between two levels."""
    seen, rows = _moments(_inputs(4 * COLUMNS)), _rows(40)
    made = []
    for path in (native.paths()[0], native.TORCH):
        monkeypatch.setenv("MOECAST_KERNELS", path)
        made.append(_fed_back(rows, name, seen))
    assert float((made[0] == made[1]).float().mean()) > 0.99


@pytest.mark.parametrize("name", ["Q4_0", "Q2_0", "Q4_K", "Q3_K", "IQ4_XS"])
@pytest.mark.usefixtures("path")
def test_the_first_choice_is_gptqs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given its scales, what comes before any second thoughts is what the inverse of the moments leads to, column by
    column (Frantar et al. 2022, algorithm 1).
    """
    monkeypatch.setattr(feedback, "_SWEEPS", 0)
    inputs, rows = _inputs(4 * COLUMNS), _rows()
    moments = _moments(inputs)
    data = _fed_back(rows, name, moments)
    grid, format = CODECS[name].grid, format_named(name)
    assert grid
    parts = [grid.scales(part.T) for part in data.split(format.block_bytes, dim=1)]
    scales, minima = (
        torch.cat([part.repeat_interleave(format.block_size // len(part), 0) for part in kind]).double()
        for kind in zip(*parts, strict=True)
    )
    shrinkage = COLUMNS / moments.tokens[0]
    hessian = moments.means[0].double() / (1 + shrinkage)
    hessian.diagonal().mul_(1 + shrinkage)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    wanted, expected = rows.T.double().clone(), torch.empty_like(rows.T, dtype=torch.float64)
    for column in range(COLUMNS):
        scaled = ((wanted[column] + minima[column]) / scales[column]).float()
        level = grid.nearest(scaled[None], torch.ones(1))[0].double()
        expected[column] = scales[column] * level - minima[column]
        error = (wanted[column] - expected[column]) / upper[column, column]
        wanted[column + 1 :] -= upper[column, column + 1 :, None] * error
    same = torch.isclose(dequantize(data, name).double(), expected.T, rtol=1e-4, atol=1e-7)
    assert float(same.float().mean()) > 0.99


def test_a_second_look_makes_it_better(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, rows = _inputs(4 * COLUMNS), _rows()
    errors = []
    for sweeps in (0, 1, 2):
        monkeypatch.setattr(feedback, "_SWEEPS", sweeps)
        data = _fed_back(rows, "Q3_K", _moments(inputs))
        errors.append(_error(data, "Q3_K", rows, inputs))
    assert errors[2] < errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_inputs_of_any_size(size: float) -> None:
    """Only proportions count; inputs that are all zero say nothing."""
    inputs, rows = _inputs(4 * COLUMNS), _rows()
    data = _fed_back(rows, "Q4_K", _moments(inputs * size))
    expected = _fed_back(rows, "Q4_K", _moments(inputs)) if size else quantize(rows, "Q4_K")
    bound = 1.01 if size else 1.05  # those that do without weights search less
    assert _error(data, "Q4_K", rows, inputs) < bound * _error(expected, "Q4_K", rows, inputs)


def test_carrying_in_bfloat16_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_multiplies_bfloat16", lambda device: False)
    inputs, rows = _inputs(4 * COLUMNS), _rows(100)
    means, errors = inputs.T @ inputs / len(inputs), []
    for dtype in (torch.float32, torch.bfloat16):
        data = _fed_back(rows, "Q4_K", SecondMoments(means[None], [len(inputs)], dtype))
        errors.append(_error(data, "Q4_K", rows, inputs))
    assert errors[1] == pytest.approx(errors[0], rel=0.015)


@pytest.mark.parametrize("columns", [512, 608])  # two strips, and two with the rest of a third
def test_a_triangle_times_itself_is_the_moments(columns: int) -> None:
    values = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(0))
    means = values.T @ values / len(values)
    given = means.triu() + torch.full_like(means, torch.nan).tril(-1)
    (triangle,) = moments.factorize(given[None]).triu()
    torch.testing.assert_close(triangle @ triangle.T, means, rtol=1e-4, atol=1e-5)
    for size in (32, columns // 2):
        blocks, _, (carried,) = moments.taken_apart(triangle[None], size, torch.float32)
        for number, (block,) in enumerate(blocks):
            here = slice(number * size, (number + 1) * size)
            assert torch.equal(block, triangle[here, here])
            expected = triangle[: here.start, here].double() @ block.double().inverse()
            torch.testing.assert_close(carried[: here.start, here].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ3_XXS", "Q4_0"])
@pytest.mark.usefixtures("path")
def test_matrices_together_are_matrices_one_by_one(name: str) -> None:
    """But where products summed in another order fall on different sides of a middle between two levels."""
    inputs = [_inputs(2 * COLUMNS, seed) for seed in range(3)]
    rows = torch.stack([_rows(), 2 * _rows(), _rows().flip(0)])
    together = feedback.quantize_with_feedback(rows, name, _moments(*inputs))
    alone = torch.stack([_fed_back(part, name, _moments(seen)) for part, seen in zip(rows, inputs, strict=True)])
    assert float((together == alone).float().mean()) > 0.99


def test_a_row_that_is_not_finite() -> None:
    rows = _rows()
    rows[3, 300] = torch.nan
    with pytest.raises(BadInput, match="row 3 holds"):
        _fed_back(rows, "Q4_K", _moments(_inputs(COLUMNS)))


def _weight(role: Role, experts: int | None = None, columns: int = 8) -> Weight:
    shape = (4, columns) if experts is None else (experts, 4, columns)
    return Weight(f"{role.value}.weight", role, shape, Zeros(shape))


def test_moments_are_mean_products() -> None:
    statistics, weight = SecondMomentStatistics(), _weight(Role.ATTENTION_Q)
    parts = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    for part in parts:
        statistics.add(weight, None, part)
    found = statistics.moments(weight, [None])
    assert found and found.tokens == (150,)
    torch.testing.assert_close(found.means[0].triu(), (parts.flatten(0, 1).T @ parts.flatten(0, 1) / 150).triu())
    wider = _weight(Role.ATTENTION_Q, columns=16)  # padded
    padded = statistics.moments(wider, [None])
    assert padded and padded.means.shape == (1, 16, 16) and not padded.means[:, 8:].any()
    statistics.clear()
    assert statistics.moments(weight, [None]) is None


def test_weights_of_the_same_states_share_moments() -> None:
    statistics = SecondMomentStatistics()
    gate, up = _weight(Role.EXPERT_GATE, 4), _weight(Role.EXPERT_UP, 4)
    layer = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    for part in layer.split(30):
        statistics.add_layer([gate, up], part)
    for states in layer[:40].split(20):
        statistics.add(gate, 1, states)
        statistics.add(up, 1, states)
    found = statistics.moments(up, [1])
    assert found and found is statistics.moments(gate, [1])
    own, all_tokens = layer[:40].T @ layer[:40], layer.T @ layer / 60
    assert found.tokens == (40 + 8,)  # its own, and as many of the layer's as there are columns
    torch.testing.assert_close(found.means[0].triu(), ((own + 8 * all_tokens) / 48).triu())
    unreached = statistics.moments(gate, [2])
    assert unreached and unreached is statistics.moments(up, [2])
    torch.testing.assert_close(unreached.means[0].triu(), all_tokens.triu())
    statistics.release(1)
    other = statistics.moments(gate, [1])
    assert other and other.tokens == (60,)


def test_inner_neurons_of_experts_borrow_nothing() -> None:
    """But each input's square is drawn towards the mean of all that the expert has."""
    statistics, down = SecondMomentStatistics(), _weight(Role.EXPERT_DOWN, 4)
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    statistics.add(down, 1, states)
    found = statistics.moments(down, [1])
    assert found
    size = states.square().mean()
    torch.testing.assert_close(found.means[0].triu(), ((states.T @ states + 16 * size * torch.eye(8)) / 20).triu())
    assert statistics.moments(down, [2]) is None and statistics.moments(down, [1, 2]) is None


def test_moments_of_several_experts() -> None:
    """Gate and up projections share them together too; one that no token reached has the layer's."""
    statistics = SecondMomentStatistics()
    gate, up = _weight(Role.EXPERT_GATE, 4), _weight(Role.EXPERT_UP, 4)
    layer = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    statistics.add_layer([gate, up], layer)
    for expert, states in enumerate(layer[:40].split(20)):
        for weight in (gate, up):
            statistics.add(weight, expert, states)
    together = statistics.moments(gate, [0, 1, 3])
    assert together and statistics.moments(up, [0, 1, 3]) is together
    for place, expert in enumerate((0, 1, 3)):
        alone = statistics.moments(gate, [expert])
        assert alone and alone.tokens == together.tokens[place : place + 1]
        assert torch.equal(alone.means[0], together.means[place])


@pytest.mark.parametrize("kind", [Statistics, SecondMomentStatistics])
def test_the_order_of_experts_changes_nothing(kind: type[Statistics]) -> None:
    """So experts can be done in groups, on any device or machine, to the same bytes."""
    stacks = [_weight(role, 4) for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)]
    layer = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    inner = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        statistics = kind()
        statistics.add_layer(stacks[:2], layer)
        here = []
        for expert in order:
            for stack in stacks if expert < 3 else ():
                states = inner[expert] if stack.role is Role.EXPERT_DOWN else layer[expert::3]
                statistics.add(stack, expert, states)
            for stack in stacks:  # what an expert is rounded by is asked for before the next one runs
                moments = statistics.moments(stack, [expert])
                here.append((expert, stack.name, statistics.of(stack, expert), moments.means if moments else None))
            statistics.release(expert)
        found.append(sorted(here, key=lambda entry: entry[:2]))
    for (*_, means, moments), (*_, other_means, other_moments) in zip(*found, strict=True):
        assert (means is None) == (other_means is None) and (moments is None) == (other_moments is None)
        assert means is None or torch.equal(means, other_means)
        assert moments is None or torch.equal(moments, other_moments)
