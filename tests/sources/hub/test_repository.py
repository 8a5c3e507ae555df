"""Fetching from a Hub: the real huggingface_hub client against a loopback server that fails on request."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from hub_server import API, Fault, HubServer
from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.sources.checkpoint import read_tensors
from moecast.sources.hub import repository as hub
from moecast.sources.hub.address import HubSource, parse_source
from moecast.sources.hub.repository import HubCheckpoint, fetch, list_files
from moecast.sources.hub.transfer import Watch
from safetensors.numpy import save_file

SHARDS = ("model-00000-of-00130.safetensors", "model-00001-of-00130.safetensors")  # numbered as badly as MiniMax M2.7
INDEX = "model.safetensors.index.json"
NEEDED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX,
    *SHARDS,
}  # fmt: skip
CHUNK = 1 << 14
SENTINEL = "hf_SentinelTokenThatNobodyMaySee"
REPOSITORY = "tiny/moe"


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
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "published")
    (folder / "tokenizer.d").mkdir()
    unwanted = (
        "pytorch_model.bin",
        "weights.pt",
        "modeling.py",
        "stray.safetensors",
        "README.md",
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
        "DOWNLOAD_CHUNK_SIZE": CHUNK,
    }.items():
        monkeypatch.setattr(constants, name, value)
    return waits


@pytest.fixture
def server(checkpoint: Path) -> Iterator[HubServer]:
    with HubServer(checkpoint) as server:
        yield server


def source(server: HubServer) -> HubSource:
    return HubSource(server.repository, endpoint=server.endpoint)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def same(fetched: Path, published: Path) -> bool:
    return all((fetched / name).read_bytes() == (published / name).read_bytes() for name in NEEDED)


def refusal(server: HubServer, **options: str) -> str:
    """The one line that fetch refuses with."""
    with pytest.raises(BadInput) as caught:
        fetch(source(server), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is a source ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MiniMaxAI/MiniMax-M2", ("MiniMaxAI/MiniMax-M2", "main")),
        ("hf://nvidia/Nemotron-3", ("nvidia/Nemotron-3", "main")),
        ("hf://nvidia/Nemotron-3@d51eab0d", ("nvidia/Nemotron-3", "d51eab0d")),
        ("hf://owner/name@refs/pr/7", ("owner/name", "refs/pr/7")),
        ("https://huggingface.co/owner/name", ("owner/name", "main")),
        ("https://huggingface.co/owner/name/tree/v1", ("owner/name", "v1")),
        ("https://huggingface.co/owner/name/tree/a%2Fb", ("owner/name", "a/b")),
        ("https://hub.example.org/mirror/owner/name/tree/v2", ("owner/name", "v2")),
    ],
)
def test_addresses_of_the_hub(text: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org/mirror")
    assert parse_source(text) == HubSource(*expected, endpoint="https://hub.example.org/mirror")


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("owner/name") == HubSource("owner/name")
    (tmp_path / "owner/name").mkdir(parents=True)
    assert parse_source("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "./no/such/folder",
        "/no/such/folder",
        "owner/na me",
        "owner/../name",
        "hf://",
        "hf://datasets/owner/name",
        "https://huggingface.co/owner",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/blob/main/config.json",
        "https://huggingface.co/owner/name/discussions/1",
        "https://example.com/owner/name",
        "ftp://huggingface.co/owner/name",
        f"https://user:{SENTINEL}@huggingface.co/owner/name",
        __file__,
    ],
)
def test_other_texts_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput, match="expected a checkpoint folder") as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)
    assert SENTINEL not in str(caught.value)


# --- what is fetched ----------------------------------------------------------------------------------------------


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
    assert checkpoint.fetch_file(shard) == tmp_path / "scratch" / SHARDS[1]
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

    def begin(self, task: str, total: int, unit: str) -> None:
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
    assert len(watcher.advances) > total // CHUNK
    assert capfd.readouterr() == ("", "")


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_resumes_where_it_broke(server: HubServer, checkpoint: Path, reset: bool) -> None:
    size = (checkpoint / SHARDS[0]).stat().st_size
    server.fail(SHARDS[0], Fault(drop_after=size // 2, reset=reset))
    assert same(fetch(source(server)), checkpoint)
    first, second = server.bodies(SHARDS[0])
    resumed_at = int((second.range or "").removeprefix("bytes=").removesuffix("-"))
    assert first.range is None
    assert second.sent == size - resumed_at
    if not reset:  # a reset also discards what lies in the sockets' buffers
        assert size // 2 - CHUNK < resumed_at <= size // 2


def test_patience_is_renewed_by_progress(server: HubServer, checkpoint: Path) -> None:
    server.fail(SHARDS[0], Fault(status=500), times=4)
    server.fail(SHARDS[0], Fault(drop_after=3 * CHUNK))
    server.fail(SHARDS[0], Fault(status=500), times=4)
    assert same(fetch(source(server)), checkpoint)


KILLED = """
import os, signal
from huggingface_hub import constants
from moecast.sources.hub.address import HubSource; from moecast.sources.hub.repository import fetch
from moecast.progress import NoProgress
constants.DOWNLOAD_CHUNK_SIZE = {chunk}
chunks = []
class Killer(NoProgress):
    def advance(self, amount, detail=""):
        chunks.append(detail)
        if chunks.count({shard!r}) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
fetch(HubSource({repository!r}), progress=Killer())
"""


def environment(server: HubServer, tmp_path: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | variables  # fmt: skip


def run(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_a_killed_process_resumes(
    server: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = KILLED.format(chunk=CHUNK, shard=SHARDS[1], repository=REPOSITORY)
    killed = run(script, environment(server, tmp_path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = len(server.log)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    assert same(fetch(source(server)), checkpoint)
    resumed = [request for request in server.log[before:] if request in server.bodies(SHARDS[1])]
    assert len(resumed) == 1
    start = int((resumed[0].range or "").removeprefix("bytes=").removesuffix("-"))
    assert start >= CHUNK
    assert resumed[0].sent == (checkpoint / SHARDS[1]).stat().st_size - start


def test_an_interrupt_stops_the_other_downloads_and_keeps_what_arrived(
    server: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    started, interrupted = threading.Event(), threading.Event()
    chunks: list[str] = []

    def hold() -> None:
        started.set()
        interrupted.wait(10)

    class Interrupt(NoProgress):
        def advance(self, amount: int, detail: str = "") -> None:
            chunks.append(detail)
            if detail == SHARDS[0] and chunks.count(detail) == 5:
                threading.Timer(0.5, interrupted.set).start()
                raise KeyboardInterrupt

    server.fail(SHARDS[0], Fault(before=lambda: started.wait(10)))  # both shards are under way at the interrupt,
    server.fail(SHARDS[1], Fault(before=hold))  # and the bytes of the second come after it
    with pytest.raises(KeyboardInterrupt):
        fetch(source(server), progress=Interrupt(), folder=tmp_path / "output")
    assert not names(tmp_path / "output") & {*SHARDS}
    assert same(fetch(source(server), folder=tmp_path / "output"), checkpoint)
    assert server.bodies(SHARDS[0])[-1].range is not None


@pytest.mark.parametrize("header", [("Retry-After", "30"), ("RateLimit", '"api";r=0;t=30')])
@pytest.mark.parametrize("where", [API, SHARDS[0], "config.json"])
def test_a_busy_hub_is_waited_for(
    server: HubServer, checkpoint: Path, waits: list[float], where: str, header: tuple[str, str]
) -> None:
    server.fail(where, Fault(status=429, headers=dict([header])))
    server.fail(where, Fault(status=503), times=2)
    assert same(fetch(source(server)), checkpoint)
    assert sum(wait >= 30 for wait in waits) == 1
    assert len(waits) == 3


def test_a_hub_that_stays_broken_is_named(server: HubServer) -> None:
    server.fail(API, Fault(status=502), times=50)
    assert refusal(server).startswith(f"{server.endpoint} answers 502 for {REPOSITORY}")


# --- damage -------------------------------------------------------------------------------------------------------


def flipped(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    return bytes(content)


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


# --- refusals -----------------------------------------------------------------------------------------------------


def test_unknown_repository(server: HubServer) -> None:
    with pytest.raises(BadInput, match=r"tiny/absent does not exist, or is private: check the name, or run `hf auth"):
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
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:9 cannot be reached"):
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

    monkeypatch.setattr(hub, "http_get", full)
    assert refusal(server).startswith("the disk is full")


def test_a_folder_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"/file cannot be written: File exists"):
        fetch(source(server), folder=tmp_path / "file")


def test_a_file_too_large_for_plain_http(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 100_000)
    assert f"run `hf download {REPOSITORY}` first" in refusal(server)


# --- environment and secrets --------------------------------------------------------------------------------------

FETCH = f"from moecast.sources.hub.address import HubSource; from moecast.sources.hub.repository import fetch; print(fetch(HubSource({REPOSITORY!r})))"


def test_offline_uses_what_was_fetched_before(server: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    online = run(FETCH, environment(server, tmp_path))
    requests = len(server.log)
    offline = run(FETCH, environment(server, tmp_path, HF_HUB_OFFLINE="1"))
    assert offline.stdout == online.stdout, offline.stderr
    assert same(Path(offline.stdout.strip()), checkpoint)
    (Path(offline.stdout.strip()) / SHARDS[1]).unlink()
    incomplete = run(FETCH, environment(server, tmp_path, HF_HUB_OFFLINE="1"))
    assert f"not complete on this machine ({SHARDS[1]} is missing) and HF_HUB_OFFLINE is set" in incomplete.stderr
    assert len(server.log) == requests


def test_offline_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="cannot be read while HF_HUB_OFFLINE is set"):
        list_files(HubSource(REPOSITORY))
    with pytest.raises(BadInput, match=r"tiny/moe at v2 is not complete on this machine .* HF_HUB_OFFLINE is set"):
        fetch(HubSource(REPOSITORY), revision="v2")


LOUD = f"""
import logging, traceback
logging.basicConfig(level=logging.DEBUG)
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.repository import HubCheckpoint
source = HubSource({REPOSITORY!r})
for round in range(2):
    try:
        checkpoint = HubCheckpoint(source)
        print(source, checkpoint, checkpoint.listing)
        checkpoint.fetch_all()
        print("fetched")
    except Exception as error:
        traceback.print_exception(error)
        print(repr(error), repr(error.__cause__))
"""


def test_the_token_is_sent_to_the_hub_and_shown_to_nobody(checkpoint: Path, tmp_path: Path) -> None:
    with HubServer(checkpoint, gated=True, token=SENTINEL) as server:
        server.fail(SHARDS[0], Fault(status=403))
        server.fail("config.json", Fault(drop_after=3))
        variables = {"HF_TOKEN": SENTINEL, "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
        result = run(LOUD, environment(server, tmp_path, **variables))
        assert "Interrupted" in result.stdout, result.stderr
        assert "fetched" in result.stdout, result.stderr
        assert "DEBUG" in result.stderr
        assert SENTINEL not in result.stdout + result.stderr
        on_hub = {request.token for request in server.log if request.host.startswith("127.0.0.1")}
        on_cdn = {request.token for request in server.log if request.host.startswith("localhost")}
        assert (on_hub, on_cdn) == ({SENTINEL}, {None})


@pytest.mark.parametrize("token", [f"{SENTINEL} x", f"{SENTINEL}\nx", f"{SENTINEL}\u2026"])
def test_a_malformed_token_is_not_quoted(server: HubServer, token: str) -> None:
    with pytest.raises(BadInput, match="the access token") as caught:
        fetch(source(server), token=token)
    assert SENTINEL not in repr(caught.getrepr(chain=True, showlocals=False))
    assert not server.log
