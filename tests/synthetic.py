"""Weights and importance that look like those of language models, and how to compare two roundings of them."""

from __future__ import annotations

import numpy as np
import torch
from moecast.quant import format_named
from moecast.quant.formats.lanes import Coupling
from moecast.quant.formats.quantize import CODECS, relative_weights
from moecast.quant.rounding.feedback import _coupling
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


def heavy_tailed(seed: int, rows: int, columns: int) -> Floats:
    """Student-t(5) times a lognormal scale for each column and row, and an eightfold outlier in a thousand."""
    generator = np.random.default_rng(seed)
    x = generator.standard_t(5, (rows, columns)) * _scales(generator, rows, columns)
    return np.where(generator.random(x.shape) < 1e-3, 8 * x, x).astype(np.float32)


def normal(seed: int, rows: int, columns: int) -> Floats:
    """Normal times a lognormal scale for each column and row."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((rows, columns)) * _scales(generator, rows, columns)).astype(np.float32)


def coupled(seed: int, experts: int, lanes: int, name: str) -> tuple[Tensor, Coupling]:
    """Blocks of experts to be rounded to a format [experts, lanes, block_size], and how their values go together."""
    grid, size = CODECS[name].grid, format_named(name).block_size
    assert grid
    wanted = torch.from_numpy(heavy_tailed(seed, experts * lanes, size)).view(experts, lanes, size)
    noise = torch.randn(experts, size, size, generator=torch.Generator().manual_seed(seed))
    triangles = noise.triu() * 0.1 + torch.eye(size)
    weights = relative_weights(triangles.diagonal(dim1=-2, dim2=-1).square())
    return wanted, _coupling(triangles, weights, grid.group)


def edges() -> dict[str, Floats]:
    """Rows of two blocks each."""
    noise = np.random.default_rng(0).standard_normal(512)
    outlier = 5.0 * (np.arange(512) == 77)
    rows = {
        "zero": np.zeros(512),
        "constant": np.full(512, 0.37),
        "negative constant": np.full(512, -0.37),
        "outlier": outlier,
        "negative outlier": -outlier,
        "denormal": 1e-40 * noise,
        "near the smallest float16": 1e-6 * noise,
        "huge": 1e30 * noise,
        "largest": np.full(512, np.finfo(np.float32).max),
        "huge beside tiny": np.where(np.arange(512) < 100, 1e30, 1e-30),
        "positive": np.abs(noise) + 5,
    }
    return {name: row.astype(np.float32) for name, row in rows.items()}


def importance(seed: int, columns: int) -> Floats:
    """Lognormal, twelve channels a hundred times above the rest."""
    generator = np.random.default_rng([seed, columns])
    values = np.exp(generator.standard_normal(columns))
    values[generator.choice(columns, 12, replace=False)] *= 100
    return values.astype(np.float32)


def relative_error(x: Floats, y: Floats, weights: Floats | None = None) -> float:
    """Weighted root mean square of x - y over that of x."""
    wide = x.astype(np.float64)
    error, total = (wide - y) ** 2, wide**2
    return float(
        np.sqrt(np.average(error, axis=1, weights=weights).sum() / np.average(total, axis=1, weights=weights).sum())
    )


def _scales(generator: np.random.Generator, rows: int, columns: int) -> NDArray[np.float64]:
    return 0.02 * np.exp(0.3 * generator.standard_normal(columns)) * np.exp(0.3 * generator.standard_normal((rows, 1)))
