"""Several files in one pass: the bytes of each are those of its own conversion, and the source is read once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import moecast.convert.encode
import pytest
from click.testing import CliRunner
from conftest import Checkpoint
from conversions import convert, interrupting_after
from moecast.archs.expressions import TensorInfo
from moecast.cli import main
from moecast.convert import NO_CALIBRATION, Goal, Output
from moecast.convert import convert as convert_checkpoint
from moecast.errors import BadInput, Interrupted
from moecast.quant.rounding.moments import SecondMoments
from moecast.quant.rounding.statistics import SecondMomentStatistics
from moecast.sources.storage import Storage
from torch import Tensor

NEMOTRON = checkpoints.EXAMPLES / "nemotron-3-tiny"  # whose rows recipes pad, each in its way
DEEPSEEK = checkpoints.EXAMPLES / "deepseek-v4-tiny"  # of whose blocks some are stored as they are
EVALUATED: dict[str, Any] = {"file": checkpoints.TEXT, "context": 32, "chunks": 2}
ALONE: dict[str, Any] = {"calibration": None, "verify": False}


def _several(source: Path, output: Path, goals: list[str], **options: Any) -> Any:
    return convert(source, output, goals, **options)  # type: ignore[arg-type]


@pytest.fixture
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A hundred tokens to calibrate with, and as many to compare on."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(checkpoints.TEXT.read_text(encoding="utf-8")[:400], encoding="utf-8")
    return {"calibration": text, **EVALUATED}


def _files(folder: Path) -> dict[str, bytes]:
    """All but fingerprints, whose figures on the layer in flight are partial after a kill."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".fingerprints.json"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of the source that are asked for, call by call."""
    read, sizes = Storage.read, list[int]()

    def counted(self: Storage, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        data = read(self, tensor, start, stop)
        sizes.append(data.nbytes)
        return data

    monkeypatch.setattr(Storage, "read", counted)
    yield sizes


@pytest.mark.whole
@pytest.mark.parametrize(
    ("source", "recipes", "options"),
    [
        (NEMOTRON, ["Q4_K_M", "Q2_K", "BF16"], None),
        (NEMOTRON, ["Q4_K_M", "Q8_0", "Q3_K_S", "BF16", "F16"], ALONE),
        (DEEPSEEK, ["Q4_K_M", "NATIVE"], None),
    ],
    ids=["streams", "alone", "stored as they are"],
)
def test_each_file_is_its_own_and_the_source_is_read_once(
    source: Path,
    recipes: list[str],
    options: dict[str, Any] | None,
    streams: dict[str, Any],
    tmp_path: Path,
    bytes_read: list[int],
) -> None:
    options = options or streams
    made = _several(source, tmp_path / "together", recipes, **options)
    assert [one.recipe for one in made] == recipes
    together = sum(bytes_read)
    for recipe, one in zip(recipes, made, strict=True):
        bytes_read.clear()
        alone = convert(source, tmp_path / "alone", recipe, **options)
        assert one.files[0].name == alone.files[0].name
        assert one.files[0].read_bytes() == alone.files[0].read_bytes(), recipe
        assert one.problems == alone.problems and one.details.findings.squares == alone.details.findings.squares
        if recipe == recipes[0]:
            assert together == sum(bytes_read)
            assert one.parity == alone.parity
        elif one.parity and alone.parity:  # without calibration beside it, an expert's tokens are fewer at a time
            assert one.parity.mean_kld == pytest.approx(alone.parity.mean_kld, rel=1e-3, abs=1e-6)
    assert {*_files(tmp_path / "together")} == {one.files[0].name for one in made}


@pytest.mark.whole
def test_what_is_rounded_alike_is_rounded_once(
    streams: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are taken and factored as for one file; a weight in one type is rounded for all files together."""
    factors, sums, rounded = list[int](), list[int](), list[tuple[str, tuple[int | None, ...], str, int]]()
    factorize, add, quantize = (
        SecondMoments._factorized,
        SecondMomentStatistics.add,
        moecast.convert.encode.quantize_weight,
    )
    monkeypatch.setattr(SecondMoments, "_factorized", lambda self: factors.append(1) or factorize(self))
    monkeypatch.setattr(SecondMomentStatistics, "add", lambda self, *of: sums.append(1) or add(self, *of))

    def noted(rows: Tensor, weight: Any, experts: Any, name: str, *others: Any) -> Tensor:
        rounded.append((weight.name, tuple(experts), name, rows.shape[1]))
        return quantize(rows, weight, experts, name, *others)

    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", noted)
    source, found = checkpoints.EXAMPLES / "minimax-m2-tiny", list[Any]()
    options = streams | {"padding": False, "error_feedback": True}
    for goals in (["Q4_K_M"], ["Q4_K_S"], ["Q4_K_M", "Q4_K_S"]):
        _several(source, tmp_path / str(len(found)), goals, **options)
        found.append((len(factors), len(sums), {*rounded}))
        assert len(rounded) == len({*rounded})
        for noted_down in (factors, sums, rounded):
            noted_down.clear()
    first, second, both = found
    assert both[0] == max(first[0], second[0]) < first[0] + second[0] and both[1] == first[1]
    assert both[2] == first[2] | second[2] and len(both[2]) < len(first[2]) + len(second[2])


@pytest.mark.whole
def test_whatever_stops_it_the_same_call_continues(
    minimax_fp8: Checkpoint, streams: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = ["Q4_K_M", "Q8_0", "Q3_K_S"]
    _several(minimax_fp8.folder, tmp_path / "whole", recipes, **streams)
    for pieces in (60, 10):
        with interrupting_after(pieces, monkeypatch), pytest.raises(KeyboardInterrupt):
            _several(minimax_fp8.folder, tmp_path / "out", recipes, **streams)
    assert (tmp_path / "out" / f".{minimax_fp8.folder.name}.journal").is_dir()
    with pytest.raises(BadInput, match=r"quant was Q4_K_M \+ Q8_0 \+ Q3_K_S, is now Q4_K_M \+ Q8_0"):
        _several(minimax_fp8.folder, tmp_path / "out", recipes[:2], **streams)
    made = _several(minimax_fp8.folder, tmp_path / "out", recipes, **streams)
    assert all(one.resumed for one in made)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


@pytest.mark.whole
def test_a_file_that_is_at_work_elsewhere(
    minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a conversion to one of the recipes has left is neither taken nor lost, unless it may be overwritten."""
    with interrupting_after(40, monkeypatch), pytest.raises(KeyboardInterrupt):
        convert(minimax_fp8.folder, tmp_path, "Q8_0", **ALONE)
    left = _files(tmp_path)
    with pytest.raises(BadInput, match="holds unfinished work of another conversion"):
        _several(minimax_fp8.folder, tmp_path, ["Q4_K_M", "Q8_0"], **ALONE)
    assert {name: content for name, content in _files(tmp_path).items() if name in left} == left
    made = _several(minimax_fp8.folder, tmp_path, ["Q4_K_M", "Q8_0"], overwrite=True, **ALONE)
    assert {*_files(tmp_path)} == {one.files[0].name for one in made}


def test_disk_for_all_of_them(minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for any of the files, and not for both."""
    sizes = [convert(minimax.folder, tmp_path / "one", name, **ALONE).bytes for name in ("Q8_0", "BF16")]
    usage = type("Usage", (), {"free": max(sizes) + min(sizes) // 2})
    monkeypatch.setattr("moecast.convert.preflight.shutil.disk_usage", lambda path: usage)
    convert(minimax.folder, tmp_path / "two", "BF16", **ALONE)
    with pytest.raises(Interrupted, match="has no room"):
        _several(minimax.folder, tmp_path / "three", ["Q8_0", "BF16"], **ALONE)


@pytest.mark.whole
def test_onnx_folders(minimax: Checkpoint, tmp_path: Path) -> None:
    options = {"file_format": "onnx", **ALONE}
    made = _several(minimax.folder, tmp_path / "together", ["Q4_0", "Q8_0"], **options)
    for one in made:
        convert(minimax.folder, tmp_path / "alone", one.recipe, **options)
    assert _files(tmp_path / "together") == _files(tmp_path / "alone")


@pytest.mark.parametrize(
    ("goals", "output", "message"),
    [
        (["Q4_K_M", "Q8_0"], "out.gguf", r"out\.gguf, one file for 2: give a folder"),
        (["Q4_K", "Q4_K_M"], "out", "two files are both called Q4_K_M"),
        (["Q4_K_M", Goal(size=10**8)], "out", "a budget is measured for one file alone"),
        (["Q4_K_M", Goal(size=10**8, measure=False)], "out", "give --error-feedback or --no-error-feedback"),
        ([], "out", "expected at least one recipe"),
    ],
)
def test_what_cannot_be_together(
    minimax: Checkpoint, tmp_path: Path, goals: list[str | Goal], output: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        convert_checkpoint(minimax.folder, tmp_path / output, goals)
    assert not _files(tmp_path)


@pytest.mark.whole
def test_a_plan_beside_a_recipe(minimax: Checkpoint, tmp_path: Path) -> None:
    """Goals of any kind come in the order in which they were asked for, one alone in a list is a list of one."""
    goals = [Goal("Q8_0"), Goal(bits_per_weight=5, measure=False)]
    settings: dict[str, Any] = {"calibration": NO_CALIBRATION, "evaluation": None}
    made = convert_checkpoint(minimax.folder, Output(tmp_path / "both", "tiny"), goals, **settings)
    assert [one.output.name for one in made] == ["tiny-Q8_0.gguf", "tiny-5.00bpw.gguf"]
    for goal, one in zip(goals, made, strict=True):
        (alone,) = convert_checkpoint(minimax.folder, Output(tmp_path / "one.gguf", "tiny"), [goal], **settings)
        assert alone.files[0].read_bytes() == one.files[0].read_bytes()
        alone.files[0].unlink()


@pytest.mark.whole
def test_the_command(tmp_path: Path) -> None:
    """One JSON object a file, a report that compares them beside those of each, and a condition on all."""
    source = checkpoints.EXAMPLES / "minimax-m2-tiny"
    command = ["convert", str(source), "-o", str(tmp_path), "--name", "tiny", "--no-calibration"]
    options = ["-c", "32", "--chunks", "2", "--quant", "Q2_K, Q4_1,Q4_K_M", "--json", "--max-kld", "0.03"]
    result = CliRunner().invoke(main, [*command, *options])
    made = json.loads(result.stdout)["conversions"]
    names = [f"tiny-{recipe}.gguf" for recipe in ("Q2_K", "Q4_1", "Q4_K_M")]
    assert [Path(one["output"]).name for one in made] == names
    failed = [one for one in made if one["parity"]["mean_kld"] > 0.03]
    assert 0 < len(failed) < len(made) and result.exit_code == 1
    assert [f"{one['output']}: mean KL divergence" in result.stderr for one in made] == [one in failed for one in made]
    report = json.loads((tmp_path / "tiny.report.json").read_text())
    assert report["kind"] == "comparison" and report["title"] == "3 files of minimax-m2-tiny"
    compared = [(Path(one["path"]).name, one["bytes"], one["mean_kld"]) for one in report["candidates"]]
    expected = [(Path(one["output"]).name, one["bytes"], one["parity"]["mean_kld"]) for one in made]
    assert compared == sorted(expected, key=lambda one: one[1])
    beaten = {name for name, size, kld in expected if any(s <= size and k < kld for _, s, k in expected)}
    assert {Path(one["path"]).name for one in report["candidates"] if one["dominated"]} == beaten
    for one in made:
        own = json.loads(Path(one["output"]).with_suffix(".report.json").read_text())
        assert own["kind"] == "conversion" and own["parity"]["mean_kld"] == one["parity"]["mean_kld"]


def test_the_command_without_converting(tmp_path: Path) -> None:
    source = checkpoints.EXAMPLES / "minimax-m2-tiny"
    command = ["convert", str(source), "-o", str(tmp_path), "--dry-run", "--json"]
    found = json.loads(CliRunner().invoke(main, [*command, "--quant", "Q8_0,Q2_K"]).stdout)["plans"]
    assert found == [
        json.loads(CliRunner().invoke(main, [*command, "--quant", one]).stdout) for one in ("Q8_0", "Q2_K")
    ]
