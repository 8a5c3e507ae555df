"""Multi-head latent attention: against DeepSeek V3's in transformers, as it is and with plain queries."""

from __future__ import annotations

import math

import pytest
import torch
from block_weights import BlockWeights, causal_mask, context_of, in_pieces, states
from forward import relative_error
from latent_modules import latent_attention
from moecast.runner.blocks.latent_attention import LatentAttentionMixer
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

HIDDEN, HEADS, LATENT, KEY, TURNED, VALUE = 96, 4, 48, 24, 16, 40
FACTOR, ORIGINAL = 40.0, 64  # YaRN: so short that all of its kinds of pairs occur


def _module(query_rank: int | None, yarn: dict[str, float] | None) -> DeepseekV3Attention:
    torch.manual_seed(0)
    scaling = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": ORIGINAL, **(yarn or {})}
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_rank,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=KEY,
        qk_rope_head_dim=TURNED,
        v_head_dim=VALUE,
        rope_parameters={"rope_theta": 1e4, **({"rope_type": "default"} if yarn is None else scaling)},
        attn_implementation="eager",
    )
    module = DeepseekV3Attention(config, 0).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)  # so that scores tell tokens apart
    return module


def _expected(module: DeepseekV3Attention, inputs: Tensor) -> Tensor:
    positions = torch.arange(len(inputs))[None]
    embeddings = DeepseekV3RotaryEmbedding(module.config)(inputs[None], positions)
    with torch.no_grad():
        output: Tensor = module(inputs[None], embeddings, causal_mask(len(inputs)))[0][0]
    return output


@pytest.mark.parametrize(
    ("query_rank", "yarn"),
    [
        (56, None),
        (None, None),
        (56, {"mscale": 1.0, "mscale_all_dim": 1.0}),
        (56, {"mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 1, "beta_slow": 1}),
        (None, {}),
    ],
)
def test_output_equals_transformers(query_rank: int | None, yarn: dict[str, float] | None) -> None:
    module, weights = _module(query_rank, yarn), BlockWeights()
    operation = latent_attention(module, weights)
    inputs = states(300, HIDDEN)  # more than are taken at a time
    expected, mixer = _expected(module, inputs), LatentAttentionMixer(operation, weights)
    for sizes in ([300], [120, 1, 1, 178]):
        assert relative_error(in_pieces(mixer, inputs, sizes), expected) < 1e-5


def test_magnitude_is_in_the_scale() -> None:
    """DeepSeek's YaRN has all of it in the scores of a head, and what is rotated keeps its length."""
    operation = latent_attention(_module(None, {"mscale": 1.0, "mscale_all_dim": 1.0}), BlockWeights())
    assert operation.scale == pytest.approx((KEY + TURNED) ** -0.5 * (0.1 * math.log(FACTOR) + 1) ** 2)
    assert operation.rope.yarn and operation.rope.yarn.magnitude == 1


def test_state_is_as_large_as_the_operation_says() -> None:
    weights = BlockWeights()
    operation = latent_attention(_module(56, None), weights)
    inputs = states(20, HIDDEN)
    mixer = LatentAttentionMixer(operation, weights)
    _, memory = mixer(inputs, mixer.initial_state(), context_of(torch.arange(20)))
    bytes_in_a_cache = 2 * memory.latents.numel()
    assert bytes_in_a_cache == 20 * operation.state_bytes_per_token == 20 * 2 * (LATENT + TURNED)
