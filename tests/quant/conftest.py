"""One thread for all tests here: quantizing a few rows is many small steps, and a second thread costs more in
waiting than it brings.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moecast.quant.formats import native


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=dict.fromkeys((native.paths()[0], native.TORCH)))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What quantizes and reads: the best kernels of this machine, or torch."""
    monkeypatch.setenv("MOECAST_KERNELS", request.param)
    return str(request.param)
