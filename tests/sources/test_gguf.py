"""The GGUF reader: what gguf-py wrote comes back, and no damaged file hangs it or makes it allocate."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
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


@pytest.mark.parametrize("shift", [-32, 32])
def test_tensors_lie_one_behind_the_other(valid: Path, tmp_path: Path, shift: int) -> None:
    """Overlapping tensors would be other numbers than the file's author meant."""
    content = bytearray(valid.read_bytes())
    header = content.index(b"three") + len("three")
    position = header + 4 + 3 * 8 + 4  # behind dimensions, sizes and type
    (offset,) = struct.unpack_from("<Q", content, position)
    struct.pack_into("<Q", content, position, offset + shift)
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    with pytest.raises(BadInput, match=r"tensor (three|blocks) lies .* not behind the one before it"):
        read_gguf(other)


@pytest.mark.parametrize(("number", "count"), [(0, 2), (1, 3), (None, None)])
def test_splits_agree(tmp_path: Path, number: int | None, count: int | None) -> None:
    for part, told in ((1, (0, 2)), (2, (number, count))):
        writer = gguf.GGUFWriter(tmp_path / f"model-0000{part}-of-00002.gguf", "test")
        for key, value in zip(("split.no", "split.count"), told, strict=True):
            if value is not None:
                writer.add_uint16(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
    with pytest.raises(BadInput, match=rf"00002-of-00002.* says it is split {number} of {count}, expected 1 of 2"):
        read_gguf(tmp_path / "model-00001-of-00002.gguf")
