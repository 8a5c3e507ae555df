"""The distributions: what they hold and declare, and installs with and without a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import moecast
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NO_PACKAGES = ("tests/", "benchmarks/", "examples/", "setup.py")

USE_KERNELS = """
import os, numpy, moecast
from moecast.quant import quantize
from moecast.quant.formats import native
x = numpy.random.default_rng(0).standard_normal((3, 256), numpy.float32)
ours = quantize(x, "Q4_K")
os.environ["MOECAST_KERNELS"] = "torch"
print(moecast.__file__, *native.paths(), (ours == quantize(x, "Q4_K")).all())
"""


@dataclass(frozen=True)
class Wheel:
    path: Path
    log: str  # what pip said while it was built

    @property
    def names(self) -> set[str]:
        with zipfile.ZipFile(self.path) as archive:
            return {*archive.namelist()}

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of the repository, those that are not committed yet among them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    run = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(run, check=True, capture_output=True, text=True)
    return {*listed.stdout.splitlines()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distribution")
    run = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(run, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Built where no compiler is."""
    return build_wheel(source, "/bin/false", tmp_path_factory.mktemp("plain"))


def test_the_lowest_versions_are_those_it_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    asked = {
        f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, (*project["dependencies"], *extras))
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if not line.startswith("#")} == asked
    assert len(asked) >= len(project["dependencies"])


@pytest.mark.slow
def test_the_source_distribution_holds_the_repository(source: Path, tracked: set[str]) -> None:
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if re.fullmatch(r"PKG-INFO|setup\.cfg|moecast\.egg-info/.*", name)}
    assert names - made == {name for name in tracked if name != ".gitignore" and not name.startswith(".github/")}


@pytest.mark.slow
def test_a_wheel_holds_every_module(plain: Wheel, tracked: set[str]) -> None:
    modules = {f"moecast/{name}" for name in tracked if name.endswith(".py") and not name.startswith(NO_PACKAGES)}
    assert {name for name in plain.names if name.endswith(".py")} == modules


@pytest.mark.whole
def test_a_wheel_holds_what_the_demo_and_gpus_need_and_no_more(plain: Wheel) -> None:
    others = {name.removeprefix("moecast/") for name in plain.names if not re.search(r"\.py$|\.dist-info/", name)}
    example = (ROOT / "examples/minimax-m2-tiny").iterdir()
    texts = {"examples/text/diverse.txt", "examples/text/evaluation.txt"}
    files = [
        *example,
        *(ROOT / "quant/kernels").iterdir(),
        *(ROOT / "examples/text/categories").iterdir(),
        *(ROOT / "reports").glob("page.[ch]*"),
    ]
    assert others == {"py.typed", *texts, *(file.relative_to(ROOT).as_posix() for file in files)}


@pytest.mark.whole
def test_metadata(plain: Wheel) -> None:
    metadata = plain.metadata()
    assert metadata["Version"] == moecast.__version__
    assert metadata["Author"] == "The moecast authors"
    assert len(metadata.get_all("Project-URL", [])) == 4


@pytest.mark.whole
def test_it_installs_without_a_compiler(plain: Wheel) -> None:
    assert "no C++ kernels" in plain.log
    assert plain.path.name == f"moecast-{moecast.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_it_installs_with_a_compiler(source: Path, tmp_path: Path) -> None:
    """One that knows no newer processors and does not optimize, which is quick."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -mavx"*) exit 1 ;; esac\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    wheel = build_wheel(source, str(compiler), tmp_path)
    assert "no C++ kernels" not in wheel.log
    assert "-py3-none-" in wheel.path.name and not wheel.path.name.endswith("-any.whl")
    site = tmp_path / "site"
    run_pip("install", "--no-deps", "--target", str(site), str(wheel.path))
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
    assert kernels in ([best, "scalar", "torch", "True"] for best in ("x86-64-v2", "neon"))


def build_wheel(source: Path, compiler: str, folder: Path) -> Wheel:
    """The wheel that pip builds with this compiler."""
    options = ["--no-deps", "--no-build-isolation", "-v", "-w", str(folder)]
    log = run_pip("wheel", *options, str(source), CC=compiler, CXX=compiler)
    return Wheel(next(folder.glob("moecast-*.whl")), log)


def run_pip(*arguments: str, **environment: str) -> str:
    run = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(run, env=os.environ | environment, check=True, capture_output=True, text=True)
    return result.stdout + result.stderr
