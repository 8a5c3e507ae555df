"""`--fit`: types for the memory of a machine, this one or one that options describe.

--vram is among the options of computing, because it bounds this run too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from ..errors import BadInput
from .options import grouped
from .values import Size

if TYPE_CHECKING:
    from ..convert.settings import Goal

_CONTEXT = 32768  # tokens


@dataclass(frozen=True)
class Fitting:
    """The machine that a file is to fit; what is None is as in this one."""

    ram: int | None = None
    context: int | None = None

    def goal(self, goal: Goal, vram: int | None) -> Goal:
        """What types follow from instead of a goal that was not given, for a GPU of `vram` bytes.

        Raises BadInput where one was.
        """
        from ..convert.settings import Goal
        from .serving import this_machine

        if goal != Goal():
            raise BadInput(
                "--fit finds the size by itself: leave out --quant, --size, --bpw, --plan, --like, --measure and "
                "--tensor-type"
            )
        return replace(goal, machine=this_machine(self.context or _CONTEXT, self.ram, vram))


def _fitting(fit: bool, **values: int | None) -> Fitting | None:
    if not fit and any(value is not None for value in values.values()):
        given = [f"--{name}" for name, value in values.items() if value is not None]
        raise BadInput(f"{' and '.join(given)}: add --fit, whose machine this describes")
    return Fitting(**values) if fit else None


_OPTIONS = (
    click.option("--fit", is_flag=True, help=f"Best plan for this machine's memory and {_CONTEXT} tokens of context."),
    click.option("--ram", type=Size(), help="With --fit: a machine with so much RAM instead."),
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
