"""The lattice types and others of few bits: smaller errors than ggml's, in bytes that ggml and gguf-py read."""

from collections.abc import Callable

import ggml
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from moecast.quant import dequantize, quantize
from moecast.quant.formats.lattice_search import Lattice, even_signs
from quantizer_properties import (
    expect_bytes_of_blocks_alone,
    expect_no_rows_of_no_rows,
    expect_nothing_of_no_importance,
    expect_padding_to_stay_zero,
    expect_scaling_to_scale_the_result,
)
from synthetic import Floats, edges, heavy_tailed, importance, normal, relative_error

LATTICES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
EVEN_SIGNS = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")
KEEP_LENGTH = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # at the price of a larger squared error
OTHERS = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4")
NEED_IMPORTANCE = ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # ggml refuses to go without


@pytest.mark.whole
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("sample", [heavy_tailed, normal])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("IQ1_S", "IQ1_M") else n for n in (*LATTICES, *OTHERS)]
)
def test_error_is_below_ggmls(name: str, sample: Callable[[int, int, int], Floats], weighted: bool) -> None:
    for seed in range(100, 102):
        x = sample(seed, 8, 1024)
        columns = importance(seed, 1024) if weighted else None
        given = np.ones(1024, np.float32) if columns is None and name in NEED_IMPORTANCE else columns
        data = quantize(x, name, columns)
        ours = relative_error(x, dequantize(data, name), columns)
        theirs = relative_error(x, ggml.dequantize(ggml.quantize(x, name, given), name), columns)
        # Without importance ggml's one-bit scale is the best there is: the mean magnitude.
        most = 1.0 + 1e-6 if name == "Q1_0" else 1.0 if name in KEEP_LENGTH else 0.95
        assert ours <= most * theirs, f"seed {seed}: {ours / theirs:.4f} of ggml's error"
        assert ggml.accepts(data, name)
        if name not in ("Q1_0", "Q2_0"):  # gguf-py does not know these yet
            np.testing.assert_array_equal(quants.dequantize(data, GGMLQuantizationType[name]), dequantize(data, name))


@pytest.mark.parametrize("name", (*LATTICES, *OTHERS))
def test_bytes_depend_on_the_block_alone(name: str) -> None:
    expect_bytes_of_blocks_alone(name, 65)


@pytest.mark.parametrize("name", (*LATTICES, *(name for name in OTHERS if name != "NVFP4")))
def test_scaling_by_a_power_of_two_scales_the_result(name: str) -> None:
    """NVFP4 alone has scales so coarse and so few that it matters how large the weights are."""
    expect_scaling_to_scale_the_result(name)


@pytest.mark.parametrize("name", (*LATTICES, *OTHERS))
def test_no_rows(name: str) -> None:
    expect_no_rows_of_no_rows(name)


@pytest.mark.parametrize("name", (*LATTICES, *OTHERS))
def test_edges(name: str) -> None:
    x = np.stack(list(edges().values()))
    for columns in (None, np.zeros(512), 1e9 * (np.arange(512) == 3)):
        data = quantize(x, name, columns)
        assert ggml.accepts(data, name)
        assert np.isfinite(dequantize(data, name)).all()
    results = dict(zip(edges(), dequantize(quantize(x, name), name), strict=True))
    assert not results["zero"].any()
    assert np.abs(results["denormal"]).max() <= 1.125 * 2.0**-24  # float16's smallest number, and IQ1's shift
    assert np.abs(results["huge"]).max() > 1000  # it saturates
    for row in ("constant", "negative constant", "outlier", "negative outlier", "positive"):
        x, ones = edges()[row][None], np.ones(512, np.float32)
        theirs = relative_error(x, ggml.dequantize(ggml.quantize(x, name, ones), name))
        most = 1.05 if name in KEEP_LENGTH else 1.0  # that price, on blocks with no spread
        assert relative_error(x, results[row][None]) <= most * theirs + 1e-6, row


@pytest.mark.parametrize("name", (*LATTICES, *OTHERS))
def test_importance_of_nothing_is_no_importance(name: str) -> None:
    expect_nothing_of_no_importance(name)


@pytest.mark.parametrize("name", (*LATTICES, *OTHERS))
def test_unimportant_columns_still_count(name: str) -> None:
    x, columns = normal(5, 8, 512), importance(5, 512)
    columns[::2] = 0
    y = dequantize(quantize(x, name, columns), name)
    assert relative_error(x[:, ::2], y[:, ::2]) < min(4 * relative_error(x, dequantize(quantize(x, name), name)), 1)


@pytest.mark.parametrize("name", ("TQ1_0", "TQ2_0", "Q2_0", "NVFP4"))
def test_padding_stays_exactly_zero(name: str) -> None:
    expect_padding_to_stay_zero(name)


@pytest.mark.parametrize("name", OTHERS)
def test_values_that_the_type_can_hold_stay(name: str) -> None:
    """Weights trained in the type: each block uses the whole range of levels of some scale."""
    generator = np.random.default_rng(6)
    levels = {"Q1_0": (-1, 1), "Q2_0": (-1, 0, 1, 2), "NVFP4": (-6, -4, -1.5, 0, 0.5, 1, 2, 3, 6)}.get(name, (-1, 0, 1))
    x = generator.choice(np.array(levels), (16, 2, 256)) * generator.choice(
        np.array([0.25, 0.01953125, 3.25]), (16, 2, 1)
    )
    x[:, :, ::16] = max(levels) * np.abs(x).max(-1, keepdims=True) / max(np.abs(levels))
    x = x.reshape(16, 512).astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize(x, name, importance(6, 512)), name), x)


@pytest.mark.parametrize("name", EVEN_SIGNS)
def test_signs_are_kept_but_for_one_in_eight(name: str) -> None:
    """Seven of eight signs are stored: an odd number of negative values costs the least of them its sign."""
    x = heavy_tailed(7, 8, 512)
    groups = x.reshape(-1, 8)
    wrong = np.signbit(dequantize(quantize(x, name), name)).reshape(-1, 8) != np.signbit(groups)
    odd = np.signbit(groups).sum(1) % 2 == 1
    np.testing.assert_array_equal(wrong.sum(1), odd)
    np.testing.assert_array_equal(wrong[odd].argmax(1), np.abs(groups[odd]).argmin(1))


def test_even_signs_flip_the_first_of_equals() -> None:
    values = torch.tensor([[-1.0, 2, 3, 4, 1, 1, 5, 6], [0] * 8, [1.0] * 7 + [-1]]).T
    negative = even_signs(values, torch.ones_like(values)).T
    assert negative.tolist() == [[False] * 8, [False] * 8, [True, *[False] * 6, True]]


@pytest.mark.parametrize("name", [name for name in LATTICES if name != "IQ1_M"])
def test_nearest_point(name: str) -> None:
    """Against all distances; one that exceeds the least in the bits that hold numbers is as good."""
    grid = getattr(quants, name)
    grid.init_grid()
    points = grid.grid.reshape(grid.grid_shape).astype(np.float64)
    generator = np.random.default_rng(8)
    values = (generator.standard_normal((points.shape[1], 300)) * points.max()).astype(np.float32)
    weights = np.exp(2 * generator.standard_normal(values.shape)).astype(np.float32)
    numbers = Lattice(torch.from_numpy(points).float()).nearest(torch.from_numpy(values), torch.from_numpy(weights))
    all_distances = (weights * (values - points[:, :, None]) ** 2).sum(1)
    chosen = np.take_along_axis(all_distances, numbers.numpy()[None], 0)[0]
    np.testing.assert_allclose(chosen, all_distances.min(0), rtol=1e-4)
