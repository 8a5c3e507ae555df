"""What reaches a terminal: text as it reads and nothing that a terminal obeys, errors in one short line."""

from __future__ import annotations

import tempfile
import traceback

from ..reports.text import printable as printable

MOST_CHARACTERS = 300  # of an error


def one_line(text: object) -> str:
    """An error as a line of bounded length; what is too long is left out in its middle."""
    line = printable(" ".join(str(text).split("\n")))
    if len(line) <= MOST_CHARACTERS:
        return line
    kept = MOST_CHARACTERS - len(" ... ")
    end = kept // 3  # what to do stands there; what is wrong, and in which file, stands before
    return f"{line[: kept - end]} ... {line[-end:]}"


def save_traceback(error: BaseException) -> str:
    """Where the traceback of an error lies from now on; "nowhere" if there is no room for it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="moecast-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode())
            return file.name
    except OSError:
        return "nowhere"
