"""Fetches a checkpoint from the Hugging Face Hub: one commit, only what a conversion needs, resumed and verified.

Names, sizes and checksums of a listing are taken for what they are before anything is made of them. Files travel over
plain HTTP and not over Xet, because the client starts an interrupted Xet download over. Files that are in the client's
cache already, however they came there, are used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, get_token_to_send  # type: ignore[attr-defined]

from ...archs.expressions import TensorInfo
from ...errors import BadInput, Interrupted
from ...paths import inside
from ...progress import NoProgress, Progress
from ..checkpoint import INDEX_FILE, SINGLE_FILE, read_index
from .address import HubSource
from .connection import Connection, RangeIgnored
from .errors import explained
from .headers import read_remote_header
from .listing import HubFile, HubFiles, Needed, commit_of, files_of, needed_files
from .transfer import Item, Meter, Result, Watch, in_parallel

PARALLEL_FILES = 4
_NO_SUCH_RANGE = 416
_PIECE = 1 << 24  # bytes hashed at once
_LONGEST_LOCK = 600.0  # seconds that another process may hold a file that does not grow


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(constants.is_offline_mode())


def list_files(
    source: HubSource, revision: str | None = None, token: str | None = None, progress: Progress | None = None
) -> HubFiles:
    """What `fetch` would download, cached or not. Fetches the safetensors index to know it. Raises as `fetch`."""
    return HubCheckpoint(source, revision, token, progress=progress).listing


def fetch(
    source: HubSource,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Path:
    """Downloads what a conversion needs, of one commit, and returns its folder: in the Hugging Face cache, or `folder`.

    `token` None means HF_TOKEN or the one `hf auth login` stored. Interrupted, it continues where it stopped.
    With HF_HUB_OFFLINE set it returns what was fetched before. Raises BadInput for a repository that is no checkpoint,
    Interrupted for all that may be different another time.
    """
    if is_offline():
        return _fetched_before(replace(source, revision=revision or source.revision), folder)
    checkpoint = HubCheckpoint(source, revision, token, folder, progress)
    checkpoint.fetch_all(progress)
    return checkpoint.folder


class HubCheckpoint:
    """One commit of a repository: `listing` says what a conversion needs of it, `folder` where fetched files lie.

    `fetch_all` brings everything; `fetch_file` one file and `remove_file` takes it away again, for those who use shards
    one after another, `in_folder` of their own. `notes` hears what is waited for. `needed` says which files they are.
    """

    def __init__(
        self,
        source: HubSource,
        revision: str | None = None,
        token: str | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
        needed: Needed = needed_files,
    ) -> None:
        self.notes = progress or NoProgress()
        self._needed = needed
        self._source = replace(source, revision=revision or source.revision)
        self._connection = Connection(source.endpoint, usable_token(token, self._source))
        self._in_cache = folder is None
        self._storage = _storage(self._source)
        self._reference = inside(self._storage / "refs", self._source.revision, "--revision")
        meter = Meter(None, 0, self.notes)
        with explained(self._source):
            find = partial(commit_of, connection=self._connection, watch=meter)
            (self._commit,) = self._in_parallel(find, [self._source], meter)
            self.folder = folder or self._storage / "snapshots" / self._commit
            (self.listing,) = self._in_parallel(partial(self._list, meter), [self._commit], meter)

    @property
    def provenance(self) -> dict[str, str]:
        """What identifies the commit."""
        return {"repository": self._source.repository, "revision": self._commit}

    @property
    def url(self) -> str:
        return self._source.url

    def fetch_all(self, progress: Progress | None = None) -> None:
        """Fetches every file of `listing`, several at a time; the first failure stops all. Raises as `fetch`."""
        meter = Meter(progress, self.listing.bytes, self.notes)
        with explained(self._source):
            self._require_space()
            self._in_parallel(partial(self._fetch, meter), self.listing.files, meter)
            if not self._in_cache:
                shutil.rmtree(self.folder / ".incomplete", ignore_errors=True)
            elif self._source.revision != self._commit:  # what the revision stands for offline, now that all is here
                self._reference.parent.mkdir(parents=True, exist_ok=True)
                self._reference.write_text(self._commit, encoding="utf-8")

    def fetch_file(self, file: HubFile, meter: Meter) -> Path:
        """Fetches one file of `listing`, verified, and returns its path. Raises as `fetch`."""
        with explained(self._source):
            return self._fetch(meter, file)

    def in_folder(self, folder: Path) -> HubCheckpoint:
        """The same commit, whose files go into another folder."""
        other = copy(self)
        other.folder, other._in_cache = folder, False
        return other

    def cached_file(self, file: HubFile) -> Path | None:
        """Where the Hugging Face cache holds a file of this commit, None when it does not."""
        path = self._storage / "snapshots" / self._commit / file.name
        return path if path.is_file() and _size(path) == file.bytes else None

    def remove_file(self, file: HubFile) -> None:
        """Removes what `fetch_file` has brought into a folder, be it whole or a part."""
        for path in self._places(file)[:2]:
            path.unlink(missing_ok=True)

    def bytes_here(self, file: HubFile) -> int:
        """How much of a file is on disk, whole or a part."""
        return sum(_size(path) for path in self._places(file)[:2])

    def read_headers(self) -> tuple[TensorInfo, ...]:
        """Every tensor, known from its shard's header: kilobytes of a model of gigabytes. Fetches what is no shard."""
        meter = Meter(None, 0, self.notes)

        def tensors_of(file: HubFile) -> list[TensorInfo]:
            if not file.is_shard:
                self._fetch(meter, file)
                return []
            read = partial(self._connection.read_range, self._address(file), watch=meter)
            return read_remote_header(read, file.name, file.bytes, self.url)

        with explained(self._source):
            found = self._in_parallel(tensors_of, self.listing.files, meter)
        return tuple(tensor for tensors in found for tensor in tensors)

    def _in_parallel(self, action: Callable[[Item], Result], items: Sequence[Item], watch: Watch) -> list[Result]:
        return in_parallel(action, items, PARALLEL_FILES, watch, self._source.endpoint)

    def _list(self, meter: Meter, commit: str) -> HubFiles:
        files = files_of(self._source, commit, self._connection, meter)
        return HubFiles(commit, self._needed(self._source, commit, files, partial(self._fetch, meter)))

    def _address(self, file: HubFile) -> str:
        return f"{self._source.url}/resolve/{self._commit}/{quote(file.name)}"

    def _require_space(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        present = (_size(self.folder / file.name) or _size(self._places(file)[1]) for file in self.listing.files)
        missing, free = self.listing.bytes - sum(present), shutil.disk_usage(self.folder).free
        if missing > free:
            raise BadInput(
                f"{self.folder}: {missing / 1e9:.1f} GB are to be downloaded and {free / 1e9:.1f} GB are free:"
                " make room, or choose another disk with HF_HOME or an output folder"
            )

    def _places(self, file: HubFile) -> tuple[Path, Path, Path]:
        """Where the content belongs, where it grows, and the lock that keeps other processes from growing it too."""
        if self._in_cache:  # huggingface_hub documents this layout under "Understand caching"
            blob = self._storage / "blobs" / file.checksum
            locks = self._storage.parent / ".locks" / self._storage.name
            return blob, blob.with_name(f"{blob.name}.incomplete"), locks / f"{blob.name}.lock"
        growing = self.folder / ".incomplete" / file.checksum
        return self.folder / file.name, growing, growing.with_name(f"{growing.name}.lock")

    def _fetch(self, meter: Meter, file: HubFile) -> Path:
        path = self.folder / file.name
        content, growing, lock = self._places(file)
        if not self._holds(path, file, meter):
            for parent in (path.parent, content.parent, growing.parent, lock.parent):
                parent.mkdir(parents=True, exist_ok=True)
            with _locked(lock, growing, file, meter):
                if not self._holds(content, file, meter):
                    self._receive(file, growing, meter)
                    os.replace(growing, content)
                if self._in_cache:
                    _link(path, content)
        meter.set(file.name, file.bytes)
        return path

    def _holds(self, path: Path, file: HubFile, meter: Meter) -> bool:
        """The cache files content under its checksum after verifying it; a folder may hold another model's files."""
        if not path.is_file() or _size(path) != file.bytes:
            return False
        return self._in_cache or _checksum(path, file, meter) == file.checksum

    def _receive(self, file: HubFile, path: Path, meter: Meter) -> None:
        for _ in range(2):  # once more from the start, in case an older part was damaged or the file has changed since
            append = partial(self._append, file, path, meter)
            self._connection.retries.run(append, meter, lambda: _size(path))
            received = _checksum(path, file, meter)
            if received == file.checksum:
                return
            path.unlink()
        raise Interrupted(
            f"{file.name} of {self._source.url} arrived damaged twice and was deleted: its checksum is {received},"
            f" expected {file.checksum}; a proxy or mirror may be at fault, try again later or without it"
        )

    def _append(self, file: HubFile, path: Path, meter: Meter) -> None:
        if file.bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise Interrupted(f"{file.name} is larger than 50 GB: run `hf download {self._source.repository}` first")
        with path.open("ab") as stream:
            done = stream.tell()
            if done > file.bytes:
                done = stream.truncate(0)
            meter.set(file.name, done)
            if done == file.bytes:
                return
            try:
                with closing(self._connection.receive(self._address(file), done, file.bytes, meter)) as chunks:
                    for chunk in chunks:
                        stream.write(chunk)
                        done += len(chunk)
                        meter.set(file.name, done)
            except RangeIgnored:
                stream.truncate(0)
                raise
            except HfHubHTTPError as error:
                if error.response.status_code != _NO_SUCH_RANGE:
                    raise
                stream.truncate(0)
                raise RangeIgnored("the server's file is shorter than what has come of it") from error
        if done < file.bytes:
            raise httpx2.RemoteProtocolError("the file ended early")


@contextmanager
def _locked(lock: Path, growing: Path, file: HubFile, meter: Meter) -> Iterator[None]:
    """Keeps other processes from growing a file. Raises Interrupted when one holds it and lets it lie."""
    with ExitStack() as stack:
        since, size = time.monotonic(), -1
        while True:
            try:
                stack.enter_context(WeakFileLock(lock, timeout=1.0))
                break
            except TimeoutError:
                if size < 0:
                    meter.notes.note(f"Another process fetches {file.name}: waiting for it")
                if _size(growing) != size:
                    since, size = time.monotonic(), _size(growing)
                if time.monotonic() - since > _LONGEST_LOCK:
                    raise Interrupted(
                        f"another process holds {lock} and fetches nothing: stop it; if there is none, remove the file"
                    ) from None
                meter.alive()
        yield


def _link(path: Path, content: Path) -> None:
    """A snapshot's file is a link to its content, or the content itself on a system without links."""
    path.unlink(missing_ok=True)
    try:
        if constants.HF_HUB_DISABLE_SYMLINKS:
            raise OSError
        path.symlink_to(os.path.relpath(content, path.parent))
    except OSError:
        os.replace(content, path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _checksum(path: Path, file: HubFile, watch: Watch) -> str:
    """The SHA-256 of a file, or what git calls one that is not in LFS."""
    git_prefix = b"" if file.sha256 else b"blob %d\0" % _size(path)
    found = hashlib.new("sha256" if len(file.checksum) == 64 else "sha1", git_prefix)
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
            watch.alive()
    return found.hexdigest()


def _storage(source: HubSource) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source.repository, repo_type="model"))


def usable_token(token: str | None, source: HubSource) -> str | None:
    """The token to send, or None. A malformed one would be quoted by the HTTP library's error."""
    found = (get_token_to_send(token or None) or "").strip()
    if not re.fullmatch(r"[!-~]*", found):
        raise BadInput(
            "the access token (HF_TOKEN, or the one `hf auth login` stored) holds a space, a line break or a character"
            f" outside ASCII: copy it again from {source.endpoint}/settings/tokens"
        )
    return found or None


def _fetched_before(source: HubSource, folder: Path | None) -> Path:
    try:
        if folder is None:
            revision = HfApi().resolve_revision(source.repository, revision=source.revision, local_files_only=True)
            folder = inside(_storage(source) / "snapshots", revision.resolved, "the Hub's cache")
        index = folder / INDEX_FILE
        shards = set(read_index(index).values()) if index.is_file() else {SINGLE_FILE}
        missing = [name for name in ("config.json", *sorted(shards)) if not (folder / name).is_file()]
    except RevisionResolutionError:
        missing = ["the revision"]
    if folder is None or missing:
        raise BadInput(
            f"{source.repository} at {source.revision} is not complete on this machine ({missing[0]} is"
            " missing) and HF_HUB_OFFLINE is set: unset it to download"
        )
    return folder
