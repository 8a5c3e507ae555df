"""Blocks of few bits are about as long as the weights they stand for."""

import numpy as np
import pytest
from moecast.quant import dequantize, quantize
from synthetic import heavy_tailed, importance, relative_error

LENGTHENED = ("Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("name", LENGTHENED)
def test_length_is_restored(name: str) -> None:
    """The best approximation would be short by the square of its error; three tenths of that are to be left."""
    x, columns = heavy_tailed(9, 8, 1024), importance(9, 1024)
    y = dequantize(quantize(x, name, columns), name)
    short = 1 - np.sum(columns * x * y, dtype=np.float64) / np.sum(columns * x * x, dtype=np.float64)
    assert 0.1 < short / relative_error(x, y, columns) ** 2 < 0.4
