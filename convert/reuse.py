"""Takes tensors from an earlier file that are as a conversion would make them: of one type, source and weighing.

What was measured to choose the types of an earlier file is taken over by `plans.measured`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..archs.expressions import TensorInfo, stored_tensors
from ..archs.weights import Weight
from ..errors import BadInput
from ..progress import Progress
from ..quant.planning.plan import Plan, PlannedTensor
from ..sources.gguf import read_gguf
from ..sources.hub.shards import ShardStorage
from ..sources.model import Model, first_row_of, pieces, row_count_of
from ..sources.storage import Storage
from .conversion import Reused
from .findings import Findings
from .onepass import PassInputs
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

    def pieces(self, tensor: PlannedTensor) -> Iterator[tuple[int, int, int]]:
        """The first row, the number of rows and the checksum of each piece of a tensor, as it was written."""
        weight = tensor.weight
        for piece, checksum in zip(pieces(weight), self.fingerprints.tensors[weight.name].checksums, strict=True):
            yield first_row_of(weight, piece), row_count_of(weight, piece), checksum

    def read(self, tensor: PlannedTensor, first: int, count: int, storage: Storage) -> Tensor:
        """Some rows of a tensor as they are stored, uint8 [rows, row bytes]."""
        return storage.read(self._tensors[tensor.weight.name], first, first + count)


class Reuse:
    """What a conversion takes from an earlier file: the tensors that are the same, and as they were written."""

    def __init__(self, earlier: EarlierFile, plan: Plan, made_from: MadeFrom, progress: Progress) -> None:
        self._earlier = earlier
        self._progress = progress
        self._all = len(plan.tensors)
        self._weighs_as = made_from.weighs_as(earlier.fingerprints.made_from)
        same = earlier.same(plan, made_from)
        progress.begin(f"Checking {earlier.path.name}", len(same), "tensors")
        with closing(Storage()) as storage:
            self._taken = [tensor for tensor in same if self._is_intact(tensor, storage)]
        if damaged := len(same) - len(self._taken):
            progress.note(f"{earlier.path}: {damaged} tensors are not as they were written: made again")
        changes = made_from.changes(earlier.fingerprints.made_from)
        because = f"; {changes[0]}" if changes else ""
        progress.note(f"{len(self._taken)} of {self._all} tensors taken from {earlier.path}{because}")

    def _is_intact(self, tensor: PlannedTensor, storage: Storage) -> bool:
        """Whether the bytes of a tensor are as they were written."""
        self._progress.advance(1, tensor.weight.name)
        for first, count, checksum in self._earlier.pieces(tensor):
            if zlib.crc32(self._earlier.read(tensor, first, count, storage).numpy().data) != checksum:
                return False
        return True

    def narrowed(self, inputs: PassInputs, plan: Plan, may_end: bool) -> PassInputs:
        """What runs through the model so that all else can be made.

        may_end: calibration is for rounding alone, and ends behind the last layer in which something is left to round.
        """
        if inputs.calibration is None:
            return inputs
        names, layers = {tensor.weight.name for tensor in self._taken}, len(plan.graph.layers)
        inputs = replace(inputs, rounded=names)
        left = [t.weight for t in plan.tensors if t.type.block_size > 1 and t.weight.name not in names]
        of_head = inputs.error_feedback and any(weight.layer is None for weight in left)
        if not may_end or of_head or inputs.min_expert_tokens or not self._weighs_as:
            return inputs
        needed = 1 + max((w.layer for w in left if w.layer is not None and w.layer < layers), default=-1)
        if needed == layers:
            return inputs
        return replace(inputs, calibrated_layers=needed, calibration=inputs.calibration if needed else None)

    def take_over(self, writer: Writer) -> Reused:
        """Copy what an earlier run has not copied. Raises BadInput when the file has changed since it was checked."""
        path = self._earlier.path
        self._progress.begin(f"Copying from {path.name}", len(self._taken), "tensors")
        with closing(Storage()) as storage:  # on Windows, a file that is open could not be replaced by the output
            for tensor in self._taken:
                name = tensor.weight.name
                for first, count, checksum in self._earlier.pieces(tensor):
                    if writer.has(name, first):
                        continue
                    writer.write(name, first, self._earlier.read(tensor, first, count, storage))
                    if writer.checksum(name, first) != checksum:
                        raise BadInput(f"{path} changed while {name} was copied from it: leave it as it is")
                self._progress.advance(1, name)
        return Reused(path, len(self._taken), self._all)

    def add_findings(self, findings: Findings, problems: list[str]) -> None:
        """What was found of tensors that are taken, and in layers through which calibration did not run again."""
        earlier = self._earlier.fingerprints
        names = {tensor.weight.name for tensor in self._taken}
        for name in names:
            if squares := earlier.tensors[name].squares:
                findings.squares[name] = squares
        for line in earlier.problems:
            about = line.partition(" ")[0]  # a tensor, or none in particular
            if line not in problems and (about in names or (names and about not in earlier.tensors)):
                problems.append(line)
        if self._weighs_as:
            findings.expert_tokens = {**earlier.expert_tokens, **findings.expert_tokens}


def fetch_only_needed(model: Model, files: Iterable[tuple[Plan, Writer]], inputs: PassInputs) -> None:
    """Where nothing is compared with the source: what only written pieces of all files are made of is not fetched."""
    if not isinstance(model.storage, ShardStorage):
        return
    calibrated = inputs.calibrated_layers if inputs.calibration is not None else 0
    if calibrated is None:
        return
    running = [w for w in model.graph.weights() if calibrated and (w.layer is None or w.layer < calibrated)]
    whole = [*running, *(model.graph.draft.weights() if model.graph.draft else ())]
    needed = {stored.name for weight in whole for stored in stored_tensors(weight.source)}
    missing = (_missing(tensor.weight, writer) for plan, writer in files for tensor in plan.tensors)
    model.storage.expect_only(needed | {stored.name for tensors in missing for stored in tensors})


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
    return Fingerprints(made_from, tensors, findings.expert_tokens, tuple(writer.problems), measured)


def _record(tensor: PlannedTensor, writer: Writer, findings: Findings) -> TensorRecord:
    weight = tensor.weight
    checksums = (writer.checksum(weight.name, first_row_of(weight, piece)) for piece in pieces(weight))
    return TensorRecord(tensor_digest(tensor), tuple(checksums), findings.squares.get(weight.name))
