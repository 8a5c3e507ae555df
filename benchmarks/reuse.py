"""CPU time of a conversion with one changed role, anew and with what an earlier file has.

    python benchmarks/reuse.py

The example has few weights, so that calibration on all of the bundled text takes 25 times as long as their rounding:
here it is on eight chunks.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from moecast.convert import Calibration, Goal, Output, convert, write_imatrix
from moecast.runner import Compute
from moecast.runner.texts import CALIBRATION_TEXT

CHECKPOINT = Path(__file__).parents[1] / "examples" / "minimax-m2-tiny"
EARLIER = Goal("IQ4_XS")
CHANGED = replace(EARLIER, tensor_types=(("ffn_down_exps", "Q8_0"),))
CHUNKS = 8
TIMES = 3


def cpu_seconds(folder: Path, calibration: Calibration, reuse: Path | None) -> float:
    """The least of several conversions."""
    seconds = []
    for _ in range(TIMES):
        started = time.process_time()
        output = Output(folder / "changed.gguf", overwrite=True, reuse=reuse)
        convert(CHECKPOINT, output, CHANGED, calibration=calibration, evaluation=None, compute=Compute(threads=1))
        seconds.append(time.process_time() - started)
    return min(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, earlier = Path(name), Path(name, "earlier.gguf")
        matrix = folder / "imatrix.gguf"
        write_imatrix(CHECKPOINT, matrix)
        ways = {
            "importance matrix": Calibration(text=None, imatrix=matrix),
            "calibration": Calibration(CALIBRATION_TEXT, chunks=CHUNKS),
            "error feedback": Calibration(CALIBRATION_TEXT, chunks=CHUNKS, error_feedback=True),
        }
        print("| weighed by | anew | with --reuse | ratio |\n|---|---|---|---|")
        for way, calibration in ways.items():
            convert(CHECKPOINT, Output(earlier, overwrite=True), EARLIER, calibration=calibration, evaluation=None)
            anew, again = (cpu_seconds(folder, calibration, reuse) for reuse in (None, earlier))
            print(f"| {way} | {anew:.2f} s | {again:.2f} s | {anew / again:.2f} |", flush=True)


if __name__ == "__main__":
    main()
