"""The list of architectures: a new one is one new file and one line here."""

from __future__ import annotations

from ..errors import BadInput
from . import (
    cohere2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    gemma4,
    gpt_oss,
    minimax_m2,
    minimax_m3,
    nemotron_h,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from .architecture import Architecture
from .config import Config

_NOT_CARRIED = {
    "deepseek_v41": "how its n-gram tables (engram) are hashed and gated is published in no code that could be run",
    "glm5_next": "its linear attention with a decay of each key channel (KDA) and its pooled indexer are not built yet",
}
"""By `model_type`, what is missing of models whose names are known."""


def architectures() -> tuple[Architecture, ...]:
    """Every architecture that moecast knows."""
    return (
        minimax_m2.ARCHITECTURE,
        minimax_m3.ARCHITECTURE,
        nemotron_h.MIXTURE,
        nemotron_h.DENSE,
        deepseek_v3.ARCHITECTURE,
        deepseek_v32.DEEPSEEK,
        deepseek_v32.GLM,
        deepseek_v4.ARCHITECTURE,
        qwen3_moe.ARCHITECTURE,
        gpt_oss.ARCHITECTURE,
        gemma4.ARCHITECTURE,
        cohere2.DENSE,
        cohere2.MIXTURE,
        qwen3_next.ARCHITECTURE,
        qwen3_5.MIXTURE,
        qwen3_5.DENSE,
    )


def architecture_named(name: str, origin: str) -> Architecture:
    """The adapter for a GGUF architecture name. Raises BadInput for an unknown one."""
    for architecture in architectures():
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in architectures())
    raise BadInput(f"{origin}: general.architecture is {name!r}, expected one of {known}")


def architecture_of(config: Config) -> Architecture:
    """The adapter for a checkpoint's `model_type`. Raises BadInput for an unknown one."""
    model_type = config.text("model_type")
    inner = config.section("text_config").text("model_type", default=model_type)  # beside a tower for pictures
    for architecture in architectures():
        if {model_type, inner}.issubset(architecture.model_types):
            return architecture
    for name, missing in _NOT_CARRIED.items():
        if model_type == name or inner.startswith(name):
            raise BadInput(f"{config.origin}: model_type is {model_type!r}, which moecast cannot convert: {missing}")
    named = model_type if inner == model_type else f"{model_type} of {inner}"
    known = ", ".join(dict.fromkeys(name for architecture in architectures() for name in architecture.model_types))
    raise BadInput(f"{config.origin}: model_type is {named!r}, expected one of {known}")
