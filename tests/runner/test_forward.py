"""The runner against transformers: the same logits from the same checkpoint, whatever names and dtypes it comes in."""

from __future__ import annotations

import copy
from pathlib import Path

import checkpoints
import pytest
import torch
from conftest import Checkpoint
from forward import assert_same_logits, random_tokens
from moecast.sources.model import open_model

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(3, 80, checkpoints.MINIMAX["vocab_size"])


@pytest.mark.parametrize("name", ["minimax", "minimax_fp8", "minimax_odd"])
def test_logits_equal_transformers(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(name)
    assert_same_logits(open_model(checkpoint.folder), checkpoint.oracle, TOKENS)


def test_in_memory_names_give_the_same_logits(minimax: Checkpoint, tmp_path: Path) -> None:
    """`save_original_format=False` fuses the gate and up projections of all experts."""
    folder = checkpoints.save_minimax(tmp_path / "fused", minimax.oracle, in_memory_names=True)
    assert_same_logits(open_model(folder), minimax.oracle, TOKENS)


def test_tied_embeddings(tmp_path: Path) -> None:
    model = checkpoints.minimax_model(tie_word_embeddings=True)
    folder = checkpoints.save_minimax(tmp_path / "tied", model)
    assert_same_logits(open_model(folder), model, TOKENS)


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    """Stored BF16 is exact in float32: the oracle computes in float32 with the rounded weights."""
    model = checkpoints.minimax_model(seed=3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "inv_freq" not in name:
                tensor.copy_(tensor.bfloat16())
    folder = checkpoints.save_minimax(tmp_path / "bf16", copy.deepcopy(model).bfloat16())
    assert_same_logits(open_model(folder), model, TOKENS)
