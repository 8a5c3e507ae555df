"""The GGUF tokenizer keys: same ids from the source tokenizer, the rebuilt one, and llama.cpp on the written file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama import Engine
from moecast.archs.pretokenizers import PRE_TOKENIZERS, find_pre_tokenizer
from moecast.convert.gguf.tokenizer import (
    tokenizer_metadata,
    tokenizer_problems,
    vocabulary_error,
    vocabulary_metadata,
    written_tokenizer,
)
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.runner.measure.tokenization import PROBE, compare_tokenizers
from moecast.sources.tokenizer import Tokenizer
from moecast.sources.tokenizer_folder import read_tokenizer_folder
from moecast.sources.tokenizer_gguf import read_tokenizer_metadata
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

ADDED = [
    AddedToken("]~!b[", special=True, normalized=False),
    AddedToken("[e~[", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<end_of_tool>", special=True, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("</think>", special=False, normalized=False),
    AddedToken("<｜User｜>", special=False),
]
SPECIAL_TEXT = " <think>hm</think><think>]~!b[ a<｜User｜>b<|im_end|>\n<end_of_tool>x[e~["
FILES = {
    "tokenizer_config": {"bos_token": "]~!b[", "eos_token": "[e~[", "chat_template": "{{ messages }}"},
    "generation_config": {"eos_token_id": [501, 502, 503]},
}
MARGIN = 13


class Notes(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def problems_of(source: Tokenizer, metadata: dict[str, Any]) -> tuple[str, ...]:
    return tokenizer_problems(source, metadata, written_tokenizer(metadata))


@dataclass(frozen=True)
class Case:
    source: Tokenizer
    metadata: dict[str, Any]
    engine: Engine


def trained(pre: str, folder: Path, source: int = 0, **options: Any) -> Tokenizer:
    """A tokenizer whose splitter is the one that the checkpoints of this name carry."""
    row = find_pre_tokenizer(pre)
    assert row is not None
    backend = vocabularies.train(row.sources[source], ignore_merges=row.ignore_merges, added=ADDED, **options)
    if row.add_bos:
        special = [("]~!b[", backend.token_to_id("]~!b["))]
        backend.post_processor = TemplateProcessing(single="]~!b[ $A", special_tokens=special)
    return read_tokenizer_folder(vocabularies.save(backend, folder, **FILES))


TRIED = [
    *("minimax-m2", "pixtral", "joyai-llm", "llama-bpe", "tekken"),
    *("qwen2", "qwen35", "command-r", "cohere2moe", "gpt-2", "glm4", "kimi-k2"),
]


@pytest.fixture(scope="module", params=TRIED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = trained(request.param, folder)
    notes = Notes()
    metadata = tokenizer_metadata(source, source.vocabulary_size + MARGIN, None, request.param, notes)
    assert notes.lines == []
    path = vocabularies.write_vocabulary(folder / "vocabulary.gguf", metadata)
    with Engine(path, vocab_only=True) as engine:
        yield Case(source, metadata, engine)


def test_three_tokenizers_agree_on_the_probe(case: Case) -> None:
    rebuilt = read_tokenizer_metadata(case.metadata)
    for text in (*PROBE.values(), *vocabularies.LINES, SPECIAL_TEXT, ""):
        for parse_special in (False, True):
            ids = case.source.encode(text, parse_special=parse_special)
            assert rebuilt.encode(text, parse_special=parse_special) == ids, text
            assert case.engine.tokenize(text, add_special=True, parse_special=parse_special) == ids, text
            assert rebuilt.decode(ids) == case.source.decode(ids)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(
        st.one_of(st.sampled_from("aBc '12\n/.]~![<think>é中"), st.characters(exclude_categories=("Cs", "Cn")))
    )
)
def test_three_tokenizers_agree_on_any_text(case: Case, text: str) -> None:
    """The file's ids are llama.cpp's; they are the source's too where llama.cpp splits by the source's expressions."""
    ids = read_tokenizer_metadata(case.metadata).encode(text)
    assert case.engine.tokenize(text, add_special=True) == ids
    row = find_pre_tokenizer(case.metadata["tokenizer.ggml.pre"])
    assert row is not None
    if row.splits == row.sources[0]:
        assert case.source.encode(text) == ids


def test_what_the_file_says(case: Case) -> None:
    rebuilt = read_tokenizer_metadata(case.metadata)
    source = case.source
    assert (
        (rebuilt.bos, rebuilt.eos, rebuilt.add_bos)
        == (source.bos, source.eos, source.add_bos)
        == (500, 501, source.add_bos)
    )
    assert rebuilt.end_of_generation == source.end_of_generation == {501, 502, 503}
    assert case.engine.vocabulary == rebuilt.vocabulary_size == source.vocabulary_size + MARGIN
    assert case.engine.bos_token == (source.bos if source.add_bos else None)
    # <|im_end|> is known to llama.cpp by its text, <end_of_tool> is not.
    ids = {key: value for key, value in case.metadata.items() if key.endswith("_token_id")}
    assert ids == {f"tokenizer.ggml.{name}_token_id": id for name, id in (("bos", 500), ("eos", 501), ("eot", 503))}
    assert case.metadata["tokenizer.ggml.add_eos_token"] is False
    tokens, types = case.metadata["tokenizer.ggml.tokens"], case.metadata["tokenizer.ggml.token_type"]
    assert tokens[500:508] == [token.content for token in ADDED] + ["[PAD507]"]
    assert types[500:508] == [3, 3, 3, 3, 4, 4, 3, 5] and set(types[:500]) == {1} and set(types[507:]) == {5}


def test_the_example_model(tmp_path: Path) -> None:
    root = Path(__file__).parents[3] / "examples"
    source = read_tokenizer_folder(root / "minimax-m2-tiny")
    notes = Notes()
    metadata = tokenizer_metadata(source, source.vocabulary_size, None, "minimax-m2", notes)
    assert notes.lines == []
    assert source.backend.id_to_token(source.bos or 0) == "]~!b[" and source.chat_template is not None
    assert {source.backend.id_to_token(id) for id in source.end_of_generation} == {"[e~["}
    text = (root / "text" / "evaluation.txt").read_text(encoding="utf-8")
    ids = source.encode(text)
    assert read_tokenizer_metadata(metadata).encode(text) == ids
    with Engine(vocabularies.write_vocabulary(tmp_path / "v.gguf", metadata), vocab_only=True) as engine:
        assert engine.tokenize(text, add_special=True) == ids


def minimax(folder: Path, **options: Any) -> Tokenizer:
    return trained("minimax-m2", folder, **options)


def test_splits_that_llama_does_not_know_are_reported(tmp_path: Path) -> None:
    """llama.cpp takes combining marks out of words: Hindi text gets other ids, and it is not the file's fault."""
    hindi = ["यह हिन्दी में एक वाक्य है। नमस्ते दुनिया\n"]
    source = minimax(tmp_path, lines=[*vocabularies.LINES, *hindi * 3], size=600)
    source = replace(source, eos=source.bos, end_of_generation=frozenset())
    metadata = tokenizer_metadata(source, source.vocabulary_size, None, "minimax-m2", NoProgress())
    [line] = problems_of(source, metadata)
    assert line.startswith(
        "llama.cpp's 'minimax-m2' will split some text in another way than tokenizer.json: "
        "Hindi (1 of 18 texts), first at character "
    )
    with Engine(vocabularies.write_vocabulary(tmp_path / "v.gguf", metadata), vocab_only=True) as engine:
        ids = engine.tokenize(PROBE["Hindi"], add_special=True)
    assert read_tokenizer_metadata(metadata).encode(PROBE["Hindi"]) == ids != source.encode(PROBE["Hindi"])


NUMBERS = ["123 4567 89 2024 1000000\n" * 3]


def test_a_contradicting_name_is_reported_with_the_right_one(tmp_path: Path) -> None:
    source = replace(trained("gpt-2", tmp_path, lines=NUMBERS), eos=0)
    metadata = tokenizer_metadata(source, source.vocabulary_size, "deepseek-v3", "gpt-2", NoProgress())
    assert metadata["tokenizer.ggml.pre"] == "deepseek-v3"
    [line] = problems_of(source, metadata)
    assert line.startswith("llama.cpp's 'deepseek-v3' ('gpt-2' would be its own) will split some text in another way")


@pytest.mark.parametrize("own", ["gpt-2", "qwen2", "deepseek-v3", "llama-bpe"])
def test_the_splitter_of_the_tokenizer_wins_over_the_usual_one(own: str, tmp_path: Path) -> None:
    source = replace(trained(own, tmp_path, lines=[*vocabularies.LINES, *NUMBERS]), eos=0)
    notes = Notes()
    metadata = tokenizer_metadata(source, source.vocabulary_size, None, "minimax-m2", notes)
    assert metadata["tokenizer.ggml.pre"] == own and problems_of(source, metadata) == ()
    assert notes.lines == [f"tokenizer.json splits text as llama.cpp's '{own}' does, not as 'minimax-m2'"]
    with Engine(vocabularies.write_vocabulary(tmp_path / "v.gguf", metadata), vocab_only=True) as engine:
        assert engine.tokenize(NUMBERS[0], add_special=True) == source.encode(NUMBERS[0])


def respelled(folder: Path, *expressions: str, lines: list[str]) -> Tokenizer:
    backend = vocabularies.train(expressions, lines=lines, added=ADDED)
    return read_tokenizer_folder(vocabularies.save(backend, folder, **FILES))


def test_a_splitter_spelled_otherwise_is_found_by_what_it_does(tmp_path: Path) -> None:
    row = find_pre_tokenizer("gpt-2")
    assert row is not None
    [spelling] = row.sources[0]
    source = respelled(tmp_path, spelling.replace(r"\p{N}+|", r"[\p{N}]+|"), lines=[*vocabularies.LINES, *NUMBERS])
    metadata = tokenizer_metadata(source, source.vocabulary_size, None, "deepseek-v3", NoProgress())
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and problems_of(source, metadata) == ()


def test_a_splitter_that_llama_lacks_is_refused_without_pre(tmp_path: Path) -> None:
    source = respelled(tmp_path, r"\p{N}{1,2}", r"\s+|\S+", lines=[*vocabularies.LINES, *NUMBERS])
    with pytest.raises(BadInput, match=r"as no splitter of llama.cpp does: .* is the nearest .* with --pre"):
        tokenizer_metadata(source, source.vocabulary_size, None, "minimax-m2", NoProgress())
    metadata = tokenizer_metadata(source, source.vocabulary_size, "gpt-2", "minimax-m2", NoProgress())
    assert len(problems_of(source, metadata)) == 1


def test_shares_of_tokens_that_differ(tmp_path: Path) -> None:
    """By hand: of 'aa 12 aa', the middle one of three tokens becomes two."""
    vocabulary = {"a": 0, "1": 1, "2": 2, "Ġ": 3, "aa": 4, "Ġaa": 5, "12": 6, "Ġ1": 7, "Ġ12": 8}
    merges = [("a", "a"), ("Ġ", "aa"), ("Ġ", "1"), ("Ġ1", "2")]
    reference, candidate = (
        Tokenizer(backend, 9, None, None, None, None, False, frozenset(), {})
        for backend in (Backend(models.BPE(vocabulary, merges)), Backend(models.BPE(vocabulary, merges[:3])))
    )
    for tokenizer in (reference, candidate):
        tokenizer.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = compare_tokenizers(reference, candidate, "aa 12 aa")
    assert found.evaluation_tokens == pytest.approx(1 / 3)
    assert (
        found.first == "the evaluation text (1 of 1 texts), first at character 2 ' 12 aa': [8, 5] there, [7, 2, 5] here"
    )
    assert compare_tokenizers(reference, reference, "aa 12 aa").first is None


def test_a_name_outside_the_table_is_written_and_reported(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(minimax(tmp_path), 600, "falcon", "minimax-m2", NoProgress())
    assert metadata["tokenizer.ggml.pre"] == "falcon"
    [line] = problems_of(minimax(tmp_path), metadata)
    assert line == "what llama.cpp's 'falcon' does to a text cannot be checked: moecast has no such splitter"


def test_wrong_metadata_is_an_error(tmp_path: Path) -> None:
    source = minimax(tmp_path)
    metadata = vocabulary_metadata(source, source.vocabulary_size, "minimax-m2")
    assert vocabulary_error(source, metadata) is None
    tokens = list(metadata["tokenizer.ggml.tokens"])
    exclamation, quote = tokens.index("!"), tokens.index('"')
    tokens[exclamation], tokens[quote] = '"', "!"
    error = vocabulary_error(source, metadata | {"tokenizer.ggml.tokens": tokens})
    assert error is not None
    assert error.startswith(
        "the GGUF tokenizer would give other ids than tokenizer.json: code, punctuation, Cyrillic and Greek, Korean, "
        f"emoji (5 of 16 texts), first at character 61 '!d){{ HTTPServer.': [{exclamation}, "
    )
    assert f" there, [{quote}, " in error


def test_stripping_tokens_are_reported(tmp_path: Path) -> None:
    """llama.cpp has no `lstrip`: the space before such a token becomes a token of its own."""
    backend = vocabularies.train(find_pre_tokenizer("gpt-2").sources[0], added=[AddedToken("<x>", lstrip=True)])  # type: ignore[union-attr]
    source = replace(read_tokenizer_folder(vocabularies.save(backend, tmp_path)), eos=0)
    metadata = vocabulary_metadata(source, 600, "gpt-2")
    assert vocabulary_error(source, metadata) is None
    line, _ = problems_of(source, metadata)
    assert "json: token <x> (1 of 17 texts), first at character 1 ' <x> b" in line


def test_holes_and_clashing_fillers(tmp_path: Path) -> None:
    source = minimax(tmp_path)
    saved = json.loads(source.backend.to_str())
    vocabulary = saved["model"]["vocab"]
    last = max(vocabulary.values())
    vocabulary |= {"[PAD602]": 600, "[PAD603]": 601, "[[PAD603]]": 604}
    saved["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    source = replace(read_tokenizer_folder(tmp_path), bos=None, eos=0)
    metadata = vocabulary_metadata(source, 606, "minimax-m2")
    assert metadata["tokenizer.ggml.tokens"][last + 1] == f"[PAD{last + 1}]"
    assert metadata["tokenizer.ggml.tokens"][600:] == [
        "[PAD602]", "[PAD603]", "[[PAD602]]", "[[[PAD603]]]", "[[PAD603]]", "[PAD605]"
    ]  # fmt: skip
    assert metadata["tokenizer.ggml.token_type"][600:] == [1, 1, 5, 5, 1, 5]
    with Engine(vocabularies.write_vocabulary(tmp_path / "v.gguf", metadata), vocab_only=True) as engine:
        assert engine.tokenize("It's", add_special=True) == source.encode("It's")


def test_merges_that_cannot_happen_are_left_out(tmp_path: Path) -> None:
    source = minimax(tmp_path)
    saved = json.loads(source.backend.to_str())
    saved["model"]["vocab"] |= {" ": 600, " a": 601}
    saved["model"]["merges"].insert(0, [" ", "a"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    spaced = read_tokenizer_folder(tmp_path)
    metadata = vocabulary_metadata(spaced, 602, "minimax-m2")
    assert metadata["tokenizer.ggml.merges"] == vocabulary_metadata(source, 602, "minimax-m2")["tokenizer.ggml.merges"]
    assert vocabulary_error(spaced, metadata) is None and problems_of(spaced, metadata) == ()


def test_chat_templates(tmp_path: Path) -> None:
    source = replace(minimax(tmp_path), chat_templates={"default": "{{ a }}", "tool_use": "{{ b }}"})
    metadata = vocabulary_metadata(source, 600, "minimax-m2")
    assert metadata["tokenizer.chat_template"] == "{{ a }}"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ b }}"
    assert read_tokenizer_metadata(metadata).chat_templates == source.chat_templates


def test_refusals(tmp_path: Path) -> None:
    source = minimax(tmp_path)
    with pytest.raises(BadInput, match=r"has ids up to 506, but the embedding has only 300 rows"):
        vocabulary_metadata(source, 300, "minimax-m2")
    with pytest.raises(BadInput, match=r"name no end-of-text token and llama.cpp would take token 11"):
        vocabulary_metadata(replace(source, eos=None), 600, "minimax-m2")

    def refused(backend: Backend, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            vocabulary_metadata(replace(source, backend=backend), 600, "minimax-m2")

    refused(Backend(models.WordLevel({"a": 0}, "a")), "holds a WordLevel model; only byte-level BPE")
    refused(Backend(models.BPE({"a": 0}, [])), "has no ByteLevel pre-tokenizer")
    suffixed = Backend(models.BPE({"a": 0}, [], end_of_word_suffix="</w>"))
    suffixed.pre_tokenizer = pre_tokenizers.ByteLevel()
    refused(suffixed, "sets end_of_word_suffix to '</w>', which llama.cpp does not know")
    twice = Backend(models.BPE({"a": 0, "b": 0}, []))
    twice.pre_tokenizer = pre_tokenizers.ByteLevel()
    refused(twice, "gives id 0 to both '[ab]' and '[ab]'")


def test_every_row_with_a_splitter_is_tried() -> None:
    assert {find_pre_tokenizer(name) for name in TRIED} == {row for row in PRE_TOKENIZERS if row.sources}


def test_names_of_chat_templates_are_those_of_gguf_py(tmp_path: Path) -> None:
    templates = {"default": "a", "tool.use v2": "b", "größe": "c"}
    source = replace(minimax(tmp_path), chat_templates=templates)
    writer = gguf.GGUFWriter(None, "test")
    writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    expected = {key: field.value for key, field in writer.kv_data[0].items() if "chat" in key}
    found = {key: value for key, value in vocabulary_metadata(source, 600, "minimax-m2").items() if "chat" in key}
    for keys in (expected, found):
        keys["tokenizer.chat_templates"] = sorted(keys["tokenizer.chat_templates"])  # gguf-py's has no order
    assert found == expected
    with pytest.raises(BadInput, match="two chat templates would both be called 'tool_use' in the file"):
        vocabulary_metadata(replace(source, chat_templates={"tool.use": "a", "tool use": "b"}), 600, "minimax-m2")


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({}, []),
        ({"chat_templates": {}}, ["the checkpoint has no chat template: llama.cpp will use one of its own"]),
        (
            {"chat_templates": {"tool_use": "a"}},
            ["the checkpoint has no default chat template, only tool_use: llama.cpp will use one of its own"],
        ),
        ({"end_of_generation": frozenset({501, 502, 503, 504})}, []),
        (
            {"end_of_generation": frozenset({501, 502, 503, 504, 505, 506})},
            ["'</think>', '<｜User｜>' will not end a text: GGUF has room for three ids that do"],
        ),
        ({"losses": ("x is left out",)}, ["x is left out"]),
    ],
)
def test_losses_are_said(tmp_path: Path, change: dict[str, Any], notes: list[str]) -> None:
    """EOS (501) has a place of its own, and <|im_end|> (502) needs none: llama.cpp knows its text."""
    source = replace(minimax(tmp_path), **change)
    metadata = tokenizer_metadata(source, 600, None, "minimax-m2", NoProgress())
    assert [*problems_of(source, metadata)] == notes


def test_vocabulary_is_taken_apart_once_and_rebuilt_for_one_splitter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another row splits as this one does; each rebuilding of a vocabulary of 200000 tokens takes a second."""
    source = trained("tekken", tmp_path)
    rebuilt: list[str] = []

    def counting(metadata: dict[str, Any]) -> Tokenizer:
        rebuilt.append(metadata["tokenizer.ggml.pre"])
        return read_tokenizer_metadata(metadata)

    monkeypatch.setattr("moecast.convert.gguf.tokenizer.read_tokenizer_metadata", counting)
    parsed: list[str] = []
    read = json.loads
    monkeypatch.setattr("moecast.sources.tokenizer.json.loads", lambda text: parsed.append(text) or read(text))
    metadata = tokenizer_metadata(source, source.vocabulary_size, None, "tekken", NoProgress())
    assert problems_of(source, metadata) == problems_of(source, metadata)
    assert rebuilt == ["tekken"] * 3 and len(parsed) == 1
