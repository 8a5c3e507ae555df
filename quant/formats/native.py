"""The C++ kernels: the searches of the torch quantizers, one block to a SIMD lane.

They are built when moecast is installed with a C++ compiler at hand (see setup.py); without them torch does the same
work to the same bits, several times more slowly. MOECAST_KERNELS in the environment picks what serves: one of
`paths()`, the fastest by default.
"""

from __future__ import annotations

import os
import sys
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ...errors import BadInput
from . import lattice
from .kernel_sources import digest
from .table import Format, format_named

TORCH: Final = "torch"
_TYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LIBRARY: Final = Path(__file__).parents[1] / f"_kernels.{'dll' if sys.platform == 'win32' else 'so'}"
_SOURCES: Final = _LIBRARY.with_name("kernels")


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
    if found := digest(_SOURCES):
        return found
    library = _library()
    return str(library.kernels_sources().decode()) if library else "none"


def path() -> str:
    """The one of `paths()` in use; BadInput if MOECAST_KERNELS names another."""
    choice = os.environ.get("MOECAST_KERNELS") or paths()[0]
    if choice not in paths():
        raise BadInput(f"MOECAST_KERNELS is {choice!r}; this machine has {', '.join(paths())}")
    return choice


def can_quantize(format: Format, rows: Tensor) -> bool:
    """Whether kernels write this format from such rows."""
    return rows.device.type == "cpu" and _support(path(), format) > 1


def quantize(rows: Tensor, format: Format, weights: Tensor | None, result: Tensor, threads: int) -> int | None:
    """Quantize rows [rows, columns] with weights [columns] to uint8 `result` [rows, row bytes].

    Returns the first row that holds a value that is not finite, if any; then the result is incomplete.
    """
    rows = (rows if rows.dtype in _TYPES else rows.to(torch.float32)).contiguous()
    bad: int = _loaded().kernels_quantize(
        path().encode(),
        format.id,
        rows.data_ptr(),
        _TYPES[rows.dtype],
        None if weights is None else weights.data_ptr(),
        result.data_ptr(),
        *rows.shape,
        threads,
    )
    return None if bad < 0 else bad


def can_dequantize(format: Format, data: Tensor) -> bool:
    """Whether kernels read this format from such bytes."""
    return data.device.type == "cpu" and _support(path(), format) > 0


def dequantize(data: Tensor, format: Format, result: Tensor, threads: int) -> None:
    """Read uint8 rows [rows, row bytes] into float32 or bfloat16 `result` [rows, columns]."""
    data = data.contiguous()
    _loaded().kernels_dequantize(
        path().encode(),
        format.id,
        data.data_ptr(),
        result.data_ptr(),
        _TYPES[result.dtype],
        data.numel() // format.block_bytes,
        threads,
    )


class Choosing(Structure):
    """The arguments of `choose` as the kernels want them, see quant/kernels/kernels.h."""

    _fields_ = (
        ("target", c_void_p),
        ("scales", c_void_p),
        ("minima", c_void_p),
        ("sub_blocks", c_int),
        ("carried", c_void_p),
        ("metric", c_void_p),
        ("first_weights", c_void_p),
        ("weights", c_void_p),
        ("levels", c_void_p),
        ("stored", c_void_p),
        ("lanes", c_int64),
        ("sweeps", c_int),
    )


def can_choose(format: Format, target: Tensor) -> bool:
    """Whether kernels choose levels for this format's scales."""
    return target.device.type == "cpu" and _support(path(), format) > 2


def choose(
    format: Format,
    target: Tensor,
    scales: tuple[Tensor, Tensor],
    carried: Tensor,
    metric: Tensor,
    weights: tuple[Tensor, Tensor],
    sweeps: int,
    threads: int,
) -> tuple[Tensor, Tensor]:
    """The levels of blocks whose scales are chosen and what they stand for, as `quant.feedback` explains it."""
    inputs = [part.contiguous() for part in (target, *scales, carried, metric, *weights)]
    levels, stored = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    places = [part.data_ptr() for part in inputs]
    task = Choosing(
        *places[:3], len(scales[0]), *places[3:], levels.data_ptr(), stored.data_ptr(), target.shape[1], sweeps
    )
    _loaded().kernels_choose(path().encode(), format.id, byref(task), threads)
    return levels, stored


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
    return library if digest(_SOURCES) in (None, library.kernels_sources().decode()) else None


def _declared(library: CDLL) -> CDLL:
    """The library with the types of its functions."""
    library.kernels_sources.restype, library.kernels_sources.argtypes = c_char_p, []
    library.kernels_instruction_set.restype, library.kernels_instruction_set.argtypes = c_char_p, [c_int]
    library.kernels_support.restype, library.kernels_support.argtypes = c_int, [c_char_p, c_int]
    library.kernels_set_lattice.restype = None
    library.kernels_set_lattice.argtypes = [c_int, c_void_p, c_int, c_int, c_int]
    library.kernels_quantize.restype = c_int64
    library.kernels_quantize.argtypes = [
        c_char_p, c_int, c_void_p, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int
    ]  # fmt: skip
    library.kernels_choose.restype = None
    library.kernels_choose.argtypes = [c_char_p, c_int, POINTER(Choosing), c_int]
    library.kernels_dequantize.restype = None
    library.kernels_dequantize.argtypes = [c_char_p, c_int, c_void_p, c_void_p, c_int, c_int64, c_int]
    return library
