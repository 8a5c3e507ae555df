"""Fetches a checkpoint from the Hugging Face Hub: one commit, only what a conversion needs, resumed and verified.

huggingface_hub speaks the protocol: authentication, listing, redirects, waiting as long as the server asks, the cache.
What its version 2.4 leaves out is added here: partial files that outlive the process, a second try after a 5xx or a
reset connection, checksums, and errors of one line. Files travel over plain HTTP and not over Xet, because the client
starts an interrupted Xet download over. Files that are in its cache already, however they came there, are used.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import copy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, parse_hf_uri
from huggingface_hub.errors import (
    HfHubHTTPError,
    HfUriError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_token_to_send  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from ...archs.weights import TensorInfo
from ...documents import is_file, is_folder
from ...errors import BadInput
from ...progress import Progress
from ..checkpoint import INDEX_FILE, SINGLE_FILE, read_index
from .errors import explained
from .transfer import Bar, Meter, retried

PARALLEL_FILES = 4
TIMEOUT = 10.0  # seconds
COMPANIONS = (
    "config.json", "generation_config.json", "hf_quant_config.json", "chat_template.json", "chat_template.jinja",
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|[\\:]")  # the last two lead out of a folder on Windows


@dataclass(frozen=True)
class HubSource:
    """A model repository `owner/name`, at a branch, tag or commit, of the Hub that HF_ENDPOINT or `endpoint` names."""

    repository: str
    revision: str = constants.DEFAULT_REVISION
    endpoint: str = field(default_factory=lambda: constants.ENDPOINT)

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{self.repository}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: `sha256` of the content if it is stored in LFS, else None; `blob_id` is git's SHA-1."""

    name: str
    bytes: int
    sha256: str | None
    blob_id: str

    @property
    def checksum(self) -> str:
        return self.sha256 or self.blob_id

    @property
    def is_shard(self) -> bool:
        return self.name.endswith(".safetensors")


@dataclass(frozen=True)
class HubFiles:
    """What a conversion needs of one commit."""

    commit: str
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def parse_source(text: str) -> Path | HubSource:
    """A folder that exists, or else a Hub id, hf:// address or URL. Raises BadInput for anything else."""
    folder = Path(os.path.expanduser(text))
    if text and is_folder(folder):
        return folder
    expected = "expected a checkpoint folder, owner/name, hf://owner/name[@revision] or the URL of a Hub repository"
    if re.match(r"\w+://[^/]*@[^/]+/", text):
        raise BadInput(f"the URL holds a user name or token: leave it out and set HF_TOKEN; {expected}")
    if is_file(folder):
        raise BadInput(f"{text} is a file: {expected}")
    try:
        address = parse_hf_uri(text if "://" in text else f"hf://{text}", constants.ENDPOINT)
    except HfUriError:
        raise BadInput(f"{text!r} is neither a folder on this machine nor a model on the Hub: {expected}") from None
    if address.type != "model" or address.path_in_repo:
        raise BadInput(f"{text!r} is not a model repository: {expected}")
    return HubSource(address.id, address.revision or constants.DEFAULT_REVISION)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(constants.is_offline_mode())


def list_files(source: HubSource, revision: str | None = None, token: str | None = None) -> HubFiles:
    """What `fetch` would download, cached or not. Fetches the safetensors index to know it. Raises BadInput."""
    return HubCheckpoint(source, revision, token).listing


def fetch(
    source: HubSource,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Path:
    """Downloads what a conversion needs, of one commit, and returns its folder: in the Hugging Face cache, or `folder`.

    `token` None means HF_TOKEN or the one `hf auth login` stored. Interrupted, it continues where it stopped.
    With HF_HUB_OFFLINE set it returns what was fetched before. Raises BadInput.
    """
    if is_offline():
        return _fetched_before(replace(source, revision=revision or source.revision), folder)
    checkpoint = HubCheckpoint(source, revision, token, folder)
    checkpoint.fetch_all(progress)
    return checkpoint.folder


class HubCheckpoint:
    """One commit of a repository: `listing` says what a conversion needs of it, `folder` where fetched files lie.

    `fetch_all` brings everything; `fetch_file` one file and `remove_file` takes it away again, for those who use shards
    one after another, `in_folder` of their own.
    """

    def __init__(
        self, source: HubSource, revision: str | None = None, token: str | None = None, folder: Path | None = None
    ) -> None:
        self._source = replace(source, revision=revision or source.revision)
        self._token = _usable(token, self._source)
        self._in_cache = folder is None
        self._storage = _storage(self._source)
        with explained(self._source):
            self._commit, files = self._list()
            self.folder = folder or self._storage / "snapshots" / self._commit
            self.listing = HubFiles(self._commit, self._needed(files))

    @property
    def provenance(self) -> dict[str, str]:
        """What identifies the commit."""
        return {"repository": self._source.repository, "revision": self._commit}

    @property
    def url(self) -> str:
        return self._source.url

    def fetch_all(self, progress: Progress | None = None) -> None:
        """Fetches every file of `listing`, several at a time. Raises BadInput, and stops the others when one fails."""
        meter = Meter(progress, self.listing.bytes)
        with explained(self._source), ThreadPoolExecutor(PARALLEL_FILES) as pool:
            self._require_space()
            downloads = [pool.submit(self._fetch, file, meter) for file in self.listing.files]
            try:
                for download in as_completed(downloads):
                    download.result()
            except BaseException:
                meter.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if not self._in_cache:
                shutil.rmtree(self.folder / ".incomplete", ignore_errors=True)
            elif self._source.revision != self._commit:  # what the revision stands for offline, now that all is here
                reference = self._storage / "refs" / self._source.revision
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self._commit)

    def fetch_file(self, file: HubFile, progress: Progress | None = None) -> Path:
        """Fetches one file of `listing`, verified, and returns its path. Raises BadInput."""
        with explained(self._source):
            return self._fetch(file, Meter(progress, file.bytes))

    def in_folder(self, folder: Path) -> HubCheckpoint:
        """The same commit, whose files go into another folder."""
        other = copy(self)
        other.folder, other._in_cache = folder, False
        return other

    def cached_file(self, file: HubFile) -> Path | None:
        """Where the Hugging Face cache holds a file of this commit, None when it does not."""
        path = self._storage / "snapshots" / self._commit / file.name
        return path if _size(path) == file.bytes else None

    def remove_file(self, file: HubFile) -> None:
        """Removes what `fetch_file` has brought into a folder, be it whole or a part."""
        for path in self._places(file)[:2]:
            path.unlink(missing_ok=True)

    def bytes_here(self, file: HubFile) -> int:
        """How much of a file is on disk, whole or a part."""
        return sum(_size(path) for path in self._places(file)[:2])

    def read_headers(self) -> tuple[TensorInfo, ...]:
        """Every tensor, known from its shard's header: kilobytes of a model of gigabytes. Fetches what is no shard."""
        api = HfApi(endpoint=self._source.endpoint, token=self._token)

        def tensors_of(shard: HubFile) -> list[TensorInfo]:
            name, commit = self._source.repository, self._commit
            try:
                read = partial(api.parse_safetensors_file_metadata, name, shard.name, revision=commit)
                tensors = retried(read).tensors
            except SafetensorsParsingError as error:
                raise BadInput(f"the header of {shard.name} of {self._source.url} arrived damaged: {error}") from None
            data = shard.bytes - max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
            return [
                TensorInfo(name, tensor.dtype, tuple(tensor.shape), shard.name, data + begin, end - begin)
                for name, tensor in tensors.items()
                for begin, end in [tensor.data_offsets]
            ]

        with explained(self._source), ThreadPoolExecutor(PARALLEL_FILES) as pool:
            for file in self.listing.files:
                if not file.is_shard:
                    self._fetch(file, Meter(None, 0))
            shards = [file for file in self.listing.files if file.is_shard]
            return tuple(tensor for tensors in pool.map(tensors_of, shards) for tensor in tensors)

    def _list(self) -> tuple[str, dict[str, HubFile]]:
        api = HfApi(endpoint=self._source.endpoint, token=self._token)
        repository, commit = self._source.repository, self._source.revision
        if not re.fullmatch(r"[0-9a-f]{40}", commit):  # not resolve_revision, which falls back to an older commit
            commit = str(retried(partial(api.model_info, repository, revision=commit, timeout=TIMEOUT)).sha)
        return commit, {
            file.path: HubFile(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in api.list_repo_tree(repository, revision=commit, recursive=True)
            if isinstance(file, RepoFile) and not OUTSIDE.search(file.path)
        }

    def _needed(self, files: dict[str, HubFile]) -> tuple[HubFile, ...]:
        """Companions of the weights, then the weights: those the index names, whatever else the repository holds."""
        names = [name for name in files if "/" not in name and any(fnmatchcase(name, p) for p in COMPANIONS)]
        if INDEX_FILE in files:
            index = self._fetch(files[INDEX_FILE], Meter(None, 0))
            shards = sorted(set(read_index(index).values()))
            names.append(INDEX_FILE)
        elif SINGLE_FILE in files:
            shards = [SINGLE_FILE]
        else:
            raise BadInput(f"{self._source.url} holds neither {INDEX_FILE} nor {SINGLE_FILE}, expected safetensors")
        for shard in shards:
            if shard not in files or not shard.endswith(".safetensors"):
                raise BadInput(
                    f"{self._source.url}: {INDEX_FILE} names {shard!r}, which is not a safetensors file of commit"
                    f" {self._commit[:10]}: report it to the repository's owner or choose another revision"
                )
        return tuple(files[name] for name in (*names, *shards))

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

    def _fetch(self, file: HubFile, meter: Meter) -> Path:
        path = self.folder / file.name
        content, growing, lock = self._places(file)
        if not self._holds(path, file):
            for parent in (content.parent, growing.parent, lock.parent):
                parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not self._holds(content, file):
                    self._receive(file, growing, meter)
                    os.replace(growing, content)
            if self._in_cache:
                self._link(file, path, content)
        meter.set(file.name, file.bytes)
        return path

    def _holds(self, path: Path, file: HubFile) -> bool:
        """The cache files content under its checksum after verifying it; a folder may hold another model's files."""
        if not path.is_file() or _size(path) != file.bytes:
            return False
        return self._in_cache or _checksum(path, file) == file.checksum

    def _receive(self, file: HubFile, path: Path, meter: Meter) -> None:
        for _ in range(2):  # once more from the start, in case an older part was damaged or the file has changed since
            retried(partial(self._append, file, path, meter), lambda: _size(path))
            received = _checksum(path, file)
            if received == file.checksum:
                return
            path.unlink()
        raise BadInput(
            f"{file.name} of {self._source.url} arrived damaged twice and was deleted: its checksum is {received},"
            f" expected {file.checksum}; a proxy or mirror may be at fault, try again later or without it"
        )

    def _append(self, file: HubFile, path: Path, meter: Meter) -> None:
        if file.bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise BadInput(f"{file.name} is larger than 50 GB: run `hf download {self._source.repository}` first")
        meter.set(file.name, _size(path))
        url = hf_hub_url(self._source.repository, file.name, revision=self._commit, endpoint=self._source.endpoint)
        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}  # gzip could not be resumed
        bar: Any = partial(Bar, meter, file.name)
        with path.open("ab") as stream:
            if stream.tell() > file.bytes:
                stream.truncate(0)
            try:
                http_get(
                    url, stream, resume_size=_size(path), headers=headers, expected_size=file.bytes, tqdm_class=bar
                )
            except OSError as error:
                if isinstance(error, HfHubHTTPError) or error.errno is not None:
                    raise
                # else the client found another length than expected: the checksum will tell

    def _link(self, file: HubFile, path: Path, content: Path) -> None:
        path.unlink(missing_ok=True)
        hf_hub_download(
            self._source.repository, file.name, revision=self._commit, endpoint=self._source.endpoint, token=self._token
        )
        if not path.is_symlink():  # a system without symbolic links, where the client copies
            content.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _checksum(path: Path, file: HubFile) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest() if file.sha256 else git_hash(stream.read())


def _storage(source: HubSource) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source.repository, repo_type="model"))


def _usable(token: str | None, source: HubSource) -> str | bool:
    """The token to send, or False for none. A malformed one would be quoted by the HTTP library's error."""
    found = (get_token_to_send(token or None) or "").strip()
    if not re.fullmatch(r"[!-~]*", found):
        raise BadInput(
            "the access token (HF_TOKEN, or the one `hf auth login` stored) holds a space, a line break or a character"
            f" outside ASCII: copy it again from {source.endpoint}/settings/tokens"
        )
    return found or False


def _fetched_before(source: HubSource, folder: Path | None) -> Path:
    try:
        if folder is None:
            revision = HfApi().resolve_revision(source.repository, revision=source.revision, local_files_only=True)
            folder = _storage(source) / "snapshots" / revision.resolved
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
