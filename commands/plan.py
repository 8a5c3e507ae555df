"""The command that decides which types a file will have."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..documents import exists
from ..errors import BadInput, OutputExists
from .options import (
    Size,
    calibration_option,
    compute_dtype_option,
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
)

if TYPE_CHECKING:
    import torch

    from ..convert.plans.choose import Goal
    from ..quant.planning.fit import Machine


@click.command()
@click.argument("source")
@target_option
@goal_options
@click.option("--fit", is_flag=True, help="Best plan for the memory of this machine.")
@click.option("--ram", type=Size(), help="With --fit: a machine with so much RAM instead.")
@click.option("--vram", type=Size(), help="With --fit: a GPU with so much memory instead, 0 for none.")
@click.option("-c", "--context", default=32768, show_default=True, help="With --fit: tokens whose state must fit too.")
@click.option("--measure", is_flag=True, help="With --size or --bpw: measure the model, as convert does.")
@calibration_option
@imatrix_option
@memory_option
@compute_dtype_option
@error_feedback_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan to a file for --plan.")
@overwrite_option
@pad_option
@mtp_option
@hub_options
@json_option
def plan(
    source: str,
    file_format: str,
    goal: Goal,
    fit: bool,
    ram: int | None,
    vram: int | None,
    context: int,
    measure: bool,
    calibration: Path | None,
    imatrix: Path | None,
    memory: int | None,
    compute_dtype: torch.dtype,
    error_feedback: bool | None,
    output: Path | None,
    overwrite: bool,
    pad: bool,
    mtp: bool | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Show which type every tensor would get, and the exact size, without converting.

    Under a budget the types follow from what is typical of each role; with --measure, as in `convert`, from this model.

    \b
    Examples:
      moecast plan CHECKPOINT --quant Q3_K_M
      moecast plan OWNER/NAME --size 96GB -o plan.json
      moecast plan CHECKPOINT --size 96GB --measure --memory 32GB -o plan.json
      moecast plan OWNER/NAME --to onnx
      moecast plan OWNER/NAME --fit --vram 24GB --ram 96GB --context 32768
    """
    from ..convert.pipeline import name_of
    from ..convert.plans.choose import budget_of, choose_plan, feeds_back, fit_machine, refuse_mixed_types
    from ..convert.plans.measured import measured_plan
    from ..quant.planning.plan_file import write_plan_file
    from ..runner.measure.evaluate import CALIBRATION_TEXT
    from ..sources.locate import locate, open_headers
    from ..sources.model import open_model
    from .console import make_progress
    from .report import show_fit, show_plan

    if not fit and (ram is not None or vram is not None):
        raise BadInput("--ram and --vram describe a machine to fit: add --fit")
    if measure and (fit or not goal.is_budget):
        raise BadInput("--measure finds the best plan for a budget: add --size or --bpw, and leave out --fit")
    if output and exists(output) and not overwrite:
        raise OutputExists(output)
    with ExitStack() as stack:
        if measure:
            refuse_mixed_types(file_format)
            with make_progress() as progress:
                folder, _ = locate(source, revision, token, progress)
                model = open_model(folder)
                allocation = measured_plan(
                    model,
                    budget_of(model, goal),
                    output or Path(f"{name_of(model)}.json"),
                    calibration=calibration or CALIBRATION_TEXT,
                    imatrix=imatrix,
                    padding=pad,
                    mtp=mtp,
                    overwrite=overwrite,
                    memory=memory,
                    compute_dtype=compute_dtype,
                    error_feedback=feeds_back(error_feedback, goal, calibrated=not imatrix),
                    progress=progress,
                )
                chosen = stack.enter_context(allocation).plan
            show_plan(chosen, as_json)
        elif fit:
            found = fit_machine(open_headers(source, revision, token).graph, _machine(ram, vram, context), pad, mtp)
            chosen = found.plan
            show_fit(found, as_json)
        else:
            chosen = choose_plan(open_headers(source, revision, token), goal, file_format, pad, mtp)
            show_plan(chosen, as_json)
        if output:
            write_plan_file(chosen, output)


def _machine(ram: int | None, vram: int | None, context: int) -> Machine:
    """This machine, or the one that the options describe."""
    from ..quant.planning.fit import Machine
    from .doctor import examine

    facts = examine(Path.cwd())
    gpus = sum(int(gpu["bytes"]) for gpu in facts["gpus"])
    return Machine(int(facts["memory_bytes"]) if ram is None else ram, gpus if vram is None else vram, context)
