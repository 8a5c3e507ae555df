"""The keys of a GGUF file: general ones, the architecture's, the tokenizer's, and where the model came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ... import __version__
from ...progress import Progress
from ...quant.planning.plan import Plan
from ...sources.imatrix import ImportanceMatrix
from ...sources.model import Model
from ...sources.model_card import read_model_card
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
    published = publication_metadata(model, name, progress) | general
    return {**published, **source_metadata(provenance), **model.architecture.gguf_metadata(plan.graph), **tokenizer}


def source_metadata(provenance: Mapping[str, str]) -> dict[str, str]:
    """The keys that tell where the model came from."""
    keys = {f"moecast.source.{key}": value for key, value in provenance.items()}
    if repository := provenance.get("repository"):
        keys["general.source.repo_url"] = f"https://huggingface.co/{repository}"
    return keys


def publication_metadata(model: Model, name: str, progress: Progress) -> dict[str, Any]:
    """What libraries of files sort by: base name, size, license, tags, languages, origins; as gguf-py derives them.

    Args:
        name: the model's, whose parts say what the model card does not.
        progress: receives a note where the card is not as it should be.
    """
    card = read_model_card(model.path)
    for note in card.notes:
        progress.note(note)
    writer = gguf.GGUFWriter(path=None, arch="")
    writer.kv_data[0].clear()
    for weight in model.graph.weights():
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), 0)
    counts = writer.get_total_parameter_count()
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), model_card={**card.values}, model_path=Path(name), total_params=counts[0]
    )
    found.size_label = found.size_label or gguf.size_label(*counts)
    found.set_gguf_meta_model(writer)
    return {key: item.value for key, item in writer.kv_data[0].items()}


def imatrix_metadata(matrix: ImportanceMatrix) -> dict[str, Any]:
    """What llama-quantize says of an importance matrix, but for the folders that its file lies in."""
    return {
        "quantize.imatrix.file": Path(matrix.file).name,
        "quantize.imatrix.dataset": ", ".join(matrix.datasets),
        "quantize.imatrix.entries_count": len(matrix.means),
        "quantize.imatrix.chunks_count": matrix.chunks,
    }
