"""The pre-tokenizer table against llama.cpp itself: same splits for every name and every kind of character."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama import Engine
from moecast.archs.pretokenizers import OTHER_NAMES, PRE_TOKENIZERS, PreTokenizer, check_known, spelled_alike
from moecast.errors import BadInput
from moecast.runner.measure.tokenization import PROBE
from moecast.sources.tokenizer import Tokenizer
from moecast.sources.tokenizer_gguf import read_tokenizer_metadata
from tokenizers import Regex, pre_tokenizers

NAMES = [name for row in PRE_TOKENIZERS for name in row.names]
# What splitters decide on, apart from the letters, and a bit of everything that Unicode 14 assigns.
DECISIVE = "aZ09'stREvemLLd \t\r\n\u00a0\u3000/.,-_$+<é\u0301Éß中あカ한नि१½😀\u200d"
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.text(st.one_of(st.sampled_from(DECISIVE), ASSIGNED), max_size=40)


@pytest.fixture(scope="module", params=[row.names[0] for row in PRE_TOKENIZERS])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tokenizer, Engine]]:
    """Our tokenizer and llama.cpp's, from the same metadata."""
    metadata = vocabularies.every_pair(request.param)
    path = vocabularies.write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "pairs.gguf", metadata)
    with Engine(path, vocab_only=True) as engine:
        yield read_tokenizer_metadata(metadata), engine


def test_probe_texts(pair: tuple[Tokenizer, Engine]) -> None:
    ours, engine = pair
    for text in (*PROBE.values(), "a whole words, whole"):
        assert ours.encode(text) == engine.tokenize(text, add_special=True), text


@pytest.mark.whole
def test_every_kind_of_character(pair: tuple[Tokenizer, Engine]) -> None:
    ours, engine = pair
    for character in _some_of_every_category():
        text = f"a{character}b {character}{character}X 1{character}2 '{character}\n{character}  {character}y\r\n"
        assert ours.encode(text) == engine.tokenize(text, add_special=True), hex(ord(character))


@cache
def _some_of_every_category(count: int = 20) -> list[str]:
    by_category: dict[str, list[str]] = {}
    for code in range(0x110000):
        by_category.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    assigned = [characters for category, characters in by_category.items() if category not in ("Cs", "Cn")]
    return [character for characters in assigned for character in characters[:: max(1, len(characters) // count)]]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text(pair: tuple[Tokenizer, Engine], text: str) -> None:
    ours, engine = pair
    assert ours.encode(text) == engine.tokenize(text, add_special=True)


@pytest.mark.parametrize("name", NAMES)
def test_llama_knows_every_name(name: str, tmp_path: Path) -> None:
    text = "It's a whole word: ABCdef 12345 words\n\n//  naïve नमस्ते ПриветМир"
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    metadata = vocabularies.every_pair(name, set(letters))
    with Engine(vocabularies.write_vocabulary(tmp_path / "pairs.gguf", metadata), vocab_only=True) as engine:
        assert read_tokenizer_metadata(metadata).encode(text) == engine.tokenize(text, add_special=True)


SPLIT_OTHERWISE = ("pixtral", "cohere2moe", "kimi-k2")  # by llama.cpp
SPELLINGS = [(row, source) for row in PRE_TOKENIZERS for source in row.sources if row.names[0] not in SPLIT_OTHERWISE]


@pytest.mark.parametrize(("row", "source"), SPELLINGS, ids=[row.names[0] for row, _ in SPELLINGS])
@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from([chr(code) for code in range(128)]), max_size=40))
def test_tokenizer_json_and_llama_spell_the_same_splits(row: PreTokenizer, source: tuple[str, ...], text: str) -> None:
    assert _pieces(source, text) == _pieces(row.splits, text)


def _pieces(expressions: tuple[str, ...], text: str) -> list[tuple[str, tuple[int, int]]]:
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence(list(splits)).pre_tokenize_str(text)


def _json(*steps: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "model": {"type": "BPE", "ignore_merges": ignore_merges},
    }


def _split(expression: str, kind: str = "Regex", behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {kind: expression}, "behavior": behavior, "invert": invert}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
QWEN35 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (  # gpt-oss has it too
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = (  # tokenization_kimi.py
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    _split(r"\p{N}{1,3}"),
    _split("[一-龥぀-ゟ゠-ヿ]+"),
    _split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)


@pytest.mark.parametrize(
    ("tokenizer_json", "name"),
    [
        (_json(_split(LLAMA3), BYTE_LEVEL, ignore_merges=True), "llama-bpe"),
        (_json(_split(LLAMA3, behavior="Removed", invert=True), BYTE_LEVEL, ignore_merges=True), "llama-bpe"),
        (_json(_split(LLAMA3), BYTE_LEVEL, ignore_merges=True), "glm4"),
        (_json(_split(TEKKEN), BYTE_LEVEL, ignore_merges=True), "tekken"),
        (_json(*DEEPSEEK, BYTE_LEVEL), "deepseek-v3"),
        (_json(_split(GPT4O), BYTE_LEVEL), "gpt-4o"),
        (_json(_split(KIMI), BYTE_LEVEL), "kimi-k2"),
        (_json(_split(LLAMA3.replace("{1,3}", "")), BYTE_LEVEL), "qwen2"),
        (_json(_split(QWEN35), BYTE_LEVEL), "qwen35"),
        (_json(BYTE_LEVEL | {"use_regex": True}), "gpt-2"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": True}, "model": {"type": "BPE"}}, "gpt-2"),
        (_json({"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}), "command-r"),
        (_json(_split(r"\d{1,3}(?=(?:\d{3})*\b)"), _split(GPT4O), BYTE_LEVEL), "cohere2moe"),
    ],
)
def test_recognizes_published_splitters(tokenizer_json: dict[str, Any], name: str) -> None:
    assert name in [row.names[0] for row in spelled_alike(tokenizer_json)]


@pytest.mark.parametrize(
    "steps",
    [
        (_split(LLAMA3, kind="String"), BYTE_LEVEL),
        (_split(LLAMA3, behavior="Removed"), BYTE_LEVEL),
        ({"type": "Digits", "individual_digits": False}, BYTE_LEVEL | {"use_regex": True}),
    ],
)
def test_other_splitters_are_not_mistaken(steps: tuple[dict[str, Any], ...]) -> None:
    assert spelled_alike(_json(*steps)) == []


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_llama_knows_names_outside_the_table(name: str, tmp_path: Path) -> None:
    check_known(name)
    file = vocabularies.write_vocabulary(tmp_path / "pairs.gguf", vocabularies.every_pair(name, set("ab")))
    with Engine(file, vocab_only=True) as engine:
        assert engine.vocabulary == len("ab") ** 2 + len(vocabularies.BYTES) + 2


@pytest.mark.parametrize(
    ("name", "close"),
    [("gpt2", "gpt-2"), ("gpt4o", "gpt-4o"), ("llama-bp", "llama-bpe"), ("deepseekv3", "deepseek-v3"), ("x", "gpt-4o")],
)
def test_names_that_llama_refuses(name: str, close: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"--pre is '{name}', which llama.cpp does not know: did you mean .*{close}"):
        check_known(name)
    file = vocabularies.write_vocabulary(tmp_path / "pairs.gguf", vocabularies.every_pair(name, set("ab")))
    with pytest.raises(RuntimeError, match="unknown pre-tokenizer type"):
        Engine(file, vocab_only=True)


def test_trained_tokenizers_keep_their_name() -> None:
    for row in PRE_TOKENIZERS:
        for source in row.sources:
            trained = vocabularies.train(source, size=260, ignore_merges=row.ignore_merges)
            assert row in spelled_alike(json.loads(trained.to_str()))
