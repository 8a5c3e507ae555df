"""What reading ahead and writing behind save: one conversion with and without buffers, on simulated disks.

    python benchmarks/overlap.py [--experts 16] [--read 200] [--write 100] [--runs 3]

A layer of MiniMax M2's shape (real_shapes.py) is converted to Q4_K, alone and with texts that run through it. The
source's disk gives so many MB/s, and the output's takes so many, to one reader or writer at a time: who reads or writes
sleeps for as long as that takes. Runs with and without buffers alternate; the ratio of their medians is what counts,
because all else that a machine does slows down both. The last lines are for the disks as they are.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import moecast.convert.gguf.writer
import moecast.sources.storage
from moecast.convert import NO_CALIBRATION, Calibration, convert
from moecast.convert.settings import Output
from moecast.runner import memory
from moecast.runner.activations import BUFFER_BYTES, Workspace
from moecast.runner.settings import Evaluation
from real_shapes import BUILDERS

TEXTS: dict[str, dict[str, Any]] = {
    "alone": {"calibration": NO_CALIBRATION, "evaluation": None},
    "with texts": {"calibration": Calibration(context=512, chunks=2), "evaluation": Evaluation(chunks=1)},
}


def throttled(call: Callable[..., Any], rate: float) -> Callable[..., Any]:
    """`read_at` or `write_at` of a disk that moves `rate` bytes a second for one caller at a time."""
    arm = threading.Lock()

    def slow(descriptor: int, view: memoryview, position: int) -> Any:
        with arm:
            ends = time.monotonic() + view.nbytes / rate
            result = call(descriptor, view, position)
            time.sleep(max(0.0, ends - time.monotonic()))
        return result

    return slow


@contextmanager
def disks(read: float | None, write: float | None) -> Iterator[None]:
    """Disks of so many MB/s, None for those that are there."""
    source, output = moecast.sources.storage, moecast.convert.gguf.writer
    reading = throttled(source.read_at, read * 1e6) if read else source.read_at
    writing = throttled(output.write_at, write * 1e6) if write else output.write_at
    with patch.object(source, "read_at", reading), patch.object(output, "write_at", writing):
        yield


def seconds(folder: Path, buffer: int, options: dict[str, Any]) -> float:
    """How long a conversion takes."""
    started = time.monotonic()
    with patch.object(memory, "Workspace", partial(Workspace, buffer=buffer)):
        convert(folder / "model", Output(folder / "out.gguf", overwrite=True), "Q4_K_S", **options)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--read", type=float, default=200, help="MB/s of the source's disk")
    parser.add_argument("--write", type=float, default=100, help="MB/s of the output's disk")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        BUILDERS["minimax-m2"](folder / "model", 1, options.experts)
        print("| disks | conversion | without | with | ratio |\n|---|---|--:|--:|--:|")
        for rates in ((options.read, options.write), (None, None)):
            for kind, texts in TEXTS.items():
                found: dict[int, list[float]] = {0: [], BUFFER_BYTES: []}
                with disks(*rates):
                    for _ in range(options.runs):
                        for buffer, times in found.items():
                            times.append(seconds(folder, buffer, texts))
                without, beside = map(median, found.values())
                disk = f"{rates[0]:g} and {rates[1]:g} MB/s" if rates[0] else "as they are"
                print(f"| {disk} | {kind} | {without:.1f} s | {beside:.1f} s | {beside / without:.2f} |", flush=True)


if __name__ == "__main__":
    main()
