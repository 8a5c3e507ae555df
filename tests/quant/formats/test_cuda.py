"""The kernels for GPUs give the CPU's bytes. Without a GPU a C++ compiler stands in, with a loop over the grid."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from ctypes import CDLL, c_void_p
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moecast.errors import BadInput
from moecast.quant import dequantize, format_named, quantize
from moecast.quant.formats import cuda, devices, lattice, native, nvrtc
from moecast.quant.formats.kernel_sources import SOURCES
from moecast.quant.formats.lanes import Coupling
from moecast.quant.formats.quantize import CODECS
from moecast.quant.formats.table import Format, Work
from synthetic import coupled, heavy_tailed, importance
from torch import Tensor

GRID = Path(__file__).parents[2] / "data" / "grid_on_cpu.h"
NAMES = sorted(CODECS)
CHOOSING = sorted(name for name, codec in CODECS.items() if codec.grid)


@pytest.fixture(params=["compiler", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> torch.device:
    """A GPU, or the CPU whose tensors go to the GPU's kernels, as a C++ compiler understands them."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda", 0)
    compiler = shutil.which("c++")
    if compiler is None or not native.available():
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp() / "grids"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(cuda, "_function", lambda work, format, device: _grid(compiler, folder, work, format))
    monkeypatch.setattr(cuda, "_driver", lambda: SimpleNamespace(cuLaunchKernel=_launch))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(devices._KERNELS, "cpu", cuda)
    return torch.device("cpu")


@cache
def _grid(compiler: str, folder: Path, work: Work, format: Format) -> CDLL:
    library = folder / f"{format.name}-{work}.so"
    options = ["-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-DFORMAT={format.name}"]
    run = [compiler, *options, f"-D{work.upper()}", f"-I{SOURCES}", "-x", "c++", str(GRID), "-o", str(library)]
    subprocess.run(run, check=True, capture_output=True)
    loaded = CDLL(str(library))
    for name in lattice.LATTICES:
        loaded.set_lattice(format_named(name).id, c_void_p(_lattice(name).data_ptr()))
    return loaded


@cache
def _lattice(name: str) -> Tensor:
    points = native.lattice_points(name)
    assert points is not None
    return points


def _launch(library: CDLL, x: int, y: int, z: int, threads: int, *others: object) -> int:
    library.launch(x, y, threads, others[-2])
    return 0


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Calls a function with the CPU's own kernels."""

    def call(function: Callable[..., Tensor], *arguments: object, **named: object) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setitem(devices._KERNELS, "cpu", native)
            return function(*arguments, **named)

    return call


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_cpus(device: torch.device, on_cpu: Callable[..., Tensor], name: str, weighted: bool) -> None:
    size = 3 * format_named(name).block_size
    x = torch.from_numpy(heavy_tailed(30, 25, size))
    x[3], x[4] = 0, 0.37
    columns = torch.from_numpy(importance(30, size)) if weighted else None
    data = quantize(x.to(device), name, columns)
    assert data.device == device and torch.equal(data.cpu(), on_cpu(quantize, x, name, columns))
    for type in (torch.float32, torch.bfloat16):
        values = dequantize(data, name, type=type).cpu()
        assert torch.equal(values, on_cpu(dequantize, data.cpu(), name, type=type))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "MXFP4"])
def test_experts_have_weights_of_their_own(device: torch.device, on_cpu: Callable[..., Tensor], name: str) -> None:
    """The second and third of four, three rows each; the first and the last have none."""
    x = torch.from_numpy(heavy_tailed(31, 12, 512)).to(torch.bfloat16)
    columns = torch.ones(4, 512)
    columns[1], columns[2] = (torch.from_numpy(importance(seed, 512)) for seed in (1, 2))
    expected = on_cpu(quantize, x, name, columns)
    assert torch.equal(quantize(x.to(device), name, columns).cpu(), expected)
    assert torch.equal(torch.cat([on_cpu(quantize, *part) for part in _parts(x, name, columns)]), expected)


def _parts(x: Tensor, name: str, columns: Tensor) -> Iterator[tuple[Tensor, str, Tensor]]:
    for rows, weights in zip(x.split(3), columns, strict=True):
        yield rows, name, weights


@pytest.mark.parametrize("type", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_first_row_that_is_not_finite(device: torch.device, type: torch.dtype) -> None:
    x = torch.from_numpy(heavy_tailed(32, 60, 512)).to(type)
    columns = torch.from_numpy(importance(3, 2 * 512).reshape(2, 512))
    for rows, first in (([57, 41], 41), ([57, 23, 41], 23)):
        for value in (torch.nan, -torch.inf):
            x[rows, 300] = value
            with pytest.raises(BadInput, match=f"row {first} holds a value that is not finite"):
                quantize(x.to(device), "Q6_K", columns)


def test_nothing_is_quantized_to_nothing(device: torch.device) -> None:
    assert quantize(torch.empty(0, 512, device=device), "Q4_K").shape == (0, 288)


@pytest.mark.parametrize("name", CHOOSING)
def test_levels_are_the_cpus(device: torch.device, name: str) -> None:
    """Three experts at once."""
    format, (values, coupling) = format_named(name), coupled(33, 3, 70, name)
    assert native.can("choose", format, torch.device("cpu"))
    added = (values.flip(1) * 0.1).bfloat16()
    cpu, gpu = torch.empty_like(added), torch.empty_like(added, device=device)
    data, _ = native.choose(format, values, added, coupling, cpu, sweeps=2, threads=1)
    on_gpu = _moved(coupling, device)
    made, bad = cuda.choose(format, values.to(device), added.to(device), on_gpu, gpu, sweeps=2, threads=1)
    assert bad == -1 and torch.equal(made.cpu(), data) and torch.equal(gpu.cpu(), cpu)
    values[2, 5, 3] = torch.inf
    assert cuda.choose(format, values.to(device), None, on_gpu, gpu, sweeps=2, threads=1)[1] == 2 * 70 + 5


def native_bytes(rows: Tensor, name: str) -> Tensor:
    format = format_named(name)
    result = torch.empty(len(rows), format.row_bytes(rows.shape[1]), dtype=torch.uint8)
    native.quantize(rows, format, None, result, 1)
    return result


def _moved(coupling: Coupling, device: torch.device) -> Coupling:
    return Coupling(*(None if part is None else part.to(device) for part in coupling))  # type: ignore[arg-type]


def test_torch_takes_over_where_nvrtc_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> CDLL:
        raise RuntimeError("there is no NVRTC")

    monkeypatch.setattr(cuda, "_driver", missing)
    monkeypatch.setitem(devices._KERNELS, "cpu", cuda)
    cuda._function.cache_clear()
    x = torch.from_numpy(heavy_tailed(34, 4, 512))
    with pytest.warns(UserWarning, match="torch does what CUDA kernels would do .* no NVRTC"):
        data = quantize(x, "Q4_K")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(quantize(x, "Q4_K"), data)
    cuda._function.cache_clear()
    assert torch.equal(data, native_bytes(x, "Q4_K"))


def test_kernels_are_prepared_for_the_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[nvrtc.Program] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "architecture_for", lambda major, minor: f"sm_{major}{minor}")
    monkeypatch.setattr(nvrtc, "prepare", programs.extend)
    formats = [format_named(name) for name in ("Q4_K", "F16", "IQ3_S")]
    devices.prepare("choose", formats, torch.device("cpu"))
    assert not programs
    devices.prepare("choose", formats, torch.device("cuda"))
    assert programs == [nvrtc.Program(name, "choose", "sm_90") for name in ("Q4_K", "IQ3_S")]


def test_the_environment_can_ask_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECAST_KERNELS", native.TORCH)
    monkeypatch.setattr(nvrtc, "prepare", lambda programs: pytest.fail("compiles"))
    device = torch.device("cuda", 0)
    assert not cuda.can("encode", format_named("Q4_K"), device)
    cuda.prepare("encode", [format_named("Q4_K")], device)
