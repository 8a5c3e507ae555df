"""What a resumed conversion shows and tells: where it begins, one time left, and what all runs took together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conversions import convert, stopped_after
from moecast.convert.conversion import Conversion
from moecast.convert.resume.journal import journal_folder
from moecast.convert.resume.records import Spent, entry, read_record, sealed
from moecast.convert.settings import Goal
from moecast.progress import NoProgress
from moecast.quant.planning.file_formats import plan_format
from moecast.quant.planning.plan import Form
from moecast.sources.model import open_model

SOURCE = checkpoints.EXAMPLES / "minimax-m2-tiny"
RESUMING = r"Resuming: ([\d.]+) of ([\d.]+) MB are there"


class Recorded(NoProgress):
    """All that was shown of the last task, and all notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.task: tuple[str, int, str, int] = ("", 0, "", 0)
        self.advanced = 0

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        self.task, self.advanced = (task, total, unit, done), 0

    def advance(self, amount: int, detail: str = "") -> None:
        self.advanced += amount

    def note(self, line: str) -> None:
        self.notes.append(line)


def _convert(output: Path, quant: str | Goal = "Q8_0", progress: NoProgress | None = None) -> Conversion:
    options: dict[str, Any] = {"context": 32, "chunks": 2, "calibration": None, "padding": False}
    if isinstance(quant, Goal):
        options |= {"calibration": _excerpt(output.parent), "error_feedback": False}
    return convert(SOURCE, output, quant, progress=progress, **options)


def _excerpt(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "text"
    file.write_text(checkpoints.TEXT.read_text(encoding="utf-8")[:1200], encoding="utf-8")
    return file


def _stop(output: Path, quant: str | Goal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a conversion within its last layers."""
    with stopped_after(100, monkeypatch):
        _convert(output, quant)


def _took(output: Path, spent: Spent) -> None:
    """Let the record of an output say that work took so much."""
    records = journal_folder(output) / "records"
    content = records.read_bytes()
    records.write_bytes(content + sealed(entry([], spent), read_record(content).seed))


def test_the_bar_starts_where_the_work_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, resumed = Recorded(), Recorded()
    _convert(tmp_path / "whole.gguf", progress=fresh)
    assert fresh.task[::3] == ("Converting", 0) and fresh.advanced == fresh.task[1]
    _stop(tmp_path / "m.gguf", "Q8_0", monkeypatch)
    _convert(tmp_path / "m.gguf", progress=resumed)
    task, total, _, done = resumed.task
    assert (task, total) == fresh.task[:2] and 0 < done < total and resumed.advanced == total - done
    (line,) = (line for line in resumed.notes if line.startswith(("Resuming", "Starting")))
    found = re.fullmatch(RESUMING, line)
    assert found
    plan = plan_format("gguf", open_model(SOURCE).graph, "Q8_0", Form(padding=False))
    assert float(found[2]) == pytest.approx(plan.bytes / 1e6, rel=0.01)  # three digits are shown
    assert float(found[1]) / float(found[2]) == pytest.approx(done / total, rel=0.1)  # some weights are F32
    assert not any("left" in note for note in fresh.notes + resumed.notes)


def test_what_all_runs_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop(tmp_path / "m.gguf", "Q8_0", monkeypatch)
    assert 0 < read_record((journal_folder(tmp_path / "m.gguf") / "records").read_bytes()).spent.seconds < 1000
    _took(tmp_path / "m.gguf", Spent(5000.0, 1 << 50))
    made = _convert(tmp_path / "m.gguf")
    assert 5000 < made.seconds < 6000 and made.peak_rss_bytes == 1 << 50 and made.resumed
    again = _convert(tmp_path / "other.gguf")
    assert again.seconds < 1000 and again.peak_rss_bytes < 1 << 50 and not again.resumed


def test_measuring_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, goal = tmp_path / "m.gguf", Goal(size=2_500_000)
    _stop(output, goal, monkeypatch)
    _took(output.with_name("m.gguf.plan"), Spent(20000.0, 1 << 40))
    _took(output, Spent(5000.0, 1 << 50))
    made = _convert(output, goal)
    assert 25000 < made.seconds < 26000 and made.peak_rss_bytes == 1 << 50 and made.resumed


@pytest.mark.slow
def test_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pty: Any = pytest.importorskip("pty")
    _stop(tmp_path / "m.gguf", "Q8_0", monkeypatch)
    leader, follower = pty.openpty()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "xterm"}
    options = ["--quant", "Q8_0", "--no-pad", "--no-calibration", "-c", "32", "--chunks", "2"]
    command = [sys.executable, "-m", "moecast.cli", "convert", str(SOURCE), "-o", str(tmp_path / "m.gguf"), *options]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        content = b""
        try:
            while part := os.read(leader, 1 << 16):
                content += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(leader)
    assert process.returncode == 0, content
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", content.decode())
    found = re.findall(RESUMING, shown)
    assert len(found) == 1
    percents = [int(percent) for percent in re.findall(r"Converting[^\d%]*(\d+)%", shown)]
    expected = 100 * float(found[0][0]) / float(found[0][1])
    assert percents[0] > expected / 2 and percents == sorted(percents) and percents[-1] == 100
    assert re.search(r"Layer \d+: [^\n]*relative error", shown) and "left" not in shown
    assert "s in all runs" in shown
