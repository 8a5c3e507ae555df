"""Uploads to the loopback Hub: one commit, checksums compared, faults on the way, nothing sent twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_checkpoint import SENTINEL
from hub_server import Fault, HubServer
from hub_uploads import COMMIT, UPLOAD
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from moecast.errors import BadInput, Interrupted
from moecast.progress import NoProgress
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.upload import Publication, upload

CARD = b"---\nlicense: mit\n---\n# A card\n"
PARTS = {"a.gguf": b"GGUF" + b"a" * 70_000, "b.gguf": b"GGUF" + b"b" * 50_000, "README.md": CARD, "plan.json": b"{}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """One without a repository, for the old way of sending large files; waits between tries are left out."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    with HubServer(None, token=SENTINEL) as server:
        yield server


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "made"
    folder.mkdir()
    for name, content in PARTS.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in PARTS}


def send(
    hub: HubServer, files: dict[str, Path], revision: str = "main", token: str | None = SENTINEL, private: bool = False
) -> Publication:
    target = HubSource(hub.repository, revision, hub.endpoint)
    return upload(target, files, "Upload", token, private, NoProgress())


def refusal(hub: HubServer, files: dict[str, Path], **options: str | bool | None) -> str:
    with pytest.raises((BadInput, Interrupted)) as caught:
        send(hub, files, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and SENTINEL not in message
    return message


def contents(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    found = hub.tree(revision)
    assert found
    return {name: file.path.read_bytes() for name, file in found[1].items() if name != ".gitattributes"}


def bodies(hub: HubServer) -> list[str]:
    """What was sent of large files, by the ends of their addresses."""
    return [request.path.rpartition("/")[2] for request in hub.log if request.method == "PUT"]


def commits(hub: HubServer) -> int:
    return sum("/commit/" in request.path for request in hub.log if request.method == "POST")


def test_one_commit_holds_all_files(hub: HubServer, files: dict[str, Path]) -> None:
    sent = send(hub, files, private=True)
    assert contents(hub) == PARTS and commits(hub) == 1 and hub.private
    assert (sent.repository, sent.url, sent.commit) == (hub.repository, f"{hub.endpoint}/{hub.repository}", hub.commit)
    assert [(file.name, file.bytes, file.sha256, file.uploaded) for file in sent.files] == [
        (name, len(content), hashlib.sha256(content).hexdigest(), True) for name, content in PARTS.items()
    ]
    assert all(request.token is None for request in hub.log if request.host.startswith("localhost"))


def test_what_is_there_is_not_sent(hub: HubServer, files: dict[str, Path]) -> None:
    first = send(hub, files)
    again = send(hub, files)
    assert again.commit == first.commit and not any(file.uploaded for file in again.files)
    assert len(bodies(hub)) == 2 and commits(hub) == 1
    files["b.gguf"].write_bytes(b"GGUF, another")
    third = send(hub, files)
    assert [file.name for file in third.files if file.uploaded] == ["b.gguf"]
    assert contents(hub) == PARTS | {"b.gguf": b"GGUF, another"} and len(bodies(hub)) == 3


def test_other_files_of_a_repository_and_other_branches_stay(hub: HubServer, files: dict[str, Path]) -> None:
    send(hub, {"a.gguf": files["a.gguf"]})
    before = hub.commit
    send(hub, {"plan.json": files["plan.json"]}, revision="v2")
    assert hub.commit == before
    assert contents(hub, "v2") == {name: PARTS[name] for name in ("a.gguf", "plan.json")}


@pytest.mark.parametrize("fault", [Fault(drop_after=20_000), Fault(status=500)])
def test_faults_that_pass(hub: HubServer, files: dict[str, Path], fault: Fault) -> None:
    hub.fail(UPLOAD, fault, times=2)
    send(hub, files)
    assert contents(hub) == PARTS and commits(hub) == 1


@pytest.mark.parametrize("fault", [Fault(drop_after=20_000), Fault(status=503)])
def test_faults_that_stay_end_in_one_line_and_the_next_run_goes_on(
    hub: HubServer, files: dict[str, Path], fault: Fault
) -> None:
    hub.fail(UPLOAD, Fault(content=PARTS["b.gguf"]))  # the smaller of the large ones arrives
    hub.fail(UPLOAD, fault, times=20)
    said = refusal(hub, files)
    assert said.endswith("run the same again, what has arrived is not sent again")
    assert ("503" in said) == (fault.status == 503) and hub.endpoint in said
    assert contents(hub) == {} and commits(hub) == 0
    hub.forgive()
    hub.log.clear()
    send(hub, files)
    assert bodies(hub) == [hashlib.sha256(PARTS["a.gguf"]).hexdigest()]
    assert contents(hub) == PARTS and commits(hub) == 1


def test_a_commit_that_fails_is_made_without_sending_files_again(hub: HubServer, files: dict[str, Path]) -> None:
    hub.fail(COMMIT, Fault(status=500), times=20)
    assert "answers 500 for tiny/moe (made to fail): run the same again" in refusal(hub, files)
    hub.forgive()
    hub.log.clear()
    send(hub, files)
    assert bodies(hub) == [] and contents(hub) == PARTS


def test_who_may_not_write(hub: HubServer, files: dict[str, Path]) -> None:
    for token in ("hf_another", None):
        hub.exists = False
        said = refusal(hub, files, token=token)
        assert "hf auth login" in said and "may write" in said
    send(hub, {"plan.json": files["plan.json"]})
    hub.fail(COMMIT, Fault(status=403))
    assert "does not let this access token write to tiny/moe" in refusal(hub, files)


def test_a_commit_of_somebody_else_is_not_overwritten(hub: HubServer, files: dict[str, Path]) -> None:
    hub.fail(COMMIT, Fault(before=lambda: hub.receive({"other": b"1"}, "main")))
    assert "somebody else has changed" in refusal(hub, files)
    send(hub, files)
    assert contents(hub) == PARTS | {"other": b"1"}


def test_what_arrives_damaged_is_found(hub: HubServer, files: dict[str, Path]) -> None:
    hub.fail(COMMIT, Fault(before=lambda: hub.store.damage(hashlib.sha256(PARTS["a.gguf"]).hexdigest())))
    assert "holds another a.gguf than was sent" in refusal(hub, files)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("a panic\nof Xet"), "the upload to {url} has stopped (a panic): run the same again"),
        (PermissionError("Xet"), "does not let this access token write to tiny/moe"),
        (ConnectionResetError(104, "Connection reset"), "has stopped ([Errno 104] Connection reset): run the same"),
    ],
)
def test_errors_of_other_ways_to_send(
    hub: HubServer, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    assert said.format(url=f"{hub.endpoint}/{hub.repository}") in refusal(hub, files)


def test_private_is_never_public(hub: HubServer, files: dict[str, Path]) -> None:
    send(hub, {"plan.json": files["plan.json"]})
    before = hub.commit
    assert "is public and --private is given" in refusal(hub, files, private=True)
    assert hub.commit == before and len(bodies(hub)) == 0


def test_the_hub_refuses_a_card(hub: HubServer, files: dict[str, Path]) -> None:
    files["README.md"].write_bytes(b"---\nlicense: unheard-of\n---\n")
    assert 'does not take the files: Invalid metadata in README.md. - "license" must be' in refusal(hub, files)


def test_a_file_that_cannot_be_read(hub: HubServer, files: dict[str, Path]) -> None:
    files["a.gguf"].unlink()
    assert "a.gguf cannot be read: No such file" in refusal(hub, files)
    assert not hub.log


def test_offline_nothing_is_tried(hub: HubServer, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(hub, files)
