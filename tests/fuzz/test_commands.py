"""Odd options, damaged checkpoints and damaged journals on the command line: an answer, or one short line and no file.

Tried as in test_files.py: a few times in every run, many times in the slow part.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import click
import pytest
from click.testing import CliRunner, Result
from fuzzing import EXAMPLES, FAMILIES, Samples, bounded, linked
from moecast.cli import main
from moecast.sources.gguf import read_gguf
from mutations import damaged_bytes, damaged_json

FEW, MANY = 15, 400
VALUES = (
    "-1", "0", "1", "2", "nan", "inf", "-inf", "1e400", "1e-9", "99999999999999999999", "1" * 400, "", " ", "x" * 300,
    "../x", "a/b/c", "\x1b[31m", "é", "日本", "4GB", "0B", "1KB", "10MB", "1e9GB", "Q4_K_M", "q8_0", "COPY", "a=Q4_K",
    "[=Q4_K", "(.*)*x=F32", "model.gguf", "cpu", "cuda", "main", "[/INST]", "%s", "{}", "\udcff",
)  # fmt: skip
_QUICKLY = ["--no-report", "--no-verify", "--no-calibration", "--no-pad", "--quant", "Q4_0"]
SOURCES = ("inspect", "plan", "convert", "imatrix", "perplexity", "run")


def options(samples: Samples, folder: Path, random: Random) -> Result:
    name = random.choice((*SOURCES, "quantize", "parity", "prepack", "doctor"))
    text = str(folder.parent / "short.txt")
    Path(text).write_text("In the beginning was the word, and all words came from it.\n" * 5)
    arguments = {
        "convert": [str(samples.checkpoint), *random.choice((["--dry-run"], _QUICKLY))],
        "imatrix": [str(samples.checkpoint), "-o", "imatrix.gguf", "--calibration", text, "-c", "16"],
        "perplexity": [str(samples.checkpoint), "-f", text, "-c", "16"],
        "parity": [str(samples.checkpoint), str(samples.gguf), "-f", text, "-c", "16"],
        "run": [str(samples.checkpoint), "-p", "And", "-n", "1"],
        "quantize": [str(samples.gguf), "out.gguf", "--dry-run"],
        "doctor": [],
        "prepack": [random.choice(VALUES)],
    }.get(name, [str(samples.checkpoint)])
    if name in SOURCES and random.random() < 0.2:
        arguments[0] = random.choice(VALUES[10:]) + random.choice(("", ".gguf", "/model.onnx"))
    command = main.commands[name]
    given = [option for option in command.params if isinstance(option, click.Option)]
    for option in random.sample(given, min(len(given), random.choice((1, 1, 2, 3)))):
        spelled = random.choice((*option.opts, *option.secondary_opts))
        # For the Hub, for whoever wants many words, and what stays whatever happens.
        if option.name not in ("revision", "token", "tokens", "log_file"):
            arguments += [spelled] if option.is_flag else [spelled, random.choice(VALUES)]
    return _invoke(name, *arguments)


def damaged_checkpoint(samples: Samples, folder: Path, random: Random) -> Result:
    """A conversion to the end: weights, configuration, index or tokenizer are damaged."""
    source = EXAMPLES / random.choice(FAMILIES)
    chosen = random.choice([file for file in sorted(source.iterdir()) if file.suffix in (".json", ".safetensors")])
    copy = linked(source, folder.with_name(f"{folder.name}-source"), chosen.name)
    damage = damaged_json if chosen.suffix == ".json" else damaged_bytes
    (copy / chosen.name).write_bytes(damage(chosen.read_bytes(), random))
    result = _invoke("convert", str(copy), "-o", "out.gguf", *_QUICKLY)
    if result.exit_code == 0:
        tensors = {tensor.name for tensor in read_gguf(folder / "out.gguf")[1]}
        assert "token_embd.weight" in tensors
    return result


def _invoke(command: str, *arguments: str) -> Result:
    with bounded():
        return CliRunner().invoke(main, [command, *arguments], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "80"})


def _check(result: Result, folder: Path) -> None:
    allowed = (0, 1, 2) if "Failed: mean KL divergence" in result.stderr else (0, 2)
    assert result.exit_code in allowed, f"exit code {result.exit_code}: {result.stderr[-600:]!r}"
    if result.exit_code == 2:
        assert not [file for file in folder.rglob("*") if file.is_file()]
        line = next(line for line in reversed(result.stderr.splitlines()) if line.startswith("Error: "))
        assert len(line) <= 300 or "Usage: " in result.stderr  # those of click repeat what was typed


Attempt = Callable[[Samples, Path, Random], Result]
KINDS: dict[Attempt, float] = {options: 1.5, damaged_checkpoint: 0.25}
"""How often each is tried, relative to the others."""


def _try(attempt: Attempt, samples: Samples, tmp_path: Path, seeds: range) -> None:
    here, codes = Path.cwd(), set()
    for seed in seeds:
        folder = tmp_path / str(seed) / "folder"
        folder.mkdir(parents=True)
        os.chdir(folder)
        try:
            result = attempt(samples, folder, Random(seed))
            codes.add(result.exit_code)
            _check(result, folder)
        except Exception as error:
            raise AssertionError(f"{attempt.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        finally:
            os.chdir(here)
        shutil.rmtree(folder.parent)
    assert codes >= {0, 2}


@pytest.mark.parametrize("attempt", KINDS, ids=lambda attempt: attempt.__name__)
def test_some_commands(attempt: Attempt, samples: Samples, tmp_path: Path) -> None:
    _try(attempt, samples, tmp_path, range(int(FEW * min(KINDS[attempt], 1)) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", KINDS, ids=lambda attempt: attempt.__name__)
def test_many_commands(attempt: Attempt, samples: Samples, tmp_path: Path) -> None:
    _try(attempt, samples, tmp_path, range(1000, 1000 + int(MANY * KINDS[attempt])))
