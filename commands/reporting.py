"""The option for reports, and what writes them after a command has shown its result."""

from __future__ import annotations

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


def write_conversion_report(result: Conversion) -> None:
    """The report beside the output; a conversion stands without it too."""
    from ..reports.gather import conversion_report

    name = result.output.stem if result.output.suffix == ".gguf" else result.output.name
    try:
        save_report(conversion_report(result, typed_command()), result.output.parent, f"{name}.report")
    except BadInput as error:
        LOGGER.warning(f"No report: {error}")


def save_report(report: Report, folder: Path, name: str = "report") -> None:
    """Write a report, and say where."""
    from ..reports.write import write_report

    LOGGER.info(f"Report: {write_report(report, folder, name)}")
