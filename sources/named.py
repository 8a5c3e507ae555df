"""What a user names as a model: a folder or file of this machine, or a repository of the Hub. Nothing of it is read."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import BadInput
from .gguf import is_gguf
from .hub.address import HubSource, is_there, parse_source


def parse_model(text: str) -> Path | HubSource:
    """Where the model lies, or would be fetched from. Raises BadInput for what is not there or no model's name."""
    path = Path(os.path.expanduser(text))
    if "://" not in text and is_there(path.is_file):
        _refuse_part(path)
        if is_gguf(path) or path.suffix == ".onnx":
            return path
        if is_there((path.parent / "config.json").is_file):
            raise BadInput(f"{text} is one file of a checkpoint, and a model is all of them: give {path.parent}")
    elif "://" not in text and path.suffix.lower() in (".gguf", ".onnx"):
        raise BadInput(f"{path}: no such model, expected a checkpoint folder, an ONNX folder or a .gguf file")
    return parse_source(text)


def _refuse_part(path: Path) -> None:
    if path.suffix.lower() in (".part", ".incomplete", ".crdownload", ".download", ".tmp"):
        raise BadInput(f"{path} is a file that something has not finished: wait until it has, or fetch it again")
