"""Text and JSON from outside: what is read, and the line that refuses the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from moecast import documents
from moecast.documents import is_file, is_folder, parse_json, read_json, read_text
from moecast.errors import BadInput


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'\xef\xbb\xbf{"a": "\xc3\xa9"}', {"a": "é"}),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'{"a": -9223372036854775808, "b": 18446744073709551615}', {"a": -(2**63), "b": 2**64 - 1}),
        (b'{"a": 1000000000000000019884624838656}', {"a": 1e30}),
        (b'{"a": [0.0, Infinity]}', {"a": [0.0, math.inf]}),
        (b'{"a": 1' + b"0" * 5000 + b"}", {"a": math.inf}),
        (b'{"a": ' + _nested(60) + b"}", {"a": json.loads(_nested(60))}),
        (b'{"a": "\\ud83d\\ude42"}', {"a": "🙂"}),
    ],
)
def test_what_is_read(tmp_path: Path, content: bytes, value: object) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    read = read_json(file)
    assert read == value and [type(part) for part in read.values()] == [type(part) for part in dict(value).values()]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text; expected UTF-8: save it as that"),
        ('{"a": 1}'.encode("utf-16-be"), "is UTF-16 text"),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16 text"),
        ('{"a": "é"}'.encode("latin-1"), "is not UTF-8 text: byte 7 is 0xe9; expected UTF-8"),
        (b'{"a": {"b": 1, "b": 2}}', "holds 'b' twice, with different values"),
        (b'{"a": ' + _nested(100) + b"}", "is nested too deeply, more than 64 levels"),
        (_nested(100_000), "is nested too deeply, more than 64 levels"),
        (b'{"a": "\\ud800"}', "holds text that is half a character"),
        (b'{"\\udfff": 1}', "holds text that is half a character"),
        (b"", "is not readable JSON"),
        (b'{"a": 1', "is not readable JSON"),
        (b'{"a": 01}', "is not readable JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType, expected an object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer, not the file"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        read_json(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    with file.open("wb") as stream:
        stream.truncate(documents.MOST_BYTES + 1)
    with pytest.raises(BadInput, match="is larger than 128 MiB"):
        read_json(file)
    monkeypatch.setattr(documents, "MOST_ENTRIES", 10)
    assert parse_json(b"[1, 2, 3, 4]", "here") == [1, 2, 3, 4]
    with pytest.raises(BadInput, match="here holds more than 10 values"):
        parse_json(b"[1, 2, 3, 4, 5, [6, {}], [7], 8, 9]", "here")


def test_line_ends_are_those_of_unix(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(file) == "one\ntwo\nthree\n"


def test_what_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 300)
    for path, reason in ((long, "File name too long"), (Path("a\0b"), "null"), (tmp_path, "Is a directory")):
        with pytest.raises(BadInput, match=f"cannot be read: .*{reason}"):
            read_text(path)
    for ask in (is_file, is_folder):
        with pytest.raises(BadInput, match="xxx cannot be read: File name too long"):
            ask(long)
        assert not ask(tmp_path / "none") and not ask(tmp_path / "none" / "a")
    assert is_folder(tmp_path) and not is_file(tmp_path)

    def denied(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "stat", denied)
    for read in (read_text, read_json, is_file, is_folder):
        with pytest.raises(BadInput, match=r"a\.json cannot be read: Permission denied"):
            read(tmp_path / "a.json")
