"""Finds and opens what a user names: a folder, a GGUF file, a Hub id, an hf:// or https:// address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..progress import Progress
from .hub.access import HubAccess
from .hub.repository import HubCheckpoint, HubSource, fetch, is_offline, parse_source
from .hub.shards import fetch_on_demand
from .model import Model, open_model


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

    Raises BadInput for a source that is nothing of the kind, and for whatever goes wrong on the way from the Hub.
    """
    parsed = _parsed(source)
    if not isinstance(parsed, HubSource):
        return parsed, {}
    folder = fetch(parsed, access.revision, access.token, progress)
    return folder, {"repository": parsed.repository, "revision": folder.name}


def open_source(source: str | Path | Model, access: HubAccess, whole: bool, progress: Progress) -> Source:
    """Open a model with its weights, whatever names it; one that is open already is taken as it is.

    Args:
        whole: everything has to be on this machine; otherwise shards of a Hub repository may come when they are read.

    Raises BadInput as `locate`.
    """
    if isinstance(source, Model):
        return Source(source, _name_of(source.path))
    if isinstance(source, Path):
        return Source(open_model(source, ignored=access.ignore_config), _name_of(source))
    parsed = _parsed(source)
    if isinstance(parsed, HubSource) and not (whole or is_offline()):
        checkpoint = HubCheckpoint(parsed, access.revision, access.token)
        return Source(_open_headers(checkpoint, access), parsed.name, checkpoint.provenance, checkpoint)
    path, provenance = locate(source, access, progress)
    name = parsed.name if isinstance(parsed, HubSource) else _name_of(path)
    return Source(open_model(path, ignored=access.ignore_config), name, provenance)


def open_headers(source: str, access: HubAccess = HubAccess()) -> Model:
    """The model without its weights: of a Hub repository only the headers are read. Raises BadInput as `locate`."""
    parsed = _parsed(source)
    if not isinstance(parsed, HubSource):
        return open_model(parsed, ignored=access.ignore_config)
    return _open_headers(HubCheckpoint(parsed, access.revision, access.token), access)


def _open_headers(checkpoint: HubCheckpoint, access: HubAccess) -> Model:
    return open_model(checkpoint.folder, checkpoint.read_headers(), access.ignore_config)


def _parsed(source: str) -> Path | HubSource:
    return Path(source) if source.endswith((".gguf", ".onnx")) and "://" not in source else parse_source(source)


def _name_of(path: Path) -> str:
    return path.resolve().name
