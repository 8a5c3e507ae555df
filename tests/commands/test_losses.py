"""What a file does not keep of its source is among a conversion's problems."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from click.testing import CliRunner
from gguf_parts import GGUFParts, u16
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


def test_numbers_beyond_the_scales_of_blocks(minimax: Path, tmp_path: Path) -> None:
    """A block's scale is a float16, so that Q8_0 ends at 127 times 65504."""
    index = json.loads((minimax / "model.safetensors.index.json").read_text())["weight_map"]
    file = minimax / index["lm_head.weight"]
    tensors = load_file(file)
    output, most = tmp_path / "m.gguf", 127 * 65504.0
    tensors["lm_head.weight"][3, 5] = most
    save_file(tensors, file)
    assert _problems(minimax, output, "--no-verify") == []
    tensors["lm_head.weight"][3, 5] = -4 * most
    save_file(tensors, file)
    [line] = _problems(minimax, output, "--no-verify", "--overwrite")
    assert line == "output.weight holds 3.33e+07, of which Q8_0 keeps 8.32e+06: BF16 would hold it"


def test_a_context_beyond_the_models(minimax: Path, tmp_path: Path) -> None:
    _edit(minimax / "config.json", max_position_embeddings=32)
    line = "--context 64 is beyond the 32 tokens the model is made for"
    assert line in _problems(minimax, tmp_path / "m.gguf", "-c", 64, "--chunks", 1)
    result = CliRunner().invoke(
        main, ["plan", str(minimax), "--fit", "--ram", "8GB", "--vram", "0", "-c", "64", "--json"]
    )
    assert result.exit_code == 0 and line in json.loads(result.stdout)["problems"]
    result = CliRunner().invoke(main, ["perplexity", str(minimax), "-c", "64", "--chunks", "1", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["problems"] == [line]
    shown = CliRunner().invoke(main, ["parity", str(minimax), str(minimax), "-c", "64", "--chunks", "1"])
    assert shown.exit_code == 0 and f"Note: {line}" in shown.stdout
    said = CliRunner().invoke(main, ["run", str(minimax), "-p", "Once " * 40, "-n", "1"])
    assert said.exit_code == 0 and "--tokens 1 are beyond the 32 tokens the model is made for" in said.stderr
    quiet = CliRunner().invoke(main, ["run", str(minimax), "-p", "Once", "-n", "1"])
    assert quiet.exit_code == 0 and quiet.stderr == ""


def test_keys_that_are_known_to_change_nothing(minimax: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "m.gguf", tmp_path / "q.gguf"
    _problems(minimax, source, "--no-verify")
    parts = GGUFParts.of(source.read_bytes())
    parts.set("minimax-m2.tilt", u16(3))
    source.write_bytes(parts.to_bytes())
    arguments = ["quantize", str(source), str(output), "--quant", "Q4_0", "--allow-requantize", "--dry-run"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and refused.stderr.endswith("pass --ignore-config minimax-m2.tilt\n")
    assert CliRunner().invoke(main, [*arguments, "--ignore-config", "minimax-m2.tilt"]).exit_code == 0
