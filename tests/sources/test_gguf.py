"""The GGUF reader: what gguf-py wrote comes back, and no damaged file hangs it or makes it allocate."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_parts import GGUFParts, i32, u16
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moecast.errors import BadInput
from moecast.sources.gguf import read_gguf
from moecast.sources.storage import Storage

MEMORY_BOUND = 4 * 2**20  # the file has a few kilobytes; nothing in it can be worth more than this


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "größe")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.25, 0.5])
    writer.add_array("a.strings", ["x", "", "yz" * 40])
    rng = np.random.default_rng(0)
    writer.add_tensor("one", rng.normal(size=7).astype(np.float32))
    writer.add_tensor("three", rng.normal(size=(2, 3, 64)).astype(np.float16))
    writer.add_tensor("blocks", rng.integers(0, 256, (4, 36), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_gguf_py_wrote(valid: Path) -> None:
    metadata, tensors = read_gguf(valid)
    assert metadata == {
        "general.architecture": "test",
        "a.u32": 7,
        "a.f32": 0.5,
        "a.bool": True,
        "a.string": "größe",
        "a.ints": [1, -2, 3],
        "a.floats": [0.25, 0.5],
        "a.strings": ["x", "", "yz" * 40],
    }
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(valid).tensors}
    assert [(t.name, t.dtype, t.shape) for t in tensors] == [
        ("one", "F32", (7,)),
        ("three", "F16", (2, 3, 64)),
        ("blocks", "Q4_0", (4, 64)),
    ]
    for tensor in tensors:
        stored = Storage().read(tensor).numpy().tobytes()
        assert stored == oracle[tensor.name].data.tobytes()


def _read_within_bounds(path: Path) -> None:
    """Either it reads, or it says in one line why not; never more memory than a small file can be worth."""
    tracemalloc.start()
    try:
        read_gguf(path)
    except BadInput as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY_BOUND


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(valid: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(valid.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.sampled_from((1, 4, 8)))
        content[position : position + size] = data.draw(st.binary(min_size=size, max_size=size))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    _read_within_bounds(damaged)


def test_every_truncation(valid: Path, tmp_path: Path) -> None:
    content = valid.read_bytes()
    short = tmp_path / "short.gguf"
    for length in range(0, len(content) - 32, 7):  # the last tensor is followed by padding
        short.write_bytes(content[:length])
        with pytest.raises(BadInput):
            read_gguf(short)


@pytest.mark.parametrize("position", [8, 16])
@pytest.mark.parametrize("count", [2**31, 2**62, 2**64 - 1])
def test_absurd_counts(valid: Path, tmp_path: Path, position: int, count: int) -> None:
    content = bytearray(valid.read_bytes())
    content[position : position + 8] = struct.pack("<Q", count)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    with pytest.raises(BadInput, match="truncated or corrupt: it ends inside the header"):
        read_gguf(damaged)
    _read_within_bounds(damaged)


@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [(0, b"GGML", "is not a GGUF file"), (4, b"\0\0\0\3", "GGUF version 50331648"), (4, b"\1\0\0\0", "GGUF version 1")],
)
def test_other_files(valid: Path, tmp_path: Path, position: int, replacement: bytes, message: str) -> None:
    content = bytearray(valid.read_bytes())
    content[position : position + 4] = replacement
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_gguf(other)


def test_missing_split(valid: Path, tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"model-00002-of-00002\.gguf is missing, expected 2 splits"):
        read_gguf(path)
    renamed = path.rename(tmp_path / "other.gguf")
    with pytest.raises(BadInput, match=r"is one of 2 splits, expected the first of them"):
        read_gguf(renamed)


def _changed(valid: Path, to: Path, change: Callable[[GGUFParts], None]) -> Path:
    parts = GGUFParts.of(valid.read_bytes())
    assert parts.to_bytes() == valid.read_bytes()
    change(parts)
    to.write_bytes(parts.to_bytes())
    return to


def _place(parts: GGUFParts, number: int, offset: int) -> None:
    parts.tensors[number] = (*parts.tensors[number][:3], offset)


def _resize(parts: GGUFParts, number: int, *sizes: int) -> None:
    name, _, kind, offset = parts.tensors[number]
    parts.tensors[number] = (name, sizes, kind, offset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: _place(p, 1, 0), r"tensor three lies at 0, expected 32"),
        (lambda p: _place(p, 1, 64), r"tensor three lies at 64, expected 32"),
        (lambda p: _place(p, 2, 2**62), r"tensor blocks lies at"),
        (lambda p: _resize(p, 0, 9), r"tensor three lies at 32, expected 64"),
        (lambda p: _resize(p, 2, 64, 5), r"tensor blocks lies outside the file"),
        (lambda p: _resize(p, 2, 48, 4), r"tensor blocks has rows of 48 values, which Q4_0 cannot store"),
        (lambda p: _resize(p, 2, 2**47, 2**47), r"tensor blocks lies outside the file"),
        (lambda p: p.tensors.reverse(), r"tensor blocks lies at 800, expected 0"),
        (lambda p: p.tensors.append((b"x", (1,), 99, 0)), r"model\.gguf: tensor x: unknown tensor type number 99"),
        (lambda p: p.keys.append(p.keys[1]), r"metadata key 'a\.u32' is empty or appears twice"),
        (lambda p: p.keys.append((b"", p.keys[1][1])), r"metadata key '' is empty or appears twice"),
        (lambda p: p.set("general.alignment", i32(48)), r"general\.alignment is 48, expected a power of two"),
        (lambda p: p.set("general.alignment", i32(2**30)), r"general\.alignment is 1073741824, expected a power"),
        (lambda p: p.set("split.count", i32(-1)), r"split\.count is -1, expected a whole number below 100000"),
        (lambda p: p.set("split.count", struct.pack("<If", 6, 2.0)), r"split\.count is 2\.0, expected a whole number"),
    ],
)
def test_parts_that_do_not_fit_together(
    valid: Path, tmp_path: Path, change: Callable[[GGUFParts], None], message: str
) -> None:
    path = _changed(valid, tmp_path / "model.gguf", change)
    with pytest.raises(BadInput, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = tmp_path / "model.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(BadInput, match=r"model\.gguf is a Git LFS pointer, not the file itself"):
        read_gguf(pointer)


def test_headers_are_bounded(valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000)
    many = _changed(valid, tmp_path / "many.gguf", lambda parts: parts.set("a", values))
    with pytest.raises(BadInput, match=r"many\.gguf is truncated or corrupt: it has more than 4000000 values"):
        read_gguf(many)
    monkeypatch.setattr("moecast.sources.gguf._MOST_HEADER_BYTES", 100)
    with pytest.raises(BadInput, match="its header is unreasonably large"):
        read_gguf(valid)


def _split(valid: Path, folder: Path, **keys: tuple[int, int, int]) -> Path:
    """Two parts of a file, whose keys split.* are (number, count, tensors) each."""
    for number, name in enumerate(("first", "second")):

        def change(parts: GGUFParts, number: int = number, name: str = name) -> None:
            parts.tensors = parts.tensors[:2] if number == 0 else parts.tensors[2:]
            parts.data, cut = (parts.data[:800], 0) if number == 0 else (parts.data[800:], 800)
            parts.tensors = [(tensor, sizes, kind, offset - cut) for tensor, sizes, kind, offset in parts.tensors]
            own, count, tensors = keys.get(name, (number, 2, 3))
            parts.set("split.no", u16(own))
            parts.set("split.count", u16(count))
            parts.set("split.tensors.count", i32(tensors))

        _changed(valid, folder / f"model-{number + 1:05d}-of-00002.gguf", change)
    return folder / "model-00001-of-00002.gguf"


def test_parts_of_a_split(valid: Path, tmp_path: Path) -> None:
    metadata, tensors = read_gguf(_split(valid, tmp_path))
    assert metadata["a.u32"] == 7
    whole = read_gguf(valid)[1]
    assert [(t.name, t.dtype, t.shape) for t in tensors] == [(t.name, t.dtype, t.shape) for t in whole]
    for part, tensor in zip(tensors, whole, strict=True):
        assert (Storage().read(part) == Storage().read(tensor)).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"first": (1, 2, 3)}, r"00001-of-00002\.gguf: split\.no is 1, expected 0: its parts are not of one split"),
        ({"second": (0, 2, 3)}, r"00002-of-00002\.gguf: split\.no is 0, expected 1"),
        ({"second": (1, 3, 3)}, r"00002-of-00002\.gguf: split\.count is 3, expected 2"),
        ({"first": (0, 2, 4)}, r"00001-of-00002\.gguf: split\.tensors\.count is 4, expected 3"),
    ],
)
def test_parts_of_different_splits(valid: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_gguf(_split(valid, tmp_path, **keys))


@pytest.mark.parametrize("count", [0, 1])
def test_merged_split_is_a_whole_file(valid: Path, tmp_path: Path, count: int) -> None:
    """`llama-gguf-split --merge` leaves the keys of the split there, with a count of 0."""

    def change(parts: GGUFParts) -> None:
        parts.set("split.count", u16(count))
        parts.set("split.no", u16(0))
        parts.set("split.tensors.count", i32(3))

    merged = _changed(valid, tmp_path / "merged.gguf", change)
    assert [tensor.name for tensor in read_gguf(merged)[1]] == ["one", "three", "blocks"]
