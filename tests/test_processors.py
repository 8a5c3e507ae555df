"""The numeric tests once more as on older processors: bounds hold whatever instructions torch multiplies with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROCESSORS = {
    "without AVX": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "with AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these variables are for x86-64")
def test_numbers_keep_their_bounds(tmp_path: Path) -> None:
    """Side by side, as the last of the slow tests: each takes minutes. Pieces of a text are the same products again."""
    command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow and not whole", "-p", "no:cacheprovider"]
    command += ["-k", "not pieces and not steps"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    running = {}
    for number, (processor, variables) in enumerate(PROCESSORS.items()):
        environment = plain | {"OMP_NUM_THREADS": "1"} | variables
        arguments = [*command, "--basetemp", str(tmp_path / f"base-{number}")]
        output = (tmp_path / f"output-{number}.txt").open("w+")
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        running[processor] = process, output
    codes = {processor: process.wait() for processor, (process, _) in running.items()}
    for processor, (_, output) in running.items():
        with output:
            output.seek(0)
            assert codes[processor] == 0, f"{processor}:\n{output.read()[-10_000:]}"
