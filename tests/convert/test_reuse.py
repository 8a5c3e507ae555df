"""What a conversion takes from an earlier file changes nothing but how long it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import moecast.convert.encode
import moecast.convert.plans.allocate
import moecast.convert.work
import moecast.runner.observe
import pytest
import torch
from click.testing import CliRunner
from conftest import Checkpoint
from conversions import convert, stopped_after
from hub_server import HubServer
from huggingface_hub import constants
from moecast.archs.expressions import stored_tensors
from moecast.archs.weights import Weight
from moecast.cli import main
from moecast.convert.calibrate import write_imatrix
from moecast.convert.resume import sidecar
from moecast.convert.settings import Calibration, Goal
from moecast.errors import BadInput
from moecast.sources.gguf import read_gguf
from moecast.sources.model import open_model

TEXT = checkpoints.TEXT.read_text(encoding="utf-8")
pytestmark = pytest.mark.whole
FOLDERS = sorted(checkpoints.EXAMPLES.glob("*-tiny"))
BARE: dict[str, Any] = {"calibration": None, "verify": False}
LANES: dict[str, Any] = {"calibration": "calibration", "context": 64, "chunks": 2}
DOWN = (("ffn_down_exps", "Q5_K"),)  # the role that changes


class Notes:
    """Progress that keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int, detail: str = "") -> None: ...

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "calibration").write_text(TEXT[:1200], encoding="utf-8")
    return tmp_path / "calibration"


def _types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in read_gguf(file)[1]}


def _rounded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of what is rounded from here on."""
    names: set[str] = set()
    quantize = moecast.convert.encode.quantize_weight

    def noted(rows: torch.Tensor, weight: Weight, *rest: Any) -> torch.Tensor:
        names.add(weight.name)
        return quantize(rows, weight, *rest)

    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", noted)
    return names


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("earlier", "goal", "options"),
    [
        ("Q4_K_M", Goal("Q4_K_M", tensor_types=DOWN), BARE),
        slow("Q4_K_M", "Q3_K_M", BARE),
        ("Q4_K_M", "Q5_K_M", BARE | {"split_max_bytes": 500_000}),
        ("IQ2_XS", Goal("IQ2_XS", tensor_types=DOWN), LANES),
        slow("IQ2_XS", Goal("IQ2_XS", tensor_types=DOWN), LANES | {"verify": False}),
        slow("IQ3_XXS", Goal("IQ3_XXS", tensor_types=DOWN), LANES | {"error_feedback": True}),
        slow("IQ4_XS", Goal("Q4_K_M"), LANES | {"error_feedback": True, "verify": False}),
        ("Q3_K_M", Goal("Q3_K_M", tensor_types=DOWN), BARE | {"imatrix": "imatrix.gguf"}),
    ],
)
def test_same_bytes(
    minimax_fp8: Checkpoint,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    earlier: str,
    goal: str | Goal,
    options: dict[str, Any],
) -> None:
    folder = text.parent
    if "imatrix" in options:
        write_imatrix(minimax_fp8.folder, folder / "imatrix.gguf", Calibration(text, context=64))
    options = {
        key: folder / value if key in ("calibration", "imatrix") and value else value for key, value in options.items()
    }
    before = convert(minimax_fp8.folder, folder / "before.gguf", earlier, **options)
    fresh = convert(minimax_fp8.folder, folder / "fresh.gguf", goal, **options)
    rounded, types = _rounded(monkeypatch), [_types(made.files[0]) for made in (before, fresh)]
    same = {name for name, type in types[1].items() if types[0][name] == type}
    assert 0 < len(same) < len(types[1])
    made = convert(minimax_fp8.folder, folder / "made.gguf", goal, reuse=before.files[0], **options)
    for mine, theirs in zip(made.files, fresh.files, strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert rounded == types[1].keys() - same
    assert made.parity == fresh.parity and made.problems == fresh.problems
    assert made.details.findings == fresh.details.findings
    assert made.reused and (made.reused.tensors, made.reused.of) == (len(same), len(types[1]))
    assert sidecar.read_fingerprints(made.files[0]) == sidecar.read_fingerprints(fresh.files[0])


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_family(folder: Path, tmp_path: Path) -> None:
    """Also between padded rows and others, and codes that are kept."""
    changes: tuple[tuple[str, dict[str, Any]], ...] = (("Q3_K_M", {}), ("native", {}), ("Q4_K_M", {"padding": False}))
    before = convert(folder, tmp_path / "before.gguf", "Q4_K_M", **BARE).files[0]
    for quant, form in changes:
        fresh = convert(folder, tmp_path / "fresh.gguf", quant, overwrite=True, **form, **BARE)
        made = convert(folder, tmp_path / "made.gguf", quant, overwrite=True, reuse=before, **form, **BARE)
        assert made.files[0].read_bytes() == fresh.files[0].read_bytes()
        assert made.reused and made.reused.tensors > 0 and made.details.findings == fresh.details.findings


@pytest.mark.parametrize("verify", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_calibration_ends_where_nothing_is_left_to_round(
    minimax_fp8: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """It runs through one layer of two where the last has not changed, and not at all for other metadata alone."""
    options = LANES | {"calibration": text, "verify": verify}
    before = convert(minimax_fp8.folder, text.parent / "before.gguf", "IQ2_XS", **options | {"verify": not verify})
    read: list[int] = []
    add = moecast.runner.observe.ObservingWeights.project

    def noted(weights: Any, states: torch.Tensor, weight: Weight, expert: int | None = None) -> torch.Tensor:
        read.append(weight.layer if weight.layer is not None else -1)
        return add(weights, states, weight, expert)

    monkeypatch.setattr(moecast.runner.observe.ObservingWeights, "project", noted)
    first = Goal("IQ2_XS", tensor_types=((r"blk\.0\.ffn_down_exps", "Q5_K"),))
    for goal, name, layers in ((first, None, {0}), ("IQ2_XS", "another", set())):
        fresh = convert(minimax_fp8.folder, text.parent / "fresh.gguf", goal, name=name, overwrite=True, **options)
        read.clear()
        named = {"name": name, "overwrite": True, "reuse": before.files[0]}
        made = convert(minimax_fp8.folder, text.parent / "made.gguf", goal, **named, **options)
        assert {*read} == layers
        assert made.files[0].read_bytes() == fresh.files[0].read_bytes()
        assert made.details.findings.expert_tokens == fresh.details.findings.expert_tokens
        assert made.details.findings.squares == fresh.details.findings.squares
        if made.parity and fresh.parity:  # without calibration beside it, experts are summed up in another order
            for figure in ("perplexity_reference", "perplexity_candidate", "mean_kld"):
                assert getattr(made.parity, figure) == pytest.approx(getattr(fresh.parity, figure), rel=1e-4)


@pytest.mark.slow
def test_what_differs_is_made_again(
    minimax_fp8: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other calibration: what is not quantized stays. Another source, or other code: nothing does."""
    folder, options = tmp_path / "out", LANES | {"calibration": text, "verify": False}
    before = convert(minimax_fp8.folder, folder / "before.gguf", "Q3_K_M", **options).files[0]

    def made(source: Path = minimax_fp8.folder, quant: str = "Q3_K_M", **changed: Any) -> tuple[int, str]:
        progress, same = Notes(), options | {"overwrite": True} | changed
        fresh = convert(source, folder / "fresh.gguf", quant, **same)
        result = convert(source, folder / "made.gguf", quant, reuse=before, progress=progress, **same)
        assert result.files[0].read_bytes() == fresh.files[0].read_bytes()
        assert result.reused
        return result.reused.tensors, next(line for line in progress.lines if " tensors taken from " in line)

    plain = sum(type == "F32" for type in _types(before).values())
    other = tmp_path / "other"
    other.write_text(TEXT[1200:2400], encoding="utf-8")
    found, line = made(calibration=other)
    assert found == plain and "calibration was " in line and ", is now " in line
    assert made(error_feedback=True)[0] == made(calibration=None)[0] == plain
    copy = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    shard = sorted(copy.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # of a number's exponent
    shard.write_bytes(content)
    names = {tensor.name for tensor in open_model(copy).tensors if Path(tensor.file).name == shard.name}
    assert 0 < made(copy)[0] < plain and names
    monkeypatch.setattr(moecast.convert.work, "code_digest", lambda: "0123456789ab")
    found, line = made()
    assert found == 0 and line.endswith("is now 0123456789ab") and "the code that decides bytes was " in line


def test_one_changed_shard(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """Without calibration a tensor depends on its own shards alone."""
    source = checkpoints.copied(minimax_fp8.folder, tmp_path / "source")
    before = convert(source, tmp_path / "before.gguf", "Q4_K_M", **BARE).files[0]
    (norm,) = (tensor for tensor in open_model(source).tensors if tensor.name.endswith("model.norm.weight"))
    with Path(norm.file).open("r+b") as shard:
        shard.seek(norm.offset)
        shard.write(b"\0" * 4)
    changed = [
        weight.name
        for weight in open_model(source).graph.weights()
        if any(stored.file == norm.file for stored in stored_tensors(weight.source))
    ]
    fresh = convert(source, tmp_path / "fresh.gguf", "Q4_K_M", **BARE)
    made = convert(source, tmp_path / "made.gguf", "Q4_K_M", reuse=before, **BARE)
    assert made.files[0].read_bytes() == fresh.files[0].read_bytes() != before.read_bytes()
    assert made.reused and made.reused.of - made.reused.tensors == len(changed) > 0


def _damage(file: Path, tensor: str) -> None:
    (stored,) = (info for info in read_gguf(file)[1] if info.name == tensor)
    with file.open("r+b") as opened:
        opened.seek(stored.offset + stored.length // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 16]))


def test_a_damaged_tensor_is_made_again(minimax_fp8: Checkpoint, text: Path) -> None:
    """Also where calibration would end before it."""
    options = LANES | {"calibration": text, "verify": False}
    before = convert(minimax_fp8.folder, text.parent / "before.gguf", "IQ2_XS", **options).files[0]
    whole, progress = before.read_bytes(), Notes()
    for name in ("blk.1.ffn_up_exps.weight", "blk.0.attn_norm.weight"):
        _damage(before, name)
    made = convert(minimax_fp8.folder, text.parent / "made.gguf", "IQ2_XS", reuse=before, progress=progress, **options)
    assert made.files[0].read_bytes() == whole
    assert made.reused and made.reused.of - made.reused.tensors == 2
    assert f"{before}: 2 tensors are not as they were written: made again" in progress.lines


def test_files_that_cannot_be_reused(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    before = convert(minimax_fp8.folder, tmp_path / "before.gguf", "Q4_K_M", **BARE).files[0]
    beside = tmp_path / "before.fingerprints.json"
    whole, record = before.read_bytes(), beside.read_bytes()
    checksum = next(iter(json.loads(record)["content"]["tensors"].values()))[1][0]

    def refused(message: str) -> None:
        with pytest.raises(BadInput, match=message):
            convert(minimax_fp8.folder, tmp_path / "out" / "made.gguf", "Q4_K_M", reuse=before, **BARE)
        assert not list(tmp_path.glob("out/*"))
        before.write_bytes(whole)
        beside.write_bytes(record)

    before.write_bytes(whole[:-40])
    refused(r"before\.gguf.* lies outside the file")
    before.write_bytes(b"x" * 100)
    refused(r"before\.gguf is not a GGUF file")
    beside.unlink()
    refused(r"before\.fingerprints\.json is missing, in which `convert` writes what before\.gguf is made from")
    for content in (
        record.replace(b"%d" % checksum, b"1"),
        b'{"version":1}',
        record.replace(b'"version":1', b'"version":9'),
    ):
        beside.write_bytes(content)
        refused(r"before\.fingerprints\.json (is not as it was written|has version 9), expected what `convert` wrote")
    with pytest.raises(BadInput, match="--reuse means nothing for an ONNX model"):
        convert(minimax_fp8.folder, tmp_path / "out", file_format="onnx", reuse=before, **BARE)


@pytest.mark.parametrize("pieces", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_after_a_kill(minimax_fp8: Checkpoint, text: Path, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Of the conversion that was reused, and of the one that reuses; in each the same command goes on."""
    folder, options = text.parent, LANES | {"calibration": text}
    goal = Goal("IQ2_XS", tensor_types=DOWN)
    fresh = convert(minimax_fp8.folder, folder / "fresh.gguf", goal, **options)
    with stopped_after(40, monkeypatch):
        convert(minimax_fp8.folder, folder / "before.gguf", "IQ2_XS", **options)
    before = convert(minimax_fp8.folder, folder / "before.gguf", "IQ2_XS", **options).files[0]
    with stopped_after(pieces, monkeypatch):
        convert(minimax_fp8.folder, folder / "made.gguf", goal, reuse=before, **options)
    made = convert(minimax_fp8.folder, folder / "made.gguf", goal, reuse=before, **options)
    assert made.resumed and made.parity == fresh.parity
    assert made.files[0].read_bytes() == fresh.files[0].read_bytes()
    assert made.reused and made.reused.of - made.reused.tensors == 2


def test_command(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """The output itself may be reused; the line says what was taken, and so does the JSON."""
    output = tmp_path / "model.gguf"
    options = ["convert", str(minimax_fp8.folder), "-o", str(output), "--no-calibration", "--no-verify", "--json"]
    assert CliRunner().invoke(main, options).exit_code == 0
    arguments = [*options, "--tensor-type", "ffn_down_exps=q5_k", "--overwrite", "--reuse", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    count = len(_types(output))
    assert f"{count - 2} of {count} tensors taken from {output}\n" in result.stderr
    assert json.loads(result.stdout)["reused"] == {"file": str(output), "tensors": count - 2, "of": count}
    report = json.loads((tmp_path / "model.report.json").read_text())
    assert None not in [tensor["rounding_error"] for tensor in report["tensors"]]
    exists = CliRunner().invoke(main, [*options, "--reuse", str(output)])
    assert exists.exit_code == 2 and "model.gguf exists: use --overwrite" in exists.stderr
    assert "Checking" not in exists.stderr
    assert "--reuse" in CliRunner().invoke(main, [*options[:-1], "--reuse", str(tmp_path / "none.gguf")]).stderr
    planned = CliRunner().invoke(main, ["plan", str(minimax_fp8.folder), "--reuse", str(output)])
    assert planned.exit_code == 2 and "--reuse takes what was measured for an earlier output" in planned.stderr


def test_shards_of_what_is_taken_are_not_fetched(
    minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    goal = Goal("Q4_K_M", tensor_types=((r"^output\.weight", "Q8_0"),))
    fresh = convert(minimax_fp8.folder, tmp_path / "fresh.gguf", goal, **BARE)
    with HubServer(minimax_fp8.folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        shards = [file.name for file in minimax_fp8.folder.glob("*.safetensors")]
        source = f"{server.endpoint}/tiny/moe"
        before = convert(source, tmp_path / "before.gguf", "Q4_K_M", **BARE).files[0]
        seen = {shard: len(server.bodies(shard)) for shard in shards}
        made = convert(source, tmp_path / "made.gguf", goal, reuse=before, **BARE)
        sent = {shard: sum(request.sent for request in server.bodies(shard)[seen[shard] :]) for shard in shards}
    assert _contents(made.files[0]) == _contents(fresh.files[0])
    fetched = [shard for shard in shards if sent[shard] >= (minimax_fp8.folder / shard).stat().st_size]  # not headers
    assert len(fetched) == 1 < len(shards)


def _contents(file: Path) -> list[bytes]:
    content = file.read_bytes()
    return [content[info.offset : info.offset + info.length] for info in read_gguf(file)[1]]


@pytest.mark.slow
def test_measurements(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size has the same probes: they are not repeated, and the file is the one that they lead to."""
    source, folder = checkpoints.EXAMPLES / "minimax-m2-tiny", text.parent
    options = {"context": 32, "chunks": 2, "calibration": text, "error_feedback": False, "padding": False}
    before = convert(source, folder / "before.gguf", Goal(size=2_500_000), **options).files[0]
    fresh = convert(source, folder / "fresh.gguf", Goal(size=2_700_000), **options)
    calls: list[Sequence[Any]] = []
    measure = moecast.convert.plans.allocate.measure_damage
    monkeypatch.setattr(
        moecast.convert.plans.allocate, "measure_damage", lambda *given: calls.append(given) or measure(*given)
    )
    made = convert(source, folder / "made.gguf", Goal(size=2_700_000), reuse=before, **options)
    assert not calls and made.files[0].read_bytes() == fresh.files[0].read_bytes()
    assert made.reused and 0 < made.reused.tensors < made.reused.of
    kept = sidecar.read_fingerprints(made.files[0])
    assert kept == sidecar.read_fingerprints(fresh.files[0]) and kept.measured
    (folder / "other").write_text(TEXT[1200:2400], encoding="utf-8")
    options["calibration"] = folder / "other"
    convert(source, folder / "other.gguf", Goal(size=2_700_000), reuse=before, **options)
    assert len(calls) == 1
