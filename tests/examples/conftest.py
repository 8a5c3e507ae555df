"""Reads example checkpoints independently of moecast: safetensors, decoding by hand, transformers' models."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from trained_examples import evaluation_chunks
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM, PreTrainedModel

Tensors = dict[str, torch.Tensor]


def read_tensors(folder: Path) -> Tensors:
    """Every stored tensor by name, found through the index alone."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                assert weight_map[name] == file
                found[name] = shard.get_tensor(name)
    assert found.keys() == weight_map.keys()
    return found


def load_minimax_m2(folder: Path) -> MiniMaxM2ForCausalLM:
    """A float32 model that holds the FP8 weights of `folder` dequantized by hand."""
    declared = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "auto_map", "dtype"):
        del declared[key]
    tensors = read_tensors(folder)

    def weight(name: str) -> torch.Tensor:
        stored = tensors[name].float()
        scale = tensors.get(f"{name}_scale_inv")
        if scale is None:
            return stored
        rows, columns = stored.shape
        return stored * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]

    def in_memory(name: str) -> torch.Tensor:
        stack = re.fullmatch(r"(model\.layers\.\d+\.)mlp\.experts\.(gate_up|down)_proj", name)
        if stack is None:
            return weight(name.replace(".mlp.", ".block_sparse_moe."))
        experts = [f"{stack[1]}block_sparse_moe.experts.{e}" for e in range(declared["num_local_experts"])]
        if stack[2] == "down":
            return torch.stack([weight(f"{expert}.w2.weight") for expert in experts])
        return torch.stack([torch.cat([weight(f"{expert}.w{w}.weight") for w in (1, 3)]) for expert in experts])

    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**declared, bos_token_id=None, eos_token_id=None)).float().eval()
    model.load_state_dict({name: in_memory(name) for name in model.state_dict()})
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, chunks: torch.Tensor) -> float:
    """Per token of `chunks` (int64 `[n, context]`), the first of each chunk not scored."""
    losses = [functional.cross_entropy(model(input_ids=chunk[None, :-1]).logits[0], chunk[1:]) for chunk in chunks]
    return math.exp(torch.stack(losses).mean().item())


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The configuration of the checkpoint that a module calls FOLDER."""
    return json.loads((request.module.FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors(request: pytest.FixtureRequest) -> Tensors:
    return read_tensors(request.module.FOLDER)


@pytest.fixture(scope="module")
def chunks(request: pytest.FixtureRequest) -> torch.Tensor:
    return evaluation_chunks(request.module.FOLDER)


@pytest.fixture(scope="module")
def reference(model: PreTrainedModel, chunks: torch.Tensor) -> float:
    """The perplexity of a module's `model`."""
    return perplexity(model, chunks)


@pytest.fixture(scope="session", name="load_minimax_m2")
def _load_minimax_m2() -> Callable[[Path], MiniMaxM2ForCausalLM]:
    return load_minimax_m2


@pytest.fixture(scope="session", name="perplexity")
def _perplexity() -> Callable[[PreTrainedModel, torch.Tensor], float]:
    return perplexity
