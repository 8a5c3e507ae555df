"""Damaged journals of a conversion that was stopped: the same file, or one line, after which --overwrite helps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import moecast.convert.encode
import pytest
from click.testing import CliRunner, Result
from fuzzing import EXAMPLES, bounded
from moecast.cli import main
from moecast.convert.resume import journal
from mutations import damaged_bytes

FEW, MANY = 6, 150
CHECKPOINT = EXAMPLES / "minimax-m2-tiny"


@dataclass(frozen=True)
class Stopped:
    """A folder as it is left behind, and the bytes of the whole file."""

    folder: Path
    whole: bytes


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    whole, folder = (tmp_path_factory.mktemp(name) for name in ("whole", "stopped"))
    assert _convert(whole).exit_code == 0
    quantize, left = moecast.convert.encode.quantize_weight, iter(range(30))

    def until_stopped(*arguments: object, **options: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return quantize(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "BATCH_SECONDS", 0.0)
        patched.setattr(moecast.convert.encode, "quantize_weight", until_stopped)
        assert _convert(folder).exit_code == 130
    return Stopped(folder, (whole / "out.gguf").read_bytes())


def _convert(folder: Path, *options: str) -> Result:
    text = ("-f", str(EXAMPLES / "text" / "evaluation.txt"), "-c", "16", "--chunks", "2")
    kept = ("--no-calibration", "--no-pad", "--quant", "Q4_0", *text, *options)
    with bounded():
        return CliRunner().invoke(main, ["convert", str(CHECKPOINT), "-o", str(folder / "out.gguf"), *kept])


def _damaged_line(content: bytes, random: Random) -> bytes:
    """A record with a line replaced, repeated, or in another order."""
    lines = content.splitlines(keepends=True)
    at = random.randrange(len(lines))
    kind = random.randrange(4)
    if kind == 0:
        odd = (b"[]", b"{}", b"7", b"[[]]", b"[[1,2]]", b'[["started","../victim",1]]', b'[["saved"]]', b'[[{"a":1}]]')
        lines[at] = random.choice(odd) + b"\n"
    elif kind == 1:
        lines.insert(at, lines[-1])
    elif kind == 2:
        random.shuffle(lines)
    else:
        del lines[at]
    return b"".join(lines)


def _try(stopped: Stopped, folder: Path, random: Random) -> None:
    shutil.copytree(stopped.folder, folder / "out")
    (folder / "victim").write_text("mine")
    kept = [file for file in sorted((folder / "out" / ".out.gguf.journal").rglob("*")) if file.is_file()]
    chosen = random.choice(kept)
    damage: Callable[[bytes, Random], bytes] = damaged_bytes
    if chosen.name == "records" and random.random() < 0.6:
        damage = _damaged_line
    chosen.write_bytes(damage(chosen.read_bytes(), random))
    result = _convert(folder / "out")
    if result.exit_code == 2:
        result = _convert(folder / "out", "--overwrite")
    assert result.exit_code == 0, result.stderr[-500:]
    assert (folder / "out" / "out.gguf").read_bytes() == stopped.whole, f"another file after damage to {chosen.name}"
    assert (folder / "victim").read_text() == "mine"
    assert os.listdir(folder / "out") == ["out.gguf"]


def _try_all(stopped: Stopped, tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            _try(stopped, folder, Random(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)


def test_some_damaged_journals(stopped: Stopped, tmp_path: Path) -> None:
    _try_all(stopped, tmp_path, range(FEW))


@pytest.mark.slow
def test_many_damaged_journals(stopped: Stopped, tmp_path: Path) -> None:
    _try_all(stopped, tmp_path, range(1000, 1000 + MANY))
