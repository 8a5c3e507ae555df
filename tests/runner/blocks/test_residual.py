"""Hyper-connections against transformers' modules of DeepSeek V4."""

from __future__ import annotations

from typing import Any

import deepseek_checkpoints
import pytest
import torch
from block_weights import BlockWeights, modules_of, states
from forward import relative_error
from moecast.archs.graph import Activation, HyperConnections, ResidualMix, sequential
from moecast.archs.weights import Role
from moecast.runner.blocks.residual import HyperResidual
from torch import Tensor

pytestmark = pytest.mark.numeric

TOKENS, STREAMS = 50, 4


@pytest.fixture(scope="module")
def model() -> Any:
    return deepseek_checkpoints.deepseek_model()


def _mix(weights: BlockWeights, *parts: Tensor) -> ResidualMix:
    return ResidualMix(*(weights.add(part, Role.HYPER_CONNECTION) for part in parts))


def _residual(model: Any, weights: BlockWeights) -> HyperResidual:
    head, config = model.model.hc_head, model.config
    mix = _mix(weights, head.hc_fn, head.hc_base, head.hc_scale)
    kind = HyperConnections(STREAMS, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps, mix)
    return HyperResidual(kind, config.hidden_size, weights)


def _streams(size: int) -> Tensor:
    return states(TOKENS * STREAMS, size).view(TOKENS, STREAMS, size)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("part", ["attn_hc", "ffn_hc"])
def test_streams_are_read_and_written_as_transformers_does(model: Any, layer: int, part: str) -> None:
    weights, size = BlockWeights(), model.config.hidden_size
    block = model.model.layers[layer]
    module, norm = getattr(block, part), block.input_layernorm
    dense = weights.mlp(modules_of(model, "DeepseekV4MLP")[0], Activation.SWIGLU)
    sublayer = sequential(weights.norm(norm), dense, _mix(weights, module.fn, module.base, module.scale))
    branch = _residual(model, weights).branch(sublayer, _streams(size))
    output = states(TOKENS, size, seed=1)
    with torch.no_grad():
        write, mixing, collapsed = module(_streams(size)[None])
    assert relative_error(branch.input, collapsed[0]) < 3e-6
    # As DeepseekV4DecoderLayer joins them.
    expected = write[0, :, :, None] * output[:, None] + mixing[0].transpose(-1, -2) @ _streams(size)
    assert relative_error(branch.join(output), expected) < 3e-6


def test_streams_end_as_in_transformers(model: Any) -> None:
    streams = _streams(model.config.hidden_size)
    with torch.no_grad():
        expected = model.model.hc_head(streams[None])[0]
    assert relative_error(_residual(model, BlockWeights()).end(streams), expected) < 3e-6


def test_streams_begin_alike(model: Any) -> None:
    embedded = states(TOKENS, model.config.hidden_size)
    begun = _residual(model, BlockWeights()).begin(embedded)
    assert begun.shape == (TOKENS, STREAMS, model.config.hidden_size)
    assert all(torch.equal(begun[:, stream], embedded) for stream in range(STREAMS))
