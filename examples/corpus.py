"""The King James Bible as training, calibration and evaluation text."""

import re
from pathlib import Path

VERSE = re.compile(r"([1-3]?[A-Za-z]+)(\d+):\d+ (.+)")

# Held out from training. None of them retells another book, so nothing of them can be known by heart.
EVALUATION_BOOKS = ("Ruth", "Est", "Eccl", "Jonah", "Phi", "Jas")
# Trained on like the rest, but disjoint from the evaluation books: what importance matrices are computed on.
CALIBRATION_BOOKS = ("Hos", "Joel", "Amos", "Mal", "Col", "1Pet", "2Tim")


def read_books(path: Path) -> dict[str, str]:
    """Reads the output of `bible -f gen1:1-rev22:21`, one line `Ge1:1 In the beginning ...` per verse.

    Returns the text of each book by its abbreviation: a verse per line, a blank line between chapters, no references.
    Raises ValueError for a line of another form or a missing held-out book.
    """
    chapters: dict[str, dict[str, list[str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path}:{number}: expected `Book1:1 text`, found {line[:40]!r}")
        book, chapter, verse = match.groups()
        chapters.setdefault(book, {}).setdefault(chapter, []).append(" ".join(verse.split()))
    missing = [book for book in EVALUATION_BOOKS + CALIBRATION_BOOKS if book not in chapters]
    if missing:
        raise ValueError(f"{path}: no verses of {', '.join(missing)}: is this the whole Bible?")
    return {
        book: "\n\n".join("\n".join(verses) for verses in by_chapter.values()) + "\n"
        for book, by_chapter in chapters.items()
    }


def join(books: dict[str, str], names: tuple[str, ...]) -> str:
    """The named books as one text, in the order given."""
    return "\n".join(books[name] for name in names)
