"""The source distribution: everything the kernels are built from, and installs with and without a compiler."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USE_KERNELS = """
import os, numpy, moecast
from moecast.quant import quantize
from moecast.quant.formats import native
x = numpy.random.default_rng(0).standard_normal((3, 256), numpy.float32)
ours = quantize(x, "Q4_K")
os.environ["MOECAST_KERNELS"] = "torch"
print(moecast.__file__, *native.paths(), (ours == quantize(x, "Q4_K")).all())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distribution")
    run = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(run, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


def test_the_source_distribution_holds_the_kernels(source: Path) -> None:
    with tarfile.open(source) as archive:
        packed = {Path(name).name for name in archive.getnames() if "/quant/kernels/" in name}
        assert not any(name.endswith(".so") for name in archive.getnames())
    assert packed == {path.name for path in (ROOT / "quant/kernels").iterdir()}


def test_it_installs_without_a_compiler(source: Path, tmp_path: Path) -> None:
    wheel, output = build_wheel(source, "/bin/false", tmp_path)
    assert "no C++ kernels" in output
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "moecast/quant/formats/native.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_it_installs_with_a_compiler(source: Path, tmp_path: Path) -> None:
    """One that knows no newer processors and does not optimise, which is quick."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -mavx"*) exit 1 ;; esac\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    wheel, output = build_wheel(source, str(compiler), tmp_path)
    assert "no C++ kernels" not in output
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    site = tmp_path / "site"
    run_pip("install", "--no-deps", "--target", str(site), str(wheel))
    result = subprocess.run(
        [sys.executable, "-c", USE_KERNELS],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    path, *kernels = result.stdout.split()
    assert Path(path).is_relative_to(site)
    assert kernels in (["x86-64-v2", "scalar", "torch", "True"], ["neon", "torch", "True"])


def build_wheel(source: Path, compiler: str, folder: Path) -> tuple[Path, str]:
    """The wheel that pip builds with this compiler, and what it says meanwhile."""
    options = ["--no-deps", "--no-build-isolation", "-v", "-w", str(folder)]
    output = run_pip("wheel", *options, str(source), CC=compiler, CXX=compiler)
    return next(folder.glob("moecast-*.whl")), output


def run_pip(*arguments: str, **environment: str) -> str:
    run = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(run, env=os.environ | environment, check=True, capture_output=True, text=True)
    return result.stdout + result.stderr
