"""Gated DeltaNet against transformers' of Qwen3-Next and Qwen3.5: a prompt of several chunks, pieces, single steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_weights import BlockWeights, context_of, in_pieces, states
from forward import relative_error
from moecast.archs.graph import GatedDeltaNet, Norm
from moecast.archs.weights import Role, Weight
from moecast.runner.blocks.deltanet import DeltaNetMixer
from torch import Tensor

pytestmark = pytest.mark.numeric

TOKENS = 150  # more than two chunks, and no multiple of one
HIDDEN, KEY_HEADS, KEY_SIZE = 48, 2, 16
# Heads for each key head, width of a value, taps of the convolution.
SHAPES = {"two heads a key head": (2, 16, 4), "three": (3, 24, 2), "one": (1, 8, 3)}


def _module(kind: str, shape: tuple[int, int, int]) -> Any:
    """A random block whose states fade at all speeds."""
    import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as plain
    import transformers.models.qwen3_next.modeling_qwen3_next as fused
    from transformers import Qwen3_5MoeTextConfig, Qwen3NextConfig

    times, value_size, taps = shape
    made, config = {
        "fused": (fused.Qwen3NextGatedDeltaNet, Qwen3NextConfig),
        "plain": (plain.Qwen3_5MoeGatedDeltaNet, Qwen3_5MoeTextConfig),
    }[kind]
    torch.manual_seed(0)
    module = made(
        config(
            hidden_size=HIDDEN,
            linear_num_key_heads=KEY_HEADS,
            linear_num_value_heads=times * KEY_HEADS,
            linear_key_head_dim=KEY_SIZE,
            linear_value_head_dim=value_size,
            linear_conv_kernel_dim=taps,
            num_hidden_layers=1,
        ),
        0,
    )
    with torch.no_grad():
        module.A_log.copy_(torch.empty_like(module.A_log).uniform_(0.05, 4).log())
        module.dt_bias.normal_()
        module.norm.weight.uniform_(0.5, 1.5)
        module.conv1d.weight.normal_(0, 0.5)
        for name, matrix in module.named_parameters():
            if "proj" in name:
                matrix.normal_(0, matrix.shape[1] ** -0.5)
    return module


def _operation(weights: BlockWeights, module: Any, tiled: bool) -> GatedDeltaNet:
    """Of a module with its heads as they are, or in the order that llama.cpp wants of plain projections."""
    heads = torch.arange(module.num_v_heads)
    order = heads.view(KEY_HEADS, -1).T.flatten() if tiled else heads
    values = (order[:, None] * module.head_v_dim + torch.arange(module.head_v_dim)).flatten()
    mixed = torch.cat((torch.arange(2 * module.key_dim), 2 * module.key_dim + values))
    qkv, z, beta, alpha = _projections(module)

    def vector(numbers: Tensor) -> Weight:
        return weights.add(numbers[order], Role.DELTA_SCALAR)

    return GatedDeltaNet(
        key_heads=KEY_HEADS,
        heads=len(heads),
        key_size=module.head_k_dim,
        value_size=module.head_v_dim,
        input=weights.add(qkv[mixed]),
        gate=weights.add(z[values]),
        beta=weights.add(beta if alpha is None else beta[order]),
        alpha=None if alpha is None else weights.add(alpha[order]),
        convolution=weights.add(module.conv1d.weight[mixed, 0]),
        step_bias=vector(module.dt_bias),
        decay=vector(-module.A_log.exp()),
        norm=Norm(weights.add(module.norm.weight, Role.NORM), module.norm.variance_epsilon),
        output=weights.add(module.out_proj.weight[:, values]),
        tiled=tiled,
    )


def _projections(module: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows of query, key and value; of the gate; of beta; of alpha, where it is apart."""
    if hasattr(module, "in_proj_qkv"):
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        return tuple(getattr(module, name).weight for name in names)  # type: ignore[return-value]
    key, value = module.head_k_dim, module.value_dim // KEY_HEADS
    apart = module.in_proj_qkvz.weight.unflatten(0, (KEY_HEADS, -1)).split((key, key, value, value), dim=1)
    *mixed, gate = (rows.flatten(0, 1) for rows in apart)
    return torch.cat(mixed), gate, module.in_proj_ba.weight, None


CASES = [("fused", False), ("plain", False), ("plain", True)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("kind", "tiled"), CASES, ids=["fused", "plain", "tiled"])
def test_output_and_state_are_those_of_transformers(kind: str, tiled: bool, shape: tuple[int, int, int]) -> None:
    module, inputs = _module(kind, shape), states(TOKENS, HIDDEN)
    weights = BlockWeights()
    mixer = DeltaNetMixer(_operation(weights, module, tiled), weights)
    with torch.no_grad():
        expected = module(inputs[None])[0]
        for sizes in ([TOKENS], [64, 1, 2, 83], [1] * TOKENS):
            assert relative_error(in_pieces(mixer, inputs, sizes), expected) < 1e-5


def test_what_is_remembered_is_what_transformers_remembers() -> None:
    """After a prompt, and after one more token that went through its recurrent form."""
    from transformers import DynamicCache, Qwen3NextConfig

    module, inputs = _module("fused", SHAPES["three"]), states(TOKENS, HIDDEN)
    cache = DynamicCache(config=Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"]))
    weights = BlockWeights()
    mixer = DeltaNetMixer(_operation(weights, module, tiled=False), weights)
    memory = mixer.initial_state()
    for positions in torch.arange(TOKENS).split([TOKENS - 1, 1]):
        with torch.no_grad():
            module(inputs[positions][None], cache_params=cache)
            _, memory = mixer(inputs[positions], memory, context_of(positions))
        assert relative_error(memory.space, cache.get_recurrent_state(0, state_idx=0)[0]) < 1e-5
        convolved = cache.get_conv_state(0, state_idx=0)[0, :, 1 - module.conv_kernel_size :]
        assert relative_error(memory.convolution, convolved.T) < 1e-5
