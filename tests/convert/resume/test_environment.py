"""What stops a conversion and is no fault of its input keeps what was done, wherever it comes through; and records
that somebody has written by hand remove nothing of anybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import deepseek_checkpoints
import pytest
import torch
from conftest import Checkpoint
from conversions import convert
from moecast.archs.expressions import TensorInfo
from moecast.convert.resume import journal
from moecast.convert.resume.journal import Journal
from moecast.convert.resume.records import Spent, entry, sealed
from moecast.errors import BadInput, Interrupted, MoecastError
from moecast.progress import NoProgress
from moecast.sources.storage import Storage

FINGERPRINT = {"source": "this", "quant": "Q4_K_M"}
SHORT = {"file": checkpoints.TEXT, "context": 64, "chunks": 2}


def _counted(monkeypatch: pytest.MonkeyPatch, last: int | None) -> list[int]:
    """Count what is read of weights; from the `last` on the connection is lost."""
    read, count = Storage.read, [0]

    def counting(self: Storage, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        count[0] += 1
        if last is not None and count[0] >= last:
            raise Interrupted("the connection is lost")
        return read(self, tensor, start, stop)

    monkeypatch.setattr(Storage, "read", counting)
    return count


def _text(folder: Path, length: int, times: int = 1) -> Path:
    """The beginning of a text, over and over, which reaches few experts."""
    file = folder / f"{length}.txt"
    file.write_text(checkpoints.TEXT.read_text(encoding="utf-8")[:length] * times, encoding="utf-8")
    return file


@pytest.fixture(params=["alone", "compared", "calibrated", "starved", "draft"])
def conversion(request: pytest.FixtureRequest, minimax_fp8: Checkpoint, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A source and options, by who it is that reads: the encoder, streams, experts that no token reached, a draft."""
    if request.param == "draft":
        source = tmp_path / "source"
        deepseek_checkpoints.save_deepseek_hub(source, deepseek_checkpoints.deepseek_model())
        deepseek_checkpoints.add_draft(source)
        return source, {"quant": "Q8_0", "calibration": None, "verify": False, "mtp": True}
    options: dict[str, Any] = {
        "alone": {"quant": "Q8_0", "calibration": None, "verify": False},
        "compared": {"quant": "Q8_0", "calibration": None, **SHORT},
        "calibrated": {"quant": "Q4_K_M", "calibration": _text(tmp_path, 1200), **SHORT},
        "starved": {"quant": "Q4_K_M", "calibration": _text(tmp_path, 12, times=6), "verify": False, "context": 4},
    }
    return minimax_fp8.folder, options[request.param]


@pytest.mark.parametrize("share", [0.5, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.8, 0.99))])
def test_a_lost_connection_keeps_what_was_done(
    conversion: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(journal, "BATCH_SECONDS", 0.0)
    source, options = conversion
    with monkeypatch.context() as patch:
        reads = _counted(patch, None)
        expected = [file.read_bytes() for file in convert(source, tmp_path / "a" / "model.gguf", **options).files]
    with monkeypatch.context() as patch:
        _counted(patch, int(share * reads[0]))
        with pytest.raises(Interrupted, match="the connection is lost"):
            convert(source, tmp_path / "b" / "model.gguf", **options)
    assert (tmp_path / "b" / ".model.gguf.journal").is_dir()
    assert len((tmp_path / "b" / ".model.gguf.journal" / "records").read_bytes().splitlines()) > 2
    again = _counted(monkeypatch, None)
    assert [file.read_bytes() for file in convert(source, tmp_path / "b" / "model.gguf", **options).files] == expected
    assert again[0] < reads[0] or share == 0.5  # streams read all of the layer in flight, the first, once more
    assert not [file for file in (tmp_path / "b").iterdir() if file.name.startswith(".")]


def test_interrupted_is_no_bad_input() -> None:
    """Whoever explains bad input on its way cannot take the one for the other."""
    assert not issubclass(Interrupted, BadInput) and not issubclass(Interrupted, ValueError | OSError)
    assert issubclass(Interrupted, MoecastError) and issubclass(BadInput, MoecastError)


@pytest.mark.parametrize(
    "name",
    [
        "../victim", "../../victim", "{}/victim", "victim", "a/../../victim", "..", ".", "", "../.victim.part",
        "{}/.victim.part", "a/../../.victim.part", 7, None, True, ["victim"], {"a": 1}, "records", "out/victim",
    ],
)  # fmt: skip
def test_records_name_files_in_the_making_alone(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "folder"
    (folder / ".out.journal").mkdir(parents=True)
    (folder / "out").mkdir()
    victims = [tmp_path / "victim", tmp_path / ".victim.part", folder / "victim", folder / "out" / "victim"]
    for victim in victims:
        victim.write_bytes(b"x")
    name = name.format(tmp_path) if isinstance(name, str) else name
    records = folder / ".out.journal" / "records"
    for fingerprint in (FINGERPRINT, FINGERPRINT | {"quant": "Q8_0"}):
        records.parent.mkdir(exist_ok=True)
        records.write_bytes(_record([["out", "a weight", 0]], [["started", name]], [["saved", name, 1, 0]]))
        with Journal(folder / "out", fingerprint, overwrite=True) as record:
            assert list(record.done("started")) == [] and record.bytes_on_disk >= 0
            assert not isinstance(name, str) or not record.holds(name)
        assert all(victim.read_bytes() == b"x" for victim in victims)


@pytest.mark.parametrize(
    "keys",
    [
        [[]], [7], [[{"a": 1}]], [["started"]], [["started", ".a.part", 1]], [[[1]]], {"a": 1}, None,
        [["saved", "a"]], [["saved", "../a", 1, 1]], [["saved", "a", "1", 1]],
    ],
)  # fmt: skip
def test_lines_of_no_meaning_say_nothing(tmp_path: Path, keys: Any) -> None:
    """Even where their checksums are right; lines around them count."""
    (tmp_path / ".out.journal").mkdir()
    content = _record([["out", "first", 0]], keys, [["out", "second", 0]])
    (tmp_path / ".out.journal" / "records").write_bytes(content)
    with Journal(tmp_path / "out", FINGERPRINT) as record:
        assert ("out", "first", 0) in record and ("out", "second", 0) in record
        assert {key for kind in ("started", "saved") for key in record.done(kind)} == set()


def _record(*lines: Any) -> bytes:
    """The content of a record with such keys in its lines."""
    header = sealed({"fingerprint": FINGERPRINT, "version": "1"})
    return header + b"".join(sealed(entry(keys, Spent()), int(header[:8], 16)) for keys in lines)


def test_an_output_may_be_called_as_its_system_allows(tmp_path: Path) -> None:
    part = tmp_path / ".llama3:8b 'x'.gguf.part"
    part.write_bytes(b"x")
    with pytest.raises(Interrupted), Journal(tmp_path / "llama3:8b 'x'.gguf", FINGERPRINT) as record:
        record.start(part)
        record.add(("out", "first", 0))
        raise Interrupted("the disk is full")
    with Journal(tmp_path / "llama3:8b 'x'.gguf", FINGERPRINT) as record:
        assert list(record.done("started")) == [("started", part.name)]
    assert not part.exists()


def test_the_short_text_leaves_experts_out(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """So the encoder asks for some when the streams are done, in the conversions above."""
    lines: list[str] = []

    class Notes(NoProgress):
        def note(self, line: str) -> None:
            lines.append(line)

    options = {"calibration": _text(tmp_path, 12, times=6), "verify": False, "context": 4, "progress": Notes()}
    convert(minimax_fp8.folder, tmp_path / "model.gguf", "Q4_K_M", **options)
    seen = [line for line in lines if "experts seen" in line]
    assert seen and not any("16 of 16 experts seen" in line for line in seen)
