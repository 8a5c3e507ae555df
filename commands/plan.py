"""The command that decides which types a file will have."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..documents import exists
from ..errors import BadInput, OutputExists
from .fitting import Fitting, fitting_options_with_context
from .logs import typed_command
from .options import (
    file_format_option,
    form_options,
    json_option,
    measured_goal_options,
    measuring_options,
    overwrite_option,
    require_files,
    reuse_option,
    source_options,
    weighing_options,
)
from .reporting import report_option, save_report
from .values import SOURCE

if TYPE_CHECKING:
    from ..convert.settings import Calibration, Goal
    from ..quant.planning.plan import Form
    from ..runner.settings import Compute
    from ..sources.hub.access import HubAccess


@click.command()
@click.argument("source", type=SOURCE)
@file_format_option
@measured_goal_options("With --size or --bpw: measure the model as `convert` does.  [default: do not]")
@fitting_options_with_context
@form_options
@weighing_options
@measuring_options
@click.option("--tensors", "each", is_flag=True, help="List every tensor: name, type, shape, bytes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan to a file for --plan.")
@overwrite_option
@reuse_option
@report_option
@source_options
@json_option
def plan(
    source: str,
    file_format: str,
    goal: Goal,
    fitting: Fitting | None,
    form: Form,
    calibration: Calibration,
    compute: Compute,
    each: bool,
    output: Path | None,
    overwrite: bool,
    reuse: Path | None,
    report_folder: Path | None,
    access: HubAccess,
    as_json: bool,
) -> None:
    """Show which type every tensor gets from `convert` with the same options, and the exact size, without converting.

    Only --size and --bpw are another matter: `convert` measures the model first, and here types follow from what is
    typical of each role, which takes seconds. --measure measures here too; `convert --no-measure` does not.

    \b
    Examples:
      moecast plan CHECKPOINT --quant Q3_K_M --tensors
      moecast plan OWNER/NAME --size 96GB -o plan.json
      moecast plan CHECKPOINT --size 96GB --measure --memory 32GB -o plan.json
      moecast plan OWNER/NAME --to onnx
      moecast plan OWNER/NAME --fit --vram 24GB --ram 96GB --context 32768
    """
    from ..convert.settings import Output, require_sound
    from ..runner.settings import Compute

    if fitting:
        goal = fitting.goal(goal, compute.vram)
        compute = replace(compute, vram=None)  # which is told
    require_sound(goal, calibration, file_format)
    if compute != Compute() and not goal.measure:
        raise BadInput(
            "--memory, --compute-dtype, --device and --vram are for measuring: add --measure, or --fit for a machine "
            "of that --vram"
        )
    if reuse and not goal.measure:
        raise BadInput("--reuse takes what was measured for an earlier output: add --measure")
    require_files({"--reuse": reuse})
    if output and exists(output) and not overwrite:
        raise OutputExists(output)

    from ..convert.plans.choose import fit_machine, plan_for
    from ..convert.plans.measured import measured_plan
    from ..quant.planning.plan_file import write_plan_file
    from ..reports.gather import plan_report
    from ..sources.locate import locate_imatrix, open_headers, open_source
    from .console import make_progress
    from .report import show_fit, show_plan

    with ExitStack() as stack:
        if goal.measure:
            with make_progress() as progress:
                opened = open_source(source, access, True, progress)
                if calibration.imatrix:
                    calibration = replace(calibration, imatrix=locate_imatrix(calibration.imatrix, access, progress))
                plan_for(opened.model, goal, form, calibration, file_format)  # refuses what cannot be
                here = Output(output or Path(f"{opened.name}.json"), overwrite=overwrite, reuse=reuse)
                measured = measured_plan(opened.model, goal, here, form, calibration, compute, progress)
                chosen = stack.enter_context(measured).plan
            show_plan(chosen, as_json, each)
        else:
            with make_progress() as progress:
                model = open_headers(source, access, progress)
            if goal.machine:
                found = fit_machine(model.graph, goal.machine, form)
                chosen = found.plan
                show_fit(found, as_json, each)
            else:
                chosen = plan_for(model, goal, form, calibration, file_format)
                show_plan(chosen, as_json, each)
        if output:
            write_plan_file(chosen, output)
        if report_folder:
            save_report(plan_report(chosen, source, typed_command()), report_folder)
