"""Reports that commands write: of the examples, with numbers that others find too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from chromium import flaws
from click.testing import CliRunner, Result
from conversions import convert, stopped_after
from moecast.archs.weights import Weight
from moecast.cli import main
from moecast.reports.gather import conversion_report
from moecast.sources.model import Model, open_model
from reported import parsed, words

EXAMPLES = checkpoints.EXAMPLES
TEXT = ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2"]
TOKENS = 2 * 64
TOKEN = "hf_0123456789abcdef"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def facts(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module", params=["minimax-m2-tiny", "nemotron-3-tiny", "deepseek-v4-tiny", "qwen3.5-tiny"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An example, and the file that a conversion of it has made beside its report."""
    source, folder = EXAMPLES / request.param, tmp_path_factory.mktemp("converted")
    calibration = ["--calibration", checkpoints.TEXT, "--calibration-chunks", 2, "--no-pad"]
    run("convert", source, "-o", folder, "--quant", "Q4_K_M", *TEXT, *calibration, "--token", TOKEN)
    return source, folder / f"{request.param}-Q4_K_M.gguf"


@pytest.mark.whole
def test_conversion_of_an_example(converted: tuple[Path, Path]) -> None:
    report = facts(converted[1].with_suffix(".report.json"))
    source, file = map(open_model, converted)
    assert [tensor["name"] for tensor in report["tensors"]] == [tensor.name for tensor in file.tensors]
    assert [tensor["bytes"] for tensor in report["tensors"]] == [tensor.length for tensor in file.tensors]
    weights = {weight.name: weight for weight in source.graph.weights()}
    written = {weight.name: weight for weight in file.graph.weights()}
    for tensor in report["tensors"]:
        expected, found = _numbers(source, weights[tensor["name"]]), _numbers(file, written[tensor["name"]])
        error = float((found - expected).norm() / expected.norm()) if expected.any() else 0.0
        assert tensor["rounding_error"] == pytest.approx(error, rel=0.1, abs=1e-6), tensor["name"]

    config = facts(source.path / "config.json")
    routed = TOKENS * config.get("text_config", config)["num_experts_per_tok"]
    assert {sum(layer["tokens"]) for layer in report["experts"]} == {routed}
    assert len(report["layers"]) == len(source.graph.layers)
    assert {*report["parity"]["slices"]} == {"category", "position", "confidence"}
    assert TOKEN not in report["provenance"]["command"] and "--quant Q4_K_M" in report["provenance"]["command"]
    page = words(parsed(_page(converted[1])))
    assert f"{report['parity']['mean_kld']:.6f}" in page and "Expert traffic" in page


@pytest.mark.whole
@pytest.mark.chromium
def test_its_labels_have_room(converted: tuple[Path, Path]) -> None:
    groups, found = flaws(_page(converted[1]))
    assert groups > 8
    assert found == []


def _page(file: Path) -> str:
    return file.with_suffix(".report.html").read_text(encoding="utf-8")


def _numbers(model: Model, weight: Weight) -> torch.Tensor:
    """All of a weight, flat."""
    matrices: list[int | None] = [*range(weight.matrices)] if weight.stack else [None]
    return torch.cat([model.load(weight, matrix).flatten() for matrix in matrices])


@pytest.mark.whole
def test_what_is_found_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic and errors of layers are those of a run that nobody stopped, and all else of layers that were done."""
    how: dict[str, Any] = {"context": 64, "chunks": 2, "calibration_chunks": 4, "padding": False}
    source = EXAMPLES / "nemotron-3-tiny"
    whole = convert(source, tmp_path / "whole.gguf", "Q4_K_M", **how).details.findings
    with stopped_after(60, monkeypatch):
        convert(source, tmp_path / "stopped.gguf", "Q4_K_M", **how)
    resumed = convert(source, tmp_path / "stopped.gguf", "Q4_K_M", **how)
    found = resumed.details.findings
    assert resumed.resumed
    assert found.expert_tokens == whole.expert_tokens and found.layer_errors == whole.layer_errors
    assert {name: found.squares.get(name) for name in whole.squares if name.startswith("blk.0.")} == {
        name: squares for name, squares in whole.squares.items() if name.startswith("blk.0.")
    }
    assert conversion_report(resumed).experts


def test_comparisons_and_a_plan(tmp_path: Path) -> None:
    folder = EXAMPLES / "minimax-m2-tiny"
    file = convert(folder, tmp_path / "model.gguf", "Q8_0", calibration=None, verify=False).files[0]
    printed = run("parity", folder, file, *TEXT, "--json", "--report", tmp_path / "parity").stdout
    report = facts(tmp_path / "parity" / "report.json")
    assert {name: report["parity"][name] for name in json.loads(printed)} == json.loads(printed)
    assert {tensor["type"] for tensor in report["tensors"]} == {"F32", "Q8_0"}
    assert report["bytes"] == file.stat().st_size
    stored = {tensor.name: tensor.length for tensor in open_model(file).tensors}
    assert {tensor["name"]: tensor["bytes"] for tensor in report["tensors"]} == stored

    smaller = convert(folder, tmp_path / "smaller.gguf", "Q4_0", calibration=None, verify=False).files[0]
    printed = run("parity", folder, file, smaller, *TEXT, "--json", "--report", tmp_path / "several").stdout
    assert facts(tmp_path / "several" / "report.json")["candidates"] == json.loads(printed)["candidates"]

    printed = run("plan", folder, "--quant", "IQ3_XXS", "--json", "--report", tmp_path / "plan").stdout
    report, plan = facts(tmp_path / "plan" / "report.json"), json.loads(printed)
    assert (report["bytes"], report["bits_per_weight"]) == (plan["bytes"], plan["bits_per_weight"])
    types = [[(one["name"], one["type"]) for one in found["tensors"]] for found in (report, plan)]
    assert types[0] == types[1]
    for name in ("parity", "several", "plan"):
        assert {file.name for file in (tmp_path / name).iterdir()} == {"report.html", "report.json"}
        parsed((tmp_path / name / "report.html").read_text(encoding="utf-8"))


def test_a_conversion_stands_without_its_report(tmp_path: Path) -> None:
    folder, options = EXAMPLES / "minimax-m2-tiny", ["--quant", "Q8_0", "--no-verify", "-o", tmp_path / "a.gguf"]
    run("convert", folder, *options, "--no-report")
    assert {file.name for file in tmp_path.iterdir()} == {"a.gguf", "a.fingerprints.json"}
    (tmp_path / "a.report.json").mkdir()
    shown = run("convert", folder, *options, "--overwrite")
    assert re.search(r"No report: .*a\.report\.json cannot be written", shown.stderr)
    assert {file.name for file in tmp_path.iterdir()} == {"a.gguf", "a.fingerprints.json", "a.report.json"}


def test_an_onnx_folder_has_its_report_beside_it(tmp_path: Path) -> None:
    run("convert", EXAMPLES / "minimax-m2-tiny", "--to", "onnx", "-o", tmp_path, *TEXT, "--calibration-chunks", 2)
    name = "minimax-m2-tiny-Q4_0-onnx"
    assert {file.name for file in tmp_path.iterdir()} == {name, f"{name}.report.html", f"{name}.report.json"}
    assert facts(tmp_path / f"{name}.report.json")["bytes"] > 1_000_000
