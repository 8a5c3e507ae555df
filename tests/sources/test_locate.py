"""Layouts of the Hub's cache, ollama and LM Studio, and what is said of names that mean no model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checkpoints import EXAMPLES
from huggingface_hub import constants
from moecast.convert.requantize import requantize
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.sources.hub.access import HubAccess
from moecast.sources.locate import locate, model_name, open_headers, open_source
from moecast.sources.model import Model, open_model

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
HASHED = "sha256-" + "ab" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of owner/Tiny-M2 in the Hub's cache: names are links to contents. The network is off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "models--owner--Tiny-M2"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted((EXAMPLES / "minimax-m2-tiny").iterdir())):
        shutil.copy(file, root / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(os.path.relpath(root / "blobs" / f"{number:064x}", snapshot))
    return root


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moecast.convert import NO_CALIBRATION, convert

    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(EXAMPLES / "minimax-m2-tiny", file, "Q8_0", calibration=NO_CALIBRATION, evaluation=None)
    return file


def _shapes(model: Model) -> list[tuple[str, tuple[int, ...]]]:
    return [(weight.name, weight.shape) for weight in model.graph.weights()]


def test_names_are_those_of_repositories(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache / "snapshots" / COMMIT
    (tmp_path / "my-fine-tune").symlink_to(snapshot)
    assert model_name(snapshot) == model_name(f"{snapshot}/") == model_name(cache) == "Tiny-M2"
    assert model_name(open_model(snapshot)) == "Tiny-M2"
    assert model_name(tmp_path / "my-fine-tune") == "my-fine-tune"
    assert model_name("models--gpt2/snapshots/" + COMMIT) == "gpt2"
    assert model_name(EXAMPLES / "minimax-m2-tiny") == "minimax-m2-tiny"
    monkeypatch.chdir(snapshot)
    assert model_name(".") == "Tiny-M2"


@pytest.mark.parametrize(
    "source", ["owner/Tiny-M2", "hf.co/owner/Tiny-M2", "huggingface.co/owner/Tiny-M2", "models--owner--Tiny-M2"]
)
def test_a_cached_repository_offline(cache: Path, source: str) -> None:
    snapshot = cache / "snapshots" / COMMIT
    found, _ = locate(source, HubAccess(), NoProgress())
    opened = open_source(source, HubAccess(), False, NoProgress())
    assert found.resolve() == opened.model.path.resolve() == snapshot.resolve()
    assert opened.name == "Tiny-M2" and opened.checkpoint is None
    assert _shapes(open_headers(source)) == _shapes(open_model(EXAMPLES / "minimax-m2-tiny"))


def test_a_revision_of_a_cached_folder(cache: Path) -> None:
    (cache / "snapshots" / OLDER).mkdir()
    (cache / "refs" / "old").write_text(OLDER)
    for revision, commit in ((None, COMMIT), ("main", COMMIT), ("old", OLDER), (OLDER, OLDER)):
        assert locate(str(cache), HubAccess(revision), NoProgress())[0].name == commit
    (cache / "refs" / "main").write_text("../../../elsewhere")
    for revision in (None, "v2", "e" * 40, "../main", "..", "/"):
        with pytest.raises(BadInput, match="--revision"):
            locate(str(cache), HubAccess(revision), NoProgress())


def test_a_cache_that_lacks_a_shard_is_named(cache: Path) -> None:
    shard = next(iter((cache / "snapshots" / COMMIT).glob("*.safetensors")))
    shard.resolve().unlink()
    with pytest.raises(BadInput, match=rf"not complete on this machine \({shard.name} is missing\)"):
        open_headers("owner/Tiny-M2")


@pytest.mark.parametrize("name", ["MODEL.GGUF", HASHED, "0" * 64, "model", "link.gguf", "link"])
def test_gguf_files_are_known_by_their_content(gguf: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.startswith("link"):
        shutil.copy(gguf, tmp_path / HASHED)
        file.symlink_to(HASHED)
    else:
        shutil.copy(gguf, file)
    path, provenance = locate(str(file), HubAccess(), NoProgress())
    assert path == file and provenance == {}
    assert _shapes(open_model(path)) == _shapes(open_headers(str(file))) == _shapes(open_model(gguf))
    requantize(path, tmp_path / "out" / "again.gguf", "Q4_0", allow_requantize=True)


@pytest.mark.parametrize("suffix", [".part", ".incomplete", ".crdownload", ".tmp"])
def test_files_in_the_making_are_refused(gguf: Path, tmp_path: Path, suffix: str) -> None:
    shutil.copy(gguf, tmp_path / f"model.gguf{suffix}")
    with pytest.raises(BadInput, match="has not finished"):
        locate(str(tmp_path / f"model.gguf{suffix}"), HubAccess(), NoProgress())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("owner/name:Q4_K_M", "give owner/name and --quant Q4_K_M"),
        ("hf.co/owner/name:IQ2_XXS", "give owner/name and --quant IQ2_XXS"),
        ("https://huggingface.co/owner/name/resolve/main/model.safetensors", "give owner/name"),
        ("https://huggingface.co/owner/name/blob/main/config.json", "give owner/name"),
        ("https://huggingface.co/owner/name/resolve/main/Q4/m.gguf?download=true", "hf download owner/name Q4/m.gguf"),
        ("hf://owner/name/model.GGUF", "hf download owner/name model.GGUF"),
        (f"models--owner--Tiny-M2/snapshots/{COMMIT}/config.json", f"give models--owner--Tiny-M2/snapshots/{COMMIT}"),
        ("x" * 5000, "neither a folder"),
        ("a\0b", "neither a folder"),
    ],
)  # fmt: skip
def test_what_means_no_model_says_what_would(cache: Path, source: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        locate(source, HubAccess(), NoProgress())
    assert said in str(caught.value) and "\n" not in str(caught.value)
