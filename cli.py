"""The commands: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import __version__
from .archs.errors import BadInput
from .options import (
    Commands,
    Size,
    TypeOverride,
    hub_options,
    json_option,
    mtp_option,
    pad_option,
    quant_option,
    text_options,
    threads_option,
)

if TYPE_CHECKING:
    from .runner.evaluate import Parity
    from .sources.model import Model


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
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
    from .sources.locate import describe

    show_model(describe(source, revision, token), as_json)


@main.command()
@click.argument("source")
@quant_option
@pad_option
@mtp_option
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
    from .sources.locate import describe

    show_plan(plan_file(describe(source, revision, token).graph, recipe_named(quant), pad, mtp), as_json)


@main.command()
@click.argument("source")
@click.option("-o", "--output", default=".", type=click.Path(path_type=Path), help="A .gguf file or a folder.")
@click.option("--to", "target", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="File format.")
@quant_option
@pad_option
@mtp_option
@click.option("--split-max-size", type=Size(), help="Start a new file beyond this size, for example 40G.")
@click.option("--pre", help="Name of llama.cpp's text splitter, where the automatic choice is wrong.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Show types and size, write nothing.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the result with the source.")
@click.option("--max-kld", type=float, help="Exit with 1 when the mean KL divergence is above this.")
@text_options
@threads_option
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
    from .sources.locate import describe, locate

    if dry_run:
        show_plan(plan_file(describe(source, revision, token).graph, recipe_named(quant), pad, mtp), as_json)
        return
    with watch() as progress:
        folder, provenance = locate(source, revision, token, progress)
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
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@quant_option
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix of llama.cpp, GGUF or .dat.")
@click.option(
    "--tensor-type", "tensor_types", multiple=True, type=TypeOverride(), help="Type of tensors whose names match."
)
@click.option("--allow-requantize", is_flag=True, help="Accept tensors that are quantised already.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Show types and size, write nothing.")
@threads_option
@json_option
def quantize(
    source: Path,
    output: Path,
    quant: str,
    imatrix: Path | None,
    tensor_types: tuple[tuple[str, str], ...],
    allow_requantize: bool,
    overwrite: bool,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Quantise a GGUF file to another GGUF file.

    \b
    Examples:
      moecast quantize model-BF16.gguf model-IQ4_XS.gguf --quant IQ4_XS --imatrix imatrix.gguf
      moecast quantize in.gguf out.gguf --quant Q4_K_M --tensor-type ffn_down_exps=q6_k
    """
    from .console import watch
    from .convert.requantize import plan_requantized, requantize
    from .report import show_conversion, show_plan
    from .sources.model import open_model

    if dry_run:
        show_plan(plan_requantized(open_model(source), quant, tensor_types, imatrix is not None), as_json)
        return
    with watch() as progress:
        result = requantize(
            source,
            output,
            quant,
            imatrix=imatrix,
            tensor_types=tensor_types,
            allow_requantize=allow_requantize,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    show_conversion(result, as_json)


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
    from .sources.locate import describe

    source = Path(__file__).parent / "examples" / architectures()[0].example
    show_model(describe(str(source), None, None), as_json=False)
    # Padding pays on rows of thousands; it would multiply rows as short as these.
    ctx.invoke(convert, source=str(source), output=output, pad=False, overwrite=True, chunks=32)


_VERIFY_CHUNKS = 16


def _open(source: str, revision: str | None, token: str | None) -> Model:
    from .console import watch
    from .sources.locate import locate
    from .sources.model import open_model

    with watch() as progress:
        return open_model(locate(source, revision, token, progress)[0])


def _judge(result: Parity | None, max_kld: float | None) -> None:
    if result and max_kld is not None and not result.mean_kld <= max_kld:
        click.echo(f"Failed: mean KL divergence {result.mean_kld:.6f} is above {max_kld}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
