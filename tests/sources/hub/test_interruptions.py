"""Connections that break, processes that are killed, Hubs that are busy: what came is kept."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from hub_checkpoint import (
    CHUNK,
    REPOSITORY,
    SHARDS,
    environment,
    names,
    refusal,
    run,
    same,
    source,
)
from hub_server import API, Fault, HubServer
from huggingface_hub import constants
from moecast.progress import NoProgress
from moecast.sources.hub.repository import fetch


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
from moecast.sources.hub.address import HubSource; from moecast.sources.hub.repository import fetch
from moecast.progress import NoProgress
chunks = []
class Killer(NoProgress):
    def advance(self, amount, detail=""):
        chunks.append(detail)
        if chunks.count({shard!r}) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
fetch(HubSource({repository!r}), progress=Killer())
"""


def test_a_killed_process_resumes(
    server: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = KILLED.format(shard=SHARDS[1], repository=REPOSITORY)
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
            if detail == SHARDS[0] and chunks.count(detail) == 3:
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
    assert len(waits) >= 3


def test_a_hub_that_stays_broken_is_named(server: HubServer) -> None:
    server.fail(API, Fault(status=502), times=50)
    assert refusal(server).startswith(f"{server.endpoint} answers 502 for {REPOSITORY}")
