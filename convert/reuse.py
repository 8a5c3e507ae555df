"""Takes tensors from an earlier file that are as a conversion would make them: of one type, source and weighing.

What was measured to choose the types of an earlier file is taken over by `plans.measured`.
"""

from __future__ import annotations

import zlib
from contextlib import closing
from pathlib import Path

from ..archs.expressions import TensorInfo, stored_tensors
from ..archs.weights import Weight
from ..progress import Progress
from ..quant.planning.plan import Plan, PlannedTensor
from ..sources.gguf import read_gguf
from ..sources.hub.shards import ShardStorage
from ..sources.model import Model, first_row_of, pieces, row_count_of
from ..sources.storage import Storage
from .conversion import Reused
from .findings import Findings
from .resume.sidecar import Fingerprints, MadeFrom, Measured, TensorRecord, read_fingerprints, tensor_digest
from .writer import Writer


class EarlierFile:
    """A finished GGUF file, and what its tensors were made from.

    Raises BadInput for a file that is damaged, and where it is not known what it was made from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprints = read_fingerprints(path)
        self._tensors = {tensor.name: tensor for tensor in read_gguf(path)[1]}

    def same(self, plan: Plan, made_from: MadeFrom) -> list[PlannedTensor]:
        """The tensors of a plan that this file has as they would be made."""
        return [tensor for tensor in plan.tensors if self._has(tensor, made_from)]

    def _has(self, tensor: PlannedTensor, made_from: MadeFrom) -> bool:
        weight = tensor.weight
        record, stored = self.fingerprints.tensors.get(weight.name), self._tensors.get(weight.name)
        if record is None or stored is None or (stored.dtype, stored.shape) != (tensor.type.name, weight.shape):
            return False
        return record.digest == tensor_digest(tensor) and made_from.gives_same(tensor, self.fingerprints.made_from)

    def copy_to(self, writer: Writer, tensor: PlannedTensor, storage: Storage) -> int:
        """Write the pieces of a tensor that are missing; how many of them are not as they were, and left out."""
        stored, weight, damaged = self._tensors[tensor.weight.name], tensor.weight, 0
        checksums = self.fingerprints.tensors[weight.name].checksums
        for piece, checksum in zip(pieces(weight), checksums, strict=True):
            first = first_row_of(weight, piece)
            if writer.has(weight.name, first):
                continue
            rows = storage.read(stored, first, first + row_count_of(weight, piece))
            if zlib.crc32(rows.numpy().data) == checksum:
                writer.write(weight.name, first, rows)
            else:
                damaged += 1
        return damaged


class Reuse:
    """What a conversion takes from an earlier file."""

    def __init__(self, earlier: EarlierFile, plan: Plan, made_from: MadeFrom) -> None:
        self._earlier = earlier
        self._same = earlier.same(plan, made_from)
        self._all = len(plan.tensors)
        self._changes = made_from.changes(earlier.fingerprints.made_from)

    def take_over(self, writer: Writer, progress: Progress) -> Reused:
        """Copy the tensors that are the same; what is not as it was written is left to be made again."""
        path, damaged, whole = self._earlier.path, 0, 0
        progress.begin("Taking over", len(self._same), "tensors")
        with closing(Storage()) as storage:  # on Windows, a file that is open could not be replaced by the output
            for tensor in self._same:
                missing = self._earlier.copy_to(writer, tensor, storage)
                damaged, whole = damaged + missing, whole + (not missing)
                progress.advance(1, tensor.weight.name)
        because = f"; {self._changes[0]}" if self._changes else ""
        progress.note(f"{whole} of {self._all} tensors taken from {path}{because}")
        if damaged:
            progress.note(f"{path}: {damaged} pieces of tensors are not as they were: made again")
        return Reused(path, whole, self._all)

    def add_findings(self, findings: Findings, problems: list[str]) -> None:
        """Rounding errors and problems of what is the same are those that were found when it was made."""
        earlier = self._earlier.fingerprints
        names = {tensor.weight.name for tensor in self._same}
        for name in names:
            if squares := earlier.tensors[name].squares:
                findings.squares[name] = squares
        for line in earlier.problems:
            about = line.partition(" ")[0]  # a tensor, or none in particular
            if line not in problems and (about in names or (names and about not in earlier.tensors)):
                problems.append(line)


def fetch_only_missing(model: Model, plan: Plan, writer: Writer) -> None:
    """Where nothing but writing reads the source: what only written pieces are made of is not fetched."""
    if not isinstance(model.storage, ShardStorage):
        return
    missing = {stored.name for tensor in plan.tensors for stored in _missing(tensor.weight, writer)}
    draft = model.graph.draft.weights() if model.graph.draft else ()
    model.storage.expect_only(missing | {stored.name for weight in draft for stored in stored_tensors(weight.source)})


def _missing(weight: Weight, writer: Writer) -> set[TensorInfo]:
    """The stored tensors of which the pieces are made that are not written."""
    left = (piece for piece in pieces(weight) if not writer.has(weight.name, first_row_of(weight, piece)))
    matrices = {matrix for matrix, _ in left}
    return {stored for matrix in matrices for stored in stored_tensors(weight.source.of_expert(matrix))}


def fingerprints_of(
    plan: Plan, made_from: MadeFrom, writer: Writer, findings: Findings, measured: Measured | None
) -> Fingerprints:
    """What a file that is written was made from."""
    tensors = {tensor.weight.name: _record(tensor, writer, findings) for tensor in plan.tensors}
    return Fingerprints(made_from, tensors, tuple(writer.problems), measured)


def _record(tensor: PlannedTensor, writer: Writer, findings: Findings) -> TensorRecord:
    weight = tensor.weight
    checksums = (writer.checksum(weight.name, first_row_of(weight, piece)) for piece in pieces(weight))
    return TensorRecord(tensor_digest(tensor), tuple(checksums), findings.squares.get(weight.name))
