"""What an adapter provides: how a family's checkpoints and GGUF files are read, and what llama.cpp must be told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .config import Config
from .expressions import TensorInfo
from .graph import Graph


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Attributes:
        name: `general.architecture` of its GGUF files.
        model_types: values of `model_type` in config.json that it reads.
        pre_tokenizer: llama.cpp's name of its text splitter (`tokenizer.ggml.pre`).
        from_checkpoint: config.json and the stored tensors to a graph.
        from_gguf: GGUF metadata and the stored tensors to a graph.
        gguf_metadata: the keys that llama.cpp needs to run the graph; int means u32, float f32.
        example: folder of its tiny trained checkpoint in `examples/`, None where it has none.
        draft_metadata: the same for the file of a graph's draft, where such drafts occur.
        draft_from_gguf: what `from_gguf` makes of a draft's file, given the graph that it drafts for: its `draft`.
        harmless: keys of config.json that change no number in this family, see `archs/harmless.py`.
        harmless_metadata: the same of GGUF metadata, without the architecture's name.
    """

    name: str
    model_types: tuple[str, ...]
    pre_tokenizer: str
    from_checkpoint: Callable[[Config, Sequence[TensorInfo]], Graph]
    from_gguf: Callable[[Config, Sequence[TensorInfo]], Graph]
    gguf_metadata: Callable[[Graph], Mapping[str, Any]]
    example: str | None = None
    draft_metadata: Callable[[Graph], Mapping[str, Any]] | None = None
    draft_from_gguf: Callable[[Config, Sequence[TensorInfo], Graph], Graph] | None = None
    harmless: Collection[str] = ()
    harmless_metadata: Collection[str] = ()


def refuse_unlike(graph: Graph, unlike: Mapping[str, object]) -> None:
    """Raises BadInput naming the first of what a model may have and llama.cpp does not compute, if it is there."""
    if found := next((what for what, there in unlike.items() if there), None):
        raise BadInput(f"this model has {found}, which llama.cpp does not do for {graph.architecture}: use --to onnx")
