"""The C++ kernels on NVIDIA's GPUs: what NVRTC compiles, loaded by the driver and launched on torch's stream."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from ctypes import CDLL, Structure, addressof, byref, c_char_p, c_int, c_int64, c_uint, c_void_p
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from . import lattice, native, nvrtc
from .lanes import Coupling
from .table import Format, Work, format_named

_THREADS: Final = 64  # in a block of the grid; 64 to 128 were the fastest


class Rows(Structure):
    """The rows of an expert as the kernels want them, see quant/kernels/kernels.h."""

    _fields_ = (
        ("values", c_void_p),
        ("type", c_int),
        ("weights", c_void_p),
        ("blocks", c_int64),
        ("bytes", c_void_p),
    )


def can(work: Work, format: Format, device: torch.device) -> bool:
    """Whether there is a kernel for it, which is compiled now if it is not yet."""
    return not native.only_torch() and format.block_size > 1 and _function(work, format, device) is not None


def prepare(work: Work, formats: Iterable[Format], device: torch.device) -> None:
    """Compile kernels in the background."""
    try:
        programs = [_program(work, format, device) for format in formats if format.block_size > 1]
    except RuntimeError:  # which `can` will warn of
        return
    if not native.only_torch():
        nvrtc.prepare(programs)


def quantize(rows: Tensor, format: Format, weights: Tensor | None, result: Tensor, threads: int) -> int | None:
    """As `devices.Kernels` says it."""
    rows = (rows if rows.dtype in native.TYPES else rows.to(torch.float32)).contiguous()
    experts = 1 if weights is None else len(weights)
    row_blocks, blocks = rows.shape[1] // format.block_size, rows.numel() // format.block_size
    weights = None if weights is None else weights.contiguous()
    bad = torch.full((1,), blocks, dtype=torch.int64, device=rows.device)
    task = Rows(rows.data_ptr(), native.TYPES[rows.dtype], _place(weights), row_blocks, result.data_ptr())
    each = blocks // experts
    _launch("encode", format, rows.device, (each, experts), task, c_int64(each), c_void_p(bad.data_ptr()))
    first = int(bad)
    return first // row_blocks if first < blocks else None


def dequantize(data: Tensor, format: Format, result: Tensor, threads: int) -> None:
    """As `devices.Kernels` says it."""
    data = data.contiguous()
    blocks = data.numel() // format.block_bytes
    places = c_void_p(data.data_ptr()), c_void_p(result.data_ptr())
    _launch("decode", format, data.device, (blocks, 1), *places, c_int(native.TYPES[result.dtype]), c_int64(blocks))


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
    blocks = native.blocks(format, values, added, coupling, errors)
    matrices, lanes = values.shape[:2]
    bad = torch.full((), -1, dtype=torch.int64, device=values.device)  # the largest of numbers without sign
    grid = lanes, matrices
    _launch("choose", format, values.device, grid, blocks.task(sweeps), c_void_p(bad.data_ptr()))
    return blocks.data, bad


def _launch(work: Work, format: Format, device: torch.device, grid: tuple[int, int], *arguments: Any) -> None:
    """Do work on so many lanes of so many experts, after what torch has been asked to do before."""
    if all(grid):
        with torch.cuda.device(device):
            _run(_function(work, format, device), grid, *arguments)


def _run(function: c_void_p | None, grid: tuple[int, int], *arguments: Any) -> None:
    lanes, experts = grid
    places = (c_void_p * len(arguments))(*map(addressof, arguments))
    stream = c_void_p(torch.cuda.current_stream().cuda_stream)
    blocks = -(-lanes // _THREADS)
    _check(_driver().cuLaunchKernel(function, blocks, experts, 1, _THREADS, 1, 1, 0, stream, places, None))


@cache
def _function(work: Work, format: Format, device: torch.device) -> c_void_p | None:
    """A kernel that can be launched; None, with a warning why, where there is none."""
    try:
        return _loaded(work, format, device)
    except (OSError, RuntimeError) as error:
        warnings.warn(f"torch does what CUDA kernels would do several times faster: {error}", stacklevel=2)
        return None


def _loaded(work: Work, format: Format, device: torch.device) -> c_void_p:
    module, driver = c_void_p(), _driver()
    code = nvrtc.code_of(_program(work, format, device))
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # by which torch makes the GPU's context, if it has not yet
        _check(driver.cuModuleLoadData(byref(module), code))
        if format.name in lattice.CODECS:
            for name in lattice.LATTICES:
                number, points = c_int(format_named(name).id), c_void_p(_lattice(name, device).data_ptr())
                _run(_entry(module, "set_lattice"), (1, 1), number, points)
            torch.cuda.synchronize()
        return _entry(module, work)


def _entry(module: c_void_p, name: str) -> c_void_p:
    function = c_void_p()
    _check(_driver().cuModuleGetFunction(byref(function), module, name.encode()))
    return function


def _program(work: Work, format: Format, device: torch.device) -> nvrtc.Program:
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    return nvrtc.Program(format.name, work, nvrtc.architecture_for(*torch.cuda.get_device_capability(device)))


@cache
def _lattice(name: str, device: torch.device) -> Tensor:
    """The points of a lattice as kernels want them, for good."""
    points = native.lattice_points(name)
    if points is None:
        raise RuntimeError("lattices are laid out by the C++ kernels; install moecast again with a compiler at hand")
    return points.to(device)


@cache
def _driver() -> CDLL:
    """NVIDIA's driver. OSError where there is none."""
    library = CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    library.cuModuleLoadData.argtypes = [c_void_p, c_char_p]
    library.cuModuleGetFunction.argtypes = [c_void_p, c_void_p, c_char_p]
    library.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    return library


def _check(result: int) -> None:
    if result:
        text = c_char_p()
        _driver().cuGetErrorString(result, byref(text))
        raise RuntimeError(f"CUDA fails with {(text.value or b'an unknown error').decode()}")


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
