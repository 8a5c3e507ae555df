"""Lines of a journal's record: each vouches for itself by a checksum, and what it names is checked.

A line is the CRC-32 of its content in eight hexadecimal digits, a space, and the content, JSON. The first line is the
header; the checksums of all others go on from the header's, so a line of another record counts as damaged here. Each
line stands alone: a damaged one costs what it says, and their order does not matter.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ...files import peak_rss_bytes

Key = tuple[str | int, ...]
STARTED = "started"  # first part of the keys that name files in the making: name
SAVED = "saved"  # and of those that name saved tensors: name, bytes, CRC-32
_DIGITS = 8
_MOST_SECONDS = 1e10


@dataclass(frozen=True)
class Spent:
    """What work has taken: its time, and its largest memory."""

    seconds: float = 0.0
    peak_rss_bytes: int = 0

    @classmethod
    def since(cls, started: float) -> Spent:
        """By this process since `time.monotonic()` was `started`; its memory counts from its beginning."""
        return cls(time.monotonic() - started, peak_rss_bytes())

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, max(self.peak_rss_bytes, other.peak_rss_bytes))


@dataclass
class Record:
    """What a record says: the header, the keys of all that is done, and what the runs took that did it.

    Attributes:
        header: None where no line is a header.
        seed: the header's checksum, which those of further lines go on from.
        damaged: how many lines are not as they were written; one without an end was being written and does not count.
        length: bytes of whole lines.
    """

    header: dict[str, Any] | None = None
    seed: int = 0
    done: set[Key] = field(default_factory=set)
    spent: Spent = Spent()
    damaged: int = 0
    length: int = 0


def sealed(value: object, seed: int = 0) -> bytes:
    """A value as a line."""
    content = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(content, seed), content)


def entry(keys: list[Key], spent: Spent) -> dict[str, Any]:
    """The content of a line behind the header: what is done, and what it took from the beginning."""
    return {"done": keys, "seconds": round(spent.seconds, 3), "peak": spent.peak_rss_bytes}


def read_record(content: bytes) -> Record:
    """The whole lines of a record."""
    *lines, _ = content.split(b"\n")
    record = Record(length=sum(len(line) + 1 for line in lines))
    for line in lines:
        header = _opened(line, 0)
        if header is not None and "done" not in header:
            record.header, record.seed = header, int(line[:_DIGITS], 16)
            break
    for line in lines:
        value = _opened(line, record.seed)
        if value is not None and _is_entry(value):
            record.done.update(tuple(key) for key in value["done"])
            spent = record.spent
            record.spent = Spent(max(spent.seconds, value["seconds"]), max(spent.peak_rss_bytes, value["peak"]))
        elif _opened(line, 0) != record.header or record.header is None:
            record.damaged += 1
    return record


def _opened(line: bytes, seed: int) -> dict[str, Any] | None:
    """The content of a line, None where it is not as it was written."""
    digits, _, content = line.partition(b" ")
    if digits != b"%08x" % zlib.crc32(content, seed):
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_entry(value: Mapping[str, Any]) -> bool:
    keys, seconds, peak = (value.get(name) for name in ("done", "seconds", "peak"))
    if not isinstance(seconds, int | float) or not 0 <= seconds <= _MOST_SECONDS or not isinstance(peak, int):
        return False
    return isinstance(keys, list) and all(_is_sound(key) for key in keys)


def _is_sound(key: object) -> bool:
    """Whether a key can be trusted with what follows from it: files that are named are read, and removed."""
    if not isinstance(key, list) or not all(isinstance(part, str | int) for part in key) or not key:
        return False
    if key[0] == STARTED:
        return len(key) == 2 and _is_part(key[1])
    if key[0] == SAVED:
        return len(key) == 4 and _is_saved(key[1]) and all(isinstance(part, int) for part in key[2:])
    return True


def _is_part(name: object) -> bool:
    """Whether it is a file in the making beside the journal; outputs may be called what the system allows."""
    if not isinstance(name, str):
        return False
    path = PurePath(name)
    return not path.anchor and ".." not in path.parts and path.name.startswith(".") and path.name.endswith(".part")


def _is_saved(name: object) -> bool:
    """Whether it is a plain name within the journal, as this program gives them."""
    return isinstance(name, str) and name != "records" and name.replace("-", "").isalnum() and name.isascii()
