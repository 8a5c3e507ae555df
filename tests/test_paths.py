"""Names that came from outside: which of them become paths, on every system alike."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from moecast.errors import BadInput
from moecast.paths import inside, is_hexadecimal, is_plain_name, own_file

PLAIN = [
    "model.safetensors", "model-00001-of-00002.safetensors", "sub/folder/model.onnx_data", ".hidden", "a b.json",
    "Größe", "模型.gguf", "console.txt", "communication", "nullable.bin", "com10", "a..b", "-flag", "~user", "$HOME",
    "%41",
]  # fmt: skip
STRANGE = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../b", "a/..", "./a", "a/.", "a//b", "a/", "//a/b", "\\a", "..\\a",
    "a\\b", "C:", "C:a", "c:/a", "a:b", "\\\\?\\a", "a\0b", "a\nb", "a\rb", "\x1b[0m", "\x7f", "\x85", "a\u2028b",
    "a\u202eb", "\ud800",
    "nul", "NUL", "Nul.txt", "nul .txt", "con.tar.gz", "a/prn", "aux/a", "com1", "LPT9.x", "COM¹", "conin$", "CONOUT$",
    "a.", "a ", "a ./b", "...", " ", "a*", "a?", "a<b", "a|b", 'a"', "x" * 256, "é" * 128, "/".join(["abc"] * 300),
    None, 7, b"a", ["a"], True,
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names(name: str, tmp_path: Path) -> None:
    path = inside(tmp_path, name, "a list")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert path.resolve().is_relative_to(tmp_path.resolve())
    assert own_file(tmp_path, name, "a list") == path == tmp_path / name


@pytest.mark.parametrize("name", STRANGE, ids=repr)
def test_strange_names(name: object, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    for make in (inside, own_file):
        with pytest.raises(
            BadInput, match=r"a list: .*, expected the plain name of a file inside the folder"
        ) as caught:
            make(tmp_path, name, "a list")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_own_files_are_no_links(tmp_path: Path) -> None:
    """Neither the file nor a folder on the way; nor is it a pipe, which would wait for a writer."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "sub").mkdir(parents=True)
    other.mkdir()
    for file in (folder / "sub" / "file", other / "file"):
        file.touch()
    (folder / "link").symlink_to(other / "file")
    (folder / "near").symlink_to("sub/file")
    (folder / "dangling").symlink_to("nothing")
    (folder / "linked").symlink_to(other)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    assert own_file(folder, "sub/file", "a list") == folder / "sub" / "file"
    for name in ("link", "near", "dangling", "linked/file", "linked", "sub", "pipe", "absent", "sub/absent"):
        with pytest.raises(BadInput, match="a list: "):
            own_file(folder, name, "a list")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a" * 40, True), ("0123456789abcdef" * 4, True), ("a" * 39, False), ("a" * 40 + "\n", False),
        ("A" * 40, False), ("a" * 63 + "g", False), ("٣" * 40, False), ("", False), (None, False), (b"a" * 40, False),
    ],
)  # fmt: skip
def test_digests(value: object, expected: bool) -> None:
    assert is_hexadecimal(value, 40, 64) is expected
