"""What needs no numbers is answered without torch, and shells complete what is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "minimax-m2-tiny")
CHECK = """
import json, sys
from moecast.cli import main
for line in json.loads(sys.argv[1]):
    try:
        main(line, prog_name="moecast")
    except SystemExit as exit:
        print("EXIT", json.dumps([exit.code, "torch" in sys.modules]))
"""
REFUSED = [
    "convert EXAMPLE --quant Q4_KM",
    "convert EXAMPLE --nothing",
    "convert EXAMPLE --size 12XB",
    "convert EXAMPLE --size 1GB --quant Q8_0",
    "convert EXAMPLE --compute-dtype float3",
    "convert EXAMPLE --to onnx --quant Q3_K_M",
    "convert EXAMPLE --to onnx --bpw 4",
    "convert EXAMPLE --fit --quant Q8_0",
    "convert EXAMPLE --file nowhere.txt",
    "convert EXAMPLE --calibration nowhere.txt",
    "convert EXAMPLE --imatrix nowhere.gguf",
    "convert EXAMPLE --plan nowhere.json",
    "convert EXAMPLE --like nowhere.gguf",
    "convert EXAMPLE --no-verify --max-kld 1",
    "convert EXAMPLE --min-expert-tokens 1 --no-calibration",
    "convert EXAMPLE --calibration-chunks 1 --no-calibration",
    "convert ./nowhere",
    "convert nowhere.gguf",
    "plan EXAMPLE --quant Q4_KM",
    "plan EXAMPLE --ram 8GB",
    "plan EXAMPLE --memory 8GB",
    "quantize nowhere.gguf out.gguf --quant Q4_K_M",
    "imatrix EXAMPLE",
    "perplexity ./nowhere",
    "parity EXAMPLE ./nowhere",
    "run ./nowhere -p text",
    "run EXAMPLE",
    "prepack nowhere",
    "inspect ./nowhere",
    "nothing",
]
ANSWERED = ["inspect EXAMPLE", "inspect EXAMPLE --json", "recipes", "--version"]


def _codes(lines: list[str], folder: Path) -> list[list[object]]:
    """What each line exits with, and whether torch is there by then."""
    typed = [[EXAMPLE if word == "EXAMPLE" else word for word in line.split()] for line in lines]
    command = [sys.executable, "-c", CHECK, json.dumps(typed)]
    shown = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=True).stdout
    return [json.loads(line.removeprefix("EXIT ")) for line in shown.splitlines() if line.startswith("EXIT ")]


def test_arguments_are_checked_without_torch(tmp_path: Path) -> None:
    assert _codes(REFUSED, tmp_path) == [[2, False]] * len(REFUSED)
    assert not [*tmp_path.iterdir()]


def test_models_are_looked_at_without_torch(tmp_path: Path) -> None:
    assert _codes(ANSWERED, tmp_path) == [[0, False]] * len(ANSWERED)


@pytest.mark.parametrize(
    ("shell", "part"), [("bash", "complete -o nosort"), ("zsh", "#compdef"), ("fish", "complete ")]
)
def test_shells_get_a_script_that_completes(shell: str, part: str) -> None:
    from click.shell_completion import get_completion_class
    from moecast.cli import main

    kind = get_completion_class(shell)
    assert kind is not None
    if shell == "bash":  # click asks the bash of this machine for its version, which may be too old or missing
        kind._check_version = staticmethod(lambda: None)  # type: ignore[attr-defined]
    script = kind(main, {}, "moecast", "_MOECAST_COMPLETE").source()
    assert part in script and f"_MOECAST_COMPLETE={shell}_complete" in script


def test_options_are_completed() -> None:
    environment = os.environ | {
        "_MOECAST_COMPLETE": "zsh_complete",
        "COMP_WORDS": "moecast convert EXAMPLE --calib",
        "COMP_CWORD": "3",
    }
    code = "from moecast.cli import main; main(prog_name='moecast')"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    assert "--calibration" in shown and "--calibration-chunks" in shown
