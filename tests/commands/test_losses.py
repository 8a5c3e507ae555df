"""What a file does not keep of its source is among a conversion's problems."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from click.testing import CliRunner
from moecast.cli import main
from safetensors.torch import load_file, save_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def _shown(source: Path, output: Path, *options: object) -> str:
    arguments = ["convert", source, "-o", output, "--quant", "Q8_0", "--no-calibration", *options]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def _problems(source: Path, output: Path, *options: object) -> list[str]:
    problems: list[str] = json.loads(_shown(source, output, "--json", *options))["problems"]
    return problems


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def minimax(tmp_path: Path) -> Path:
    return checkpoints.copied(EXAMPLES / "minimax-m2-tiny", tmp_path / "checkpoint")


def test_nothing_is_lost(minimax: Path, tmp_path: Path) -> None:
    assert _problems(minimax, tmp_path / "m.gguf", "--no-verify") == []
    assert "--jinja" in _shown(minimax, tmp_path / "m.gguf", "--no-verify", "--overwrite")


def test_no_chat_template(minimax: Path, tmp_path: Path) -> None:
    (minimax / "chat_template.jinja").unlink()
    [line] = _problems(minimax, tmp_path / "m.gguf", "--no-verify")
    assert line == "the checkpoint has no chat template: llama.cpp will use one of its own"
    shown = _shown(minimax, tmp_path / "m.gguf", "--no-verify", "--overwrite")
    assert "llama-server" in shown and "--jinja" not in shown


def test_more_ends_than_the_format_has_room_for(minimax: Path, tmp_path: Path) -> None:
    _edit(minimax / "generation_config.json", eos_token_id=[300, 301])
    assert _problems(minimax, tmp_path / "m.gguf", "--no-verify") == []
    _edit(minimax / "generation_config.json", eos_token_id=[300, 301, 302, 303])
    [line] = _problems(minimax, tmp_path / "m.gguf", "--no-verify", "--overwrite")
    assert line.endswith(" will not end a text: GGUF has room for three ids that do") and line.count("', '") == 1


def test_an_imatrix_without_experts(minimax: Path, tmp_path: Path) -> None:
    name, values = b"blk.0.attn_q.weight", [1.0] * 256
    entry = struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name, 1, len(values), *values)
    matrix = tmp_path / "imatrix.dat"
    matrix.write_bytes(struct.pack("<i", 1) + entry)
    arguments = ["convert", minimax, "-o", tmp_path / "m.gguf", "--quant", "Q4_0", "--imatrix", matrix, "--no-verify"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    assert (
        f"{matrix} has nothing on 6 of 6 weights of experts, blk.0.ffn_up_exps.weight for one: all their inputs "
        "count alike"
    ) in json.loads(result.stdout)["problems"]


def test_numbers_beyond_f16(minimax: Path, tmp_path: Path) -> None:
    index = json.loads((minimax / "model.safetensors.index.json").read_text())["weight_map"]
    file = minimax / index["lm_head.weight"]
    tensors = load_file(file)
    tensors["lm_head.weight"][3, 5] = 2.0**17
    save_file(tensors, file)
    output = tmp_path / "m.gguf"
    arguments = ["convert", minimax, "-o", output, "--quant", "F16", "--no-verify", "--json"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["problems"] == [
        "output.weight holds 1.31e+05, and F16 ends at 65504: clamped; BF16 would hold it"
    ]
    assert _problems(minimax, output, "--no-verify", "--overwrite") == []


def test_a_context_beyond_the_models(minimax: Path, tmp_path: Path) -> None:
    _edit(minimax / "config.json", max_position_embeddings=32)
    line = "--context 64 is beyond the 32 tokens the model is made for"
    assert line in _problems(minimax, tmp_path / "m.gguf", "-c", 64, "--chunks", 1)
    result = CliRunner().invoke(
        main, ["plan", str(minimax), "--fit", "--ram", "8GB", "--vram", "0", "-c", "64", "--json"]
    )
    assert result.exit_code == 0 and line in json.loads(result.stdout)["problems"]
