"""The errors that end a command in one line: bad input, an existing output, an interruption."""

from __future__ import annotations

from pathlib import Path


class MoecastError(Exception):
    """What ends the work; the message is one line, which the command line prints before it exits with code 2."""


class BadInput(MoecastError, ValueError):
    """Something the user gave is wrong: a file, a tensor, a configuration value, an option.

    The message says what is wrong, where (file, tensor or key), what was expected, what to do.
    """


class Interrupted(MoecastError):
    """The input is sound but the work cannot go on now: the disk is full, the connection is lost.

    What was done is kept, and the same command continues once the cause is removed. It is no BadInput, so that what
    explains bad input on its way never takes it for that.
    """


class OutputExists(BadInput):
    """What should be written is there already."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists: use --overwrite to replace it, or another name")
