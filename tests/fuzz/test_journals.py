"""Damaged journals of conversions that were stopped: the same files, or one line, after which --overwrite helps."""

from __future__ import annotations

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
from moecast.convert.resume.records import sealed
from mutations import damaged_bytes

FEW, MANY = 4, 70  # of each kind
CHECKPOINT = EXAMPLES / "minimax-m2-tiny"
CALIBRATED = ("--calibration", "{0.parent}/excerpt", "--imatrix-out", "{0}/i.gguf")
CONVERTING = 60  # seconds of the processor: there is work to do
KINDS = {
    "compared": ("--no-calibration", "--quant", "Q4_0", "--no-pad"),
    "calibrated": (
        "--calibration",
        "{0.parent}/excerpt",
        "--quant",
        "Q3_K_S",
        "--no-pad",
        "--imatrix-out",
        "{0}/i.gguf",
    ),
    "onnx": ("--no-calibration", "--quant", "Q4_0", "--to", "onnx"),
}


@dataclass(frozen=True)
class Stopped:
    """A folder as it is left behind, the options that it was made with, and the files that are made in the end."""

    folder: Path
    options: tuple[str, ...]
    whole: dict[str, bytes]


def _files(folder: Path) -> dict[str, bytes]:
    """All but what is known of rounding errors, which of the layer in flight is only a part."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.match("*.fingerprints.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module", params=KINDS)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Stopped within the last layer."""
    whole, folder = (tmp_path_factory.mktemp(name) for name in ("whole", "stopped"))
    options, quantize = KINDS[request.param], moecast.convert.encode.quantize_weight
    calls = [0]
    text = (EXAMPLES / "text" / "evaluation.txt").read_text(encoding="utf-8")
    (folder.parent / "excerpt").write_text(text[:1200], encoding="utf-8")

    def until_stopped(*arguments: object, **others: object) -> object:
        calls[0] -= 1
        if calls[0] == 0:
            raise KeyboardInterrupt
        return quantize(*arguments, **others)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "BATCH_SECONDS", 0.0)
        patched.setattr(moecast.convert.encode, "quantize_weight", until_stopped)
        result = _convert(whole, options)
        assert result.exit_code == 0, result.stderr
        calls[0] = int(-0.8 * calls[0])
        assert _convert(folder, options).exit_code == 130
    assert any(path.name.startswith("states-") for path in folder.rglob("*"))
    return Stopped(folder, options, _files(whole))


def _convert(folder: Path, options: tuple[str, ...], *more: str) -> Result:
    text = ("--no-report", "-f", str(EXAMPLES / "text" / "evaluation.txt"), "-c", "16", "--chunks", "2")
    output = folder / ("out" if "onnx" in options else "out.gguf")
    given = (option.format(folder) for option in options)
    with bounded(CONVERTING):
        return CliRunner().invoke(main, ["convert", str(CHECKPOINT), "-o", str(output), *given, *text, *more])


def _damaged_line(content: bytes, random: Random) -> bytes:
    """A record with a line replaced, repeated, gone, foreign, or in another order."""
    lines = content.splitlines(keepends=True)
    at = random.randrange(len(lines))
    kind = random.randrange(5)
    if kind == 0:
        odd = (b"[]", b"{}", b"7", b"[[]]", b'[["started","../victim",1]]', b'[["saved"]]', b"\xff", b"0 {}")
        lines[at] = random.choice(odd) + b"\n"
    elif kind == 1:
        lines.insert(at, lines[-1])
    elif kind == 2:
        random.shuffle(lines)
    elif kind == 3:
        keys = random.choice(([["out.gguf", "output.weight", 0, 8, 1]], [["started", "../victim"]], [[]], 7))
        lines.insert(at, sealed({"done": keys, "seconds": 1.0, "peak": 1}, random.choice((0, int(lines[0][:8], 16)))))
    else:
        del lines[at]
    return b"".join(lines)


def _try(stopped: Stopped, folder: Path, random: Random) -> None:
    out = folder / "out"
    shutil.copytree(stopped.folder, out)
    shutil.copy(stopped.folder.parent / "excerpt", folder)
    (folder / "victim").write_text("mine")
    kept = [file for file in sorted(out.rglob("*")) if file.is_file()]
    for chosen in random.sample(kept, random.choice((1, 1, 2))):
        damage: Callable[[bytes, Random], bytes] = damaged_bytes
        if chosen.name == "records" and random.random() < 0.6:
            damage = _damaged_line
        chosen.write_bytes(damage(chosen.read_bytes(), random))
    result = _convert(out, stopped.options)
    if result.exit_code == 2:
        assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
        result = _convert(out, stopped.options, "--overwrite")
    assert result.exit_code == 0, result.stderr[-500:]
    made = _files(out)
    assert made.keys() == stopped.whole.keys()
    assert [name for name in made if made[name] != stopped.whole[name]] == []
    assert (folder / "victim").read_text() == "mine"


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
