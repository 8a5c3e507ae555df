"""Offline, and where the access token goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_checkpoint import (
    FETCH,
    REPOSITORY,
    SENTINEL,
    SHARDS,
    environment,
    run,
    same,
    source,
)
from hub_server import Fault, HubServer
from huggingface_hub import constants
from moecast.errors import BadInput, Interrupted
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.repository import fetch, list_files


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
    with pytest.raises(Interrupted, match="cannot be read while HF_HUB_OFFLINE is set"):
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
