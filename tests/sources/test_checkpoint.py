"""Reading checkpoint folders: decoding is exact, and whatever is wrong is named in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from conftest import Checkpoint
from moecast.archs.encodings import BlockScaled
from moecast.archs.expressions import Read, TensorInfo
from moecast.errors import BadInput, Interrupted
from moecast.sources.checkpoint import read_config, read_tensors
from moecast.sources.decode import evaluate
from moecast.sources.model import open_model
from moecast.sources.storage import Storage
from safetensors.torch import load_file, save_file


def test_tensors_lie_where_the_safetensors_library_finds_them(minimax_odd: Checkpoint) -> None:
    tensors = read_tensors(minimax_odd.folder)
    expected = {}
    for file in minimax_odd.folder.glob("*.safetensors"):
        expected |= load_file(file)
    assert {tensor.name for tensor in tensors} == expected.keys()
    storage = Storage()
    for tensor in tensors:
        stored = storage.read(tensor).view(expected[tensor.name].dtype).view(tensor.shape)
        assert torch.equal(stored.view(torch.uint8), expected[tensor.name].view(torch.uint8))


@pytest.mark.parametrize("rows", [None, (0, 300), (1, 2), (100, 140), (127, 129), (128, 256), (200, 300), (299, 300)])
def test_block_scaled_rows(tmp_path: Path, rows: tuple[int, int] | None) -> None:
    """Blocks cut off at the edges, and row ranges that begin and end inside blocks."""
    torch.manual_seed(0)
    codes, scale = checkpoints.to_fp8_blocks(torch.randn(300, 200))
    save_file({"codes": codes, "scale": scale}, tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in read_tensors(tmp_path)}
    weight = BlockScaled(found["codes"], found["scale"], (128, 128))
    expected = checkpoints.from_fp8_blocks(codes, scale)[slice(*(rows or (0, 300)))]
    assert torch.equal(evaluate(weight, Storage(), None, rows), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 7).to(dtype)
    save_file({"stack": values}, tmp_path / "model.safetensors")
    (tensor,) = read_tensors(tmp_path)
    assert torch.equal(evaluate(Read(tensor), Storage(), 2, (1, 4)), values[2, 1:4].float())


def test_wrong_number_of_scales_is_named() -> None:
    codes = TensorInfo("w.weight", "F8_E4M3", (300, 200), "shard", 0, 60_000)
    scale = TensorInfo("w.weight_scale_inv", "F32", (2, 2), "shard", 0, 16)
    with pytest.raises(BadInput, match=r"w\.weight_scale_inv in shard has shape \[2, 2\], expected \[3, 2\]"):
        BlockScaled(codes, scale, (128, 128))


def test_stray_files_are_not_read(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """Some repositories hold safetensors that the index does not name."""
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    assert "stray" not in {tensor.name for tensor in read_tensors(folder)}


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _truncate(folder: Path) -> None:
    shard = _shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    shard = _shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:50])


def _remove_shard(folder: Path) -> None:
    _shards(folder)[1].unlink()


def _point_outside(folder: Path, target: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = target
    path.write_text(json.dumps(index))


def _swap_shards(folder: Path) -> None:
    first, second, *_ = _shards(folder)
    spare = first.with_suffix(".spare")
    shutil.move(first, spare), shutil.move(second, first), shutil.move(spare, second)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"00001-of-.*\.safetensors is truncated or not a safetensors file"),
        (_cut_header, r"00001-of-.*\.safetensors is truncated or not a safetensors file"),
        (_remove_shard, r"00001-of-.*\.safetensors is missing although model\.safetensors\.index\.json names it"),
        (lambda f: _point_outside(f, "../../etc/passwd"), r"places model\.norm\.weight in '../../etc/passwd'"),
        (lambda f: _point_outside(f, "/etc/passwd"), r"places model\.norm\.weight in '/etc/passwd'"),
        (lambda f: _point_outside(f, "C:model.safetensors"), r"places model\.norm\.weight in 'C:model\.safetensors'"),
        (lambda f: _point_outside(f, "nul.safetensors"), r"expected a file inside the folder"),
        (lambda f: _point_outside(f, "..\\x.safetensors"), r"expected a file inside the folder"),
        (lambda f: _point_outside(f, ""), r"places model\.norm\.weight in ''"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), r"index\.json is not readable JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), r"holds a JSON list, expected an object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"weight_map is missing or empty"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"neither .* is there, expected safetensors"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing, expected a Hugging Face checkpoint"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is UTF-16 text; expected UTF-8"),
        (lambda f: checkpoints.edit_config(f, model_type="llama"), r"model_type is 'llama', expected one of"),
        (lambda f: checkpoints.edit_config(f, hidden_size=250), r"gives shape \[512, 256\], expected \[512, 250\]"),
        (_swap_shards, r"tensor .* is missing although model\.safetensors\.index\.json places it there"),
    ],
)
def test_damage_is_named_in_one_line(minimax_fp8: Checkpoint, tmp_path: Path, damage: object, message: str) -> None:
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    assert callable(damage)
    damage(folder)
    with pytest.raises(BadInput, match=message) as error:
        open_model(folder)
    assert "\n" not in str(error.value)


def test_file_that_shrinks_while_it_is_read(minimax: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    model = open_model(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(BadInput, match=r"ends inside tensor .*truncated"):
        for weight in model.graph.weights():
            model.load(weight, 0 if weight.experts else None)


def test_file_that_the_system_does_not_give(
    minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is kept: the disk or the network may come back."""
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    model = open_model(folder)
    (folder / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(Interrupted, match=r"model\.safetensors cannot be read: No such file or directory; tensor"):
        model.load(model.graph.final_norm.weight)
    (tmp_path / "away").rename(folder / "model.safetensors")

    def failing(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(Interrupted, match=r"model\.safetensors cannot be read: Input/output error; tensor"):
        model.load(model.graph.final_norm.weight)


@pytest.mark.parametrize("name", ["x" * 256, "é" * 200, "a\0b", "a\nb.safetensors", "\x1b[31m"])
def test_names_that_no_system_takes(minimax_fp8: Checkpoint, tmp_path: Path, name: str) -> None:
    """The index is at fault, not a file of that name."""
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    _point_outside(folder, name)
    with pytest.raises(BadInput, match=r"index\.json: weight_map places model\.norm\.weight in '.*', expected a file"):
        read_tensors(folder)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_folder_whose_name_is_no_utf8(minimax: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax.folder, tmp_path / os.fsdecode(b"m\xff"))
    model, expected = open_model(folder), open_model(minimax.folder)
    for weight, other in zip(model.graph.weights(), expected.graph.weights(), strict=True):
        expert = 0 if weight.stack else None
        assert torch.equal(model.load(weight, expert), expected.load(other, expert))


def test_shard_that_git_lfs_did_not_fetch(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax_fp8.folder, tmp_path / "copy")
    shard = _shards(folder)[0]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(BadInput, match=rf"{shard.name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        open_model(folder)


def test_bare_infinity_in_config(minimax: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"limit": Infinity}')
    assert read_config(tmp_path).get("limit") == float("inf")
