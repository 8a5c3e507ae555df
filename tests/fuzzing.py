"""What fuzz tests share: whole files to damage, and bounds on what no input may do, ten seconds and a gigabyte."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from moecast.errors import BadInput, Interrupted

EXAMPLES = Path(__file__).parent.parent / "examples"
FAMILIES = sorted(path.name for path in EXAMPLES.glob("*-tiny"))
SECONDS = 10  # of the processor, whatever else it does
CLOCK_SECONDS = 120  # what only waits takes none of those
BYTES = 1 << 30


@dataclass(frozen=True)
class Samples:
    """A folder of whole files, and the checkpoint that they were made of."""

    checkpoint: Path
    gguf: Path
    families: tuple[Path, ...]
    split: Path
    plan: Path
    imatrix: tuple[Path, Path]
    onnx: Path


def linked(source: Path, folder: Path, *own: str) -> Path:
    """A folder with links to the files of another, and copies of those that will be damaged."""
    copy = folder / source.name
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (shutil.copyfile if file.name in own else os.symlink)(file, copy / file.name)
    return copy


@contextmanager
def bounded(seconds: int = SECONDS) -> Iterator[None]:
    """Time of the processor and memory of the block are bounded: TimeoutError and MemoryError are raised beyond."""
    resource: Any = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, CLOCK_SECONDS))
    previous = {number: signal.signal(number, _late) for number, _, _ in timers}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    for _, timer, most in timers:
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def refuses_or_reads(action: Callable[[], object]) -> bool:
    """Whether an input is read; if not, it is refused in a line. Anything else is raised."""
    with bounded():
        try:
            action()
        except (BadInput, Interrupted) as error:
            assert str(error).strip()
            return False
    return True


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no answer in time: {CLOCK_SECONDS} seconds of the clock, or fewer of the processor")
