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
    file_format_option,
    form_options,
    grouped,
    json_option,
    measured_goal_options,
    measuring_options,
    overwrite_option,
    source_options,
    weighing_options,
)

if TYPE_CHECKING:
    from ..convert.settings import Calibration, Goal
    from ..quant.planning.fit import Machine
    from ..quant.planning.plan import Form
    from ..runner.settings import Compute
    from ..sources.hub.access import HubAccess


_CONTEXT = 32768  # tokens


def _machine(fit: bool, ram: int | None, vram: int | None, context: int | None) -> Machine | None:
    """This machine, or the one that the options describe; None where types do not follow from one."""
    from ..quant.planning.fit import Machine
    from .doctor import examine

    if not fit:
        if not ram is vram is context is None:
            raise BadInput("--ram, --vram and --context describe a machine to fit: add --fit")
        return None
    facts = examine(Path.cwd())
    gpus = sum(int(gpu["bytes"]) for gpu in facts["gpus"])
    memory = int(facts["memory_bytes"]) if ram is None else ram
    return Machine(memory, gpus if vram is None else vram, context or _CONTEXT)


machine_options = grouped(
    "machine",
    _machine,
    click.option("--fit", is_flag=True, help="Best plan for the memory of this machine."),
    click.option("--ram", type=Size(), help="With --fit: a machine with so much RAM instead."),
    click.option("--vram", type=Size(), help="With --fit: a GPU with so much memory instead, 0 for none."),
    click.option(
        "-c",
        "--context",
        type=click.IntRange(1),
        help=f"With --fit: tokens whose state must fit too.  [default: {_CONTEXT}]",
    ),
)


@click.command()
@click.argument("source")
@file_format_option
@measured_goal_options("With --size or --bpw: measure the model as `convert` does.  [default: do not]")
@machine_options
@form_options
@weighing_options
@measuring_options
@click.option("--tensors", "each", is_flag=True, help="List every tensor: name, type, shape, bytes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan to a file for --plan.")
@overwrite_option
@source_options
@json_option
def plan(
    source: str,
    file_format: str,
    goal: Goal,
    machine: Machine | None,
    form: Form,
    calibration: Calibration,
    compute: Compute,
    each: bool,
    output: Path | None,
    overwrite: bool,
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
    from ..convert.plans.choose import fit_machine, plan_for
    from ..convert.plans.measured import measured_plan
    from ..convert.settings import Goal
    from ..quant.planning.plan_file import write_plan_file
    from ..runner.settings import Compute
    from ..sources.locate import open_headers, open_source
    from .console import make_progress
    from .report import show_fit, show_plan

    if machine and goal != Goal():
        raise BadInput(
            "--fit finds the size by itself: leave out --quant, --size, --bpw, --plan, --like and --tensor-type"
        )
    if machine and file_format != "gguf":
        raise BadInput(f"--fit plans for llama.cpp, which runs GGUF files: leave out --to {file_format}")
    if compute != Compute() and not goal.measure:
        raise BadInput("--memory and --compute-dtype are for measuring: add --measure")
    if output and exists(output) and not overwrite:
        raise OutputExists(output)
    with ExitStack() as stack:
        if goal.measure:
            with make_progress() as progress:
                opened = open_source(source, access, True, progress)
                plan_for(opened.model, goal, form, calibration, file_format)  # refuses what cannot be
                path = output or Path(f"{opened.name}.json")
                measured = measured_plan(opened.model, goal, path, form, calibration, compute, overwrite, progress)
                chosen = stack.enter_context(measured).plan
            show_plan(chosen, as_json, each)
        else:
            with make_progress() as progress:
                model = open_headers(source, access, progress)
            if machine:
                found = fit_machine(model.graph, machine, form)
                chosen = found.plan
                show_fit(found, as_json, each)
            else:
                chosen = plan_for(model, goal, form, calibration, file_format)
                show_plan(chosen, as_json, each)
        if output:
            write_plan_file(chosen, output)
