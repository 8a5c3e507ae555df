"""What a comparison proves: token ids are part of it, and what is no number proves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from click.testing import CliRunner, Result
from llama import Engine
from moecast.cli import main
from moecast.sources.gguf import read_gguf
from moecast.sources.tokenizer_folder import read_tokenizer_folder
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimax-m2-tiny"
NUMBERS = "".join(f"{n * 7919} + {n * 104729} = {n * 112648}\n" for n in range(1, 100))
SHORT = ("-c", "32", "--chunks", "2")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _convert(source: Path, output: Path, *options: object) -> Result:
    return _run("convert", source, "-o", output, "--quant", "Q8_0", "--no-calibration", "--json", *options)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    file = tmp_path / "numbers.txt"
    file.write_text(NUMBERS)
    return file


@pytest.fixture
def digits_together(tmp_path: Path) -> Path:
    """The example with a tokenizer that takes digits together, as GPT-2's does, and has merges for many of them."""
    folder = checkpoints.copied(EXAMPLE, tmp_path / "checkpoint")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = tokenizer["model"]
    last = [text for text, _ in sorted(model["vocab"].items(), key=lambda pair: pair[1])][-4:]
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in last and not {*last} & {*pair}]
    made = [("1", "2"), ("12", "3"), ("123", "4"), ("1234", "5")]
    for text, pair in zip(last, made, strict=True):
        id = model["vocab"].pop(text)
        model["vocab"]["".join(pair)] = id
    model["merges"] = [list(pair) for pair in made] + model["merges"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_the_splitter_is_the_checkpoints_own(digits_together: Path, numbers: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    result = _convert(digits_together, file, "-f", numbers, *SHORT, "--max-kld", 0.05)
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["parity"]["tokenization"] == {
        "probe_texts": 0, "probe_tokens": 0, "evaluation_tokens": 0, "first": None
    }  # fmt: skip
    assert made["problems"] == [] and read_gguf(file)[0]["tokenizer.ggml.pre"] == "gpt-2"
    with Engine(file, vocab_only=True) as engine:
        text = "1234512345"
        assert engine.tokenize(text, add_special=True) == read_tokenizer_folder(digits_together).encode(text)


def test_other_ids_fail_the_proof(digits_together: Path, numbers: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    text = ("-f", numbers, *SHORT)
    result = _convert(digits_together, file, "--pre", "minimax-m2", *text, "--max-kld", 10)
    assert result.exit_code == 1 and "Failed: token ids differ on " in result.stderr
    made = json.loads(result.stdout)
    assert made["parity"]["tokenization"]["evaluation_tokens"] > 0
    assert len(made["problems"]) == 2 and "'gpt-2' would be its own" in made["problems"][1]
    compared = _run("parity", digits_together, file, *text, "--max-kld", 10, "--json")
    assert compared.exit_code == 1 and "Failed: token ids differ on " in compared.stderr
    assert json.loads(compared.stdout)["tokenization"] == made["parity"]["tokenization"]
    shown = _run("parity", digits_together, file, *text)
    assert shown.exit_code == 0 and "Token ids that differ" in shown.stdout and "Note: token ids differ" in shown.stdout


def test_a_splitter_that_cannot_be_checked_proves_nothing(tmp_path: Path) -> None:
    result = _convert(EXAMPLE, tmp_path / "model.gguf", "--pre", "falcon", *SHORT, "--max-kld", 10)
    assert result.exit_code == 1 and "token ids are not proved" in result.stderr
    made = json.loads(result.stdout)
    assert made["parity"]["tokenization"] is None and "cannot be checked" in made["problems"][0]


def test_an_unknown_splitter_is_refused(tmp_path: Path) -> None:
    result = _convert(EXAMPLE, tmp_path / "model.gguf", "--pre", "gpt2")
    assert result.exit_code == 2 and "did you mean gpt-2 or " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """The example with a norm so large that its logits are no numbers."""
    folder = checkpoints.copied(EXAMPLE, tmp_path / "overflowing")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("model.norm.weight", "lm_head.weight"):
        file = folder / index[name]
        tensors = load_file(file)
        tensors[name] = torch.full_like(tensors[name], 3e38)
        save_file(tensors, file)
    return folder


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_no_success(overflowing: Path, tmp_path: Path) -> None:
    alone = _run("perplexity", overflowing, *SHORT, "--json")
    assert alone.exit_code == 1 and "Failed: the perplexity is not a finite number" in alone.stderr
    assert _strict(alone.stdout)["perplexity"] is None
    for limit in ((), ("--max-kld", "1")):
        both = _run("parity", overflowing, overflowing, *SHORT, "--json", *limit)
        assert both.exit_code == 1 and "Failed: the comparison is not a finite number" in both.stderr
        assert _strict(both.stdout)["mean_kld"] is None
    made = _convert(overflowing, tmp_path / "model.gguf", *SHORT)
    assert made.exit_code == 1 and "Failed: the comparison is not a finite number" in made.stderr
    assert any("not a finite number" in problem for problem in _strict(made.stdout)["problems"])
