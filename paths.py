"""Paths made of names that came from outside: an index, a listing, a model's external data, a record.

Such a name may only mean a file within its folder, and the same one on every system.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from .errors import BadInput

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\\:*?"<>|]')  # separators, streams of a file, wildcards and pipes on Windows
_LONGEST_PART, _LONGEST = 255, 1024  # bytes


def is_plain_name(name: object) -> bool:
    """Whether this is a relative name of plain parts, divided by slashes, that every system takes as it is."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode(errors="replace")) > _LONGEST:
        return False
    return all(_is_plain_part(part) for part in name.split("/"))


def is_hexadecimal(value: object, *digits: int) -> bool:
    """Whether this is a digest: lower-case digits alone, of one of these lengths."""
    return isinstance(value, str) and len(value) in digits and re.fullmatch(r"[0-9a-f]+", value) is not None


def inside(folder: Path, name: object, origin: object) -> Path:
    """The path that a name from outside means in a folder. Raises BadInput for one that means anything else.

    `origin` says where the name stands. Links that lie there are followed: the Hub's cache consists of them.
    """
    if not is_plain_name(name):
        shown = repr(name) if len(repr(name)) <= 100 else f"{repr(name)[:100]}..."
        raise BadInput(f"{origin}: {shown}, expected the plain name of a file inside the folder")
    return folder / str(name)


def own_file(folder: Path, name: object, origin: object) -> Path:
    """As `inside`, for a file that will be changed: it is there, and no link leads to it. Raises BadInput."""
    path = inside(folder, name, origin)
    try:
        for parent in (path.relative_to(folder).parents)[:-1]:
            if (folder / parent).is_symlink():
                raise BadInput(f"{origin}: {folder / parent} is a link to another place, expected a folder: copy it")
        mode = path.lstat().st_mode
    except OSError as error:
        raise BadInput(f"{origin}: {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a link to another place" if stat.S_ISLNK(mode) else "no regular file"
        raise BadInput(f"{origin}: {path} is {what}, expected a file of the folder's own: copy it there")
    return path


def _is_plain_part(part: str) -> bool:
    if part.strip(". ") == "" or part.endswith((".", " ")) or len(part.encode()) > _LONGEST_PART:
        return False
    return not _FORBIDDEN.search(part) and not _RESERVED.fullmatch(part)
