"""What conversions are asked for by name, and what they say they were made of."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from moecast.cli import main
from moecast.convert import onepass
from moecast.errors import Interrupted
from moecast.quant.planning.recipes import RECIPES
from moecast.sources.gguf import read_gguf

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimax-m2-tiny"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_list() -> None:
    found = {recipe["name"]: recipe for recipe in json.loads(_run("recipes", "--json").stdout)["recipes"]}
    assert [*found] == [*RECIPES]
    # Bits of blocks by hand: a Q8_0 block is 34 bytes for 32 weights, IQ4_XS 136 for 256.
    assert found["Q8_0"]["bits_per_weight"] == 8.5 and found["IQ4_XS"]["bits_per_weight"] == 4.25
    # Half of the down projections, a sixth of the weights, get Q6_K (6.5625 bits), the others Q4_K (4.5).
    assert found["Q4_K_M"]["bits_per_weight"] == pytest.approx(4.5 + (6.5625 - 4.5) / 6)
    assert found["NATIVE"]["bits_per_weight"] is None and found["NATIVE"]["aliases"] == ["COPY"]
    shown = _run("recipes").stdout
    assert all(name in shown for name in RECIPES)


@pytest.mark.parametrize(
    ("alias", "name"), [("q4_k", "Q4_K_M"), ("Q5_K", "Q5_K_M"), ("Q3_K", "Q3_K_M"), ("copy", "NATIVE")]
)
def test_aliases(alias: str, name: str) -> None:
    plans = [json.loads(_run("plan", EXAMPLE, "--quant", quant, "--json").stdout) for quant in (alias, name)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("typo", "meant"), [("q4km", "Q4_K_M"), ("Q8-0", "Q8_0"), ("IQ4XS", "IQ4_XS"), ("BF-16", "BF16")]
)
def test_a_typo_gets_a_suggestion(typo: str, meant: str) -> None:
    result = _run("plan", EXAMPLE, "--quant", typo)
    assert result.exit_code == 2 and "did you mean" in result.stderr and meant in result.stderr
    assert "`moecast recipes` lists them" in _run("plan", EXAMPLE, "--quant", "???").stderr


def test_a_conversion_says_what_it_was_made_of(tmp_path: Path) -> None:
    options = ("--quant", "Q8_0", "--name", "Tiny-2.5", "-c", 32, "--chunks", 2)
    result = _run("convert", EXAMPLE, "-o", tmp_path, *options, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    [file] = made["files"]
    assert Path(file).name == "Tiny-2.5-Q8_0.gguf" and read_gguf(Path(file))[0]["general.name"] == "Tiny-2.5"
    assert (made["recipe"], made["source"], made["revision"]) == ("Q8_0", EXAMPLE.as_posix(), None)
    assert made["imatrix"] is None and made["resumed"] is False and [*made["texts"]] == ["evaluation"]
    text = made["texts"]["evaluation"]
    assert text["sha256"] == hashlib.sha256(Path(text["path"]).read_bytes()).hexdigest()


def test_python_m_moecast() -> None:
    shown = subprocess.run([sys.executable, "-m", "moecast", "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout.startswith("moecast, version ")


def test_a_resumed_conversion_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["convert", EXAMPLE, "-o", tmp_path / "m.gguf", "--quant", "Q8_0", "-c", 32, "--chunks", 2]

    def lost(layer: int, *others: object) -> None:
        if layer == 1:
            raise Interrupted("the connection is lost")

    with monkeypatch.context() as patched:
        patched.setattr(onepass, "_check_coverage", lost)
        assert _run(*arguments).exit_code == 2
    result = _run(*arguments, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["resumed"] is True
    assert "in all runs" not in _run(*arguments, "--overwrite").stdout
