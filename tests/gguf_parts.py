"""GGUF files in parts that tests change one by one, written again without asking whether they fit together."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

TensorHeader = tuple[bytes, tuple[int, ...], int, int]
"""Name, sizes (fastest first), type number, offset."""


@dataclass
class GGUFParts:
    """`keys` are names with their type and value as they are stored; `data` is what follows the header."""

    keys: list[tuple[bytes, bytes]]
    tensors: list[TensorHeader]
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> GGUFParts:
        """The parts of a whole file."""
        return _Reader(content).read()

    def set(self, name: str, stored: bytes) -> None:
        """Replace a key, or add it."""
        self.keys = [*((key, value) for key, value in self.keys if key != name.encode()), (name.encode(), stored)]

    def to_bytes(self) -> bytes:
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))
        out += b"".join(string(key) + value for key, value in self.keys)
        for name, sizes, kind, offset in self.tensors:
            out += string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        return out + bytes(-len(out) % 32) + self.data


def string(text: bytes) -> bytes:
    """Text as GGUF stores it."""
    return struct.pack("<Q", len(text)) + text


def u16(value: int) -> bytes:
    """The type and value of a key."""
    return struct.pack("<IH", 2, value)


def i32(value: int) -> bytes:
    """The type and value of a key."""
    return struct.pack("<Ii", 5, value)


class _Reader:
    """Reads a whole file front to back."""

    _SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 8

    def read(self) -> GGUFParts:
        tensor_count, key_count = self._number("Q"), self._number("Q")
        keys = [*self._keys(key_count)]
        tensors = []
        for _ in range(tensor_count):
            name = self._text()
            sizes = tuple(self._number("Q") for _ in range(self._number("I")))
            tensors.append((name, sizes, self._number("I"), self._number("Q")))
        return GGUFParts(keys, tensors, self.content[-(-self.position // 32) * 32 :])

    def _keys(self, count: int) -> Iterator[tuple[bytes, bytes]]:
        for _ in range(count):
            name, start = self._text(), self.position
            self._skip(self._number("I"))
            yield name, self.content[start : self.position]

    def _skip(self, kind: int) -> None:
        if kind == 8:
            self._text()
        elif kind == 9:
            element, count = self._number("I"), self._number("Q")
            for _ in range(count):
                self._skip(element)
        else:
            self.position += self._SIZES[kind]

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        self.position += struct.calcsize(code)
        return int(value)

    def _text(self) -> bytes:
        size = self._number("Q")
        self.position += size
        return self.content[self.position - size : self.position]
