"""Fetching from a Hub with the real client's settings, against a loopback server."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from hub_checkpoint import (
    INDEX,
    NEEDED,
    REPOSITORY,
    SHARDS,
    names,
    same,
    source,
    write_checkpoint,
)
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir
from moecast.progress import NoProgress
from moecast.sources.checkpoint import read_tensors
from moecast.sources.hub.repository import HubCheckpoint, fetch, list_files
from moecast.sources.hub.transfer import Meter
from safetensors.numpy import save_file


def test_listing_names_what_a_conversion_needs(server: HubServer, checkpoint: Path) -> None:
    listing = list_files(source(server))
    assert listing.commit == server.commit
    assert {file.name for file in listing.files} == NEEDED
    assert listing.bytes == sum((checkpoint / name).stat().st_size for name in NEEDED)
    in_lfs = {file.name for file in listing.files if file.sha256}
    assert in_lfs == {"tokenizer.json", *SHARDS}
    assert [request.path.rpartition("/")[2] for request in server.bodies()] == [INDEX]


def test_fetched_snapshot_is_what_the_client_itself_would_have_stored(server: HubServer, checkpoint: Path) -> None:
    folder = fetch(source(server))
    assert names(folder) == NEEDED
    assert same(folder, checkpoint)
    assert {tensor.name for tensor in read_tensors(folder)} == {"weight.0", "weight.1"}
    api = HfApi(endpoint=server.endpoint)
    verification = api.verify_repo_checksums(REPOSITORY, revision=server.commit)
    assert (verification.checked_count, verification.mismatches) == (len(NEEDED), [])
    for revision in ("main", server.commit):
        cached = hf_hub_download(REPOSITORY, SHARDS[0], revision=revision, local_files_only=True)
        assert Path(cached) == folder / SHARDS[0]
    scan = scan_cache_dir(constants.HF_HUB_CACHE)
    assert (scan.warnings, scan.incomplete_files) == ([], frozenset())


def test_second_fetch_reads_no_file(server: HubServer) -> None:
    first = fetch(source(server))
    fetched = len(server.bodies())
    assert fetch(source(server)) == first
    assert len(server.bodies()) == fetched == len(NEEDED)


def test_files_that_the_client_cached_are_used(server: HubServer) -> None:
    hf_hub_download(REPOSITORY, SHARDS[0], endpoint=server.endpoint)
    fetch(source(server))
    assert len(server.bodies(SHARDS[0])) == 1


def test_single_file_without_index(tmp_path: Path) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": numpy.zeros(4)}, folder / "model.safetensors")
    with HubServer(folder) as server:
        assert names(fetch(source(server))) == {"config.json", "model.safetensors"}


def test_one_file_at_a_time(server: HubServer, tmp_path: Path) -> None:
    checkpoint = HubCheckpoint(source(server), folder=tmp_path / "scratch")
    shard = next(file for file in checkpoint.listing.files if file.name == SHARDS[1])
    assert checkpoint.fetch_file(shard, Meter(None, shard.bytes)) == tmp_path / "scratch" / SHARDS[1]
    assert [len(server.bodies(name)) for name in SHARDS] == [0, 1]


def test_a_push_during_the_download_does_not_mix_versions(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    newer = write_checkpoint(tmp_path / "newer", seed=1)
    server.fail(INDEX, Fault(before=lambda: server.push(newer)))
    before = server.commit
    folder = fetch(source(server))
    assert server.commit != before
    assert folder.name == before
    assert same(folder, checkpoint)
    assert same(fetch(source(server)), newer)
    assert same(fetch(source(server), revision=before), checkpoint)


def test_into_a_folder(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "output", seed=1)  # another model, with files of the same names and sizes
    assert fetch(source(server), folder=folder) == folder
    assert same(folder, checkpoint)
    assert names(folder) == NEEDED
    assert not (tmp_path / "cache" / "models--tiny--moe" / "blobs").exists()
    fetched = len(server.bodies())
    fetch(source(server), folder=folder)
    assert len(server.bodies()) == fetched


def test_without_symbolic_links_nothing_is_stored_twice(
    server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    folder = fetch(source(server))
    assert same(folder, checkpoint)
    (folder / SHARDS[0]).write_bytes(b"truncated")
    assert same(fetch(source(server)), checkpoint)
    assert not names(folder.parent.parent / "blobs")


class Watcher(NoProgress):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.total = 0
        self.advances: list[tuple[int, str]] = []

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        assert unit == "bytes"
        self.total = total

    def advance(self, amount: int, detail: str = "") -> None:
        self.advances.append((amount, detail))


def test_progress_counts_every_byte_and_the_client_draws_nothing(
    server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = Watcher()
    fetch(source(server), progress=watcher)
    total = list_files(source(server)).bytes
    assert watcher.total == sum(amount for amount, _ in watcher.advances) == total
    assert all(amount >= 0 for amount, _ in watcher.advances)
    assert {file for _, file in watcher.advances} == NEEDED
    assert len(watcher.advances) > len(NEEDED) + 2 * len(SHARDS)
    assert capfd.readouterr() == ("", "")
