"""Writes Markdown in which whatever names hold is text: no markup, no links, no HTML, no rows of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .text import printable

_MARKUP = re.compile(r"[\\`*_{}\[\]<>|#~$&!@^=]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_LIST = re.compile(r"^([-+]|\d+[.)])(?=\s|$)")


def literal(text: object) -> str:
    """Text from outside, in a line of its own or among others."""
    line = _MARKUP.sub(r"\\\g<0>", printable(" ".join(str(text).split())))
    return _LIST.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", line)


def code(text: object) -> str:
    """Text from outside as code within a line, also of a table."""
    line = printable(" ".join(str(text).split()))
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_block(lines: Iterable[str]) -> str:
    """Lines as code, each as it is but for what a terminal would obey."""
    text = "\n".join(map(printable, lines))
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of cells that are Markdown; `numbers` are the columns to align to the right."""
    right = set(numbers)
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (head, rule, *rows))


def _cell(markdown: str) -> str:
    """Without a bar that would end the cell: code has it as any other text."""
    return re.sub(r"(?<!\\)\|", r"\\|", markdown)
