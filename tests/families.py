"""The families of the trained examples, read independently of moecast: safetensors, decoding by hand, transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from trained_examples import EXAMPLES

if TYPE_CHECKING:
    from transformers import (
        DeepseekV4ForCausalLM,
        MiniMaxM2ForCausalLM,
        NemotronHForCausalLM,
        PreTrainedModel,
        Qwen3_5MoeForCausalLM,
    )

Tensors = dict[str, Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Family:
    """A trained example.

    `load` gives transformers' model in float32 from its folder and an empty one to work in, `routed` the model's
    blocks of experts, whose router is called `gate`. `biases` counts the trained selection biases. No unigram model
    comes near `largest_perplexity`.
    """

    folder: Path
    expert_layers: int
    largest_perplexity: float
    biases: int
    load: Callable[[Path, Path], Any]
    routed: Callable[[Any], list[Any]]

    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())


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


@torch.no_grad()
def perplexity(model: PreTrainedModel, chunks: Tensor) -> float:
    """Per token of `chunks` (int64 `[n, context]`), the first of each chunk not scored."""
    losses = [functional.cross_entropy(model(input_ids=chunk[None, :-1]).logits[0], chunk[1:]) for chunk in chunks]
    return math.exp(torch.stack(losses).mean().item())


def load_minimax_m2(folder: Path, _: Path | None = None) -> MiniMaxM2ForCausalLM:
    """A float32 model that holds the FP8 weights of `folder` dequantized by hand."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    declared = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "auto_map", "dtype"):
        del declared[key]
    tensors = read_tensors(folder)

    def weight(name: str) -> Tensor:
        scale = tensors.get(f"{name}_scale_inv")
        return tensors[name].float() if scale is None else _fp8_blocks(tensors[name], scale)

    def in_memory(name: str) -> Tensor:
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


def load_nemotron(folder: Path, _: Path) -> NemotronHForCausalLM:
    """Loaded by transformers from the published names, in float32, without its clamp of the state-space step."""
    from transformers import NemotronHForCausalLM

    return _loaded(NemotronHForCausalLM, folder, time_step_min=1e-30)


def load_deepseek(folder: Path, work: Path) -> DeepseekV4ForCausalLM:
    """Dequantized by hand; the published names and keys are understood by transformers."""
    from transformers import DeepseekV4ForCausalLM

    config = json.loads((folder / "config.json").read_text())
    save_file(_deepseek_values(read_tensors(folder)), work / "model.safetensors", metadata={"format": "pt"})
    stored = ("quantization_config", "expert_dtype")
    (work / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in stored}))
    return _loaded(DeepseekV4ForCausalLM, work)


def load_qwen(folder: Path, _: Path) -> Qwen3_5MoeForCausalLM:
    """Loaded by transformers from the published names, in float32."""
    from transformers import Qwen3_5MoeForCausalLM

    return _loaded(Qwen3_5MoeForCausalLM, folder)


def _loaded(kind: Any, folder: Path, **settings: Any) -> Any:
    """A model for which nothing was missing, left over or of another shape."""
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **settings)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def _deepseek_values(tensors: Tensors) -> Tensors:
    """The values that the stored tensors stand for, under the same names; float32 but for the hash tables."""
    values = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if scale is None:
            values[name] = tensor if tensor.dtype == torch.int64 else tensor.float()
        elif tensor.dtype == torch.int8:
            values[name] = mxfp4_codes(tensor) * scale.float().repeat_interleave(32, dim=1)
        else:
            values[name] = _fp8_blocks(tensor, scale.float())
    return values


def mxfp4_codes(packed: Tensor) -> Tensor:
    """The even column of two is in the low half of a byte."""
    codes = packed.view(torch.uint8).long()
    return E2M1[torch.stack([codes & 15, codes >> 4], dim=-1)].flatten(1)


def _fp8_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """One multiplier for each block of 128 by 128, the last ones cut off at the edges."""
    rows, columns = codes.shape
    return codes.float() * scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def _mlps(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def _nemotron_mixers(model: Any) -> list[Any]:
    return [layer.mixer for layer in model.model.layers if hasattr(layer.mixer, "experts")]


MINIMAX = Family(EXAMPLES / "minimax-m2-tiny", 2, 25.0, 2, load_minimax_m2, _mlps)
NEMOTRON = Family(EXAMPLES / "nemotron-3-tiny", 2, 30.0, 2, load_nemotron, _nemotron_mixers)
DEEPSEEK = Family(EXAMPLES / "deepseek-v4-tiny", 3, 40.0, 2, load_deepseek, _mlps)
QWEN = Family(EXAMPLES / "qwen3.5-tiny", 4, 17.0, 0, load_qwen, _mlps)
FAMILIES = (MINIMAX, NEMOTRON, DEEPSEEK, QWEN)
