"""A source that changed is refused by name, however well that is hidden; one that only moved is the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from click.testing import CliRunner, Result
from conftest import Checkpoint
from conversions import interrupting_after
from moecast.cli import main


def _convert(folder: Path, output: Path, *options: str) -> Result:
    command = [
        "convert",
        str(folder),
        "-o",
        str(output),
        "--name",
        "m",
        "--no-verify",
        "--no-calibration",
        "--no-report",
        *options,
    ]
    return CliRunner().invoke(main, command)


@pytest.fixture
def stopped(minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source of its own, and the output of a conversion of it that was stopped."""
    source, output = checkpoints.copied(minimax_fp8.folder, tmp_path / "source"), tmp_path / "out" / "model.gguf"
    with interrupting_after(30, monkeypatch):
        assert _convert(source, output).exit_code == 130
    return source, output


def _flipped(file: Path, at: float) -> bytes:
    """A file's content with a byte changed at a part of its length."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    return bytes(content)


def _edit(shard: Path, at: float) -> None:
    shard.write_bytes(_flipped(shard, at))


def _replace(shard: Path, at: float) -> None:
    other = shard.with_name("other")
    other.write_bytes(_flipped(shard, at))
    os.utime(other, ns=(0, shard.stat().st_mtime_ns))
    os.replace(other, shard)


@pytest.mark.parametrize("at", [0.5, 1.0])
@pytest.mark.parametrize("change", [_edit, _replace])
def test_a_changed_source_whose_time_is_set_back(
    stopped: tuple[Path, Path], change: Callable[[Path, float], None], at: float
) -> None:
    source, output = stopped
    shard = sorted(source.glob("*.safetensors"))[-1]
    before = shard.stat()
    change(shard, at)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    result = _convert(source, output)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert result.exit_code == 2 and shard.name in line and "use --overwrite to begin anew" in line
    assert _convert(source, output, "--overwrite").exit_code == 0


def test_a_copy_that_differs(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = stopped
    shutil.copytree(source, tmp_path / "copy")
    shard = sorted((tmp_path / "copy").glob("*.safetensors"))[-1]
    before = shard.stat()
    _edit(shard, 1.0)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = _convert(tmp_path / "copy", output)
    assert result.exit_code == 2 and f"{shard.name} was {before.st_size} bytes of " in result.stderr


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_source_that_moved_goes_on(
    stopped: tuple[Path, Path], tmp_path: Path, move: Callable[[Path, Path], object]
) -> None:
    """A copy keeps times as `cp -a`, file managers and `rsync -a` do."""
    source, output = stopped
    move(source, tmp_path / "elsewhere")
    result = _convert(tmp_path / "elsewhere", output)
    assert result.exit_code == 0 and "Resuming: " in result.stderr, result.stderr
    assert _convert(tmp_path / "elsewhere", tmp_path / "whole.gguf").exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
