"""Builds the C++ kernels, once for each instruction set. An install without a compiler goes on without them.

What pyproject.toml has no words for is here too: that this folder is the package, and what a wheel is called.
Everything else about the package is there.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = Path("quant/kernels")
FAMILIES = sorted(str(path) for path in KERNELS.glob("*.cpp") if path.stem != "dispatch")
DISPATCH = str(KERNELS / "dispatch.cpp")
HEADERS = sorted(str(path) for path in KERNELS.glob("*.h"))

# Results must be the same bits with every instruction set, so a product and a sum are never fused.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
)
LIBRARY = ".dll" if os.name == "nt" else ".so"
if platform.system() == "Darwin":  # Python may be built for both processors, which have no flags in common
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
INTEL = platform.machine().lower() in ("x86_64", "amd64")
BASELINE = ("-msse4.2",) if INTEL else ()
NEWER = {
    "avx2": ("-mavx2",),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=256"),
}
OTHERS = {"scalar": (), **(NEWER if INTEL else {})}  # scalar: what every processor has, and what a GPU computes


class BuildKernels(build_ext):
    """Makes quant/_kernels.so, or .dll on Windows, a library for ctypes rather than a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + LIBRARY

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:  # whatever a compiler, or the lack of one, may come up with
            self.warn(f"no C++ kernels: {error}. moecast will quantize with torch, which is several times slower")

    def _build(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            self._choose_clang()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            baseline = [pool.submit(self._objects, source, "baseline", BASELINE) for source in FAMILIES]
            others = {
                name: [pool.submit(self._objects, source, name, flags) for source in FAMILIES]
                for name, flags in OTHERS.items()
            }
        built = {name: jobs for name, jobs in others.items() if all(job.exception() is None for job in jobs)}
        for name in others.keys() - built.keys():
            self.warn(f"this compiler knows no {name}: building without it")
        objects = [file for jobs in (baseline, *built.values()) for job in jobs for file in job.result()]
        digest = runpy.run_path("quant/formats/kernel_sources.py")["digest"](KERNELS)
        macros = [("SOURCES", f'"{digest}"'), *((f"WITH_{name.upper()}", "1") for name in built)]
        objects += self._compile(DISPATCH, "dispatch", (), macros)
        imports = os.path.join(self.build_temp, "kernels.lib")
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[f"/IMPLIB:{imports}"] if self.compiler.compiler_type == "msvc" else ["-pthread"],
            target_lang="c++",
        )

    def _choose_clang(self) -> None:
        """In place of Microsoft's compiler, which knows no vector types; it is used with the same headers."""
        found = shutil.which("clang-cl") or shutil.which("clang-cl", path=r"C:\Program Files\LLVM\bin")
        if not found:
            raise RuntimeError("clang-cl is not there, which LLVM and Visual Studio's Clang tools bring")
        self.compiler.initialize()
        self.compiler.cc = found

    def _objects(self, source: str, instruction_set: str, flags: tuple[str, ...]) -> list[str]:
        macros = [("INSTRUCTION_SET", instruction_set)]
        if instruction_set == "scalar":
            macros.append(("ONE_LANE", "1"))
        return self._compile(source, instruction_set, flags, macros)

    def _compile(self, source: str, folder: str, flags: tuple[str, ...], macros: list[tuple[str, str]]) -> list[str]:
        output = os.path.join(self.build_temp, folder)
        options = [*FLAGS, *flags]
        if self.compiler.compiler_type == "msvc":
            options = ["/EHsc", *(f"/clang:{option}" for option in options)]
        return self.compiler.compile(
            [source], output_dir=output, macros=macros, extra_postargs=options, depends=HEADERS
        )


class Modules(build_py):
    """All modules of the package; this file lies beside them and is none."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [
            found for found in super().find_package_modules(package, package_dir) if found[:2] != ("moecast", "setup")
        ]


class Wheel(bdist_wheel):
    """A wheel for every Python version, as the library calls nothing of Python's; without it, for every machine."""

    def get_tag(self) -> tuple[str, str, str]:
        kernels = self.get_finalized_command("build_ext").get_outputs()
        return "py3", "none", super().get_tag()[2] if any(map(os.path.exists, kernels)) else "any"


setup(
    packages=["moecast", *(f"moecast.{folder}" for folder in find_packages())],
    ext_modules=[Extension("moecast.quant._kernels", [*FAMILIES, DISPATCH], depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildKernels, "build_py": Modules, "bdist_wheel": Wheel},
)
