"""A published checkpoint, a Hub that serves it, and a private cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_checkpoint import write_checkpoint
from hub_server import HubServer
from huggingface_hub import constants
from moecast.sources.hub.transfer import Watch


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "published")
    for name in ("tokenizer.d", "docs", "additional_chat_templates/older"):
        (folder / name).mkdir()
    unwanted = (
        "pytorch_model.bin",
        "weights.pt",
        "modeling.py",
        "stray.safetensors",
        "docs/README.md",
        "additional_chat_templates/older/tools.jinja",
        "additional_chat_templates/README.md",
        "tokenizer.d/extra.json",
    )
    for name in unwanted:
        (folder / name).write_text("not for a conversion")
    return folder


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """A private cache, nobody logged in, small chunks, and sleeps that are noted instead of slept."""
    waits: list[float] = []
    monkeypatch.setattr(Watch, "pause", lambda watch, seconds: waits.append(seconds))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    return waits


@pytest.fixture
def server(checkpoint: Path) -> Iterator[HubServer]:
    with HubServer(checkpoint) as server:
        yield server
