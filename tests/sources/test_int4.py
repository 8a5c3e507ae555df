"""Whole numbers of 4 bits against numbers that were packed one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ggml import dequantize
from int4_packs import pack
from moecast.archs.catalogue import Catalogue
from moecast.archs.encodings import Int4, Packing
from moecast.archs.rearranged import ColumnRuns, RowRuns
from moecast.errors import BadInput
from moecast.sources.checkpoint import read_tensors
from moecast.sources.decode import evaluate
from moecast.sources.read_ahead import stored_rows
from moecast.sources.repack import repack
from moecast.sources.storage import Storage
from safetensors.torch import save_file
from torch import Tensor

STYLES = {
    "gptq": Packing.GPTQ, "gptq symmetric": Packing.GPTQ, "gptq order": Packing.GPTQ, "gptq v2": Packing.GPTQ_V2,
    "awq": Packing.AWQ, "awq symmetric": Packing.AWQ, "compressed": None, "compressed symmetric": None,
    "compressed order": None, "compressed symmetric order": None,
}  # fmt: skip
MATRIX = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


def catalogue(tensors: dict[str, Tensor], folder: Path, packing: Packing | None, uniform: bool = False) -> Catalogue:
    save_file({f"module.{ending}": tensor for ending, tensor in tensors.items()}, folder / "model.safetensors")
    return Catalogue(read_tensors(folder), "folder", packing=packing, uniform=uniform)


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("style", STYLES)
def test_every_number_is_the_one_that_was_packed(style: str, group: int, tmp_path: Path) -> None:
    packed = pack(MATRIX, style, group)
    assert "symmetric" not in style or float((packed.values - MATRIX).abs().max()) < 0.3
    found = catalogue(packed.tensors, tmp_path, STYLES[style])
    source, storage = found.matrix("module"), Storage()
    assert isinstance(source, Int4) and source.shape == (24, 64)
    zeros = 0 if style.startswith("compressed symmetric") else 4
    assert source.bits == 4 + (16 + zeros) / group
    for rows in (None, (0, 5), (7, 24), (8, 16)):
        values = evaluate(source, storage, None, rows)
        assert torch.equal(values, packed.values[slice(*rows) if rows else slice(None)]) and values.is_contiguous()
    storage.close()
    assert found.finish() == ()


@pytest.mark.parametrize("rows", [None, (0, 5), (8, 16)])
@pytest.mark.parametrize("style", [style for style in STYLES if not style.startswith("awq")])
def test_blocks_of_q4_0_hold_what_has_their_form(style: str, rows: tuple[int, int] | None, tmp_path: Path) -> None:
    """ggml decodes them to the same numbers. A configuration that says it wrongly makes nothing wrong."""
    packed, uniform = pack(MATRIX, style, 32), "symmetric" in style and "order" not in style
    found = catalogue(packed.tensors, tmp_path, STYLES[style], uniform=True)
    source, storage = found.matrix("module"), Storage()
    assert source.exact == ("Q4_0" if uniform or style.startswith("gptq") else None)
    blocks = repack(source, "Q4_0", storage, None, rows)
    assert (blocks is not None) == uniform
    if blocks is not None:
        expected = packed.values[slice(*rows) if rows else slice(None)]
        assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), "Q4_0")), expected)
    storage.close()


def test_blocks_move_with_runs_of_rows_and_columns(tmp_path: Path) -> None:
    """Columns only as long as no run cuts a block."""
    packed = pack(MATRIX, "gptq symmetric", 32)
    source = catalogue(packed.tensors, tmp_path, Packing.GPTQ, uniform=True).matrix("module")
    storage = Storage()
    moved = RowRuns(source, ((20, 24), (0, 20)))
    for rows in (None, (2, 7)):
        blocks = repack(moved, "Q4_0", storage, None, rows)
        assert blocks is not None
        assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), "Q4_0")), evaluate(moved, storage, None, rows))
    swapped = ColumnRuns(source, ((32, 64), (0, 32)))
    blocks = repack(swapped, "Q4_0", storage, None, (3, 9))
    assert blocks is not None
    assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), "Q4_0")), packed.values[3:9].roll(32, 1))
    assert repack(ColumnRuns(source, ((16, 64), (0, 16))), "Q4_0", storage, None, None) is None
    storage.close()


def test_what_blocks_of_q4_0_do_not_hold(tmp_path: Path) -> None:
    """Groups of another size, and scales that float16 rounds."""
    (tmp_path / "a").mkdir()
    source = catalogue(pack(MATRIX, "compressed symmetric", 16).tensors, tmp_path / "a", None).matrix("module")
    assert source.exact is None
    packed, storage = pack(1e-6 * MATRIX, "compressed symmetric", 32), Storage()
    source = catalogue(packed.tensors, tmp_path, None).matrix("module")
    assert repack(source, "Q4_0", storage, None, None) is None
    assert torch.equal(evaluate(source, storage), packed.values)
    storage.close()


def test_zeros_of_0_borrow_from_the_next_as_gptqmodel_stores_them(tmp_path: Path) -> None:
    """It takes 0x11111111 from whole words, and adds it when it loads them."""
    second = pack(MATRIX, "gptq v2", 16).tensors
    second["qzeros"] = torch.tensor([[0, 0x10, -16]] * 4, dtype=torch.int32)
    first = second | {"qzeros": second["qzeros"] - 0x11111111}
    found, storage = [], Storage()
    for folder, tensors, packing in (("1", first, Packing.GPTQ), ("2", second, Packing.GPTQ_V2)):
        (tmp_path / folder).mkdir()
        found.append(evaluate(catalogue(tensors, tmp_path / folder, packing).matrix("module"), storage))
    assert torch.equal(*found)
    storage.close()


@pytest.mark.parametrize("number", [-1, 0])
def test_columns_without_an_order_say_one_number(number: int, tmp_path: Path) -> None:
    """As a group for all it would leave the others without columns."""
    packed = pack(MATRIX, "compressed", 16)
    tensors = packed.tensors | {"weight_g_idx": torch.full((64,), number, dtype=torch.int32)}
    source, storage = catalogue(tensors, tmp_path, None).matrix("module"), Storage()
    assert torch.equal(evaluate(source, storage), packed.values)
    storage.close()


def test_groups_of_several_sizes_need_an_order(tmp_path: Path) -> None:
    """80 columns in groups of 32: the last has half as many."""
    packed = pack(torch.cat([MATRIX, MATRIX[:, :16], torch.zeros(24, 16)], 1), "gptq", 32)
    tensors = {"qweight": packed.tensors["qweight"][:10].clone(), "g_idx": packed.tensors["g_idx"][:80].clone()}
    source, storage = catalogue(packed.tensors | tensors, tmp_path, Packing.GPTQ).matrix("module"), Storage()
    assert torch.equal(evaluate(source, storage), packed.values[:, :80])
    (tmp_path / "b").mkdir()
    tensors["g_idx"].fill_(-1)
    source = catalogue(packed.tensors | tensors, tmp_path / "b", Packing.GPTQ).matrix("module")
    with pytest.raises(BadInput, match=r"^module\.g_idx in .* says nothing of 80 columns in 3 groups, expected"):
        evaluate(source, storage)
    storage.close()


@pytest.mark.parametrize("style", ["gptq", "awq"])
def test_zeros_are_not_made_up(style: str, tmp_path: Path) -> None:
    tensors = pack(MATRIX, style, 16).tensors
    del tensors["qzeros"]
    with pytest.raises(BadInput, match=r"module\.qzeros is missing"):
        catalogue(tensors, tmp_path, STYLES[style]).matrix("module")


@pytest.mark.parametrize("number", [-1, 4, 2**30])
def test_groups_that_are_not_there_are_named(number: int, tmp_path: Path) -> None:
    tensors = pack(MATRIX, "gptq", 16).tensors
    tensors["g_idx"][5] = number
    source, storage = catalogue(tensors, tmp_path, Packing.GPTQ).matrix("module"), Storage()
    with pytest.raises(BadInput, match=rf"^module\.g_idx in .* holds {number}, expected numbers of 4 groups: .*fetch"):
        evaluate(source, storage)
    storage.close()


@pytest.mark.parametrize(
    ("style", "ending", "shape"),
    [
        ("gptq", "scales", (4, 16)), ("gptq", "scales", (5, 24)), ("gptq", "qzeros", (4, 6)), ("gptq", "g_idx", (32,)),
        ("gptq", "qweight", (16, 24)), ("awq", "qweight", (64, 6)), ("awq", "scales", (3, 24)),
        ("compressed", "weight_scale", (24, 5)), ("compressed", "weight_zero_point", (6, 4)),
        ("compressed", "weight_packed", (24, 16)),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(style: str, ending: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """So are numbers of 8 bits, of which a word holds four; in compressed-tensors the matrix is then twice as wide."""
    tensors = pack(MATRIX, style, 16).tensors
    tensors[ending] = torch.zeros(shape, dtype=tensors[ending].dtype)
    found = catalogue(tensors, tmp_path, STYLES[style])
    if ending == "weight_packed":
        assert found.matrix("module").shape == (24, 128)
        return
    with pytest.raises(BadInput, match=r"^module\.\w+ in .* has shape \[.*\], expected .* words of eight") as error:
        found.matrix("module")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_read_is_announced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = catalogue(pack(MATRIX, "compressed", 16).tensors, tmp_path / "a", None).matrix("module")
    announced = [(rows.tensor.name, rows.start, rows.stop) for rows in stored_rows(source, None, (8, 16))]
    assert announced == [("module.weight_packed", 8, 16), ("module.weight_scale", 8, 16)]
    source = catalogue(pack(MATRIX, "awq", 16).tensors, tmp_path, Packing.AWQ).matrix("module")
    assert {rows.tensor.name for rows in stored_rows(source, None, None)} == {
        "module.qweight", "module.scales", "module.qzeros",
    }  # fmt: skip
