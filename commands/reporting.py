"""The option for reports, and what writes them after a command has shown its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import BadInput
from .logs import LOGGER, typed_command

if TYPE_CHECKING:
    from ..convert.conversion import Conversion
    from ..reports.report import Report

report_option = click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write report.html and report.json there, in place of earlier ones.",
)


def write_conversion_reports(results: Sequence[Conversion]) -> None:
    """The report beside each output, and one that compares several; a conversion stands without them too."""
    from ..reports.gather import conversion_report, conversions_report

    folder, command = results[0].output.parent, typed_command()
    reports = {_name(result): conversion_report(result, command) for result in results}
    if len(results) > 1 and all(result.parity for result in results):
        reports[_name(results[0]).rpartition(f"-{results[0].recipe}")[0]] = conversions_report(results, command)
    try:
        for name, report in reports.items():
            save_report(report, folder, f"{name}.report")
    except BadInput as error:
        LOGGER.warning(f"No report: {error}")


def _name(result: Conversion) -> str:
    return result.output.stem if result.output.suffix == ".gguf" else result.output.name


def save_report(report: Report, folder: Path, name: str = "report") -> None:
    """Write a report, and say where."""
    from ..reports.write import write_report

    LOGGER.info(f"Report: {write_report(report, folder, name)}")
