"""The one error a user can cause."""

from __future__ import annotations


class BadInput(ValueError):
    """Something the user gave is wrong: a file, a tensor, a configuration value, an option.

    The message is one line: what is wrong, where (file, tensor or key), what was expected, what to do.
    The command line prints it and exits with code 2.
    """
