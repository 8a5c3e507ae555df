"""Routers, dense layers and experts against transformers' modules of all three families."""

from __future__ import annotations

from typing import Any

import checkpoints
import deepseek_checkpoints
import nemotron_checkpoints
import pytest
import torch
from block_weights import BlockWeights, modules_of, states
from forward import relative_error
from moecast.archs.graph import Activation, HashRouter, MoE, Router, Score
from moecast.archs.weights import Role
from moecast.runner.activations import Workspace
from moecast.runner.blocks.common import mlp, route
from moecast.runner.blocks.experts import RoutedTokens, order_of_experts, run_experts
from torch import Tensor

pytestmark = pytest.mark.numeric

TOKENS = 200
KINDS = ["minimax", "nemotron", "nemotron latent", "nemotron groups", "deepseek", "deepseek hash"]


class Case:
    """A block of transformers and ours with its weights.

    `router_arguments` are what its router wants beside the states, `arguments` what the block wants.
    """

    def __init__(self, module: Any, hidden: int) -> None:
        self.module, self.weights = module, BlockWeights()
        self.inputs = states(TOKENS, hidden)
        self.tokens = torch.randint(0, 512, (TOKENS,), generator=torch.Generator().manual_seed(1))
        self.router_arguments: tuple[Tensor, ...] = ()
        self.arguments: tuple[Tensor, ...] = ()
        self.operation: MoE


def _router(weights: BlockWeights, gate: Any, bias: Tensor, score: Score, **settings: Any) -> Router:
    return Router(
        weights.add(gate.weight, Role.ROUTER), weights.add(bias, Role.ROUTER_BIAS), score, gate.top_k, **settings
    )


def _minimax() -> Case:
    model = checkpoints.minimax_model()
    case = Case(modules_of(model, "MiniMaxM2SparseMoeBlock")[0], model.config.hidden_size)
    bias = case.module.e_score_correction_bias
    case.router_arguments = (bias,)
    gate, up = (case.weights.add(part) for part in case.module.experts.gate_up_proj.chunk(2, dim=1))
    case.operation = MoE(
        router=_router(case.weights, case.module.gate, bias, Score.SIGMOID),
        gate=gate,
        up=up,
        down=case.weights.add(case.module.experts.down_proj),
        activation=Activation.SWIGLU,
    )
    return case


def _nemotron(**overrides: Any) -> Case:
    model = nemotron_checkpoints.nemotron_model(**overrides)
    case = Case(modules_of(model, "NemotronHMoE")[0], model.config.hidden_size)
    router, weights = case.module.gate, case.weights
    latent = model.config.moe_latent_size is not None
    case.operation = MoE(
        router=_router(
            weights,
            router,
            router.e_score_correction_bias,
            Score.SIGMOID,
            groups=router.num_group,
            groups_used=router.topk_group,
            epsilon=1e-20,
            scale=router.routed_scaling_factor,
        ),
        up=weights.add(case.module.experts.up_proj),
        down=weights.add(case.module.experts.down_proj),
        activation=Activation.RELU_SQUARED,
        latent_down=weights.add(case.module.fc1_latent_proj.weight) if latent else None,
        latent_up=weights.add(case.module.fc2_latent_proj.weight) if latent else None,
        shared=weights.mlp(case.module.shared_experts, Activation.RELU_SQUARED),
    )
    return case


def _deepseek(hashed: bool) -> Case:
    model = deepseek_checkpoints.deepseek_model()
    blocks = modules_of(model, "DeepseekV4SparseMoeBlock")
    case = Case(next(block for block in blocks if block.is_hash == hashed), model.config.hidden_size)
    gate, weights, clamp = case.module.gate, case.weights, model.config.swiglu_limit
    rest = {"epsilon": 1e-20, "scale": gate.routed_scaling_factor}
    router: Router | HashRouter
    if hashed:
        case.router_arguments = case.arguments = (case.tokens[None],)
        table = weights.add(gate.tid2eid, Role.HASH_TABLE)
        router = HashRouter(weights.add(gate.weight, Role.ROUTER), table, Score.SQRT_SOFTPLUS, **rest)
    else:
        router = _router(weights, gate, gate.e_score_correction_bias, Score.SQRT_SOFTPLUS, **rest)
    gates, ups = (weights.add(part) for part in case.module.experts.gate_up_proj.chunk(2, dim=1))
    case.operation = MoE(
        router=router,
        gate=gates,
        up=ups,
        down=weights.add(case.module.experts.down_proj),
        activation=Activation.SWIGLU,
        clamp=clamp,
        shared=weights.mlp(case.module.shared_experts, Activation.SWIGLU, clamp),
    )
    return case


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    latent = nemotron_checkpoints.LATENT
    makers = {
        "minimax": _minimax,
        "nemotron": _nemotron,
        "nemotron latent": lambda: _nemotron(**latent),
        "nemotron groups": lambda: _nemotron(**nemotron_checkpoints.GROUPED),
        "deepseek": lambda: _deepseek(hashed=False),
        "deepseek hash": lambda: _deepseek(hashed=True),
    }
    return makers[request.param]()


def test_routers_choose_the_same_experts_in_the_same_shares(case: Case) -> None:
    chosen, shares = route(case.operation.router, case.inputs, case.tokens, case.weights)
    with torch.no_grad():
        _, their_shares, their_choice = case.module.gate(case.inputs[None], *case.router_arguments)
    nothing = torch.zeros(TOKENS, case.operation.experts)
    ours, theirs = nothing.scatter(1, chosen, shares), nothing.scatter(1, their_choice, their_shares)
    assert torch.equal(ours > 0, theirs > 0)
    assert int((ours > 0).sum()) == TOKENS * case.operation.router.top_k
    assert relative_error(ours, theirs) < 3e-6


def test_experts_answer_as_those_of_transformers(case: Case) -> None:
    """With what else belongs to the block: latent projections, the shared expert."""
    routed = RoutedTokens(case.operation, case.weights, case.tokens[None], Workspace(), "one block")
    routed.route(case.inputs, case.inputs)
    routed.finish_routing()
    run_experts([routed], order_of_experts([routed], unwanted=False), None, at_once=3)
    with torch.no_grad():
        expected = case.module(case.inputs[None], *case.arguments)[0]
    assert relative_error(routed.answer(0, case.inputs), expected) < 3e-6


def test_dense_layer_is_that_of_transformers() -> None:
    """Nemotron-H's own; shared experts, with a gate and a clamp, are part of the blocks above."""
    model = nemotron_checkpoints.nemotron_model(**nemotron_checkpoints.DENSE)
    module, weights = modules_of(model, "NemotronHMLP")[0], BlockWeights()
    inputs = states(TOKENS, model.config.hidden_size)
    with torch.no_grad():
        expected = module(inputs)
    assert relative_error(mlp(weights.mlp(module, Activation.RELU_SQUARED), inputs, weights), expected) < 3e-6
