"""`moecast parity` of several candidates, and texts by category."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from click.testing import CliRunner, Result
from conftest import Checkpoint
from conversions import convert
from moecast.cli import main

TEXT = ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2"]


@pytest.fixture(scope="module")
def files(minimax: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    options: dict[str, Any] = {"calibration": None, "verify": False}
    return [convert(minimax.folder, folder / f"{quant}.gguf", quant, **options).files[0] for quant in ("Q8_0", "Q2_K")]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_several_as_json_and_as_a_table(
    minimax: Checkpoint, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    command = ("parity", minimax.folder, *files, files[1], *TEXT)
    result = _run(*command, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["reference"] == minimax.folder.as_posix() and found["tokens"] == 2 * 31
    small, same, large = found["candidates"]
    assert {
        "path", "bytes", "bits_per_weight", "mean_kld", "mean_kld_error", "kld_999", "top1_agreement",
        "perplexity_ratio", "dominated", "categories",
    } <= small.keys()  # fmt: skip
    assert small == same and small["path"] == files[1].as_posix() and large["path"] == files[0].as_posix()
    assert small["bytes"] == files[1].stat().st_size < large["bytes"] == files[0].stat().st_size
    alone = json.loads(_run("parity", minimax.folder, files[1], *TEXT, "--json").stdout)
    assert "candidates" not in alone and alone["mean_kld"] == pytest.approx(small["mean_kld"], rel=1e-4)
    ratio = alone["perplexity_candidate"] / alone["perplexity_reference"]
    assert small["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    shown = _run(*command).stdout
    assert shown.index("Q2_K.gguf") < shown.index("Q8_0.gguf")
    assert f"{small['mean_kld']:.5f} ± {small['mean_kld_error']:.5f}" in shown
    assert "*" not in shown and "by category" not in shown
    monkeypatch.setenv("COLUMNS", "56")
    narrow = _run(*command).stdout
    assert max(map(len, narrow.splitlines())) <= 56 and "…" not in narrow


def test_any_that_is_worse_fails(minimax: Checkpoint, files: list[Path]) -> None:
    command = ("parity", minimax.folder, *files, *TEXT, "--max-kld")
    assert _run(*command, 10).exit_code == 0
    judged = _run(*command, 0.02)
    assert judged.exit_code == 1
    assert [f"Failed: {files[1]}: mean KL" in judged.stderr, f"Failed: {files[0]}" in judged.stderr] == [True, False]


def test_texts_by_category(
    minimax: Checkpoint, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    code = tmp_path / "source.py"
    code.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    named = [*TEXT, "--text", f"code={code}"]
    one = json.loads(_run("parity", minimax.folder, files[0], *named, "--json").stdout)
    assert [part["name"] for part in one["slices"]["category"]] == [checkpoints.TEXT.stem, "code"]
    several = json.loads(_run("parity", minimax.folder, *files, *named, "--json").stdout)
    for candidate in several["candidates"]:
        assert candidate["categories"] == candidate["slices"]["category"]
        assert sum(part["tokens"] for part in candidate["categories"]) == candidate["tokens"]
    shown = _run("parity", minimax.folder, *files, *named).stdout
    assert "KL divergence by category" in shown
    assert all(f"{part['mean_kld']:.5f}" in shown for part in several["candidates"][0]["categories"])
    output = ["-o", tmp_path / "made.gguf", "--quant", "Q8_0", "--no-calibration", "--json"]
    made = json.loads(_run("convert", minimax.folder, *named, *output).stdout)
    assert {*made["texts"]} == {"evaluation", "evaluation code"}
    measured = [part["mean_kld"] for part in made["parity"]["slices"]["category"]]
    assert measured == pytest.approx([part["mean_kld"] for part in one["slices"]["category"]], rel=1e-3)


def test_bundled_categories(minimax: Checkpoint, files: list[Path]) -> None:
    """They stand for the evaluation text, unless one is named too."""
    short = ["--categories", "-c", 64, "--chunks", 1, "--json"]
    named = ["chat", "code", "languages", "long document", "maths", "prose", "tool calls"]
    for options, texts in (([], named), (["-f", checkpoints.TEXT], [checkpoints.TEXT.stem, *named])):
        found = json.loads(_run("parity", minimax.folder, files[1], *short, *options).stdout)
        assert [part["name"] for part in found["slices"]["category"]] == texts
        assert found["tokens"] == 31 * len(texts)


def test_bad_categories_are_one_line(minimax: Checkpoint, files: list[Path], tmp_path: Path) -> None:
    command = ("parity", minimax.folder, files[0])
    for options, line in (
        (["--text", "code"], "expected NAME=FILE"),
        (["--text", f"code={tmp_path / 'nowhere'}"], "no such file"),
        (["--text", f"a={checkpoints.TEXT}", "--text", f"a={checkpoints.TEXT}"], "names two texts"),
        ([*TEXT, "--text", f"{checkpoints.TEXT.stem}={checkpoints.TEXT}"], "has the name of --file"),
    ):
        result = _run(*command, *options)
        assert result.exit_code == 2 and line in result.stderr
