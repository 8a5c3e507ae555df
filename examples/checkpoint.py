"""Writes tensors as a sharded safetensors checkpoint with an index; FP8 block quantization."""

from pathlib import Path
from typing import Any

import torch
from architecture import Architecture
from safetensors.torch import save_file
from tokenizer import write_json
from torch.nn import functional

LARGEST_E4M3 = 448.0


def quantize_fp8_blocks(
    weight: torch.Tensor, block: int, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes `[rows, columns]` to float8_e4m3fn with one float32 factor per `block` x `block` values.

    Returns the values `[rows, columns]` and the factors `[ceil(rows / block), ceil(columns / block)]`; their product
    restores the weight. Blocks at the edges may be partial. Factors that fill the range of float8_e4m3fn are used, or
    the next larger `power_of_two`.
    """
    rows, columns = weight.shape
    padded = functional.pad(weight.detach().float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.view(-(-rows // block), block, -(-columns // block), block)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / LARGEST_E4M3
    if power_of_two:
        scale = scale.log2().ceil().exp2()
    values = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scale


def write_checkpoint(
    architecture: Architecture, tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path
) -> None:
    """Writes config.json, equally large shards in the order of `tensors` and model.safetensors.index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(architecture.SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[written * len(shards) // total][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = architecture.shard_name(number, len(shards))
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)
