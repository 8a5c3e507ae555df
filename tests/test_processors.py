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
@pytest.mark.parametrize("variables", PROCESSORS.values(), ids=PROCESSORS)
def test_numbers_keep_their_bounds(variables: dict[str, str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | variables
    command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow and not whole", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "--basetemp", tmp_path / "base"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-10_000:]
