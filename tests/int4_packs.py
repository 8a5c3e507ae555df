"""Checkpoints in whole numbers of 4 bits, packed as GPTQ, AWQ and compressed-tensors do, number by number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import edit_config
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns]: its stored tensors by their endings, and the values that they stand for."""

    tensors: dict[str, Tensor]
    values: Tensor


def words(numbers: list[list[int]]) -> Tensor:
    """Rows of lists of eight numbers each -> int32 [rows], the first in the lowest bits."""
    packed = [sum(number << 4 * place for place, number in enumerate(eight)) for eight in numbers]
    return torch.tensor([word - (word >> 31 << 32) for word in packed], dtype=torch.int32)


def along(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[n, m] -> words of eight numbers that follow one another along a dimension, filled up with zeros."""
    moved = numbers.T if dim == 0 else numbers
    filled = torch.nn.functional.pad(moved, (0, -moved.shape[1] % 8))
    starts = range(0, filled.shape[1], 8)
    packed = torch.stack([words([[row[start + i] for i in order] for start in starts]) for row in filled.tolist()])
    return packed.T.contiguous() if dim == 0 else packed


def pack(matrix: Tensor, style: str, group: int, seed: int = 0) -> Packed:
    """Rounded with zeros of their own, or with 8 where the style is "symmetric"; "order" shuffles the groups."""
    rows, columns = matrix.shape
    count = columns // group
    order = torch.arange(columns) // group
    if "order" in style:
        order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    zeros = torch.randint(1, 16, (rows, count), generator=torch.Generator().manual_seed(seed))
    if "symmetric" in style:
        zeros = torch.full_like(zeros, 8)
    dtype = torch.bfloat16 if "compressed" in style else torch.float16
    scales = torch.stack([matrix[:, order == g].abs().amax(1) / 7 for g in range(count)], dim=1).to(dtype)
    exact = scales.double()[:, order]
    codes = (matrix.double() / exact + zeros[:, order]).round().clamp(0, 15).long()
    values = ((codes - zeros[:, order]) * exact).float()
    return Packed(dict(_stored(style, codes, scales, zeros, order.int())), values)


def _stored(style: str, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> Iterator[tuple[str, Tensor]]:
    if "compressed" in style:
        yield "weight_packed", along(codes, 1)
        yield "weight_scale", scales
        yield "weight_shape", torch.tensor(codes.shape)
        if "symmetric" not in style:
            yield "weight_zero_point", along(zeros, 0)
        if "order" in style:
            yield "weight_g_idx", order
        return
    yield "scales", scales.T.contiguous()
    if "awq" in style:
        yield "qweight", along(codes.T, 1, AWQ_ORDER)
        yield "qzeros", along(zeros.T, 1, AWQ_ORDER)
    else:
        yield "qweight", along(codes.T, 0)
        yield "qzeros", along(zeros.T - int("v2" not in style), 1)
        yield "g_idx", order


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
             "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:2.2.0"]}},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
            "modules_to_not_convert": ["gate"]},
    "compressed": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True, "actorder": None}}},
    },
}  # fmt: skip


def repacked(plain: Path, packed: Path, exact: Path, style: str, group: int = 32) -> None:
    """Two copies of a checkpoint in floats: with its projections packed, and with the values that those stand for."""
    tensors = load_file(plain / "model.safetensors")
    stored, values = {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if not name.endswith(("_proj.weight", "_proj_qkvz.weight", "_proj_qkv.weight", "_proj_z.weight")):
            stored[name] = values[name] = tensor
            continue
        made = pack(tensor.float(), style, group, seed=number)
        stored |= {f"{name.removesuffix('.weight')}.{ending}": part for ending, part in made.tensors.items()}
        values[name] = made.values
    for folder, content in ((packed, stored), (exact, values)):
        folder.mkdir()
        for file in plain.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    configuration = json.loads(json.dumps(CONFIGURATIONS[style.split()[0]]))
    if "v2" in style:
        configuration["checkpoint_format"] = "gptq_v2"
    edit_config(packed, quantization_config=configuration)
