"""Rewrites a BF16 or float32 checkpoint into the 8- and 4-bit forms that NVIDIA publishes.

NVFP4, FP8 and MXFP8 as ModelOpt stores them, FP8 with a scale for each row, and NVFP4 as compressed-tensors stores it.
Nothing of the package under test is used, so that it can be compared with what is computed here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Encoding = Literal["nvfp4", "fp8", "fp8_rows", "nvfp4_compressed", "mxfp8", "mxfp8_inverse"]

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST_E2M1, LARGEST_E4M3, GROUP = 6.0, 448.0, 16


def experts_in_nvfp4(module: str) -> Encoding | None:
    """The mixture of the Super release: experts NVFP4, Mamba and shared experts FP8, the rest as it was."""
    if ".experts." in module:
        return "nvfp4"
    return "fp8" if module.endswith(("in_proj", "out_proj")) or "shared_experts" in module else None


def rewrite(source: Path, target: Path, encoding_of: Callable[[str], Encoding | None]) -> dict[str, Tensor]:
    """Copies the checkpoint folder, quantized.

    Args:
        source: a folder with one model.safetensors.
        target: the folder to make.
        encoding_of: module name (`backbone.layers.0.mixer.in_proj`) to its encoding, None to leave it.

    Returns:
        The values that the new checkpoint stands for, float32, under the names of `source`.
    """
    shutil.copytree(source, target)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        encoding = encoding_of(module) if name.endswith(".weight") and tensor.ndim == 2 else None
        if encoding is None:
            stored[name], values[name] = tensor, tensor.float()
            continue
        parts, values[name] = _ENCODERS[encoding](tensor.float())
        stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        modules[module] = encoding
    save_file(stored, target / "model.safetensors")
    layers = {module: {"quant_algo": kind.partition("_")[0].upper()} for module, kind in modules.items()}
    recipe = {"producer": {"name": "modelopt"}, "quantization": {"quantized_layers": layers}}
    (target / "hf_quant_config.json").write_text(json.dumps(recipe))
    return values


def dequantized(source: Path, target: Path, values: dict[str, Tensor]) -> Path:
    """A copy of `source` with other values, for an engine that cannot read the quantized form."""
    shutil.copytree(source, target)
    save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _nvfp4_parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes, scales, global scale and the values they stand for."""
    rows, columns = matrix.shape
    global_scale = matrix.abs().max() / (LARGEST_E2M1 * LARGEST_E4M3)
    groups = matrix.view(rows, columns // GROUP, GROUP)
    scales = (groups.abs().amax(-1) / (LARGEST_E2M1 * global_scale)).to(torch.float8_e4m3fn)
    factors = scales.float()[..., None]
    wanted = groups / (factors * global_scale).clamp_min(1e-30)
    codes = (wanted.abs()[..., None] - E2M1).abs().argmin(-1)
    values = E2M1[codes] * torch.where(wanted < 0, -1.0, 1.0) * factors * global_scale
    codes = (codes + 8 * (wanted < 0)).view(rows, columns).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales, global_scale, values.view(rows, columns)


def _nvfp4(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed, scales, global_scale, values = _nvfp4_parts(matrix)
    parts = {
        "weight": packed,
        "weight_scale": scales,
        "weight_scale_2": global_scale,
        "input_scale": torch.tensor(0.01),
    }
    return parts, values


def _nvfp4_compressed(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed, scales, global_scale, values = _nvfp4_parts(matrix)
    parts = {
        "weight_packed": packed,
        "weight_scale": scales,
        "weight_global_scale": (1 / global_scale)[None],
        "input_global_scale": torch.tensor([100.0]),
    }
    return parts, values


def _fp8(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = matrix.abs().max() / LARGEST_E4M3
    codes = (matrix / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.01)}, codes.float() * scale


def _fp8_rows(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = matrix.abs().amax(1, keepdim=True) / LARGEST_E4M3
    codes = (matrix / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _mxfp8(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A power of two for each 32 columns, stored as its exponent."""
    groups = matrix.unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(-1) / LARGEST_E4M3).log2().ceil().clamp(-127, 127)
    codes = (groups / exponents.exp2()[..., None]).to(torch.float8_e4m3fn)
    values = codes.float() * exponents.exp2()[..., None]
    return {"weight": codes.flatten(1), "weight_scale": (exponents + 127).to(torch.uint8)}, values.flatten(1)


def _mxfp8_inverse(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Under the name that other releases have."""
    parts, values = _mxfp8(matrix)
    return {"weight": parts["weight"], "weight_scale_inv": parts["weight_scale"]}, values


_ENCODERS: dict[Encoding, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "nvfp4": _nvfp4,
    "nvfp4_compressed": _nvfp4_compressed,
    "fp8": _fp8,
    "fp8_rows": _fp8_rows,
    "mxfp8": _mxfp8,
    "mxfp8_inverse": _mxfp8_inverse,
}
