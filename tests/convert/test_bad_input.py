"""Whatever is wrong with the input: exit code 2, one line that names it, and nothing under the output's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Checkpoint
from moecast.cli import main
from safetensors.torch import load_file, save_file

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


def _convert(folder: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["convert", str(folder), "-o", str(output), "--no-verify", "--no-calibration", "--no-report", *options]
    )


def _assert_refused(result: Result, output: Path, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert not list(output.glob("**/*.gguf")) and not list(output.glob("**/.*"))


def _edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / weight_map[name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, file)


def _poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[0, 1] = value
        return scale

    return change


@pytest.mark.parametrize("quant", ["Q4_K_M", "BF16", "F32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(minimax_fp8: Checkpoint, tmp_path: Path, value: float, quant: str) -> None:
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    _edit_tensor(folder, f"{EXPERT}_scale_inv", _poison(value))
    _assert_refused(_convert(folder, tmp_path / "out", "--quant", quant), tmp_path / "out", EXPERT)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (EXPERT, lambda t: t[:, :200], f"{EXPERT} in"),
        (f"{EXPERT}_scale_inv", lambda t: t[:, :1], f"{EXPERT}_scale_inv in"),
        (EXPERT, lambda t: t.view(torch.int8), EXPERT),
        (EXPERT, lambda t: None, "is missing although"),
        ("model.norm.weight", lambda t: t[:100], "model.norm.weight"),
        ("model.embed_tokens.weight", lambda t: t.double(), "has dtype F64"),
    ],
)
def test_tensor_of_wrong_shape_or_dtype(
    minimax_fp8: Checkpoint,
    tmp_path: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
) -> None:
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    _edit_tensor(folder, name, change)
    _assert_refused(_convert(folder, tmp_path / "out"), tmp_path / "out", message)


def test_no_tokenizer(minimax: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    _assert_refused(_convert(folder, tmp_path / "out"), tmp_path / "out", "tokenizer.json")


def test_unknown_architecture(minimax: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    checkpoints.edit_config(folder, model_type="mamba3")
    _assert_refused(_convert(folder, tmp_path / "out"), tmp_path / "out", "model_type is 'mamba3', expected one of")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant", "Q4_K_XXL"], "--quant is 'Q4_K_XXL', which is no recipe: did you mean "),
        (["--split-max-size", "some"], "is not a size"),
        (["--to", "exe"], "'exe' is not"),
        (["--error-feedback"], "--error-feedback needs calibration text: leave out --imatrix and --no-calibration"),
        (
            ["--size", "3MB", "--error-feedback"],
            "--error-feedback needs calibration text: leave out --imatrix and --no-calibration",
        ),
    ],
)
def test_unknown_options(minimax: Checkpoint, tmp_path: Path, options: list[str], message: str) -> None:
    result = _convert(minimax.folder, tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize("source", ["no/such/folder/here", "not-there.gguf", "::::"])
def test_source_that_is_not_there(tmp_path: Path, source: str) -> None:
    result = _convert(Path(source), tmp_path / "out")
    assert result.exit_code == 2 and source in result.stderr


def test_existing_output_is_kept(minimax: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    output.write_text("precious")
    result = _convert(minimax.folder, output, "--quant", "Q8_0")
    assert result.exit_code == 2 and "model.gguf exists: use --overwrite" in result.stderr
    assert output.read_text() == "precious"
    result = _convert(minimax.folder, output, "--quant", "Q8_0", "--overwrite")
    assert result.exit_code == 0 and output.read_bytes()[:4] == b"GGUF"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.fingerprints.json", "model.gguf"]


def test_failed_conversion_keeps_the_file_it_would_replace(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    _edit_tensor(folder, f"{EXPERT}_scale_inv", _poison(float("nan")))
    output = tmp_path / "out" / "model.gguf"
    output.parent.mkdir()
    output.write_text("precious")
    assert _convert(folder, output, "--overwrite").exit_code == 2
    assert output.read_text() == "precious"
    assert [file.name for file in output.parent.iterdir()] == ["model.gguf"]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("limit", "command", "options"),
    [
        (1_000_000, "convert", ["-o", "{}", "--no-verify", "--no-calibration"]),
        pytest.param(
            *(5_000, "imatrix", ["-o", "{}/imatrix.gguf", "--calibration", str(checkpoints.TEXT), "-c", "64"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_disk_full(limit: int, command: str, options: list[str], minimax: Checkpoint, tmp_path: Path) -> None:
    """A process that may not write files this large gets the same refusal from the system as on a full disk."""
    resource: Any = pytest.importorskip("resource")
    output = [option.format(tmp_path) for option in options]
    result = subprocess.run(
        [sys.executable, "-m", "moecast.cli", command, str(minimax.folder), *output],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 2, result.stderr
    assert "cannot be written: File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_folder_that_cannot_be_made(minimax: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = _convert(minimax.folder, tmp_path / "file" / "out")
    assert result.exit_code == 2 and "cannot be made" in result.stderr


@pytest.mark.parametrize(
    "command", [["imatrix", "-o", "", "-c", "16"], ["plan", "-o", ""], ["convert", "--imatrix-out", "", "-o", "a.gguf"]]
)
def test_output_without_a_name(
    minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [command[0], str(minimax.folder), *command[1:], "--overwrite"])
    assert result.exit_code == 2 and "expected the name of a file" in result.stderr, result.output
    assert list(tmp_path.iterdir()) == []


def test_corrupt_gguf_as_input(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 100)
    for command in (["perplexity", str(file)], ["inspect", str(file)], ["parity", str(file), str(file)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and "broken.gguf" in result.stderr


def test_text_that_is_too_short(minimax: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("In the beginning")
    result = CliRunner().invoke(main, ["perplexity", str(minimax.folder), "-f", str(text)])
    assert result.exit_code == 2 and "expected at least 1024" in result.stderr
    result = CliRunner().invoke(main, ["perplexity", str(minimax.folder), "-f", str(tmp_path / "none.txt")])
    assert result.exit_code == 2 and "none.txt: no such file" in result.stderr


PARITY = ["-c", "64", "--chunks", "2"]


def test_another_vocabulary_is_refused(minimax: Checkpoint, minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = CliRunner().invoke(main, ["parity", str(minimax_fp8.folder), str(folder), *PARITY])
    assert result.exit_code == 2 and "has another vocabulary" in result.stderr


def test_another_splitter_is_noted(minimax: Checkpoint, tmp_path: Path) -> None:
    """The ids mean the same, so the two can be compared, on the reference's tokens."""
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = CliRunner().invoke(main, ["parity", str(minimax.folder), str(folder), *PARITY, "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["mean_kld"] == 0 and found["tokenization"]["evaluation_tokens"] > 0.1
    assert found["problems"][0].startswith("token ids differ on ")
