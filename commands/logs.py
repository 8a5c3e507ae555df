"""What a command says beside its result: lines on standard error and in a log file, more or fewer of them.

Modules say at DEBUG what they decide, with `logging.getLogger(__name__)`; progress and what users should know is INFO.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import __version__
from ..errors import BadInput
from .terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = logging.getLogger("moecast")
ARGUMENTS = "moecast.arguments"  # where a context keeps what was typed
_TOKEN = re.compile(r"hf_\w{8,}")


class Lines(logging.Handler):
    """Shows records on standard error, above the progress bar where `console` draws one."""

    console: Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record), keep="\n" if record.exc_info else "")
        if self.console is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.console.print(text, markup=False, emoji=False, highlight=False)


class _WithoutSecrets(logging.Formatter):
    """A record as a line with its time, in which no token stands."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.secrets = {token} if (token := os.environ.get("HF_TOKEN")) else set()

    def format(self, record: logging.LogRecord) -> str:
        return _hidden(printable(super().format(record), keep="\n" if record.exc_info else ""), self.secrets)


def _hidden(text: str, secrets: Iterable[str]) -> str:
    """Text in which no token stands."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _TOKEN.sub("hf_***", text)


def typed_command() -> str:
    """The command that is running, as it can be run again, without tokens."""
    context = click.get_current_context()
    given = context.params.get("token")
    return _hidden(shlex.join(("moecast", *context.find_root().meta.get(ARGUMENTS, ()))), [given] if given else ())


LINES = Lines(logging.INFO)
LOGGER.addHandler(LINES)
LOGGER.setLevel(logging.INFO)


@contextmanager
def one_command() -> Iterator[None]:
    """What the options of a command set ends with it."""
    try:
        yield
    finally:
        LINES.setLevel(logging.INFO)
        LOGGER.setLevel(logging.INFO)
        for handler in [*LOGGER.handlers]:
            if isinstance(handler, logging.FileHandler):
                LOGGER.removeHandler(handler)
                handler.close()


def _say(level: int) -> None:
    if LINES.level != logging.INFO:
        raise BadInput("--quiet and --verbose exclude each other: give one")
    LINES.setLevel(level)
    LOGGER.setLevel(min(level, LOGGER.level))


def _quiet(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        _say(logging.ERROR)


def _verbose(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        _say(logging.DEBUG)


def _log_file(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        handler = logging.FileHandler(path, "a", "utf-8", errors="backslashreplace")
    except OSError as error:
        raise BadInput(f"--log-file {path} cannot be written: {error.strerror}") from None
    formatter = _WithoutSecrets()
    if token := context.params.get("token"):  # an eager option: it comes before this one
        formatter.secrets.add(token)
    handler.setFormatter(formatter)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    typed = shlex.join(context.meta.get(ARGUMENTS, ()))
    handler.handle(logging.makeLogRecord({"levelname": "INFO", "msg": f"moecast {__version__}: moecast {typed}"}))


LOG_OPTIONS = (
    click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_quiet, help="Show results and errors only."
    ),
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_verbose, help="Say what is decided, and why."
    ),
    click.option(
        "--log-file",
        type=click.Path(dir_okay=False, path_type=Path),
        expose_value=False,
        callback=_log_file,
        help="Append all that is said to this file, with times.",
    ),
)
