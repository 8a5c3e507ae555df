"""Numbers as people read them, and progress: lines for logs, a bar on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moecast.commands.console import human_bytes, human_count, make_progress


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"),
        (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"),
        (2.5 * 2**30, "2.5 GiB"), (2**40, "1.0 TiB"), (1500 * 2**40, "1500.0 TiB"),
    ],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 K"),
        (999_999, "1.0 M"),
        (25_300_000, "25.3 M"),
        (228_689_764_864, "228.7 B"),
        (1.6e12, "1.60 T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text


def _work() -> None:
    """What commands do with a progress."""
    with make_progress() as progress:
        progress.begin("Converting", 2000, "tensors")
        progress.advance(500, "blk.0")
        progress.note("layer 0: relative error 1.0e-03")
        progress.advance(1500, "blk.1")


@contextmanager
def _clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> Iterator[None]:
    """Time as it is given, one reading after another."""
    readings = iter(seconds)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(readings))
        yield


def test_a_log_gets_a_line_when_a_task_begins_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    _work()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "Converting: 2.0 K tensors",
        "layer 0: relative error 1.0e-03",
        "Converting: 100% blk.1",
    ]


def test_a_log_hears_of_long_tasks_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_progress() as progress, _clock(monkeypatch, 0, 1, 6, 6, 7):
        progress.begin("Converting", 10, "tensors")
        for number in range(3):  # after one, six and seven seconds
            progress.advance(1, f"blk.{number}")
    assert capsys.readouterr().err.splitlines() == [
        "Converting: 10 tensors",
        "Converting: 20% blk.1, 0:00:24 left",
    ]


def test_a_task_of_nothing_divides_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress() as progress:
        progress.begin("Fetching", 0, "bytes")
        progress.advance(0)
    assert capsys.readouterr().err.splitlines()[0] == "Fetching: 0 bytes"


def _on_terminal(code: str) -> tuple[str, str]:
    """What a Python process writes to standard output, a pipe, and to standard error, a terminal."""
    pty: Any = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "24"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(controller, 1 << 16):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(controller)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, shown
    return output, shown.decode()


def test_a_terminal_gets_a_bar_that_goes_when_the_work_is_done() -> None:
    code = (
        "import sys\n"
        "from moecast.commands.console import make_progress\n"
        "with make_progress() as progress:\n"
        "    progress.begin('Converting', 2000, 'tensors')\n"
        "    progress.advance(500, 'blk.0')\n"
        "    progress.note('layer 0: relative error 1.0e-03')\n"
        "    progress.begin('Comparing', 10, 'chunks')\n"
        "    progress.advance(10, 'chunk 9')\n"
        "print('the result')\n"
    )
    output, shown = _on_terminal(code)
    assert output == "the result\n"
    assert "layer 0: relative error 1.0e-03\r\n" in shown
    assert "\x1b[?25l" in shown and shown.count("\x1b[?25h") == 1  # the cursor is hidden meanwhile, and comes back
    assert "Comparing" in shown and "100%" in shown and "chunk 9" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the bar's line is wiped
