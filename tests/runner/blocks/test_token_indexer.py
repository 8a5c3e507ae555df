"""Latent attention to the tokens that an indexer picks, against DeepSeek V3.2's and GLM-5's in transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from block_weights import BlockWeights, causal_mask, in_pieces, states
from forward import relative_error
from latent_modules import latent_attention
from moecast.archs.graph import TokenIndexer
from moecast.runner.blocks.common import normalizer
from moecast.runner.blocks.context import Context
from moecast.runner.blocks.indexer import TokenIndexerMixer
from moecast.runner.blocks.latent_attention import LatentAttentionMixer
from torch import Tensor
from transformers import DeepseekV32Config, GlmMoeDsaConfig
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

pytestmark = pytest.mark.numeric

HIDDEN, RANK = 96, 56
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": RANK,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "index_n_heads": 16,  # with few, many scores are exactly zero and the choice between them is anyone's
    "index_head_dim": 32,
    "attn_implementation": "eager",
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.707,
    "mscale_all_dim": 1.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def _deepseek(top_k: int, rope: dict[str, Any]) -> tuple[Any, Any]:
    config = DeepseekV32Config(**SIZES, index_topk=top_k, rope_parameters=rope)
    return deepseek.DeepseekV32Attention(config, 0), deepseek.DeepseekV32RotaryEmbedding(config)


def _glm(top_k: int, rope: dict[str, Any]) -> tuple[Any, Any]:
    config = GlmMoeDsaConfig(**SIZES, index_topk=top_k, rope_parameters=rope)
    return glm.GlmMoeDsaAttention(config, 0), glm.GlmMoeDsaRotaryEmbedding(config)


def _randomized(module: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5)  # so that scores tell tokens apart
    return module.eval()


def _expected(module: Any, rotary: Any, inputs: Tensor) -> Tensor:
    embeddings = rotary(inputs[None], torch.arange(len(inputs))[None])
    with torch.no_grad():
        output: Tensor = module(inputs[None], embeddings, causal_mask(len(inputs)))[0][0]
    return output


@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("family", [_deepseek, _glm])
def test_output_equals_transformers(family: Any, rope: dict[str, Any]) -> None:
    module, rotary = family(32, rope)
    weights, inputs = BlockWeights(), states(300, HIDDEN)  # more than are taken at a time
    operation = latent_attention(_randomized(module), weights)
    expected = _expected(module, rotary, inputs)
    for sizes in ([300], [120, 1, 1, 178]):
        assert relative_error(in_pieces(LatentAttentionMixer(operation, weights), inputs, sizes), expected) < 1e-5
    everything = LatentAttentionMixer(dataclasses.replace(operation, indexer=None), weights)
    assert relative_error(in_pieces(everything, inputs, [300]), expected) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", [_deepseek, _glm])
def test_choice_among_4096_tokens(family: Any) -> None:
    """Half of them are dropped, and those are transformers', up to what two sums of the same numbers differ by."""
    module, rotary = family(2048, PLAIN)
    weights, inputs, latent = BlockWeights(), states(4096, HIDDEN), states(4096, RANK, seed=1)
    block = latent_attention(_randomized(module), weights).indexer
    assert isinstance(block, TokenIndexer)
    positions, mixer = torch.arange(4096), TokenIndexerMixer(block, weights)
    late = slice(3968, None)
    visible = positions[late, None] >= positions
    found = mixer.best(inputs[late], latent[late], positions[late], mixer.keys(inputs, positions), visible)
    turned = rotary(inputs[None], positions[None])
    with torch.no_grad():
        expected = module.indexer(inputs[None], latent[None], turned, causal_mask(4096)[0], positions[None])[0][late]
    assert found.shape == expected.shape == (128, 2048)
    alike = [len({*ours} & {*theirs}) for ours, theirs in zip(found.tolist(), expected.tolist(), strict=True)]
    assert min(alike) >= 2047 and sum(alike) >= 128 * 2048 - 16
    assert not torch.equal(found.sort().values, torch.arange(2048).expand(128, -1))


def test_another_layer_attends_as_the_first_one_chose() -> None:
    module, _ = _glm(32, PLAIN)
    weights, inputs = BlockWeights(), states(300, HIDDEN)
    operation = latent_attention(_randomized(module), weights)
    positions = torch.arange(300)
    first = Context(torch.zeros_like(positions), positions, layer=0, shares=True)
    expected, _ = (mixer := LatentAttentionMixer(operation, weights))(inputs, mixer.initial_state(), first)
    assert first.shared[0].shape == (300, 32)
    sharing = dataclasses.replace(operation, indexer=None, selection_of=0)
    second = Context(torch.zeros_like(positions), positions, layer=1, shared=first.shared)
    found, memory = (mixer := LatentAttentionMixer(sharing, weights))(inputs, mixer.initial_state(), second)
    assert torch.equal(found, expected)
    assert 2 * memory.latents.numel() == 300 * sharing.state_bytes_per_token
    assert operation.state_bytes_per_token - sharing.state_bytes_per_token == 2 * SIZES["index_head_dim"]


def test_key_norm_has_an_epsilon_and_a_bias() -> None:
    """Keys so small that LayerNorm's epsilon is what they are divided by."""
    module, _ = _deepseek(32, PLAIN)
    module = _randomized(module)
    with torch.no_grad():
        module.indexer.wk.weight *= 1e-4
    weights = BlockWeights()
    block = latent_attention(module, weights).indexer
    assert block and block.key_norm.epsilon == 1e-6 and block.key_norm.bias
    inputs = states(20, HIDDEN)
    with torch.no_grad():
        expected = module.indexer.k_norm(module.indexer.wk(inputs))
    found = normalizer(block.key_norm, weights)(weights.project(inputs, block.key))
    assert relative_error(found, expected) < 1e-5
