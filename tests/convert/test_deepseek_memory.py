"""A layer of Flash's real shape, 256 experts of 2048x4096 in FP4, converts and compares in less than 2 GB."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import real_deepseek
import real_models
from moecast.archs.config import Config

VOCABULARY = 512


def _write(folder: Path) -> Path:
    """One overlapping layer of zeros; the file is sparse, so that it takes no room on disk."""
    model = replace(real_deepseek.FLASH, ratios=(4,), hash_layers=0, drafts=0, vocabulary=VOCABULARY)
    header: dict[str, object] = {}
    offset = 0
    for name, shape, dtype in model.tensors():
        length = real_deepseek.DTYPE_BYTES[dtype]
        for size in shape:
            length *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(file.tell() + offset)
    config: Config = real_models.config("deepseek-v4-flash")
    keys = json.loads((real_models.DATA / config.origin).read_text())
    changed = {"num_hidden_layers": 1, "compress_ratios": [4], "num_hash_layers": 0, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(keys | changed))
    checkpoints.write_tokenizer(folder, VOCABULARY)
    return folder


@pytest.mark.slow
def test_peak_memory_of_a_real_layer(tmp_path: Path) -> None:
    folder = _write(tmp_path / "layer")
    command = [sys.executable, "-m", "moecast.cli", "convert", str(folder), "-o", str(tmp_path), "--quant", "native"]
    options = ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "1", "--json"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    converted = json.loads(result.stdout)
    assert converted["bytes"] > 3.4e9
    assert converted["peak_rss_bytes"] < 2e9
    assert converted["parity"]["mean_kld"] == 0
    (file,) = tmp_path.glob("*.gguf")
    file.unlink()
