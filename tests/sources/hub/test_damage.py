"""Damaged files, and refusals in one line that says what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hub_checkpoint import (
    INDEX,
    NEEDED,
    REPOSITORY,
    SENTINEL,
    SHARDS,
    flipped,
    names,
    refusal,
    same,
    source,
)
from hub_server import Fault, HubServer
from huggingface_hub import constants
from moecast.errors import Interrupted
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.connection import Connection
from moecast.sources.hub.repository import fetch, list_files


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_wrong_bytes_are_never_stored(server: HubServer, checkpoint: Path, tmp_path: Path, name: str) -> None:
    server.fail(name, Fault(content=flipped(checkpoint / name)), times=2)
    message = refusal(server)
    assert name in message
    assert "damaged" in message
    listing = {file.name: file for file in list_files(source(server)).files}
    stored = names(tmp_path / "cache" / "models--tiny--moe" / "blobs")
    assert not any(blob.startswith(listing[name].checksum) for blob in stored)
    assert same(fetch(source(server)), checkpoint)


@pytest.mark.parametrize("damage", ["flipped", "short", "long"])
def test_damage_that_happens_once_is_repaired(server: HubServer, checkpoint: Path, damage: str) -> None:
    content = flipped(checkpoint / SHARDS[0])
    server.fail(SHARDS[0], Fault(content={"flipped": content, "short": content[:-9], "long": content + b"!"}[damage]))
    assert same(fetch(source(server)), checkpoint)


def test_a_file_that_changes_between_attempts_is_fetched_afresh(server: HubServer, checkpoint: Path) -> None:
    other = bytes(reversed((checkpoint / SHARDS[0]).read_bytes()))
    server.fail(SHARDS[0], Fault(content=other, drop_after=len(other) // 2))
    assert same(fetch(source(server)), checkpoint)
    assert [request.range is None for request in server.bodies(SHARDS[0])] == [True, False, True]


def test_a_partial_file_longer_than_the_whole_is_dropped(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    shard = next(file for file in list_files(source(server)).files if file.name == SHARDS[0])
    partial = tmp_path / "cache" / "models--tiny--moe" / "blobs" / f"{shard.sha256}.incomplete"
    partial.write_bytes(bytes(shard.bytes + 1))
    assert same(fetch(source(server)), checkpoint)


def test_a_cached_file_of_the_wrong_size_is_replaced(server: HubServer, checkpoint: Path) -> None:
    folder = fetch(source(server))
    (folder / SHARDS[0]).resolve().write_bytes(b"truncated")
    assert same(fetch(source(server)), checkpoint)


def test_unknown_repository(server: HubServer) -> None:
    with pytest.raises(Interrupted, match=r"tiny/absent does not exist, or is private: check the name, or run"):
        fetch(HubSource("tiny/absent", endpoint=server.endpoint))


@pytest.mark.parametrize("revision", ["v9", "0123456789" * 4])
def test_unknown_revision(server: HubServer, revision: str) -> None:
    assert f"has no revision '{revision}'" in refusal(server, revision=revision)


@pytest.mark.parametrize("token", [None, "hf_without_access"])
def test_gated_repository(checkpoint: Path, token: str | None) -> None:
    with HubServer(checkpoint, gated=True) as server:
        message = refusal(server, **({"token": token} if token else {}))
        assert f"is gated: accept its terms at {server.endpoint}/tiny/moe, then run `hf auth login`" in message
        assert "HF_TOKEN" in message


def test_private_repository(checkpoint: Path) -> None:
    with HubServer(checkpoint, private=True, token=SENTINEL) as server:
        assert "is private" in refusal(server)
        assert "does not accept the access token" in refusal(server, token="hf_expired")
        assert same(fetch(source(server), token=SENTINEL), checkpoint)


def test_unreachable_hub() -> None:
    with pytest.raises(Interrupted, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        fetch(HubSource(REPOSITORY, endpoint="http://127.0.0.1:9"))


def test_something_else_than_a_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub_server._Handler._json", lambda self, value: self._head(200, {}, 0))
    assert "does not answer like a Hugging Face Hub" in refusal(server)


def test_no_safetensors(server: HubServer, checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()
    server.push(checkpoint)
    assert "holds neither model.safetensors.index.json nor model.safetensors" in refusal(server)


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/secret.safetensors", "absent.safetensors", "pytorch_model.bin", 7]
)
def test_an_index_that_names_other_files_is_refused(server: HubServer, checkpoint: Path, shard: object) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"weight.0": SHARDS[0], "weight.1": shard}}))
    server.push(checkpoint)
    message = refusal(server)
    assert INDEX in message
    assert repr(shard) in message
    assert not server.bodies(SHARDS[0])


def test_a_name_that_leads_out_of_the_folder_on_windows_is_not_fetched(server: HubServer, checkpoint: Path) -> None:
    (checkpoint / "tokenizer\\..\\..\\evil.json").write_text("{}")
    server.push(checkpoint)
    assert names(fetch(source(server))) == NEEDED


def test_a_disk_that_is_too_small_is_noticed_before_the_download(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert "0.0 GB are free: make room" in refusal(server)
    assert not server.bodies(SHARDS[0])


def test_a_disk_that_fills_up(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Connection, "receive", full)
    assert refusal(server).startswith("the disk is full")


def test_a_folder_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Interrupted, match=r"/file cannot be written: File exists"):
        fetch(source(server), folder=tmp_path / "file")


def test_a_file_too_large_for_plain_http(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 100_000)
    assert f"run `hf download {REPOSITORY}` first" in refusal(server)
