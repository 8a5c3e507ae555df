"""What a conversion made: files, their size, how they compare with the source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import peak_rss_bytes
from ..quant.planning.plan import Plan
from ..runner.measure.evaluate import Parity


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        files: the finished files, in split order.
        bytes: their size together.
        bits_per_weight: size of the weights alone.
        parity: the comparison with the source, None when verification was skipped.
        problems: what the plan warned about.
        peak_rss_bytes: this process's largest resident memory so far.
    """

    files: tuple[Path, ...]
    bytes: int
    bits_per_weight: float
    parity: Parity | None
    problems: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int

    @classmethod
    def of(cls, files: Sequence[Path], plan: Plan, started: float, parity: Parity | None = None) -> Conversion:
        """The conversion to finished `files` that began when `time.monotonic()` was `started`."""
        return cls(
            files=tuple(files),
            bytes=sum(file.stat().st_size for file in files),
            bits_per_weight=plan.bits_per_weight,
            parity=parity,
            problems=plan.problems,
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )
