"""Text and JSON files that come from outside: whatever they hold, they are read, or refused in one line.

A file is bounded before it is read, UTF-8 with or without a byte order mark, and its JSON such that nothing later
stumbles over it: no key twice with two values, no deep nesting, whole numbers of 64 bits at most (larger ones become
floats), text that can be written again.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import BadInput

MOST_BYTES = 128 << 20
MOST_ENTRIES = 4_000_000  # values of a JSON file, so that they take less than a gigabyte
MOST_NESTING = 64
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_file(path: Path) -> bool:
    """Whether a regular file is there. Raises BadInput where the system does not say."""
    return _is(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Raises BadInput where the system does not say."""
    return _is(path, stat.S_ISDIR)


def exists(path: Path) -> bool:
    """Whether anything is there. Raises BadInput where the system does not say."""
    return _is(path, bool)


def unreadable(path: Path, error: OSError | ValueError) -> BadInput:
    """What to raise when the system does not give a file; ValueError comes from names that hold a NUL character."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BadInput(f"{path} cannot be read: {reason}")


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raises BadInput when a file begins as the stand-in that git leaves where Git LFS did not fetch the file."""
    if beginning.startswith(_LFS_POINTER):
        raise BadInput(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again")


def read_bytes(path: Path) -> bytes:
    """A file as a whole. Raises BadInput when it cannot be read or is unreasonably large."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if len(content) > MOST_BYTES:
        raise BadInput(
            f"{path} is larger than {MOST_BYTES >> 20} MiB, more than any such file has: is it the right one?"
        )
    refuse_pointer(path, content)
    return content


def read_text(path: Path) -> str:
    """A text file with its line ends made "\\n". Raises BadInput when it cannot be read or is not UTF-8."""
    return _decoded(read_bytes(path), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadInput when it cannot be read or holds anything else."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(content: bytes, origin: str) -> Any:
    """A JSON value; bare Infinity and NaN are accepted, as some published configurations hold them.

    Raises BadInput, which names `origin`, for anything that is no JSON or that a program would stumble over.
    """
    text = _decoded(content, origin)
    if sum(map(text.count, "[{,")) > MOST_ENTRIES:
        raise BadInput(f"{origin} holds more than {MOST_ENTRIES} values, more than any such file has")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            for key, value in pairs:
                if values[key] != value:
                    raise BadInput(f"{origin} holds {key!r} twice, with different values: remove one of them")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=_number)
    except RecursionError:
        raise BadInput(f"{origin} is nested too deeply, more than {MOST_NESTING} levels") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{origin} is not readable JSON ({error}): fetch it again") from None
    _check(value, origin)
    return value


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def _decoded(content: bytes, origin: str) -> str:
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff") or content[:2].count(0) == 1
    try:
        if not is_utf16:
            return content.decode("utf-8-sig")
        what = "is UTF-16 text"
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
    raise BadInput(f"{origin} {what}; expected UTF-8: save it as that, or fetch it again")


def _number(digits: str) -> int | float:
    """A whole number, as a float where it takes more than 64 bits: some tools write 10**30 for "no limit"."""
    if len(digits) <= 20:
        value = int(digits)
        if -(2**63) <= value < 2**64:
            return value
    return float(digits)


def _check(value: Any, origin: str) -> None:
    pending = [(value, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > MOST_NESTING:
            raise BadInput(f"{origin} is nested too deeply, more than {MOST_NESTING} levels")
        if isinstance(value, dict):
            pending += ((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            pending += ((part, depth + 1) for part in value)
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadInput(f"{origin} holds text that is half a character: {value!r}") from None
