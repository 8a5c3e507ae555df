"""Mixtures of experts and dense layers in ONNX."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...archs.graph import MLP, SIGMOID_GAIN, Activation, HashRouter, MoE, Router, Score
from ...errors import BadInput
from .builder import Builder

# Operators of experts compute gate * sigmoid(alpha * gate) * (up + beta). With the projection itself as gate and a
# large alpha that is relu(up)^2, up to 1 / alpha^2.
_SIGMOIDS = {
    Activation.SWIGLU: (1.0, 0.0),
    Activation.SWIGLU_OAI: (SIGMOID_GAIN, 1.0),
    Activation.RELU_SQUARED: (1e6, 0.0),
}
_NEVER = -1e4  # the logarithm of no weight


def moe(build: Builder, operation: MoE, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what the experts add, of the same shape."""
    shares = route(build, operation.router, states)
    inner = build.project(states, operation.latent_down) if operation.latent_down else states
    answer = _experts(build, operation, inner, shares)
    if operation.latent_up:
        answer = build.project(answer, operation.latent_up)
    if operation.shared:
        shared = mlp(build, operation.shared, states)
        if operation.shared_gate:
            gate = build.microsoft("FusedMatMul", states, build.weight(operation.shared_gate), transB=1)
            shared = build.op("Mul", shared, build.op("Sigmoid", gate))
        answer = build.op("Add", answer, shared)
    return build.scaled(answer, operation.scale)


def route(build: Builder, router: Router | HashRouter, states: ir.Value) -> ir.Value:
    """The share of every expert in every token, zeros for those not chosen: [tokens, experts].

    Raises BadInput for a router that reads anything but what the experts read.
    """
    if isinstance(router, Router) and router.input_norm:
        raise BadInput("ONNX has no form for a router with a norm of its own yet: use --to gguf")
    experts = router.weight.shape[0]
    logits = build.op("Reshape", build.project(states, router.weight), build.constant([-1, experts]))
    if isinstance(router, Router) and router.logit_bias:
        logits = build.op("Add", logits, build.weight(router.logit_bias))
    scores = _score(build, router.score, build.known(logits, "tokens", experts))
    if isinstance(router, HashRouter):
        chosen = build.rows(build.op("Reshape", build.tokens(), build.constant([-1])), router.table)
    else:
        biased = build.op("Add", scores, build.weight(router.bias)) if router.bias else scores
        candidates = _best_groups(build, router, biased)
        chosen = build.ops("TopK", candidates, build.constant([router.top_k]), outputs=2, axis=-1)[1]
    shares = build.op("GatherElements", scores, chosen, axis=1)
    if isinstance(router, HashRouter) or router.normalize:
        total = build.op("ReduceSum", shares, build.constant([-1]), keepdims=1)
        if router.epsilon:
            total = build.op("Add", total, build.constant(router.epsilon))
        shares = build.op("Div", shares, total)
    shares = build.scaled(shares, router.scale)
    if isinstance(router, Router) and router.expert_scale:
        shares = build.op("Mul", shares, build.op("Gather", build.weight(router.expert_scale), chosen))
    nothing = build.op("Mul", scores, build.constant(0.0))
    return build.op("ScatterElements", nothing, chosen, shares, axis=1)


def _score(build: Builder, score: Score, logits: ir.Value) -> ir.Value:
    match score:
        case Score.SIGMOID:
            return build.op("Sigmoid", logits)
        case Score.SOFTMAX:
            return build.op("Softmax", logits, axis=-1)
        case Score.SQRT_SOFTPLUS:
            return build.op("Sqrt", build.op("Softplus", logits))


def _best_groups(build: Builder, router: Router, scores: ir.Value) -> ir.Value:
    """Scores [tokens, experts] with minus infinity wherever an expert's group is not among the best."""
    if router.groups_used == router.groups:
        return scores
    experts = router.weight.shape[0]
    grouped = build.op("Reshape", scores, build.constant([-1, router.groups, experts // router.groups]))
    two_best = build.ops("TopK", grouped, build.constant([2]), outputs=2, axis=-1)[0]
    ranking = build.op("ReduceSum", two_best, build.constant([-1]), keepdims=0)
    best = build.ops("TopK", ranking, build.constant([router.groups_used]), outputs=2, axis=-1)[1]
    excluded = build.op("Add", build.op("Mul", ranking, build.constant(0.0)), build.constant(-np.inf))
    kept = build.op("Expand", build.constant(0.0), build.op("Shape", best))
    offsets = build.op("ScatterElements", excluded, best, kept, axis=1)
    masked = build.op("Add", grouped, build.op("Unsqueeze", offsets, build.constant([-1])))
    return build.op("Reshape", masked, build.constant([-1, experts]))


def _experts(build: Builder, operation: MoE, states: ir.Value, shares: ir.Value) -> ir.Value:
    """[batch, sequence, width] -> the same shape; only experts with a share in some token are computed.

    Raises BadInput for an activation that operators of experts have not.
    """
    if operation.activation not in _SIGMOIDS:
        raise BadInput(f"ONNX has no form for experts with {operation.activation.name} yet: use --to gguf")
    attributes = {"k": operation.router.top_k, "activation_type": "swiglu", "swiglu_fusion": 1}
    alpha, beta = _SIGMOIDS[operation.activation]
    attributes |= {"activation_alpha": alpha, "activation_beta": beta}
    if operation.clamp is not None:
        attributes["swiglu_limit"] = operation.clamp
    packing = build.packing(operation.up)
    if packing is None:
        return _float_experts(build, operation, states, shares, attributes)
    up, up_scales = build.packed(operation.up)
    down, down_scales = build.packed(operation.down)
    up_bias, down_bias = _biases(build, operation)
    inputs = [states, shares, up, up_scales, up_bias, down, down_scales, down_bias, *[None] * 6, shares]
    return build.microsoft(
        "QMoE",
        *inputs,
        expert_weight_bits=packing["bits"],
        block_size=packing["block_size"],
        accuracy_level=build.accuracy_level,
        weights_prepacked=0,
        **attributes,
    )


def _float_experts(
    build: Builder, operation: MoE, states: ir.Value, shares: ir.Value, attributes: dict[str, object]
) -> ir.Value:
    """The float operator takes no shares, but softmax of their logarithms gives them, up to their sum."""
    some = build.op("Greater", shares, build.constant(0.0))
    logits = build.op("Where", some, build.op("Log", shares), build.constant(_NEVER))
    up_bias, down_bias = _biases(build, operation)
    inputs = [states, logits, build.weight(operation.up), up_bias, build.weight(operation.down), down_bias]
    answer = build.microsoft("MoE", *inputs, normalize_routing_weights=1, **attributes)
    total = build.op("ReduceSum", shares, build.constant([-1]), keepdims=1)
    shape = build.op("Concat", build.op("Shape", states, end=-1), build.constant([1]), axis=0)
    return build.op("Mul", answer, build.op("Reshape", total, shape))


def _biases(build: Builder, operation: MoE) -> tuple[ir.Value | None, ir.Value | None]:
    """Of gate and up projections, by turns as their rows are, and of down projections; [experts, rows]."""
    if not (operation.gate_bias and operation.up_bias and operation.down_bias):
        return None, None
    ways = (build.weight(bias, (*bias.shape, 1)) for bias in (operation.gate_bias, operation.up_bias))
    return build.reshape(build.op("Concat", *ways, axis=-1), [operation.experts, -1]), build.weight(operation.down_bias)


def dense(build: Builder, operation: MLP, states: ir.Value, layer: int) -> ir.Value:
    """states [batch, sequence, hidden size] -> what the layer adds, of the same shape."""
    return mlp(build, operation, states)


def mlp(build: Builder, operation: MLP, states: ir.Value) -> ir.Value:
    """[..., width] -> [..., width] through a dense layer."""
    up = build.project(states, operation.up)
    if operation.activation is Activation.RELU_SQUARED:
        positive = build.op("Relu", up)
        return build.project(build.op("Mul", positive, positive), operation.down)
    assert operation.gate
    gate = build.project(states, operation.gate)
    if operation.activation is Activation.GEGLU:
        return build.project(build.op("Mul", build.op("Gelu", gate, approximate="tanh"), up), operation.down)
    if operation.clamp is not None:
        gate = build.op("Clip", gate, None, build.constant(operation.clamp))
        up = build.op("Clip", up, build.constant(-operation.clamp), build.constant(operation.clamp))
    alpha, beta = _SIGMOIDS[operation.activation]
    up = build.op("Add", up, build.constant(beta)) if beta else up
    inner = build.op("Mul", build.microsoft("QuickGelu", gate, alpha=alpha), up)  # x * sigmoid(alpha * x)
    return build.project(inner, operation.down)
