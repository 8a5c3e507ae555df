"""Where tensors lie: every one is made on a device that is named, and the quantizers never mix two."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moecast.quant import dequantize, format_named
from moecast.quant.formats import lattice
from moecast.quant.formats.lanes import Coupling
from moecast.quant.formats.quantize import CODECS, _encode
from moecast.quant.rounding import feedback
from moecast.quant.rounding.moments import divided, products_of
from pretended import DEVICE, pretend
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[1]
FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
QUICK = {"Q2_0", "Q4_1", "IQ4_NL", "MXFP4"}


def _without_device(file: Path) -> Iterator[int]:
    """The lines that make a tensor without saying where."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not any(keyword.arg == "device" for keyword in node.keywords):
                yield node.lineno


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    files = [file for folder in ("quant", "sources", "runner") for file in (ROOT / folder).rglob("*.py")]
    found = {file.relative_to(ROOT).as_posix(): [*_without_device(file)] for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors without numbers; lattices have theirs already, because they are searched for what they share."""
    for name in lattice.LATTICES:
        lattice.digits(name)
    for signed in (lattice._IQ2_XXS, lattice._IQ2_XS, lattice._IQ2_S, lattice._IQ3_XXS, lattice._IQ3_S):
        lattice._lattice(signed.name, signed.divisor)
    monkeypatch.setattr(feedback, "_SWEEPS", 1)
    yield pretend(monkeypatch)
    lattice._points.cache_clear()
    lattice._lattice_on.cache_clear()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(CODECS)]
)
def test_quantizers_stay_on_their_device(fake: FakeTensorMode, name: str) -> None:
    codec, format = CODECS[name], format_named(name)
    size = format.block_size
    with fake:
        values = torch.empty(3, 2 * size, device=DEVICE)
        for weights in (None, torch.empty_like(values)):
            data = _encode(codec, format, values, weights)
            assert data.shape == (3, 2 * format.block_bytes)
            assert data.device.type == dequantize(data, name).device.type == DEVICE.type
        if codec.grid:
            block, triangle = data[:, : format.block_bytes].T, torch.empty(size, size, device=DEVICE)
            coupling = Coupling(None, triangle, triangle, triangle, triangle[0], triangle[0])
            levels, stored = feedback._choose(codec.grid, block, values[:, :size].T, coupling)
            assert stored.device.type == codec.grid.with_levels(block, levels).device.type == DEVICE.type


def test_moments_stay_on_their_device(fake: FakeTensorMode) -> None:
    with fake:
        products = products_of(torch.empty(7, 1024, device=DEVICE))
        assert products.device.type == divided(products[None], 256).device.type == DEVICE.type


def test_two_devices_are_refused(fake: FakeTensorMode) -> None:
    with fake, pytest.raises(RuntimeError, match="at least two devices"):
        _encode(CODECS["Q4_K"], format_named("Q4_K"), torch.empty(1, 256, device=DEVICE), torch.empty(1, 256))
