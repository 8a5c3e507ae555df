"""What quantizes in the tests here."""

from __future__ import annotations

import pytest
from moecast.quant.formats import native


@pytest.fixture(params=dict.fromkeys((native.paths()[0], native.TORCH)))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What quantizes and reads: the best kernels of this machine, or torch."""
    monkeypatch.setenv("MOECAST_KERNELS", request.param)
    return str(request.param)
