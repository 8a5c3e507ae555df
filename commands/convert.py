"""Commands that make files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import BadInput
from .evaluate import exit_if_worse
from .fitting import Fitting, fitting_options
from .options import (
    calibrating_options,
    calibration_options,
    calibration_text_options,
    compute_options,
    form_options,
    goal_options,
    ignore_config_option,
    imatrix_option,
    json_option,
    max_kld_option,
    measured_goals_options,
    output_options,
    overwrite_option,
    quantizing_options,
    source_options,
    streaming_source_options,
)
from .reporting import write_conversion_reports
from .terminal import printable
from .texts import category_options
from .values import SOURCE

if TYPE_CHECKING:
    from ..convert.settings import Calibration, Goal, Output
    from ..quant.planning.plan import Form
    from ..runner.settings import Compute, Evaluation
    from ..sources.hub.access import HubAccess


@click.command()
@click.argument("source", type=SOURCE)
@output_options
@measured_goals_options("With --size or --bpw: measure the model to choose types.  [default: measure]")
@fitting_options
@form_options
@click.option("--dry-run", is_flag=True, help="Show types and size as `moecast plan` does, without measuring.")
@calibration_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare the result with the source.")
@click.option(
    "--report/--no-report", default=True, show_default=True, help="Write NAME.report.html and .json beside the output."
)
@max_kld_option
@category_options
@compute_options
@streaming_source_options
@json_option
def convert(
    source: str,
    output: Output,
    goals: tuple[Goal, ...],
    fitting: Fitting | None,
    form: Form,
    dry_run: bool,
    calibration: Calibration,
    verify: bool,
    report: bool,
    max_kld: float | None,
    evaluation: Evaluation,
    compute: Compute,
    access: HubAccess,
    as_json: bool,
) -> None:
    """Convert a checkpoint and compare the result with it.

    SOURCE is a checkpoint folder, a Hub id, an hf:// or an https:// address. Several recipes are written in one pass:
    SOURCE is read, calibrated on and evaluated once, and each file is the one that its recipe alone gives.

    \b
    Examples:
      moecast convert CHECKPOINT -o out/ --quant Q4_K_M
      moecast convert OWNER/NAME -o out/ --quant Q6_K,Q5_K_M,Q4_K_M,IQ3_XXS
      moecast convert OWNER/NAME --size 96GB
      moecast convert OWNER/NAME --fit --ram 96GB --vram 24GB
      moecast convert OWNER/NAME --quant Q4_K_M --revision main --split-max-size 40G
      moecast convert CHECKPOINT --quant Q4_K_M --tensor-type ffn_down_exps=q6_k
      moecast convert CHECKPOINT --to onnx -o out/
      moecast convert OWNER/NAME --quant IQ4_XS --scratch 20GB
    """
    from ..convert.settings import VERIFICATION, require_one_pass, require_sound

    if max_kld is not None and not verify:
        raise BadInput("--max-kld judges the comparison with the source: leave out --no-verify")
    if dry_run and goals[0].measure:
        raise BadInput("--dry-run does not measure: use `moecast plan --measure`")
    if fitting:
        goals = (fitting.goal(goals[0], compute.vram),)
    require_one_pass(goals, output.reuse)
    for goal in goals:
        require_sound(goal, calibration, output.file_format)

    from ..convert.pipeline import convert as run
    from ..convert.plans.choose import plan_for
    from ..sources.locate import open_headers
    from .console import make_progress
    from .conversions import show_conversions
    from .report import show_plans

    if dry_run:
        with make_progress() as progress:
            model = open_headers(source, access, progress)
        show_plans([plan_for(model, goal, form, calibration, output.file_format) for goal in goals], as_json)
        return
    if evaluation.chunks is None:
        evaluation = replace(evaluation, chunks=VERIFICATION.chunks)
    with make_progress() as progress:
        results = run(
            source,
            output,
            goals,
            form=form,
            calibration=replace(calibration, context=evaluation.context),
            evaluation=evaluation if verify else None,
            compute=compute,
            access=access,
            progress=progress,
        )
    show_conversions(results, as_json, goals[0].machine)
    if report:
        write_conversion_reports(results)
    exit_if_worse([(result.output, result.parity) for result in results], max_kld)


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@goal_options
@imatrix_option
@click.option("--allow-requantize", is_flag=True, help="Accept tensors that are quantized already.")
@ignore_config_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Show types and size, write nothing.")
@quantizing_options
@json_option
def quantize(
    source: Path,
    output: Path,
    goal: Goal,
    imatrix: str | None,
    allow_requantize: bool,
    ignore_config: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    compute: Compute,
    as_json: bool,
) -> None:
    """Quantize a GGUF file to another GGUF file.

    \b
    Examples:
      moecast quantize model-BF16.gguf model-IQ4_XS.gguf --quant IQ4_XS --imatrix imatrix.gguf
      moecast quantize in.gguf out.gguf --quant Q4_K_M --tensor-type ffn_down_exps=q6_k
    """
    from ..convert.requantize import plan_requantized, requantize
    from ..sources.model import open_model
    from .console import make_progress
    from .report import show_conversion, show_plan

    model = open_model(source, ignored=ignore_config)
    if dry_run:
        show_plan(plan_requantized(model, goal, imatrix), as_json)
        return
    with make_progress() as progress:
        result = requantize(
            model,
            output,
            goal,
            imatrix=imatrix,
            allow_requantize=allow_requantize,
            compute=compute,
            overwrite=overwrite,
            progress=progress,
        )
    show_conversion(result, as_json)


@click.command()
@click.argument("models", metavar="MODEL", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The importance matrix, .gguf.")
@click.option("--merge", is_flag=True, help="Merge importance matrices of one model, given in place of it.")
@calibration_text_options
@overwrite_option
@calibrating_options
@source_options
@json_option
def imatrix(
    models: tuple[str, ...],
    output: Path,
    merge: bool,
    calibration: Calibration,
    overwrite: bool,
    compute: Compute,
    access: HubAccess,
    as_json: bool,
) -> None:
    """Measure how much each input of each weight matters, and write it as llama.cpp's importance matrix.

    \b
    Examples:
      moecast imatrix CHECKPOINT -o imatrix.gguf
      moecast imatrix OWNER/NAME -o imatrix.gguf --calibration text.txt --chunks 100
      moecast imatrix --merge chat.gguf code.gguf -o imatrix.gguf
    """
    if len(models) > 1 and not merge:
        raise BadInput(f"imatrix measures one model, not {len(models)}; --merge joins importance matrices")
    source = "" if merge else SOURCE(models[0])

    from ..convert.calibrate import write_imatrix
    from ..convert.gguf.imatrix import merge_imatrices
    from ..sources.imatrix import read_imatrix
    from ..sources.locate import locate
    from ..sources.model import open_model
    from .console import make_progress
    from .report import show_calibration, show_imatrix

    if merge:
        merge_imatrices(models, output, overwrite)
        show_imatrix(read_imatrix(output), as_json)
        return
    with make_progress() as progress:
        folder, provenance = locate(source, access, progress)
        opened = open_model(folder, ignored=access.ignore_config)
        result = write_imatrix(opened, output, calibration, compute, overwrite, progress, provenance)
    show_calibration(result, as_json)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
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
def demo(output: Path) -> None:
    """Convert the embedded tiny checkpoint, compare it with its source, and show how to serve it.

    \b
    Examples:
      moecast demo
    """
    from ..archs.registry import architectures
    from ..convert.pipeline import convert as run
    from ..convert.settings import Output
    from ..runner.settings import Evaluation
    from ..sources.locate import open_headers
    from .console import make_progress
    from .report import show_conversion, show_model

    example = next(architecture.example for architecture in architectures() if architecture.example)
    source = Path(__file__).parents[1] / "examples" / example
    show_model(open_headers(str(source)), as_json=False)
    with make_progress() as progress:
        output_file, evaluation = Output(output, overwrite=True), Evaluation(chunks=32)
        result = run(source, output_file, evaluation=evaluation, progress=progress)
    show_conversion(result, as_json=False)
    write_conversion_reports([result])
