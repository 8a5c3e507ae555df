"""Stored numbers against torch's own conversions."""

from __future__ import annotations

from pathlib import Path

import torch
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
