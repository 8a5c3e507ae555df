"""The encoders of all files of a pass side by side: what nobody asked for is read once and encoded for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..progress import Progress
from ..quant.formats import native
from ..quant.planning.plan import PlannedTensor
from ..sources.model import Piece
from ..sources.read_ahead import stored_rows
from .encode import Encoder

_Wanted = list[tuple[Encoder, PlannedTensor, Piece]]


class Encoders:
    """Those of all files, which have one source. Where the order of pieces is known, at most `buffer` bytes are read
    ahead."""

    def __init__(self, encoders: Sequence[Encoder], progress: Progress, buffer: int) -> None:
        self._source = encoders[0].source
        self._encoders = encoders
        self._buffer = buffer
        if not native.available():
            progress.note(f"Quantizing with {native.kernel_status()}")
        total = sum(tensor.weight.elements for encoder in encoders for tensor in encoder.plan.tensors)
        progress.begin("Converting", total, "weights", sum(encoder.elements_there for encoder in encoders))

    def are_written(self, layer: int) -> bool:
        """Whether all of a layer is written to every file, be it by an earlier run."""
        return all(encoder.is_written(layer) for encoder in self._encoders)

    def finish_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Encode what nobody asked for of some experts."""
        for encoder in self._encoders:
            encoder.finish_experts(layer, experts)

    def finish_layer(self, layer: int) -> None:
        """Encode what nobody asked for of a layer, and wait until all of it is written."""
        self._finish(layer)
        self._flush()

    def finish_all(self) -> None:
        """Encode what is left, and wait until all is written."""
        for layer in dict.fromkeys(layer for encoder in self._encoders for layer in encoder.layers):
            self._finish(layer)
        self._flush()

    def _flush(self) -> None:
        for encoder in self._encoders:
            encoder.flush()

    def _finish(self, layer: int | None) -> None:
        """Encode what nobody asked for of a layer's tensors; None means those of no layer."""
        missing: dict[str, dict[tuple[int | None, int], _Wanted]] = defaultdict(lambda: defaultdict(list))
        for encoder in self._encoders:
            for tensor, pieces in encoder.leave(layer):
                for expert, rows in pieces:
                    start = (expert, rows[0] if rows else 0)  # the last rows are more where a file pads them
                    missing[tensor.weight.name][start].append((encoder, tensor, (expert, rows)))
        for wanted in missing.values():
            self._encode([*wanted.values()])

    def _encode(self, pieces: Sequence[_Wanted]) -> None:
        """Encode pieces of one weight, each for all files that lack it."""
        steps = (
            [rows for _, tensor, piece in wanted for rows in stored_rows(tensor.weight.source, *piece)]
            for wanted in pieces
        )
        with self._source.model.storage.reading_ahead(steps, self._buffer):
            for wanted in pieces:
                for encoder, tensor, piece in wanted:
                    encoder.encode(tensor, *piece)
                self._source.release()
                for encoder, _, _ in wanted:
                    encoder.release()
