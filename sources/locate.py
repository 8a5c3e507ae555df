"""Finds the model that a user names: a folder, a GGUF file, a Hub id, an hf:// or https:// address."""

from __future__ import annotations

from pathlib import Path

from ..progress import Progress
from .hub.repository import HubCheckpoint, HubSource, fetch, is_offline, parse_source
from .model import Model, open_model


def locate(source: str, revision: str | None, token: str | None, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Where the model lies on this machine, fetched if need be, and what is known of where it came from.

    Raises BadInput for a source that is nothing of the kind, and for whatever goes wrong on the way from the Hub.
    """
    parsed = _parsed(source)
    if not isinstance(parsed, HubSource):
        return parsed, {}
    folder = fetch(parsed, revision, token, progress)
    return folder, {"repository": parsed.repository, "revision": folder.name}


def locate_on_demand(
    source: str, revision: str | None, token: str | None, progress: Progress
) -> tuple[Path | HubCheckpoint, dict[str, str]]:
    """As `locate`, but a Hub repository is not fetched: its weights may come when they are needed."""
    parsed = _parsed(source)
    if not isinstance(parsed, HubSource) or is_offline():
        return locate(source, revision, token, progress)
    checkpoint = HubCheckpoint(parsed, revision, token)
    return checkpoint, checkpoint.provenance


def open_headers(source: str, revision: str | None, token: str | None) -> Model:
    """The model without its weights: of a Hub repository only the headers are read. Raises BadInput as `locate`."""
    parsed = _parsed(source)
    if not isinstance(parsed, HubSource):
        return open_model(parsed)
    checkpoint = HubCheckpoint(parsed, revision, token)
    return open_model(checkpoint.folder, checkpoint.read_headers())


def _parsed(source: str) -> Path | HubSource:
    return Path(source) if source.endswith((".gguf", ".onnx")) and "://" not in source else parse_source(source)
