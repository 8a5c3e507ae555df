"""What holds for every trained example alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from trained_examples import EXAMPLES
from transformers import AutoTokenizer

FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_folder_is_small(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize(
    "text", ["In the beginning God created\n\nthe heaven.", "Naïve “quotes”, 12345 façades: 日本語 🙂\t\r\n  end "]
)
def test_the_tokenizer_restores_any_text(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokens
