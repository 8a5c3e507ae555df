"""Mamba-2 against transformers' mixer of Nemotron-H: a prompt of several chunks, pieces of it, single steps."""

from __future__ import annotations

from typing import Any

import nemotron_checkpoints
import pytest
import torch
from block_weights import BlockWeights, context_of, in_pieces, modules_of, states
from forward import relative_error
from moecast.archs.graph import Mamba2, Norm
from moecast.archs.weights import Role
from moecast.runner.blocks.mamba import MambaMixer
from torch import Tensor

pytestmark = pytest.mark.numeric

TOKENS = 300  # more than two chunks of ours and nine of theirs


def _operation(weights: BlockWeights, module: Any) -> Mamba2:
    inner = module.num_heads * module.head_dim
    norm = weights.add(module.norm.weight.view(module.n_groups, inner // module.n_groups), Role.NORM)
    return Mamba2(
        heads=module.num_heads,
        head_size=module.head_dim,
        groups=module.n_groups,
        state_size=module.ssm_state_size,
        input=weights.add(module.in_proj.weight),
        convolution=weights.add(module.conv1d.weight[:, 0]),
        convolution_bias=weights.add(module.conv1d.bias),
        step_bias=weights.add(module.dt_bias),
        decay=weights.add(-module.A_log.exp()[:, None]),
        skip=weights.add(module.D[:, None]),
        norm=Norm(norm, module.norm.variance_epsilon),
        output=weights.add(module.out_proj.weight),
    )


@pytest.fixture(scope="module")
def module() -> Any:
    return modules_of(nemotron_checkpoints.nemotron_model(), "NemotronHMamba2Mixer")[0]


@pytest.fixture(scope="module")
def mixer(module: Any) -> MambaMixer:
    weights = BlockWeights()
    return MambaMixer(_operation(weights, module), weights)


@pytest.fixture(scope="module")
def expected(module: Any) -> Tensor:
    with torch.no_grad():
        return module(states(TOKENS, module.hidden_size)[None])[0]


@pytest.mark.parametrize("sizes", [[TOKENS], [128, 1, 2, 169], [1] * TOKENS], ids=["whole", "pieces", "steps"])
def test_output_is_that_of_transformers(mixer: MambaMixer, expected: Tensor, sizes: list[int]) -> None:
    assert relative_error(in_pieces(mixer, states(TOKENS, expected.shape[1]), sizes), expected) < 1e-5


def test_what_is_remembered_is_what_transformers_remembers(mixer: MambaMixer, module: Any) -> None:
    """After a prompt, and after one more token that went through its recurrent form."""
    from transformers import DynamicCache

    inputs, cache = states(TOKENS, module.hidden_size), DynamicCache(config=module.config)
    memory = mixer.initial_state()
    for positions in torch.arange(TOKENS).split([TOKENS - 1, 1]):
        part = inputs[positions]
        with torch.no_grad():
            answer = module(part[None], cache_params=cache)[0]
        output, memory = mixer(part, memory, context_of(positions))
        assert relative_error(output, answer) < 1e-5
        state = cache.get_recurrent_state(module.layer_idx, state_idx=0)
        assert relative_error(memory.space, state[0].float()) < 1e-5
        convolved = cache.get_conv_state(module.layer_idx, state_idx=0)[0, :, 1 - module.conv_kernel_size :]
        assert relative_error(memory.convolution, convolved.T) < 1e-5
