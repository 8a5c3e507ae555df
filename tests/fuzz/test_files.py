"""Damaged files of every kind: read, or refused in a line; never a traceback, a hang, or a gigabyte.

Each kind is tried a few times in every run and many times in the slow part. A failure names its seed, which gives the
same file again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzzing import EXAMPLES, FAMILIES, Samples, linked, refuses_or_reads
from moecast.archs.expressions import TensorInfo
from moecast.convert.gguf.tokenizer import tokenizer_metadata
from moecast.progress import NoProgress
from moecast.quant.planning.plan_file import plan_like, read_plan_file
from moecast.runner.engines import OnnxModel, read_description
from moecast.runner.texts import chunk_tokens
from moecast.sources.checkpoint import read_tensors
from moecast.sources.gguf import read_gguf
from moecast.sources.imatrix import read_imatrix
from moecast.sources.model import open_model
from moecast.sources.storage import Storage
from moecast.sources.tokenizer_folder import read_tokenizer_folder
from mutations import damaged_bytes, damaged_gguf, damaged_json, re_encoded

FEW, MANY = 15, 400

Attempt = Callable[[Samples, Path, Random], object]
"""Damages a file of `Samples` in an empty folder and reads it."""


def _damage(file: Path, damage: Callable[[bytes, Random], bytes], random: Random) -> Path:
    file.write_bytes(damage(file.read_bytes(), random))
    return file


def _expect_sound(tensors: tuple[TensorInfo, ...]) -> None:
    """What is read of tensors lies in their files, one behind the other."""
    ends: dict[str, int] = {}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset)):
        assert tensor.offset >= ends.get(tensor.file, 0), f"{tensor.name} overlaps another"
        ends[tensor.file] = tensor.offset + tensor.length
    for file, end in ends.items():
        assert end <= Path(file).stat().st_size


def safetensors(samples: Samples, folder: Path, random: Random) -> None:
    copy = folder / "copy"
    copy.mkdir()
    shard = next(samples.checkpoint.glob("*.safetensors")).read_bytes()
    size = int.from_bytes(shard[:8], "little")
    if random.random() < 0.5:
        header = damaged_json(shard[8 : 8 + size], random)
        content = len(header).to_bytes(8, "little") + header + shard[8 + size :]
    else:
        content = damaged_bytes(shard, random, 8 + size)
    (copy / "model.safetensors").write_bytes(content)
    tensors = read_tensors(copy)
    _expect_sound(tensors)
    for tensor in tensors:
        Storage().read(tensor)


def index(samples: Samples, folder: Path, random: Random) -> None:
    name = "model.safetensors.index.json"
    copy = linked(samples.checkpoint, folder, name)
    _damage(copy / name, damaged_json, random)
    _expect_sound(read_tensors(copy))


def configuration(samples: Samples, folder: Path, random: Random) -> None:
    copy = linked(EXAMPLES / random.choice(FAMILIES), folder, "config.json")
    _damage(copy / "config.json", damaged_json, random)
    model = open_model(copy)
    assert model.graph.parameters() > model.graph.active_parameters() > 0


def tokenizer_files(samples: Samples, folder: Path, random: Random) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
    copy = linked(samples.checkpoint, folder, *names)
    if random.random() < 0.1:
        (copy / "special_tokens_map.json").write_bytes(damaged_json(b'{"bos_token": {"content": "a"}}', random))
    _damage(copy / random.choice(names), damaged_json, random)
    tokenizer = read_tokenizer_folder(copy)
    ids = tokenizer.encode("It's a <think> [e~[ 日本 1234\n")
    tokenizer.decode(ids)
    metadata = tokenizer_metadata(tokenizer, 1024, None, "minimax-m2", NoProgress())
    assert len(metadata["tokenizer.ggml.tokens"]) == 1024


def chat_templates(samples: Samples, folder: Path, random: Random) -> None:
    copy = linked(samples.checkpoint, folder, "tokenizer_config.json", "chat_template.jinja")
    config = json.loads((copy / "tokenizer_config.json").read_bytes())
    named = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}]
    config["chat_template"] = random.choice((named, {"default": "A", "rag": "B"}, "A", [], None))
    (copy / "tokenizer_config.json").write_bytes(damaged_json(json.dumps(config).encode(), random))
    if random.random() < 0.5:
        (copy / "chat_template.jinja").unlink()
    else:
        (copy / "chat_template.jinja").write_bytes(re_encoded("{{ größe }}", random))
    if random.random() < 0.3:
        (copy / "chat_template.json").write_bytes(damaged_json(b'{"chat_template": "C"}', random))
    if random.random() < 0.3:
        (copy / "additional_chat_templates").mkdir()
        (copy / "additional_chat_templates" / "tool.jinja").write_bytes(re_encoded("{{ a }}", random))
    tokenizer = read_tokenizer_folder(copy)
    assert all(isinstance(text, str) and text for text in tokenizer.chat_templates.values())
    tokenizer_metadata(tokenizer, 1024, None, "minimax-m2", NoProgress())


def _open_gguf(path: Path) -> None:
    model = open_model(path)
    _expect_sound(model.tensors)
    tokenizer = model.tokenizer
    tokenizer.decode(tokenizer.encode("It's a <think> 日本 1234\n"))


def gguf_bytes(samples: Samples, folder: Path, random: Random) -> None:
    path = folder / "model.gguf"
    path.write_bytes(damaged_bytes(samples.gguf.read_bytes(), random, 40_000))
    _open_gguf(path)


def gguf_values(samples: Samples, folder: Path, random: Random) -> None:
    path = folder / "model.gguf"
    path.write_bytes(damaged_gguf(random.choice(samples.families).read_bytes(), random))
    _open_gguf(path)


def gguf_split(samples: Samples, folder: Path, random: Random) -> None:
    parts = sorted(samples.split.parent.glob("split-*.gguf"))
    for part in parts:
        os.symlink(part, folder / part.name)
    chosen = folder / random.choice(parts).name
    content = chosen.read_bytes()
    chosen.unlink()
    if random.random() < 0.9:
        chosen.write_bytes(
            damaged_gguf(content, random) if random.random() < 0.5 else damaged_bytes(content, random, 400)
        )
    _expect_sound(read_gguf(folder / parts[0].name)[1])


def imatrix(samples: Samples, folder: Path, random: Random) -> None:
    source = random.choice(samples.imatrix)
    content, path = source.read_bytes(), folder / source.name
    values = source.suffix == ".gguf" and random.random() < 0.5
    path.write_bytes(damaged_gguf(content, random) if values else damaged_bytes(content, random, 2000))
    for means in read_imatrix(path).means.values():
        assert means.isfinite().all() and (means >= 0).all()


def plan_file(samples: Samples, folder: Path, random: Random) -> None:
    path = folder / "plan.json"
    path.write_bytes(damaged_json(samples.plan.read_bytes(), random))
    graph = open_model(samples.checkpoint).graph
    assert plan_like(graph, read_plan_file(path)).bytes > 0


def description(samples: Samples, folder: Path, random: Random) -> None:
    copy = folder / "model-onnx"
    copy.mkdir()
    (copy / "moecast.json").write_bytes(damaged_json((samples.onnx / "moecast.json").read_bytes(), random))
    read_description(copy)


def onnx_folder(samples: Samples, folder: Path, random: Random) -> None:
    import torch

    pytest.importorskip("onnxruntime")
    copy = linked(samples.onnx, folder, "moecast.json", "tokenizer.json")
    chosen = random.choice(("moecast.json", "moecast.json", "tokenizer.json", "model.onnx", "model-00001.onnx_data"))
    content = (copy / chosen).read_bytes()
    (copy / chosen).unlink()  # it may be a link
    if chosen.endswith(".json"):
        (copy / chosen).write_bytes(damaged_json(content, random))
    elif random.random() < 0.8:  # only cut off: ONNX Runtime itself does not survive every other damage
        (copy / chosen).write_bytes(content[: random.randrange(len(content))])
    model = OnnxModel(copy)
    tokens = torch.tensor(model.tokenizer.encode("And"))
    logits, _ = model.advance(tokens, model.initial_state())
    assert logits.isfinite().all()


def text(samples: Samples, folder: Path, random: Random) -> None:
    path = folder / "text.txt"
    path.write_bytes(re_encoded("".join(chr(random.randrange(1, 0xD800)) for _ in range(400)), random))
    chunk_tokens(read_tokenizer_folder(samples.checkpoint), path, 16, 2)


KINDS: dict[Attempt, float] = {
    safetensors: 1, index: 1, configuration: 3, tokenizer_files: 1.5, chat_templates: 1, gguf_bytes: 1, gguf_values: 1,
    gguf_split: 1, imatrix: 1, plan_file: 1, description: 1, onnx_folder: 0.25, text: 0.25,
}  # fmt: skip
"""How often each is tried, relative to the others."""


def _try(attempt: Attempt, samples: Samples, tmp_path: Path, seeds: range) -> None:
    read = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            read += refuses_or_reads(lambda folder=folder, seed=seed: attempt(samples, folder, Random(seed)))  # type: ignore[misc]
        except Exception as error:
            raise AssertionError(f"{attempt.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert read < len(seeds), "no damage was noticed"


@pytest.mark.parametrize("attempt", KINDS, ids=lambda attempt: attempt.__name__)
def test_some_damaged_files(attempt: Attempt, samples: Samples, tmp_path: Path) -> None:
    _try(attempt, samples, tmp_path, range(int(FEW * min(KINDS[attempt], 1)) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", KINDS, ids=lambda attempt: attempt.__name__)
def test_many_damaged_files(attempt: Attempt, samples: Samples, tmp_path: Path) -> None:
    _try(attempt, samples, tmp_path, range(1000, 1000 + int(MANY * KINDS[attempt])))
