"""Importance matrices that lie in a repository of the Hub, as publishers of GGUF files leave them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import BadInput
from ...progress import Progress
from .address import HubSource, parse_file
from .listing import HubFile
from .repository import HubCheckpoint, is_offline

_SUFFIXES = (".gguf", ".dat", ".imatrix")


def fetch_imatrix(text: str, token: str | None, progress: Progress) -> Path:
    """The file that `owner/name/file` names, or the only importance matrix of `owner/name`, fetched and verified.

    Raises BadInput for a repository without it, Interrupted for all that may be different another time.
    """
    source, name = parse_file(text)
    if is_offline():
        raise BadInput(f"{text} is to be fetched and HF_HUB_OFFLINE is set: unset it, or give the path of the file")

    def needed(
        source: HubSource, commit: str, files: Mapping[str, HubFile], fetch: Callable[[HubFile], Path]
    ) -> tuple[HubFile, ...]:
        return (_wanted(source, files, name),)

    repository = HubCheckpoint(source, token=token, progress=progress, needed=needed)
    repository.fetch_all(progress)
    return repository.folder / repository.listing.files[0].name


def _wanted(source: HubSource, files: Mapping[str, HubFile], name: str | None) -> HubFile:
    found = [file for file in files if "imatrix" in file.lower() and file.lower().endswith(_SUFFIXES)]
    if name and name in files:
        return files[name]
    there = f"it has {', '.join(found[:9])}" if found else "it has none"
    if name:
        raise BadInput(f"{source.url} holds no {name}: of importance matrices {there}")
    if len(found) != 1:
        raise BadInput(f"{source.url} is to hold one importance matrix, but {there}: name it, {source.repository}/FILE")
    return files[found[0]]
