"""Compiles the C++ kernels for a GPU when they are first wanted, with NVRTC, which takes no toolkit and no GPU.

A program is one format and one thing to do with it, which takes seconds. What is compiled stays in the user's cache
folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Final

import torch

from ...files import cache_folder
from .kernel_sources import SOURCES, digest
from .table import Work

_ENTRY: Final = "cuda.cu"
# Results must be the same bits as a CPU's, so a product and a sum are never fused. No function says where it runs.
_OPTIONS: Final = ("-std=c++17", "--fmad=false", "-default-device")
_STANDARD_HEADERS: Final = {  # as far as the kernels use them
    "cstdint": """#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
#define INT32_MAX 0x7fffffff
""",
    "cstring": "#pragma once\nnamespace std { using ::memcpy; }\n",
}
_DIGEST_BYTES: Final = 32
_WINDOWS: Final = sys.platform == "win32"
_NAME: Final = "nvrtc64_*_0.dll" if _WINDOWS else "libnvrtc.so*"
_BUILTINS: Final = "nvrtc-builtins64_*.dll" if _WINDOWS else "libnvrtc-builtins.so*"
_FOLDERS: Final = {"nvidia": "*/bin" if _WINDOWS else "*/lib", "torch": "lib"}  # of packages that bring NVRTC

_guard = Lock()
_locks: dict[Program, Lock] = {}
_compiled: dict[Program, bytes] = {}


@dataclass(frozen=True)
class Program:
    """What to compile, for an architecture like "sm_90", or "compute_90" for code that a GPU's driver completes."""

    format: str
    work: Work
    architecture: str

    @property
    def options(self) -> tuple[str, ...]:
        return (*_OPTIONS, f"-arch={self.architecture}", f"-DFORMAT={self.format}", f"-D{self.work.upper()}")


def code_of(program: Program) -> bytes:
    """What a driver can load: from this process, the user's cache, or compiled now. RuntimeError if that fails."""
    with _guard:
        lock = _locks.setdefault(program, Lock())
    with lock:
        if program not in _compiled:
            _compiled[program] = _read(program) or _write(program, compiled(program))
        return _compiled[program]


def prepare(programs: Iterable[Program]) -> Thread:
    """Compile in the background, one after another; whoever wants a program that is being compiled waits for it."""

    def work() -> None:
        for program in programs:
            with suppress(RuntimeError):  # which whoever wants the program is told again
                code_of(program)

    thread = Thread(target=work, name="kernels", daemon=True)
    thread.start()
    return thread


def architecture_for(major: int, minor: int) -> str:
    """The architecture to compile for, given a GPU's compute capability. RuntimeError where there is none."""
    wanted, known = 10 * major + minor, _architectures()
    if wanted in known:
        return f"sm_{wanted}"
    older = [number for number in known if number < wanted]
    if not older:
        raise RuntimeError(f"NVRTC {version()} compiles for no GPU as old as of compute capability {major}.{minor}")
    return f"compute_{max(older)}"


@cache
def version() -> str:
    """NVRTC's version, as "13.5"; RuntimeError where there is no NVRTC."""
    major, minor = c_int(), c_int()
    _check(_library().nvrtcVersion(byref(major), byref(minor)))
    return f"{major.value}.{minor.value}"


def compiled(program: Program) -> bytes:
    """The code of a program, compiled anew. RuntimeError, with the compiler's words, if that fails."""
    library, handle = _library(), c_void_p()
    headers = _STANDARD_HEADERS | {
        path.name: path.read_text(encoding="utf-8") for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp")
    }
    entry = (SOURCES / _ENTRY).read_bytes()
    texts, names = _strings(headers.values()), _strings(headers)
    _check(library.nvrtcCreateProgram(byref(handle), entry, _ENTRY.encode(), len(headers), texts, names))
    try:
        failed = library.nvrtcCompileProgram(handle, len(program.options), _strings(program.options))
        if failed:
            raise RuntimeError(f"{program} does not compile: {_part(handle, 'ProgramLog').decode(errors='replace')}")
        return _part(handle, "CUBIN" if program.architecture.startswith("sm_") else "PTX")
    finally:
        library.nvrtcDestroyProgram(byref(handle))


def _strings(texts: Iterable[str]) -> object:
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


def _part(handle: c_void_p, name: str) -> bytes:
    """What NVRTC has of a program under this name."""
    library, size = _library(), c_size_t()
    _check(getattr(library, f"nvrtcGet{name}Size")(handle, byref(size)))
    buffer = create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{name}")(handle, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC fails with {_library().nvrtcGetErrorString(result).decode()}")


@cache
def _architectures() -> frozenset[int]:
    count = c_int()
    _check(_library().nvrtcGetNumSupportedArchs(byref(count)))
    numbers = (c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(numbers))
    return frozenset(numbers)


def _read(program: Program) -> bytes | None:
    """What the cache has of a program, if it is whole."""
    try:
        data = _place(program).read_bytes()
    except OSError:
        return None
    code = data[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == data[:_DIGEST_BYTES] else None


def _write(program: Program, code: bytes) -> bytes:
    """Keep a program in the cache, as far as it can be written; its code."""
    place = _place(program)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(".part", place.stem, place.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(part, place)
        finally:
            Path(part).unlink(missing_ok=True)
    return code


def _place(program: Program) -> Path:
    sources = digest(SOURCES)
    key = hashlib.sha256(" ".join((str(sources), version(), *program.options)).encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"{program.format}-{program.work}-{program.architecture}-{key}.bin"


@cache
def _library() -> CDLL:
    """NVRTC as pip, torch or the system brought it, best of the CUDA version that torch was built for."""
    for path in sorted(_candidates(), key=lambda path: _major(path) != (torch.version.cuda or "").partition(".")[0]):
        with suppress(OSError, AttributeError):
            if os.path.isabs(path):  # what belongs to it lies beside it, where it does not look
                for part in _matching(Path(path).parent, _BUILTINS):
                    CDLL(part)
            return _declared(CDLL(path))
    raise RuntimeError("there is no NVRTC; install moecast[cuda]")


def _candidates() -> Iterator[str]:
    for package in ("nvidia", "torch"):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            yield from _matching(Path(place), f"{_FOLDERS[package]}/**/{_NAME}")
    if found := find_library("nvrtc"):
        yield found


def _matching(folder: Path, pattern: str) -> Iterator[str]:
    return map(str, sorted(folder.glob(pattern)))


def _major(path: str) -> str:
    """Of CUDA's version, as a library's name has it: libnvrtc.so.13, nvrtc64_130_0.dll."""
    found = re.search(r"so\.(\d+)|nvrtc64_(\d+)\d_", path)
    return next(filter(None, found.groups()), "") if found else ""


def _declared(library: CDLL) -> CDLL:
    """The library with the types of what its functions take and return, where it is not a number."""
    library.nvrtcGetErrorString.restype = c_char_p
    library.nvrtcCreateProgram.argtypes = [c_void_p, c_char_p, c_char_p, c_int, c_void_p, c_void_p]
    library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, c_void_p]
    return library
