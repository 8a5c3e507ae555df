"""Commands that make files."""

from __future__ import annotations

from pathlib import Path

import click

from .archs.errors import BadInput
from .cli_evaluate import judge
from .options import (
    Size,
    TypeOverride,
    hub_options,
    json_option,
    memory_option,
    mtp_option,
    pad_option,
    quant_option,
    target_option,
    text_options,
    threads_option,
)

_VERIFY_CHUNKS = 16


@click.command()
@click.argument("source")
@click.option("-o", "--output", default=".", type=click.Path(path_type=Path), help="A .gguf file or a folder.")
@target_option
@quant_option
@pad_option
@mtp_option
@click.option(
    "--activations",
    type=click.Choice(["int8", "float32"]),
    help="ONNX: what activations are rounded to before products.  [default: int8]",
)
@click.option("--split-max-size", type=Size(), help="Start a new file beyond this size, for example 40G.")
@click.option("--pre", help="Name of llama.cpp's text splitter, where the automatic choice is wrong.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Show types and size, write nothing.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Calibration text; a bundled one by default.")
@click.option("--no-calibration", is_flag=True, help="Weigh all columns of a weight alike.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="Use this importance matrix instead, GGUF or .dat.")
@click.option("--imatrix-out", type=click.Path(path_type=Path), help="Write what calibration found as GGUF.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the result with the source.")
@click.option("--max-kld", type=float, help="Exit with 1 when the mean KL divergence is above this.")
@text_options
@threads_option
@memory_option
@click.option("--scratch", type=Size(), help="Most disk for shards from the Hub; by default, that of two layers.")
@click.option("--keep-source", is_flag=True, help="Download everything from the Hub first, and keep it in its cache.")
@hub_options
@json_option
def convert(
    source: str,
    output: Path,
    target: str,
    quant: str | None,
    pad: bool,
    mtp: bool | None,
    activations: str | None,
    split_max_size: int | None,
    pre: str | None,
    overwrite: bool,
    dry_run: bool,
    calibration: Path | None,
    no_calibration: bool,
    imatrix: Path | None,
    imatrix_out: Path | None,
    verify: bool,
    max_kld: float | None,
    file: Path | None,
    context: int,
    chunks: int | None,
    threads: int | None,
    memory: int | None,
    scratch: int | None,
    keep_source: bool,
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
      moecast convert CHECKPOINT --to onnx -o out/
      moecast convert OWNER/NAME --quant IQ4_XS --scratch 20GB
    """
    from .console import watch
    from .convert.pipeline import convert as run
    from .quant.targets import plan_target
    from .report import show_conversion, show_plan
    from .runner.evaluate import CALIBRATION_TEXT, EVALUATION_TEXT
    from .sources.locate import describe, locate, locate_to_stream

    if keep_source and scratch is not None:
        raise BadInput("--keep-source keeps every shard and --scratch limits them: leave one of them out")
    if dry_run:
        show_plan(plan_target(target, describe(source, revision, token).graph, quant, pad, mtp), as_json)
        return
    with watch() as progress:
        found, provenance = (locate if keep_source else locate_to_stream)(source, revision, token, progress)
        result = run(
            found,
            output,
            quant,
            target=target,
            activations=activations,
            padding=pad,
            mtp=mtp,
            name=provenance.get("repository", "").split("/")[-1] or None,
            pre=pre,
            scratch=scratch,
            split_max_bytes=split_max_size,
            overwrite=overwrite,
            calibration=None if no_calibration else calibration or CALIBRATION_TEXT,
            imatrix=imatrix,
            imatrix_out=imatrix_out,
            verify=verify,
            file=file or EVALUATION_TEXT,
            context=context,
            chunks=chunks or _VERIFY_CHUNKS,
            threads=threads,
            memory=memory,
            provenance=provenance,
            progress=progress,
        )
    show_conversion(result, as_json)
    judge(result.parity, max_kld)


@click.command()
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
    quant: str | None,
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
    from .quant.targets import DEFAULT_QUANT
    from .report import show_conversion, show_plan
    from .sources.model import open_model

    quant = quant or DEFAULT_QUANT["gguf"]
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


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The importance matrix, .gguf.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Calibration text; a bundled one by default.")
@click.option("-c", "--context", default=512, show_default=True, help="Tokens in a chunk.")
@click.option("--chunks", type=int, help="Use at most this many chunks of the text.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@memory_option
@hub_options
@json_option
def imatrix(
    model: str,
    output: Path,
    calibration: Path | None,
    context: int,
    chunks: int | None,
    overwrite: bool,
    memory: int | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Measure how much each input of each weight matters, and write it as llama.cpp's importance matrix.

    \b
    Examples:
      moecast imatrix CHECKPOINT -o imatrix.gguf
      moecast imatrix OWNER/NAME -o imatrix.gguf --calibration text.txt --chunks 100
    """
    from .console import watch
    from .convert.calibrate import write_imatrix
    from .report import show_calibration
    from .runner.evaluate import CALIBRATION_TEXT
    from .sources.locate import locate

    with watch() as progress:
        folder, _ = locate(model, revision, token, progress)
        result = write_imatrix(
            folder,
            output,
            calibration or CALIBRATION_TEXT,
            context=context,
            chunks=chunks,
            overwrite=overwrite,
            memory=memory,
            progress=progress,
        )
    show_calibration(result, as_json)


@click.command()
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
