"""Importance matrices that llama-imatrix wrote, in both of its forms (a random one-layer model, 16 tokens)."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_parts import GGUFParts, i32, string
from moecast.errors import BadInput
from moecast.sources.imatrix import read_imatrix

DATA = Path(__file__).parent.parent / "data" / "imatrix"
EXPERTS = "blk.0.ffn_down_exps.weight"


def test_gguf_form_equals_what_gguf_py_reads() -> None:
    matrix = read_imatrix(DATA / "im.gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(DATA / "im.gguf").tensors}
    counts = stored[f"{EXPERTS}.counts"].reshape(32, 1)
    assert counts.min() == 0 < counts.max()  # with so little text some experts were never reached
    expected = stored[f"{EXPERTS}.in_sum2"].reshape(32, 64) / np.maximum(counts, 1)
    found = matrix.of(EXPERTS, 64, 32)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert (matrix.chunks, matrix.datasets) == (1, ("t.txt",))
    assert {name.removesuffix(".counts") for name in stored if name.endswith(".counts")} == matrix.means.keys()


def test_both_forms_agree() -> None:
    """The older form says 1 for every column of an expert that was not reached; the newer one says nothing."""
    newer, older = read_imatrix(DATA / "im.gguf"), read_imatrix(DATA / "im.dat")
    assert newer.means.keys() == older.means.keys()
    for name, means in newer.means.items():
        reached = means != 0
        torch.testing.assert_close(older.means[name][reached], means[reached])
        assert (older.means[name][~reached] == 1).all()


def test_matrix_of_groups_takes_their_mean() -> None:
    matrix = read_imatrix(DATA / "im.gguf")
    whole = matrix.of("blk.0.attn_output.weight", 128)
    halves = matrix.of("blk.0.attn_output.weight", 64)
    assert whole is not None and halves is not None
    torch.testing.assert_close(halves[0], (whole[0, :64] + whole[0, 64:]) / 2)
    assert matrix.of("token_embd.weight", 64) is None


def test_another_models_matrix_is_refused() -> None:
    with pytest.raises(BadInput, match=r"im\.gguf: blk\.0\.ffn_down_exps\.weight has 2048 values, expected 32 x 96"):
        read_imatrix(DATA / "im.gguf").of(EXPERTS, 96, 32)


@pytest.mark.parametrize("form", ["im.gguf", "im.dat"])
@pytest.mark.parametrize("length", [0, 3, 4, 40, 900, 5000])
def test_cut_files_are_refused(tmp_path: Path, form: str, length: int) -> None:
    cut = tmp_path / form
    cut.write_bytes((DATA / form).read_bytes()[:length])
    with pytest.raises(BadInput, match=form):
        read_imatrix(cut)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "test")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"general\.type is None, expected 'imatrix'"):
        read_imatrix(file)
    with pytest.raises(BadInput, match=r"none\.dat cannot be read"):
        read_imatrix(tmp_path / "none.dat")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii2f", 1, 2, 1.0, float("nan"))
    file = tmp_path / "nan.dat"
    file.write_bytes(struct.pack("<i", 1) + entry)
    with pytest.raises(BadInput, match=r"blk\.0\.attn_q\.weight holds values that are negative or not finite"):
        read_imatrix(file)


def _entry(name: bytes = b"blk.0.attn_q.weight", calls: int = 1, values: tuple[float, ...] = (1.0, 2.0)) -> bytes:
    return struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name, calls, len(values), *values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<i", 0), "neither an imatrix GGUF nor a whole imatrix.dat"),
        (struct.pack("<i", -1) + _entry(), "neither an imatrix GGUF nor a whole imatrix.dat"),
        (struct.pack("<i", 2**31 - 1) + _entry(), "neither an imatrix GGUF nor a whole imatrix.dat"),
        (struct.pack("<i", 2) + _entry() * 2, r"'blk\.0\.attn_q\.weight' is there twice"),
        (struct.pack("<i", 1) + _entry(calls=-5), "has -5 calls"),
        (struct.pack("<i", 1) + _entry(values=()), "0 values"),
        (struct.pack("<i", 1) + _entry(values=(-1.0,)), "negative or not finite"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_damaged_older_form(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "im.dat"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        read_imatrix(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("key", "stored", "message"),
    [
        ("imatrix.datasets", i32(7), r"imatrix\.datasets is 7, expected names"),
        ("imatrix.chunk_count", i32(-1), r"imatrix\.chunk_count is -1, expected a number"),
        ("imatrix.chunk_count", struct.pack("<I", 8) + string(b"x"), r"imatrix\.chunk_count is 'x', expected a number"),
    ],
)
def test_keys_of_other_types(tmp_path: Path, key: str, stored: bytes, message: str) -> None:
    parts = GGUFParts.of((DATA / "im.gguf").read_bytes())
    parts.set(key, stored)
    file = tmp_path / "im.gguf"
    file.write_bytes(parts.to_bytes())
    with pytest.raises(BadInput, match=message):
        read_imatrix(file)


def test_counts_that_are_no_counts(tmp_path: Path) -> None:
    parts = GGUFParts.of((DATA / "im.gguf").read_bytes())
    offset = next(offset for name, _, _, offset in parts.tensors if name.endswith(b".counts"))
    for count in (float("nan"), float("inf"), -1.0):
        parts.data = parts.data[:offset] + struct.pack("<f", count) + parts.data[offset + 4 :]
        (tmp_path / "im.gguf").write_bytes(parts.to_bytes())
        with pytest.raises(BadInput, match="holds counts that are negative or not finite"):
            read_imatrix(tmp_path / "im.gguf")
