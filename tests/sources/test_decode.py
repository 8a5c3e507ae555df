"""Stored numbers against torch's own conversions."""

from __future__ import annotations

from pathlib import Path

import torch
from moecast.archs.catalogue import Catalogue
from moecast.archs.expressions import Read
from moecast.sources.checkpoint import read_tensors
from moecast.sources.decode import evaluate
from moecast.sources.storage import Storage
from safetensors.torch import save_file


def test_every_code_of_e4m3(tmp_path: Path) -> None:
    """To the bit, both zeros included; beside a NaN, the other numbers stay what they are."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    save_file({"codes": codes}, tmp_path / "model.safetensors")
    (tensor,) = read_tensors(tmp_path)
    storage = Storage()
    for rows in ((0, 16), (0, 7), (7, 8), (8, 15), (15, 16)):  # of which 7 and 15 end with a NaN
        found = evaluate(Read(tensor), storage, None, rows)
        expected = codes[slice(*rows)].float()
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    storage.close()


def test_microscaled_e4m3(tmp_path: Path) -> None:
    """A power of two for each 32 columns, the last of which may be fewer, stored as E8M0 or as its bytes."""
    codes = torch.randn(6, 80, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    exponents = torch.arange(100, 118, dtype=torch.uint8).view(6, 3)
    expected = codes.float() * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, dim=1)[:, :80]
    scales = {"bytes.weight_scale": exponents, "typed.scale": exponents.clone().view(torch.float8_e8m0fnu)}
    save_file({"bytes.weight": codes, "typed.weight": codes.clone(), **scales}, tmp_path / "model.safetensors")
    catalogue, storage = Catalogue(read_tensors(tmp_path), "checkpoint"), Storage()
    for module in ("bytes", "typed"):
        source = catalogue.matrix(module)
        assert source.exact == "BF16"
        assert torch.equal(evaluate(source, storage), expected)
        assert torch.equal(evaluate(source, storage, None, (2, 5)), expected[2:5])
    storage.close()
