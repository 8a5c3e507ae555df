"""ggml's own quantizers as an oracle for tests, called in xllamacpp's shared object."""

from __future__ import annotations

from ctypes import CDLL, c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache

import numpy as np
from llama_library import load_library
from moecast.quant import format_named
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@cache
def _library() -> CDLL:
    library = load_library()
    library.ggml_quantize_chunk.restype = c_size_t
    library.ggml_quantize_chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    library.ggml_validate_row_data.restype = c_bool
    library.ggml_validate_row_data.argtypes = [c_int, c_void_p, c_size_t]
    return library


def quantize(x: Floats, name: str, importance: Floats | None = None) -> Bytes:
    """Rows [rows, columns] as llama-quantize would store them, uint8 [rows, row bytes]."""
    format = format_named(name)
    x = np.ascontiguousarray(x, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    result = np.empty((len(x), format.row_bytes(x.shape[1])), np.uint8)
    written = _library().ggml_quantize_chunk(
        format.id, x.ctypes.data, result.ctypes.data, 0, *x.shape, None if weights is None else weights.ctypes.data
    )
    assert written == result.nbytes
    return result


def dequantize(data: Bytes, name: str) -> Floats:
    """Rows [rows, row bytes] read by ggml, float32 [rows, columns]."""
    format = format_named(name)
    data = np.ascontiguousarray(data)
    result = np.empty((len(data), data.shape[1] // format.block_bytes * format.block_size), np.float32)
    symbol = name[:-1].lower() + "K" if name.endswith("_K") else name.lower()
    function = getattr(_library(), f"dequantize_row_{symbol}")
    function.restype, function.argtypes = None, [c_void_p, c_void_p, c_int64]
    function(data.ctypes.data, result.ctypes.data, result.size)
    return result


def accepts(data: Bytes, name: str) -> bool:
    """Whether llama.cpp would load these bytes: no scale is infinite or not a number."""
    data = np.ascontiguousarray(data)
    return bool(_library().ggml_validate_row_data(format_named(name).id, data.ctypes.data, data.nbytes))
