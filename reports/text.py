"""How values are written for people and for programs: sizes, counts, names from outside, JSON."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..archs.graph import Graph

_OBEYED = {"Cc", "Cs", "Zl", "Zp"}  # controls, halves of characters, breaks of lines and paragraphs
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(count, 1) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_count(count: float) -> str:
    """228689764864 -> '228.7 B'"""
    for unit in ("", "K", "M", "B"):
        if round(count, 1) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} T"


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'"""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def draft_options(graph: Graph, draft: PurePath | str | None = None) -> tuple[str, ...]:
    """llama-server's options for what drafts tokens: a file beside the model's, or a block in it."""
    if draft:
        return "-md", str(draft)
    return ("--spec-type", "draft-mtp") if graph.predictions else ()


def printable(text: object, keep: str = "") -> str:
    """Text from outside with everything that a terminal obeys written as an escape, except for what to `keep`."""
    return "".join(
        character.encode("unicode_escape").decode() if _is_obeyed(character) and character not in keep else character
        for character in str(text)
    )


def _is_obeyed(character: str) -> bool:
    return unicodedata.category(character) in _OBEYED or ord(character) in _REORDERING


def json_text(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON with null for the numbers that it has no form for; paths are written alike on every system."""
    return json.dumps(_finite(value), indent=indent, default=_text, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with objects for dataclasses, and null for the numbers that JSON has no form for."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: object) -> str:
    return value.as_posix() if isinstance(value, PurePath) else str(value)
