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
from moecast.sources.imatrix import read_imatrix

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


def test_fit_writes_what_plan_shows(tmp_path: Path) -> None:
    """What plan says of a machine that is too small for all of it in 8 bits, tensor by tensor."""
    machine = ("--fit", "--ram", 2**30 + 55_500_000, "--vram", 0)
    plan = json.loads(_run("plan", EXAMPLE, *machine, "-c", 32768, "--json").stdout)
    assert plan["bits_per_weight"] < 8
    options = ("--no-verify", "--no-calibration", "--json")
    made = json.loads(_run("convert", EXAMPLE, "-o", tmp_path, *machine, *options).stdout)
    _, tensors = read_gguf(Path(made["files"][0]))
    assert {t.name: t.dtype for t in tensors} == {t["name"]: t["type"] for t in plan["tensors"]}
    dry = json.loads(_run("convert", EXAMPLE, "-o", tmp_path, *machine, "--dry-run", "--json").stdout)
    assert dry["tensors"] == plan["tensors"]


def test_chunks_of_calibration(tmp_path: Path) -> None:
    """Both commands read the same beginning of the text."""
    for name, line in {
        "a": ("imatrix", EXAMPLE, "--chunks", 2, "-o"),
        "b": ("imatrix", EXAMPLE, "--calibration-chunks", 2, "-o"),
        "c": ("convert", EXAMPLE, "--quant", "Q4_0", "--calibration-chunks", 2, "-o", tmp_path, "--imatrix-out"),
    }.items():
        result = _run(*line, tmp_path / f"{name}.gguf", "-c", 32, *(["--no-verify"] if name == "c" else []))
        assert result.exit_code == 0, result.output
    first, second, third = (read_imatrix(tmp_path / f"{name}.gguf") for name in "abc")
    assert first.chunks == second.chunks == third.chunks == 2
    for name, means in first.means.items():
        assert means.equal(second.means[name]) and means.equal(third.means[name])


@pytest.mark.parametrize(
    ("quant", "calibrates"),
    [("EXPERTS_Q4", True), ("EXPERTS_Q2", True), ("MXFP4_MOE", True), ("Q4_0", True), ("Q8_0", False), ("BF16", False)],
)
def test_recipes_calibrate_where_any_type_is_coarse(quant: str, calibrates: bool) -> None:
    assert RECIPES[quant].wants_importance is calibrates
