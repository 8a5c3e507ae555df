"""One pass against llama.cpp's chain: time, memory and disk for layers of real width.

    python benchmarks/one_pass.py --llama FOLDER --converter convert_hf_to_gguf.py [--layers 1] [--experts 32]
    python benchmarks/one_pass.py --shape deepseek-v4-flash --layers 3 --experts 256 --quant IQ3_XXS --memory 4GB

The checkpoint is one of random numbers (real_shapes.py): MiniMax M2's FP8 or V4-Flash's FP4, with as many layers and
experts as asked for and the vocabulary of the tiny example.

With --llama (the folder of llama.cpp's tools) and --converter (its script, for which the name of the text splitter is
supplied, because it refuses tokenizers that it does not know) both sides make the same: a quantized file, importance,
perplexity, KL divergence; ours by one command. Then come parts: conversion and quantization alone, and evaluation of
the quantized file. Without them, one command of ours alone fetches the checkpoint from a Hub on this machine, within
--memory and --scratch; once more with error feedback in its rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moecast.commands.options import Size
from real_shapes import BUILDERS, ROOT

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub_server import HubServer

CALIBRATION, EVALUATION = (ROOT / "examples" / "text" / name for name in ("calibration.txt", "evaluation.txt"))
MOECAST = [sys.executable, "-m", "moecast.cli"]
CONTEXT = 512
LONG_CHUNKS = 32  # to compare evaluations on: few tokens say more of reading weights than of multiplying with them
# Runs llama.cpp's converter on a tokenizer that is not in its list.
CONVERTER = """
import runpy, sys
from pathlib import Path
script = Path(sys.argv.pop(1))
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "minimax-m2"
runpy.run_path(str(script), run_name="__main__")
"""


@dataclass(frozen=True)
class Cost:
    """What a step took: seconds of the clock and of the processor, bytes that it read and wrote, peak memory, and by
    how much the folder grew at its peak."""

    name: str
    seconds: float
    processor_seconds: float
    read: int
    written: int
    peak_rss: int
    peak_disk: int

    def row(self) -> str:
        sizes = " | ".join(f"{size / 1e9:.2f}" for size in (self.read, self.written, self.peak_rss, self.peak_disk))
        return f"| {self.name} | {self.seconds:.1f} | {self.processor_seconds:.1f} | {sizes} |"


class Bench:
    """Runs commands in a folder; options that all of them share are attributes."""

    def __init__(self, folder: Path, quant: str, chunks: int, threads: int) -> None:
        self.folder, self.quant, self.chunks, self.threads = folder, quant, str(chunks), str(threads)
        self.costs: dict[str, Cost] = {}

    def run(self, name: str, command: list[str | Path], variables: Mapping[str, str] | None = None) -> None:
        """Run a command, looking at its counters and at the folder many times a second."""
        before = _bytes_in(self.folder)
        started, moved, memory, disk = time.monotonic(), (0, 0), 0, 0
        environment = {**os.environ, "OMP_NUM_THREADS": self.threads, **(variables or {})}
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(command, stdout=log, stderr=log, env=environment) as run,
        ):
            while True:
                moved = _moved(run.pid) or moved
                memory = max(memory, _peak_memory(run.pid))
                disk = max(disk, _bytes_in(self.folder) - before)
                ended, status, usage = os.wait4(run.pid, os.WNOHANG)
                if ended:
                    run.returncode = os.waitstatus_to_exitcode(status)
                    break
                time.sleep(0.05)
            seconds = time.monotonic() - started
            log.seek(0)
            printed = log.read()
        if run.returncode:
            sys.exit(f"{name} failed:\n{printed[-2000:]}")
        for line in printed.splitlines():
            if "KL" in line or "perplexity" in line.lower() or line.startswith("Final"):
                print(f"  {line.strip()}", file=sys.stderr)
        processor = usage.ru_utime + usage.ru_stime
        self.costs[name] = Cost(name, seconds, processor, *moved, memory, disk)
        print(self.costs[name].row(), file=sys.stderr, flush=True)

    def convert(self, name: str, source: str | Path, output: str, *options: str | Path, **variables: str) -> None:
        shared = ["--quant", self.quant, "--overwrite", "--threads", self.threads]
        self.run(name, [*MOECAST, "convert", source, "-o", self.folder / output, *shared, *options], variables)

    def evaluation(self, chunks: int | None = None) -> list[str | Path]:
        return ["-f", EVALUATION, "-c", str(CONTEXT), "--chunks", str(chunks or self.chunks)]

    def llama_flags(self) -> list[str]:
        """What makes llama.cpp fastest here: four chunks in a batch."""
        return ["-t", self.threads, "-b", str(4 * CONTEXT), "-ub", str(4 * CONTEXT)]

    def calibration(self) -> list[str | Path]:
        return ["--calibration", self.folder / "calibration.txt"]

    def together(self, name: str, steps: Iterable[str]) -> Cost:
        """Steps one after another, each of which leaves its file for the next."""
        costs = [self.costs[step] for step in steps]
        total = [sum(getattr(c, field) for c in costs) for field in ("seconds", "processor_seconds", "read", "written")]
        return Cost(name, *total, max(c.peak_rss for c in costs), sum(c.peak_disk for c in costs))


def ours(bench: Bench, source: Path) -> None:
    """The whole pass in both kinds of products, and its parts."""
    proof = [*bench.calibration(), *bench.evaluation(), "--imatrix-out", bench.folder / "imatrix-ours.gguf"]
    bench.convert("moecast convert", source, "ours.gguf", *proof)
    bench.convert("moecast convert, BF16 products", source, "ours.gguf", *proof, "--compute-dtype", "bfloat16")
    measured = ["--imatrix", bench.folder / "imatrix-ours.gguf", "--no-verify"]
    bench.convert("moecast convert --imatrix --no-verify", source, "ours.gguf", *measured)


def theirs(bench: Bench, source: Path, llama: Path, converter: Path) -> list[Cost]:
    """Their chain; the sums of all steps, and of those without calibration and proof."""
    before = set(bench.costs)
    full, imatrix, base = (bench.folder / name for name in ("bf16.gguf", "imatrix.gguf", "base.kld"))
    small = bench.folder / "small.gguf"
    perplexity = [llama / "llama-perplexity", *bench.evaluation(), *bench.llama_flags()]
    calibration = ["-f", bench.folder / "calibration.txt", "-c", str(CONTEXT), *bench.llama_flags()]
    convert = [sys.executable, "-c", CONVERTER, converter, source, "--outfile", full, "--outtype", "bf16"]
    bench.run("convert_hf_to_gguf.py", convert)
    bench.run("llama-imatrix", [llama / "llama-imatrix", "-m", full, "-o", imatrix, *calibration])
    quantize = [llama / "llama-quantize", "--imatrix", imatrix, full, small, bench.quant, bench.threads]
    bench.run("llama-quantize", quantize)
    bench.run("llama-perplexity of BF16", [*perplexity, "-m", full, "--kl-divergence-base", base])
    compare = ["--kl-divergence-base", base, "--kl-divergence"]
    bench.run("llama-perplexity --kl-divergence", [*perplexity, "-m", small, *compare])
    return [
        bench.together("their whole chain", bench.costs.keys() - before),
        bench.together("their conversion and quantization", ("convert_hf_to_gguf.py", "llama-quantize")),
    ]


def evaluation(bench: Bench, llama: Path) -> None:
    """Both on the same file of llama.cpp's."""
    small = bench.folder / "small.gguf"
    for dtype in ("float32", "bfloat16"):
        command = [*MOECAST, "perplexity", small, *bench.evaluation(LONG_CHUNKS), "--compute-dtype", dtype]
        bench.run(f"moecast perplexity of 16k tokens, {dtype}", command)
    command = [llama / "llama-perplexity", "-m", small, *bench.evaluation(LONG_CHUNKS), *bench.llama_flags()]
    bench.run("llama-perplexity of 16k tokens", command)


def alone(bench: Bench, source: Path, memory: int, scratch: int | None, dtype: str) -> None:
    """From a Hub on this machine, so that shards are fetched, used and dropped."""
    limits = ["--memory", str(memory), "--compute-dtype", dtype, *(["--scratch", str(scratch)] if scratch else [])]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(HubServer(source))
        home = stack.enter_context(tempfile.TemporaryDirectory())
        variables = {"HF_ENDPOINT": server.endpoint, "HF_HOME": home}
        proof = [*bench.calibration(), *bench.evaluation(), *limits]
        bench.convert("moecast convert", server.repository, "ours.gguf", *proof, **variables)
        fed_back = ("moecast convert --error-feedback", server.repository, "ours.gguf", "--error-feedback")
        bench.convert(*fed_back, *proof, **variables)


def _moved(pid: int) -> tuple[int, int] | None:
    """Bytes that a process has asked to read and to write so far; what it maps is not among them."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    counters = dict(line.split(": ") for line in lines)
    return int(counters["rchar"]), int(counters["wchar"])


def _peak_memory(pid: int) -> int:
    """The largest resident memory of a process so far; what wait4 reports would count the parent that forked it."""
    try:
        _, _, found = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")
    except OSError:
        return 0
    return int(found.split()[0]) * 1024 if found else 0


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder with llama.cpp's tools")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py, in its repository")
    parser.add_argument("--shape", choices=BUILDERS, default="minimax-m2")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 512 tokens to evaluate on")
    parser.add_argument("--calibration-bytes", type=int, default=12_000, help="how much of calibration.txt to use")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", type=lambda text: Size().convert(text, None, None), default=4 * 10**9)
    parser.add_argument("--scratch", type=lambda text: Size().convert(text, None, None))
    parser.add_argument("--compute-dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "source"
        BUILDERS[options.shape](source, options.layers, options.experts)
        text = CALIBRATION.read_text(encoding="utf-8")[: options.calibration_bytes]
        (folder / "calibration.txt").write_text(text, encoding="utf-8")
        bench = Bench(folder, options.quant, options.chunks, options.threads)
        sums: list[Cost] = []
        if options.llama:
            ours(bench, source)
            sums = theirs(bench, source, options.llama, options.converter)
            evaluation(bench, options.llama)
        else:
            alone(bench, source, options.memory, options.scratch, options.compute_dtype)
    print("| step | seconds | of the processor | GB read | GB written | peak memory, GB | disk, GB |")
    print("|---|---|---|---|---|---|---|")
    for cost in (*bench.costs.values(), *sums):
        print(cost.row())


if __name__ == "__main__":
    main()
