"""Model cards: what is read of them, and that no card, however broken, stops anybody."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moecast.sources.model_card import read_model_card

CARD = """---
license: other
license_name: open-model
license_link: LICENSE
language:
- en
- no
- zh
tags: [moe, 1.5]
pipeline_tag: text-generation
base_model: owner/Base-30B
datasets: []
library_name: transformers
version: 1.0
---
# A model
---
"""


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("text", [CARD, CARD.replace("\n", "\r\n"), "\ufeff" + CARD], ids=["plain", "CRLF", "mark"])
def test_texts_stay_texts(tmp_path: Path, text: str) -> None:
    card = read_model_card(written(tmp_path, text))
    assert card.values == {
        "license": "other",
        "license_name": "open-model",
        "license_link": "LICENSE",
        "language": ["en", "no", "zh"],
        "tags": ["moe", "1.5"],
        "pipeline_tag": "text-generation",
        "base_model": "owner/Base-30B",
        "version": "1.0",
    }
    assert card.notes == ()


@pytest.mark.parametrize(
    "text", ["", "# No front matter", "---", "---\n---\n", "---\n\n---\n", "\n---\nlicense: mit\n---"]
)
def test_cards_that_say_nothing(tmp_path: Path, text: str) -> None:
    card = read_model_card(written(tmp_path, text))
    assert (card.values, card.notes) == ({}, ())


def test_folder_without_a_card(tmp_path: Path) -> None:
    card = read_model_card(tmp_path)
    assert (card.values, card.notes) == ({}, ())


def test_wrong_kinds_are_left_out_and_named(tmp_path: Path) -> None:
    matter = (
        "license: [mit, {a: b}]",
        "license_name: [x]",
        "tags: {a: b}",
        "language: [[en], de]",
        "base_model: [owner/Name, {name: Other, organization: [x]}, {name: Third}]",
    )
    card = read_model_card(written(tmp_path, "\n".join(("---", *matter, "---"))))
    assert card.values == {"license": ["mit"], "language": ["de"], "base_model": ["owner/Name", {"name": "Third"}]}
    left_out = ("language", "license", "tags", "base_model", "license_name")
    assert card.notes == tuple(f"README.md: what is no text under {key} is left out" for key in left_out)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("matter", "reason"),
    [
        ("license: [mit", "expected ',' or ']', but got '<stream end>' in line 2"),
        ("- mit", "it is no list of keys"),
        (LAUGHS, "it has references"),
        ("a: &a {b: *a}", "it has references"),
        pytest.param("tags: " + "[" * 5000 + "]" * 5000, "it is nested too deeply", marks=pytest.mark.slow),
        ("? [a]\n: b", "unhashable"),
        ("license: 'a\x07'", "special characters are not allowed"),
        ("tags: [" + "x, " * 30_000 + "]", "more than 65536 characters"),
    ],
    ids=["syntax", "a list", "laughs", "itself", "deep", "key", "control", "long"],
)
def test_front_matter_that_cannot_be_read_is_one_note(tmp_path: Path, matter: str, reason: str) -> None:
    card = read_model_card(written(tmp_path, f"---\n{matter}\n---\n"))
    [note] = card.notes
    assert note.startswith("README.md says nothing of the model") and reason in note and "\n" not in note
    assert card.values == {}


def test_text_in_another_encoding_is_a_note(tmp_path: Path) -> None:
    [note] = read_model_card(written(tmp_path, "---\nlicense: größe\n---\n".encode("latin-1"))).notes
    assert "README.md says nothing of the model" in note and "is not UTF-8 text" in note


MATTER = st.lists(
    st.sampled_from([*"-:[]{}&*!|>'\"#%@,?\n ", "license", "tags", "base_model", "- ", "!!int ", "<<", "é"])
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MATTER)
def test_no_card_stops_anybody(tmp_path: Path, pieces: list[str]) -> None:
    card = read_model_card(written(tmp_path, "---\n" + "".join(pieces) + "\n---\n"))
    for value in card.values.values():
        assert value and isinstance(value, str | list)
    assert all("\n" not in note for note in card.notes)
