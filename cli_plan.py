"""The command that decides which types a file will have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .archs.errors import BadInput
from .options import Size, goal_options, hub_options, json_option, mtp_option, pad_option, target_option

if TYPE_CHECKING:
    from .convert.choose import Goal
    from .quant.fit import Machine


@click.command()
@click.argument("source")
@target_option
@goal_options
@click.option("--fit", is_flag=True, help="Best plan for the memory of this machine.")
@click.option("--ram", type=Size(), help="With --fit: a machine with so much RAM instead.")
@click.option("--vram", type=Size(), help="With --fit: a GPU with so much memory instead, 0 for none.")
@click.option("-c", "--context", default=32768, show_default=True, help="With --fit: tokens whose state must fit too.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan to a file for --plan.")
@pad_option
@mtp_option
@hub_options
@json_option
def plan(
    source: str,
    target: str,
    goal: Goal,
    fit: bool,
    ram: int | None,
    vram: int | None,
    context: int,
    output: Path | None,
    pad: bool,
    mtp: bool | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Show which type every tensor would get, and the exact size, without converting.

    Under a budget the types follow from what is typical of each role; `convert` measures the model itself.

    \b
    Examples:
      moecast plan CHECKPOINT --quant Q3_K_M
      moecast plan OWNER/NAME --size 96GB -o plan.json
      moecast plan OWNER/NAME --to onnx
      moecast plan OWNER/NAME --fit --vram 24GB --ram 96GB --context 32768
    """
    from .convert.choose import choose_plan, fit_machine
    from .quant.plan_file import write_plan_file
    from .report import show_fit, show_plan
    from .sources.locate import describe

    model = describe(source, revision, token)
    if not fit and (ram is not None or vram is not None):
        raise BadInput("--ram and --vram describe a machine to fit: add --fit")
    if fit:
        found = fit_machine(model.graph, _machine(ram, vram, context), pad, mtp)
        chosen = found.plan
        show_fit(found, as_json)
    else:
        chosen = choose_plan(model, goal, target, pad, mtp)
        show_plan(chosen, as_json)
    if output:
        write_plan_file(chosen, output)


def _machine(ram: int | None, vram: int | None, context: int) -> Machine:
    """This machine, or the one that the options describe."""
    from .doctor import examine
    from .quant.fit import Machine

    facts = examine(Path.cwd())
    gpus = sum(int(gpu["bytes"]) for gpu in facts["gpus"])
    return Machine(int(facts["memory_bytes"]) if ram is None else ram, gpus if vram is None else vram, context)
