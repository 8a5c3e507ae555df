"""The list of architectures: a new one is one new file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .config import Config
from .graph import Graph
from .weights import TensorInfo


@dataclass(frozen=True)
class Architecture:
    """What an adapter provides.

    Attributes:
        name: `general.architecture` of its GGUF files.
        model_types: values of `model_type` in config.json that it reads.
        example: folder of its tiny trained checkpoint in `examples/`.
        pre_tokenizer: llama.cpp's name of its text splitter (`tokenizer.ggml.pre`).
        from_checkpoint: config.json and the stored tensors to a graph.
        from_gguf: GGUF metadata and the stored tensors to a graph.
        gguf_metadata: the keys that llama.cpp needs to run the graph; int means u32, float f32.
        draft_metadata: the same for the file of a graph's draft, where such drafts occur.
    """

    name: str
    model_types: tuple[str, ...]
    example: str
    pre_tokenizer: str
    from_checkpoint: Callable[[Config, Sequence[TensorInfo]], Graph]
    from_gguf: Callable[[Config, Sequence[TensorInfo]], Graph]
    gguf_metadata: Callable[[Graph], Mapping[str, Any]]
    draft_metadata: Callable[[Graph], Mapping[str, Any]] | None = None


def architectures() -> tuple[Architecture, ...]:
    """Every architecture that moecast knows."""
    from . import deepseek_v4, minimax_m2, nemotron_h

    return (minimax_m2.ARCHITECTURE, nemotron_h.MIXTURE, nemotron_h.DENSE, deepseek_v4.ARCHITECTURE)


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
    for architecture in architectures():
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(model_type for architecture in architectures() for model_type in architecture.model_types)
    raise BadInput(f"{config.origin}: model_type is {model_type!r}, expected one of {known}")
