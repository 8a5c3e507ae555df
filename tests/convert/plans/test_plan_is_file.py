"""What `plan` and `--dry-run` show is what `convert` writes with the same options, type for type and byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import moecast.convert.work
import pytest
import real_models
from checkpoints import EXAMPLES, TEXT
from click.testing import CliRunner
from moecast.archs import minimax_m2
from moecast.cli import main
from moecast.convert.findings import Findings
from moecast.convert.onepass import Passed
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import NO_CALIBRATION, Calibration, Goal
from moecast.quant.planning.onnx_plan import ONNX_RECIPES
from moecast.quant.planning.recipes import RECIPES
from moecast.sources.model import Model, open_model

FAMILIES = ("minimax-m2-tiny", "nemotron-3-tiny", "deepseek-v4-tiny", "qwen3.5-tiny")
GGUF_RECIPES = [name for name in RECIPES if name != "Q2_0"]  # a type that gguf-py does not know


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few tokens to calibrate with."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:400], encoding="utf-8")
    return path


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions decide all that they decide, and lay out their files, whose numbers stay zero."""
    nothing = Passed(None, Findings())
    monkeypatch.setattr(moecast.convert.work, "run_pass", lambda model, files, *others, **named: [nothing] * len(files))
    for name in ("fingerprints_of", "keep_fingerprints"):  # of what was written
        monkeypatch.setattr(moecast.convert.work, name, lambda *facts: None)


def run(command: str, folder: Path, *options: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, [command, str(folder), *map(str, options), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def convert(folder: Path, output: Path, *options: object) -> Path:
    return Path(
        run("convert", folder, "-o", output, "--overwrite", "--no-verify", "--no-report", "-c", 16, *options)["files"][
            0
        ]
    )


def planned(plan: dict[str, Any]) -> list[tuple[str, str, list[int], int]]:
    return [(tensor["name"], tensor["type"], tensor["shape"], tensor["bytes"]) for tensor in plan["tensors"]]


def stored(file: Path) -> Iterator[tuple[str, str, list[int], int]]:
    for tensor in gguf.GGUFReader(file).tensors:
        yield tensor.name, tensor.tensor_type.name, tensor.shape.tolist()[::-1], tensor.n_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [(), ("--no-calibration",), ("--no-pad",)], ids=" ".join)
def test_every_recipe(family: str, options: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    """As it is for every family, with each of the options for two families."""
    folder = EXAMPLES / family
    for recipe in GGUF_RECIPES[FAMILIES.index(family) % 2 :: 2] if options else GGUF_RECIPES:
        given = ("--quant", recipe, *options, *(() if "--no-calibration" in options else ("--calibration", text)))
        plan = planned(run("plan", folder, *given))
        if not options:
            assert plan == planned(run("convert", folder, "--dry-run", *given)), recipe
        assert plan == list(stored(convert(folder, tmp_path / "model.gguf", *given))), recipe


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [(), ("--no-calibration",), ("--no-pad",)], ids=" ".join)
@pytest.mark.parametrize("budget", [("--bpw", 4.5), ("--bpw", 6), ("--size", "4MB")])
def test_budgets(family: str, options: tuple[str, ...], budget: tuple[object, ...], text: Path, tmp_path: Path) -> None:
    """Without measuring; `plan` never measures unless it is told to, and says what `convert` would do."""
    folder = EXAMPLES / family
    given = (*budget, *options, *(() if "--no-calibration" in options else ("--calibration", text)))
    plan = run("plan", folder, "--no-measure", *given)
    model = open_model(convert(folder, tmp_path / "model.gguf", "--no-measure", *given))
    assert planned(plan) == [(t.name, t.dtype, list(t.shape), t.length) for t in model.tensors]
    for shown in (run("plan", folder, *given), run("convert", folder, "--dry-run", *given)):
        assert planned(shown) == planned(plan)
        assert {*shown["problems"]} - {*plan["problems"]} == {
            "`convert` measures the model first, unless --no-measure: `plan --measure` shows what that leads to"
        }


@pytest.mark.usefixtures("nothing_is_computed")
def test_types_below_two_bits(text: Path, tmp_path: Path) -> None:
    """Only with calibration, says `plan` as `convert` does."""
    folder, given = EXAMPLES / "minimax-m2-tiny", ("--bpw", 2, "--no-measure")
    plan = run("plan", folder, *given, "--calibration", text)
    model = open_model(convert(folder, tmp_path / "model.gguf", *given, "--calibration", text))
    assert planned(plan) == [(t.name, t.dtype, list(t.shape), t.length) for t in model.tensors]
    assert any(tensor["type"].startswith("IQ1") for tensor in plan["tensors"])
    for command in ("plan", "convert"):
        refused = CliRunner().invoke(main, [command, str(folder), *map(str, given), "--no-calibration"])
        assert refused.exit_code == 2 and "is too little" in refused.stderr


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("recipe", ONNX_RECIPES)
def test_onnx(family: str, recipe: str, tmp_path: Path) -> None:
    """An ONNX model does not name types, so its bytes have to do."""
    given = ("--to", "onnx", "--quant", recipe)
    plan = run("plan", EXAMPLES / family, *given)
    model = convert(EXAMPLES / family, tmp_path, *given, "--no-calibration")
    assert sum(file.stat().st_size for file in model.parent.glob("*.onnx_data")) == plan["bytes"]


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("family", FAMILIES)
def test_types_of_single_tensors(family: str, text: Path, tmp_path: Path) -> None:
    """As in `quantize`: expressions are searched in GGUF names, the first that matches counts, all else stays."""
    overrides = ["--tensor-type", r"BLK\.1\.ffn_down=q5_1", "--tensor-type", "ffn=q8_0"]
    given = ("--quant", "Q4_0", "--no-pad", "--calibration", text)
    usual = {tensor["name"]: tensor["type"] for tensor in run("plan", EXAMPLES / family, *given)["tensors"]}
    plan = run("plan", EXAMPLES / family, *given, *overrides)
    assert planned(plan) == planned(run("convert", EXAMPLES / family, "--dry-run", *given, *overrides))
    assert planned(plan) == list(stored(convert(EXAMPLES / family, tmp_path / "model.gguf", *given, *overrides)))
    types = {tensor["name"]: tensor["type"] for tensor in plan["tensors"]}
    changed = {name for name in types if types[name] != usual[name]}
    assert {types[name] for name in changed} == {"Q5_1", "Q8_0"} and all("ffn" in name for name in changed)
    for name, type in usual.items():
        if type in ("F32", "I32") or "ffn" not in name:
            assert types[name] == type
        else:
            assert types[name] == ("Q5_1" if name.startswith("blk.1.ffn_down") else "Q8_0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "4MB", "--tensor-type", "ffn=q8_0"), "--size and --bpw choose the type of every tensor"),
        (("--to", "onnx", "--tensor-type", "ffn=q8_0"), "--tensor-type names tensors and types of GGUF files"),
        (("--tensor-type", "nothing_like_this=q8_0"), "'nothing_like_this' matches no tensor"),
        (("--tensor-type", "ffn=f64"), "--tensor-type gives F64, which holds no weights"),
    ],
)
def test_types_of_single_tensors_that_cannot_be(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for command in (("plan",), ("convert", "-o", str(tmp_path))):
        result = CliRunner().invoke(main, [command[0], str(EXAMPLES / FAMILIES[0]), *command[1:], *options])
        assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("recipe", ["IQ3_XXS", "Q4_0"])
def test_a_file_with_numbers(recipe: str, text: Path, tmp_path: Path) -> None:
    """Nothing that is computed changes a type."""
    given = ("--quant", recipe, "--no-pad", "--calibration", text)
    plan = planned(run("plan", EXAMPLES / "nemotron-3-tiny", *given))
    assert plan == list(stored(convert(EXAMPLES / "nemotron-3-tiny", tmp_path / "model.gguf", *given)))


def test_an_importance_matrix_counts_as_calibration(tmp_path: Path) -> None:
    given = ("--quant", "IQ3_XXS", "--no-pad")
    plain, weighed = (run("plan", EXAMPLES / "nemotron-3-tiny", *given, *o) for o in ((), ("--no-calibration",)))
    matrix = tmp_path / "any.gguf"
    matrix.touch()  # a plan asks what it is for, not what it holds
    found = run("plan", EXAMPLES / "nemotron-3-tiny", *given, "--no-calibration", "--imatrix", matrix)
    assert planned(found) == planned(plain) != planned(weighed)


@pytest.mark.parametrize(
    ("recipe", "calibrated", "without"),
    [  # GB of MiniMax M2
        ("IQ3_XXS", 87.95, 92.58),
        ("IQ4_XS", 121.87, 123.19),
        ("IQ4_NL", 128.99, 130.05),
        ("Q4_0", 129.50, 128.97),
        ("Q5_0", 158.00, 157.47),
    ],
)
def test_published_model(recipe: str, calibrated: float, without: float) -> None:
    """The mixes that depend on calibration, by the size of the complete model."""
    architecture, tensors = minimax_m2.ARCHITECTURE, real_models.minimax_m2()
    graph = architecture.from_checkpoint(real_models.config("minimax-m2.7"), tensors)
    model = Model(Path("minimax-m2"), architecture, graph, tensors, {})
    sizes = [plan_for(model, Goal(recipe), calibration=how).bytes for how in (Calibration(), NO_CALIBRATION)]
    assert [round(size / 1e9, 2) for size in sizes] == [calibrated, without]
