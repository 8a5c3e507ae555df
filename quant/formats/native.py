"""The C++ kernels: the searches of the torch quantizers, one block to a SIMD lane.

They are built when moecast is installed with a C++ compiler at hand (see setup.py); without them torch does the same
work to the same bits, several times more slowly. MOECAST_KERNELS in the environment picks what serves: one of
`paths()`, the fastest by default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_void_p, string_at
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ...errors import BadInput
from . import lattice
from .kernel_sources import SOURCES, digest
from .lanes import Coupling
from .table import Format, Work, format_named

TORCH: Final = "torch"
TYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as kernels number them
_WORKS: Final = ("decode", "encode", "choose")  # a kernel that does one does those before it too
_LIBRARY: Final = Path(__file__).parents[1] / f"_kernels.{'dll' if sys.platform == 'win32' else 'so'}"


def available() -> bool:
    """Whether there are C++ kernels that this processor can run."""
    return len(paths()) > 1


@cache
def paths() -> tuple[str, ...]:
    """What can quantize on this machine, fastest first: instruction sets that there are kernels for, then "torch"."""
    library = _library()
    names: list[str] = []
    while library and (name := library.kernels_instruction_set(len(names))):
        names.append(name.decode())
    return (*names, TORCH)


def kernel_status() -> str:
    """One line on the kernels in use, for people."""
    if path() != TORCH:
        return f"C++ kernels for {path()}"
    if available():
        return "torch, because MOECAST_KERNELS says so"
    reason = "this processor runs none of them" if _library() else "install moecast again with a C++ compiler at hand"
    return f"torch; no C++ kernels, which are several times faster: {reason}"


def sources() -> str:
    """A digest of the kernels' code; where torch serves in their place too, because it makes the same bytes."""
    if found := digest(SOURCES):
        return found
    library = _library()
    return str(library.kernels_sources().decode()) if library else "none"


def path() -> str:
    """The one of `paths()` in use; BadInput if MOECAST_KERNELS names another."""
    choice = os.environ.get("MOECAST_KERNELS") or paths()[0]
    if choice not in paths():
        raise BadInput(f"MOECAST_KERNELS is {choice!r}; this machine has {', '.join(paths())}")
    return choice


def only_torch() -> bool:
    """Whether MOECAST_KERNELS says that no kernels shall work, on no device."""
    return os.environ.get("MOECAST_KERNELS") == TORCH


def can(work: Work, format: Format, device: torch.device) -> bool:
    """Whether there are kernels for it."""
    return _support(path(), format) > _WORKS.index(work)


def prepare(work: Work, formats: Iterable[Format], device: torch.device) -> None:
    """These kernels are ready."""


def quantize(rows: Tensor, format: Format, weights: Tensor | None, result: Tensor, threads: int) -> int | None:
    """As `devices.Kernels` says it."""
    rows = (rows if rows.dtype in TYPES else rows.to(torch.float32)).contiguous()
    share = len(rows) // (1 if weights is None else len(weights))
    for expert, start in enumerate(range(0, len(rows), share or 1)):
        bad: int = _loaded().kernels_quantize(
            path().encode(),
            format.id,
            rows[start].data_ptr(),
            TYPES[rows.dtype],
            None if weights is None else weights[expert].data_ptr(),
            result[start].data_ptr(),
            share,
            rows.shape[1],
            threads,
        )
        if bad >= 0:
            return start + bad
    return None


def dequantize(data: Tensor, format: Format, result: Tensor, threads: int) -> None:
    """As `devices.Kernels` says it."""
    data = data.contiguous()
    _loaded().kernels_dequantize(
        path().encode(),
        format.id,
        data.data_ptr(),
        result.data_ptr(),
        TYPES[result.dtype],
        data.numel() // format.block_bytes,
        threads,
    )


class Choosing(Structure):
    """The arguments of `choose` as the kernels want them, see quant/kernels/kernels.h."""

    _fields_ = (
        ("values", c_void_p),
        ("added", c_void_p),
        ("type", c_int),
        ("search_weights", c_void_p),
        ("carried", c_void_p),
        ("slopes", c_void_p),
        ("metric", c_void_p),
        ("first_weights", c_void_p),
        ("weights", c_void_p),
        ("bytes", c_void_p),
        ("errors", c_void_p),
        ("lanes", c_int64),
        ("value_stride", c_int64),
        ("error_stride", c_int64),
        ("sweeps", c_int),
    )


class Blocks(NamedTuple):
    """What `choose` works on, in memory as kernels want it."""

    values: Tensor
    added: Tensor | None
    coupling: Coupling
    errors: Tensor
    data: Tensor

    def of(self, matrix: int) -> Blocks:
        """Those of one matrix, [lanes, ...]."""
        added = None if self.added is None else self.added[matrix]
        return Blocks(self.values[matrix], added, self.coupling.of(matrix), self.errors[matrix], self.data[matrix])

    def task(self, sweeps: int) -> Choosing:
        """For kernels, which hold on to nothing."""
        coupling = (_place(part) for part in self.coupling)
        lanes, strides = self.values.shape[-2], (self.values.stride(-2), self.errors.stride(-2))
        types = _place(self.added), TYPES[self.errors.dtype]
        results = self.data.data_ptr(), self.errors.data_ptr()
        return Choosing(self.values.data_ptr(), *types, *coupling, *results, lanes, *strides, sweeps)


def blocks(format: Format, values: Tensor, added: Tensor | None, coupling: Coupling, errors: Tensor) -> Blocks:
    """Laid out for kernels: contiguous, but that values and errors may be columns of something wider."""
    assert _follow_each_other(errors)
    values = values if _follow_each_other(values) else values.contiguous()
    parts = (None if part is None else part.contiguous() for part in coupling)
    data = torch.empty(*values.shape[:-1], format.block_bytes, dtype=torch.uint8, device=values.device)
    added = None if added is None else added.contiguous()
    return Blocks(values, added, Coupling(*parts), errors, data)  # type: ignore[arg-type]


def _follow_each_other(lanes: Tensor) -> bool:
    """Whether values of a lane lie side by side, and lanes [matrices, lanes, ...] at one distance."""
    return lanes.stride(-1) == 1 and (len(lanes) == 1 or lanes.stride(0) == lanes.shape[1] * lanes.stride(1))


def choose(
    format: Format,
    values: Tensor,
    added: Tensor | None,
    coupling: Coupling,
    errors: Tensor,
    sweeps: int,
    threads: int,
) -> tuple[Tensor, Tensor]:
    """As `devices.Kernels` says it."""
    task, bad = blocks(format, values, added, coupling, errors), -1
    for matrix in range(len(values)):
        here = task.of(matrix).task(sweeps)
        found: int = _loaded().kernels_choose(path().encode(), format.id, byref(here), threads)
        if found >= 0 > bad:
            bad = matrix * values.shape[1] + found
    return task.data, torch.tensor(bad, device=values.device)


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def lattice_points(name: str) -> Tensor | None:
    """The points of a format's lattice, laid out as kernels want them, uint8; None where nothing lays them out."""
    _hand_over_lattices()
    if (library := _library()) is None:
        return None
    size = c_int64()
    place = library.kernels_lattice(format_named(name).id, byref(size))
    return torch.frombuffer(bytearray(string_at(place, size.value)), dtype=torch.uint8)


@cache
def _support(path: str, format: Format) -> int:
    if format.name in lattice.CODECS:
        _hand_over_lattices()
    return 0 if path == TORCH else int(_loaded().kernels_support(path.encode(), format.id))


@cache
def _hand_over_lattices() -> None:
    """Lattices are data of the gguf package, which the kernels cannot read themselves."""
    library = _library()
    if library is None:
        return
    for name in lattice.LATTICES:
        digits, levels = lattice.digits(name)
        library.kernels_set_lattice(format_named(name).id, digits.data_ptr(), *digits.shape, levels)


def _loaded() -> CDLL:
    library = _library()
    assert library is not None
    return library


@cache
def _library() -> CDLL | None:
    try:
        library = _declared(CDLL(str(_LIBRARY)))
    except (OSError, AttributeError):  # never built, for another system, or from older sources
        return None
    return library if digest(SOURCES) in (None, library.kernels_sources().decode()) else None


def _declared(library: CDLL) -> CDLL:
    """The library with the types of its functions."""
    library.kernels_sources.restype, library.kernels_sources.argtypes = c_char_p, []
    library.kernels_instruction_set.restype, library.kernels_instruction_set.argtypes = c_char_p, [c_int]
    library.kernels_support.restype, library.kernels_support.argtypes = c_int, [c_char_p, c_int]
    library.kernels_set_lattice.restype = None
    library.kernels_set_lattice.argtypes = [c_int, c_void_p, c_int, c_int, c_int]
    library.kernels_lattice.restype, library.kernels_lattice.argtypes = c_void_p, [c_int, POINTER(c_int64)]
    library.kernels_quantize.restype = c_int64
    library.kernels_quantize.argtypes = [
        c_char_p, c_int, c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int
    ]  # fmt: skip
    library.kernels_choose.restype = c_int64
    library.kernels_choose.argtypes = [c_char_p, c_int, POINTER(Choosing), c_int]
    library.kernels_dequantize.restype = None
    library.kernels_dequantize.argtypes = [c_char_p, c_int, c_void_p, c_void_p, c_int, c_int64, c_int]
    return library
