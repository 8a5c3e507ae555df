"""A small checkpoint as somebody publishes it, and what tests of fetching it have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hub_server import HubServer
from moecast.errors import MoecastError
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.repository import fetch
from safetensors.numpy import save_file

SHARDS = ("model-00000-of-00130.safetensors", "model-00001-of-00130.safetensors")  # numbered as badly as MiniMax M2.7
INDEX = "model.safetensors.index.json"
NEEDED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX,
    "additional_chat_templates/tools.jinja", "README.md", *SHARDS,
}  # fmt: skip
CHUNK = 1 << 14
SENTINEL = "hf_SentinelTokenThatNobodyMaySee"
REPOSITORY = "tiny/moe"
FETCH = f"""
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.repository import fetch
print(fetch(HubSource({REPOSITORY!r})))
"""


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    random = numpy.random.default_rng(seed)
    for number, shard in enumerate(SHARDS):
        save_file({f"weight.{number}": random.standard_normal((256, 256), dtype=numpy.float32)}, folder / shard)
    index = {"weight_map": {f"weight.{number}": shard for number, shard in enumerate(SHARDS)}}
    (folder / INDEX).write_text(json.dumps(index))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"name": name, "seed": seed}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def source(server: HubServer) -> HubSource:
    return HubSource(server.repository, endpoint=server.endpoint)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same(fetched: Path, published: Path) -> bool:
    return all((fetched / name).read_bytes() == (published / name).read_bytes() for name in NEEDED)


def refusal(server: HubServer, **options: str) -> str:
    """The one line that fetch refuses with."""
    with pytest.raises(MoecastError) as caught:
        fetch(source(server), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def environment(server: HubServer, tmp_path: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | variables  # fmt: skip


def run(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    return bytes(content)
