"""From what a user types to a model: a folder, a GGUF file, a Hub id, an hf:// or https:// address."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import BadInput
from ..paths import inside, is_hexadecimal
from ..progress import NoProgress, Progress
from .gguf import is_gguf
from .hub.address import HubSource, is_there, parse_source
from .hub.repository import HubCheckpoint, fetch, is_offline
from .model import Model, open_model

_CACHED = re.compile(r"models--(?:[^/\\]+--)?([^/\\]+)")  # what the Hub's cache calls the folder of a repository


def locate(source: str, revision: str | None, token: str | None, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Where the model lies on this machine, fetched if need be, and what is known of where it came from.

    Raises BadInput for a source that is nothing of the kind, and Interrupted for what goes wrong on the way from the
    Hub.
    """
    parsed = _parsed(source, revision)
    if not isinstance(parsed, HubSource):
        return parsed, {}
    folder = fetch(parsed, revision, token, progress)
    return folder, {"repository": parsed.repository, "revision": folder.name}


def locate_on_demand(
    source: str, revision: str | None, token: str | None, progress: Progress
) -> tuple[Path | HubCheckpoint, dict[str, str]]:
    """As `locate`, but a Hub repository is not fetched: its weights may come when they are needed."""
    parsed = _parsed(source, revision)
    if not isinstance(parsed, HubSource) or is_offline():
        return locate(source, revision, token, progress)
    checkpoint = HubCheckpoint(parsed, revision, token, progress=progress)
    return checkpoint, checkpoint.provenance


def open_headers(source: str, revision: str | None, token: str | None, progress: Progress | None = None) -> Model:
    """The model without its weights: of a Hub repository only the headers are read. Raises as `locate`."""
    parsed = _parsed(source, revision)
    if not isinstance(parsed, HubSource) or is_offline():
        return open_model(locate(source, revision, token, progress or NoProgress())[0])
    checkpoint = HubCheckpoint(parsed, revision, token, progress=progress)
    return open_model(checkpoint.folder, checkpoint.read_headers())


def model_name(source: str | Path | HubCheckpoint | Model) -> str:
    """What a model is called if nobody says otherwise: as its repository, or the folder that a user has named."""
    if isinstance(source, HubCheckpoint):
        return source.provenance["repository"].split("/")[-1]
    path = Path(os.path.abspath(source.path if isinstance(source, Model) else source))
    if path.parent.name == "snapshots" and (cached := _CACHED.fullmatch(path.parent.parent.name)):
        return cached[1]
    cached = _CACHED.fullmatch(path.name)
    return cached[1] if cached else path.name


def _parsed(source: str, revision: str | None) -> Path | HubSource:
    path = Path(os.path.expanduser(source))
    if "://" not in source and is_there(path.is_file):
        _refuse_part(path)
        if is_gguf(path) or path.suffix == ".onnx":
            return path
        if is_there((path.parent / "config.json").is_file):
            raise BadInput(f"{source} is one file of a checkpoint, and a model is all of them: give {path.parent}")
    elif "://" not in source and path.suffix.lower() in (".gguf", ".onnx"):
        return path  # whoever opens it says that it is not there
    found = parse_source(source)
    return _snapshot(found, revision) if isinstance(found, Path) else found


def _refuse_part(path: Path) -> None:
    if path.suffix.lower() in (".part", ".incomplete", ".crdownload", ".download", ".tmp"):
        raise BadInput(f"{path} is a file that something has not finished: wait until it has, or fetch it again")


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
