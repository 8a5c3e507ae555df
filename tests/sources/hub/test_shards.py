"""Streaming from a Hub: every number is right, the folder never holds more than allowed, faults end well."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import constants
from moecast.archs.expressions import TensorInfo
from moecast.errors import BadInput, Interrupted
from moecast.progress import NoProgress
from moecast.sources.hub import connection, shards
from moecast.sources.hub import transfer as hub_transfer
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.repository import HubCheckpoint
from moecast.sources.hub.shards import ShardStorage, fetch_on_demand, pass_over
from moecast.sources.model import Model, open_model
from safetensors.torch import load_file

SHARDS = 20
NAMES = [f"model-{shard:05d}-of-{SHARDS + 4:05d}.safetensors" for shard in range(SHARDS)]
ALL = 5_000_000  # bytes: more than all shards


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An example in many shards, in the order of names: embedding and head, then layer after layer."""
    folder = checkpoints.copied(checkpoints.EXAMPLES / "deepseek-v4-tiny", tmp_path_factory.mktemp("hub") / "source")
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    checkpoints.write_sharded(folder, tensors, SHARDS)
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with HubServer(source) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_transfer, "ATTEMPTS", 1)
    monkeypatch.setattr(hub_transfer.Watch, "pause", lambda watch, seconds: None)


def open_on_demand(checkpoint: HubCheckpoint, scratch: int | None, folder: Path) -> Model:
    model = open_model(checkpoint.folder, checkpoint.read_headers())
    fetch_on_demand(model, checkpoint, scratch, folder)
    return model


def _checkpoint(server: HubServer) -> HubCheckpoint:
    return HubCheckpoint(HubSource("tiny/moe", endpoint=server.endpoint))


def _on_disk(folder: Path) -> int:
    """Bytes of all files of a folder, whole and growing ones."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


@contextmanager
def _watched(folder: Path) -> Iterator[list[int]]:
    """The most that the folder held at any of very many looks, in a list of one."""
    peak, stop, wait = [0], threading.Event(), time.monotonic

    def look() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _on_disk(folder))
            wait()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _read_all(model: Model, source: Path) -> None:
    """Every tensor in the order of a pass, compared with the local file's."""
    names = {tensor.name: tensor for tensor in model.tensors}
    with closing(open_model(source)) as local:
        expected = {tensor.name: tensor for tensor in local.tensors}
        for step in pass_over(model.graph):
            for name in step:
                assert torch.equal(model.storage.read(names[name]), local.storage.read(expected[name]))


def _largest_step(model: Model, source: Path) -> int:
    shard_of = {tensor.name: tensor.file for tensor in model.tensors}
    shards = [{shard_of[name] for name in step} for step in pass_over(model.graph)]
    return max(sum((source / shard).stat().st_size for shard in step) for step in shards)


def test_within_the_smallest_scratch(server: HubServer, source: Path, tmp_path: Path) -> None:
    """The largest layer decides the floor; a shard that is needed at both ends is fetched twice, the others once."""
    folder = tmp_path / "shards"
    with closing(open_model(source)) as local, closing(open_on_demand(_checkpoint(server), None, folder)) as model:
        scratch = _largest_step(model, source)
        assert scratch < ALL / 2
        assert model.storage.scratch == 2 * scratch
        headers = {tensor.name: (tensor.offset, tensor.length) for tensor in model.tensors}
        assert headers == {tensor.name: (tensor.offset, tensor.length) for tensor in local.tensors}
    with closing(open_on_demand(_checkpoint(server), scratch, folder)) as model:
        before = {name: len(server.bodies(name)) for name in NAMES}
        with _watched(folder) as peak:
            _read_all(model, source)
        fetched = [len(server.bodies(name)) - before[name] for name in NAMES]
    assert scratch / 2 < peak[0] <= scratch
    assert sorted(fetched) == [1] * (SHARDS - 1) + [2]


def test_with_room_for_all_every_shard_comes_once(server: HubServer, source: Path, tmp_path: Path) -> None:
    with closing(open_on_demand(_checkpoint(server), ALL, tmp_path / "shards")) as model:
        before = {name: len(server.bodies(name)) for name in NAMES}
        _read_all(model, source)
        _read_all(model, source)  # a second pass may have to fetch again what the first had dropped
        counts = [len(server.bodies(name)) - before[name] for name in NAMES]
        assert min(counts) >= 1 and max(counts) <= 2


def test_too_little_scratch_names_the_floor(server: HubServer, source: Path, tmp_path: Path) -> None:
    floor = _largest_step(open_on_demand(_checkpoint(server), None, tmp_path / "a"), source)
    with pytest.raises(BadInput, match=f"needs shards of {floor / 1e9:.6g} GB at once: give at least that"):
        open_on_demand(_checkpoint(server), floor - 1, tmp_path / "b")


def test_cached_shards_are_not_fetched(server: HubServer, source: Path, tmp_path: Path) -> None:
    _checkpoint(server).fetch_all()
    requests = len(server.bodies())
    with closing(open_on_demand(_checkpoint(server), 1, tmp_path / "shards")) as model:
        assert isinstance(model.storage, ShardStorage) and model.storage.bytes_to_fetch == 0
        headers = len(server.bodies()) - requests
        _read_all(model, source)
    assert len(server.bodies()) - requests == headers and not (tmp_path / "shards").exists()


def test_reset_connection_is_continued(server: HubServer, source: Path, tmp_path: Path) -> None:
    with closing(open_on_demand(_checkpoint(server), ALL, tmp_path / "shards")) as model:
        for name in NAMES:
            server.fail(name, Fault(drop_after=100_000, reset=True))
        _read_all(model, source)
    assert all(server.bodies(name)[-1].range for name in NAMES[1:])  # the first was read once more from its start


def test_lost_connection_ends_in_one_line_and_continues(server: HubServer, source: Path, tmp_path: Path) -> None:
    """What had come of a shard is used by the next run."""
    folder = tmp_path / "shards"
    with closing(open_on_demand(_checkpoint(server), ALL, folder)) as model:
        server.fail(NAMES[1], Fault(drop_after=100_000))
        server.fail(NAMES[1], Fault(status=503), times=20)
        with pytest.raises(Interrupted, match="answers 503 for tiny/moe: run the same again later"):
            _read_all(model, source)
    server.forgive()
    with closing(open_on_demand(_checkpoint(server), ALL, folder)) as model:
        _read_all(model, source)
    assert server.bodies(NAMES[1])[-1].range == "bytes=100000-"


def test_wrong_bytes_are_never_read(server: HubServer, source: Path, tmp_path: Path) -> None:
    """A mirror that serves other bytes of the same length under the same commit."""
    with closing(open_on_demand(_checkpoint(server), ALL, tmp_path / "shards")) as model:
        server.fail(NAMES[3], Fault(content=b"\0" * (source / NAMES[3]).stat().st_size), times=20)
        with pytest.raises(Interrupted, match=f"{NAMES[3]} of .* arrived damaged twice"):
            _read_all(model, source)


def test_false_headers_are_found_out(
    server: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only whole files have a checksum; a header that was sent alone may place tensors where others lie."""
    read_headers = HubCheckpoint.read_headers

    def moved(checkpoint: HubCheckpoint) -> tuple[TensorInfo, ...]:
        return tuple(replace(tensor, offset=tensor.offset + 4) for tensor in read_headers(checkpoint))

    monkeypatch.setattr(HubCheckpoint, "read_headers", moved)
    with (
        closing(open_on_demand(_checkpoint(server), ALL, tmp_path / "shards")) as model,
        pytest.raises(Interrupted, match=r"has another header than the one that .*/tiny/moe sent alone"),
    ):
        model.storage.read(model.tensors[0])


def test_emptied_folder_is_filled_again(server: HubServer, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with closing(open_on_demand(_checkpoint(server), ALL, folder)) as model:
        _read_all(model, source)
        for shard in NAMES:
            model.storage._forget(shard)
        shutil.rmtree(folder)
        _read_all(model, source)


def test_full_disk_while_fetching(
    server: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with closing(open_on_demand(_checkpoint(server), ALL, tmp_path / "shards")) as model:
        monkeypatch.setattr(shards.HubCheckpoint, "_append", full)
        with pytest.raises(Interrupted, match="the disk is full"):
            model.storage.read(model.tensors[0])


@pytest.mark.parametrize("vanish", ["blobs", "links", "all"])
@pytest.mark.parametrize("scratch", [None, ALL])
def test_a_cache_that_vanishes(
    server: HubServer, source: Path, tmp_path: Path, vanish: str, scratch: int | None
) -> None:
    """The Hub's cache is emptied during a conversion: what it held is fetched."""
    checkpoint = _checkpoint(server)
    checkpoint.fetch_all()
    with closing(open_on_demand(checkpoint, scratch, tmp_path / "shards")) as model:
        assert isinstance(model.storage, ShardStorage) and model.storage.bytes_to_fetch == 0
        storage = tmp_path / "cache" / "models--tiny--moe"
        if vanish == "all":
            shutil.rmtree(storage)
        for path in (storage / "blobs").glob("*") if vanish == "blobs" else checkpoint.folder.glob("*.safetensors"):
            path.unlink()
        _read_all(model, source)


def test_a_cache_that_vanishes_and_too_little_scratch(server: HubServer, tmp_path: Path) -> None:
    checkpoint = _checkpoint(server)
    checkpoint.fetch_all()
    with closing(open_on_demand(checkpoint, 1000, tmp_path / "shards")) as model:
        shutil.rmtree(checkpoint.folder)
        with pytest.raises(Interrupted, match=r"is gone from the Hugging Face cache: --scratch is .* give"):
            model.storage.read(model.tensors[0])


def test_what_stalls_is_given_up(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_transfer, "LONGEST_SILENCE", 0.5)
    monkeypatch.setattr(connection, "TIMEOUT", 1000.0)
    with closing(open_on_demand(_checkpoint(server), ALL, tmp_path / "shards")) as model:
        for name in NAMES:
            server.fail(name, Fault(stall_after=5000), times=9)
        with pytest.raises(Interrupted, match="nothing has come from"):
            model.storage.read(model.tensors[0])


def test_long_waits_are_said(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    class Notes(NoProgress):
        def note(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(shards, "_SAID_EVERY", 0.05)
    checkpoint = HubCheckpoint(HubSource("tiny/moe", endpoint=server.endpoint), progress=Notes())
    with closing(open_on_demand(checkpoint, ALL, tmp_path / "shards")) as model:
        server.fail(model.tensors[0].file, Fault(before=lambda: time.sleep(1)))
        model.storage.read(model.tensors[0])
    assert any(line.startswith(f"Waiting for {model.tensors[0].file}: 0.0 of ") for line in lines)
