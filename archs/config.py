"""Typed, asserted access to a config.json (or to the metadata of a GGUF file).

Configuration values are asserted, not assumed: a known field with an unknown value is an error that names the
field, the value and the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import BadInput

T = TypeVar("T", int, float, bool, str)
_REQUIRED: Any = object()
_LARGEST_U32 = 2**32 - 1
_SMALLEST_F32, _LARGEST_F32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_NOTHING: tuple[Any, ...] = (None, {}, [], {"type": "default"}, {"rope_type": "default"})


class Config:
    """A read-only view of configuration values.

    Args:
        values: the parsed file, used raw (no library fills in defaults).
        origin: the file's name, for error messages.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._values = values
        self._asked: set[str] = set()
        self._sections: dict[str, Config] = {}
        self.origin = origin

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def keys(self) -> tuple[str, ...]:
        """Those that have a value."""
        return tuple(key for key, value in self._values.items() if value is not None)

    def get(self, key: str) -> Any:
        """The raw value, None when the key is missing."""
        self._asked.add(key)
        return self._values.get(key)

    def section(self, key: str) -> Config:
        """A nested object; empty when the key is missing."""
        if key not in self._sections:
            value = self._values.get(key)
            if value is not None and not isinstance(value, Mapping):
                raise BadInput(f"{self.origin}: {key} is {value!r}, expected an object")
            self._sections[key] = Config(value or {}, f"{self.origin}: {key}")
        return self._sections[key]

    def unread(self) -> tuple[str, ...]:
        """The keys with a value that nobody asked for, those of nested objects as `outer.inner`.

        Values that mean "nothing", such as null or a scaling of the default type, count as absent.
        """
        known = self._asked | self._sections.keys()
        own = (key for key, value in self._values.items() if value not in _NOTHING and key not in known)
        nested = (f"{key}.{inner}" for key, section in self._sections.items() for inner in section.unread())
        return (*own, *nested)

    def find(self, key: str) -> Any:
        """The raw value of a key as `unread` names it."""
        for section in self._sections:
            if key not in self._values and key.startswith(f"{section}."):
                return self._sections[section].find(key.removeprefix(f"{section}."))
        return self._values.get(key)

    def integer(self, *keys: str, default: int = _REQUIRED) -> int:
        """A positive whole number under the first of `keys` that is present; also 0, where that is the default."""
        value = self._typed(int, keys, default)
        if not (0 if default == 0 else 1) <= value <= _LARGEST_U32:
            raise self._wrong(keys, value, f"a positive whole number up to {_LARGEST_U32}")
        return value

    def integers(self, key: str, count: int) -> tuple[int, ...]:
        """`count` whole numbers from zero up, stored as a list or, all being equal, as one number."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(type(number) is int and 0 <= number <= _LARGEST_U32 for number in values):
            raise BadInput(f"{self.origin}: {key} is {value!r}, expected {count} whole numbers, one for each layer")
        return tuple(values)

    def marked(self, key: str, count: int, kind: str, other: str) -> tuple[bool, ...] | None:
        """Which of `count` layers a list says to be of one kind rather than the other; None where there is no list."""
        kinds = self.get(key)
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != count or not all(entry in (kind, other) for entry in kinds):
            raise self._wrong((key,), kinds, f"{kind} or {other} for each of {count} layers")
        return tuple(entry == kind for entry in kinds)

    def number(self, *keys: str, default: float = _REQUIRED) -> float:
        """A positive number that float32 holds, under the first of `keys` that is present; also 0, where that is the
        default."""
        value = self._typed(float, keys, default)
        if not (_SMALLEST_F32 <= value <= _LARGEST_F32 or (default == 0 and value == 0)):
            raise self._wrong(keys, value, f"a positive number from {_SMALLEST_F32:.2g} to {_LARGEST_F32:.2g}")
        return value

    def flag(self, *keys: str, default: bool = _REQUIRED) -> bool:
        return self._typed(bool, keys, default)

    def text(self, *keys: str, default: str = _REQUIRED) -> str:
        return self._typed(str, keys, default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Assert that `key`, where present and not null, holds one of the values that the adapter implements."""
        value = self.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(choice) for choice in allowed)
            raise BadInput(f"{self.origin}: {key} is {value!r}, expected {wanted}: this variant is not supported")

    def _wrong(self, keys: tuple[str, ...], value: object, expected: str) -> BadInput:
        return BadInput(f"{self.origin}: {self._present(keys)} is {str(value)[:60]}, expected {expected}")

    def _present(self, keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if key in self), None)

    def _typed(self, kind: type[T], keys: tuple[str, ...], default: T) -> T:
        self._asked.update(keys)
        key = self._present(keys)
        if key is None:
            if default is _REQUIRED:
                raise BadInput(f"{self.origin}: {' or '.join(keys)} is missing, expected {_KINDS[kind]}")
            return default
        value = self._values[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) <= _LARGEST_F32 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise BadInput(f"{self.origin}: {key} is {value!r}, expected {_KINDS[kind]}")
        return value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
