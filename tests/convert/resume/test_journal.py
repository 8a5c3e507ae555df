"""One output is written by one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import Checkpoint
from moecast.cli import main
from moecast.convert.resume import journal
from moecast.convert.resume.journal import Journal
from moecast.errors import BadInput


def _convert(folder: Path, output: Path, *options: str) -> Result:
    command = ["convert", str(folder), "-o", str(output), "--no-verify", "--no-calibration", "--no-report", *options]
    return CliRunner().invoke(main, command)


def test_two_processes_at_one_output(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and changes nothing for it."""
    code = (
        "import sys, moecast.convert.encode as encode\n"
        "from moecast.convert import Calibration, convert\n"
        "quantize, left = encode.quantize_weight, iter(range(40))\n"
        "def waiting(*arguments):\n"
        "    if next(left, None) == 39:\n"
        "        print('at work', flush=True)\n"
        "        sys.stdin.readline()\n"
        "    return quantize(*arguments)\n"
        "encode.quantize_weight = waiting\n"
        "convert(sys.argv[1], sys.argv[2], calibration=Calibration(None), evaluation=None)\n"
    )
    output = tmp_path / "out" / "model.gguf"
    command = [sys.executable, "-c", code, str(minimax_fp8.folder), str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "at work\n"
        for options in ((), ("--overwrite",)):
            result = _convert(minimax_fp8.folder, output, *options)
            assert result.exit_code == 2
            (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
            assert line.endswith("model.gguf is being written by another process: wait for it, or stop it")
        first.communicate("\n")
    assert first.returncode == 0
    made = output.read_bytes()
    assert _convert(minimax_fp8.folder, output, "--overwrite").exit_code == 0
    assert output.read_bytes() == made
    assert sorted(path.name for path in output.parent.iterdir()) == ["model.fingerprints.json", "model.gguf"]


def test_a_record_that_goes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes between opening and locking: its record is gone, and nobody else would see ours."""

    def late(descriptor: int) -> bool:
        (tmp_path / ".out.journal" / "records").unlink()
        return True

    monkeypatch.setattr(journal, "lock", late)
    with pytest.raises(BadInput, match="is being written by another process"):
        Journal(tmp_path / "out", {"source": "this"})
