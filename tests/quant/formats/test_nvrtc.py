"""Compiling for GPUs without one: every kernel of every format, and what the cache does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pytest
from moecast.quant.formats import nvrtc
from moecast.quant.formats.nvrtc import Program
from moecast.quant.formats.quantize import CODECS
from moecast.quant.formats.table import Work

WORKS: tuple[Work, ...] = ("decode", "encode", "choose")
PROGRAMS = [(name, work) for name in sorted(CODECS) for work in WORKS if work != "choose" or CODECS[name].grid]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, of this process too. Skips where there is no NVRTC, as on a Mac."""
    try:
        nvrtc.version()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(nvrtc, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "_compiled", {})
    yield tmp_path / "kernels"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """What has been compiled, which takes no time here."""
    made: list[Program] = []
    monkeypatch.setattr(nvrtc, "compiled", lambda program: made.append(program) or f"code {len(made)}".encode())
    return made


def check(name: str, work: Work, architecture: str) -> None:
    """A program for a kind of GPU is an ELF file with the kernel's name in it."""
    code = nvrtc.compiled(Program(name, work, architecture))
    assert code.startswith(b"\x7fELF") and b".text." + work.encode() in code


def check_unfinished(name: str, work: Work) -> None:
    """The code before a driver completes it: no function that is elsewhere, no static variable of a function, which
    would be all zeros, and no product fused with a sum.
    """
    code = nvrtc.compiled(Program(name, work, "compute_86")).decode()
    assert re.findall(r"\.visible \.entry (\w+)", code) == ["set_lattice", work]
    assert not re.search(r"\.extern|\.(global|const) .* _ZZ|\bfma\.", code)


@pytest.mark.slow
def test_a_kernel_of_each_kind_compiles() -> None:
    for work in WORKS:
        for architecture in ("sm_86", "sm_90"):
            check("Q2_0", work, architecture)
        check_unfinished("Q2_0", work)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "work"), PROGRAMS)
def test_every_kernel_is_made_of_itself(name: str, work: Work) -> None:
    check_unfinished(name, work)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "work"), PROGRAMS)
def test_every_kernel_compiles(name: str, work: Work) -> None:
    check(name, work, "sm_90")


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Q9_9.*does not compile:.*Q9_9"):
        nvrtc.compiled(Program("Q9_9", "decode", "sm_90"))


def test_each_gpu_gets_its_architecture() -> None:
    assert nvrtc.architecture_for(9, 0) == "sm_90"
    assert nvrtc.architecture_for(99, 0).startswith("compute_")
    with pytest.raises(RuntimeError, match=r"no GPU as old as of compute capability 1\.3"):
        nvrtc.architecture_for(1, 3)


def test_a_program_is_compiled_once(cache: Path, compilations: list[Program], monkeypatch: pytest.MonkeyPatch) -> None:
    program, other = Program("Q2_0", "decode", "sm_90"), Program("Q2_0", "decode", "sm_86")
    assert nvrtc.code_of(program) == nvrtc.code_of(program) == b"code 1"
    monkeypatch.setattr(nvrtc, "_compiled", {})  # as in another process
    assert nvrtc.code_of(program) == b"code 1" and compilations == [program]
    assert nvrtc.code_of(other) == b"code 2"
    assert len([*cache.iterdir()]) == 2
    monkeypatch.setattr(nvrtc, "_compiled", {})
    monkeypatch.setattr(nvrtc, "digest", lambda folder: "newer sources")
    assert nvrtc.code_of(program) == b"code 3"
    monkeypatch.setattr(nvrtc, "_compiled", {})
    monkeypatch.setattr(nvrtc, "version", lambda: "99.0")
    assert nvrtc.code_of(program) == b"code 4"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_damaged_file_is_compiled_anew(
    cache: Path, compilations: list[Program], monkeypatch: pytest.MonkeyPatch, damage: object
) -> None:
    program = Program("Q2_0", "decode", "sm_90")
    nvrtc.code_of(program)
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    for _ in range(2):
        monkeypatch.setattr(nvrtc, "_compiled", {})
        assert nvrtc.code_of(program) == b"code 2"
    assert [*cache.iterdir()] == [file]


def test_a_cache_that_cannot_be_written_does_no_harm(cache: Path, compilations: list[Program]) -> None:
    cache.write_text("a file where a folder should be")
    assert nvrtc.code_of(Program("Q2_0", "decode", "sm_90")) == b"code 1"


def test_prepared_in_the_background(compilations: list[Program]) -> None:
    programs = [Program(name, "encode", "sm_90") for name in ("Q4_K", "Q6_K")]
    nvrtc.prepare(programs).join()
    assert [nvrtc.code_of(program) for program in programs] == [b"code 1", b"code 2"]
    assert compilations == programs


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> CDLL:
        raise RuntimeError("there is no NVRTC")

    monkeypatch.setattr(nvrtc, "_library", missing)
    nvrtc.prepare([Program("Q2_0", "decode", "sm_90")]).join()
    with pytest.raises(RuntimeError, match="there is no NVRTC"):
        nvrtc.compiled(Program("Q2_0", "decode", "sm_90"))
