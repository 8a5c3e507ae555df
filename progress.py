"""The protocol by which long work reports progress; the command line draws it, libraries may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens, in order: `begin` one task, `advance` it until its total, `note` a line at any time."""

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """A task of `total` units starts, of which an earlier run has `done` some; it replaces the one before."""

    def advance(self, amount: int, detail: str = "") -> None:
        """`amount` more units are done; `detail` says what was done last."""

    def note(self, line: str) -> None:
        """A line worth keeping: one layer's result, a warning."""


class NoProgress:
    """The progress of somebody who does not watch."""

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int, detail: str = "") -> None: ...

    def note(self, line: str) -> None: ...
