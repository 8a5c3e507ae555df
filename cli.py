"""The commands: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import __version__
from .archs.errors import BadInput

if TYPE_CHECKING:
    from .runner.evaluate import Parity
    from .sources.model import Model
    from .sources.progress import Progress

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(click.ParamType[int]):
    """A number of bytes as people write it: 4GB and 4G are decimal, 4GiB is binary."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", value.strip(), re.IGNORECASE)
        if not match or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a size, expected for example 40GB or 36GiB", param, ctx)
        return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


class _Commands(click.Group):
    """Turns bad input into one line and exit code 2, whatever command it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BadInput as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted: nothing half-written is left; run the same command again.", err=True)
            ctx.exit(130)


def _shared(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
hub_options = _shared(
    click.option("--revision", help="Branch, tag or commit of a Hub repository."),
    click.option("--token", envvar="HF_TOKEN", help="Hub access token; by default the one `hf auth login` stored."),
)
text_options = _shared(
    click.option("-f", "--file", type=click.Path(path_type=Path), help="Evaluation text; a bundled one by default."),
    click.option("-c", "--context", default=512, show_default=True, help="Tokens in a chunk."),
    click.option("--chunks", type=int, help="Use at most this many chunks of the text."),
)
quant_options = _shared(
    click.option("--quant", default="Q4_K_M", show_default=True, help="Recipe, as llama-quantize names it, or native."),
    click.option("--pad/--no-pad", default=True, show_default=True, help="Fill rows up with zeros to fit the recipe."),
    click.option("--mtp/--no-mtp", default=None, help="Keep multi-token prediction.  [default: if it allows --pad]"),
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moecast")
def main() -> None:
    """Cast mixture-of-experts checkpoints into files that run on the machine you have, and prove the result.

    \b
    Examples:
      moecast inspect CHECKPOINT
      moecast convert OWNER/NAME --quant Q4_K_M
      moecast parity CHECKPOINT out/model.gguf --max-kld 0.05
    """


@main.command()
@click.argument("source")
@hub_options
@json_option
def inspect(source: str, revision: str | None, token: str | None, as_json: bool) -> None:
    """Show what a model is made of: blocks, parameters, dtypes, memory per token.

    \b
    Examples:
      moecast inspect CHECKPOINT
      moecast inspect model.gguf --json
    """
    from .report import show_model

    show_model(_open(source, revision, token), as_json)


@main.command()
@click.argument("source")
@quant_options
@hub_options
@json_option
def plan(
    source: str, quant: str, pad: bool, mtp: bool | None, revision: str | None, token: str | None, as_json: bool
) -> None:
    """Show which type every tensor would get, and the exact size, without converting.

    \b
    Examples:
      moecast plan CHECKPOINT --quant Q3_K_M
      moecast plan OWNER/NAME --quant IQ4_XS --json
    """
    from .quant.plan import plan_file
    from .quant.recipes import recipe_named
    from .report import show_plan

    show_plan(plan_file(_open(source, revision, token).graph, recipe_named(quant), pad, mtp), as_json)


@main.command()
@click.argument("source")
@click.option("-o", "--output", default=".", type=click.Path(path_type=Path), help="A .gguf file or a folder.")
@click.option("--to", "target", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="File format.")
@quant_options
@click.option("--split-max-size", type=Size(), help="Start a new file beyond this size, for example 40G.")
@click.option("--pre", help="Name of llama.cpp's text splitter, where the automatic choice is wrong.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Show types and size, write nothing.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the result with the source.")
@click.option("--max-kld", type=float, help="Exit with 1 when the mean KL divergence is above this.")
@text_options
@click.option("--threads", type=int, help="Threads to quantise with, all cores by default.")
@hub_options
@json_option
def convert(
    source: str,
    output: Path,
    target: str,
    quant: str,
    pad: bool,
    mtp: bool | None,
    split_max_size: int | None,
    pre: str | None,
    overwrite: bool,
    dry_run: bool,
    verify: bool,
    max_kld: float | None,
    file: Path | None,
    context: int,
    chunks: int | None,
    threads: int | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Convert a checkpoint and compare the result with it.

    SOURCE is a checkpoint folder, a Hub id, an hf:// or an https:// address.

    \b
    Examples:
      moecast convert CHECKPOINT -o out/ --quant Q4_K_M
      moecast convert OWNER/NAME --quant Q4_K_M --revision main --split-max-size 40G
    """
    from .console import watch
    from .convert.pipeline import convert as run
    from .quant.plan import plan_file
    from .quant.recipes import recipe_named
    from .report import show_conversion, show_plan
    from .runner.evaluate import EVALUATION_TEXT

    if dry_run:
        show_plan(plan_file(_open(source, revision, token).graph, recipe_named(quant), pad, mtp), as_json)
        return
    with watch() as progress:
        folder, provenance = _locate(source, revision, token, progress)
        result = run(
            folder,
            output,
            quant,
            padding=pad,
            mtp=mtp,
            name=provenance.get("repository", "").split("/")[-1] or None,
            pre=pre,
            split_max_bytes=split_max_size,
            overwrite=overwrite,
            verify=verify,
            file=file or EVALUATION_TEXT,
            context=context,
            chunks=chunks or _VERIFY_CHUNKS,
            threads=threads,
            provenance=provenance,
            progress=progress,
        )
    show_conversion(result, as_json)
    _judge(result.parity, max_kld)


@main.command()
@click.argument("model")
@text_options
@hub_options
@json_option
def perplexity(
    model: str,
    file: Path | None,
    context: int,
    chunks: int | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Perplexity of a checkpoint or a GGUF file on a text, defined as llama-perplexity does.

    \b
    Examples:
      moecast perplexity CHECKPOINT -f text.txt
      moecast perplexity model.gguf -f text.txt --chunks 20 --json
    """
    from .console import watch
    from .report import show_perplexity
    from .runner.evaluate import EVALUATION_TEXT
    from .runner.evaluate import perplexity as run

    opened = _open(model, revision, token)
    with watch() as progress:
        result = run(opened, file or EVALUATION_TEXT, context, chunks, progress)
    show_perplexity(str(opened.path), result, as_json)


@main.command()
@click.argument("reference")
@click.argument("candidate")
@text_options
@click.option("--max-kld", type=float, help="Exit with 1 when the mean KL divergence is above this.")
@hub_options
@json_option
def parity(
    reference: str,
    candidate: str,
    file: Path | None,
    context: int,
    chunks: int | None,
    max_kld: float | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """How far CANDIDATE is from REFERENCE: KL divergence, perplexity, agreement on the most probable token.

    \b
    Examples:
      moecast parity CHECKPOINT model.gguf --max-kld 0.05
      moecast parity a.gguf b.gguf -f text.txt --json
    """
    from .console import watch
    from .report import show_parity
    from .runner.evaluate import EVALUATION_TEXT
    from .runner.evaluate import parity as run

    first, second = _open(reference, revision, token), _open(candidate, None, token)
    with watch() as progress:
        result = run(first, second, file or EVALUATION_TEXT, context, chunks, progress)
    show_parity(f"{second.path} against {first.path}", result, as_json)
    _judge(result, max_kld)


@main.command()
@click.argument("repository")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the files, by default the Hub cache.")
@click.option("--dry-run", is_flag=True, help="List the files and their sizes, fetch nothing.")
@hub_options
@json_option
def download(
    repository: str, output: Path | None, dry_run: bool, revision: str | None, token: str | None, as_json: bool
) -> None:
    """Fetch what a conversion needs from the Hub: one commit, resumed where it stopped, verified.

    \b
    Examples:
      moecast download OWNER/NAME
      moecast download OWNER/NAME --revision main -o NAME/ --dry-run
    """
    from .console import human_bytes, print_columns, print_json, watch
    from .sources.hub import HubSource, fetch, list_files, parse_source

    source = parse_source(repository)
    if not isinstance(source, HubSource):
        raise BadInput(f"{repository} is a folder on this machine, expected a Hub repository such as owner/name")
    if dry_run:
        listing = list_files(source, revision, token)
        if as_json:
            print_json({"commit": listing.commit, "bytes": listing.bytes, "files": [asdict(f) for f in listing.files]})
        else:
            rows = [(file.name, human_bytes(file.bytes)) for file in listing.files]
            print_columns(f"{source.repository} at {listing.commit}", ("File", "Size"), rows)
        return
    with watch() as progress:
        folder = fetch(source, revision, token, progress, output)
    if as_json:
        print_json({"folder": folder})
    else:
        click.echo(folder)


@main.command()
@click.option("-o", "--output", default="out", show_default=True, type=click.Path(path_type=Path), help="Folder.")
@click.pass_context
def demo(ctx: click.Context, output: Path) -> None:
    """Convert the embedded tiny checkpoint, compare it with its source, and show how to serve it.

    \b
    Examples:
      moecast demo
    """
    from .archs.registry import architectures
    from .report import show_model

    source = Path(__file__).parent / "examples" / architectures()[0].example
    show_model(_open(str(source), None, None), as_json=False)
    ctx.invoke(convert, source=str(source), output=output, overwrite=True, chunks=32)


_VERIFY_CHUNKS = 16


def _locate(source: str, revision: str | None, token: str | None, progress: Progress) -> tuple[Path, dict[str, str]]:
    """The model on this machine, fetched if need be, and where it came from."""
    from .sources.hub import HubSource, fetch, parse_source

    if source.endswith(".gguf") and "://" not in source:
        return Path(source), {}
    parsed = parse_source(source)
    if not isinstance(parsed, HubSource):
        return parsed, {}
    folder = fetch(parsed, revision, token, progress)
    return folder, {"repository": parsed.repository, "revision": folder.name}


def _open(source: str, revision: str | None, token: str | None) -> Model:
    from .console import watch
    from .sources.model import open_model

    with watch() as progress:
        return open_model(_locate(source, revision, token, progress)[0])


def _judge(result: Parity | None, max_kld: float | None) -> None:
    if result and max_kld is not None and not result.mean_kld <= max_kld:
        click.echo(f"Failed: mean KL divergence {result.mean_kld:.6f} is above {max_kld}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
