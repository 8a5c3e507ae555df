"""How fast this machine reads its memory, which bounds the speed of decoding."""

from __future__ import annotations

import time
from functools import cache

import torch

_VALUES = 1 << 26  # float32: four times what the largest caches hold
_TURNS = 4


@cache
def memory_bandwidth() -> float:
    """Bytes a second that all threads together read: the best of some sums, measured when first asked for."""
    values = torch.ones(_VALUES, device="cpu")
    best = float("inf")
    for _ in range(_TURNS):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best
