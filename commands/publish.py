"""The command that publishes converted files with a card that stands on their measurements."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import __version__
from ..errors import BadInput
from .logs import LOGGER
from .options import hub_options, json_option
from .terminal import one_line, printable

if TYPE_CHECKING:
    from ..reports.card import Statement
    from ..reports.folder import PublishedFolder
    from ..sources.hub.access import HubAccess
    from ..sources.hub.address import HubSource
    from ..sources.hub.upload import Publication


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Keep README.md, report and plans in this folder too."
)
@click.option("--dry-run", is_flag=True, help="Write what would be published to --output, upload nothing.")
@click.option("--private", is_flag=True, help="The repository must be private; a new one is made so.")
@click.option(
    "--base-model", metavar="OWNER/NAME", help="The Hub repository of what was converted from a folder on this machine."
)
@click.option("--despite", metavar="REASON", help="Publish files with faults; these and the reason stand in the card.")
@hub_options
@json_option
def publish(
    folder: Path,
    repository: str,
    output: Path | None,
    dry_run: bool,
    private: bool,
    base_model: str | None,
    despite: str | None,
    access: HubAccess,
    as_json: bool,
) -> None:
    """Upload GGUF files to the Hub with a model card that says what was measured.

    FOLDER holds files of `moecast convert` and their reports. Those that were not measured, that lose to the stock mix
    beside them, or whose calibration missed experts, are refused. One commit holds all; its checksums are compared.

    \b
    Examples:
      moecast publish out/ OWNER/NAME-GGUF --dry-run -o card/
      moecast publish out/ OWNER/NAME-GGUF --private
      moecast publish out/ OWNER/NAME-GGUF --base-model ORIGIN/NAME
      moecast publish out/ OWNER/NAME-GGUF --despite "experts 3 and 9 of layer 0 are never routed to"
    """
    from ..reports.folder import read_folder
    from ..reports.publication import write_publication

    target = _repository(repository, "to publish to")
    target = replace(target, revision=access.revision or target.revision)
    source = _repository(base_model, "of --base-model").repository if base_model is not None else None
    made = read_folder(folder, source)
    statement = _statement(made, despite)
    if not made.base_model:
        LOGGER.warning("The card names no base model: say with --base-model OWNER/NAME what was converted")
    with ExitStack() as stack:
        place = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moecast-")))
        files = write_publication(made, target.repository, place, statement)
        if dry_run:
            _show_planned(target, files, as_json)
        else:
            _show(_upload(target, files, access, private), as_json)


def _repository(address: str, use: str) -> HubSource:
    from ..sources.hub.address import parse_file

    source, file = parse_file(address)
    if file:
        raise BadInput(f"{address!r} names a file, expected the repository {use}, owner/name")
    return source


def _statement(made: PublishedFolder, despite: str | None) -> Statement | None:
    """What the card says of faults. Raises BadInput after a line for each, where nothing is to be said."""
    from ..reports.card import Statement

    faults = made.faults()
    if not faults:
        return None
    if not (despite or "").strip():
        for fault in faults:
            LOGGER.error(one_line(f"Error: {fault}"))
        raise BadInput(f"{made.path} is not published: mend it, or say with --despite REASON why it should be")
    return Statement(faults, despite or "")


def _upload(target: HubSource, files: dict[str, Path], access: HubAccess, private: bool) -> Publication:
    from ..sources.hub.upload import upload
    from .console import make_progress

    message = f"{sum(name.endswith('.gguf') for name in files)} GGUF files and their card, by moecast {__version__}"
    with make_progress() as progress:
        return upload(target, files, message, access.token, private, progress)


def _show_planned(target: HubSource, files: dict[str, Path], as_json: bool) -> None:
    from .console import human_bytes, print_columns, print_json

    sizes = {name: path.stat().st_size for name, path in files.items()}
    if as_json:
        listed = [{"name": name, "bytes": size, "sha256": None, "uploaded": False} for name, size in sizes.items()]
        print_json({"repository": target.repository, "url": target.url, "commit": None, "files": listed})
        return
    rows = [(name, human_bytes(size)) for name, size in sizes.items()]
    print_columns(f"Nothing is uploaded; {target.repository} would get", ("File", "Size"), rows)


def _show(result: Publication, as_json: bool) -> None:
    from .console import human_bytes, print_columns, print_json

    if as_json:
        print_json(asdict(result))
        return
    rows = [(file.name, human_bytes(file.bytes), "sent" if file.uploaded else "was there") for file in result.files]
    print_columns(f"{result.repository} at {result.commit}", ("File", "Size", ""), rows)
    click.echo(printable(result.url))
