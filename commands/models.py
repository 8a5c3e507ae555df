"""Commands that look at models without changing anything, and fetch them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import BadInput
from .options import hub_options, json_option, source_options
from .terminal import printable
from .values import SOURCE

if TYPE_CHECKING:
    from ..sources.hub.access import HubAccess


@click.command()
@click.argument("source", type=SOURCE)
@source_options
@json_option
def inspect(source: str, access: HubAccess, as_json: bool) -> None:
    """Show what a model is made of: blocks, parameters, dtypes, memory per token; or what an importance matrix is of.

    \b
    Examples:
      moecast inspect CHECKPOINT
      moecast inspect model.gguf --json
      moecast inspect imatrix.gguf
    """
    from ..sources.locate import open_headers
    from .console import make_progress
    from .report import show_imatrix, show_model

    try:
        with make_progress() as progress:
            model = open_headers(source, access, progress)
    except BadInput:
        from ..sources.imatrix import is_imatrix, read_imatrix

        if not is_imatrix(Path(source)):
            raise
        show_imatrix(read_imatrix(Path(source)), as_json)
    else:
        show_model(model, as_json)


@click.command()
@click.argument("repository")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the files, by default the Hub cache.")
@click.option("--dry-run", is_flag=True, help="List the files and their sizes, fetch nothing.")
@hub_options
@json_option
def download(repository: str, output: Path | None, dry_run: bool, access: HubAccess, as_json: bool) -> None:
    """Fetch what a conversion needs from the Hub: one commit, resumed where it stopped, verified.

    \b
    Examples:
      moecast download OWNER/NAME
      moecast download OWNER/NAME --revision main -o NAME/ --dry-run
    """
    from ..sources.hub.address import HubSource, parse_source
    from ..sources.hub.repository import fetch, list_files
    from .console import human_bytes, make_progress, print_columns, print_json

    source = parse_source(repository)
    if not isinstance(source, HubSource):
        raise BadInput(f"{repository} is a folder on this machine, expected a Hub repository such as owner/name")
    if dry_run:
        listing = list_files(source, access.revision, access.token)
        if as_json:
            print_json({"commit": listing.commit, "bytes": listing.bytes, "files": [asdict(f) for f in listing.files]})
        else:
            rows = [(file.name, human_bytes(file.bytes)) for file in listing.files]
            print_columns(f"{source.repository} at {listing.commit}", ("File", "Size"), rows)
        return
    with make_progress() as progress:
        folder = fetch(source, access.revision, access.token, progress, output)
    if as_json:
        print_json({"folder": folder})
    else:
        click.echo(printable(folder))


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List what --quant takes, with the bits per weight of routed experts, which are nearly all of a large model.

    `moecast plan SOURCE --quant NAME` shows the exact size for a model. What ONNX Runtime can run too is marked.

    \b
    Examples:
      moecast recipes
      moecast recipes --json
    """
    from ..quant.planning.onnx_plan import ONNX_RECIPES
    from ..quant.planning.recipes import ALIASES, RECIPES
    from .console import print_columns, print_json

    also = {name: [alias for alias, known in ALIASES.items() if known == name] for name in RECIPES}
    bits = {name: None if recipe.native else recipe.bits_of_experts() for name, recipe in RECIPES.items()}
    if as_json:
        keys = ("name", "aliases", "bits_per_weight", "onnx")
        facts = [(name, also[name], bits[name], name in ONNX_RECIPES) for name in RECIPES]
        print_json({"recipes": [dict(zip(keys, values, strict=True)) for values in facts]})
        return
    shown = {name: "as the source" if value is None else f"{value:.2f}" for name, value in bits.items()}
    rows = [(name, ", ".join(also[name]), shown[name], "yes" if name in ONNX_RECIPES else "") for name in RECIPES]
    print_columns("Recipes", ("Name", "Also called", "Bits per weight", "ONNX"), rows)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine offers: processor, kernels, GPU, memory, disk, engines.

    \b
    Examples:
      moecast doctor
      moecast doctor --json
    """
    from .doctor import examine, show

    show(examine(Path.cwd()), as_json)
