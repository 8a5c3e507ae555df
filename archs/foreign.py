"""What stands in a checkpoint where a tensor is looked for that is not there: forms of other tools, by their traces."""

from __future__ import annotations

from collections.abc import Mapping

from .expressions import TensorInfo

_ORIGINAL = "convert the checkpoint that it was made of"
# Endings beside a module's name, and what they are traces of.
_TRACES = {
    "qweight": f"qweight holds whole numbers that neither GPTQ nor AWQ packed, as config.json has it; {_ORIGINAL}",
    "weight.absmax": f"weight.absmax is bitsandbytes' 4-bit form; {_ORIGINAL}",
    "weight.quant_map": f"weight.quant_map is bitsandbytes' 4-bit form; {_ORIGINAL}",
    "SCB": f"SCB is bitsandbytes' 8-bit form; {_ORIGINAL}",
    "weight.SCB": f"weight.SCB is bitsandbytes' 8-bit form; {_ORIGINAL}",
    "biases": f"scales and biases are MLX's form; {_ORIGINAL}",
    "lora_A.weight": "lora_A is an adapter; merge it into its model first",
    "lora_A.default.weight": "lora_A is an adapter; merge it into its model first",
    "base_layer.weight": "base_layer is a model with an adapter; merge it first",
}


def foreign_form(module: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The form of another tool that a matrix is in, and what to do; None where there is no trace of any."""
    for ending, meaning in _TRACES.items():
        if f"{module}.{ending}" in tensors:
            return meaning
    scale, stored = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight")
    if scale is not None and scale.dtype == "U8" and (stored is None or stored.dtype != "F8_E4M3"):
        return f"weight_scale in U8 is a microscaled (MX) form of another layout; {_ORIGINAL}"
    if scale is not None and stored is not None and stored.dtype == "I8" and scale.dtype != "F8_E8M0":
        return f"it holds 8-bit whole numbers; {_ORIGINAL}"
    return None


def what_else(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """What is there instead of a missing tensor, and what to do; None where nothing is known to be."""
    if form := foreign_form(name.removesuffix(".weight"), tensors):
        return form
    if any(".lora_A" in other for other in tensors):
        return "the tensors are those of an adapter; merge it into its model first"
    prefix = next((other.removesuffix(name) for other in tensors if other.endswith(f".{name}")), None)
    return f"all names begin with {prefix!r}; save the checkpoint without that" if prefix else None
