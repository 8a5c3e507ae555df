"""One handle for every kind of model: a graph, and its weights on request.

torch is imported with the first weight that is read: to look at a model takes none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..archs.architecture import Architecture
from ..archs.config import Config
from ..archs.expressions import TensorInfo
from ..archs.graph import Graph
from ..archs.harmless import check_repeated, refuse_unread, refuse_unread_metadata
from ..archs.registry import architecture_named, architecture_of
from ..archs.weights import Weight
from ..documents import is_file, is_folder
from ..errors import BadInput
from .checkpoint import read_config, read_tensors
from .gguf import is_gguf, read_gguf
from .storage import OnDevice, Reader, Storage
from .tokenizer import Tokenizer
from .tokenizer_folder import read_tokenizer_folder
from .tokenizer_gguf import read_tokenizer_metadata

if TYPE_CHECKING:
    import torch

PIECE_ROWS = 1024  # of a matrix that is taken through memory

Piece = tuple[int | None, tuple[int, int] | None]  # (matrix of a stack, rows) of a weight, as `Model.load` takes them


def pieces(weight: Weight) -> Iterator[Piece]:
    """How a weight is taken through memory: matrix by matrix of a stack, some rows at a time, vectors whole."""
    if weight.stack:
        yield from ((matrix, None) for matrix in range(weight.matrices))
    elif len(weight.shape) == 1:
        yield None, None
    else:
        for row in range(0, weight.shape[0], PIECE_ROWS):
            yield None, (row, min(row + PIECE_ROWS, weight.shape[0]))


def first_row_of(weight: Weight, piece: Piece) -> int:
    """Where a piece begins within the whole tensor, whose rows count over all matrices."""
    matrix, rows = piece
    return matrix * weight.shape[-2] if matrix is not None else (rows[0] if rows else 0)


def row_count_of(weight: Weight, piece: Piece) -> int:
    """How many rows a piece has."""
    rows = piece[1]
    if rows:
        return rows[1] - rows[0]
    return weight.shape[-2] if len(weight.shape) > 1 else 1


class Model:
    """A model whose tensors stay on disk.

    Attributes:
        path: checkpoint folder or GGUF file.
        architecture: the adapter that read it.
        graph: its blocks and weights.
        tensors: every stored tensor.
        metadata: GGUF metadata; empty for a checkpoint.
        storage: reads their bytes.
    """

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        graph: Graph,
        tensors: tuple[TensorInfo, ...],
        metadata: dict[str, Any],
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.graph = graph
        self.tensors = tensors
        self.metadata = metadata
        self.storage = Storage()

    @property
    def vocabulary_size(self) -> int:
        return self.graph.vocabulary_size

    @property
    def context_length(self) -> int:
        """Tokens that the model is made for."""
        return self.graph.context_length

    @property
    def draft(self) -> Model | None:
        """What drafts tokens for this model, as a model that reads the same files; None where nothing does."""
        graph = self.graph.drafting
        if graph is None:
            return None
        draft = Model(self.path, self.architecture, graph, self.tensors, self.metadata)
        draft.storage = self.storage
        return draft

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises BadInput when the model has none."""
        if not self.metadata:
            return read_tokenizer_folder(self.path)
        try:
            return read_tokenizer_metadata(self.metadata)
        except BadInput as error:
            raise BadInput(f"{self.path}: {error}") from None

    def load(
        self,
        weight: Weight,
        expert: int | None = None,
        rows: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """A weight's numbers in float32: one expert of a stack, some rows, or all of it. See `decode.evaluate`.

        device: where they are decoded, by default the CPU, here and below.
        """
        from .decode import evaluate

        return evaluate(weight.source, self._seen_from(device), expert, rows)

    def load_directly(
        self, weight: Weight, expert: int | None, dtype: torch.dtype, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """A matrix in `dtype`, None where it comes in float32 alone. See `evaluate_directly`."""
        from .decode import evaluate_directly

        return evaluate_directly(weight.source, self._seen_from(device), expert, dtype)

    def repacked(
        self,
        weight: Weight,
        type_name: str,
        expert: int | None = None,
        rows: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor | None:
        """The same piece in blocks of a ggml type without rounding, None where it must be quantized. See `repack`."""
        from .repack import repack

        return repack(weight.source, type_name, self._seen_from(device), expert, rows)

    def _seen_from(self, device: torch.device | None) -> Reader:
        return OnDevice(self.storage, device) if device else self.storage

    def attending_to_all(self) -> Model:
        """The same model where tokens attend to all before, also where it is made to pick some of them."""
        return Model(self.path, self.architecture, self.graph.attending_to_all(), self.tensors, self.metadata)

    def close(self) -> None:
        self.storage.close()


def open_model(path: str | Path, tensors: tuple[TensorInfo, ...] | None = None, ignored: Collection[str] = ()) -> Model:
    """Open a checkpoint folder or a GGUF file (the first one of a split) that is on this machine.

    Args:
        tensors: what the checkpoint holds, where only its configuration is here; then weights cannot be loaded.
        ignored: keys of the configuration that are taken to change nothing.

    Raises BadInput when it is not there, or when anything about it is not as its architecture demands.
    """
    path = Path(path)
    if is_folder(path):
        config = read_config(path)
        architecture = architecture_of(config)
        tensors = read_tensors(path) if tensors is None else tensors
        graph = architecture.from_checkpoint(config, tensors)
        refuse_unread(config, architecture.name, architecture.harmless, ignored)
        return Model(path, architecture, graph, tensors, {})
    if not is_file(path) or not (path.suffix.lower() == ".gguf" or is_gguf(path)):
        raise BadInput(f"{path}: no such model, expected a checkpoint folder or a .gguf file")
    metadata, tensors = read_gguf(path)
    values = Config(metadata, str(path))
    architecture = architecture_named(values.text("general.architecture"), str(path))
    graph = architecture.from_gguf(values, tensors)
    check_repeated(values, architecture.gguf_metadata(graph))
    refuse_unread_metadata(values, architecture.name, architecture.harmless_metadata, ignored)
    return Model(path, architecture, graph, tensors, metadata)


def open_draft(path: Path, model: Model) -> Model:
    """What drafts for a model from a GGUF file of its own. Raises BadInput as `open_model`."""
    read = model.architecture.draft_from_gguf
    if read is None:
        raise BadInput(f"{path}: drafts of {model.architecture.name} have no file of their own, leave it out")
    metadata, tensors = read_gguf(path)
    values = Config(metadata, str(path))
    graph = replace(model.graph, draft=read(values, tensors, model.graph))
    name = values.text("general.architecture")
    refuse_unread_metadata(values, name, model.architecture.harmless_metadata, ())
    draft = Model(path, model.architecture, graph, tensors, metadata).draft
    assert draft
    return draft
