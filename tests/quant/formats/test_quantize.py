"""Quantizers against ggml's: never a larger error, never bytes that ggml would refuse."""

from collections.abc import Callable

import ggml
import numpy as np
import pytest
from moecast.errors import BadInput
from moecast.quant import dequantize, quantize
from quantizer_properties import (
    expect_bytes_of_blocks_alone,
    expect_no_rows_of_no_rows,
    expect_nothing_of_no_importance,
    expect_padding_to_stay_zero,
    expect_scaling_to_scale_the_result,
)
from synthetic import Floats, edges, heavy_tailed, importance, normal, relative_error

QUANTIZED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"
)  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
SEEDS = range(100, 104)
pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("sample", [heavy_tailed, normal])
@pytest.mark.parametrize("name", QUANTIZED)
def test_error_is_at_most_ggmls(name: str, sample: Callable[[int, int, int], Floats], weighted: bool) -> None:
    for seed in SEEDS:
        x = sample(seed, 16, 1024)
        columns = importance(seed, 1024) if weighted else None
        data = quantize(x, name, columns)
        ours = relative_error(x, dequantize(data, name), columns)
        theirs = relative_error(x, ggml.dequantize(ggml.quantize(x, name, columns), name), columns)
        assert ours <= theirs, f"seed {seed}: {ours / theirs:.4f} of ggml's error"
        assert ggml.accepts(data, name)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_equal_ggmls(name: str) -> None:
    x = heavy_tailed(0, 3, 500)
    np.testing.assert_array_equal(quantize(x, name), ggml.quantize(x, name))


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_depend_on_the_block_alone(name: str) -> None:
    expect_bytes_of_blocks_alone(name, 1025)


@pytest.mark.parametrize("name", QUANTIZED)
def test_scaling_by_a_power_of_two_scales_the_result(name: str) -> None:
    expect_scaling_to_scale_the_result(name)


@pytest.mark.parametrize("name", (*QUANTIZED, *FLOATS))
def test_no_rows(name: str) -> None:
    expect_no_rows_of_no_rows(name)


@pytest.mark.parametrize("name", (*QUANTIZED, *FLOATS))
def test_edges(name: str) -> None:
    x = np.stack(list(edges().values()))
    one_column = 1e9 * (np.arange(512) == 3)
    for columns in (None, np.zeros(512), one_column):
        data = quantize(x, name, columns)
        y = dequantize(data, name)
        assert ggml.accepts(data, name)
        assert np.isfinite(y).all()
        assert (np.sign(x) * np.sign(y) >= 0)[7:9].all()  # what is out of reach saturates on its own side
    results = dict(zip(edges(), dequantize(quantize(x, name), name), strict=True))
    assert not results["zero"].any()
    assert np.abs(results["denormal"]).max() <= 2.0**-24  # float16's smallest number
    for row in ("constant", "negative constant", "outlier", "negative outlier"):
        # The non-linear types and MXFP4 have no level for an arbitrary lone value.
        coarse = {"IQ4_NL": 0.05, "IQ4_XS": 0.05, "MXFP4": 0.21}
        assert relative_error(edges()[row][None], results[row][None]) <= coarse.get(name, 3e-3), row


@pytest.mark.parametrize("name", QUANTIZED)
def test_padding_stays_exactly_zero(name: str) -> None:
    expect_padding_to_stay_zero(name)


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_of_nothing_is_no_importance(name: str) -> None:
    expect_nothing_of_no_importance(name)


def test_every_expert_has_its_importance() -> None:
    x, columns = heavy_tailed(8, 12, 512), np.stack([importance(seed, 512) for seed in range(3)])
    columns[1] = 0
    each = [quantize(x[4 * expert : 4 * expert + 4], "Q4_K", columns[expert]) for expert in range(3)]
    np.testing.assert_array_equal(quantize(x, "Q4_K", columns), np.concatenate(each))
    x[9, 7] = np.nan
    with pytest.raises(BadInput, match="row 9 holds a value that is not finite"):
        quantize(x, "Q4_K", columns)


@pytest.mark.parametrize("name", QUANTIZED)
def test_unimportant_columns_still_count(name: str) -> None:
    """Half of the columns never saw a token: their error is far from total."""
    x, columns = normal(5, 8, 512), importance(5, 512)
    columns[::2] = 0
    y = dequantize(quantize(x, name, columns), name)
    assert relative_error(x[:, ::2], y[:, ::2]) < 3 * relative_error(x, dequantize(quantize(x, name), name))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "MXFP4", "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    x = heavy_tailed(6, 700, 512)
    x[[613, 655], 400] = value
    with pytest.raises(BadInput, match="row 613 holds a value that is not finite"):
        quantize(x, name)


def test_bad_input() -> None:
    x = np.zeros((2, 512), np.float32)
    with pytest.raises(BadInput, match=r"cannot quantize to I32; choose one of F32, F16, BF16, .*Q4_K"):
        quantize(x, "I32")
    with pytest.raises(BadInput, match="unknown tensor type 'Q4'"):
        quantize(x, "Q4")
    with pytest.raises(BadInput, match="blocks of 256 values, which 500 columns"):
        quantize(x[:, :500], "Q4_K")
    for shape in ((256,), (3, 512), (0, 512), (1, 2, 512)):
        with pytest.raises(
            BadInput, match=r"importance has shape \(.*\), expected one value for each of 512 columns, on"
        ):
            quantize(x, "Q4_K", np.ones(shape, np.float32))
    for value in (-1, np.nan, np.inf):
        with pytest.raises(BadInput, match="importance has a value that is negative or not finite"):
            quantize(x, "Q4_K", np.array([value] + [1] * 511, np.float32))
    with pytest.raises(BadInput, match=r"expected rows and columns, got an array of shape \(512,\)"):
        quantize(x[0], "Q4_K")
