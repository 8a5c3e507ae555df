"""Checkpoints that many tests share; built once a session, never changed (copy before damaging one).

Nothing here loads torch or transformers before a test asks for them: most runs are of a few tests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import MiniMaxM2ForCausalLM

# Tiny tensors gain nothing from more threads, and threads that wait for each other lose much on a busy machine. Set
# before torch is loaded, here and in the commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# What CI finds must be found again on the next run; new examples are for those who run the tests themselves.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the transformers model that holds exactly its weights."""

    folder: Path
    oracle: MiniMaxM2ForCausalLM


@pytest.fixture(scope="session")
def minimax(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Float32, as transformers saves it."""
    import checkpoints

    model = checkpoints.minimax_model()
    return Checkpoint(checkpoints.save_minimax(tmp_path_factory.mktemp("checkpoint") / "minimax", model), model)


@pytest.fixture(scope="session")
def minimax_fp8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """FP8 in 128x128 blocks, sharded, as the Hub has it."""
    import checkpoints

    folder = tmp_path_factory.mktemp("checkpoint") / "minimax-fp8"
    return Checkpoint(folder, checkpoints.save_minimax_fp8(folder, checkpoints.minimax_model(seed=1)))


@pytest.fixture(scope="session")
def minimax_odd(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """FP8 with blocks cut off at the edges; rows that no 256-element block divides."""
    import checkpoints

    folder = tmp_path_factory.mktemp("checkpoint") / "minimax-odd"
    model = checkpoints.minimax_model(seed=2, **checkpoints.MINIMAX_ODD)
    return Checkpoint(folder, checkpoints.save_minimax_fp8(folder, model, shards=2))
