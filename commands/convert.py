"""Commands that make files."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import BadInput
from .evaluate import exit_if_worse
from .options import (
    Size,
    TypeOverride,
    calibration_option,
    chunk_options,
    compute_dtype_option,
    dry_run_option,
    error_feedback_option,
    goal_options,
    hub_options,
    imatrix_option,
    json_option,
    memory_option,
    mtp_option,
    overwrite_option,
    pad_option,
    target_option,
    text_options,
    threads_option,
)
from .terminal import printable

if TYPE_CHECKING:
    import torch

    from ..convert.plans.choose import Goal
    from ..quant.planning.plan import Plan

_VERIFY_CHUNKS = 16


@click.command()
@click.argument("source")
@click.option("-o", "--output", default=".", type=click.Path(path_type=Path), help="A .gguf file or a folder.")
@target_option
@goal_options
@click.option("--measure/--no-measure", default=True, show_default=True, help="With --size or --bpw: probe the model.")
@pad_option
@mtp_option
@click.option(
    "--activations",
    type=click.Choice(["int8", "float32"]),
    help="ONNX: what activations are rounded to before products.  [default: int8]",
)
@click.option("--split-max-size", type=Size(), help="Start a new file beyond this size, for example 40G.")
@click.option("--pre", help="Name of llama.cpp's text splitter, where the automatic choice is wrong.")
@overwrite_option
@dry_run_option
@calibration_option
@click.option("--no-calibration", is_flag=True, help="Weigh all columns of a weight alike.")
@imatrix_option
@click.option("--imatrix-out", type=click.Path(path_type=Path), help="Write what calibration found as GGUF.")
@click.option("--min-expert-tokens", default=0, help="Stop where an expert saw fewer calibration tokens than this.")
@error_feedback_option
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the result with the source.")
@click.option("--max-kld", type=float, help="Exit with 1 when the mean KL divergence is above this.")
@text_options
@threads_option
@compute_dtype_option
@memory_option
@click.option("--scratch", type=Size(), help="Most disk for shards from the Hub; by default, that of two layers.")
@click.option("--keep-source", is_flag=True, help="Download everything from the Hub first, and keep it in its cache.")
@hub_options
@json_option
def convert(
    source: str,
    output: Path,
    file_format: str,
    goal: Goal,
    measure: bool,
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
    min_expert_tokens: int,
    error_feedback: bool | None,
    verify: bool,
    max_kld: float | None,
    file: Path | None,
    context: int,
    chunks: int | None,
    threads: int | None,
    compute_dtype: torch.dtype,
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
      moecast convert OWNER/NAME --size 96GB
      moecast convert OWNER/NAME --quant Q4_K_M --revision main --split-max-size 40G
      moecast convert CHECKPOINT --to onnx -o out/
      moecast convert OWNER/NAME --quant IQ4_XS --scratch 20GB
    """
    from ..convert.pipeline import convert as run
    from ..convert.pipeline import name_of, output_path
    from ..convert.plans.choose import budget_of, choose_plan, feeds_back, refuse_mixed_types
    from ..convert.plans.measured import measured_plan
    from ..runner.measure.evaluate import CALIBRATION_TEXT, EVALUATION_TEXT
    from ..sources.hub.repository import HubCheckpoint
    from ..sources.locate import locate, locate_on_demand, open_headers
    from ..sources.model import Model, open_model
    from .console import make_progress
    from .report import show_conversion, show_plan

    if keep_source and scratch is not None:
        raise BadInput("--keep-source keeps every shard and --scratch limits them: leave one of them out")
    if dry_run:
        show_plan(choose_plan(open_headers(source, revision, token), goal, file_format, pad, mtp), as_json)
        return
    text = None if no_calibration else calibration or CALIBRATION_TEXT
    error_feedback = feeds_back(error_feedback, goal, calibrated=bool(text and not imatrix))
    with make_progress() as progress, ExitStack() as stack:
        # Measuring reads the model more than once, so it has to be here as a whole.
        stay = keep_source or not goal.is_recipe
        found, provenance = (locate if stay else locate_on_demand)(source, revision, token, progress)
        name = provenance.get("repository", "").split("/")[-1] or None
        origin: Path | HubCheckpoint | Model = found
        plan: str | Plan | None = goal.quant
        if not goal.is_recipe:
            assert isinstance(found, Path)
            origin = open_model(found)
        if isinstance(origin, Model) and goal.is_budget and measure:
            refuse_mixed_types(file_format)
            budget = budget_of(origin, goal)
            allocation = measured_plan(
                origin,
                budget,
                output_path(output, name or name_of(origin), budget.name, file_format),
                calibration=text,
                imatrix=imatrix,
                context=context,
                padding=pad,
                mtp=mtp,
                overwrite=overwrite,
                memory=memory,
                compute_dtype=compute_dtype,
                error_feedback=error_feedback,
                progress=progress,
            )
            plan = stack.enter_context(allocation).plan
        elif isinstance(origin, Model):
            plan = choose_plan(origin, goal, file_format, pad, mtp, calibrated=bool(text or imatrix))
        result = run(
            origin,
            output,
            plan,
            file_format=file_format,
            activations=activations,
            padding=pad,
            mtp=mtp,
            name=name,
            pre=pre,
            scratch=scratch,
            split_max_bytes=split_max_size,
            overwrite=overwrite,
            calibration=text,
            imatrix=imatrix,
            imatrix_out=imatrix_out,
            min_expert_tokens=min_expert_tokens,
            verify=verify,
            file=file or EVALUATION_TEXT,
            context=context,
            chunks=chunks or _VERIFY_CHUNKS,
            threads=threads,
            compute_dtype=compute_dtype,
            error_feedback=error_feedback,
            memory=memory,
            provenance=provenance,
            progress=progress,
        )
    show_conversion(result, as_json)
    exit_if_worse(result.parity, max_kld)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@goal_options
@imatrix_option
@click.option(
    "--tensor-type", "tensor_types", multiple=True, type=TypeOverride(), help="Type of tensors whose names match."
)
@click.option("--allow-requantize", is_flag=True, help="Accept tensors that are quantized already.")
@overwrite_option
@dry_run_option
@threads_option
@json_option
def quantize(
    source: Path,
    output: Path,
    goal: Goal,
    imatrix: Path | None,
    tensor_types: tuple[tuple[str, str], ...],
    allow_requantize: bool,
    overwrite: bool,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Quantize a GGUF file to another GGUF file.

    \b
    Examples:
      moecast quantize model-BF16.gguf model-IQ4_XS.gguf --quant IQ4_XS --imatrix imatrix.gguf
      moecast quantize in.gguf out.gguf --quant Q4_K_M --tensor-type ffn_down_exps=q6_k
    """
    from ..convert.plans.choose import choose_plan
    from ..convert.requantize import plan_requantized, requantize
    from ..quant.planning.file_formats import DEFAULT_QUANT
    from ..sources.model import open_model
    from .console import make_progress
    from .report import show_conversion, show_plan

    model = open_model(source)
    plan: str | Plan = goal.quant or DEFAULT_QUANT["gguf"]
    if not goal.is_recipe:
        plan = choose_plan(model, goal, padding=False, calibrated=imatrix is not None)
    if dry_run:
        show_plan(plan_requantized(model, plan, tensor_types, imatrix is not None), as_json)
        return
    with make_progress() as progress:
        result = requantize(
            model,
            output,
            plan,
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
@calibration_option
@chunk_options
@overwrite_option
@compute_dtype_option
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
    compute_dtype: torch.dtype,
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
    from ..convert.calibrate import write_imatrix
    from ..runner.measure.evaluate import CALIBRATION_TEXT
    from ..sources.locate import locate
    from .console import make_progress
    from .report import show_calibration

    with make_progress() as progress:
        folder, _ = locate(model, revision, token, progress)
        result = write_imatrix(
            folder,
            output,
            calibration or CALIBRATION_TEXT,
            context=context,
            chunks=chunks,
            overwrite=overwrite,
            compute_dtype=compute_dtype,
            memory=memory,
            progress=progress,
        )
    show_calibration(result, as_json)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def prepack(folder: Path, as_json: bool) -> None:
    """Add weights in the order that this machine likes best to an ONNX folder, so that they can be mapped.

    ONNX Runtime otherwise keeps a copy of all weights in memory. The folder more than doubles in size, and runs on
    other machines as before.

    \b
    Examples:
      moecast prepack model-onnx/
    """
    from ..convert.onnx.prepack import prepack as run
    from .console import human_bytes, make_progress, print_json

    with make_progress() as progress:
        size = run(folder, progress)
    if as_json:
        print_json({"folder": folder, "bytes": size})
    else:
        click.echo(f"{printable(folder)}: {human_bytes(size)} added")


@click.command()
@click.option("-o", "--output", default="out", show_default=True, type=click.Path(path_type=Path), help="Folder.")
@click.pass_context
def demo(ctx: click.Context, output: Path) -> None:
    """Convert the embedded tiny checkpoint, compare it with its source, and show how to serve it.

    \b
    Examples:
      moecast demo
    """
    from ..archs.registry import architectures
    from ..sources.locate import open_headers
    from .report import show_model

    source = Path(__file__).parents[1] / "examples" / architectures()[0].example
    show_model(open_headers(str(source), None, None), as_json=False)
    # Padding pays on rows of thousands; it would multiply rows as short as these.
    ctx.invoke(convert, source=str(source), output=output, pad=False, overwrite=True, chunks=32)
