"""What a user may type for a model on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_checkpoint import (
    SENTINEL,
)
from huggingface_hub import constants
from moecast.errors import BadInput
from moecast.sources.hub.address import HubSource, parse_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MiniMaxAI/MiniMax-M2", ("MiniMaxAI/MiniMax-M2", "main")),
        ("hf://nvidia/Nemotron-3", ("nvidia/Nemotron-3", "main")),
        ("hf://nvidia/Nemotron-3@d51eab0d", ("nvidia/Nemotron-3", "d51eab0d")),
        ("hf://owner/name@refs/pr/7", ("owner/name", "refs/pr/7")),
        ("https://huggingface.co/owner/name", ("owner/name", "main")),
        ("https://huggingface.co/owner/name/tree/v1", ("owner/name", "v1")),
        ("https://huggingface.co/owner/name/tree/a%2Fb", ("owner/name", "a/b")),
        ("https://hub.example.org/mirror/owner/name/tree/v2", ("owner/name", "v2")),
    ],
)
def test_addresses_of_the_hub(text: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org/mirror")
    assert parse_source(text) == HubSource(*expected, endpoint="https://hub.example.org/mirror")


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("owner/name") == HubSource("owner/name")
    (tmp_path / "owner/name").mkdir(parents=True)
    assert parse_source("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "./no/such/folder",
        "/no/such/folder",
        "owner/na me",
        "owner/../name",
        "hf://",
        "hf://datasets/owner/name",
        "https://huggingface.co/owner",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/blob/main/config.json",
        "https://huggingface.co/owner/name/discussions/1",
        "https://example.com/owner/name",
        "ftp://huggingface.co/owner/name",
        f"https://user:{SENTINEL}@huggingface.co/owner/name",
        __file__,
    ],
)
def test_other_texts_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput, match="expected a checkpoint folder") as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)
    assert SENTINEL not in str(caught.value)
