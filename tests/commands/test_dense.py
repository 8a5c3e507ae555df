"""Models without experts: every command does for them what it does for mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import cohere_checkpoints as cohere
import gguf
import llama
import pytest
from click.testing import CliRunner, Result
from forward import random_tokens, runner_logits
from moecast.cli import main
from moecast.sources.imatrix import read_imatrix
from moecast.sources.model import open_model

pytestmark = pytest.mark.whole

SHORT = ("-c", 64, "--chunks", 4, "--calibration-chunks", 6)


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BF16, with the head in the embedding."""
    return cohere.publish_cohere2(tmp_path_factory.mktemp("dense") / "model", cohere.cohere_model(False))


def _tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("size", [1_100_000, pytest.param(1_600_000, marks=pytest.mark.slow)])
def test_a_size_is_met_with_types_that_were_measured(dense: Path, size: int, tmp_path: Path) -> None:
    """Calibrated, with error feedback, and compared with the source; llama.cpp runs the result."""
    path = tmp_path / "model.gguf"
    made = json.loads(_run("convert", dense, "-o", path, "--size", size, *SHORT, "--json").stdout)
    assert 0.9 * size < made["bytes"] == path.stat().st_size <= size
    assert 0 < made["parity"]["mean_kld"] < 0.05 and made["problems"][-1].startswith("KL divergence")
    tokens = random_tokens(1, 64)
    theirs = llama.run_isolated(path, tokens[0].tolist())
    assert llama.mean_divergence(runner_logits(open_model(path), tokens)[0].numpy(), theirs) < 1e-3


def test_comparing_changes_no_byte(dense: Path, tmp_path: Path) -> None:
    """A stream that is compared asks for the embedding before anything is known of what the head reads."""
    feedback = ("--quant", "IQ3_M", "--error-feedback", *SHORT)
    _run("convert", dense, "-o", tmp_path / "compared.gguf", *feedback)
    _run("convert", dense, "-o", tmp_path / "alone.gguf", *feedback, "--no-verify")
    _run("convert", dense, "-o", tmp_path / "plain.gguf", "--quant", "IQ3_M", *SHORT, "--no-verify")
    compared, alone, plain = (_tensors(tmp_path / f"{name}.gguf") for name in ("compared", "alone", "plain"))
    assert compared == alone
    assert {name for name in alone if alone[name] == plain[name]} == {name for name in alone if not _rounded(name)}


def _rounded(name: str) -> bool:
    return name.startswith("blk.") and "norm" not in name


def test_importance_measured_before(dense: Path, tmp_path: Path) -> None:
    measured = tmp_path / "matrix.gguf"
    shown = json.loads(_run("imatrix", dense, "-o", measured, "-c", 64, "--chunks", 4, "--json").stdout)
    assert shown["unseen_experts"] == 0 and shown["fewest_tokens"] is None
    assert len(read_imatrix(measured).means) == 4 * 7
    options = ("--quant", "IQ2_M", "--imatrix", measured, "--no-verify", "--json")
    told = json.loads(_run("convert", dense, "-o", tmp_path / "a.gguf", *options).stdout)
    assert told["problems"] == []
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert types["token_embd.weight"] == "Q5_K" and types["blk.0.ffn_up.weight"] == "IQ2_S"


def test_a_matrix_of_another_model_is_noticed(dense: Path, tmp_path: Path) -> None:
    mixture = cohere.save_cohere(tmp_path / "mixture", cohere.cohere_model(True, num_hidden_layers=2))
    measured = tmp_path / "matrix.gguf"
    _run("imatrix", mixture, "-o", measured, "-c", 64, "--chunks", 2)
    options = ("--quant", "Q4_K_M", "--imatrix", measured, "--no-verify", "--json")
    told = json.loads(_run("convert", dense, "-o", tmp_path / "a.gguf", *options).stdout)
    (line,) = told["problems"]
    assert "has nothing on 20 of 28 weights of layers, blk.0.ffn_up.weight for one" in line


@pytest.mark.parametrize("quant", ["EXPERTS_Q2", "MXFP4_MOE"])
def test_a_recipe_for_experts_says_what_it_amounts_to(dense: Path, quant: str) -> None:
    plan = json.loads(_run("plan", dense, "--quant", quant, "--json").stdout)
    assert f"{quant} is for experts, of which this model has none: all is Q8_0" in plan["problems"]
    assert {tensor["type"] for tensor in plan["tensors"]} == {"Q8_0", "F32"}


def test_the_line_that_serves_it_names_no_experts(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes as many layers as fit."""
    monkeypatch.setattr("moecast.commands.serving._vram", lambda: 8 << 30)
    options = ("--quant", "Q8_0", "--no-verify", "--no-calibration")
    shown = _run("convert", dense, "-o", tmp_path / "model.gguf", *options).stdout
    (line,) = [line for line in shown.splitlines() if "llama-server" in line]
    assert "experts" not in shown and "moe" not in line and line.endswith("--n-gpu-layers 5")
    machine = ("--fit", "--ram", "2GB", "-c", 512, "--json")
    for vram, layers in (("0", None), ("557MB", 2), ("8GB", 5)):
        planned = json.loads(_run("plan", dense, *machine, "--vram", vram).stdout)
        assert ("--n-gpu-layers" in planned["serve"]) == (layers is not None)
        if layers is not None:
            assert planned["serve"].endswith(f"--n-gpu-layers {layers}") and planned["layers_in_ram"] == 5 - layers
