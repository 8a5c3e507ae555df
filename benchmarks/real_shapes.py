"""Checkpoints of random numbers in the shapes and types of published models, with fewer layers or experts.

They have the tokenizer of a tiny example, and a vocabulary as small as its.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from real_deepseek import FLASH
from real_models import minimax_m2_tensors

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 1 << 30
FP4_SIZE, FP8_SIZE = 2.9, 100.0  # root mean squares of the codes that are drawn
FP8_LARGEST = 448.0
Entry = tuple[str, tuple[int, ...], str]


def build_minimax_m2(folder: Path, layers: int, experts: int) -> None:
    """FP8 with float32 scales of blocks of 128 x 128."""
    config = _config("minimax-m2.5", "minimax-m2-tiny") | {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "attn_type_list": [1] * layers,
    }
    _write(folder, config, minimax_m2_tensors(layers, experts, config["vocab_size"]), "minimax-m2-tiny")


def build_deepseek_v4_flash(folder: Path, layers: int, experts: int) -> None:
    """Experts in packed FP4 with a power of two for 32 of them; all layers but the first of several compress."""
    config = _config("deepseek-v4-flash", "deepseek-v4-tiny")
    ratios = tuple(config["compress_ratios"][1 if layers > 1 else 2 :][:layers])  # none, 4, 128 ...; or 4 alone
    config |= {
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "compress_ratios": list(ratios),
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 0,
    }
    model = replace(FLASH, experts=experts, ratios=ratios, hash_layers=1, drafts=0, vocabulary=config["vocab_size"])
    _write(folder, config, model.tensors(), "deepseek-v4-tiny")


BUILDERS: dict[str, Callable[[Path, int, int], None]] = {
    "minimax-m2": build_minimax_m2,
    "deepseek-v4-flash": build_deepseek_v4_flash,
}


def _config(published: str, example: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / f"tests/data/{published}-config.json").read_text())
    tiny = json.loads((ROOT / "examples" / example / "config.json").read_text())
    return config | {key: tiny[key] for key in ("vocab_size", "bos_token_id", "eos_token_id") if key in tiny}


def _write(folder: Path, config: dict[str, Any], entries: Iterator[Entry], example: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "examples" / example / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    numbers, before = 0, ""

    def save() -> None:
        nonlocal numbers
        file = f"model-{numbers + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        numbers += 1

    for name, shape, dtype in entries:
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save()
        shard[name] = _numbers(name, shape, dtype, before, generator)
        before = dtype
    save()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _numbers(name: str, shape: tuple[int, ...], dtype: str, before: str, generator: torch.Generator) -> Tensor:
    """Numbers of a tensor; scales follow the codes that they belong to, which were of type `before`."""
    if dtype == "F8_E4M3":
        values = torch.randn(shape, generator=generator) * FP8_SIZE
        return values.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)  # beyond, some torch give NaN
    if dtype == "I8":
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if dtype == "I64":  # the table of experts for each token
        experts = torch.arange(shape[0])[:, None] * 7 + torch.arange(shape[1]) * 3
        return experts % 8  # of which there are no fewer
    if "scale" in name.rsplit(".", 1)[-1] and len(shape) == 2:
        columns, size = (shape[1] * 32, FP4_SIZE) if before == "I8" else (shape[1] * 128, FP8_SIZE)
        scale = 1 / size / math.sqrt(columns)
        if dtype == "F32":
            return torch.full(shape, scale)
        return torch.full(shape, 127 + round(math.log2(scale)), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if len(shape) == 1:
        size = 1.0 if "norm" in name or name.endswith("_scale") else 0.0
        values = torch.full(shape, size)
    else:
        values = torch.randn(shape, generator=generator)
        if "embed" not in name:
            values /= math.sqrt(shape[1])
    return values.bfloat16() if dtype == "BF16" else values
