"""`--fit`: types for the memory of a machine, this one or one that options describe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import BadInput
from .options import Size, grouped

if TYPE_CHECKING:
    from ..convert.settings import Goal

_CONTEXT = 32768  # tokens


@dataclass(frozen=True)
class Fitting:
    """The machine that a file is to fit; what is None is as in this one."""

    ram: int | None = None
    vram: int | None = None
    context: int | None = None

    def goal(self, goal: Goal) -> Goal:
        """What types follow from instead of a goal that was not given. Raises BadInput where one was."""
        from ..convert.settings import Goal
        from ..quant.planning.fit import Machine

        if goal != Goal():
            raise BadInput(
                "--fit finds the size by itself: leave out --quant, --size, --bpw, --plan, --like, --measure and "
                "--tensor-type"
            )
        ram, vram = self.ram, self.vram
        if ram is None or vram is None:
            from .doctor import examine

            facts = examine(Path.cwd())
            ram = int(facts["memory_bytes"]) if ram is None else ram
            vram = sum(int(gpu["bytes"]) for gpu in facts["gpus"]) if vram is None else vram
        return replace(goal, machine=Machine(ram, vram, self.context or _CONTEXT))


def _fitting(fit: bool, **values: int | None) -> Fitting | None:
    if not fit and any(value is not None for value in values.values()):
        *others, last = (f"--{name}" for name in ("ram", "vram", "context") if name in values)
        raise BadInput(f"{', '.join(others)} and {last} describe a machine to fit: add --fit")
    return Fitting(**values) if fit else None


_OPTIONS = (
    click.option("--fit", is_flag=True, help=f"Best plan for this machine's memory and {_CONTEXT} tokens of context."),
    click.option("--ram", type=Size(), help="With --fit: a machine with so much RAM instead."),
    click.option("--vram", type=Size(), help="With --fit: a GPU with so much memory instead, 0 for none."),
)
fitting_options = grouped("fitting", _fitting, *_OPTIONS)
fitting_options_with_context = grouped(
    "fitting",
    _fitting,
    *_OPTIONS,
    click.option(
        "-c",
        "--context",
        type=click.IntRange(1),
        help=f"With --fit: tokens whose state must fit too.  [default: {_CONTEXT}]",
    ),
)
