"""Parts of stored stacks of matrices against torch's indexing, whole and in pieces, and repacked without rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ggml import dequantize
from moecast.archs.catalogue import Catalogue
from moecast.archs.expressions import Columns, Expression, Padded, Read, Rows, Transposed
from moecast.errors import BadInput
from moecast.sources.checkpoint import read_tensors
from moecast.sources.decode import evaluate
from moecast.sources.read_ahead import stored_rows
from moecast.sources.repack import repack
from moecast.sources.storage import Storage
from safetensors.torch import save_file
from torch import Tensor

FLOATS = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
READ = "floats"


@pytest.fixture
def floats(tmp_path: Path) -> Read:
    save_file({READ: FLOATS}, tmp_path / "model.safetensors")
    return Read(read_tensors(tmp_path)[0])


@pytest.mark.parametrize("rows", [None, (0, 1), (1, 2)])
@pytest.mark.parametrize("expert", [0, 2])
def test_parts_of_stored_stacks(floats: Read, expert: int, rows: tuple[int, int] | None) -> None:
    matrix, part = FLOATS[expert].float(), slice(*rows) if rows else slice(None)
    cases: list[tuple[Expression, Tensor]] = [
        (Rows(floats, 1, 8, 2), matrix[1::2]),
        (Rows(floats, 2, 7, 3), matrix[2:7:3]),
        (Columns(floats, 1, 2), matrix[:, 1::2]),
        (Transposed(floats), matrix.T),
        (Rows(Transposed(floats), 1, 12, 2), matrix.T[1::2]),
        (Transposed(Rows(floats, 0, 8, 2)), matrix[::2].T),
    ]
    storage = Storage()
    for source, expected in cases:
        assert source.shape == (3, *expected.shape)
        found = evaluate(source, storage, expert, rows)
        assert torch.equal(found, expected[part]) and found.is_contiguous()
    storage.close()


def test_what_is_read_is_announced(floats: Read) -> None:
    (announced,) = stored_rows(Rows(floats, 1, 8, 2), 1, (1, 3))
    assert (announced.start, announced.stop) == (8 + 3, 8 + 6)
    (announced,) = stored_rows(Rows(Transposed(floats), 1, 12, 2), 2, (1, 3))
    assert (announced.start, announced.stop) == (16, 24)


@pytest.fixture
def microscaled(tmp_path: Path) -> tuple[Catalogue, Tensor]:
    """A catalogue of a stack [3, 6, 64], and what transformers decodes it to."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 6, 2), dtype=torch.uint8, generator=generator)
    save_file({"up_blocks": blocks, "up_scales": scales}, tmp_path / "model.safetensors")
    return Catalogue(read_tensors(tmp_path), "folder"), convert_moe_packed_tensors(blocks, scales).mT.float()


@pytest.mark.parametrize("rows", [None, (1, 3)])
def test_stacks_of_microscaled_floats_keep_their_codes(
    microscaled: tuple[Catalogue, Tensor], rows: tuple[int, int] | None
) -> None:
    """ggml decodes the blocks to what transformers decodes the source to, of all rows and of every other one."""
    catalogue, expected = microscaled
    whole, storage = catalogue.fused("up_blocks"), Storage()
    part = slice(*rows) if rows else slice(None)
    for source, values in ((whole, expected), (Rows(whole, 1, 6, 2), expected[:, 1::2])):
        for expert in range(3):
            assert torch.equal(evaluate(source, storage, expert, rows), values[expert][part])
            blocks = repack(source, "MXFP4", storage, expert, rows)
            assert blocks is not None and blocks.is_contiguous()
            assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), "MXFP4")), values[expert][part])
    assert catalogue.fused("up_blocks") is whole
    assert repack(Padded(whole, (3, 8, 64)), "MXFP4", storage, 0, None) is None
    storage.close()
    catalogue.finish()


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    stored = {"up_blocks": torch.zeros(3, 6, 2, 16, dtype=torch.uint8), "up_scales": torch.zeros(3, 6, 4).byte()}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"^up_scales .* has shape \[3, 6, 4\], expected \[3, 6, 2\]: one scale"):
        Catalogue(read_tensors(tmp_path), "folder").fused("up_blocks")
    with pytest.raises(BadInput, match="up_scales is missing"):
        Catalogue(read_tensors(tmp_path)[:1], "folder").fused("up_blocks")
