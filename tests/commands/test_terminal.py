"""What reaches a terminal: foreign text as it reads, errors of one short line, the unforeseen with exit code 3."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from click.testing import CliRunner
from conftest import Checkpoint
from moecast.cli import main
from moecast.commands import models
from moecast.commands.terminal import MOST_CHARACTERS, one_line, printable
from moecast.errors import BadInput

pty = pytest.importorskip("pty")
MARKUP = "[/INST] [/b] [red] [bold]x[/bold] :smile: [link=http://a]"
_STYLE = r"\x1b\[[0-9;?]*[A-Za-z]"  # and movements, of rich's own bar
CONTROLS = "\x1b[31m\x07\x9b\r\u202e\u2028\udcff"


def test_printable() -> None:
    assert printable(CONTROLS) == r"\x1b[31m\x07\x9b\r\u202e\u2028\udcff"
    assert printable("größe 日本 👩‍👩‍👧 \u00a0\u3000") == "größe 日本 👩‍👩‍👧 \u00a0\u3000"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_errors_keep_their_beginning_and_end() -> None:
    assert one_line("first\nsecond\tthird") == r"first second\tthird"
    line = one_line("file.json: " + "x" * 9000 + ": fetch it again")
    assert len(line) == MOST_CHARACTERS and " ... " in line
    assert line.startswith("file.json: xxx") and line.endswith("xxx: fetch it again")
    assert len(one_line("\x1b" * 9000)) == MOST_CHARACTERS


def _raising(error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[int, str]:
    def run(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("moecast.sources.locate.open_headers", run)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = CliRunner().invoke(main, ["inspect", "owner/anything"])
    return result.exit_code, result.stderr


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "Input/output error", "a"), RecursionError("deep")])
def test_unforeseen_errors_exit_with_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    code, shown = _raising(error, monkeypatch, tmp_path)
    assert code == 3 and shown.count("\n") == 1 and len(shown) <= MOST_CHARACTERS + 1
    (log,) = tmp_path.iterdir()
    assert shown.startswith(f"Unexpected error: {type(error).__name__}: ") and shown.rstrip().endswith(str(log))
    assert "Traceback (most recent call last)" in log.read_text() and models.__name__.split(".")[-1] in log.read_text()


def test_panics_of_libraries_exit_with_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As PyO3 has it."""

    code, shown = _raising(PanicException("index out of bounds"), monkeypatch, tmp_path)
    assert code == 3 and "PanicException: index out of bounds" in shown


def test_foreseen_errors_exit_as_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, shown = _raising(BadInput("a: " + "y" * 9000 + CONTROLS + ": do that"), monkeypatch, tmp_path)
    assert code == 2 and len(shown) == MOST_CHARACTERS + 1 and shown.startswith("Error: a: y")
    assert not set(CONTROLS) & set(shown.rstrip("\n")) - set("[31m")
    assert _raising(KeyboardInterrupt(), monkeypatch, tmp_path)[0] == 130
    assert list(tmp_path.iterdir()) == []


def _on_terminal(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code and everything that a command shows on a terminal of 200 columns."""
    leader, follower = pty.openpty()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, "-m", "moecast.cli", *arguments]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment, cwd=cwd)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    return process.wait(), shown.decode()


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A checkpoint whose folder and tokens look like markup and hold what terminals obey."""
    folder = tmp_path / "m[" / "b]\x1b[31mred"
    checkpoints.save_minimax(folder, checkpoints.minimax_model(vocab_size=520))
    checkpoints.write_tokenizer(folder, 512)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = enumerate((MARKUP, "[/INST]", "\x1b]0;title\x07"), start=512)
    tokenizer["added_tokens"] += [{"id": id, "content": text, **kind} for id, text in added]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    # Notes name them: ends of texts for which a file has no room, and templates of which none is the default.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [510, 511, 512, 513, 514]}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    templates = [{"name": f"{MARKUP}\x1b[31mred", "template": "A"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    return folder


def _expect_harmless(shown: str) -> None:
    foreign = re.sub(_STYLE, "", shown)
    assert "\x1b" not in foreign and "\x07" not in foreign
    assert "\x1b[31mred" not in shown and "\x1b]0;" not in shown


@pytest.mark.slow
def test_markup_and_controls_on_a_terminal(hostile: Path, tmp_path: Path) -> None:
    code, shown = _on_terminal("inspect", "m[/b]\x1b[31mred", cwd=tmp_path)
    assert code == 0 and r"m[/b]\x1b[31mred" in shown
    _expect_harmless(shown)
    options = ("--quant", "Q8_0", "--no-calibration", "-c", "16", "--chunks", "2", "--pre", "gpt-2")
    code, shown = _on_terminal("convert", hostile.name, *options, cwd=hostile.parent)
    assert code == 0 and r"b]\x1b[31mred-Q8_0.gguf" in shown, shown
    assert f"'{MARKUP}', '[/INST]'" in shown and f"only {MARKUP}\\x1b[31mred: llama.cpp" in shown
    _expect_harmless(shown)
    code, shown = _on_terminal("inspect", "n[/b]\x1b[31mred.gguf", cwd=tmp_path)
    assert code == 2 and r"n[/b]\x1b[31mred.gguf: no such model" in shown and shown.count("\n") == 1
    _expect_harmless(shown)


def test_generated_text_on_a_terminal(minimax: Checkpoint, tmp_path: Path) -> None:
    """A random model writes control characters too; only a terminal must not get them."""
    arguments = ("run", str(minimax.folder), "-p", "A", "-n", "64", "--temperature", "99", "--seed", "1")
    text = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)["text"]
    controls = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
    assert controls.search(text)
    code, shown = _on_terminal(*arguments, cwd=tmp_path)
    assert code == 0 and not controls.search(re.sub(_STYLE, "", shown))
