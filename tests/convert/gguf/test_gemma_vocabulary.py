"""A vocabulary as Gemma has it, of characters with bytes to fall back to: llama.cpp makes the same ids of a text."""

from __future__ import annotations

import json
from pathlib import Path

import gemma4_checkpoints as gemma
import gguf
import pytest
import vocabularies
from checkpoints import TEXT
from conversions import convert
from llama import Engine
from moecast.runner.measure.tokenization import PROBE
from moecast.sources.model import open_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROWS = 1024
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
TEXTS = [
    *PROBE.values(),
    *vocabularies.LINES,
    *TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:40],
    " a\n\n\n\nb  c    d\n\u2581e",
    "<table>\n<|turn>user",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "model"
    model = gemma.gemma_model(**gemma.DENSE | {"vocab_size": ROWS, "num_hidden_layers": 3, "layer_types": gemma.SHORT})
    model.save_pretrained(folder)
    tokenizer = _trained()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    vocabularies.save(tokenizer, folder, tokenizer_config=names, generation_config={"eos_token_id": [1, 5]})
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


def _trained() -> Tokenizer:
    """Bytes after the special tokens; runs of newlines and of spaces are added, and merged too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 8, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    lines = [*TEXT.read_text(encoding="utf-8").splitlines(keepends=True), "        " * 9]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    added = ["\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<table>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def test_ids_are_those_of_the_original(checkpoint: Path, tmp_path: Path) -> None:
    oracle = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    oracle.encode_special_tokens = True  # what a user writes is text
    path = convert(checkpoint, tmp_path, "Q8_0", calibration=None, verify=False).files[0]
    ours = open_model(path).tokenizer
    with Engine(path, vocab_only=True) as engine:
        assert engine.bos_token == 2
        for text in TEXTS:
            expected = oracle.encode(text).ids
            assert ours.encode(text) == expected, text
            assert engine.tokenize(text, add_special=True) == expected, text
            assert ours.decode(expected[1:]) == text.replace("\u2581", " ")
    assert ours.end_of_generation == {1, 5}


def test_kinds_of_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Runs of spaces are normal tokens: llama.cpp writes others as they are spelled."""
    fields = gguf.GGUFReader(convert(checkpoint, tmp_path, "Q8_0", calibration=None, verify=False).files[0]).fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    kinds = dict(zip(tokens, types, strict=True))
    kind = gguf.TokenType
    assert fields["tokenizer.ggml.model"].contents() == "gemma4"
    assert [kinds[text] for text in SPECIAL] == [kind.CONTROL] * len(SPECIAL)
    assert kinds["\n\n"] == kinds["<table>"] == kind.USER_DEFINED and kinds["\u2581\u2581"] == kind.NORMAL
    assert kinds["<0x00>"] == kinds["<0xFF>"] == kind.BYTE
