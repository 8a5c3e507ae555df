"""Packed copies beside the weights: the same results, from the file."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from checkpoints import EXAMPLES
from click.testing import CliRunner
from moecast.cli import main
from moecast.convert.onnx.prepack import prepack
from moecast.errors import BadInput
from moecast.progress import NoProgress
from onnx_models import cast, onnx_logits


def _copies(folder: Path) -> dict[str, list[str]]:
    """The copies of every weight, as `<offset>;<length>;<checksum>`."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    entries = {t.name: [e.value for e in t.external_data if "prepacked" in e.key] for t in model.graph.initializer}
    return {name: [part for value in values for part in value.split("|")[1:]] for name, values in entries.items()}


@pytest.mark.parametrize("name", ["minimax-m2-tiny", "nemotron-3-tiny", "deepseek-v4-tiny"])
def test_copies_change_no_result(name: str, tmp_path: Path) -> None:
    made = cast(EXAMPLES / name, tmp_path, activations="int8")
    tokens = torch.arange(40)
    before = onnx_logits(made.engine(), tokens)
    called = CliRunner().invoke(main, ["prepack", str(made.folder), "--json"])
    assert called.exit_code == 0, (called.exception, called.output)
    size = json.loads(called.stdout)["bytes"]
    assert torch.equal(onnx_logits(made.engine(), tokens), before)
    assert torch.equal(onnx_logits(made.engine(low_memory=True), tokens), before)
    copies = _copies(made.folder)
    multiplied = {name for name in copies if ".numbers" in name and not name.startswith("token_embd")}
    assert len(multiplied) > 10 and all(copies[name] for name in multiplied)
    lengths = [int(part.split(";")[1]) for parts in copies.values() for part in parts]
    offsets = [int(part.split(";")[0]) for parts in copies.values() for part in parts]
    assert sum(lengths) == size and min(offsets) >= made.plan.bytes and all(offset % 4096 == 0 for offset in offsets)


def test_again_replaces_the_copies(tmp_path: Path) -> None:
    made = cast(EXAMPLES / "minimax-m2-tiny", tmp_path)
    first = prepack(made.folder, NoProgress())
    files = {file.name: file.read_bytes() for file in made.folder.iterdir()}
    assert prepack(made.folder, NoProgress()) == first
    assert {file.name: file.read_bytes() for file in made.folder.iterdir()} == files


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"moecast\.json cannot be read"):
        prepack(EXAMPLES / "minimax-m2-tiny", NoProgress())
