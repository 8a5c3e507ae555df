"""How fast the C++ kernels quantize, against ggml: `python benchmarks/kernels.py [--json FILE]`.

Ggml is measured twice: compiled for this machine from the sources that come with llama-cpp-python (fetched by pip into
a cache folder; needs a C++ compiler), and as xllamacpp ships it. All take turns on one core in one process, and the
medians of many turns count; times are those of the CPU, so that other programs disturb little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moecast.quant import dequantize, format_named, quantize
from moecast.quant.formats import native
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from llama_library import load_library
from synthetic import heavy_tailed, importance, relative_error

TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
         "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # fmt: skip
AS_FAST_AS_COPIES = ("Q8_0", "MXFP4")
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")  # ggml refuses to write them without
TWO_THREADS = ("Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS")
LLAMA_CPP = "llama_cpp_python-0.3.36"
SOURCES = ("ggml.c", "ggml-alloc.c", "ggml-quants.c", "ggml-threading.cpp", "ggml-backend.cpp", "ggml-backend-meta.cpp")
REPEATS = 64
Floats = NDArray[np.float32]
Quantizer = Callable[[Floats, str, "Floats | None"], NDArray[np.uint8]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE")
    parser.add_argument("--kernels", nargs="+", default=native.paths()[:-1], choices=native.paths())
    parser.add_argument("--rows", type=int, default=32, help="of 4096 columns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "moecast" / "benchmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    compiled = compiled_ggml(arguments.cache)
    ggml = {"xllamacpp": ggml_quantizer(load_library())}
    if compiled:
        ggml = {"ggml": ggml_quantizer(compiled), **ggml}
    ours = {name: our_quantizer(name) for name in arguments.kernels}
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})

    keep_memory()
    for weighted in (False, True):  # not printed: touches the memory
        measure("Q8_0", weighted, ggml, ours, arguments.rows, arguments.rounds)
    print("| type | importance | " + " | ".join((*ggml, *ours)) + " | times ggml | error |")
    print("|---|---|" + "---:|" * (len(ggml) + len(ours) + 2))
    lines = []
    for name in arguments.types:
        for weighted in (False, True):
            if weighted or name not in NEED_IMPORTANCE:
                lines.append(measure(name, weighted, ggml, ours, arguments.rows, arguments.rounds))
                print(table_row(lines[-1]), flush=True)
    copies = measure_copies(next(iter(ours.values())), arguments.rounds)
    print("\nMillions of values a second and core. As long as a copy of float32 values, times:")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in copies.items()))
    figures: dict[str, Any] = {"unit": "million values a second", "types": lines, "copies": copies}
    if hasattr(os, "sched_setaffinity") and len(cores) > 1:
        os.sched_setaffinity(0, cores)
        figures["two_threads"] = two = measure_two_threads(10 * arguments.rounds)
        each = ", ".join(f"{name} {ratio:.2f}" for name, ratio in two["faster"].items())
        faster, dearer = (statistics.mean(two[figure].values()) for figure in ("faster", "cpu"))
        print(f"Two threads are {faster:.2f} times as fast as one ({each}), in {dearer:.2f} times the CPU's time.")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def keep_memory() -> None:
    """Memory stays with the process (glibc): kernels are timed, and copies, not the system's handing out of pages."""
    with suppress(AttributeError):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            CDLL(None).mallopt(parameter, 1 << 30)


def measure(
    name: str, weighted: bool, ggml: dict[str, Quantizer], ours: dict[str, Quantizer], rows: int, rounds: int
) -> dict[str, Any]:
    """Speeds in million values a second, our speed relative to the first ggml's, and our error relative to its."""
    x, columns = heavy_tailed(0, rows, 4096), importance(0, 4096) if weighted else None
    many = np.tile(x, (REPEATS, 1))  # what we take so little time for that calling would count
    seconds: dict[str, list[float]] = {label: [] for label in (*ggml, *ours)}
    results = {}
    for number in range(rounds + 1):
        for label, quantizer in (ggml | ours).items():
            start = time.thread_time()
            results[label] = quantizer(many if label in ours else x, name, columns)[:rows]
            if number:  # the first call of all prepares tables
                seconds[label].append((time.thread_time() - start) / (REPEATS if label in ours else 1))
    reference = next(iter(ggml))
    errors = {label: relative_error(x, dequantize(data, name), columns) for label, data in results.items()}
    return {
        "type": name,
        "importance": weighted,
        "speed": {label: x.size / statistics.median(times) / 1e6 for label, times in seconds.items()},
        "times_ggml": {
            label: statistics.median(a / b for a, b in zip(seconds[reference], seconds[label], strict=True))
            for label in ours
        },
        "error": errors[next(iter(ours))] / errors[reference],
    }


def table_row(line: dict[str, Any]) -> str:
    speeds = " | ".join(f"{speed:.1f}" for speed in line["speed"].values())
    times = " / ".join(f"{ratio:.1f}" for ratio in line["times_ggml"].values())
    return f"| {line['type']} | {'yes' if line['importance'] else 'no'} | {speeds} | {times} | {line['error']:.3f} |"


def measure_copies(quantizer: Quantizer, rounds: int) -> dict[str, float]:
    """How many times longer than to copy float32 values it takes to quantize them to the simplest types.

    Values are far more than a cache holds; both take turns.
    """
    x, target = heavy_tailed(0, 4096, 4096), np.empty((4096, 4096), np.float32)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(target, x)}
    for name in AS_FAST_AS_COPIES:
        calls[name] = partial(quantizer, x, name, None)
        calls[f"{name} with importance"] = partial(quantizer, x, name, importance(0, 4096))
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for number in range(rounds + 1):
        for label, call in calls.items():
            start = time.thread_time()
            call()
            if number:
                seconds[label].append(time.thread_time() - start)
    pairs = {label: zip(times, seconds["copy"], strict=True) for label, times in seconds.items() if label != "copy"}
    return {label: statistics.median(ours / copy for ours, copy in both) for label, both in pairs.items()}


def measure_two_threads(rounds: int) -> dict[str, dict[str, float]]:
    """How many times faster two threads are, by the clock on the wall, and how many times as much of the CPU they take.

    The best of many turns of each, not the median: what else a core does slows two threads down more often than one.
    """
    x = torch.from_numpy(heavy_tailed(0, 4096, 4096))
    columns = torch.from_numpy(importance(0, 4096))
    wall = {(name, threads): float("inf") for name in TWO_THREADS for threads in (1, 2)}
    cpu = dict(wall)
    for _ in range(rounds):
        for name, threads in wall:
            start = time.perf_counter(), time.process_time()
            quantize(x, name, columns, threads=threads)
            wall[name, threads] = min(wall[name, threads], time.perf_counter() - start[0])
            cpu[name, threads] = min(cpu[name, threads], time.process_time() - start[1])
    return {
        "faster": {name: wall[name, 1] / wall[name, 2] for name in TWO_THREADS},
        "cpu": {name: cpu[name, 2] / cpu[name, 1] for name in TWO_THREADS},
    }


def our_quantizer(kernels: str) -> Quantizer:
    def run(x: Floats, name: str, columns: Floats | None) -> NDArray[np.uint8]:
        os.environ["MOECAST_KERNELS"] = kernels
        return quantize(x, name, columns, threads=1)

    return run


def ggml_quantizer(library: CDLL) -> Quantizer:
    library.ggml_quantize_chunk.restype = c_size_t
    library.ggml_quantize_chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]

    def run(x: Floats, name: str, columns: Floats | None) -> NDArray[np.uint8]:
        format = format_named(name)
        result = np.empty((len(x), format.row_bytes(x.shape[1])), np.uint8)
        weights = None if columns is None else columns.ctypes.data
        library.ggml_quantize_chunk(format.id, x.ctypes.data, result.ctypes.data, 0, *x.shape, weights)
        return result

    return run


def compiled_ggml(cache: Path) -> CDLL | None:
    """ggml-base compiled for this machine, or None (saying why) without a compiler."""
    target = cache / f"{LLAMA_CPP}-{os.uname().machine}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            compile_ggml(cache, target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"measuring xllamacpp alone: no natively compiled ggml ({error})", file=sys.stderr)
            return None
    return CDLL(str(target))


def compile_ggml(cache: Path, target: Path) -> None:
    archive = cache / f"{LLAMA_CPP}.tar.gz"
    if not archive.exists():
        requirement = LLAMA_CPP.replace("_", "-").replace("python-", "python==")
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*download, "--dest", cache, requirement], check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    folder = cache / LLAMA_CPP / "vendor" / "llama.cpp" / "ggml"
    (folder / "src" / "ggml-version.h").write_text('#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n')
    flags = ["-O3", "-march=native", "-fPIC", "-D_GNU_SOURCE", f"-I{folder / 'include'}", f"-I{folder / 'src'}"]
    objects = []
    for source in SOURCES:
        objects.append(cache / f"{source}.o")
        compiler = "cc" if source.endswith(".c") else "c++"
        subprocess.run([compiler, *flags, "-c", folder / "src" / source, "-o", objects[-1]], check=True)
    subprocess.run(["c++", "-shared", *objects, "-o", target], check=True)


if __name__ == "__main__":
    main()
