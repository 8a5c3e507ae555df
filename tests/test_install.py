"""The source distribution: everything the kernels are built from, and an install without a compiler."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    run = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-v",
        "-w",
        str(tmp_path),
        str(source),
    ]
    result = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
    assert "no C++ kernels" in result.stdout + result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("moecast-*.whl"))) as wheel:
        names = wheel.namelist()
    assert "moecast/quant/native.py" in names
    assert not any(name.endswith(".so") for name in names)
