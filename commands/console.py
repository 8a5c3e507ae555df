"""What the commands show: progress on standard error, results as tables or JSON on standard output."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..reports.text import human_bytes as human_bytes
from ..reports.text import human_count as human_count
from ..reports.text import json_text
from .logs import LINES, LOGGER
from .terminal import printable

_PLAIN_INTERVAL = 5.0  # seconds between lines when nobody watches a terminal


def print_json(value: Mapping[str, Any]) -> None:
    print(json_text(value, indent=2))


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns: what, and its value."""
    table = Table(title=literal(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*map(literal, row))
    Console().print(table)


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=literal(title), title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")  # nothing of a file's name is lost
    for row in rows:
        table.add_row(*map(literal, row))
    Console().print(table)


def literal(text: object) -> Text:
    """Text that rich shows as it reads: brackets are no markup."""
    return Text(printable(text))


class TerminalProgress:
    """A bar for whoever watches a terminal; noted lines scroll by above it."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        self._progress.start()
        LINES.console = self._progress.console
        return self

    def __exit__(self, *error: object) -> None:
        LINES.console = None
        self._progress.stop()

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(printable(task), total=total, completed=done, detail="")

    def advance(self, amount: int, detail: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=amount, detail=printable(detail))

    def note(self, line: str) -> None:
        LOGGER.info(line)


class PlainProgress:
    """Lines for logs: one when a task begins and ends, and one every few seconds between, with the time left."""

    def __init__(self) -> None:
        self._task, self._total, self._done, self._printed = "", 0, 0, 0.0
        self._began, self._done_before = 0.0, 0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *error: object) -> None: ...

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        self._task, self._total, self._done, self._done_before = task, total, done, done
        self.note(f"{task}: {human_count(total)} {unit}" + (f", {done / total:.0%} done before" if done else ""))
        self._began = self._printed

    def advance(self, amount: int, detail: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if self._done >= self._total:
            self.note(f"{self._task}: 100% {detail}")
        elif now - self._printed > _PLAIN_INTERVAL:
            left = (now - self._began) / max(self._done - self._done_before, 1) * (self._total - self._done)
            self.note(f"{self._task}: {self._done / self._total:.0%} {detail}, {timedelta(seconds=round(left))} left")

    def note(self, line: str) -> None:
        self._printed = time.monotonic()
        LOGGER.info(line)


def make_progress() -> TerminalProgress | PlainProgress:
    """The progress that suits standard error; under --quiet, lines that only a log file gets."""
    watched = sys.stderr.isatty() and LINES.level <= logging.INFO
    return TerminalProgress() if watched else PlainProgress()
