"""Packed copies beside the weights: the same results, from the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
from moecast.runner.engines import OnnxModel
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
    with pytest.raises(BadInput, match=r"moecast\.json is missing"):
        prepack(EXAMPLES / "minimax-m2-tiny", NoProgress())


# --- places outside -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was prepacked once."""
    folder = cast(EXAMPLES / "minimax-m2-tiny", tmp_path_factory.mktemp("packed")).folder
    prepack(folder, NoProgress())
    return folder


def _placed(folder: Path, **values: str) -> None:
    """Let the model say other things of where its first external tensor lies."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("act", [lambda folder: prepack(folder, NoProgress()), OnnxModel], ids=["prepack", "run"])
@pytest.mark.parametrize(
    "place",
    [
        {"location": "../victim"}, {"location": "{}/victim"}, {"location": "a/../../victim"},
        {"location": "..\\victim"}, {"location": ""}, {"location": "."}, {"location": "absent"}, {"location": "pipe"},
        {"offset": "-4096"}, {"length": "x"}, {"length": "9" * 30}, {"offset": "0x10"},
    ],
)  # fmt: skip
def test_external_data_lie_in_the_folder(
    packed: Path, tmp_path: Path, place: dict[str, str], act: Callable[[Path], object]
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    (tmp_path / "victim").write_bytes(b"precious" * 100_000)
    if hasattr(os, "mkfifo"):  # whoever opens it waits
        os.mkfifo(folder / "pipe")
    _placed(folder, **{key: value.format(tmp_path) for key, value in place.items()})
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(BadInput, match=r"model\.onnx"):
        act(folder)
    assert (tmp_path / "victim").read_bytes() == b"precious" * 100_000
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("place", [{"offset": str(1 << 40)}, {"length": str(1 << 59)}])
def test_files_are_never_extended(packed: Path, tmp_path: Path, place: dict[str, str]) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    _placed(folder, **place)
    before = {file: file.stat().st_size for file in folder.iterdir()}
    with pytest.raises(BadInput, match="beyond its end"):
        prepack(folder, NoProgress())
    assert {file: file.stat().st_size for file in folder.iterdir()} == before


def test_links_are_not_followed(packed: Path, tmp_path: Path) -> None:
    """As in the Hub's cache, where the file belongs to others too."""
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    (data,) = folder.glob("*.onnx_data")
    victim = data.rename(tmp_path / "blob")
    data.symlink_to(victim)
    content = victim.read_bytes()
    with pytest.raises(BadInput, match="is a link to another place"):
        prepack(folder, NoProgress())
    assert victim.read_bytes() == content


# --- kills --------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from moecast.convert.onnx import prepack
from moecast.progress import NoProgress
left = int(sys.argv[2])
def dying(function):
    def call(*arguments, **options):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return function(*arguments, **options)
    return call
for owner, name in ((os, "replace"), (os, "truncate"), (prepack, "sync")):
    setattr(owner, name, dying(getattr(owner, name)))
prepack.prepack(Path(sys.argv[1]), NoProgress())
"""


@pytest.mark.parametrize(
    "step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 2, 3, 4, 5, 6, 9, 14))]
)
def test_killed_at_any_step_the_model_loads(packed: Path, tmp_path: Path, step: int) -> None:
    """The second run, which replaces copies; whatever it was stopped at, the results are the same, and it can be run
    again to the same files."""
    tokens = torch.arange(40)
    expected = onnx_logits(OnnxModel(packed), tokens)
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(step)], check=False, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    assert torch.equal(onnx_logits(OnnxModel(folder), tokens), expected)
    prepack(folder, NoProgress())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in packed.iterdir()
    }
