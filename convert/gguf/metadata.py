"""The keys of a GGUF file: general ones, the architecture's, the tokenizer's, and where the model came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import __version__
from ...progress import Progress
from ...quant.planning.plan import Plan
from ...sources.model import Model
from .tokenizer import tokenizer_metadata

QUANTIZATION_VERSION = 2  # of ggml's block formats, as general.quantization_version


def gguf_metadata(
    model: Model, plan: Plan, name: str, pre: str | None, provenance: Mapping[str, str], progress: Progress
) -> dict[str, Any]:
    """All keys and values of a file.

    Args:
        name: the model's.
        pre: llama.cpp's name of the text splitter, by default the architecture's.
        provenance: facts about the source.
    """
    tokenizer = tokenizer_metadata(
        model.tokenizer, model.graph.vocabulary_size, pre, model.architecture.pre_tokenizer, progress
    )
    general = {
        "general.architecture": plan.graph.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": plan.recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "moecast.version": __version__,
        "moecast.quant": plan.recipe.name,
    }
    return {**general, **source_metadata(provenance), **model.architecture.gguf_metadata(plan.graph), **tokenizer}


def source_metadata(provenance: Mapping[str, str]) -> dict[str, str]:
    """The keys that tell where the model came from."""
    return {f"moecast.source.{key}": value for key, value in provenance.items()}
