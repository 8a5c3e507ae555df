"""What a repository holds at a commit, as the Hub lists it, and what of it a conversion needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import BadInput, Interrupted
from ...paths import is_hexadecimal, is_plain_name
from ..chat_templates import TEMPLATE_FOLDER
from ..checkpoint import INDEX_FILE, SINGLE_FILE, read_index
from ..model_card import CARD, LARGEST_CARD
from .address import HubSource
from .connection import Connection
from .transfer import Watch

_COMPANIONS = (
    "config.json", "generation_config.json", "hf_quant_config.json", "chat_template.json", "chat_template.jinja",
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", f"{TEMPLATE_FOLDER}/*.jinja",
)  # fmt: skip
_MOST_COMPANION = 1 << 28  # bytes of a file that is no shard
_MOST_SHARD = 1 << 44
_MOST_FILES = 100_000


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


Needed = Callable[[HubSource, str, Mapping[str, HubFile], Callable[[HubFile], Path]], tuple[HubFile, ...]]
"""Of a source's commit and all files of it, those to fetch; the last argument fetches one at once."""


def commit_of(source: HubSource, connection: Connection, watch: Watch) -> str:
    """The commit that the revision of a source stands for now. Raises Interrupted for an answer without one."""
    if is_hexadecimal(source.revision, 40):
        return source.revision
    address = f"{source.endpoint}/api/models/{source.repository}/revision/{quote(source.revision, safe='')}"
    answer = connection.read_json(address, watch)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not is_hexadecimal(commit, 40):
        raise _strange(source, f"the commit {str(commit)[:80]!r}")
    return str(commit)


def files_of(source: HubSource, commit: str, connection: Connection, watch: Watch) -> dict[str, HubFile]:
    """Every file of a commit by its name; those with names that not every system takes are left out.

    Raises Interrupted for a listing whose checksums and sizes are none.
    """
    address = f"{source.endpoint}/api/models/{source.repository}/tree/{commit}?recursive=true"
    files: dict[str, HubFile] = {}
    for page in connection.read_pages(address, watch):
        if not isinstance(page, list):
            raise _strange(source, "a listing that is no list")
        for entry in page:
            if isinstance(entry, dict) and entry.get("type") == "file" and is_plain_name(entry.get("path")):
                file = _file(entry, source)
                files[file.name] = file
        if len(files) > _MOST_FILES:
            raise _strange(source, f"more than {_MOST_FILES} files")
    return files


def needed_files(
    source: HubSource, commit: str, files: Mapping[str, HubFile], fetch: Callable[[HubFile], Path]
) -> tuple[HubFile, ...]:
    """Companions of the weights, then the weights: those the index names, whatever else the repository holds."""
    names = [name for name in files if any(map(partial(_matches, name), _COMPANIONS))]
    if CARD in files and files[CARD].bytes <= LARGEST_CARD:
        names.append(CARD)
    if INDEX_FILE in files:
        names.append(INDEX_FILE)
        _check_sizes(source, [files[name] for name in names])
        shards = sorted(set(read_index(fetch(files[INDEX_FILE])).values()))
    elif SINGLE_FILE in files:
        _check_sizes(source, [files[name] for name in names])
        shards = [SINGLE_FILE]
    else:
        gguf = next((name for name in files if name.lower().endswith(".gguf")), None)
        also = f"; of its GGUF files, download one: `hf download {source.repository} {gguf}`" if gguf else ""
        raise BadInput(f"{source.url} holds neither {INDEX_FILE} nor {SINGLE_FILE}, expected safetensors{also}")
    for shard in shards:
        if shard not in files or not files[shard].is_shard:
            raise BadInput(
                f"{source.url}: {INDEX_FILE} names {shard!r}, which is not a safetensors file of commit {commit[:10]}: "
                "report it to the repository's owner or choose another revision"
            )
    return tuple(files[name] for name in (*names, *shards))


def _file(entry: Mapping[str, Any], source: HubSource) -> HubFile:
    lfs = entry.get("lfs")
    name, size, blob_id = entry["path"], entry.get("size"), entry.get("oid")
    sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
    if not is_hexadecimal(blob_id, 40, 64) or not (lfs is None or is_hexadecimal(sha256, 64)):
        raise _strange(source, f"a checksum of {name} that is none: {str(sha256 or blob_id)[:80]!r}")
    if type(size) is not int or not 0 <= size <= _MOST_SHARD:
        raise _strange(source, f"a size of {name} that is none: {str(size)[:80]}")
    return HubFile(name, size, sha256, str(blob_id))


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern and lies in as many folders."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _check_sizes(source: HubSource, companions: list[HubFile]) -> None:
    for file in companions:
        if file.bytes > _MOST_COMPANION:
            raise BadInput(f"{source.url}: {file.name} has {file.bytes / 1e9:.1f} GB, more than such a file ever has")


def _strange(source: HubSource, what: str) -> Interrupted:
    return Interrupted(f"{source.endpoint} gives {what}: check HF_ENDPOINT; a mirror or proxy may be at fault")
