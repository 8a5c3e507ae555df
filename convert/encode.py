"""Quantizes the pieces of planned tensors and hands them to the writer, whoever asks for them first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..archs.expressions import Padded, first_tensor
from ..archs.weights import Weight, scale_name
from ..errors import BadInput
from ..progress import Progress
from ..quant import dequantize
from ..quant.planning.exact import exact_format
from ..quant.planning.plan import Plan, PlannedTensor
from ..quant.rounding.feedback import quantize_weight
from ..quant.rounding.moments import SecondMoments
from ..quant.rounding.statistics import Importance
from ..runner.placement import fetched
from ..runner.weights import CachedWeights, ModelWeights
from ..sources.imatrix import ImportanceMatrix
from ..sources.model import Piece, first_row_of, pieces, row_count_of
from .findings import EXACT, Findings, some_rows, squares_of
from .roundings import Rounded, Roundings
from .write_behind import WriteBehind

_LARGEST_F16 = torch.finfo(torch.float16).max
_WIDE = ("F32", "BF16")
_SURE = 2048.0  # what blocks of every type hold; the narrowest scales, NVFP4's, end at 448, and its codes at 6


class MeasuredImportance:
    """That of an importance matrix somebody measured before; columns that pad a weight were not in it."""

    def __init__(self, matrix: ImportanceMatrix) -> None:
        self.matrix = matrix

    def of(self, weight: Weight, expert: int | None) -> Tensor | None:
        columns = weight.source.source.shape[-1] if isinstance(weight.source, Padded) else weight.columns
        means = self.matrix.of(weight.name, columns, weight.matrices)
        return functional.pad(means[expert or 0], (0, weight.columns - columns)) if means is not None else None

    def moments(self, weight: Weight, experts: Sequence[int | None]) -> SecondMoments | None:
        return None


class Encoder:
    """Encodes pieces of a file's planned tensors and writes each of them once, in whatever order they are asked for.

    `source` are the weights to encode; what a stream of the source has loaded just now is not read again. `roundings`
    are those of all files. Columns are weighed by `importance`.
    """

    def __init__(
        self,
        source: ModelWeights,
        plan: Plan,
        writer: WriteBehind,
        progress: Progress,
        importance: Importance | None,
        roundings: Roundings,
        threads: int | None,
    ) -> None:
        self.plan = plan
        self.source = source
        self.findings = Findings()
        self._writer = writer
        self._progress = progress
        self._importance = importance
        self._roundings = roundings
        self._threads = threads
        self._unfinished: dict[int | None, list[PlannedTensor]] = defaultdict(list)
        for tensor in plan.tensors:
            self._unfinished[tensor.weight.layer].append(tensor)

    @property
    def elements_there(self) -> int:
        """How many numbers of all tensors are written."""
        return sum(map(self._elements_there, self.plan.tensors))

    @property
    def layers(self) -> list[int | None]:
        """Those of which something may be missing; None for what belongs to no layer."""
        return list(self._unfinished)

    @property
    def weighs(self) -> bool:
        """Whether anything shows which inputs matter."""
        return self._importance is not None

    def is_written(self, layer: int) -> bool:
        """Whether all of a layer is written, be it by an earlier run."""
        tensors = (tensor.weight for tensor in self._unfinished[layer])
        return not any(map(self._missing, tensors))

    def _elements_there(self, tensor: PlannedTensor) -> int:
        """How many numbers of a tensor an earlier run has written."""
        weight = tensor.weight
        rows = sum(row_count_of(weight, piece) for piece in pieces(weight) if self._has(weight, *piece))
        return rows * weight.columns

    def encode(self, tensor: PlannedTensor, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        """One of the `pieces` of a tensor as it is stored, uint8 [rows, row bytes], on the device of the source's
        weights, written if it was not yet.

        Raises BadInput naming a stored tensor that is not finite.
        """
        weight, piece = tensor.weight, (expert, rows)
        written = self._has(weight, expert, rows)
        span = first_row_of(weight, piece), row_count_of(weight, piece)
        stored = self._writer.read(weight.name, *span) if written else None
        if stored is not None:
            return stored.to(self.source.device)
        data = self._stored(tensor, [expert], rows)[0]
        if not written:
            self._write(tensor, expert, rows, fetched(data))
        return data

    def _write(self, tensor: PlannedTensor, expert: int | None, rows: tuple[int, int] | None, data: Tensor) -> None:
        weight = tensor.weight
        self._writer.write(weight.name, first_row_of(weight, (expert, rows)), data)
        self._progress.advance(len(data) * weight.columns, f"{weight.name} {tensor.type.name}")

    def encode_experts(self, tensor: PlannedTensor, experts: Sequence[int]) -> list[Tensor]:
        """Matrices of a stack, each as `encode` gives it, quantized together.

        All of them are, as long as one is missing, so that bytes do not depend on where an earlier run was stopped.
        """
        missing = [expert for expert in experts if not self._has(tensor.weight, expert, None)]
        if len(experts) < 2 or not missing:
            return [self.encode(tensor, expert, None) for expert in experts]
        made = self._stored(tensor, experts, None)
        for expert, data in zip(experts, fetched(made), strict=True):
            if expert in missing:
                self._write(tensor, expert, None, data)
        return [*made.unbind()]

    def finish_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Encode what nobody asked for of some experts."""
        for tensor in self._unfinished[layer]:
            if tensor.weight.experts is not None:
                there = [expert for expert in experts if expert < tensor.weight.matrices]
                if not all(self._has(tensor.weight, expert, None) for expert in there):
                    self.encode_experts(tensor, there)

    def leave(self, layer: int | None) -> Iterator[tuple[PlannedTensor, list[Piece]]]:
        """What is missing of a layer's tensors, which nobody will ask for any more."""
        for tensor in self._unfinished.pop(layer, ()):
            yield tensor, self._missing(tensor.weight)

    def release(self, expert: int | None = None) -> None:
        """All files have what they want of one expert, or of all that was loaded."""
        self._roundings.release(expert)

    def flush(self) -> None:
        """Wait until all that was encoded is written."""
        self._writer.flush()

    def _missing(self, weight: Weight) -> list[Piece]:
        return [piece for piece in pieces(weight) if not self._has(weight, *piece)]

    def _has(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None) -> bool:
        """Whether a piece is written, be it by an earlier run."""
        return self._writer.has(weight.name, first_row_of(weight, (expert, rows)))

    def _stored(self, tensor: PlannedTensor, experts: Sequence[int | None], rows: tuple[int, int] | None) -> Tensor:
        """Some matrices of a stack, or rows of what is none, as they are stored: uint8 [matrices, rows, row bytes]."""
        made = self._roundings.get(tensor, experts, rows, self.weighs, self._rounded)
        self.findings.add(tensor.weight.name, made.squares or EXACT)
        self._writer.problems.extend([line for line in made.problems if line not in self._writer.problems])
        return made.data

    def _rounded(self, tensor: PlannedTensor, experts: Sequence[int | None], rows: tuple[int, int] | None) -> Rounded:
        weight, type_name, problems = tensor.weight, tensor.type.name, list[str]()
        packed = [self.source.model.repacked(weight, type_name, one, rows, self.source.device) for one in experts]
        copied = [data for data in packed if data is not None]
        if len(copied) == len(experts):
            return Rounded(_side_by_side(copied))
        if copied:  # whether a matrix is rounded is its own matter
            return Rounded.joined([self._rounded(tensor, [one], rows) for one in experts])
        if tensor.type.block_size > 1 and tensor.type == exact_format(weight.source):
            problems.append(
                f"rounded to {type_name} what config.json says has its form: zeros, scales or columns have not"
            )
        values = _side_by_side([self.source.load(weight, one, rows).view(-1, weight.columns) for one in experts])
        if type_name == "I32":
            # decoded whole numbers are exact up to 2^24
            return Rounded(values.to(torch.int32).view(torch.uint8), problems=tuple(problems))
        try:
            data = quantize_weight(values, weight, experts, type_name, self._importance, self._threads)
        except BadInput as error:
            if len(experts) > 1:  # one of them says what is wrong with it
                return Rounded.joined([self._rounded(tensor, [one], rows) for one in experts])
            stored = first_tensor(weight.source.of_expert(experts[0]))
            raise BadInput(
                f"{stored.name} in {stored.file}: {error}; the checkpoint is damaged, fetch it again"
            ) from None
        largest = values.abs().amax(dim=(1, 2)).tolist() if type_name not in _WIDE else ()
        for matrix in (number for number, magnitude in enumerate(largest) if magnitude > _SURE):
            problems += _out_of_range(weight, type_name, values[matrix], data[matrix])
        squares = squares_of(some_rows(values), _decode(some_rows(data), type_name, torch.float32))
        return Rounded(data, squares, tuple(problems))


def _out_of_range(weight: Weight, type_name: str, values: Tensor, data: Tensor) -> list[str]:
    """F16 and the scales of blocks, which are float16 or narrower, end where BF16 and F32 go on."""
    row, column = divmod(int(values.abs().argmax()), values.shape[1])
    largest = float(values[row, column].abs())
    kept = float(_decode(data[row : row + 1], type_name, torch.float32)[0, column].abs())
    if type_name == "F16" and largest > _LARGEST_F16:
        return [f"{weight.name} holds {largest:.3g}, and F16 ends at {_LARGEST_F16:.0f}: clamped; BF16 would hold it"]
    if kept < largest / 2:  # which no rounding does
        return [f"{weight.name} holds {largest:.3g}, of which {type_name} keeps {kept:.3g}: BF16 would hold it"]
    return []


def missing_entries(matrix: ImportanceMatrix, plan: Plan) -> tuple[str, ...]:
    """A line where an importance matrix lacks what it is for: what is quantized of experts, or of dense layers."""
    quantized = [
        tensor.weight for tensor in plan.tensors if tensor.type.block_size > 1 and tensor.weight.layer is not None
    ]
    experts = [weight for weight in quantized if weight.experts is not None]
    wanted = [weight.name for weight in experts or quantized]
    missing = [name for name in wanted if name not in matrix.means]
    if not missing:
        return ()
    count = f"{len(missing)} of {len(wanted)} weights of {'experts' if experts else 'layers'}, {missing[0]} for one"
    return (f"{matrix.file} has nothing on {count}: all their inputs count alike",)


class QuantizingWeights(CachedWeights):
    """The weights of the file in the making: asking for one writes it, the answer is what was stored."""

    def __init__(self, encoder: Encoder, label: str) -> None:
        super().__init__(encoder.plan.graph, label, encoder.source.compute_dtype, encoder.source.device)
        self._encoder = encoder
        self._planned = {tensor.weight.name: tensor for tensor in encoder.plan.tensors}
        self._applied = {weight.name for weight in self.graph.weights()}
        self._encoded: dict[tuple[str, int], Tensor] = {}  # of experts that were made ready

    def prepare(self, stacks: Sequence[Weight], experts: Sequence[int]) -> None:
        for stack in stacks:
            made = self._encoder.encode_experts(self._planned[stack.name], experts)
            self._encoded.update(zip(((stack.name, expert) for expert in experts), made, strict=True))

    def read(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        values = self._decoded(weight, expert, rows, torch.float32)
        scale = self._scale_of(weight)
        if scale:
            values *= self.load(scale.weight)[expert or 0]
        return values.flatten() if len(weight.shape) == 1 else values

    def read_directly(self, weight: Weight, expert: int | None) -> Tensor | None:
        return None if self._scale_of(weight) else self._decoded(weight, expert, None, self.compute_dtype)

    def release(self, expert: int | None = None) -> None:
        super().release(expert)
        self._encoder.release(expert)
        kept = self._encoded.items()
        self._encoded = {} if expert is None else {key: data for key, data in kept if key[1] != expert}

    def _decoded(self, weight: Weight, expert: int | None, rows: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
        """What is stored, in `dtype`."""
        tensor = self._planned[weight.name]
        if expert is not None and (ready := self._encoded.get((weight.name, expert))) is not None:
            return _decode(ready, tensor.type.name, dtype)
        asked = [(expert, rows)] if expert is not None or rows else pieces(weight)
        parts = [_decode(self._encoder.encode(tensor, *piece), tensor.type.name, dtype) for piece in asked]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _scale_of(self, weight: Weight) -> PlannedTensor | None:
        """What a weight is multiplied by in the file, unless an operation does that itself."""
        name = scale_name(weight.name)
        return None if name in self._applied else self._planned.get(name)


def _side_by_side(matrices: Sequence[Tensor]) -> Tensor:
    """[matrices, ...]; one alone is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack([*matrices])


def _decode(data: Tensor, type_name: str, dtype: torch.dtype) -> Tensor:
    if type_name == "I32":
        return data.view(torch.int32).to(dtype)
    values: Tensor = dequantize(data, type_name, type=dtype)
    return values
