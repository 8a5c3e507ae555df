"""Importance matrices in repositories of the Hub: found, fetched through the real client, or refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from huggingface_hub import constants
from moecast.errors import BadInput, Interrupted
from moecast.progress import NoProgress
from moecast.sources.hub.access import HubAccess
from moecast.sources.imatrix import read_imatrix
from moecast.sources.locate import locate_imatrix

MATRIX = Path(__file__).parents[2] / "data" / "imatrix" / "im.gguf"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(MATRIX, folder / "model.imatrix.gguf")
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with HubServer(folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


def _located(text: str) -> Path:
    return locate_imatrix(text, HubAccess(), NoProgress())


@pytest.mark.parametrize("text", ["tiny/moe", "tiny/moe/model.imatrix.gguf", "hf://tiny/moe/model.imatrix.gguf"])
def test_a_repositorys_matrix_is_fetched(server: HubServer, text: str) -> None:
    server.fail("model.imatrix.gguf", Fault(drop_after=1000))
    found = _located(text)
    assert found.read_bytes() == MATRIX.read_bytes()
    assert read_imatrix(found).datasets == ("t.txt",)
    assert not server.bodies("model-Q4_K_M.gguf")


def test_a_file_of_this_machine_comes_first(server: HubServer) -> None:
    assert _located(str(MATRIX)) == MATRIX
    assert not server.log


def test_what_is_not_there_is_one_line(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no other\.gguf: of importance matrices it has model\.imatrix\.gguf"):
        _located("tiny/moe/other.gguf")
    shutil.copy(MATRIX, tmp_path / "published" / "second.imatrix.gguf")
    server.push(tmp_path / "published")
    with pytest.raises(BadInput, match=r"name it, tiny/moe/FILE"):
        _located("tiny/moe")
    with pytest.raises((BadInput, Interrupted), match="tiny/nothing"):
        _located("tiny/nothing/im.gguf")
    with pytest.raises(BadInput, match="neither a file on this machine"):
        _located("/nowhere/im.gguf")
    with pytest.raises(BadInput, match="leave it out") as refused:
        _located("https://hf_secret@huggingface.co/tiny/moe/resolve/main/im.gguf")
    assert "hf_secret" not in str(refused.value)
