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

    contents = {".json": json_text(report.as_json(), indent=1) + "\n", ".html": page(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, content in contents.items():
            write_whole(folder / f"{name}{ending}", content)
    except OSError as error:
        raise BadInput(f"{error.filename or folder} cannot be written: {error.strerror}") from None
    return folder / f"{name}.html"
