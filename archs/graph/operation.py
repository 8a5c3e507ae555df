"""What every operation of a graph says of itself: the facts that planner, padding, memory and fit go by."""

from __future__ import annotations

from dataclasses import dataclass

from ..weights import Weight
from .parts import Norm

PASSING = 4  # numbers that exist beside a result while it is computed, in multiples of it


@dataclass(frozen=True)
class Width:
    """An inner width that may grow by zeros: it is the rows of some weights and the columns of others."""

    size: int
    rows: tuple[Weight, ...]
    columns: tuple[Weight, ...]


class Operation:
    """What a sublayer does between reading the residual and writing to it; a subclass is a frozen dataclass of weights.

    The facts here are true of an operation without state, scratch or experts; one that differs says so.
    """

    @property
    def reads(self) -> tuple[Weight, ...]:
        """The weights whose columns are the hidden size: they multiply what is read of the residual."""
        raise NotImplementedError

    @property
    def writes(self) -> tuple[Weight, ...]:
        """The weights and biases whose rows are the hidden size: they give what is added to the residual."""
        raise NotImplementedError

    @property
    def residual_norms(self) -> tuple[Norm, ...]:
        """Norms that read the residual itself, not what the sublayer has normed."""
        return ()

    @property
    def shares_state_of(self) -> int | None:
        """The number of the layer whose state is read instead of one of its own."""
        return None

    @property
    def widths(self) -> tuple[Width, ...]:
        """The inner widths that may grow without a change of the result."""
        return ()

    @property
    def stacks_by_input(self) -> tuple[tuple[Weight, ...], ...]:
        """The weights that stack one matrix for each expert; together those that read the same."""
        return ()

    @property
    def stacks(self) -> tuple[Weight, ...]:
        """The weights that stack one matrix for each expert."""
        return tuple(stack for alike in self.stacks_by_input for stack in alike)

    @property
    def experts_per_token(self) -> int:
        """How many experts a token goes to."""
        return 0

    @property
    def heads_per_group(self) -> int | None:
        """Query heads that share a key-value head as files tell it of a layer; None where they tell nothing."""
        return None

    @property
    def state_bytes_per_token(self) -> int:
        """Bytes that each further token adds to what is remembered of a text."""
        return 0

    @property
    def fixed_state_bytes(self) -> int:
        """Bytes that are remembered of a text of any length."""
        return 0

    def active_share(self, weight: Weight) -> float:
        """The part of one of its weights that a token touches."""
        return 1.0

    def scratch_values(self, context: int) -> int:
        """An upper bound of the numbers that exist beside weights and residual while a chunk of that length runs."""
        raise NotImplementedError
