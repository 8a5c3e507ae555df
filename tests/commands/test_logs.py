"""How much a command says: --quiet, --verbose, and a log file in which no token stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from moecast.cli import main
from moecast.errors import BadInput

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimax-m2-tiny"
SECRET = "hf_SentinelTokenThatNobodyMaySee"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) \S")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _converted(folder: Path, *options: object) -> Result:
    result = _run("convert", EXAMPLE, "-o", folder, "--quant", "Q8_0", "-c", "16", "--chunks", "1", *options)
    assert result.exit_code == 0, result.output
    return result


def test_a_log_file_grows_and_the_result_is_the_same(tmp_path: Path) -> None:
    log = tmp_path / "moecast.log"
    plain = _converted(tmp_path / "plain")
    _converted(tmp_path / "first", "--log-file", log)
    once = log.read_text(encoding="utf-8")
    result = _converted(tmp_path / "second", "--log-file", log, "--quiet")
    lines = log.read_text(encoding="utf-8")
    assert lines.startswith(once) and all(map(LINE.match, lines.splitlines()))
    assert lines.count(" INFO Starting: ") == lines.count(" DEBUG Types: Q8_0 (as asked)") == 2
    assert "Starting: " in plain.stderr and result.stderr == "" and "Perplexity" in result.stdout


def test_verbose_says_what_is_decided_and_why(tmp_path: Path) -> None:
    result = _converted(tmp_path, "-v")
    assert "Calibration: none, no type here is so coarse that it would pay" in result.stderr
    assert "Types: " not in _converted(tmp_path, "--overwrite").stderr


@pytest.mark.parametrize("written", [["--token", SECRET], [f"--token={SECRET}"], ["--token", "of another kind"], []])
def test_no_token_in_a_log_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: list[str]) -> None:
    secret = written[-1].removeprefix("--token=") if written else "only in the environment"
    if not written:
        monkeypatch.setenv("HF_TOKEN", secret)

    def fail(*arguments: object) -> None:
        raise BadInput(f"the server said {secret}")

    monkeypatch.setattr("moecast.sources.locate.open_headers", fail)
    log = tmp_path / "log"
    for order in ([*written, "--log-file", log], ["--log-file", log, *written]):
        assert _run("inspect", EXAMPLE, *order).exit_code == 2
    text = log.read_text(encoding="utf-8")
    assert text.count("Error: the server said") == 2 and secret not in text


def test_tracebacks_of_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("moecast.sources.locate.open_headers", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "Traceback (most recent call last)" in _run("inspect", EXAMPLE, "-v").stderr
    quiet = _run("inspect", EXAMPLE, "-q", "--log-file", tmp_path / "log")
    assert quiet.exit_code == 3 and quiet.stderr.count("\n") == 1
    assert "Traceback (most recent call last)" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_log_file_that_cannot_be(tmp_path: Path) -> None:
    result = _run("recipes", "--log-file", tmp_path / "nowhere" / "log")
    assert result.exit_code == 2 and "--log-file" in result.stderr and "cannot be written" in result.stderr
    result = _run("recipes", "-q", "-v")
    assert result.exit_code == 2 and "--quiet and --verbose exclude each other" in result.stderr


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_them(name: str) -> None:
    options = {option for parameter in main.commands[name].params for option in parameter.opts}
    assert {"-q", "--quiet", "-v", "--verbose", "--log-file"} <= options
