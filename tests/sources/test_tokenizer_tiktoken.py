"""Tokenizers of tiktoken files: the ids of the same tokens and merges in the tokenizers library, and in llama.cpp."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import checkpoints
import llama
import pytest
import vocabularies
from moecast.archs.config import Config
from moecast.archs.pretokenizers import splitter_of_code
from moecast.convert.gguf.tokenizer import tokenizer_metadata
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.sources.tokenizer_folder import read_tokenizer_folder
from moecast.sources.tokenizer_gguf import read_tokenizer_metadata
from moecast.sources.tokenizer_tiktoken import read_tiktoken
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT = checkpoints.TEXT.read_text(encoding="utf-8")
SPLITS = splitter_of_code("tokenization_kimi") or ()
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
NAMED = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2}  # ids after those of the file
SETTINGS = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
}


@pytest.fixture(scope="module")
def trained() -> Backend:
    """Whose ids are in the order of its merges."""
    return vocabularies.train(SPLITS, size=480, ignore_merges=True)


def write(backend: Backend, folder: Path) -> int:
    """The same as a tiktoken file beside its settings; returns how many tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    lines = (f"{base64.b64encode(_bytes(text)).decode()} {rank}" for rank, (text, _) in enumerate(tokens))
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    added = {str(len(tokens) + id): {"content": text, "special": True} for text, id in NAMED.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"added_tokens_decoder": added}))
    return len(tokens)


def _bytes(text: str) -> bytes:
    return bytes(BYTES[letter] for letter in text)


def test_ids_are_those_of_the_same_merges(trained: Backend, tmp_path: Path) -> None:
    count = write(trained, tmp_path)
    found = read_tokenizer_folder(tmp_path)
    expected = trained.encode(TEXT, add_special_tokens=False).ids
    least = min(trained.get_vocab(with_added_tokens=False).values())
    assert found.encode(TEXT) == [id - least for id in expected]
    assert found.decode(found.encode(TEXT)) == TEXT
    assert (found.bos, found.eos, found.vocabulary_size) == (count, count + 1, count + 3)
    assert found.encode("a<|im_end|>", parse_special=True)[-1] == count + 2


def test_pieces_are_those_of_its_expressions(trained: Backend, tmp_path: Path) -> None:
    write(trained, tmp_path)
    text = "漢字かな HelloWorld it's 12345\n x"
    pieces = read_tokenizer_folder(tmp_path).backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[slice(*span)] for _, span in pieces] == [
        "漢字", "かな", " Hello", "World", " it's", " ", "123", "45", "\n", " x",
    ]  # fmt: skip


def test_file_names_its_splitter_and_llama_gives_the_same_ids(trained: Backend, tmp_path: Path) -> None:
    count = write(trained, tmp_path)
    metadata = tokenizer_metadata(read_tokenizer_folder(tmp_path), count + 8, None, "deepseek-v3", NoProgress())
    assert metadata["tokenizer.ggml.pre"] == "kimi-k2"
    written = read_tokenizer_metadata(metadata)
    with llama.Engine(vocabularies.write_vocabulary(tmp_path / "tokens.gguf", metadata), vocab_only=True) as engine:
        assert engine.tokenize(TEXT[:9000], add_special=False) == written.encode(TEXT[:9000])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("YQ==\n", "line 1"),
        ("not base64! 3\n", "line 1"),
        ("YQ== 0\n", "lacks single bytes"),
        ("", "lacks single bytes"),
    ],
)
def test_damaged_file_is_refused(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text(content)
    with pytest.raises(BadInput, match=named):
        read_tiktoken(tmp_path / "tiktoken.model", SPLITS, Config({}, "tokenizer_config.json"))


def test_module_that_nobody_knows_is_refused(trained: Backend, tmp_path: Path) -> None:
    write(trained, tmp_path)
    settings = SETTINGS | {"auto_map": {"AutoTokenizer": ["tokenization_other.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"no tokenizer\.json, only tiktoken\.model"):
        read_tokenizer_folder(tmp_path)
