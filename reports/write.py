"""Writes a report's two files, each whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ..errors import BadInput
from ..files import write_whole
from .report import Report
from .text import json_text


def write_report(report: Report, folder: Path, name: str = "report") -> Path:
    """Write NAME.html and NAME.json to a folder, in place of earlier ones, and return the page's path.

    Raises BadInput when they cannot be written.
    """
    from .page import page

    contents = {".json": json_text(report.as_json(), indent=1) + "\n", ".html": page(report)}  # the page last
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, content in contents.items():
            path = folder / f"{name}{ending}"
            write_whole(path, content)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}; choose another folder") from None
    return path
