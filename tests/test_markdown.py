"""The project's own documents: what Markdown makes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")


def tables(page: Path) -> list[list[tuple[int, str]]]:
    """Runs of lines that begin with "|", outside of code, with their numbers."""
    found: list[list[tuple[int, str]]] = [[]]
    in_code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        if line.startswith("|") and not in_code:
            found[-1].append((number, line))
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def cells(line: str) -> int:
    """How many cells a row has; a "|" with a backslash before it is text, even within backticks."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_a_head_and_as_many_cells_in_each_row(page: Path) -> None:
    for table in tables(page):
        (first, head), *rest = table
        where = f"{page.name}, line {first}"
        assert rest and RULE.fullmatch(rest[0][1].rstrip()), f"{where}: no head of a table"
        uneven = [number for number, line in table if not line.rstrip().endswith("|") or cells(line) != cells(head)]
        assert uneven == [], f"{where}: lines {uneven} have another number of cells"


def test_the_check_finds_what_breaks_a_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for broken in ("| a | b |\n|---|---|\n| 1 |\n", "| a | b |\n| 1 | 2 |\n", "| a |\n|---|\n| 1 |\n\n| 2 |\n"):
        page.write_text(broken, encoding="utf-8")
        with pytest.raises(AssertionError, match="line"):
            test_tables_have_a_head_and_as_many_cells_in_each_row(page)
