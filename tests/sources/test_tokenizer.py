"""Tokenizers of checkpoint folders against transformers on the same files; refusals of GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vocabularies
from moecast.errors import BadInput
from moecast.sources.tokenizer_folder import read_tokenizer_folder
from moecast.sources.tokenizer_gguf import read_tokenizer_metadata
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
ADDED = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<unk>", special=True, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
]
TEXT = "It's <think>a naïve</think> 1234 <s> test</s><|im_end|>\n\n  日本"
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "special": True},
    "pad_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


@pytest.fixture
def backend() -> Backend:
    return vocabularies.train(GPT2, added=ADDED)


def begin_with(backend: Backend, *tokens: str) -> None:
    special = [(token, backend.token_to_id(token)) for token in tokens]
    backend.post_processor = TemplateProcessing(single=" ".join([*tokens, "$A"]), special_tokens=special)


@pytest.mark.parametrize("template", [True, False])
def test_ids_are_those_of_transformers(backend: Backend, tmp_path: Path, template: bool) -> None:
    from transformers import AutoTokenizer

    if template:
        begin_with(backend, "<s>")
    folder = vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG)
    ours, theirs = read_tokenizer_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.unknown, ours.padding) == (theirs.unk_token_id, theirs.pad_token_id)
    assert ours.vocabulary_size == len(theirs) == 505
    assert ours.add_bos == template
    for special in (False, True):
        expected = theirs(TEXT, add_special_tokens=special, split_special_tokens=True)["input_ids"]
        assert ours.encode(TEXT, add_special=special) == expected
        assert ours.encode(TEXT, special, parse_special=True) == theirs(TEXT, add_special_tokens=special)["input_ids"]
    ids = ours.encode(TEXT, parse_special=True)
    assert ours.decode(ids) == theirs.decode(ids) == ("<s>" if template else "") + TEXT


def test_only_special_text_stays_text(backend: Backend, tmp_path: Path) -> None:
    tokenizer = read_tokenizer_folder(vocabularies.save(backend, tmp_path))
    ids = tokenizer.encode(TEXT)
    assert backend.token_to_id("<think>") in ids
    assert not {backend.token_to_id(text) for text in ("<s>", "</s>", "<|im_end|>")} & set(ids)
    assert tokenizer.decode(ids) == TEXT


def test_unmarked_control_tokens_are_recognized_by_their_text(tmp_path: Path) -> None:
    added = [AddedToken(text, special=False) for text in ("<｜User｜>", "<|im_end|>", "<tool>")]
    backend = vocabularies.train(GPT2, added=added)
    tokenizer = read_tokenizer_folder(vocabularies.save(backend, tmp_path))
    special = {token.content: token.special for token in tokenizer.backend.get_added_tokens_decoder().values()}
    assert special == {"<｜User｜>": True, "<|im_end|>": True, "<tool>": False}
    assert tokenizer.encode("<tool><｜User｜>")[0] == backend.token_to_id("<tool>")
    assert backend.token_to_id("<｜User｜>") not in tokenizer.encode("<tool><｜User｜>")


def test_saved_truncation_and_padding_are_off(backend: Backend, tmp_path: Path) -> None:
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = read_tokenizer_folder(vocabularies.save(backend, tmp_path))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_template_wins_over_add_bos_token(backend: Backend, tmp_path: Path) -> None:
    begin_with(backend, "<s>")
    vocabularies.save(backend, tmp_path / "yes", tokenizer_config=CONFIG | {"add_bos_token": False})
    assert read_tokenizer_folder(tmp_path / "yes").encode("a")[0] == backend.token_to_id("<s>")
    begin_with(backend)
    vocabularies.save(backend, tmp_path / "no", tokenizer_config=CONFIG | {"add_bos_token": True})
    assert not read_tokenizer_folder(tmp_path / "no").add_bos


def test_add_bos_token_counts_without_a_template(backend: Backend, tmp_path: Path) -> None:
    vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG | {"add_bos_token": True})
    tokenizer = read_tokenizer_folder(tmp_path)
    assert tokenizer.encode("a") == [tokenizer.bos, *tokenizer.encode("a", add_special=False)]


def test_config_only_fills_gaps(backend: Backend, tmp_path: Path) -> None:
    """Some re-exports write bos 1 and eos 2 into config.json of a model whose ids are others."""
    vocabularies.save(
        backend,
        tmp_path,
        tokenizer_config={"eos_token": "</s>", "unk_token": None},
        special_tokens_map={"unk_token": "<unk>", "eos_token": "<s>"},
        generation_config={"bos_token_id": 500, "eos_token_id": [501, 504], "pad_token_id": 9999},
        config={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )
    tokenizer = read_tokenizer_folder(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unknown, tokenizer.padding) == (500, 501, 502, 3)
    assert tokenizer.end_of_generation == {501, 504}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "jinja", "chat_template.json": '{"chat_template": "json"}'}, {"default": "jinja"}),
        ({"chat_template.json": '{"chat_template": "json"}'}, {"default": "json"}),
        ({}, {"default": "config", "tool_use": "tools"}),
    ],
)
def test_chat_template(backend: Backend, tmp_path: Path, files: dict[str, str], expected: dict[str, str]) -> None:
    templates = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "tools"}]
    vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG | {"chat_template": templates})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tokenizer = read_tokenizer_folder(tmp_path)
    assert tokenizer.chat_templates == expected
    assert tokenizer.chat_template == expected["default"]


def test_bad_folders(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no tokenizer.json, copy tokenizer.json and tokenizer_config.json there"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadInput, match=r"only tokenizer.model: open the folder with transformers"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer.json is not readable JSON"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer.json is not a tokenizer file: "):
        read_tokenizer_folder(tmp_path)
    vocabularies.save(backend, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BadInput, match=r"tokenizer_config.json holds a JSON list, expected an object"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    with pytest.raises(BadInput, match=r"tokenizer_config.json sets add_bos_token, but its bos_token is no token"):
        read_tokenizer_folder(tmp_path)
    begin_with(backend, "<s>", "<think>")
    vocabularies.save(backend, tmp_path)
    with pytest.raises(BadInput, match=r"puts 2 tokens before a text; at most 1 works"):
        read_tokenizer_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, r"tokenizer.ggml.model is 'llama'; moecast reads byte-level BPE \('gpt2'\) only"),
        ({"pre": "grok-2"}, r"tokenizer.ggml.pre is 'grok-2', a pre-tokenizer that moecast does not know; it knows"),
        ({"merges": ["a zz"]}, r"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: .*zz"),
        ({"tokens": ["a", "b", "a"]}, r"tokenizer.ggml.tokens holds 'a' more than once"),
        ({"token_type": [1]}, r"tokenizer.ggml.token_type has 1 entries, expected 3 as in tokens"),
        ({"add_bos_token": True}, r"tokenizer.ggml.bos_token_id is missing, yet texts begin with BOS"),
        ({"merges": None}, r"tokenizer.ggml.merges is missing"),
    ],
)
def test_bad_metadata(change: dict[str, Any], message: str) -> None:
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | change
    with pytest.raises(BadInput, match=message):
        read_tokenizer_metadata({f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None})


def test_gguf_defaults_are_those_of_llama() -> None:
    values = {"model": "gpt2", "tokens": ["a", "b", "ab", "</s>"], "token_type": [1, 1, 1, 3], "merges": ["a b"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    tokenizer = read_tokenizer_metadata(metadata | {"tokenizer.ggml.eos_token_id": 99})
    assert tokenizer.encode("abb") == [2, 1]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.end_of_generation) == (None, None, {3})
    llama3 = read_tokenizer_metadata(metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 3})
    assert llama3.encode("ab") == [3, 2]


def _files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


LIST = [{"name": "default", "template": "config"}, {"name": "rag v1.2", "template": "rag"}]
JINJA = {"chat_template.jinja": "jinja"}
FURTHER = {"additional_chat_templates/tool_use.jinja": "tools", "additional_chat_templates/README.md": "no"}


@pytest.mark.parametrize("stored", [None, "one", [], LIST, LIST[1:], {"default": "a", "tool_use": "b"}])
@pytest.mark.parametrize(
    "files", [{}, {"chat_template.jinja": "jinja"}, FURTHER, FURTHER | {"chat_template.jinja": "j"}]
)
def test_chat_templates_are_those_of_transformers(
    backend: Backend, tmp_path: Path, stored: object, files: dict[str, str]
) -> None:
    from transformers import AutoTokenizer

    vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG | ({"chat_template": stored} if stored else {}))
    _files(tmp_path, files)
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    expected = {"default": theirs} if isinstance(theirs, str) else theirs or {}
    tokenizer = read_tokenizer_folder(tmp_path)
    assert tokenizer.chat_templates == expected
    pairs = {entry["name"] for entry in stored} if isinstance(stored, list) else stored
    lost = {"default"} if pairs == "one" else {*(pairs or ())}
    assert bool(tokenizer.losses) == bool(lost - expected.keys())


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([{"name": "default"}], r"tokenizer_config\.json: chat_template holds \{'name': 'default'\}, expected text"),
        ([{"name": "", "template": "a"}], r"chat_template holds \{'name': '', "),
        ([{"name": "a", "template": None}], r"chat_template holds"),
        (["a"], r"chat_template holds 'a', expected text, or a list"),
        ({"default": ["a"]}, r"chat_template holds \{'name': 'default', 'template': \['a'\]\}"),
        (7, r"chat_template holds 7, expected text"),
        ([*LIST, LIST[0] | {"template": "other"}], r"chat_template names 'default' twice, with different templates"),
    ],
)
def test_bad_chat_templates(backend: Backend, tmp_path: Path, stored: object, message: str) -> None:
    vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG | {"chat_template": stored})
    with pytest.raises(BadInput, match=message):
        read_tokenizer_folder(tmp_path)


def test_how_templates_are_saved(backend: Backend, tmp_path: Path) -> None:
    vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG | {"chat_template": "config"})
    (tmp_path / "chat_template.jinja").write_bytes("\ufeffgröße\r\n".encode())
    assert read_tokenizer_folder(tmp_path).chat_template == "größe\n"
    (tmp_path / "chat_template.jinja").write_text(" \n")
    tokenizer = read_tokenizer_folder(tmp_path)
    assert tokenizer.chat_templates == {} and tokenizer.losses == ("the chat template 'default' is empty",)
    for content in ("größe".encode("latin-1"), "größe".encode("utf-16")):
        (tmp_path / "chat_template.jinja").write_bytes(content)
        with pytest.raises(BadInput, match=r"chat_template\.jinja is (UTF-16|not UTF-8) text"):
            read_tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    assert read_tokenizer_folder(tmp_path).chat_template == "config"


def test_files_with_a_byte_order_mark(backend: Backend, tmp_path: Path) -> None:
    vocabularies.save(backend, tmp_path, tokenizer_config=CONFIG)
    expected = read_tokenizer_folder(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_tokenizer_folder(tmp_path) == expected
    assert read_tokenizer_folder(tmp_path).encode(TEXT) == expected.encode(TEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens is no array of strings"),
        ({"tokens": ["a", 1]}, r"tokenizer\.ggml\.tokens is no array of strings"),
        ({"merges": [1]}, r"tokenizer\.ggml\.merges is no array of strings"),
        ({"token_type": [1.0, 1.0, 1.0]}, r"tokenizer\.ggml\.token_type is no array of whole numbers"),
        ({"bos_token_id": 1.5}, r"tokenizer\.ggml\.bos_token_id is 1\.5, expected a whole number"),
        ({"add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token is 1, expected true or false"),
    ],
)
def test_metadata_of_other_types(change: dict[str, Any], message: str) -> None:
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | change
    with pytest.raises(BadInput, match=message):
        read_tokenizer_metadata({f"tokenizer.ggml.{key}": value for key, value in values.items()})
