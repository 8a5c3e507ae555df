"""Typed, asserted access to a config.json (or to the metadata of a GGUF file).

Configuration values are asserted, not assumed: a known field with an unknown value is an error that names the
field, the value and the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import BadInput

T = TypeVar("T", int, float, bool, str)
_REQUIRED: Any = object()


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
        """The keys with a value that nobody asked for, those of nested objects as `outer.inner`."""
        known = self._asked | self._sections.keys()
        own = (key for key, value in self._values.items() if value is not None and key not in known)
        nested = (f"{key}.{inner}" for key, section in self._sections.items() for inner in section.unread())
        return (*own, *nested)

    def integer(self, *keys: str, default: int = _REQUIRED) -> int:
        """A positive whole number under the first of `keys` that is present; also 0, where that is the default."""
        value = self._typed(int, keys, default)
        if value < (0 if default == 0 else 1):
            raise BadInput(f"{self.origin}: {self._present(keys)} is {value}, expected a positive whole number")
        return value

    def integers(self, key: str, count: int) -> tuple[int, ...]:
        """`count` whole numbers from zero up, stored as a list or, all being equal, as one number."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(type(number) is int and number >= 0 for number in values):
            raise BadInput(f"{self.origin}: {key} is {value!r}, expected {count} whole numbers, one for each layer")
        return tuple(values)

    def number(self, *keys: str, default: float = _REQUIRED) -> float:
        return self._typed(float, keys, default)

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
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise BadInput(f"{self.origin}: {key} is {value!r}, expected {_KINDS[kind]}")
        return value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
