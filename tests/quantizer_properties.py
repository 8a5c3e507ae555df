"""What holds of every quantizer, whatever its error."""

from __future__ import annotations

import numpy as np
import torch
from moecast.quant import dequantize, format_named, quantize
from synthetic import heavy_tailed, importance


def expect_bytes_of_blocks_alone(name: str, rows: int) -> None:
    """Neither the rows around a block matter, nor how many are given at once, the kind of array, the thread count."""
    x, columns = heavy_tailed(1, rows, 512), importance(1, 512)
    data = quantize(x, name, columns)
    assert data.shape == (rows, format_named(name).row_bytes(512))
    np.testing.assert_array_equal(quantize(x[7:8], name, columns), data[7:8])
    np.testing.assert_array_equal(quantize(x[::-1], name, columns), data[::-1])
    tensor = quantize(torch.from_numpy(x), name, torch.from_numpy(columns), threads=1)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), data)


def expect_scaling_to_scale_the_result(name: str) -> None:
    """By a power of two: the search works in units of the block, so that only float16's range minds."""
    x = heavy_tailed(2, 4, 512)
    np.testing.assert_array_equal(
        dequantize(quantize(x * 1024, name), name), 16 * dequantize(quantize(x * 64, name), name)
    )


def expect_no_rows_of_no_rows(name: str) -> None:
    data = quantize(np.zeros((0, 256), np.float32), name)
    assert data.shape == (0, format_named(name).row_bytes(256))
    assert dequantize(data, name).shape == (0, 256)


def expect_padding_to_stay_zero(name: str) -> None:
    x = heavy_tailed(3, 8, 512)
    x[:, 416:] = 0
    x[5] = 0
    y = dequantize(quantize(x, name, importance(3, 512)), name)
    assert not y[:, 416:].any()
    assert not y[5].any()


def expect_nothing_of_no_importance(name: str) -> None:
    """An expert that the calibration text never reached; ggml would write zeros."""
    x = heavy_tailed(4, 4, 512)
    for columns in (np.zeros(512, np.float32), np.full(512, 7e-9, np.float32)):
        np.testing.assert_array_equal(quantize(x, name, columns), quantize(x, name))
