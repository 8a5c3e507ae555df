"""Options that would do nothing, or contradict another, and numbers out of range: one line, exit code 2, no file."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from moecast.cli import main

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "minimax-m2-tiny")

FILES = ("a.txt", "i.gguf", "other.gguf", "plan.json")
CONTRADICTIONS = [
    "convert --quant Q4_0 --size 3MB",
    "convert --quant Q4_0 --bpw 4",
    "convert --quant Q4_0 --plan plan.json",
    "convert --quant Q4_0 --like other.gguf",
    "convert --size 3MB --bpw 4",
    "convert --size 3MB --plan plan.json",
    "convert --size 3MB --like other.gguf",
    "convert --bpw 4 --plan plan.json",
    "convert --bpw 4 --like other.gguf",
    "convert --plan plan.json --like other.gguf",
    "convert --bytes-per-token 1MB",
    "convert --quant Q4_0 --bytes-per-token 1MB",
    "convert --measure",
    "convert --quant Q4_0 --measure",
    "convert --bpw 4 --dry-run --measure",
    "convert --calibration a.txt --no-calibration",
    "convert --calibration a.txt --imatrix i.gguf",
    "convert --imatrix-out o.gguf --no-calibration",
    "convert --imatrix-out o.gguf --imatrix i.gguf",
    "convert --min-expert-tokens 1 --no-calibration",
    "convert --min-expert-tokens 1 --imatrix i.gguf",
    "convert --error-feedback --no-calibration",
    "convert --error-feedback --imatrix i.gguf",
    "convert --no-verify --max-kld 1",
    "convert --scratch 1GB",
    "convert --scratch 1GB --keep-source",
    "convert --scratch 1GB --bpw 4",
    "convert --to onnx --pre gpt-2",
    "convert --to onnx --split-max-size 1GB",
    "convert --to onnx --mtp",
    "convert --to onnx --bpw 4",
    "convert --to gguf --activations int8",
    "convert --calibration-chunks 1 --no-calibration",
    "convert --calibration-chunks 1 --imatrix i.gguf",
    "convert --fit --quant Q4_0",
    "convert --fit --size 3MB",
    "convert --fit --bpw 4",
    "convert --fit --plan plan.json",
    "convert --fit --like other.gguf",
    "convert --fit --bpw 4 --measure",
    "convert --fit --to onnx",
    "convert --ram 8GB",
    "convert --quiet --verbose",
    "plan --calibration-chunks 1 --no-calibration",
    "plan --fit --quant Q4_0",
    "plan --fit --size 3MB",
    "plan --fit --bpw 4",
    "plan --fit --plan plan.json",
    "plan --fit --like other.gguf",
    "plan --fit --to onnx",
    "plan --ram 8GB",
    "plan --vram 8GB",
    "plan --context 512",
    "plan --bytes-per-token 1MB",
    "plan --quant Q4_0 --measure",
    "plan --memory 8GB",
    "plan --device cpu",
    "plan --fit --device cpu",
    "plan --calibration a.txt --no-calibration",
    "plan --calibration a.txt --imatrix i.gguf",
    "plan --error-feedback --imatrix i.gguf",
]
RANGES = [
    "convert --chunks 0",
    "convert --chunks -1",
    "convert --context 3",
    "convert --threads 0",
    "convert --threads -4",
    "convert --min-expert-tokens -1",
    "convert --max-kld nan",
    "convert --max-kld -1",
    "convert --bpw 0",
    "convert --bpw inf",
    "convert --bpw -4",
    "convert --quant=",
    "plan --fit --context 0",
    "run -p a -n -3",
    "run -p a --device gpu",
    "convert --device cuda:x",
    "perplexity --device cuda:99",
    "run -p a -n 0",
    "run -p a --temperature -1",
    "run -p a --temperature nan",
    "run -p a --seed -1",
    "perplexity --chunks 0",
    "convert --calibration-chunks 0",
    "imatrix -o o.gguf --chunks 0",
    "imatrix -o o.gguf --calibration-chunks 0",
    f"parity {EXAMPLE} --max-kld nan",
]


@pytest.mark.parametrize("line", [*CONTRADICTIONS, *RANGES])
def test_is_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).touch()
    command, *options = line.split()
    result = CliRunner().invoke(main, [command, EXAMPLE, *options])
    assert result.exit_code == 2, (result.output, result.exception)
    message = result.stderr.splitlines()[-1]
    given = [option.partition("=")[0] for option in options if option.startswith("-")]
    assert message.startswith("Error: ") and any(option in message for option in given), message
    assert {path.name for path in tmp_path.iterdir()} == {*FILES}
