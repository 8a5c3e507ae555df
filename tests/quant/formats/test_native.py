"""The C++ kernels: torch's bytes with every instruction set of this machine, whatever the input."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from moecast.errors import BadInput
from moecast.quant import dequantize, format_named, quantize
from moecast.quant.formats import native
from moecast.quant.formats.quantize import CODECS
from synthetic import Floats, coupled, heavy_tailed, importance

INSTRUCTION_SETS = native.paths()[:-1]
NAMES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4",
)  # fmt: skip


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MOECAST_KERNELS", request.param)
    yield request.param


def with_torch(monkeypatch: pytest.MonkeyPatch, x: Floats, name: str, columns: Floats | None) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setenv("MOECAST_KERNELS", native.TORCH)
        return quantize(x, name, columns)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_torchs(kernels: str, name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of three blocks, so that the lanes of a register hold parts of several rows, and the last ones nothing."""
    size = 3 * format_named(name).block_size
    x, columns = heavy_tailed(20, 21, size), importance(20, size) if weighted else None
    x[3], x[9] = 0, 0.37
    x[5] *= 1e-40 / np.abs(x[5]).max()
    x[7] *= 1e37 / np.abs(x[7]).max()
    assert native.can("encode", format_named(name), torch.device("cpu"))
    expected = with_torch(monkeypatch, x, name, columns)
    np.testing.assert_array_equal(quantize(x, name, columns), expected)
    np.testing.assert_array_equal(quantize(x[:1], name, columns), expected[:1])
    x[11, -1] = np.nan
    with pytest.raises(BadInput, match="row 11 holds a value that is not finite"):
        quantize(x, name, columns)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_torchs(kernels: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * format_named(name).block_size
    data = torch.from_numpy(quantize(heavy_tailed(23, 7, size), name))
    for type in (torch.float32, torch.bfloat16):
        values = dequantize(data, name, type=type)
        with monkeypatch.context() as patch:
            patch.setenv("MOECAST_KERNELS", native.TORCH)
            assert torch.equal(values, dequantize(data, name, type=type))


@pytest.mark.parametrize("name", [name for name in NAMES if CODECS[name].grid])
def test_levels_are_those_of_the_fastest(kernels: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 21 lanes of each of two experts; their scales are the search's, and what they stand for is what is read."""
    format = format_named(name)
    assert native.can("choose", format, torch.device("cpu"))
    values, coupling = coupled(24, 2, 21, name)
    added, errors, others = values.flip(1) * 0.1, torch.empty_like(values), torch.empty_like(values)
    data, bad = native.choose(format, values, added, coupling, errors, sweeps=2, threads=1)
    assert bad == -1
    assert torch.equal(values - dequantize(data.flatten(0, 1), name).view_as(values), errors)
    with monkeypatch.context() as patch:
        patch.setenv("MOECAST_KERNELS", INSTRUCTION_SETS[0])
        assert torch.equal(native.choose(format, values, added, coupling, others, 2, 1)[0], data)
        assert torch.equal(errors, others)
    values[1, 9, 3] = torch.nan
    assert native.choose(format, values, None, coupling, errors, sweeps=2, threads=1)[1] == 21 + 9


def test_blocks_are_columns_of_something_wider(kernels: str) -> None:
    """And errors may be bfloat16."""
    format, name = format_named("Q4_K"), "Q4_K"
    values, coupling = coupled(25, 2, 21, name)
    alone, wide = torch.empty_like(values), torch.zeros(2, 21, 512, dtype=torch.bfloat16)
    data, _ = native.choose(format, values, None, coupling, alone, sweeps=2, threads=1)
    wider = torch.cat([values + 1, values], dim=-1)
    nothing = torch.zeros(2, 21, 256, dtype=torch.bfloat16)
    again, _ = native.choose(format, wider[..., 256:], nothing, coupling, wide[..., 256:], sweeps=2, threads=1)
    assert torch.equal(again, data) and torch.equal(wide[..., 256:], alone.bfloat16()) and not wide[..., :256].any()


@pytest.mark.parametrize("type", [torch.bfloat16, torch.float16, torch.float64])
def test_other_inputs_are_read_exactly(kernels: str, type: torch.dtype) -> None:
    x = torch.from_numpy(heavy_tailed(21, 9, 512)).to(type)
    x[2, :3] = torch.tensor([6e-8, -3e-6, 6e4])  # subnormal and large for float16
    assert torch.equal(quantize(x, "Q6_K"), quantize(x.to(torch.float32), "Q6_K"))
    assert torch.equal(quantize(x[:, ::2], "Q6_K"), quantize(x[:, ::2].contiguous(), "Q6_K"))
    x[4, 5] = torch.inf
    with pytest.raises(BadInput, match="row 4 holds a value that is not finite"):
        quantize(x, "Q6_K")


def test_threads_share_the_work(kernels: str) -> None:
    x = heavy_tailed(22, 1500, 512)
    data = quantize(x, "Q4_0", threads=4)
    np.testing.assert_array_equal(data, quantize(x, "Q4_0", threads=1))
    np.testing.assert_array_equal(dequantize(data, "Q4_0", threads=4), dequantize(data, "Q4_0", threads=1))
    x[[1400, 200, 900]] = np.nan
    with pytest.raises(BadInput, match="row 200 holds"):
        quantize(x, "Q4_0", threads=4)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available() == bool(INSTRUCTION_SETS)
    monkeypatch.setenv("MOECAST_KERNELS", "torch")
    assert native.path() == "torch" and native.kernel_status().startswith("torch")
    monkeypatch.setenv("MOECAST_KERNELS", "abacus")
    with pytest.raises(BadInput, match=r"MOECAST_KERNELS is 'abacus'; this machine has .*torch"):
        quantize(np.zeros((1, 256), np.float32), "Q4_K")
