"""Attention against transformers' modules of MiniMax M2 (norms, half-rotated heads) and Nemotron (no positions)."""

from __future__ import annotations

import checkpoints
import nemotron_checkpoints
import pytest
import torch
from block_weights import BlockWeights, causal_mask, in_pieces, modules_of, states
from forward import relative_error
from moecast.archs.graph import Attention, Norm, Rope
from moecast.runner.blocks.attention import AttentionMixer
from torch import Tensor

pytestmark = pytest.mark.numeric

TOKENS = 70
PIECES = [[TOKENS], [1, 30, 2, 37], [1] * TOKENS]


def _attention(weights: BlockWeights, module: object, rope: Rope | None, norms: tuple[Norm | None, ...]) -> Attention:
    heads = module.q_proj.weight.shape[0] // module.head_dim
    return Attention(
        heads,
        heads // module.num_key_value_groups,
        module.head_dim,
        *(weights.add(getattr(module, f"{part}_proj").weight) for part in "qkvo"),
        *norms,
        rope=rope,
    )


@pytest.fixture(scope="module")
def minimax() -> tuple[AttentionMixer, Tensor]:
    """Our block, and what transformers' answers."""
    model = checkpoints.minimax_model()
    (module, *_), weights = modules_of(model, "MiniMaxM2Attention"), BlockWeights()
    rope = Rope(checkpoints.MINIMAX["rotary_dim"], model.config.rope_parameters["rope_theta"])
    operation = _attention(weights, module, rope, (weights.norm(module.q_norm), weights.norm(module.k_norm)))
    inputs = states(TOKENS, model.config.hidden_size)
    with torch.no_grad():
        positions = model.model.rotary_emb(inputs[None], torch.arange(TOKENS)[None])
        expected, _ = module(inputs[None], positions, causal_mask(TOKENS))
    return AttentionMixer(operation, weights), expected[0]


@pytest.fixture(scope="module")
def nemotron() -> tuple[AttentionMixer, Tensor]:
    model = nemotron_checkpoints.nemotron_model()
    (module,), weights = modules_of(model, "NemotronHAttention"), BlockWeights()
    operation = _attention(weights, module, None, (None, None))
    with torch.no_grad():
        expected, _ = module(states(TOKENS, model.config.hidden_size)[None], causal_mask(TOKENS))
    return AttentionMixer(operation, weights), expected[0]


@pytest.mark.parametrize("sizes", PIECES, ids=["whole", "pieces", "steps"])
@pytest.mark.parametrize("kind", ["minimax", "nemotron"])
def test_output_is_that_of_transformers(kind: str, sizes: list[int], request: pytest.FixtureRequest) -> None:
    mixer, expected = request.getfixturevalue(kind)
    inputs = states(TOKENS, expected.shape[1])
    assert relative_error(in_pieces(mixer, inputs, sizes), expected) < 3e-6
