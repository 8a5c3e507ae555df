"""Finds and opens what a user names: a folder, a GGUF file, a Hub id, an hf:// or https:// address."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadInput
from ..paths import inside, is_hexadecimal
from ..progress import NoProgress, Progress
from .hub.access import HubAccess
from .hub.address import HubSource, is_there
from .hub.matrices import fetch_imatrix
from .hub.repository import HubCheckpoint, fetch, is_offline
from .hub.shards import fetch_on_demand
from .model import Model, open_model
from .named import parse_model

_CACHED = re.compile(r"models--(?:[^/\\]+--)?([^/\\]+)")  # what the Hub's cache calls the folder of a repository


@dataclass(frozen=True)
class Source:
    """An open model, what it is called, and what is known of where it came from.

    `checkpoint` is the repository whose weights are not here; `fetch_on_demand` lets them come.
    """

    model: Model
    name: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    checkpoint: HubCheckpoint | None = None

    def fetch_on_demand(self, scratch: int | None, folder: Path) -> None:
        """Before weights are read: shards of a repository will come into a folder, see `ShardStorage`."""
        if self.checkpoint:
            fetch_on_demand(self.model, self.checkpoint, scratch, folder)


def locate(source: str, access: HubAccess, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Where the model lies on this machine, fetched if need be, and what is known of where it came from.

    Raises BadInput for a source that is nothing of the kind, and Interrupted for what goes wrong on the way from the
    Hub.
    """
    parsed = _parsed(source, access.revision)
    if not isinstance(parsed, HubSource):
        return parsed, {}
    folder = fetch(parsed, access.revision, access.token, progress)
    return folder, {"repository": parsed.repository, "revision": folder.name}


def locate_imatrix(matrix: str | Path, access: HubAccess, progress: Progress) -> Path:
    """An importance matrix on this machine, or one of a Hub repository, `owner/name/file`, which is fetched.

    Raises as `locate`.
    """
    path = Path(os.path.expanduser(matrix))
    if isinstance(matrix, Path) or is_there(path.is_file):
        return path
    return fetch_imatrix(matrix, access.token, progress)


def open_source(source: str | Path | Model, access: HubAccess, whole: bool, progress: Progress) -> Source:
    """Open a model with its weights, whatever names it; one that is open already is taken as it is.

    Args:
        whole: everything has to be on this machine; otherwise shards of a Hub repository may come when they are read.

    Raises as `locate`.
    """
    if isinstance(source, Model):
        return Source(source, model_name(source))
    if isinstance(source, Path):
        return Source(open_model(source, ignored=access.ignore_config), model_name(source))
    checkpoint = None if whole else _on_demand(source, access, progress)
    if checkpoint:
        model = _open_headers(checkpoint, access)
        return Source(model, model_name(model), checkpoint.provenance, checkpoint)
    path, provenance = locate(source, access, progress)
    return Source(open_model(path, ignored=access.ignore_config), model_name(path), provenance)


def open_headers(source: str, access: HubAccess = HubAccess(), progress: Progress | None = None) -> Model:
    """The model without its weights: of a Hub repository only the headers are read. Raises as `locate`."""
    progress = progress or NoProgress()
    checkpoint = _on_demand(source, access, progress)
    if checkpoint:
        return _open_headers(checkpoint, access)
    return open_model(locate(source, access, progress)[0], ignored=access.ignore_config)


def model_name(source: str | Path | Model) -> str:
    """What a model is called if nobody says otherwise: as its repository, or the folder that a user has named."""
    path = Path(os.path.abspath(source.path if isinstance(source, Model) else source))
    if path.parent.name == "snapshots" and (cached := _CACHED.fullmatch(path.parent.parent.name)):
        return cached[1]
    cached = _CACHED.fullmatch(path.name)
    return cached[1] if cached else path.name


def _on_demand(source: str, access: HubAccess, progress: Progress) -> HubCheckpoint | None:
    """The repository whose weights may come when they are read; None for what is on this machine, or has to be."""
    parsed = _parsed(source, access.revision)
    if not isinstance(parsed, HubSource) or is_offline():
        return None
    return HubCheckpoint(parsed, access.revision, access.token, progress=progress)


def _open_headers(checkpoint: HubCheckpoint, access: HubAccess) -> Model:
    return open_model(checkpoint.folder, checkpoint.read_headers(), access.ignore_config)


def _parsed(source: str, revision: str | None) -> Path | HubSource:
    found = parse_model(source)
    return _snapshot(found, revision) if isinstance(found, Path) else found


def _snapshot(folder: Path, revision: str | None) -> Path:
    """The folder itself; of a repository's folder in the Hub's cache the snapshot that a revision stands for."""
    if not _CACHED.fullmatch(Path(os.path.abspath(folder)).name) or not (folder / "snapshots").is_dir():
        return folder
    commit, reference = revision or "main", inside(folder / "refs", revision or "main", "--revision")
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    if not is_hexadecimal(commit, 40) or not (folder / "snapshots" / commit).is_dir():
        held = ", ".join(sorted(path.name for path in (folder / "snapshots").iterdir()))[:200]
        raise BadInput(
            f"{folder} holds nothing of revision {revision or 'main'}, but {held or 'no snapshot'}: give one of these "
            "with --revision"
        )
    return folder / "snapshots" / commit
