"""Uploads files to a repository of the Hub in one commit, and proves that they have arrived.

huggingface_hub sends them. Large files go first, one by one, and stay where they are when the next one fails; nothing
shows in the repository before all are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from ...documents import unreadable
from ...errors import BadInput, Interrupted
from ...progress import Progress
from .connection import Connection
from .errors import GOES_ON, MAY_WRITE, upload_explained
from .listing import HubFile, files_of
from .repository import is_offline, usable_token
from .transfer import Watch

if TYPE_CHECKING:
    from .address import HubSource

_PIECE = 1 << 20


@dataclass(frozen=True)
class SentFile:
    """A file of a publication; `uploaded` is False where the repository held it before."""

    name: str
    bytes: int
    sha256: str
    uploaded: bool


@dataclass(frozen=True)
class Publication:
    """What a repository holds after an upload, and the commit that has all of it."""

    repository: str
    url: str
    commit: str
    files: tuple[SentFile, ...]


@dataclass(frozen=True)
class _LocalFile:
    """A file as it is here: its checksums are those by which the Hub knows it, as a large file and in git."""

    name: str
    path: Path
    bytes: int
    sha256: str
    blob_id: str

    def is_same(self, remote: HubFile | None) -> bool:
        return remote is not None and remote.checksum == (self.sha256 if remote.sha256 else self.blob_id)


def upload(
    target: HubSource, files: Mapping[str, Path], message: str, token: str | None, private: bool, progress: Progress
) -> Publication:
    """Make a repository hold files, by their names there, in one commit; what it holds already is not sent.

    Args:
        target: the repository and the branch; both are made where there are none.
        message: of the commit.
        token: None means HF_TOKEN or the one that `hf auth login` stored.
        private: the repository must be private, and is made so; one that is public is left alone.

    Raises BadInput for what another try would not change, and Interrupted when the same call goes on later.
    """
    if is_offline():
        raise BadInput(f"{target.url} cannot be written while HF_HUB_OFFLINE is set: unset it, or use --dry-run")
    token = usable_token(token, target)
    if token is None:
        raise BadInput(f"{target.url} takes files from those alone who may write to it: {MAY_WRITE}")
    local = _read(files, progress)
    api, connection, watch = HfApi(target.endpoint, token), Connection(target.endpoint, token), Watch(progress)
    with upload_explained(target), _without_bars():
        head = _made(api, target, private)
        there = files_of(target, head, connection, watch)
        missing = [file for file in local if not file.is_same(there.get(file.name))]
        commit = _commit(api, target, head, missing, message, progress) if missing else head
        there = files_of(target, commit, connection, watch) if missing else there
        changed = [file.name for file in local if not file.is_same(there.get(file.name))]
    if changed:
        raise Interrupted(f"{target.url} at {commit[:10]} holds another {changed[0]} than was sent: {GOES_ON}")
    sent = {file.name for file in missing}
    results = (SentFile(file.name, file.bytes, file.sha256, file.name in sent) for file in local)
    return Publication(target.repository, target.url, commit, tuple(results))


def _made(api: HfApi, target: HubSource, private: bool) -> str:
    """The newest commit of the branch, which is made along with the repository where it is missing."""
    api.create_repo(target.repository, private=private or None, exist_ok=True)
    if private and not api.model_info(target.repository).private:
        raise BadInput(
            f"{target.url} is public and --private is given: make it private in its settings, or leave it out"
        )
    try:
        found = api.model_info(target.repository, revision=target.revision)
    except RevisionNotFoundError:
        api.create_branch(target.repository, branch=target.revision)
        found = api.model_info(target.repository, revision=target.revision)
    return str(found.sha)


def _commit(api: HfApi, target: HubSource, head: str, files: list[_LocalFile], message: str, progress: Progress) -> str:
    """Send files and commit them on top of `head`; returns the new commit."""
    progress.begin("Uploading", sum(file.bytes for file in files), "bytes")
    additions = []
    for file in sorted(files, key=lambda file: file.bytes):  # errors that small files show come early
        addition = CommitOperationAdd(file.name, file.path)
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)
        api.preupload_lfs_files(target.repository, [addition], revision=target.revision, free_memory=False)
        additions.append(addition)
        progress.advance(file.bytes, file.name)
    made = api.create_commit(
        target.repository, additions, commit_message=message, revision=target.revision, parent_commit=head
    )
    return made.oid


def _read(files: Mapping[str, Path], progress: Progress) -> list[_LocalFile]:
    """Files with their checksums. Raises BadInput for one that cannot be read."""
    read = []
    try:
        progress.begin("Reading", sum(path.stat().st_size for path in files.values()), "bytes")
        for name, path in files.items():
            size = path.stat().st_size
            sha256, blob_id = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
            with path.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    sha256.update(piece)
                    blob_id.update(piece)
                    progress.advance(len(piece), name)
            read.append(_LocalFile(name, path, size, sha256.hexdigest(), blob_id.hexdigest()))
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from None
    return read


@contextmanager
def _without_bars() -> Iterator[None]:
    """The client draws bars of its own, over those of the command line."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
