"""Damage to files as attackers, tools and disks do it, seeded: bytes, JSON values, GGUF headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from gguf_parts import GGUFParts, string

_RAW = (
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "1" * 5000,
    "-" + "9" * 25,
    "1e-400",
    r'"\ud800"',
    "[" * 3000,
)
"""JSON that `json.dumps` does not write; the last one is no JSON at all."""


def _odd_values(random: Random) -> list[Any]:
    nested: Any = 0
    for _ in range(random.choice((40, 90, 400))):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    return [
        None, True, False, 0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
        -(2**63), 0.0, -0.0, 0.5, -1.5, 1e-30, 1e38, 1e300, "", "a", "1", "x" * 400, "../x", "/etc/passwd", "\0", "\n",
        "\x1b[31m", "é", "日本", "[/INST]", "{{", "{%", "BF16", "F8_E4M3", "Q4_K", [], [None], [[]], [1, 2], ["a"], {},
        {"a": 1}, {"": None}, list(range(300)), nested,
    ]  # fmt: skip


def damaged_json(content: bytes, random: Random) -> bytes:
    """A JSON file with one to three of its values damaged; sometimes its bytes too."""
    value = json.loads(content)
    raw: dict[str, str] = {}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _damage_value(value, random, raw)
    text = json.dumps(value)
    for mark, replacement in raw.items():
        text = text.replace(f'"{mark}"', replacement)
    if random.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text.replace("{", '{"model_type": 1, "version": "a", ', 1)  # a key twice
    return re_encoded(text, random) if random.random() < 0.2 else text.encode()


def re_encoded(text: str, random: Random) -> bytes:
    """The text as other programs save it, or with its bytes damaged."""
    encoding = random.choice(("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "damaged"))
    content = text.encode("utf-8" if encoding == "damaged" else encoding, errors="replace")
    return damaged_bytes(content, random) if encoding == "damaged" else content


def damaged_bytes(content: bytes, random: Random, reach: int | None = None) -> bytes:
    """Bytes changed, cut off, removed, repeated or inserted, among the first `reach`."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        position = random.randrange(min(len(data), reach or len(data)) or 1)
        kind = random.randrange(6)
        if kind == 0:
            data[position : position + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            size, number = random.choice(((4, 0), (4, -1), (8, 2**31), (8, -1), (8, 2**62), (8, 1), (4, 2**30)))
            data[position : position + size] = number.to_bytes(size, "little", signed=number < 0)
        elif kind == 2:
            del data[position : position + random.choice((1, 4, 8, 100))]
        elif kind == 3:
            data[position:position] = random.choice((b"\0", b"\xff" * 8, b"GGUF", b"\xef\xbb\xbf", random.randbytes(5)))
        elif kind == 4:
            data[position:position] = data[position : position + random.choice((8, 64))]
        elif random.random() < 0.3:
            del data[position:]
    return bytes(data)


def damaged_gguf(content: bytes, random: Random) -> bytes:
    """A GGUF file with one key's type and value, or one tensor's header, replaced; the rest stays whole."""
    parts = GGUFParts.of(content)
    keys, tensors = parts.keys, parts.tensors
    if random.random() < 0.6:
        at = random.randrange(len(keys))
        name = keys[at][0] if random.random() < 0.9 else random.choice((b"", b"split.count", b"general.alignment"))
        keys[at] = (name, _odd_gguf_value(random))
    else:
        at = random.randrange(len(tensors))
        name, sizes, kind, offset = tensors[at]
        change = random.randrange(5)
        if change == 0:
            name = random.choice((b"", b"a\0b", b"\xff", tensors[0][0], b"x" * 70))
        elif change == 1:
            sizes = tuple(random.choice((0, 1, 3, 32, 2**31, 2**62, size)) for size in sizes)
        elif change == 2:
            sizes = (*sizes, 1) if random.random() < 0.5 else sizes[:-1]
        elif change == 3:
            kind = random.choice((0, 1, 2, 8, 12, 24, 30, 39, 40, 99, 2**31))
        else:
            offset = random.choice((0, 32, offset + 32, offset - 32 if offset else 7, 2**62, tensors[-1][3]))
        tensors[at] = (name, sizes, kind, offset)
    return parts.to_bytes()


def _odd_gguf_value(random: Random) -> bytes:
    """A type and a value that goes with it."""
    scalars: list[Callable[[], bytes]] = [
        lambda: struct.pack("<IB", 0, random.choice((0, 255))),
        lambda: struct.pack("<Ii", 5, random.choice((0, -1, 7, 2**31 - 1))),
        lambda: struct.pack("<II", 4, random.choice((0, 1, 2, 3, 31, 2**31, 2**32 - 1))),
        lambda: struct.pack("<IQ", 10, random.choice((0, 2**63, 2**64 - 1))),
        lambda: struct.pack("<If", 6, random.choice((0.0, float("nan"), float("inf"), -1.0, 1e30))),
        lambda: struct.pack("<Id", 12, random.choice((1e300, float("nan")))),
        lambda: struct.pack("<I?", 7, random.random() < 0.5),
        lambda: struct.pack("<I", 8) + string(random.choice((b"", b"gpt2", b"x\x1b[31m", b"\xff\xfe", b"default"))),
        lambda: struct.pack("<IIQ", 9, 4, 0),
        lambda: struct.pack("<IIQ3i", 9, 5, 3, 1, -1, 2**31 - 1),
        lambda: struct.pack("<IIQ", 9, 8, 2) + string(b"a") + string(random.choice((b"a", b"b"))),
        lambda: struct.pack("<IIQ", 9, 4, random.choice((2**31, 2**62))),
        lambda: struct.pack("<I", random.choice((13, 99, 2**31))),
    ]
    return random.choice(scalars)()


def _damage_value(value: Any, random: Random, raw: dict[str, str]) -> Any:
    """The value with something inside replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        chance = random.random()
        if chance < 0.1:
            return {other: part for other, part in value.items() if other != key}
        if chance < 0.15:
            return {("\x1b[0m" if other == key else other): part for other, part in value.items()}
        return value | {key: _damage_value(value[key], random, raw)}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        chance = random.random()
        if chance < 0.1:
            return [*value[:at], *value[at + 1 :]]
        if chance < 0.2:
            return [*value, value[at]]
        return [*value[:at], _damage_value(value[at], random, raw), *value[at + 1 :]]
    if random.random() < 0.15:
        mark = f"RAW{len(raw)}"
        raw[mark] = random.choice(_RAW)
        return mark
    return random.choice(_odd_values(random))
