"""A GPU beside the CPU: kernels, a layer of real width in little GPU memory, --size, perplexity.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--only kernels minimax-m2 ...]
    python benchmarks/gpu.py --device cpu --tiny

Runs unattended and without a network: checkpoints are of random numbers (real_shapes.py), with the vocabulary of the
tiny examples. Every part is a process of its own with its share of the time; one that fails or takes too long says so,
and the others go on. Figures of the CPU are of fewer experts, scaled to all. --tiny is to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from moecast.quant import dequantize, format_named, quantize
from moecast.quant.formats.devices import prepare
from moecast.quant.formats.table import Work
from moecast.quant.rounding.feedback import _coupling, _grid, _round, can_feed_back
from moecast.quant.rounding.moments import SecondMoments, products_of
from moecast.runner.measure.evaluate import perplexity as measure
from moecast.runner.settings import Compute, Evaluation
from real_shapes import BUILDERS, ROOT
from torch import Tensor

FORMATS = ("Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "Q3_K", "Q5_K", "Q8_0", "MXFP4", "IQ3_XXS", "IQ2_XXS", "Q4_0")
WORKS: tuple[Work, ...] = ("encode", "decode", "choose")
COLUMNS = 3072
CONTEXT = 512
VRAM = ("8GB", "22GB")
TINY = {"minimax-m2": "minimax-m2-tiny", "deepseek-v4-flash": "deepseek-v4-tiny"}
SHARES = {"kernels": 3.0, "minimax-m2": 5.0, "deepseek-v4-flash": 3.0, "size": 3.0, "perplexity": 1.0}  # of the time


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    device: str
    threads: int
    tiny: bool
    folder: Path

    @property
    def experts(self) -> int:
        return 16 if self.tiny else 256

    @property
    def cpu_experts(self) -> int:
        """Of a layer that the CPU is measured on: as many as a token goes to."""
        return 16 if self.tiny else 8

    def chunks(self, tokens: int) -> str:
        return str(4 if self.tiny else tokens // CONTEXT)

    def checkpoint(self, shape: str, layers: int, experts: int) -> Path:
        """One of random numbers, made when it is first wanted; or a tiny example."""
        if self.tiny:
            return ROOT / "examples" / TINY[shape]
        place = self.folder / f"{shape}-{layers}-{experts}"
        if not place.exists():
            started = time.monotonic()
            BUILDERS[shape](place, layers, experts)
            say(f"  (built {place.name}, {_bytes_in(place) / 1e9:.1f} GB, in {time.monotonic() - started:.0f} s)")
        return place


def say(line: str) -> None:
    print(line, flush=True)


def kernels(bench: Bench) -> None:
    """Encode, decode and choose (encode with error feedback within a block) of each format, in billions of weights a
    second; and whether all bytes are equal."""
    device, cpu = torch.device(bench.device), torch.device("cpu")
    counts = {cpu: 64 if bench.tiny else 4096} | {device: 64 if bench.tiny else 32768}
    values = torch.randn(counts[device], COLUMNS, generator=torch.Generator().manual_seed(0))
    for name in FORMATS:  # each in a thread of its own
        for work in WORKS if can_feed_back(name) else WORKS[:2]:
            prepare(work, [format_named(name)], device)
    say("| format | work | device, G weights/s | CPU, G weights/s | times | same bytes |\n|---|---|---:|---:|---:|---|")
    for name in FORMATS:
        works = {place: _works(name, values[:count].to(place), bench.threads) for place, count in counts.items()}
        for work in works[device]:
            timed = [(place, *_timed(works[place][work], place)) for place in (device, cpu)]
            speeds = [counts[place] * COLUMNS / seconds / 1e9 for place, seconds, _ in timed]
            found, expected = (result[: counts[cpu]].cpu().contiguous().view(torch.uint8) for *_, result in timed)
            share = float((found == expected).double().mean())
            same = "all" if share == 1 else f"{share:.3%}"
            say(f"| {name} | {work} | {speeds[0]:.2f} | {speeds[1]:.3f} | {speeds[0] / speeds[1]:.1f} | {same} |")


def _works(name: str, rows: Tensor, threads: int) -> dict[str, Callable[[], Tensor]]:
    """What kernels do with a format, each giving something of so many rows."""
    format = format_named(name)
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = quantize(rows, name, importance, threads)
    works: dict[str, Callable[[], Tensor]] = {
        "encode": lambda: quantize(rows, name, importance, threads),
        "decode": lambda: dequantize(data, name, threads),
    }
    if can_feed_back(name):
        inputs = torch.randn(2048, format.block_size, generator=torch.Generator().manual_seed(2))
        means = SecondMoments(products_of(inputs)[None] / len(inputs), [len(inputs)])
        cholesky = means.cholesky(format.block_size)
        triangle, weights = cholesky.blocks[0].to(rows.device), cholesky.weights[0]
        weights = None if weights is None else weights.to(rows.device)
        blocks = rows.reshape(1, -1, format.block_size)
        errors = torch.empty_like(blocks)

        def choose() -> Tensor:
            coupling = _coupling(triangle, weights, _grid(name).group)
            return _round(name, blocks, None, coupling, errors, threads)[0].reshape(len(rows), -1)

        works["choose"] = choose
    return works


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Median seconds of some runs after a first one."""
    result, times = work(), []
    for _ in range(3):
        _wait(device)
        started = time.monotonic()
        result = work()
        _wait(device)
        times.append(time.monotonic() - started)
    return sorted(times)[1], result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layer(bench: Bench, shape: str, layers: int) -> None:
    """Layers with error feedback and verification, in little GPU memory; on the CPU, of fewer experts."""
    say("| | experts | seconds | peak of the GPU, GB | read, GB/s | mean KLD |\n|---|---:|---:|---:|---:|---:|")
    source = bench.checkpoint(shape, layers, bench.experts)
    options = ("--quant", "Q4_K_M", "--error-feedback", *_texts(bench))
    for vram in VRAM:
        _row(bench, f"{bench.device}, --vram {vram}", source, bench.experts, *options, "--vram", vram)
    few = bench.checkpoint(shape, layers, bench.cpu_experts)
    seconds = _row(bench, "CPU", few, bench.cpu_experts, *options, device="cpu")
    say(f"| CPU, scaled to all experts | {bench.experts} | {seconds * bench.experts / bench.cpu_experts:.0f} | | | |")


def size(bench: Bench) -> None:
    """--size measured on four layers, against the plain conversion of the same."""
    layers = 1 if bench.tiny else 4
    experts = bench.experts if bench.tiny else bench.experts // 4
    source = bench.checkpoint("minimax-m2", layers, experts)
    say("| | experts | seconds | peak of the GPU, GB | read, GB/s | mean KLD |\n|---|---:|---:|---:|---:|---:|")
    plain = _row(bench, "plain", source, experts, "--quant", "Q4_K_M", "--error-feedback", *_texts(bench))
    target = str(int(_bytes_in(source) * 0.55))
    measured = _row(bench, "--size, measured", source, experts, "--size", target, *_texts(bench))
    say(f"\n--size takes {measured / plain:.1f} times as long as the plain conversion, of {experts} experts a layer.")


def perplexity(bench: Bench) -> None:
    """Tokens per second, the second time."""
    source = bench.checkpoint("minimax-m2", 1, bench.cpu_experts)
    chunks = max(2, int(bench.chunks(16384)))
    say("| | tokens per second |\n|---|---:|")
    for device in dict.fromkeys((bench.device, "cpu")):
        for dtype in ("float32", "bfloat16"):
            for _ in range(2):
                started = time.monotonic()
                measure(source, Evaluation(context=CONTEXT, chunks=chunks), Compute(dtype, device=device))
                seconds = time.monotonic() - started
            say(f"| {device}, {dtype} | {chunks * CONTEXT / seconds:.0f} |")


def _texts(bench: Bench) -> tuple[str, ...]:
    """16k tokens to calibrate on, 8k to evaluate on."""
    return ("--calibration-chunks", bench.chunks(16384), "--chunks", bench.chunks(8192), "-c", str(CONTEXT))


def _row(bench: Bench, name: str, source: Path, experts: int, *options: str, device: str | None = None) -> float:
    """Convert, print a line, return the seconds that it took."""
    output = bench.folder / "made.gguf"
    command = ["convert", str(source), "-o", str(output), "--overwrite", "--json", "--threads", str(bench.threads)]
    with _moecast(bench, [*command, "--device", device or bench.device, *options]) as run:
        result = run.wait()
    seconds = float(result["seconds"])
    parity = result["parity"]["mean_kld"] if result.get("parity") else float("nan")
    speed = _bytes_in(source) / seconds / 1e9
    say(f"| {name} | {experts} | {seconds:.1f} | {run.peak / 1e9:.2f} | {speed:.2f} | {parity:.4f} |")
    return seconds


class Run:
    """A command of ours in a process of its own, whose GPU memory is watched."""

    def __init__(self, command: list[str], watched: bool) -> None:
        self.peak = 0
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in wait
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self._ended = Event()
        self._watcher = Thread(target=self._watch, daemon=True)
        if watched:
            self._watcher.start()

    def wait(self) -> dict[str, Any]:
        printed, _ = self._process.communicate()
        self._log.seek(0)
        log = self._log.read()
        self._log.close()
        if self._process.returncode:
            raise RuntimeError(f"moecast exits with {self._process.returncode}: {log[-1500:]}")
        found: dict[str, Any] = json.loads(printed)
        return found

    def end(self) -> None:
        self._ended.set()
        if self._process.poll() is None:
            self._process.kill()

    def _watch(self) -> None:
        before = _used()
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, _used() - before)


@contextmanager
def _moecast(bench: Bench, arguments: list[str]) -> Iterator[Run]:
    run = Run([sys.executable, "-m", "moecast.cli", *arguments], watched=bench.device.startswith("cuda"))
    try:
        yield run
    finally:
        run.end()


def _used() -> int:
    """Bytes of the GPU's memory that are taken, by whoever took them."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


RUNS: dict[str, Callable[[Bench], None]] = {
    "kernels": kernels,
    "minimax-m2": lambda bench: layer(bench, "minimax-m2", 1),
    "deepseek-v4-flash": lambda bench: layer(bench, "deepseek-v4-flash", 1),
    "size": size,
    "perplexity": perplexity,
}


def _all_parts(options: argparse.Namespace) -> None:
    """Each part in a process of its own."""
    parts = options.only or [*RUNS]
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, part in enumerate(parts):
            share = SHARES[part] / sum(SHARES[left] for left in parts[number:])
            limit = max(5.0, share * (end - time.monotonic()))
            say(f"\n## {part}: {(RUNS[part].__doc__ or layer.__doc__ or '').strip()}\n")
            command = [sys.executable, __file__, "--part", part, "--folder", folder, "--device", options.device]
            command += ["--threads", str(options.threads), *(["--tiny"] if options.tiny else [])]
            started = time.monotonic()
            # In a group of its own, so that what it has started ends with it.
            with subprocess.Popen(command, start_new_session=True) as run:
                try:
                    if run.wait(limit):
                        say(f"\n{part} failed, see above")
                except subprocess.TimeoutExpired:
                    os.killpg(run.pid, 9)
                    say(f"\n{part} was stopped after its {limit:.0f} s")
            say(f"\n({part} took {time.monotonic() - started:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1), help="of the CPU")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=[*RUNS])
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; 20 GB are enough")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=[*RUNS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(options.threads)
        RUNS[options.part](Bench(options.device, options.threads, options.tiny, options.folder))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    say(f"GPU: {name}; torch {torch.__version__}; {options.threads} CPU threads; --device {options.device}")
    _all_parts(options)


if __name__ == "__main__":
    main()
