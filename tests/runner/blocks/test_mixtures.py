"""Parts of a mixture that few families have: a gate of the shared expert, a router with norm and scales of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_models
import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Branch, MoE, SubLayer, sequential
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model
from torch import Tensor
from torch.nn import functional
from toy_models import tokens_of
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

HIDDEN, INNER, EXPERTS, TOP_K, EPSILON = 96, 80, 12, 3, 1e-6
AROUND = {
    "embedding": (toys.VOCABULARY, HIDDEN),
    "head": (toys.VOCABULARY, HIDDEN),
    "before": (HIDDEN,),
    "beside": (HIDDEN,),
    "last": (HIDDEN,),
}


def _rms(states: Tensor, weight: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + EPSILON) * weight


def _padded(model: Model) -> Model:
    graph = pad(model.graph, 128)
    assert graph.hidden_size == 128 and {op.up.shape[1] for op in graph.operations() if isinstance(op, MoE)} == {128}
    return Model(model.path, model.architecture, graph, (), {})


@pytest.mark.parametrize("vector", [False, True])
def test_gate_of_the_shared_expert(vector: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=48,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    block = Qwen2MoeSparseMoeBlock(config).float().eval()
    with torch.no_grad():
        for tensor in block.parameters():
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
    state = {f"moe.{name}": tensor for name, tensor in block.state_dict().items()}
    state |= toys.split_experts(state, "moe") | toys.random_tensors(1, AROUND)
    if vector:
        state["moe.shared_expert_gate.weight"] = state["moe.shared_expert_gate.weight"].flatten()
    toy = toys.Toy(tmp_path / "toy", state)
    experts = replace(
        toys.mixture(toy, "moe", TOP_K),
        shared=toy.mlp("moe.shared_expert", "SHARED"),
        shared_gate=toy.weight("moe.shared_expert_gate.weight", Role.SHARED_ROUTER),
    )
    model = toy.model(toy.graph([(sequential(toy.norm("before"), experts),)], toy.norm("last")))
    tokens = tokens_of(30)
    with torch.no_grad():
        x = toy["embedding"][tokens]
        x = x + block(_rms(x, toy["before"]))
    expected = _rms(x, toy["last"]) @ toy["head"].T
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    assert relative_error(runner_logits(_padded(model), tokens), expected) < 1e-5
    if not vector:
        engine = toys.onnx_of(model, tmp_path / "onnx")
        assert relative_error(onnx_models.onnx_logits(engine, tokens[0]), expected[0]) < 1e-5


def _beside_dense(toy: toys.Toy, own_norm: bool) -> Model:
    """A dense layer and experts read the same residual through norms of their own; the router may have one too."""
    others = {"input_norm": toy.norm("router.scale"), "input_scale": HIDDEN**-0.5} if own_norm else {}
    experts = toys.mixture(toy, "moe", TOP_K, expert_scale=toy.weight("router.per_expert_scale", Role.SCALE), **others)
    branches = (Branch(toy.norm("beside"), toy.mlp("mlp")), Branch(toy.norm("before"), experts))
    return toy.model(toy.graph([(SubLayer(branches),)], toy.norm("last")))


@pytest.fixture
def toy(tmp_path: Path) -> toys.Toy:
    shapes = {"moe.gate.weight": (EXPERTS, HIDDEN), "router.scale": (HIDDEN,), "router.per_expert_scale": (EXPERTS,)}
    shapes |= {f"moe.experts.{name}": (EXPERTS, INNER, HIDDEN) for name in ("gate", "up")}
    shapes |= {"moe.experts.down": (EXPERTS, HIDDEN, INNER), "mlp.down_proj.weight": (HIDDEN, 48)}
    shapes |= {f"mlp.{name}_proj.weight": (48, HIDDEN) for name in ("gate", "up")}
    tensors = toys.random_tensors(0, shapes | AROUND)
    tensors["moe.gate.weight"] *= 30  # so that it matters what is read
    return toys.Toy(tmp_path / "toy", tensors)


def _expected(toy: toys.Toy, tokens: Tensor, own_norm: bool) -> Tensor:
    config = Gemma4TextConfig(hidden_size=HIDDEN, num_experts=EXPERTS, top_k_experts=TOP_K, rms_norm_eps=EPSILON)
    router = Gemma4TextRouter(config).float()
    scale = toy["router.scale"] if own_norm else torch.full((HIDDEN,), HIDDEN**0.5)
    names = {"scale": scale, "proj.weight": toy["moe.gate.weight"], "per_expert_scale": toy["router.per_expert_scale"]}
    router.load_state_dict(names)
    if not own_norm:
        router.norm = torch.nn.Identity()
    x = toy["embedding"][tokens.flatten()]
    normed, beside = _rms(x, toy["before"]), _rms(x, toy["beside"])
    with torch.no_grad():
        _, shares, chosen = router(x if own_norm else normed)
    answers = []
    for token, own, experts in zip(normed, shares, chosen, strict=True):
        gates, ups, downs = (toy[f"moe.experts.{name}"][experts] for name in ("gate", "up", "down"))
        inner = functional.silu(gates @ token) * (ups @ token)
        answers.append((own[:, None] * torch.einsum("ehi,ei->eh", downs, inner)).sum(0))
    dense = functional.silu(beside @ toy["mlp.gate_proj.weight"].T) * (beside @ toy["mlp.up_proj.weight"].T)
    x = x + dense @ toy["mlp.down_proj.weight"].T + torch.stack(answers)
    return (_rms(x, toy["last"]) @ toy["head"].T).view(*tokens.shape, -1)


@pytest.mark.parametrize("own_norm", [False, True])
def test_experts_beside_a_dense_layer(toy: toys.Toy, own_norm: bool) -> None:
    model, tokens = _beside_dense(toy, own_norm), tokens_of(30)
    expected = _expected(toy, tokens, own_norm)
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    assert relative_error(runner_logits(_padded(model), tokens), expected) < 1e-5


def test_onnx_without_a_norm_of_the_router(toy: toys.Toy, tmp_path: Path) -> None:
    tokens = tokens_of(30, seed=1)
    engine = toys.onnx_of(_beside_dense(toy, own_norm=False), tmp_path / "onnx")
    assert relative_error(onnx_models.onnx_logits(engine, tokens[0]), _expected(toy, tokens, False)[0]) < 1e-5
    with pytest.raises(BadInput, match=r"^ONNX has no form for a router with a norm of its own yet: use --to gguf$"):
        toys.onnx_of(_beside_dense(toy, own_norm=True), tmp_path / "other")
