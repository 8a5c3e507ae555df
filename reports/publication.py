"""Writes what goes beside published files: the card with its picture, the report of all, and the plan of each."""

from __future__ import annotations

import shutil
from pathlib import Path

from .. import __version__
from ..errors import BadInput
from ..files import write_whole
from ..quant.planning.plan_file import write_plan_file
from ..sources.model_card import CARD
from .card import PICTURE, Statement, card
from .charts import pareto_picture
from .folder import PublishedFolder, plan_names
from .report import Provenance, Report
from .write import write_report

_REPORT = ("report.html", "report.json")


def write_publication(
    folder: PublishedFolder, repository: str, output: Path, statement: Statement | None = None
) -> dict[str, Path]:
    """Write README.md, its picture, reports and plans to a folder; returns all files to publish, by name.

    Raises BadInput when they cannot be written.
    """
    reports = [path for file in folder.files for path in _reports_of(folder.path, file.name)]
    alone, plans = len(folder.files) == 1, plan_names(folder)
    shown = [f"report{path.suffix}" for path in reports] if alone else [*_REPORT]
    pictures = [PICTURE] if folder.are_compared else []
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / CARD, card(folder, repository, statement))
        for name in pictures:
            (output / name).write_bytes(pareto_picture(folder.candidates))
        if alone:
            for path, name in zip(reports, shown, strict=True):
                shutil.copyfile(path, output / name)
        else:
            write_report(_report(folder, repository), output)
    except OSError as error:
        raise BadInput(f"{error.filename or output} cannot be written: {error.strerror}") from None
    for file, name in zip(folder.files, plans, strict=True):
        write_plan_file(file.plan, output / name)
    models = [path for file in folder.files for path in file.paths]
    found = [*models, *folder.matrices, *(() if alone else reports)]
    return {path.name: path for path in (*(output / name for name in (CARD, *pictures, *shown, *plans)), *found)}


def _reports_of(folder: Path, name: str) -> list[Path]:
    paths = (folder / f"{name}.{report}" for report in _REPORT)
    return [path for path in paths if path.exists()]


def _report(folder: PublishedFolder, repository: str) -> Report:
    """All files that were measured side by side; the same data make the same report."""
    reports = [file.report for file in folder.files if file.report]
    source = folder.base_model or str(folder.files[0].metadata.get("general.name", repository))
    created = max((report.provenance.created for report in reports), default="")
    provenance = Provenance(source, versions={"moecast": __version__}, created=created)
    return Report("comparison", repository, provenance, candidates=folder.candidates)
