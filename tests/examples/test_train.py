"""The training script runs, and what it exports is the model that it trained."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import load_minimax_m2, perplexity
from tokenizers import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
BOOKS = ("Ruth", "Est", "Eccl", "Jonah", "Phi", "Jas", "Hos", "Joel", "Amos", "Mal", "Col", "1Pet", "2Tim", "Ge")


@pytest.mark.slow
def test_the_exported_model_is_the_trained_one(tmp_path: Path) -> None:
    """Widths that 128 does not divide: FP8 blocks at the edges are partial."""
    verses = (EXAMPLES / "text/calibration.txt").read_text().split("\n")
    lines = [f"{book}1:{n} {verse}" for i, book in enumerate(BOOKS) for n, verse in enumerate(verses[i::100]) if verse]
    text = tmp_path / "bible.txt"
    text.write_text("\n".join(lines))
    sizes = {"layers": 1, "hidden-size": 192, "intermediate-size": 160, "experts": 4, "experts-per-token": 2}
    schedule = {"vocabulary": 300, "steps": 4, "window": 64}
    options = [word for name, number in (sizes | schedule).items() for word in (f"--{name}", number)]
    model, texts = tmp_path / "model", tmp_path / "texts"

    command = [sys.executable, EXAMPLES / "train.py", "minimax-m2", "--text", text, "--output", model]
    command += ["--write-text", texts, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    printed = re.search(r"perplexity before rounding: ([\d.]+)", done.stdout)
    assert printed is not None
    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode((texts / "evaluation.txt").read_text()).ids
    chunks = torch.tensor(tokens[: len(tokens) // 512 * 512]).view(-1, 512)
    assert perplexity(load_minimax_m2(model), chunks) == pytest.approx(float(printed[1]), rel=2e-3)


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    specification = importlib.util.spec_from_file_location("corpus", EXAMPLES / "corpus.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_verses_lose_their_references_and_chapters_keep_their_gaps(corpus: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "bible.txt"
    text.write_text("".join(f"{book}1:1 One  space.\n{book}1:2 Two.\n{book}2:1 Next.\n" for book in BOOKS))
    books = corpus.read_books(text)
    assert tuple(books) == BOOKS
    assert set(books.values()) == {"One space.\nTwo.\n\nNext.\n"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Ge1:1 In the beginning\nno reference here\n", "bible.txt:2: expected `Book1:1 text`, found 'no reference"),
        ("Ge1:1 In the beginning\n", "no verses of Ruth, Est, .*: is this the whole Bible?"),
    ],
)
def test_a_text_of_another_form_is_refused(corpus: ModuleType, tmp_path: Path, content: str, message: str) -> None:
    text = tmp_path / "bible.txt"
    text.write_text(content)
    with pytest.raises(ValueError, match=message):
        corpus.read_books(text)
